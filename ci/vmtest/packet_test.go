package vmtest

import (
	"bytes"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/guest"
	"chrysalis/image/toolsroot"
)

// TestMalformedPackets is a vsock device that does not keep to the rules. The VM
// is the debug image, whose kernel would say what hurts it.
func TestMalformedPackets(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "vsock") // a unix socket's address has 108 bytes
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := net.Listen("unix", filepath.Join(dir, "vhost.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d := serveVsock(ln)
	vm := bootByHand(t, filepath.Join(filepath.Dir(uki), "chrysalis-debug.efi"), func(argv []string) []string {
		for i, arg := range argv {
			argv[i] = strings.Replace(arg, "path=/vm/io/vhost.sock", "path=/vm/evil/vhost.sock", 1)
		}
		return argv
	}, toolsroot.Bind{Host: dir, Inside: "/vm/evil", Writable: true})
	console := func() string {
		data, err := os.ReadFile(filepath.Join(vm.dir, "console.log"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	vm.await(func() bool {
		text, err := d.status(10 * time.Second)
		return err == nil && strings.Contains(text, `"ready":true`)
	})
	// damage is what the kernel says when memory is not as it should be.
	damage := []string{"BUG:", "Oops", "general protection", "stack-protector", "refcount_t", "kernel panic", "list_add corruption", "list_del corruption"}
	well := func(t *testing.T) {
		t.Helper()
		select {
		case err := <-d.errs:
			t.Fatalf("the device: %v", err)
		default:
		}
		var err error
		for range 3 { // one that was in flight may be lost to it
			var text string
			if text, err = d.status(20 * time.Second); err == nil && strings.Contains(text, `"ready":true`) {
				break
			}
		}
		if err != nil {
			t.Errorf("the VM does not tell how it is: %v", err)
		}
		for _, word := range damage {
			if text := console(); strings.Contains(text, word) {
				t.Fatalf("the kernel says %q: %s", word, text[strings.Index(text, word):])
			}
		}
	}

	base := packet{SrcCID: 2, DstCID: guestCID, SrcPort: 5000, DstPort: guest.PortStatus, Type: 1, Op: opRequest, BufAlloc: 1 << 16}
	with := func(change func(*packet)) packet {
		p := base
		change(&p)
		return p
	}
	all := math.MaxUint16
	for _, c := range []struct {
		name    string
		packets []packet
		payload int
		length  int64 // that the ring says, below zero the true one
	}{
		{"unknown operations", []packet{with(func(p *packet) { p.Op = 0 }), with(func(p *packet) { p.Op = 8 }), with(func(p *packet) { p.Op = uint16(all) })}, 0, -1},
		{"unknown types", []packet{with(func(p *packet) { p.Type = 0 }), with(func(p *packet) { p.Type = 3 }), with(func(p *packet) { p.Type = uint16(all) })}, 0, -1},
		{"type of another kind of socket", []packet{with(func(p *packet) { p.Type = 2 })}, 0, -1},
		{"longer in the header than in the ring", []packet{with(func(p *packet) { p.Op, p.Len = opData, 1<<20 }), with(func(p *packet) { p.Len = math.MaxUint32 })}, 0, -1},
		{"longer in the ring than the buffer", []packet{base, with(func(p *packet) { p.Op = opData })}, 0, math.MaxUint32},
		{"of no length", []packet{base}, 0, 0},
		{"half a header", []packet{base, base, base}, 0, packetSize / 2},
		{"to another VM", []packet{with(func(p *packet) { p.DstCID = 4 }), with(func(p *packet) { p.DstCID = math.MaxUint64 })}, 0, -1},
		{"from the VM itself", []packet{with(func(p *packet) { p.SrcCID = guestCID }), with(func(p *packet) { p.SrcCID = 1 })}, 0, -1},
		{"from a CID that is none", []packet{with(func(p *packet) { p.SrcCID = math.MaxUint64 }), with(func(p *packet) { p.SrcCID = 1 << 32 })}, 0, -1},
		{"data of no connection", []packet{with(func(p *packet) { p.Op, p.Len = opData, 100 })}, 100, -1},
		{"answers to no question", []packet{with(func(p *packet) { p.Op = opResponse }), with(func(p *packet) { p.Op = opShutdown; p.Flags = 3 }), with(func(p *packet) { p.Op = opReset }),
			with(func(p *packet) { p.Op = opCreditUpdate }), with(func(p *packet) { p.Op = opCreditRequest })}, 0, -1},
		{"the same connection twice", []packet{base, base, base, with(func(p *packet) { p.Op = opReset })}, 0, -1},
		{"credit that is none", []packet{with(func(p *packet) { p.SrcPort, p.BufAlloc, p.FwdCnt = 5001, 0, math.MaxUint32 }),
			with(func(p *packet) { p.SrcPort, p.Op, p.BufAlloc, p.FwdCnt = 5001, opCreditUpdate, math.MaxUint32, 1<<31 })}, 0, -1},
		{"flags of every kind", []packet{with(func(p *packet) { p.SrcPort = 5002 }), with(func(p *packet) { p.SrcPort, p.Op, p.Flags, p.Len = 5002, opData, math.MaxUint32, 10 }),
			with(func(p *packet) { p.SrcPort, p.Op, p.Flags = 5002, opShutdown, math.MaxUint32 })}, 10, -1},
		{"data after the end", []packet{with(func(p *packet) { p.SrcPort = 5003 }), with(func(p *packet) { p.SrcPort, p.Op, p.Flags = 5003, opShutdown, 3 }),
			with(func(p *packet) { p.SrcPort, p.Op, p.Len = 5003, opData, 100 })}, 100, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, p := range c.packets {
				if err := d.send(p.encode(bytes.Repeat([]byte("x"), c.payload)), c.length); err != nil {
					t.Fatal(err)
				}
			}
			well(t)
		})
	}
	t.Run("the control port for another VM", func(t *testing.T) {
		s, err := d.open(5, guest.PortControl, 10*time.Second)
		if err != nil {
			return // refused before the agent saw it
		}
		s.send(opData, []byte(`{"op":"stop"}`+"\n"))
		if !s.wait(10*time.Second, func() bool { return s.closed }) || len(s.data) > 0 {
			t.Errorf("it is answered %q", s.data)
		}
		well(t)
	})
	t.Run("more than it has room for", func(t *testing.T) {
		s, err := d.open(2, guest.PortInference, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		for range 2000 { // 4 KiB each, whatever credit there is
			if err := s.send(opData, bytes.Repeat([]byte("x"), 4000)); err != nil {
				t.Fatal(err)
			}
		}
		s.send(opReset, nil)
		well(t)
	})
	t.Run("connections that are never used", func(t *testing.T) {
		for i := range 3000 {
			p := with(func(p *packet) { p.SrcPort, p.DstPort = uint32(100000+i), guest.PortInference })
			if err := d.send(p.encode(nil), -1); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 3000 {
			p := with(func(p *packet) { p.SrcPort, p.DstPort, p.Op = uint32(100000+i), guest.PortInference, opReset })
			if err := d.send(p.encode(nil), -1); err != nil {
				t.Fatal(err)
			}
		}
		well(t)
	})
	// A ring that contradicts itself is not used any more. The VM is deaf then, and
	// must not be hurt.
	t.Run("rings that lie", func(t *testing.T) {
		d.mu.Lock()
		d.give(&d.rx, 1<<16-1, 44)
		d.give(&d.rx, math.MaxUint32, math.MaxUint32)
		d.jump(&d.rx, 20000)
		d.give(&d.tx, 1<<16-1, 44)
		d.jump(&d.tx, 30000)
		d.mu.Unlock()
		time.Sleep(2 * time.Second)
		for _, word := range damage {
			if text := console(); strings.Contains(text, word) {
				t.Fatalf("the kernel says %q: %s", word, text[strings.Index(text, word):])
			}
		}
		if status := string(vm.execute("query-status", nil)); !strings.Contains(status, `"running"`) {
			t.Errorf("QEMU: %s", status)
		}
	})
}
