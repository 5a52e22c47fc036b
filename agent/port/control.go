package port

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
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

// controlFields are the fields that an operation has beside "op". What is not here
// has none.
var controlFields = map[guest.ControlOp][]string{
	guest.OpPrices:  {"payment"},
	guest.OpAdmit:   {"admit"},
	guest.OpDrop:    {"channel"},
	guest.OpCollect: {"ack", "wait_ms"},
}

// required are those of them that must be there.
var required = map[guest.ControlOp]string{
	guest.OpPrices: "payment", guest.OpAdmit: "admit", guest.OpDrop: "channel",
}

// parseControl reads a ControlRequest: one JSON object and nothing after it, with
// "op" and the operation's fields, all spelled exactly so, once, and none of them
// null. encoding/json alone would take "OP", and the last of two. What the values
// mean is for who carries the request out.
func parseControl(line []byte) (guest.ControlRequest, error) {
	var request guest.ControlRequest
	// The decoder below stops at the end of the first value; this does not.
	if !json.Valid(line) {
		return request, errMessage
	}
	fields, err := checkKeys(line)
	if err != nil {
		return request, err
	}
	dec := json.NewDecoder(bytes.NewReader(line))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&request); err != nil || !fields["op"] {
		return guest.ControlRequest{}, errMessage
	}
	must, known := required[request.Op]
	if known && !fields[must] || request.WaitMS < 0 || request.WaitMS > guest.MaxControlWait {
		return guest.ControlRequest{}, errMessage
	}
	for field := range fields {
		if field != "op" && !slices.Contains(controlFields[request.Op], field) {
			return guest.ControlRequest{}, errMessage
		}
	}
	return request, nil
}

// keyRE is what keys are made of. Of others encoding/json takes some for these: it
// ignores case, and knows a long s.
var keyRE = regexp.MustCompile(`^[a-z_]+$`)

// checkKeys refuses null, other keys than keyRE's, and keys that an object has twice,
// at any depth of a JSON text. It returns the keys of the outermost object.
func checkKeys(text []byte) (outermost map[string]bool, err error) {
	type level struct {
		keys  map[string]bool // nil in an array
		value bool            // the next token is a key's value
	}
	var open []level
	dec := json.NewDecoder(bytes.NewReader(text))
	for {
		token, err := dec.Token()
		if err == io.EOF {
			return outermost, nil
		}
		if err != nil || token == nil {
			return nil, errMessage
		}
		var top *level
		if len(open) > 0 {
			top = &open[len(open)-1]
		}
		if token == json.Delim('}') || token == json.Delim(']') {
			open = open[:len(open)-1]
			continue
		}
		if top != nil && top.keys != nil {
			if !top.value {
				key := token.(string) // JSON has no other keys
				if top.keys[key] || !keyRE.MatchString(key) {
					return nil, errMessage
				}
				top.keys[key], top.value = true, true
				continue
			}
			top.value = false
		}
		switch token {
		case json.Delim('{'):
			keys := map[string]bool{}
			if outermost == nil && top == nil {
				outermost = keys
			}
			open = append(open, level{keys: keys})
		case json.Delim('['):
			open = append(open, level{})
		}
		if outermost == nil {
			return nil, errMessage // it is no object
		}
	}
}
