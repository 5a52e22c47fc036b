package port

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"chrysalis/guest"
)

const (
	controlConnections = 16
	controlTimeout     = 5 * time.Second // for a whole connection
)

// Control is the server of the control port.
type Control struct {
	// Host reports whether a peer is the host. Every other one is hung up on,
	// without a reply.
	Host func(net.Addr) bool
	// Handle carries out one request. What must not happen before the host has
	// its reply, such as ending the VM, goes into then, which may be nil.
	Handle func(guest.ControlRequest) (reply guest.ControlReply, then func())
}

// Serve serves a raw vsock listener until that fails or is closed. It always
// returns an error.
func (c *Control) Serve(raw net.Listener) error {
	ln := Bound(raw, controlConnections, nil, nil)
	for {
		conn, err := ln.Accept()
		if err != nil {
			return fmt.Errorf("control port: %w", err)
		}
		if !c.Host(conn.RemoteAddr()) {
			conn.Close()
			continue
		}
		go func() {
			defer contain()
			if then := c.serve(conn); then != nil {
				then()
			}
		}()
	}
}

// serve answers one request, hangs up and returns what is to be done then.
func (c *Control) serve(conn net.Conn) (then func()) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(controlTimeout))
	line, err := readLine(conn)
	if err != nil && !errors.Is(err, errMessage) {
		return nil // it hung up or said nothing: there is nobody to answer
	}
	reply := guest.ControlReply{Error: guest.ErrorBadMessage}
	if err == nil {
		if request, err := parseControl(line); err == nil {
			reply, then = c.Handle(request)
		}
	}
	out, err := json.Marshal(reply)
	if err != nil {
		panic(err) // a struct of strings and integers always encodes
	}
	conn.Write(append(out, '\n')) // a host that does not listen has still asked
	return then
}

var errMessage = errors.New("control port: not one JSON object of at most 4096 bytes and a newline")

// readLine reads up to the newline. Anything after it in the same packet is
// refused: a second message would go unanswered.
func readLine(r io.Reader) ([]byte, error) {
	buf := make([]byte, guest.MaxControlMessage)
	for n := 0; n < len(buf); {
		m, err := r.Read(buf[n:])
		if at := bytes.IndexByte(buf[n:n+m], '\n'); at >= 0 {
			if at != m-1 {
				return nil, errMessage
			}
			return buf[:n+at], nil
		}
		n += m
		if err != nil {
			return nil, err
		}
	}
	return nil, errMessage
}

// parseControl reads a ControlRequest: one JSON object with the field "op",
// spelled exactly so, once, and nothing after it. encoding/json alone would take
// "OP", and the last of two.
func parseControl(line []byte) (guest.ControlRequest, error) {
	var request guest.ControlRequest
	// The decoder below stops at the end of the first value; this does not.
	if !json.Valid(line) {
		return request, errMessage
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return request, errMessage
	}
	seen := false
	for dec.More() {
		key, err := dec.Token()
		if err != nil || key != "op" || seen {
			return guest.ControlRequest{}, errMessage
		}
		value, err := dec.Token()
		op, ok := value.(string)
		if err != nil || !ok {
			return guest.ControlRequest{}, errMessage
		}
		request.Op, seen = guest.ControlOp(op), true
	}
	if !seen {
		return request, errMessage
	}
	return request, nil
}
