package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"chrysalis/attest"
	"chrysalis/proxy"
	"chrysalis/terminal"
)

// workerFlags say which VMs a proxy forwards to, and whom it trusts.
type workerFlags struct {
	trustFlags
	Worker   []string      `placeholder:"URL|NAME" sep:"none" help:"A VM to forward to: https://HOST:PORT, or the name of a VM on this machine; repeat it for more (default: default)."`
	Patience time.Duration `placeholder:"DURATION" help:"How long a worker may take to accept a request, to begin its answer, and between two pieces of it (default: what its manifest allows). Until the first piece another worker is asked then."`
}

// open returns a proxy that is not running yet, and what it trusts.
func (f *workerFlags) open(ctx context.Context, tokenFile string, loopback bool) (*proxy.Proxy, *trust, error) {
	t, err := f.load(ctx)
	if err != nil {
		return nil, nil, err
	}
	options := proxy.Options{Policy: t.policy, Records: t.records, Collateral: t.collateral, GPU: t.gpu, Loopback: loopback, Patience: max(0, f.Patience)}
	options.Verified = (&verdictLog{w: os.Stderr, last: map[string]string{}}).note
	if options.Token, err = readToken(tokenFile); err != nil {
		return nil, nil, err
	}
	names := f.Worker
	if len(names) == 0 {
		names = []string{"default"}
	}
	for _, name := range names {
		endpoint, err := findEndpoint(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		options.Workers = append(options.Workers, endpoint)
	}
	p, err := proxy.New(options)
	return p, t, err
}

// ProxyCmd serves a local API that forwards to verified VMs.
type ProxyCmd struct {
	workerFlags
	TokenFile string `placeholder:"FILE" help:"A file with the token that the workers ask for. Without one, what the client sends as its API key is passed on to them."`
	Listen    string `default:"127.0.0.1:8080" placeholder:"HOST:PORT" help:"Where to listen; port 0 picks a free one (default: ${default})."`
}

// Help is what 'chrysalis proxy --help' says below the usage.
func (*ProxyCmd) Help() string {
	return "Point any OpenAI client at the address that is printed. Requests go to verified workers only; the page at / shows every check, /metrics counts."
}

// Run serves until it is interrupted.
func (c *ProxyCmd) Run(ctx context.Context) error {
	if err := c.run(ctx); err != nil {
		return &exitError{exitNotChecked, err}
	}
	return nil
}

func (c *ProxyCmd) run(ctx context.Context) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", c.Listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	tcp, ok := listener.Addr().(*net.TCPAddr)
	loopback := ok && tcp.IP.IsLoopback()
	p, t, err := c.open(ctx, c.TokenFile, loopback)
	if err != nil {
		return err
	}
	if !loopback {
		fmt.Fprintf(os.Stderr, "note: %s can be reached from other machines, without TLS and without a password\n", listener.Addr())
	}
	server := &http.Server{Handler: p, ReadHeaderTimeout: 30 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if t.published != nil {
		go t.published.follow(ctx, p.Trust)
	}
	go p.Run(ctx, func() { fmt.Printf("http://%s/v1\n", listener.Addr()) })
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	// Answers that have begun may end.
	end, stop := context.WithTimeout(context.Background(), 10*time.Second)
	defer stop()
	if err := server.Shutdown(end); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// readToken reads a file that holds one token; it is empty when there is no file.
func readToken(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	data, err := readFile(path, 4<<10)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", fmt.Errorf("%s does not hold one token", path)
	}
	return token, nil
}

// verdictLog says when what is known of a worker changes.
type verdictLog struct {
	mu   sync.Mutex
	w    io.Writer
	last map[string]string
}

func (l *verdictLog) note(endpoint string, session *attest.Session, err error) {
	var text string
	switch {
	case session != nil:
		text = conclusion(session)
		if c := session.Verdict.First(); c != nil {
			text += " " + c.String()
		}
	case err != nil:
		text = endpoint + " does not answer: " + err.Error()
	}
	text = terminal.Line(text)
	l.mu.Lock()
	defer l.mu.Unlock()
	if text != "" && l.last[endpoint] != text {
		l.last[endpoint] = text
		fmt.Fprintln(l.w, text)
	}
}
