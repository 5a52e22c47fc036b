package vmtest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"chrysalis/image/toolsroot"
)

// What a VM measured is read out of its memory and out of its TPM, so that
// nothing in the VM has to cooperate: one that refuses to serve is measured all
// the same. QEMU is started with -no-shutdown for it, so that a VM that powers off
// stays there, stopped.

// stopped reports whether the VM has powered off.
func (vm *diskVM) stopped() bool {
	var status struct {
		Running bool   `json:"running"`
		Status  string `json:"status"`
	}
	if err := json.Unmarshal(vm.execute("query-status", nil), &status); err != nil {
		vm.t.Fatal(err)
	}
	return status.Status == "shutdown"
}

// memory returns the first n bytes of a stopped VM's memory.
func (vm *diskVM) memory(n int64) []byte {
	vm.t.Helper()
	vm.execute("stop", nil)
	vm.execute("pmemsave", map[string]any{"val": 0, "size": n, "filename": "/vm/io/memory"})
	data, err := os.ReadFile(filepath.Join(vm.dir, "memory"))
	if err != nil {
		vm.t.Fatal(err)
	}
	os.Remove(filepath.Join(vm.dir, "memory"))
	return data
}

// pcrs ends QEMU and asks its TPM for PCRs 0 to 15 of a bank.
func (vm *diskVM) pcrs(alg uint16) [16][]byte {
	vm.t.Helper()
	// Killed, QEMU has no time to end the TPM as well.
	if err := vm.qemu.Cancel(); err != nil {
		vm.t.Fatal(err)
	}
	<-vm.ended
	ctrl, err := net.Dial("unix", filepath.Join(vm.dir, "tpm.sock"))
	if err != nil {
		vm.t.Fatal(err)
	}
	defer ctrl.Close()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		vm.t.Fatal(err)
	}
	const cmdSetDataFD = 0x10 // swtpm's tpm_ioctl.h
	if _, _, err := ctrl.(*net.UnixConn).WriteMsgUnix(binary.BigEndian.AppendUint32(nil, cmdSetDataFD), unix.UnixRights(pair[0]), nil); err != nil {
		vm.t.Fatal(err)
	}
	unix.Close(pair[0])
	answer := make([]byte, 4)
	if _, err := io.ReadFull(ctrl, answer); err != nil || !bytes.Equal(answer, make([]byte, 4)) {
		vm.t.Fatalf("swtpm: %v %x", err, answer)
	}
	data := os.NewFile(uintptr(pair[1]), "tpm")
	defer data.Close()
	var pcrs [16][]byte
	for i := range pcrs {
		selection := [3]byte{}
		selection[i/8] = 1 << (i % 8)
		command := []byte{0x80, 0x01, 0, 0, 0, 20, 0, 0, 0x01, 0x7e, 0, 0, 0, 1, byte(alg >> 8), byte(alg), 3}
		command = append(command, selection[:]...)
		if _, err := data.Write(command); err != nil {
			vm.t.Fatal(err)
		}
		reply := make([]byte, 4096)
		n, err := data.Read(reply)
		if err != nil || n < 30 || binary.BigEndian.Uint32(reply[6:]) != 0 {
			vm.t.Fatalf("TPM2_PCR_Read: %v: %x", err, reply[:n])
		}
		// header 10, counter 4, selection 4+6, digest list 4, size 2
		size := int(binary.BigEndian.Uint16(reply[28:]))
		pcrs[i] = bytes.Clone(reply[30 : 30+size])
	}
	return pcrs
}

// firmwareLog finds the firmware's event log in a VM's memory: the longest of
// what begins as one.
func firmwareLog(memory []byte) []byte {
	// A TCG_PCR_EVENT of PCR 0, EV_NO_ACTION, with a digest of zeros, before the
	// specification's signature.
	header := append(make([]byte, 4), 3, 0, 0, 0)
	header = append(header, make([]byte, 20)...)
	var best []byte
	for at := 0; ; {
		i := bytes.Index(memory[at:], []byte("Spec ID Event03\x00"))
		if i < 0 {
			return best
		}
		from := at + i - 32
		at += i + 16
		if from < 0 || !bytes.Equal(memory[from:from+28], header) {
			continue
		}
		if log := wellFormed(memory[from:]); len(log) > len(best) {
			best = log
		}
	}
}

// wellFormed cuts a log where its next record would not be one.
func wellFormed(data []byte) []byte {
	u32 := func(at int) int { return int(binary.LittleEndian.Uint32(data[at:])) }
	at := 32 + u32(28)
	for at+12 < len(data) {
		end := at + 8
		pcr, count := u32(at), u32(end)
		end += 4
		if pcr > 23 || count < 1 || count > 5 {
			break
		}
		for range count {
			size, ok := map[uint16]int{4: 20, 11: 32, 12: 48, 13: 64}[binary.LittleEndian.Uint16(data[end:])]
			if !ok {
				return data[:at]
			}
			end += 2 + size
		}
		n := u32(end)
		if n > 1<<20 || end+4+n > len(data) {
			break
		}
		at = end + 4 + n
	}
	return data[:at]
}

func disks(paths ...string) (binds []toolsroot.Bind) {
	for i, path := range paths {
		binds = append(binds, toolsroot.Bind{Host: path, Inside: fmt.Sprintf("/vm/disk%d", i)})
	}
	return binds
}
