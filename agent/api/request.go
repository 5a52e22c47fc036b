package api

import (
	"context"
	"errors"
	"io"
	"mime"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// request is a body that has been checked.
type request struct {
	route  *route
	values [][]byte // beside route.fields; nil where absent
	stream bool
	usage  bool   // the client wants the usage at the stream's end
	model  string // what its engine is told
}

// alwaysUsage is what the engine is told about streams: the agent wants to know for
// the receipt.
var alwaysUsage = []byte(`{"include_usage":true}`)

// value returns the value of the field that the engine knows by a name, or nil.
func (req *request) value(engine string) []byte {
	for i, f := range req.route.fields {
		if f.engine == engine && req.values[i] != nil {
			return req.values[i]
		}
	}
	return nil
}

// parse checks a body against a route's fields. names maps what a client may call
// a model to what the engine is told. The request refers to body.
func parse(rt *route, names map[string]string, body []byte) (*request, *apiError) {
	if err := checkText(body); err != nil {
		return nil, badRequest("body_invalid", "", "the body cannot be used: "+err.Error())
	}
	c := &cursor{data: body}
	if c.next(0) != '{' {
		return nil, badRequest("body_invalid", "", "the body must be one JSON object")
	}
	req := &request{route: rt, values: make([][]byte, len(rt.fields))}
	seen := make([]bool, len(rt.fields))
	err := members(body, func(key string, value []byte) error {
		at := rt.field(key)
		switch {
		case at < 0:
			return badRequest("unknown_field", key, "the field "+strconv.Quote(key)+" is not supported")
		case seen[at]:
			return badRequest("repeated_field", key, "the field "+strconv.Quote(key)+" is there twice")
		}
		seen[at] = true
		if isNull(value) {
			return nil // clients write null for what they leave out
		}
		req.values[at] = value
		return inside(key, rt.fields[at].check(value))
	})
	if err != nil {
		return nil, asBadRequest(err)
	}
	for i, f := range rt.fields {
		switch {
		case req.values[i] == nil:
			if f.required {
				return nil, badRequest("missing_field", f.name, "the field "+strconv.Quote(f.name)+" is missing")
			}
		case f.name == "model":
			name, ok := names[unquote(req.values[i])]
			if !ok {
				return nil, &apiError{status: http.StatusNotFound, code: "model_not_found", param: "model", message: "this VM does not serve that model; see /v1/models"}
			}
			req.model = name
			req.values[i] = strconv.AppendQuote(nil, name) // plain ASCII: the manifest says so
		case f.name == "stream":
			req.stream = req.values[i][0] == 't'
		}
		for j := range i {
			if req.values[i] != nil && req.values[j] != nil && f.engine != "" && rt.fields[j].engine == f.engine {
				return nil, badRequest("repeated_field", f.name, "give one of "+strconv.Quote(rt.fields[j].name)+" and "+strconv.Quote(f.name))
			}
		}
	}
	if at := rt.field("stream_options"); req.stream && at >= 0 {
		if given := req.values[at]; given != nil {
			members(given, func(_ string, value []byte) error {
				req.usage = value[0] == 't' // its only member, a boolean
				return nil
			})
		}
		req.values[at] = alwaysUsage
	}
	return req, nil
}

func asBadRequest(err error) *apiError {
	var bad invalid
	var api *apiError
	switch {
	case errors.As(err, &api):
		return api
	case errors.As(err, &bad):
		return badRequest("invalid_field", bad.path, strings.TrimSpace(bad.Error()))
	}
	return badRequest("body_invalid", "", "the body cannot be used")
}

// field returns the index of the field of that name, or -1.
func (rt *route) field(name string) int {
	for i := range rt.fields {
		if rt.fields[i].name == name {
			return i
		}
	}
	return -1
}

// lengthField returns the index of the field that bounds the answer's tokens, whether
// it is there or not, or -1 where the route has none.
func (req *request) lengthField() int {
	at := -1
	for i, f := range req.route.fields {
		if f.engine == "max_tokens" && (at < 0 || req.values[i] != nil) {
			at = i
		}
	}
	return at
}

// limit has the engine make at most so many tokens; at is lengthField's.
func (req *request) limit(at int, most int64) {
	req.values[at] = strconv.AppendInt(nil, most, 10)
}

// encode returns the body that the engine is sent, and its length: the fields in
// the route's order under the engine's names, and the constants. Field names are
// never the client's bytes, and the pieces are not copied together.
func (req *request) encode() (pieces net.Buffers, length int64) {
	separator := "{"
	add := func(p []byte) {
		pieces = append(pieces, p)
		length += int64(len(p))
	}
	for i, f := range req.route.fields {
		if req.values[i] == nil || f.engine == "" {
			continue
		}
		add([]byte(separator + `"` + f.engine + `":`))
		add(req.values[i])
		separator = ","
	}
	add([]byte(constants)) // model is required, so this is never the first member
	return pieces, length
}

// checkHead refuses what its header is enough to refuse.
func (s *Server) checkHead(r *http.Request) *apiError {
	kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	charset, given := params["charset"]
	switch {
	case err != nil, kind != "application/json",
		given && !strings.EqualFold(charset, "utf-8"),
		r.Header.Get("Content-Encoding") != "":
		return errContentType
	case r.ContentLength > s.limits.BodyBytes:
		return errTooLarge
	}
	return nil
}

// errGone is not answered: the client has hung up.
var errGone = errors.New("the client has gone")

// readBody reads a whole body. Its buffer grows with what has arrived, whatever
// length was announced, and comes out of the memory set aside for all bodies:
// running out of memory would end PID 1, and with it the VM. It has limits on its
// time of its own, because the manifest's are about what the engine may take.
func (x *exchange) readBody() ([]byte, error) {
	limit := x.s.limits.BodyBytes
	src := http.MaxBytesReader(x.w, x.r.Body, limit)
	most := limit
	if x.r.ContentLength >= 0 {
		most = x.r.ContentLength
	}
	most++ // the read that finds the end needs room, too
	end := earlier(time.Now().Add(x.s.bodyTotal), x.end)
	var buf []byte
	for {
		if len(buf) == cap(buf) {
			var ok bool
			if buf, ok = x.grow(buf, most); !ok {
				return nil, errMemory
			}
		}
		x.rc.SetReadDeadline(earlier(time.Now().Add(x.s.bodyIdle), end))
		n, err := src.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		var tooLarge *http.MaxBytesError
		switch {
		case err == nil:
		case err == io.EOF:
			return buf, nil
		case errors.As(err, &tooLarge):
			return nil, errTooLarge
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, errSlowBody
		case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), errors.Is(err, context.Canceled), isNetError(err):
			return nil, errGone
		default:
			return nil, errBrokenBody
		}
	}
}

func isNetError(err error) bool {
	var netErr net.Error
	return errors.As(err, &netErr)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
