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
	payFlags
	Worker   []string      `placeholder:"URL|NAME" sep:"none" help:"A VM to forward to: https://HOST:PORT, or the name of a VM on this machine; repeat it for more (default: those that offer --model on TON, with --max-price, or else default)."`
	Patience time.Duration `placeholder:"DURATION" help:"How long a worker may take to accept a request, to begin its answer, and between two pieces of it (default: what its manifest allows). Until the first piece another worker is asked then."`
}

// workers are a proxy that is not running yet, and what it trusts and pays with.
type workers struct {
	*proxy.Proxy
	trust   *trust
	cashier *cashier // nil where nobody is paid
}

// open returns workers that serve a model, which is what is looked for where no
// workers are named. Where they are to be paid it shows the plan and asks first.
func (f *workerFlags) open(ctx context.Context, tokenFile string, loopback bool, model string) (_ *workers, err error) {
	pays, err := f.given()
	if err != nil {
		return nil, err
	}
	t, err := f.load(ctx)
	if err != nil {
		return nil, err
	}
	w := &workers{trust: t}
	options := proxy.Options{Policy: t.policy, Records: t.records, Collateral: t.collateral, GPU: t.gpu, Loopback: loopback, Patience: max(0, f.Patience)}
	options.Verified = (&verdictLog{w: os.Stderr, last: map[string]string{}}).note
	if options.Token, err = readToken(tokenFile); err != nil {
		return nil, err
	}
	names := f.Worker
	if pays {
		if w.cashier, err = f.payFlags.open(&f.TON); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, w.cashier.close())
			}
		}()
		options.Payment = w.cashier.payment()
		if len(names) == 0 && model != "" {
			if err = w.cashier.find(ctx, options.Payment, model); err != nil {
				return nil, err
			}
			if w.Proxy, err = proxy.New(options); err != nil {
				return nil, err
			}
			// More may be found later. They are paid at prices within the same bounds, out of
			// the same budget, which is what is agreed to even where all are free now.
			_, err = w.cashier.plan(w.Choose(ctx, model), true)
			return w, err
		}
	}
	if len(names) == 0 {
		names = []string{"default"}
	}
	for _, name := range names {
		endpoint, err := findEndpoint(ctx, name)
		if err != nil {
			return nil, err
		}
		options.Workers = append(options.Workers, endpoint)
	}
	if pays {
		first, err := proxy.New(options)
		if err != nil {
			return nil, err
		}
		if options.Workers, err = w.cashier.plan(first.Plan(ctx, model), false); err != nil {
			return nil, err
		}
	}
	w.Proxy, err = proxy.New(options)
	return w, err
}

// run verifies and pays until ctx ends. ready is called once requests can come.
func (w *workers) run(ctx context.Context, model string, ready func()) {
	if w.trust.published != nil {
		go w.trust.published.follow(ctx, w.Trust)
	}
	if w.cashier != nil {
		go w.cashier.tend(ctx)
	}
	w.Run(ctx, func() {
		if w.cashier != nil {
			if err := w.Prepare(ctx, model); err != nil && ctx.Err() == nil {
				fmt.Fprintln(os.Stderr, "note:", terminal.Line(err.Error()))
			}
		}
		ready()
	})
}

// end is called when no request runs any more.
func (w *workers) end() error {
	if w.cashier == nil {
		return nil
	}
	return w.cashier.end()
}

// ProxyCmd serves a local API that forwards to verified VMs.
type ProxyCmd struct {
	workerFlags
	Model     string `placeholder:"MODEL" help:"Find workers that offer this model on TON, by NAME@REVISION, NAME or root hash."`
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

func (c *ProxyCmd) run(ctx context.Context) (err error) {
	if c.Model != "" && c.MaxPrice == "" && len(c.Worker) == 0 {
		return errors.New("to find workers that offer --model give --max-price, --budget and --key-file, too; or name one with --worker")
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", c.Listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	tcp, ok := listener.Addr().(*net.TCPAddr)
	loopback := ok && tcp.IP.IsLoopback()
	p, err := c.open(ctx, c.TokenFile, loopback, c.Model)
	if errors.Is(err, errDryRun) {
		fmt.Fprintln(os.Stderr, err)
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.end()) }()
	if !loopback {
		fmt.Fprintf(os.Stderr, "note: %s can be reached from other machines, without TLS and without a password\n", listener.Addr())
	}
	server := &http.Server{Handler: p, ReadHeaderTimeout: 30 * time.Second, ErrorLog: log.New(io.Discard, "", 0)}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go p.run(ctx, c.Model, func() { fmt.Printf("http://%s/v1\n", listener.Addr()) })
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
