package vmtest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"chrysalis/image/imagetest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/measure"
	"chrysalis/measure/acpi"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
)

// The real firmware places GPUs where it is predicted to, and gets the tables
// that are predicted: with 1, 2, 4 and 8 of them, behind the launcher's ports, in
// the launcher's machine. A GPU is one process of QEMU's vfio-user protocol, which
// QEMU has behind the same device code as vfio-pci. The firmware of TDs runs
// without TDX here, where it measures nothing: its tables are compared in memory.
func TestPredictedGPUs(t *testing.T) {
	tools := imagetest.Tools(t)
	configB, err := plan.ConfigB(tools)
	if err != nil {
		t.Fatal(err)
	}
	tdx := filepath.Join(t.TempDir(), "tdx.fd")
	if err := os.WriteFile(tdx, configB, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		shape string
		tdx   bool
	}{
		{"h100x1", false}, {"h100x2", false}, {"h100x4", false}, {"h100x8", false}, {"h200x8", true},
	} {
		t.Run(tt.shape, func(t *testing.T) {
			t.Parallel()
			shape, err := launcher.LookupShape(tt.shape)
			if err != nil {
				t.Fatal(err)
			}
			// Where devices are placed depends on neither, and this machine has less.
			shape.VCPUs, shape.Memory = 1, 256<<20
			a := plan.Artefacts(record.TPM, record.BootKernel, 1, shape)
			a.Platform, a.Firmware = launcher.PlatformTCG, "/usr/share/ovmf/OVMF.fd"
			binds := append(disks(llama, llama, demo), toolsroot.Bind{Host: uki, Inside: "/vm/image.efi"})
			if tt.tdx {
				shape.PhysBits, a.Firmware = shape.TDXBits, "/vm/firmware.fd"
				binds = append(binds, toolsroot.Bind{Host: tdx, Inside: a.Firmware})
			}
			argv := launcher.Command(shape, a)
			tables, err := launcher.TablesOf(t.Context(), tools, argv, acpi.Machine{Bits: shape.PhysBits, GPU: shape.GPUBARs})
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			binds = append(binds, toolsroot.Bind{Host: dir, Inside: "/vm/gpu", Writable: true})
			vm := startQEMU(t, serveGPUs(t, argv, dir, shape.GPUBARs), binds...)
			var memory, dsdt []byte
			want := tableOf(t, tables.Files["etc/acpi/tables"], "DSDT")
			begin := time.Now()
			vm.await(func() bool { return placed.MatchString(vm.devices()) })
			t.Logf("the firmware has placed the devices after %v", time.Since(begin))
			looked := time.Now()
			vm.await(func() bool {
				if time.Since(looked) < 2*time.Second {
					return false
				}
				looked = time.Now()
				memory = vm.memory(int64(shape.Memory))
				dsdt = installed(memory, want)
				vm.execute("cont", nil)
				return dsdt != nil
			})
			t.Logf("and has its tables after %v", time.Since(begin))
			if err := sameTable(dsdt, want); err != nil {
				t.Errorf("DSDT: %v; the devices are\n%s", err, vm.devices())
			}
			if tt.tdx {
				return
			}
			// What was measured of the tables is in the log from then on.
			system := measure.System{Platform: record.TPM, Boot: record.BootKernel, Tables: tables}
			events, err := system.Events()
			if err != nil {
				t.Fatal(err)
			}
			var log []measure.LogEvent
			for _, copied := range firmwareLogs(memory) {
				log = append(log, copied.Events...)
			}
			n := 0
			for _, e := range events {
				if !strings.HasPrefix(e.Name, "acpi-") {
					continue
				}
				n++
				found := false
				for _, l := range log {
					found = found || l.Index == 1 && bytes.Equal(l.Digests[measure.SHA256], e.Digest)
				}
				if !found {
					t.Errorf("%s: no event of PCR 1 has the predicted digest %x; the devices are\n%s", e.Name, e.Digest, vm.devices())
				}
			}
			if n != 4 {
				t.Errorf("%d events of ACPI are predicted, expected 4", n)
			}
		})
	}
}

// placed matches a virtio device's region above 4 GiB.
var placed = regexp.MustCompile(`BAR4: 64 bit prefetchable memory at 0x[0-9a-f]{9,} `)

// devices is what QEMU says of the PCI bus.
func (vm *diskVM) devices() (text string) {
	raw := vm.execute("human-monitor-command", map[string]string{"command-line": "info pci"})
	if err := json.Unmarshal(raw, &text); err != nil {
		vm.t.Fatal(err)
	}
	return text
}

// tableOf returns an ACPI table (ACPI 6.5, section 5.2.6: signature, length) of
// QEMU's blob.
func tableOf(t *testing.T, blob []byte, signature string) []byte {
	t.Helper()
	for at := 0; at+36 <= len(blob); {
		size := int(binary.LittleEndian.Uint32(blob[at+4:]))
		if string(blob[at:at+4]) == signature && size <= len(blob)-at {
			return blob[at:][:size]
		}
		at += max(size, 1)
	}
	t.Fatalf("there is no %s", signature)
	return nil
}

// installed finds a table in memory that the firmware has finished: its bytes sum
// to zero. Those of a kernel's own structures may, too, but these do not have what
// nobody patches in a table's header, from OEMID on (ACPI 6.5, section 5.2.6).
func installed(memory, want []byte) []byte {
	for at := 0; ; at++ {
		i := bytes.Index(memory[at:], want[:4])
		if i < 0 {
			return nil
		}
		if at += i; at+36 > len(memory) {
			return nil
		}
		size := int(binary.LittleEndian.Uint32(memory[at+4:]))
		if size < 1024 || size > 1<<20 || size > len(memory)-at || !bytes.Equal(memory[at+10:at+36], want[10:36]) {
			continue
		}
		sum := byte(0)
		for _, b := range memory[at : at+size] {
			sum += b
		}
		if sum == 0 {
			return memory[at : at+size]
		}
	}
}

// sameTable compares all but the checksum, which the firmware fills in.
func sameTable(got, want []byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%d bytes, expected %d", len(got), len(want))
	}
	for i := range got {
		if i != 9 && got[i] != want[i] {
			return fmt.Errorf("byte %#x is %#x, expected %#x", i, got[i:min(i+8, len(got))], want[i:min(i+8, len(want))])
		}
	}
	return nil
}

// serveGPUs replaces the devices of a command line that are passed through by
// ones that QEMU reaches over sockets in a folder, each with these memory regions.
func serveGPUs(t *testing.T, argv []string, dir string, bars []uint64) (out []string) {
	t.Helper()
	n := 0
	for i := 0; i < len(argv); i++ {
		if argv[i] == "-object" && strings.HasPrefix(argv[i+1], "iommufd,") {
			i++
			continue
		}
		if !strings.HasPrefix(argv[i], "vfio-pci,") {
			out = append(out, argv[i])
			continue
		}
		name := fmt.Sprintf("gpu%d", n)
		listener, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			if err := (&fakeGPU{conn: conn, config: gpuConfig(), bars: bars}).serve(); err != nil && !errors.Is(err, io.EOF) {
				fmt.Fprintln(os.Stderr, "vfio-user:", err)
			}
		}()
		device, err := json.Marshal(map[string]any{
			"driver": "vfio-user-pci", "id": name, "bus": fmt.Sprintf("gpuport%d", n), "rombar": 0,
			"socket": map[string]string{"type": "unix", "path": "/vm/gpu/" + name},
		})
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, string(device))
		n++
	}
	if n == 0 {
		t.Fatal("nothing is passed through")
	}
	return out
}

// fakeGPU is as much of a GPU as firmware looks at, at the other end of QEMU's
// vfio-user protocol (QEMU, docs/interop/vfio-user.rst): configuration space and
// memory regions that are never read.
type fakeGPU struct {
	conn   net.Conn
	config []byte
	bars   []uint64 // of regions 0, 2 and 4
}

// gpuConfig is an H100's as far as it matters: a 3D controller with three memory
// regions of 64 bits, prefetchable.
func gpuConfig() []byte {
	c := make([]byte, 4096)
	binary.LittleEndian.PutUint32(c, 0x233010de)
	binary.LittleEndian.PutUint32(c[8:], 0x030200a1)
	for i := range 3 {
		c[0x10+8*i] = 0xc
	}
	return c
}

func (g *fakeGPU) serve() error {
	le := binary.LittleEndian
	// Header: message, command, size with it, flags, error.
	const headerSize, flagReply, flagNoReply, flagError = 16, 1, 0x10, 0x20
	header := make([]byte, headerSize)
	for {
		if _, err := io.ReadFull(g.conn, header); err != nil {
			return err
		}
		size := le.Uint32(header[4:])
		if size < headerSize || size > 1<<20 {
			return fmt.Errorf("a message of %d bytes", size)
		}
		in := make([]byte, size-headerSize, max(size, 64))
		if _, err := io.ReadFull(g.conn, in); err != nil {
			return err
		}
		var out []byte
		failed := false
		in = in[:max(len(in), 32)] // fields that are left out are zeros
		switch command := le.Uint16(header[2:]); command {
		case 1: // VERSION
			out = append(make([]byte, 4), []byte(`{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576}}`+"\x00")...)
		case 2, 3, 8, 13: // DMA_MAP, DMA_UNMAP, DEVICE_SET_IRQS, DEVICE_RESET
			if command == 3 {
				out = in[:24]
			}
		case 4: // DEVICE_GET_INFO: size, flags (can be reset, PCI), regions, interrupts
			for _, v := range []uint32{16, 3, 9, 5} {
				out = le.AppendUint32(out, v)
			}
		case 5: // DEVICE_GET_REGION_INFO: size, flags (read, write), index, capabilities, size, offset
			index := le.Uint32(in[8:])
			length := uint64(0)
			switch {
			case index == 7:
				length = uint64(len(g.config))
			case index < 6 && index%2 == 0:
				length = g.bars[index/2]
			}
			flags := uint32(3)
			if length == 0 {
				flags = 0
			}
			for _, v := range []uint32{32, flags, index, 0} {
				out = le.AppendUint32(out, v)
			}
			out = le.AppendUint64(le.AppendUint64(out, length), uint64(index)<<40)
		case 7: // DEVICE_GET_IRQ_INFO: size, flags, index, count
			for _, v := range []uint32{16, 0, le.Uint32(in[8:]), 0} {
				out = le.AppendUint32(out, v)
			}
		case 9, 10: // REGION_READ, REGION_WRITE: offset, region, count, data
			offset, region, count := le.Uint64(in), le.Uint32(in[8:]), le.Uint32(in[12:])
			out = bytes.Clone(in[:16])
			if command == 9 && count <= 1<<16 {
				data := make([]byte, count)
				if region == 7 && offset < uint64(len(g.config)) {
					copy(data, g.config[offset:])
				}
				out = append(out, data...)
			}
		default:
			failed = true
		}
		flags := le.Uint32(header[8:])
		if flags&flagNoReply != 0 {
			continue
		}
		reply := le.AppendUint32(bytes.Clone(header[:4]), uint32(headerSize+len(out)))
		if failed {
			reply = le.AppendUint32(le.AppendUint32(reply, flagReply|flagError), 38) // ENOSYS
		} else {
			reply = le.AppendUint64(reply, flagReply)
		}
		if _, err := g.conn.Write(append(reply, out...)); err != nil {
			return err
		}
	}
}
