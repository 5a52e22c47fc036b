package launcher

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"sync/atomic"
	"time"

	"chrysalis/guest"
)

// The VM is hostile to its host as well: everything read here is bounded, and
// only enumerated values leave this file.

// maxStatusLine bounds one status document, in bytes. A real one is below 2 KiB.
const maxStatusLine = 16 << 10

// ReasonUnknown stands for any reason that this version does not know.
const ReasonUnknown guest.Reason = "unknown"

// PhaseUnknown stands for any phase that this version does not know.
const PhaseUnknown guest.Phase = "unknown"

var imageNameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)

// parseStatus reads a status document. Words that are not enumerated are
// replaced by "unknown", counts below zero by zero; another version is an error.
func parseStatus(line []byte) (guest.Status, error) {
	var s guest.Status
	if len(line) > maxStatusLine {
		return s, fmt.Errorf("the VM's status is longer than %d bytes", maxStatusLine)
	}
	if err := json.Unmarshal(line, &s); err != nil {
		return guest.Status{}, errors.New("the VM's status is not the JSON document expected")
	}
	if s.Version != 1 {
		return guest.Status{}, fmt.Errorf("the VM speaks version %d of the status document and this launcher version 1; use the launcher that belongs to the image", s.Version)
	}
	if !imageNameRE.MatchString(s.Image) {
		s.Image = "unknown"
	}
	s.Phase = knownPhase(s.Phase)
	if s.Reason != guest.ReasonNone && !s.Reason.Known() {
		s.Reason = ReasonUnknown
	}
	s.RIMs = slices.DeleteFunc(s.RIMs[:min(len(s.RIMs), guest.MaxRIMs)], func(name string) bool { return !guest.IsRIM(name) })
	if len(s.Phases) > len(guest.Phases) {
		s.Phases = s.Phases[:len(guest.Phases)]
	}
	for i := range s.Phases {
		s.Phases[i].Name = knownPhase(s.Phases[i].Name)
		s.Phases[i].MS = max(0, s.Phases[i].MS)
	}
	c := &s.Counters
	for _, n := range []*int64{
		&s.UptimeMS, &s.KernelMS, &c.Connections, &c.Requests, &c.Active, &c.Refused, &c.Busy,
		&c.Unavailable, &c.EngineErrors, &c.Cancelled, &c.EngineRestarts, &c.AgentRSSKiB, &c.AgentPeakKiB, &c.Goroutines, &c.Descriptors,
	} {
		*n = max(0, *n)
	}
	return s, nil
}

func knownPhase(p guest.Phase) guest.Phase {
	if slices.Contains(guest.Phases, p) {
		return p
	}
	return PhaseUnknown
}

// readEvents calls each with every status document of r, one a line, until r
// ends or a document gives a reason: nothing comes after one, and the VM takes
// our hanging up for the sign that we have it. A guest that floods is slowed
// down to one document in pace.
func readEvents(r io.Reader, pace time.Duration, each func(guest.Status)) error {
	in := bufio.NewReaderSize(r, maxStatusLine+1)
	for {
		line, err := in.ReadSlice('\n')
		if err == bufio.ErrBufferFull {
			return fmt.Errorf("the VM's status is longer than %d bytes", maxStatusLine)
		}
		if err != nil {
			return err
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			continue
		}
		s, err := parseStatus(line)
		if err != nil {
			return err
		}
		each(s)
		if s.Reason != guest.ReasonNone {
			return nil
		}
		time.Sleep(pace)
	}
}

// How long a connect to the status port may stay unanswered before the next one
// is tried. A connect from before the VM's driver runs can get lost in the vsock
// device for good; one that is only slow, because an emulated VM is, must not be
// given up time and again.
const (
	minConnect = 2 * time.Second
	maxConnect = 10 * time.Second
)

// guestHTTP sends GET requests to the VM's status port, one at a time.
func guestHTTP(dialer Dialer) *http.Client {
	var patience atomic.Int64
	patience.Store(int64(minConnect))
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, time.Duration(patience.Load()))
			defer cancel()
			conn, err := dialer.Dial(ctx, guest.PortStatus)
			if ctx.Err() != nil {
				patience.Store(min(patience.Load()+int64(time.Second), int64(maxConnect)))
			}
			return conn, err
		},
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 8 << 10,
		ResponseHeaderTimeout:  dialTimeout,
	}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// errStatus is an answer other than 200 on the status port.
type errStatus int

func (e errStatus) Error() string { return fmt.Sprintf("the VM's status port answered %d", int(e)) }

// openGuest sends a GET request and returns the body of a 200 answer.
func openGuest(ctx context.Context, client *http.Client, path string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://vm"+path, nil)
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode != http.StatusOK {
		answer.Body.Close()
		return nil, errStatus(answer.StatusCode)
	}
	return answer.Body, nil
}

// eventSilence is how long the event stream may say nothing. The agent sends a
// line at least every 5 s; an emulated one on a busy host may be late.
const eventSilence = 30 * time.Second

// watchGuest follows the VM's events until ctx ends or the VM gives a reason for
// ending, connecting again when the stream breaks.
func watchGuest(ctx context.Context, dialer Dialer, each func(guest.Status)) {
	client := guestHTTP(dialer)
	ended := false
	for ctx.Err() == nil && !ended {
		attempt, cancel := context.WithCancel(ctx)
		quiet := time.AfterFunc(2*eventSilence, cancel)
		body, err := openGuest(attempt, client, "/events")
		if err == nil {
			quiet.Reset(eventSilence)
			readEvents(body, 20*time.Millisecond, func(s guest.Status) {
				quiet.Reset(eventSilence)
				each(s)
				ended = s.Reason != guest.ReasonNone
			})
			body.Close()
		}
		quiet.Stop()
		cancel()
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// exchange sends one request to the VM's control port and returns the answer, whatever
// it is.
func exchange(ctx context.Context, dialer Dialer, request guest.ControlRequest) (guest.ControlReply, error) {
	var reply guest.ControlReply
	fail := func(err error) (guest.ControlReply, error) {
		return guest.ControlReply{}, fmt.Errorf("ask the VM to %s: %w", request.Op, err)
	}
	conn, err := dialer.Dial(ctx, guest.PortControl)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	encoded, err := json.Marshal(request)
	if err != nil {
		return fail(err)
	}
	if len(encoded) >= guest.MaxControlMessage {
		return fail(fmt.Errorf("a request of %d bytes", len(encoded)))
	}
	if _, err := conn.Write(append(encoded, '\n')); err != nil {
		return fail(err)
	}
	line, err := bufio.NewReaderSize(io.LimitReader(conn, guest.MaxControlMessage), guest.MaxControlMessage).ReadSlice('\n')
	if err != nil {
		return fail(errors.New("it gave no complete answer"))
	}
	if err := json.Unmarshal(line, &reply); err != nil {
		return fail(errors.New("its answer is not the JSON document expected"))
	}
	reply.Active = max(0, reply.Active)
	return reply, nil
}

// control has the VM's control port do something, and returns the answer.
func control(ctx context.Context, dialer Dialer, op guest.ControlOp) (guest.ControlReply, error) {
	reply, err := exchange(ctx, dialer, guest.ControlRequest{Op: op})
	if err != nil {
		return guest.ControlReply{}, err
	}
	if !reply.OK {
		why := "it refused"
		switch reply.Error {
		case guest.ErrorBadMessage, guest.ErrorUnknownOp:
			why = fmt.Sprintf("it refused (%s)", reply.Error)
		}
		return guest.ControlReply{}, fmt.Errorf("ask the VM to %s: %s", op, why)
	}
	reply.Error = ""
	return reply, nil
}
