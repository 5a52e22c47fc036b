package port

import (
	"context"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"time"

	"chrysalis/guest"
)

const (
	statusConnections = 16
	statusTimeout     = 5 * time.Second  // for a request's header, and for each write
	statusIdle        = 30 * time.Second // between requests
	eventInterval     = 5 * time.Second  // the longest silence on /events
	// How long a reader that was given the reason has to hang up before it counts
	// as having it. Hanging up is the only acknowledgement there is; one that does
	// not know to hang up must not cost the VM its whole time limit.
	deliveryGrace = 300 * time.Millisecond
)

// Status is the server of the status port.
type Status struct {
	state *State
	log   *Log
	http  *http.Server
}

// NewStatus returns a server of the state and of the engine's log.
func NewStatus(state *State, engineLog *Log) *Status {
	s := &Status{state: state, log: engineLog}
	s.http = &http.Server{
		Handler:                      s,
		ReadTimeout:                  statusTimeout,
		IdleTimeout:                  statusIdle,
		MaxHeaderBytes:               1, // net/http adds 4096 of its own: 4 KiB
		DisableGeneralOptionsHandler: true,
		Protocols:                    HTTP1(),
		ErrorLog:                     log.New(io.Discard, "", 0),
	}
	return s
}

// Serve serves a raw vsock listener until that fails or is closed. It always
// returns an error.
func (s *Status) Serve(ln net.Listener) error {
	return s.http.Serve(Bound(ln, statusConnections, nil, nil))
}

// CloseLog ends the readers of the engine's log and forgets it. The agent calls
// it when the first client connects, before it reads a byte from it.
func (s *Status) CloseLog() { s.log.Close() }

// The only paths, each for GET only, without a query and without a body.
var statusRoutes = map[string]func(*Status, *stream){
	"/status":     (*Status).serveStatus,
	"/events":     (*Status).serveEvents,
	"/metrics":    (*Status).serveMetrics,
	"/engine-log": (*Status).serveLog,
}

// ServeHTTP implements http.Handler.
func (s *Status) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if recover() != nil {
			Bugs.Add(1)
			panic(http.ErrAbortHandler) // net/http closes the connection
		}
	}()
	out := &stream{w: w, ctx: r.Context(), control: http.NewResponseController(w)}
	serve, ok := statusRoutes[r.RequestURI]
	switch {
	case !ok:
		out.plain(http.StatusNotFound)
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		out.plain(http.StatusMethodNotAllowed)
	case r.ContentLength != 0:
		out.plain(http.StatusBadRequest)
	default:
		// ReadTimeout was for the request. From here on the only read is the one
		// by which net/http notices that the peer has gone.
		out.control.SetReadDeadline(time.Time{})
		serve(s, out)
	}
}

// stream writes a response of which every write has a deadline.
type stream struct {
	w       http.ResponseWriter
	ctx     context.Context
	control *http.ResponseController
}

func (s *stream) plain(code int) {
	s.w.Header().Set("Connection", "close")
	s.start("text/plain; charset=utf-8", code)
	s.send([]byte(http.StatusText(code) + "\n"))
}

func (s *stream) start(contentType string, code int) {
	s.w.Header().Set("Content-Type", contentType)
	s.w.Header().Set("Cache-Control", "no-store")
	s.w.WriteHeader(code)
}

// send writes p and reports whether the peer still takes what it is sent.
func (s *stream) send(p []byte) bool {
	s.control.SetWriteDeadline(time.Now().Add(statusTimeout))
	if _, err := s.w.Write(p); err != nil {
		return false
	}
	return s.control.Flush() == nil
}

func (s *Status) serveStatus(out *stream) {
	out.start("application/json", http.StatusOK)
	out.send(encodeLine(s.state.Status()))
}

func (s *Status) serveMetrics(out *stream) {
	out.start("text/plain; version=0.0.4; charset=utf-8", http.StatusOK)
	out.send(appendMetrics(nil, s.state.Status()))
}

func (s *Status) serveEvents(out *stream) {
	out.start("application/x-ndjson", http.StatusOK)
	ticker := time.NewTicker(eventInterval)
	defer ticker.Stop()
	for {
		status, changed := s.state.watch()
		if !out.send(encodeLine(status)) {
			return
		}
		if status.Reason != guest.ReasonNone {
			select {
			case <-out.ctx.Done():
			case <-time.After(deliveryGrace):
			}
			s.state.markDelivered()
			return // nothing comes after a reason
		}
		ticker.Reset(eventInterval)
		select {
		case <-changed:
		case <-ticker.C:
		case <-out.ctx.Done():
			return
		}
	}
}

func (s *Status) serveLog(out *stream) {
	buf := make([]byte, guest.MaxChunk)
	started := false
	for at := int64(0); ; {
		n, next, more, closed := s.log.read(at, buf)
		at = next
		switch {
		case closed && !started:
			out.plain(http.StatusGone)
			return
		case closed:
			return
		case !started:
			out.start("application/octet-stream", http.StatusOK)
			started = true
		}
		if !out.send(buf[:n]) {
			return
		}
		if n > 0 {
			continue
		}
		select {
		case <-more:
		case <-out.ctx.Done():
			return
		}
	}
}

func encodeLine(status guest.Status) []byte {
	line, err := json.Marshal(status)
	if err != nil {
		panic(err) // a struct of strings and integers always encodes
	}
	return append(line, '\n')
}

// appendMetrics writes a status as Prometheus text (exposition format 0.0.4).
// Labels hold enumerated values only.
func appendMetrics(b []byte, s guest.Status) []byte {
	family := func(name, kind, help string) {
		b = append(b, "# HELP chrysalis_"+name+" "+help+"\n# TYPE chrysalis_"+name+" "+kind+"\n"...)
	}
	sample := func(name, label, value string, v float64) {
		b = append(b, "chrysalis_"+name...)
		if label != "" {
			b = append(b, "{"+label+"="+strconv.Quote(value)+"}"...)
		}
		b = append(b, ' ')
		b = strconv.AppendFloat(b, v, 'f', -1, 64)
		b = append(b, '\n')
	}
	single := func(name, kind, help string, v float64) {
		family(name, kind, help)
		sample(name, "", "", v)
	}
	truth := func(v bool) float64 {
		if v {
			return 1
		}
		return 0
	}

	family("info", "gauge", "The image that this VM was started from.")
	sample("info", "image", s.Image, 1)
	family("phase", "gauge", "1 for the current boot phase.")
	for _, phase := range guest.Phases {
		sample("phase", "phase", string(phase), truth(phase == s.Phase))
	}
	family("phase_seconds", "gauge", "How long a finished boot phase took.")
	for _, p := range s.Phases {
		sample("phase_seconds", "phase", string(p.Name), float64(p.MS)/1000)
	}
	if s.Reason != guest.ReasonNone {
		family("ending", "gauge", "1 for the reason for which this VM is about to end.")
		sample("ending", "reason", string(s.Reason), 1)
	}
	single("ready", "gauge", "1 if clients are being served and the engine answers.", truth(s.Ready))
	single("draining", "gauge", "1 if no new requests are admitted.", truth(s.Draining))
	single("uptime_seconds", "gauge", "Time since the agent's first instruction.", float64(s.UptimeMS)/1000)
	single("kernel_seconds", "gauge", "Kernel time at the agent's first instruction.", float64(s.KernelMS)/1000)

	c := s.Counters
	single("connections_total", "counter", "Connections accepted on the inference port.", float64(c.Connections))
	single("requests_total", "counter", "Requests admitted to the engine.", float64(c.Requests))
	single("requests_active", "gauge", "Requests being served now.", float64(c.Active))
	single("paid_total", "counter", "Requests that began with cover by what was paid.", float64(c.Paid))
	single("unpaid_total", "counter", "Requests answered 402, or cut off for want of cover.", float64(c.Unpaid))
	single("refused_total", "counter", "Requests answered 4xx by the agent itself.", float64(c.Refused))
	single("busy_total", "counter", "Requests answered 429.", float64(c.Busy))
	single("unavailable_total", "counter", "Requests answered 503.", float64(c.Unavailable))
	single("engine_errors_total", "counter", "Requests that the engine broke off, answered 5xx or took too long for.", float64(c.EngineErrors))
	single("cancelled_total", "counter", "Requests whose client went away first.", float64(c.Cancelled))
	single("engine_restarts_total", "counter", "Restarts of the engine.", float64(c.EngineRestarts))
	single("agent_bugs_total", "counter", "Bugs in the agent that cost a peer its connection or its request.", float64(Bugs.Load()))
	const kib = 1024
	single("agent_resident_bytes", "gauge", "Resident memory of the agent.", float64(c.AgentRSSKiB)*kib)
	single("agent_resident_peak_bytes", "gauge", "Peak resident memory of the agent.", float64(c.AgentPeakKiB)*kib)
	single("agent_goroutines", "gauge", "Goroutines of the agent.", float64(c.Goroutines))
	single("agent_descriptors", "gauge", "Open files and sockets of the agent.", float64(c.Descriptors))
	return b
}
