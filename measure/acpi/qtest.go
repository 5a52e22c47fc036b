package acpi

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/measure"
)

// Start starts QEMU in a sandbox that shows a folder of the host's at Dir. stop
// ends it and returns what it wrote to its standard error.
type Start func(ctx context.Context, argv []string, folder string) (stop func() string, err error)

// limit is how long QEMU may take for everything.
const limit = 30 * time.Second

// Machine is what a command line does not say of a machine. It decides where the
// firmware puts devices' memory regions, and with it the tables.
type Machine struct {
	Bits int // the guest's physical address bits
	// GPU has the sizes of the memory regions of each device that is passed through,
	// in bytes, in the order of its registers. All are of 64 bits and prefetchable.
	GPU []uint64
}

// Read returns the tables of the machine with this command line.
func Read(ctx context.Context, start Start, argv []string, m Machine) (*measure.Tables, error) {
	command, gpus, err := translate(argv, m.GPU)
	if err != nil {
		return nil, fmt.Errorf("read the machine's tables: %w", err)
	}
	t, err := read(ctx, start, command, m, gpus)
	if err != nil {
		return nil, fmt.Errorf("read the machine's tables from QEMU: %w", err)
	}
	return t, nil
}

func read(ctx context.Context, start Start, argv []string, m Machine, gpus []int) (*measure.Tables, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	folder, err := os.MkdirTemp("", "chrysalis-qtest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(folder)
	if err := os.WriteFile(filepath.Join(folder, "kernel"), emptyKernel(), 0o644); err != nil {
		return nil, err
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(folder, filepath.Base(qtestPath)), Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	if slices.Contains(argv, "-tpmdev") {
		tpm, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(folder, filepath.Base(tpmPath)), Net: "unix"})
		if err != nil {
			return nil, err
		}
		defer tpm.Close()
		go serveTPM(tpm)
	}
	stop, err := start(ctx, argv, folder)
	if err != nil {
		return nil, err
	}
	stopped := false
	end := func() string {
		if stopped {
			return ""
		}
		stopped = true
		return stop()
	}
	defer end()
	deadline, _ := ctx.Deadline()
	if err := listener.SetDeadline(deadline); err != nil {
		return nil, err
	}
	conn, err := listener.Accept()
	if err != nil {
		return nil, fmt.Errorf("it did not start: %w: %s", err, strings.TrimSpace(end()))
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	q := &qtest{conn: conn, in: bufio.NewReaderSize(conn, 1<<16)}
	tables, err := q.tables(m, gpus)
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(end()))
	}
	return tables, nil
}

// emptyKernel is a kernel that QEMU loads and nothing runs: whether there is one
// decides what QEMU tells the firmware to boot.
func emptyKernel() []byte {
	b := make([]byte, 8<<10)
	b[0x1f1] = 1 // one sector of setup
	copy(b[0x202:], "HdrS")
	b[0x206], b[0x207] = 0x0f, 0x02
	b[0x211] = 1 // loaded high
	copy(b[0x22c:], []byte{0xff, 0xff, 0xff, 0x7f})
	return b
}

// A qtest speaks QEMU's test protocol (system/qtest.c): a line, an answer.
type qtest struct {
	conn net.Conn
	in   *bufio.Reader
	err  error // the first
}

// do sends a command and returns the words after OK. Once one has failed, no
// other is sent.
func (q *qtest) do(format string, args ...any) string {
	if q.err != nil {
		return ""
	}
	if _, q.err = fmt.Fprintf(q.conn, format+"\n", args...); q.err != nil {
		return ""
	}
	for {
		line, err := q.in.ReadString('\n')
		if err != nil {
			q.err = err
			return ""
		}
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "IRQ ") {
			continue
		}
		rest, ok := strings.CutPrefix(line, "OK")
		if !ok {
			q.err = fmt.Errorf("qtest: "+format+": %.80s", append(args, line)...)
		}
		return strings.TrimSpace(rest)
	}
}

// Where things are that the firmware sets (edk2, OvmfPkg/Include/IndustryStandard/Q35MchIch9.h).
const (
	bridge function = 0
	isa    function = 31 << 11
)

// tables sets what OVMF sets before it fetches the tables, and fetches them.
func (q *qtest) tables(m Machine, gpus []int) (*measure.Tables, error) {
	q.configure(bridge, 0x64, 0)
	q.configure(bridge, 0x60, 0xe0000001) // PCIEXBAR: configuration space at 0xe0000000
	q.configure(isa, 0x40, 0x601)         // PMBASE
	q.configure(isa, 0x44, 0x80)          // ACPI_CNTL: ACPI on
	items, err := q.directory()
	if err != nil {
		return nil, err
	}
	reserved, err := q.fetch(items["etc/e820"])
	if err != nil {
		return nil, err
	}
	q.assign(window(m.Bits, reserved), gpus, m.GPU)
	if q.err != nil {
		return nil, q.err
	}
	t := &measure.Tables{Files: map[string][]byte{}}
	items["BootMenu"] = item{0x0e, 2}
	wanted := []string{
		"etc/table-loader", "etc/acpi/rsdp", "etc/acpi/tables", "etc/tpm/log", "etc/smbios/smbios-tables",
		"etc/extra-pci-roots", "BootMenu", "etc/boot-menu-wait", "etc/reserved-memory-end", "opt/ovmf/X-PciMmio64Mb", "bootorder",
	}
	for _, name := range wanted {
		it, ok := items[name]
		if !ok {
			continue
		}
		data, err := q.fetch(it)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		t.Files[name] = data
	}
	t.Loader = t.Files["etc/table-loader"]
	delete(t.Files, "etc/table-loader")
	if t.Loader == nil || t.Files["etc/acpi/tables"] == nil || t.Files["etc/acpi/rsdp"] == nil {
		return nil, errors.New("it made no ACPI tables")
	}
	return t, nil
}

type item struct {
	key  uint16
	size uint32
}

const (
	maxItem = 1 << 20
	scratch = 0x200000 // guest memory that is ours
)

// fetch reads an item with fw_cfg's DMA interface (QEMU, docs/specs/fw_cfg.rst).
func (q *qtest) fetch(it item) ([]byte, error) {
	if it.size == 0 {
		return []byte{}, nil
	}
	if it.size > maxItem {
		return nil, fmt.Errorf("%d bytes, at most %d are expected", it.size, maxItem)
	}
	const data = scratch + 4096
	command := binary.BigEndian.AppendUint32(nil, uint32(it.key)<<16|1<<3|1<<1) // select, read
	command = binary.BigEndian.AppendUint32(command, it.size)
	command = binary.BigEndian.AppendUint64(command, data)
	q.do("write %#x %#x 0x%x", scratch, len(command), command)
	var at [8]byte
	binary.BigEndian.PutUint64(at[:], scratch)
	q.do("outl 0x514 %#x", binary.LittleEndian.Uint32(at[:4]))
	q.do("outl 0x518 %#x", binary.LittleEndian.Uint32(at[4:]))
	if status := q.do("read %#x 4", scratch); q.err == nil && status != "0x00000000" {
		return nil, fmt.Errorf("fw_cfg: %s", status)
	}
	answer := q.do("b64read %#x %#x", data, it.size)
	if q.err != nil {
		return nil, q.err
	}
	out, err := base64.StdEncoding.DecodeString(answer)
	if err != nil || len(out) != int(it.size) {
		return nil, fmt.Errorf("qtest: %d bytes of memory, expected %d: %w", len(out), it.size, err)
	}
	return out, nil
}

// directory reads fw_cfg's list of files.
func (q *qtest) directory() (map[string]item, error) {
	const key = 0x19
	head, err := q.fetch(item{key, 4})
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head)
	if n > 1024 {
		return nil, fmt.Errorf("fw_cfg has %d files, at most 1024 are expected", n)
	}
	list, err := q.fetch(item{key, 4 + 64*n})
	if err != nil {
		return nil, err
	}
	files := map[string]item{}
	for list = list[4:]; len(list) >= 64; list = list[64:] {
		name, _, _ := strings.Cut(string(list[8:64]), "\x00")
		files[name] = item{binary.BigEndian.Uint16(list[4:]), binary.BigEndian.Uint32(list)}
	}
	return files, nil
}

// serveTPM is as much of a software TPM as QEMU asks for before it runs a guest
// (swtpm's tpm_ioctl.h). No table depends on what is in a TPM.
func serveTPM(listener *net.UnixListener) {
	conn, err := listener.AcceptUnix()
	if err != nil {
		return
	}
	defer conn.Close()
	var data net.Conn
	defer func() {
		if data != nil {
			data.Close()
		}
	}()
	buf, oob := make([]byte, 4096), make([]byte, 64)
	for {
		n, noob, _, _, err := conn.ReadMsgUnix(buf, oob)
		if err != nil || n < 4 {
			return
		}
		answer := make([]byte, 4)
		switch binary.BigEndian.Uint32(buf) {
		case 0x01: // CMD_GET_CAPABILITY
			answer = binary.BigEndian.AppendUint32(answer, 0x3fff)
		case 0x04: // CMD_GET_TPMESTABLISHED
			answer = append(answer, 0, 0, 0, 0)
		case 0x10: // CMD_SET_DATAFD
			if data, err = receive(oob[:noob]); err != nil {
				return
			}
			go answerTPM(data)
		case 0x11: // CMD_SET_BUFFERSIZE: now, least, most
			for range 3 {
				answer = binary.BigEndian.AppendUint32(answer, 4096)
			}
		}
		if _, err := conn.Write(answer); err != nil {
			return
		}
	}
}

func receive(oob []byte) (net.Conn, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("no descriptor: %w", err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("no descriptor: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "tpm")
	defer f.Close()
	return net.FileConn(f)
}

// answerTPM answers each command of a TPM 2.0 that it is not started.
func answerTPM(conn io.ReadWriter) {
	buf := make([]byte, 4096)
	for {
		if _, err := conn.Read(buf); err != nil {
			return
		}
		if _, err := conn.Write([]byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x00}); err != nil {
			return
		}
	}
}
