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
	"strconv"
	"strings"
	"sync"
	"time"
)

// maxQMPMessage bounds one message from QEMU, in bytes. QEMU reads what a
// hostile guest writes, so QEMU's own words are bounded too. Its greeting, the
// largest that we read, is below 1 KiB.
const maxQMPMessage = 64 << 10

// qmpMessage is what QEMU sends: a greeting, an event, a return or an error
// (docs/interop/qmp-spec.rst). Fields that we do not use are ignored, as the
// specification demands of clients.
type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	ID int64 `json:"id"`
}

// parseQMP reads one message: one line, without its newline.
func parseQMP(line []byte) (qmpMessage, error) {
	var m qmpMessage
	if len(line) > maxQMPMessage {
		return m, fmt.Errorf("a QMP message of more than %d bytes", maxQMPMessage)
	}
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("a QMP message that is not JSON: %w", err)
	}
	kinds := 0
	for _, is := range []bool{m.Greeting != nil, m.Event != "", m.Return != nil, m.Error != nil} {
		if is {
			kinds++
		}
	}
	if kinds != 1 {
		return m, errors.New("a QMP message of no known kind")
	}
	return m, nil
}

// Ending is how QEMU says that a VM ended.
type Ending string

// The endings.
const (
	EndingNone     Ending = ""               // it runs, or QEMU said nothing
	EndingPowerOff Ending = "guest-shutdown" // the guest powered off
	EndingReset    Ending = "guest-reset"    // the guest reset itself: a kernel panic, a triple fault
	EndingPanic    Ending = "guest-panic"    // the guest told QEMU of a panic
	EndingInternal Ending = "internal-error" // the accelerator could not go on
	EndingQuit     Ending = "host-qmp-quit"  // we ended it
	EndingHost     Ending = "host"           // QEMU was ended from the host
	EndingUnknown  Ending = "unknown"        // a word that this version does not know
	EndingGone     Ending = "qemu-exit"      // QEMU exited without a word
)

// explain says in words how a VM ended, after "the VM".
func (e Ending) explain() string {
	switch e {
	case EndingPowerOff:
		return "powered itself off"
	case EndingReset:
		return "reset itself (a panic in its kernel, or no operating system that could start)"
	case EndingPanic:
		return "reported a panic in its kernel"
	case EndingInternal:
		return "was stopped by its accelerator with an internal error"
	case EndingQuit, EndingHost:
		return "was ended from the host"
	case EndingGone:
		return "is gone: QEMU exited without saying why"
	}
	return "ended in a way that this version does not know"
}

// endingOf reads how a VM ended out of an event, or returns EndingNone.
func endingOf(m qmpMessage) Ending {
	switch m.Event {
	case "SHUTDOWN":
		var data struct {
			Reason string `json:"reason"` // qapi/run-state.json, ShutdownCause
		}
		if json.Unmarshal(m.Data, &data) != nil {
			return EndingUnknown
		}
		switch data.Reason {
		case "guest-shutdown":
			return EndingPowerOff
		case "guest-reset", "subsystem-reset":
			return EndingReset
		case "guest-panic":
			return EndingPanic
		case "host-qmp-quit":
			return EndingQuit
		case "host-error":
			return EndingInternal
		case "host-qmp-system-reset", "host-signal", "host-ui":
			return EndingHost
		}
		return EndingUnknown
	case "GUEST_PANICKED":
		return EndingPanic
	case "RESET":
		return EndingReset
	}
	return EndingNone
}

// qmpClient speaks QMP with one QEMU.
type qmpClient struct {
	conn   net.Conn
	in     *bufio.Reader
	mu     sync.Mutex // serialises commands
	answer chan qmpMessage
	next   int64

	state  sync.Mutex
	ending Ending
	// stopped is closed when QEMU has reported an ending.
	stopped chan struct{}
	// gone is closed when the connection is lost.
	gone chan struct{}
}

// newQMP greets QEMU on conn and starts to read its events.
func newQMP(ctx context.Context, conn net.Conn) (*qmpClient, error) {
	q := &qmpClient{
		conn:    conn,
		in:      bufio.NewReaderSize(conn, maxQMPMessage),
		answer:  make(chan qmpMessage, 1),
		stopped: make(chan struct{}),
		gone:    make(chan struct{}),
	}
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetReadDeadline(deadline)
	}
	m, err := q.read()
	if err != nil {
		return nil, err
	}
	if m.Greeting == nil {
		return nil, errors.New("QEMU did not greet")
	}
	conn.SetReadDeadline(time.Time{})
	go q.loop()
	if _, err := q.execute(ctx, "qmp_capabilities", nil); err != nil {
		return nil, err
	}
	return q, nil
}

// read reads one message, of at most maxQMPMessage bytes.
func (q *qmpClient) read() (qmpMessage, error) {
	line, err := q.in.ReadSlice('\n')
	if err == bufio.ErrBufferFull {
		return qmpMessage{}, fmt.Errorf("a QMP message of more than %d bytes", maxQMPMessage)
	}
	if err != nil {
		return qmpMessage{}, err
	}
	return parseQMP(bytes.TrimSpace(line))
}

func (q *qmpClient) loop() {
	defer close(q.gone)
	for {
		m, err := q.read()
		if err != nil {
			q.conn.Close()
			return
		}
		if m.Event == "" {
			select {
			case q.answer <- m:
			default: // an answer to nothing
			}
			continue
		}
		if m.Event == "STOP" {
			// QEMU stops a VM by itself when the accelerator fails, and says only
			// in query-status why.
			go q.askWhyStopped()
			continue
		}
		q.end(endingOf(m))
	}
}

// end notes the first ending; a SHUTDOWN after a GUEST_PANICKED adds nothing.
func (q *qmpClient) end(e Ending) {
	if e == EndingNone {
		return
	}
	q.state.Lock()
	defer q.state.Unlock()
	if q.ending == EndingNone {
		q.ending = e
		close(q.stopped)
	}
}

func (q *qmpClient) askWhyStopped() {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	status, err := q.status(ctx)
	if err != nil {
		return
	}
	switch status {
	case "internal-error", "io-error":
		q.end(EndingInternal)
	case "guest-panicked":
		q.end(EndingPanic)
	}
}

// status returns QEMU's run state (qapi/run-state.json, RunState).
func (q *qmpClient) status(ctx context.Context) (string, error) {
	raw, err := q.execute(ctx, "query-status", nil)
	if err != nil {
		return "", err
	}
	var out struct {
		Status string `json:"status"`
	}
	if err := json.Unmarshal(raw, &out); err != nil {
		return "", fmt.Errorf("QEMU's status: %w", err)
	}
	return out.Status, nil
}

// Ending returns how the VM ended, as far as QEMU has said.
func (q *qmpClient) Ending() Ending {
	q.state.Lock()
	defer q.state.Unlock()
	return q.ending
}

// driverRuns reports whether the VM's driver has taken over a virtio device,
// given by its id: bit DRIVER_OK of device_status in the common configuration,
// which QEMU puts at the start of BAR 4 (VIRTIO 1.3, sections 2.1 and 4.1.4.3).
// QEMU 11.1.3 fails an assertion when it is asked with x-query-virtio-status, so
// the register itself is read.
func (q *qmpClient) driverRuns(ctx context.Context, id string) (bool, error) {
	const bar, deviceStatus, driverOK = 4, 0x14, 4
	raw, err := q.execute(ctx, "query-pci", nil)
	if err != nil {
		return false, err
	}
	var buses []struct {
		Devices []struct {
			ID      string `json:"qdev_id"`
			Regions []struct {
				BAR     int   `json:"bar"`
				Address int64 `json:"address"` // -1 while the firmware has not given it one
			} `json:"regions"`
		} `json:"devices"`
	}
	if err := json.Unmarshal(raw, &buses); err != nil {
		return false, fmt.Errorf("QEMU's list of PCI devices: %w", err)
	}
	for _, bus := range buses {
		for _, device := range bus.Devices {
			for _, region := range device.Regions {
				if device.ID != id || region.BAR != bar || region.Address <= 0 {
					continue
				}
				status, err := q.readByte(ctx, region.Address+deviceStatus)
				// All ones is what is read where nothing answers yet.
				return err == nil && status != 0xff && status&driverOK != 0, err
			}
		}
	}
	return false, nil
}

// readByte reads a byte of the VM's physical address space.
func (q *qmpClient) readByte(ctx context.Context, address int64) (byte, error) {
	raw, err := q.execute(ctx, "human-monitor-command", map[string]string{"command-line": fmt.Sprintf("xp /1bx %#x", address)})
	if err != nil {
		return 0, err
	}
	var line string // "00000000c0000014: 0x0f\r\n"
	if err := json.Unmarshal(raw, &line); err != nil {
		return 0, fmt.Errorf("QEMU's answer to xp: %w", err)
	}
	_, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
	b, err := strconv.ParseUint(value, 0, 8)
	if err != nil {
		return 0, fmt.Errorf("QEMU's answer to xp: %.80q", line)
	}
	return byte(b), nil
}

// execute runs a command, with arguments or nil, and returns its result.
func (q *qmpClient) execute(ctx context.Context, command string, arguments any) (json.RawMessage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next++
	id := q.next
	request, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        int64  `json:"id"`
	}{command, arguments, id})
	if err != nil {
		return nil, err
	}
	deadline, _ := ctx.Deadline() // none lifts the one of an earlier command
	q.conn.SetWriteDeadline(deadline)
	if _, err := q.conn.Write(append(request, '\n')); err != nil {
		return nil, fmt.Errorf("QMP %s: %w", command, err)
	}
	for {
		select {
		case m := <-q.answer:
			if m.ID != id {
				continue // the answer to a command that was given up
			}
			if m.Error != nil {
				return nil, fmt.Errorf("QMP %s: %.200s", command, m.Error.Desc)
			}
			return m.Return, nil
		case <-q.gone:
			return nil, fmt.Errorf("QMP %s: %w", command, io.ErrUnexpectedEOF)
		case <-ctx.Done():
			return nil, fmt.Errorf("QMP %s: %w", command, ctx.Err())
		}
	}
}

func (q *qmpClient) Close() error { return q.conn.Close() }
