package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

const qmpGreeting = `{"QMP": {"version": {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": ""}, "capabilities": ["oob"]}}` + "\n"

// qemuEnd plays QEMU on one end of a pipe: it answers every command with what
// reply returns, after the events that it may write itself.
func qemuEnd(t *testing.T, reply func(command string, w io.Writer) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	go func() {
		io.WriteString(theirs, qmpGreeting)
		in := bufio.NewScanner(theirs)
		for in.Scan() {
			var request struct {
				Execute string `json:"execute"`
				ID      int64  `json:"id"`
			}
			json.Unmarshal(in.Bytes(), &request)
			result := reply(request.Execute, theirs)
			if result == "" {
				theirs.Close()
				return
			}
			fmt.Fprintf(theirs, "{%s, \"id\": %d}\n", result, request.ID)
		}
	}()
	return ours
}

func TestQMPEndings(t *testing.T) {
	for _, tt := range []struct {
		name, events, status string
		want                 Ending
	}{
		{"power off", `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"}}`, "", EndingPowerOff},
		{"reset", `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"}}`, "", EndingReset},
		{"panic", `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-panic"}}`, "", EndingPanic},
		{"panicked, then shut down", `{"event":"GUEST_PANICKED","data":{"action":"poweroff"}}` + "\n" + `{"event":"SHUTDOWN","data":{"reason":"guest-shutdown"}}`, "", EndingPanic},
		{"internal error", `{"event":"STOP"}`, "internal-error", EndingInternal},
		{"host error", `{"event":"SHUTDOWN","data":{"reason":"host-error"}}`, "", EndingInternal},
		{"quit", `{"event":"SHUTDOWN","data":{"guest":false,"reason":"host-qmp-quit"}}`, "", EndingQuit},
		{"a new word", `{"event":"SHUTDOWN","data":{"reason":"meteor"}}`, "", EndingUnknown},
		{"no data", `{"event":"SHUTDOWN"}`, "", EndingUnknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := qemuEnd(t, func(command string, w io.Writer) string {
				if command == "cont" {
					io.WriteString(w, tt.events+"\n")
				}
				if command == "query-status" {
					return `"return": {"running": false, "status": "` + tt.status + `"}`
				}
				return `"return": {}`
			})
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			q, err := newQMP(ctx, conn)
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			if e := q.Ending(); e != EndingNone {
				t.Errorf("before anything happened: %q", e)
			}
			if _, err := q.execute(ctx, "cont", nil); err != nil {
				t.Fatal(err)
			}
			select {
			case <-q.stopped:
			case <-ctx.Done():
				t.Fatal("no ending came")
			}
			if e := q.Ending(); e != tt.want {
				t.Errorf("%q, want %q", e, tt.want)
			}
		})
	}
}

func TestQMPErrors(t *testing.T) {
	t.Run("a refusal", func(t *testing.T) {
		q, err := newQMP(t.Context(), qemuEnd(t, func(command string, _ io.Writer) string {
			if command == "quit" {
				return `"error": {"class": "GenericError", "desc": "not now"}`
			}
			return `"return": {}`
		}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := q.execute(t.Context(), "quit", nil); err == nil || !strings.Contains(err.Error(), "not now") {
			t.Errorf("%v", err)
		}
		if _, err := q.execute(t.Context(), "cont", nil); err != nil {
			t.Errorf("after a refusal: %v", err)
		}
	})
	t.Run("the deadline of an earlier command", func(t *testing.T) {
		q, err := newQMP(t.Context(), qemuEnd(t, func(string, io.Writer) string { return `"return": {}` }))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := q.execute(ctx, "cont", nil); err != nil {
			t.Fatal(err)
		}
		<-ctx.Done()
		if _, err := q.execute(t.Context(), "query-status", nil); err != nil {
			t.Errorf("a command without a deadline, after one with: %v", err)
		}
	})
	t.Run("QEMU goes away", func(t *testing.T) {
		q, err := newQMP(t.Context(), qemuEnd(t, func(command string, _ io.Writer) string {
			if command == "cont" {
				return ""
			}
			return `"return": {}`
		}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := q.execute(t.Context(), "cont", nil); err == nil {
			t.Error("no error")
		}
		<-q.gone
	})
	t.Run("a greeting that does not end", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer ours.Close()
		go io.WriteString(theirs, strings.Repeat("x", 2*maxQMPMessage))
		if _, err := newQMP(t.Context(), ours); err == nil {
			t.Error("no error")
		}
	})
	t.Run("no greeting", func(t *testing.T) {
		ours, theirs := net.Pipe()
		defer theirs.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := newQMP(ctx, ours); err == nil {
			t.Error("no error")
		}
	})
}

func TestDriverRuns(t *testing.T) {
	const placed = `[{"bus": 0, "devices": [
		{"qdev_id": "", "regions": [{"bar": 4, "type": "memory", "address": 1}]},
		{"qdev_id": "vsock0", "regions": [{"bar": 1, "type": "memory", "address": 2164260864}, {"bar": 4, "type": "memory", "address": 824633720832}]}]}]`
	for _, tt := range []struct {
		name, pci, memory string
		want              bool
		err               string
	}{
		{"runs", placed, `"return": "000000c000000014: 0x0f\r\n"`, true, ""},
		{"driver found, not ready", placed, `"return": "000000c000000014: 0x03\r\n"`, false, ""},
		{"reset", placed, `"return": "000000c000000014: 0x00\r\n"`, false, ""},
		{"nothing answers", placed, `"return": "000000c000000014: 0xff\r\n"`, false, ""},
		{"cannot be read", placed, `"return": "Cannot access memory\r\n"`, false, "xp"},
		{"not placed", strings.ReplaceAll(placed, "824633720832", "-1"), "", false, ""},
		{"not there", `[]`, "", false, ""},
		{"not a list", `{}`, "", false, "PCI"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q, err := newQMP(t.Context(), qemuEnd(t, func(command string, _ io.Writer) string {
				switch command {
				case "query-pci":
					return `"return": ` + strings.Join(strings.Fields(tt.pci), "")
				case "human-monitor-command":
					return tt.memory
				}
				return `"return": {}`
			}))
			if err != nil {
				t.Fatal(err)
			}
			runs, err := q.driverRuns(t.Context(), "vsock0")
			if runs != tt.want {
				t.Errorf("%v, want %v", runs, tt.want)
			}
			if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
		})
	}
}

func FuzzParseQMP(f *testing.F) {
	f.Add([]byte(strings.TrimSpace(qmpGreeting)))
	f.Add([]byte(`{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-shutdown"},"timestamp":{"seconds":1,"microseconds":2}}`))
	f.Add([]byte(`{"return":{},"id":7}`))
	f.Add([]byte(`{"error":{"class":"GenericError","desc":"no"}}`))
	f.Add([]byte(`{"event":"SHUTDOWN","data":[]}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parseQMP(line)
		if err != nil {
			return
		}
		if e := endingOf(m); e != EndingNone && m.Event == "" {
			t.Errorf("an ending %q out of no event", e)
		}
	})
}
