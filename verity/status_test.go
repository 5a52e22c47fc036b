//go:build linux

package verity

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"
)

// status is what DM_TABLE_STATUS returns for one target.
func status(target, text string, flags uint32) []byte {
	b := make([]byte, 4096)
	binary.NativeEndian.PutUint32(b[16:], unix.SizeofDmIoctl)
	binary.NativeEndian.PutUint32(b[20:], 1)
	binary.NativeEndian.PutUint32(b[28:], flags)
	copy(b[unix.SizeofDmIoctl+24:], target)
	copy(b[unix.SizeofDmIoctl+unix.SizeofDmTargetSpec:], text)
	return b
}

func TestParseStatus(t *testing.T) {
	for _, tt := range []struct {
		name    string
		b       []byte
		corrupt bool
		ok      bool
	}{
		{"good", status("verity", "V", 0), false, true},
		{"corrupt", status("verity", "C", 0), true, true},
		{"with error correction", status("verity", "V 3", 0), false, true},
		{"corrupt, newer kernel", status("verity", "C -", 0), true, true},
		{"other letter", status("verity", "X", 0), false, false},
		{"longer word", status("verity", "VC", 0), false, false},
		{"nothing", status("verity", "", 0), false, false},
		{"another target", status("linear", "V", 0), false, false},
		{"buffer full", status("verity", "V", unix.DM_BUFFER_FULL_FLAG), false, false},
		{"too short", make([]byte, 300), false, false},
		{"zeros", make([]byte, 4096), false, false},
	} {
		if got, err := parseStatus(tt.b); got != tt.corrupt || (err == nil) != tt.ok {
			t.Errorf("%s: %v, %v", tt.name, got, err)
		}
	}
	far := status("verity", "V", 0)
	binary.NativeEndian.PutUint32(far[16:], 1<<31)
	if _, err := parseStatus(far); err == nil {
		t.Error("accepted a status outside the buffer")
	}
}

// FuzzParseStatus reads the kernel's answer about a disk.
func FuzzParseStatus(f *testing.F) {
	f.Add(status("verity", "V", 0))
	f.Add(status("verity", "C", 0))
	f.Fuzz(func(t *testing.T, b []byte) { parseStatus(b) })
}
