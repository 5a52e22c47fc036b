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
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The supervisor's own API, HTTP over control.sock in the run's folder, which
// only the user can enter. What it refuses it answers with 409 and why:
//
//	GET  /v1/state     State
//	POST /v1/stop      stopRequest; answers at once
//	GET  /v1/earnings  Earned
//	POST /v1/prices    a list of pay.Price, in the order of the models
//	POST /v1/handover  takes the connection over; see handover
const controlSocket = "control.sock"

func (s *supervisor) serveAPI() (io.Closer, error) {
	l, err := net.Listen("unix", s.short(controlSocket))
	if err != nil {
		return nil, fmt.Errorf("make the control socket: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(s.snapshot())
	})
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, r *http.Request) {
		var req stopRequest
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 4<<10)).Decode(&req); err != nil {
			http.Error(w, "not a request to stop", http.StatusBadRequest)
			return
		}
		req.why = "the VM was stopped from the host"
		s.requestStop(req)
		w.WriteHeader(http.StatusAccepted)
	})
	mux.HandleFunc("GET /v1/earnings", s.getEarnings)
	mux.HandleFunc("POST /v1/prices", s.postPrices)
	mux.HandleFunc("POST /v1/handover", s.handover)
	server := &http.Server{Handler: mux, ErrorLog: s.log, ReadHeaderTimeout: 5 * time.Second}
	go server.Serve(l)
	return server, nil
}

// handover gives the listening socket to the supervisor of the run that replaces
// this one. Clients notice nothing: the socket stays open throughout, and what
// connects in between waits in its queue. The answer is one byte with the
// descriptor (SCM_RIGHTS, unix(7)); one byte back says that it has arrived.
func (s *supervisor) handover(w http.ResponseWriter, _ *http.Request) {
	raw, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "cannot hand over", http.StatusInternalServerError)
		return
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(5 * time.Second))
	conn, ok := raw.(*net.UnixConn)
	if !ok {
		return
	}
	err = s.stopAccepting(func(l *net.TCPListener) error {
		var sent error
		sys, err := l.SyscallConn()
		if err != nil {
			return err
		}
		err = sys.Control(func(fd uintptr) {
			_, _, sent = conn.WriteMsgUnix([]byte{1}, unix.UnixRights(int(fd)), nil)
		})
		if err := errors.Join(err, sent); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, make([]byte, 1))
		return err
	})
	if err != nil {
		s.log.Printf("hand over: %v", err)
		return
	}
	s.log.Print("the listening socket was handed over")
}

// takeOver gets the listening socket of the run that this one replaces. When
// that run is gone meanwhile, the address is free and taken as usual; while it is
// ending, it neither answers nor frees the address for a moment.
func (s *supervisor) takeOver() (*net.TCPListener, error) {
	for deadline := time.Now().Add(askPatience); ; time.Sleep(20 * time.Millisecond) {
		l, err := s.store.run(s.cfg.Name, s.cfg.Replaces).askForListener()
		if err == nil {
			return l, nil
		}
		fresh, listenErr := net.Listen("tcp", s.cfg.Listen)
		if listenErr == nil {
			s.log.Printf("take over the listening socket: %v; its address was free", err)
			return fresh.(*net.TCPListener), nil
		}
		if !errors.Is(listenErr, unix.EADDRINUSE) || time.Now().After(deadline) {
			return nil, fmt.Errorf("take over %s from the replaced VM: %w", s.cfg.Listen, errors.Join(err, listenErr))
		}
	}
}

func (r run) askForListener() (*net.TCPListener, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	raw, err := r.dial(ctx)
	if err != nil {
		return nil, err
	}
	defer raw.Close()
	conn := raw.(*net.UnixConn)
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, "POST /v1/handover HTTP/1.1\r\nHost: vm\r\nContent-Length: 0\r\n\r\n"); err != nil {
		return nil, err
	}
	control := make([]byte, unix.CmsgSpace(4))
	n, controlLen, _, _, err := conn.ReadMsgUnix(make([]byte, 1), control)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(control[:controlLen])
	if n != 1 || err != nil || len(messages) != 1 {
		return nil, errors.New("it does not serve clients")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, errors.New("it sent no socket")
	}
	file := os.NewFile(uintptr(fds[0]), "listener")
	defer file.Close()
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	tcp, ok := l.(*net.TCPListener)
	if !ok {
		l.Close()
		return nil, errors.New("it sent no TCP socket")
	}
	if _, err := conn.Write([]byte{1}); err != nil {
		l.Close()
		return nil, err
	}
	return tcp, nil
}

// dial connects to the run's control socket. It goes through the folder's
// descriptor, because a unix socket's address has room for 108 bytes only.
func (r run) dial(ctx context.Context) (net.Conn, error) {
	dir, err := unix.Open(r.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir, controlSocket))
}

// maxAnswer bounds what a supervisor answers, in bytes: years of earnings.
const maxAnswer = 64 << 20

// call sends one request to the run's supervisor.
func (r run) call(ctx context.Context, method, path string, body, into any) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return r.dial(ctx) },
		DisableKeepAlives: true,
	}}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://vm"+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("talk to the VM's supervisor: %w", err)
	}
	defer answer.Body.Close()
	if answer.StatusCode == http.StatusConflict {
		why, _ := io.ReadAll(io.LimitReader(answer.Body, 4<<10))
		return errors.New(strings.TrimSpace(string(why)))
	}
	if answer.StatusCode/100 != 2 {
		return fmt.Errorf("talk to the VM's supervisor: it answered %d", answer.StatusCode)
	}
	if into == nil {
		return nil
	}
	return json.NewDecoder(bufio.NewReader(io.LimitReader(answer.Body, maxAnswer))).Decode(into)
}

func (r run) askToStop(ctx context.Context, req stopRequest) error {
	return r.call(ctx, http.MethodPost, "/v1/stop", req, nil)
}

// current returns the state of a live run: the supervisor's word, or the last
// one written where it does not answer.
func (r run) current(ctx context.Context) (State, error) {
	var state State
	if err := r.call(ctx, http.MethodGet, "/v1/state", nil, &state); err == nil {
		return state, nil
	}
	return r.readState()
}
