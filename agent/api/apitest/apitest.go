// Package apitest runs, in a test's own process, the server that clients meet in a VM
// (package agent/api) and the control port that its host does (agent/port), in front
// of an engine that counts. Launcher and client are tested against it, without a VM.
package apitest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"chrysalis/agent/api"
	"chrysalis/agent/port"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/pay"
)

// Network is the global id in Manifest's payment.
const Network = -7

// Step is the voucher step in Manifest's payment, in nanotons.
const Step = 1_000_000

// Manifest is one of a VM with two models that cost something and one that is free.
// A token of the first costs a nanoton in a prompt and three in an answer.
func Manifest() *manifest.Manifest {
	hash := func(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }
	m := &manifest.Manifest{
		Version:    1,
		Engine:     manifest.Disk{RootHash: hash("engine"), DataBlocks: 1},
		Parameters: map[string]int64{},
		Limits:     manifest.DefaultLimits,
		Payment: &manifest.Payment{Network: Network, Step: Step, Ceilings: []pay.Price{
			{Prompt: 1_000_000, Completion: 3_000_000}, {Prompt: 2_000_000, Completion: 2_000_000}, {},
		}},
	}
	for _, name := range []string{"test/model", "test/other", "test/free"} {
		m.Models = append(m.Models, manifest.Model{Name: name, Revision: "1", Disk: manifest.Disk{RootHash: hash(name), DataBlocks: 1}})
	}
	return m
}

// Worker is a server that runs.
type Worker struct {
	*api.Server
	Counters api.Counters

	Address  string            // of the inference port, HOST:PORT
	URL      string            // https://HOST:PORT
	SPKI     [sha256.Size]byte // of the TLS key, as pay.SignPayer takes it
	Receipts ed25519.PublicKey // receipts are signed with it
	Control  string            // path of the control port's Unix socket
	Client   *http.Client      // takes the worker's TLS key and no other
	done     sync.WaitGroup
	close    []func()
}

// Start runs a server for the VM that a manifest describes; nil is Manifest's. engine
// is what answers, Engine where it is nil. change, unless nil, changes the
// configuration: certificate, receipt key and evidence can be those of a forged VM
// (package attest/attesttest).
func Start(m *manifest.Manifest, engine http.Handler, change func(*api.Config)) (w *Worker, err error) {
	if m == nil {
		m = Manifest()
	}
	if engine == nil {
		engine = http.HandlerFunc(Engine)
	}
	encoded, err := m.Encode()
	if err != nil {
		return nil, err
	}
	w = &Worker{}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	dir, err := os.MkdirTemp("", "apitest")
	if err != nil {
		return nil, err
	}
	w.close = append(w.close, func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "engine")
	behind, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: engine}
	w.serve(func() { server.Serve(behind) }, func() { server.Close() })

	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	c := api.Config{
		Models:     m.Models,
		Limits:     m.Limits,
		Tokens:     m.Tokens,
		Payment:    m.Payment,
		ReceiptKey: private,
		Manifest:   manifest.SHA384(encoded),
		Engine: func(ctx context.Context, _ int) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
		Ready:    func() bool { return true },
		Counters: &w.Counters,
	}
	if c.Certificate, err = certificate(); err != nil {
		return nil, err
	}
	if change != nil {
		change(&c)
	}
	leaf, err := x509.ParseCertificate(c.Certificate.Certificate[0])
	if err != nil {
		return nil, err
	}
	w.SPKI = sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	w.Receipts = public
	if key, ok := c.ReceiptKey.Public().(ed25519.PublicKey); ok {
		w.Receipts = key
	}
	w.Server = api.New(c)
	inference, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w.Address = inference.Addr().String()
	w.URL = "https://" + w.Address
	w.serve(func() { w.Server.Serve(inference) }, func() {
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		w.Server.Shutdown(ctx)
		inference.Close()
	})
	transport := &http.Transport{TLSClientConfig: &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // the key is looked at instead
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) != 1 || !bytes.Equal(raw[0], leaf.Raw) {
				return errors.New("another worker")
			}
			return nil
		},
	}}
	w.Client = &http.Client{Transport: transport}
	w.close = append(w.close, transport.CloseIdleConnections)

	w.Control = filepath.Join(dir, "control")
	control, err := net.Listen("unix", w.Control)
	if err != nil {
		return nil, err
	}
	w.serve(func() {
		(&port.Control{Host: func(net.Addr) bool { return true }, Handle: w.handle}).Serve(control)
	}, func() { control.Close() })
	return w, nil
}

func (w *Worker) serve(run, stop func()) {
	w.close = append(w.close, stop)
	w.done.Add(1)
	go func() {
		defer w.done.Done()
		run()
	}()
}

// Close ends the worker. What runs is cut off.
func (w *Worker) Close() {
	for i := len(w.close) - 1; i >= 0; i-- {
		w.close[i]()
	}
	w.close = nil
	w.done.Wait()
}

// handle is the agent's, but for the end of the VM.
func (w *Worker) handle(r guest.ControlRequest) (guest.ControlReply, func()) {
	switch r.Op {
	case guest.OpDrain, guest.OpStop:
		w.Drain()
		return guest.ControlReply{OK: true, Active: w.Active()}, nil
	case guest.OpPrices, guest.OpAdmit, guest.OpDrop, guest.OpCollect:
		return w.Payment(r), nil
	}
	return guest.ControlReply{Error: guest.ErrorUnknownOp}, nil
}

// Ask asks the control port.
func (w *Worker) Ask(r guest.ControlRequest) (reply guest.ControlReply, err error) {
	line, err := json.Marshal(r)
	if err != nil {
		return reply, err
	}
	conn, err := net.Dial("unix", w.Control)
	if err != nil {
		return reply, err
	}
	defer conn.Close()
	if _, err := conn.Write(append(line, '\n')); err != nil {
		return reply, err
	}
	answer, err := io.ReadAll(io.LimitReader(conn, guest.MaxControlMessage+1))
	if err != nil {
		return reply, err
	}
	if len(answer) > guest.MaxControlMessage {
		return reply, errors.New("the reply is too long")
	}
	return reply, json.Unmarshal(answer, &reply)
}

// Till is a launcher without a chain: it takes what the worker tells, acknowledges it,
// and admits what is wanted as Admit says.
type Till struct {
	// Admit returns what is known of a channel, or false. May be nil.
	Admit func(channel string) (guest.Admission, bool)

	mu       sync.Mutex
	balances []guest.Balance
	wanted   []string
	stop     chan struct{}
	done     chan struct{}
}

// Open begins to collect from a worker.
func (t *Till) Open(w *Worker) {
	t.stop, t.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(t.done)
		var ack uint64
		for {
			select {
			case <-t.stop:
				return
			default:
			}
			reply, err := w.Ask(guest.ControlRequest{Op: guest.OpCollect, Ack: ack, WaitMS: 100})
			if err != nil || !reply.OK {
				return
			}
			if reply.Batch > 0 {
				ack = reply.Batch
			}
			t.mu.Lock()
			t.balances = append(t.balances, reply.Balances...)
			t.wanted = append(t.wanted, reply.Wanted...)
			t.mu.Unlock()
			for _, channel := range reply.Wanted {
				if t.Admit == nil {
					continue
				}
				if a, ok := t.Admit(channel); ok {
					w.Ask(guest.ControlRequest{Op: guest.OpAdmit, Admit: &a})
				}
			}
		}
	}()
}

// Close ends it, once what it was told last is acknowledged or not.
func (t *Till) Close() {
	close(t.stop)
	<-t.done
}

// Balances are all that have been told so far.
func (t *Till) Balances() []guest.Balance {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]guest.Balance(nil), t.balances...)
}

// Wanted are all channels that have been wanted so far.
func (t *Till) Wanted() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.wanted...)
}

func certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// defaultTokens is how many tokens Engine makes where it is not told.
const defaultTokens = 8

// Engine answers every prompt with tokens of four bytes, "tick", as many as max_tokens
// says. It counts a token for four bytes of its request.
func Engine(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var asked struct {
		Stream    bool
		MaxTokens int `json:"max_tokens"`
	}
	if err != nil || json.Unmarshal(body, &asked) != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	tokens, reason := asked.MaxTokens, "length"
	if tokens <= 0 || tokens > defaultTokens && !asked.Stream {
		tokens, reason = defaultTokens, "stop"
	}
	if r.URL.Path == "/v1/embeddings" {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"object":"list","data":[{"object":"embedding","index":0,"embedding":[1]}],"usage":{"prompt_tokens":%d,"total_tokens":%[1]d}}`, len(body)/4)
		return
	}
	usage := fmt.Sprintf(`"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}`, len(body)/4, tokens, len(body)/4+tokens)
	if !asked.Stream {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"choices":[{"index":0,"finish_reason":%q,"message":{"role":"assistant","content":%q}}],%s}`, reason, strings.Repeat("tick", tokens), usage)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	for range tokens {
		if _, err := io.WriteString(w, `data: {"choices":[{"index":0,"delta":{"content":"tick"}}]}`+"\n\n"); err != nil {
			return
		}
	}
	fmt.Fprintf(w, "data: {\"choices\":[{\"index\":0,\"finish_reason\":%q,\"delta\":{}}]}\n\ndata: {\"choices\":[],%s}\n\ndata: [DONE]\n\n", reason, usage)
}
