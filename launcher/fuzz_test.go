package launcher

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/guest"
)

// FuzzReadOK reads the vsock device's answer to a connect.
func FuzzReadOK(f *testing.F) {
	f.Add("OK 1024\nrest")
	f.Fuzz(func(t *testing.T, answer string) {
		r := strings.NewReader(answer)
		if err := readOK(r); err == nil {
			read := answer[:len(answer)-r.Len()]
			if !strings.HasPrefix(read, "OK") || strings.Count(read, "\n") != 1 || len(read) > maxOK {
				t.Errorf("it reads %q", read)
			}
		}
	})
}

// FuzzControlReply reads the VM's answer on its control port.
func FuzzControlReply(f *testing.F) {
	f.Add([]byte(`{"ok":true,"active":3}` + "\n"))
	f.Fuzz(func(t *testing.T, answer []byte) {
		d := pipeDialer(func(_ uint32, vm net.Conn) {
			vm.SetDeadline(time.Now().Add(time.Second))
			vm.Read(make([]byte, 64))
			vm.Write(answer)
			vm.Close()
		})
		if reply, err := control(context.Background(), d, guest.OpDrain); err == nil && (!reply.OK || reply.Active < 0) {
			t.Errorf("%+v", reply)
		}
	})
}

// FuzzTokens reads a file of clients' tokens: an error never shows one.
func FuzzTokens(f *testing.F) {
	f.Add("# staff\n" + strings.Repeat("t", 40) + "\n")
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "tokens")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		hashes, err := TokenHashes(nil, path)
		if err == nil && len(hashes) == 0 {
			t.Error("everybody is let in")
		}
	})
}
