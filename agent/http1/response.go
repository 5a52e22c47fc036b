package http1

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"
)

// response is an answer. It implements what http.ResponseController looks for.
type response struct {
	c        *conn
	body     *body
	out      *bufio.Writer
	header   http.Header
	trailers []string // announced
	head     bool     // the request's method is HEAD: no body
	begun    bool
	chunked  bool
	left     int64 // bytes to come; negative where the body is in chunks
	closes   bool  // the connection ends with it
	reading  time.Time
}

// Header implements http.ResponseWriter. Once the header is out only the trailers
// matter that "Trailer" has announced.
func (w *response) Header() http.Header { return w.header }

// WriteHeader implements http.ResponseWriter. The body is as long as Content-Length
// says, and in chunks without that.
func (w *response) WriteHeader(status int) {
	if w.begun {
		return
	}
	w.begun = true
	if length, err := strconv.ParseInt(w.header.Get("Content-Length"), 10, 64); err == nil && length >= 0 {
		w.left = length
	} else {
		w.header.Del("Content-Length")
		w.header.Set("Transfer-Encoding", "chunked")
		w.chunked = true
	}
	// What nobody reads of the request cannot be told from the next one.
	if w.closes = w.closes || !w.body.ended || w.header.Get("Connection") == "close" || w.c.s.isDraining(); w.closes {
		w.header.Set("Connection", "close")
	}
	w.header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	w.trailers = w.header["Trailer"]
	skip := map[string]bool{}
	for _, name := range w.trailers {
		skip[name] = true
	}
	fmt.Fprintf(w.out, "HTTP/1.1 %03d %s\r\n", status, http.StatusText(status))
	w.header.WriteSubset(w.out, skip) // errors stay with out
	w.out.WriteString("\r\n")
}

// Write implements http.ResponseWriter. Nothing goes out before FlushError, or before
// the buffer is full.
func (w *response) Write(p []byte) (int, error) {
	if !w.begun {
		w.WriteHeader(http.StatusOK)
	}
	switch {
	case w.head || len(p) == 0:
		return len(p), nil
	case w.chunked:
		fmt.Fprintf(w.out, "%x\r\n", len(p))
		n, err := w.out.Write(p)
		w.out.WriteString("\r\n")
		return n, err
	case int64(len(p)) > w.left:
		return 0, http.ErrContentLength
	}
	w.left -= int64(len(p))
	return w.out.Write(p)
}

// FlushError sends what was written.
func (w *response) FlushError() error {
	if !w.begun {
		w.WriteHeader(http.StatusOK)
	}
	return w.out.Flush()
}

// SetReadDeadline bounds the reading of the request's body, and what TLS writes
// meanwhile. It does nothing after the body's end.
func (w *response) SetReadDeadline(t time.Time) error {
	if w.body.ended {
		return nil
	}
	w.reading = t
	return w.c.net.SetDeadline(t)
}

// SetWriteDeadline bounds writes.
func (w *response) SetWriteDeadline(t time.Time) error { return w.c.net.SetWriteDeadline(t) }

// cont tells the client to send its body.
func (w *response) cont() error {
	if w.begun {
		return nil
	}
	w.c.net.SetWriteDeadline(time.Now().Add(refuseLimit))
	defer w.c.net.SetWriteDeadline(w.reading)
	w.out.WriteString("HTTP/1.1 100 Continue\r\n\r\n")
	return w.out.Flush()
}

// finish ends the body, with its trailers.
func (w *response) finish() error {
	if !w.begun {
		w.header.Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
	}
	switch {
	case w.head:
	case w.chunked:
		w.out.WriteString("0\r\n")
		for _, name := range w.trailers {
			if values, ok := w.header[name]; ok {
				http.Header{name: values}.Write(w.out)
			}
		}
		w.out.WriteString("\r\n")
	case w.left > 0:
		w.out.Flush()
		return io.ErrUnexpectedEOF
	}
	return w.out.Flush()
}

// own is a whole answer of the server's own.
func own(status int) []byte {
	text := fmt.Sprintf("%d %s", status, http.StatusText(status))
	return fmt.Appendf(nil, "HTTP/1.1 %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", text, len(text), text)
}
