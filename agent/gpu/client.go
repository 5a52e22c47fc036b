// Package gpu speaks with the NVML helper: a program on the engine disk that
// loads NVIDIA's management library, which no static program can. The agent runs
// it, asks it one thing at a time, and believes nothing of what it says that a GPU
// has not signed: its answers are bounded, strict and enumerated, and it may die,
// hang, flood or lie without hurting PID 1.
//
// NVML is never called while a client waits for a token.
package gpu

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"chrysalis/agent/gpu/protocol"
	"chrysalis/attest/nvidia"
)

// Timeout is how long one answer may take. The slowest, an attestation report,
// takes about a second on a real GPU; loading the library with the first request
// takes several on eight.
const Timeout = 60 * time.Second

// Error is why a request failed.
type Error struct {
	Op     protocol.Op
	Code   protocol.Code
	Detail string
}

// Error implements error. Its text holds what the helper said.
func (e *Error) Error() string {
	if e.Detail == "" {
		return fmt.Sprintf("GPU helper: %s: %s", e.Op, e.Code)
	}
	return fmt.Sprintf("GPU helper: %s: %s: %s", e.Op, e.Code, e.Detail)
}

// Client asks a running helper. After a code of the client's own it is of no use
// any more and its helper has been killed.
type Client struct {
	mu      sync.Mutex
	in      io.WriteCloser
	lines   chan line
	kill    func()
	timeout time.Duration
	id      uint64
	broken  *Error
}

type line struct {
	data []byte
	code protocol.Code // why there is none
}

// NewClient returns a client of a helper whose standard input and output these
// are. kill ends the helper; it may be called more than once. The client closes
// in and reads out until it ends.
func NewClient(in io.WriteCloser, out io.Reader, kill func(), timeout time.Duration) *Client {
	c := &Client{in: in, lines: make(chan line, 1), kill: kill, timeout: timeout}
	go c.read(out)
	return c
}

// read hands on whole lines. It holds at most one line and stops at the first
// that is too long, so that a flood takes no memory.
func (c *Client) read(out io.Reader) {
	defer close(c.lines)
	r := bufio.NewReaderSize(out, protocol.MaxAnswer)
	for {
		data, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			c.lines <- line{code: protocol.CodeFlood}
			c.kill()
			return
		case err != nil:
			c.lines <- line{code: protocol.CodeDied}
			return
		}
		c.lines <- line{data: bytes.Clone(data)}
	}
}

// Close ends the helper.
func (c *Client) Close() {
	c.in.Close()
	c.kill()
	go func() { // let the reader end
		for range c.lines {
		}
	}()
}

// Call asks one thing. Its error is an *Error.
func (c *Client) Call(ctx context.Context, r protocol.Request) (*protocol.Answer, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return nil, c.broken
	}
	fail := func(code protocol.Code, detail string) (*protocol.Answer, error) {
		c.broken = &Error{r.Op, code, detail}
		c.Close()
		return nil, c.broken
	}
	c.id++
	r.Version, r.ID = protocol.Version, c.id
	request, err := json.Marshal(r)
	if err != nil || len(request) >= protocol.MaxRequest {
		return nil, &Error{r.Op, protocol.CodeBadRequest, "too large"}
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	// A helper that does not read must not keep us.
	written := make(chan error, 1)
	go func() {
		_, err := c.in.Write(append(request, '\n'))
		written <- err
	}()
	select {
	case err := <-written:
		if err != nil {
			// The reader may have killed it, and has said why before it did.
			select {
			case l := <-c.lines:
				if l.code != "" {
					return fail(l.code, "")
				}
			default:
			}
			return fail(protocol.CodeDied, "it takes no request")
		}
	case <-ctx.Done():
		return fail(protocol.CodeHung, "it takes no request")
	}
	select {
	case l, ok := <-c.lines:
		if !ok {
			return fail(protocol.CodeDied, "")
		}
		if l.code != "" {
			return fail(l.code, "")
		}
		answer, err := parseAnswer(l.data, &r)
		if err != nil {
			return fail(protocol.CodeGarbage, err.Error())
		}
		if answer.Code != protocol.CodeOK {
			return nil, &Error{r.Op, answer.Code, answer.Detail}
		}
		return answer, nil
	case <-ctx.Done():
		return fail(protocol.CodeHung, "")
	}
}

func parseAnswer(data []byte, r *protocol.Request) (*protocol.Answer, error) {
	var a protocol.Answer
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&a); err != nil {
		return nil, errors.New("not an answer")
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("more than one answer on a line")
	}
	return &a, a.Check(r)
}

// Inventory lists the GPUs.
func (c *Client) Inventory(ctx context.Context) ([]protocol.GPU, error) {
	a, err := c.Call(ctx, protocol.Request{Op: protocol.OpInventory})
	if err != nil {
		return nil, err
	}
	return a.GPUs, nil
}

// System tells the confidential-computing state.
func (c *Client) System(ctx context.Context) (*protocol.System, error) {
	a, err := c.Call(ctx, protocol.Request{Op: protocol.OpSystem})
	if err != nil {
		return nil, err
	}
	return a.System, nil
}

// Health tells whether a GPU is still there and sound.
func (c *Client) Health(ctx context.Context, index int) (*protocol.Health, error) {
	a, err := c.Call(ctx, protocol.Request{Op: protocol.OpHealth, GPU: index})
	if err != nil {
		return nil, err
	}
	return a.Health, nil
}

// SetReady lets the GPUs take work, or not.
func (c *Client) SetReady(ctx context.Context, ready bool) error {
	_, err := c.Call(ctx, protocol.Request{Op: protocol.OpSetReady, Ready: ready})
	return err
}

// Attest makes the evidence of all GPUs for a nonce, with their state of now.
// It judges nothing: package attest/nvidia does.
func (c *Client) Attest(ctx context.Context, nonce [nvidia.NonceSize]byte) (*nvidia.Evidence, error) {
	gpus, err := c.Inventory(ctx)
	if err != nil {
		return nil, err
	}
	system, err := c.System(ctx)
	if err != nil {
		return nil, err
	}
	e := &nvidia.Evidence{Version: nvidia.Version}
	for _, g := range gpus {
		a, err := c.Call(ctx, protocol.Request{Op: protocol.OpAttest, GPU: g.Index, Nonce: nonce[:]})
		if err != nil {
			return nil, err
		}
		chain, err := nvidia.SplitChain(a.Proof.Chain)
		if err != nil {
			return nil, &Error{protocol.OpAttest, protocol.CodeBadAnswer, err.Error()}
		}
		each := nvidia.GPU{
			Model:  g.Name,
			State:  nvidia.State{CC: system.CC, DevTools: system.DevTools, MultiGPU: nvidia.MultiGPU(system.MultiGPU)},
			Report: a.Proof.Report,
		}
		for _, der := range chain {
			each.Certificates = append(each.Certificates, der)
		}
		e.GPUs = append(e.GPUs, each)
	}
	if err := e.Validate(); err != nil {
		return nil, &Error{protocol.OpAttest, protocol.CodeBadAnswer, err.Error()}
	}
	return e, nil
}
