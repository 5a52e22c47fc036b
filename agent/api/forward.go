package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	maxAnswer = 64 << 20 // bytes of an answer, streamed or not
	// An answer up to this size is held until it is whole, so that an engine that
	// dies over it is a clean 502; a longer one is passed on as it comes, and so is
	// one that there is no memory left to hold.
	maxHeld    = 256 << 10
	maxMessage = 1 << 10 // bytes of an engine's error message
	readBuffer = 2 << 10 // bytes
)

// engineDown is a dial that failed: the engine is being restarted.
type engineDown struct{ error }

// ask sends the engine a request of HTTP/1.1 (RFC 9112) over a connection of its own
// and reads the header of its answer. Nothing of the client's header goes with it. The
// answer ends where conn is closed; to close its body would be to read all of it.
//
// A kept connection would save some 0.1 ms, but costs one of the engine's few threads
// for as long as it idles, and fails a request that comes just when the engine closes
// it. http.Transport takes two goroutines more for each stream.
func ask(conn net.Conn, req *request) (*http.Response, error) {
	accept := "application/json"
	if req.stream {
		accept = "text/event-stream"
	}
	body, length := req.encode()
	// All of it is from the agent's own tables. The address is the agent's matter.
	head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: engine\r\nContent-Type: application/json\r\nAccept: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n",
		req.route.method, req.route.path, accept, length)
	message := append(net.Buffers{[]byte(head)}, body...)
	// An engine that refuses a long body answers and hangs up before it has read it.
	_, unsent := message.WriteTo(conn)
	header := &io.LimitedReader{R: conn, N: maxHeader}
	resp, err := http.ReadResponse(bufio.NewReaderSize(header, readBuffer), nil)
	if err != nil {
		return nil, errors.Join(err, unsent)
	}
	header.N = math.MaxInt64 // engineReader bounds the rest
	return resp, nil
}

// forward sends a request to the engine and its answer to the client.
func (x *exchange) forward(req *request) error {
	// Done when the client hangs up: the body has been read to its end.
	ctx, stop := context.WithDeadlineCause(x.r.Context(), x.end, errTotal)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	idle := time.AfterFunc(x.s.idle, func() { cancel(errEngineSilent) })
	defer idle.Stop()

	conn, err := x.s.engine(ctx, x.s.engines[req.model])
	if err != nil {
		return x.why(ctx, engineDown{err})
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	resp, err := ask(conn, req)
	if err != nil {
		return x.why(ctx, err)
	}
	src := &engineReader{body: resp.Body, idle: idle, limit: x.s.idle, left: maxAnswer}
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	switch {
	case resp.StatusCode != http.StatusOK:
		err = engineRefusal(resp.StatusCode, src)
	case req.stream && kind == "text/event-stream":
		err = x.relayEvents(src, req, func() { cancel(nil) })
	case !req.stream && kind == "application/json":
		err = x.relayAnswer(src)
	default:
		return errEngineFailed
	}
	return x.why(ctx, err)
}

// why turns what went wrong while forwarding into what the client is told.
func (x *exchange) why(ctx context.Context, err error) error {
	var told *apiError
	var down engineDown
	switch {
	case err == nil:
		return nil
	case err == errGone, x.r.Context().Err() != nil:
		return errGone
	case errors.As(context.Cause(ctx), &told), errors.As(err, &told):
		return told
	case errors.As(err, &down):
		return errNotReady
	}
	return errEngineFailed
}

// engineReader reads an answer under the idle limit, which runs only while the
// agent waits for the engine, and under the limit on its size.
type engineReader struct {
	body  io.Reader
	idle  *time.Timer
	limit time.Duration
	left  int64
}

func (r *engineReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, errAnswerTooLong
	}
	r.idle.Reset(r.limit)
	n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
	r.idle.Stop()
	r.left -= int64(n)
	return n, err
}

// relayAnswer passes on an answer that is not a stream.
func (x *exchange) relayAnswer(src io.Reader) error {
	most := int64(maxHeld)
	if x.bill != nil {
		most = maxPaidAnswer
	}
	held, whole, err := x.hold(src, most)
	switch {
	case err != nil:
		return err
	case x.bill != nil && !whole && int64(len(held)) < most:
		return errMemory
	case x.bill != nil && !whole:
		return errAnswerTooLong
	case whole && (len(held) == 0 || held[0] != '{' || !json.Valid(held)):
		return errEngineFailed
	}
	e := x.receipt.counts.read(held) // of a longer one nothing is counted
	if x.bill != nil {
		// The engine has made it: a client that hangs up now owes it all the same.
		x.bill.Send(e.Text)
		x.settle(true)
	}
	x.startReceipt()
	x.start(http.StatusOK, "application/json")
	size := int64(len(held))
	if err := x.send(held); err != nil {
		return err
	}
	for buf := held[:min(len(held), freeBuffer)]; !whole; {
		n, err := src.Read(buf)
		if n > 0 {
			size += int64(n)
			if err := x.send(buf[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF:
			whole = true
		case err != nil:
			return err
		}
	}
	if err := x.send(spaces(size)); err != nil {
		return err
	}
	signed, err := x.s.sign(x.receipt)
	if err != nil {
		return errInternal
	}
	x.setTrailer(signed)
	return nil
}

// send writes a part of a body that a receipt covers.
func (x *exchange) send(p []byte) error {
	x.receipt.response.Write(p)
	return x.write(p)
}

// hold reads an answer until it is whole, or longer than most or than there is memory
// for.
func (x *exchange) hold(src io.Reader, most int64) (held []byte, whole bool, err error) {
	for {
		if len(held) == cap(held) {
			var ok bool
			if held, ok = x.grow(held, most); !ok {
				return held, false, nil
			}
		}
		n, err := src.Read(held[len(held):cap(held)])
		held = held[:len(held)+n]
		switch {
		case err == io.EOF:
			return held, true, nil
		case err != nil:
			return nil, false, err
		}
	}
}

// engineRefusal turns an engine's error into the client's. What the engine says
// about the client's own request is passed on as a bounded message; what it says
// about itself is not.
func engineRefusal(status int, src io.Reader) error {
	switch status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity:
	case http.StatusNotImplemented:
		return errNotSupported
	case http.StatusServiceUnavailable:
		return errNotReady
	default:
		return errEngineFailed
	}
	body, err := io.ReadAll(io.LimitReader(src, freeBuffer))
	if err != nil {
		return err
	}
	var said struct {
		Error struct {
			Message string `json:"message"`
		} `json:"error"`
	}
	message := "the engine refused the request"
	if json.Unmarshal(body, &said) == nil && said.Error.Message != "" {
		message += ": " + said.Error.Message
	}
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "")
	}
	if !utf8.ValidString(message) {
		return errEngineFailed
	}
	return &apiError{status: status, code: "engine_refused", message: message, engine: true}
}
