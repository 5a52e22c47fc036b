package launcher

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"chrysalis/guest"
)

const goodStatus = `{"version":1,"image":"chrysalis","phase":"engine","ready":false,"draining":false,"uptime_ms":12,"kernel_ms":4000,"phases":[{"name":"mounts","ms":3}],"counters":{"connections":1,"requests":2,"active":3,"refused":0,"busy":0,"unavailable":0,"engine_errors":0,"cancelled":0,"engine_restarts":0,"agent_rss_kib":9000,"agent_peak_kib":9001}}`

func TestParseStatus(t *testing.T) {
	s, err := parseStatus([]byte(goodStatus))
	if err != nil || s.Phase != guest.PhaseEngine || s.Counters.Active != 3 || s.Image != "chrysalis" || len(s.Phases) != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, tt := range []struct {
		name, line string
		check      func(guest.Status) bool // nil: refused
	}{
		{"another version", `{"version":2}`, nil},
		{"no version", `{}`, nil},
		{"not JSON", `hello`, nil},
		{"a list", `[]`, nil},
		{"null", `null`, nil},
		{"too long", `{"version":1,"image":"` + strings.Repeat("x", maxStatusLine) + `"}`, nil},
		{"unknown reason", `{"version":1,"reason":"\u001b[2Jrm -rf"}`, func(s guest.Status) bool { return s.Reason == ReasonUnknown }},
		{"unknown phase", `{"version":1,"phase":"x"}`, func(s guest.Status) bool { return s.Phase == PhaseUnknown }},
		{"an image's name with escapes", `{"version":1,"image":"a\u001b[2J"}`, func(s guest.Status) bool { return s.Image == "unknown" }},
		{"counts below zero", `{"version":1,"uptime_ms":-1,"counters":{"active":-5}}`, func(s guest.Status) bool { return s.UptimeMS == 0 && s.Counters.Active == 0 }},
		{"too many phases", `{"version":1,"phases":[` + strings.TrimSuffix(strings.Repeat(`{"name":"mounts"},`, 100), ",") + `]}`, func(s guest.Status) bool { return len(s.Phases) == len(guest.Phases) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := parseStatus([]byte(tt.line))
			if tt.check == nil {
				if err == nil {
					t.Errorf("accepted as %+v", s)
				}
				return
			}
			if err != nil || !tt.check(s) {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(goodStatus))
	f.Add([]byte(`{"version":1,"reason":"stopped","phases":null}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		s, err := parseStatus(line)
		if err != nil {
			return
		}
		if s.Reason != guest.ReasonNone && s.Reason != ReasonUnknown && !s.Reason.Known() {
			t.Errorf("the reason %q came through", s.Reason)
		}
		if len(s.Phases) > len(guest.Phases) || s.Counters.Requests < 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestReadEvents(t *testing.T) {
	t.Run("ends with a reason", func(t *testing.T) {
		var seen []guest.Status
		in := goodStatus + "\n\n" + `{"version":1,"phase":"disks","reason":"disk-corrupt"}` + "\n" + goodStatus + "\n"
		err := readEvents(strings.NewReader(in), 0, func(s guest.Status) { seen = append(seen, s) })
		if err != nil || len(seen) != 2 || seen[1].Reason != guest.ReasonDiskCorrupt {
			t.Errorf("%+v, %v", seen, err)
		}
	})
	t.Run("a line without an end", func(t *testing.T) {
		err := readEvents(endless{}, 0, func(guest.Status) { t.Error("an event") })
		if err == nil {
			t.Error("no error")
		}
	})
	t.Run("a flood is slowed down", func(t *testing.T) {
		start, n := time.Now(), 0
		readEvents(strings.NewReader(strings.Repeat(goodStatus+"\n", 10)), 10*time.Millisecond, func(guest.Status) { n++ })
		if n != 10 || time.Since(start) < 90*time.Millisecond {
			t.Errorf("%d events in %v", n, time.Since(start))
		}
	})
}

type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

// pipeDialer gives each dial one end of a pipe and the VM the other.
type pipeDialer func(port uint32, vm net.Conn)

func (d pipeDialer) Dial(_ context.Context, port uint32) (Conn, error) {
	ours, theirs := net.Pipe()
	go d(port, theirs)
	return &chunkedConn{Conn: ours, closeWrite: func() error { return errors.ErrUnsupported }}, nil
}

func (pipeDialer) Close() error { return nil }

func TestControl(t *testing.T) {
	for _, tt := range []struct {
		name, reply string
		active      int64
		fails       string
	}{
		{"ok", `{"ok":true,"active":3}` + "\n", 3, ""},
		{"refused", `{"ok":false,"error":"unknown-op"}` + "\n", 0, "unknown-op"},
		{"refused in its own words", `{"ok":false,"error":"\u001b[2J"}` + "\n", 0, "it refused"},
		{"no newline", `{"ok":true}`, 0, "no complete answer"},
		{"too long", strings.Repeat("x", 2*guest.MaxControlMessage) + "\n", 0, "no complete answer"},
		{"not JSON", "ok\n", 0, "not the JSON"},
		{"below zero", `{"ok":true,"active":-3}` + "\n", 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := pipeDialer(func(port uint32, vm net.Conn) {
				defer vm.Close()
				line, _ := bufio.NewReader(vm).ReadString('\n')
				var request guest.ControlRequest
				if port != guest.PortControl || json.Unmarshal([]byte(line), &request) != nil || request.Op != guest.OpDrain {
					t.Errorf("port %d got %q", port, line)
				}
				io.WriteString(vm, tt.reply)
			})
			reply, err := control(t.Context(), d, guest.OpDrain)
			if tt.fails == "" && (err != nil || reply.Active != tt.active) {
				t.Errorf("%+v, %v", reply, err)
			}
			if tt.fails != "" && (err == nil || !strings.Contains(err.Error(), tt.fails) || strings.ContainsRune(err.Error(), 0x1b)) {
				t.Errorf("%v, want %q", err, tt.fails)
			}
		})
	}
	t.Run("no answer", func(t *testing.T) {
		d := pipeDialer(func(_ uint32, vm net.Conn) { io.Copy(io.Discard, vm) })
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := control(ctx, d, guest.OpStop); err == nil {
			t.Error("no error")
		}
	})
}

// The watcher connects again when the stream breaks and ends with a reason.
func TestWatchGuest(t *testing.T) {
	dials := 0
	d := pipeDialer(func(port uint32, vm net.Conn) {
		defer vm.Close()
		dials++
		in := bufio.NewReader(vm)
		for {
			line, err := in.ReadString('\n')
			if err != nil || line == "\r\n" {
				break
			}
		}
		switch dials {
		case 1: // breaks off
		case 2:
			io.WriteString(vm, "HTTP/1.1 500 no\r\nContent-Length: 0\r\n\r\n")
		case 3:
			io.WriteString(vm, "HTTP/1.1 200 OK\r\n\r\n"+goodStatus+"\n")
		default:
			io.WriteString(vm, "HTTP/1.1 200 OK\r\n\r\n"+`{"version":1,"phase":"serve","reason":"engine-failing"}`+"\n")
		}
	})
	var seen []guest.Status
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	watchGuest(ctx, d, func(s guest.Status) { seen = append(seen, s) })
	if ctx.Err() != nil || len(seen) != 2 || seen[1].Reason != guest.ReasonEngineFailing {
		t.Errorf("%+v, %v", seen, ctx.Err())
	}
}

// What a VM says that it lacks is shown only if it has the form of a RIM's name.
func TestStatusRIMs(t *testing.T) {
	line := `{"version":1,"image":"chrysalis","phase":"gpu","reason":"gpu-collateral","rims":["NV_GPU_VBIOS_1010_0200_882_96009F0001","; rm -rf /","NV_GPU_VBIOS_\u001b[2J"]}`
	s, err := parseStatus([]byte(line))
	if err != nil || len(s.RIMs) != 1 || s.RIMs[0] != "NV_GPU_VBIOS_1010_0200_882_96009F0001" {
		t.Errorf("%q, %v", s.RIMs, err)
	}
	many := strings.Repeat(`"NV_GPU_VBIOS_1",`, 200)
	s, err = parseStatus([]byte(`{"version":1,"image":"chrysalis","phase":"gpu","rims":[` + strings.TrimSuffix(many, ",") + `]}`))
	if err != nil || len(s.RIMs) != guest.MaxRIMs {
		t.Errorf("%d names, %v", len(s.RIMs), err)
	}
}
