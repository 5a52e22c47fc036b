package softtpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/image/toolsroot"
)

// insideState is where swtpm sees its state.
const insideState = "/vm/tpm"

// Make makes the state of a new TPM in an empty folder, with keys and a
// certificate, for a VM to start. PCR 15 and the boot log need SHA-384, which
// swtpm's default leaves out.
func Make(ctx context.Context, tools *toolsroot.Root, dir string, ca *CA) error {
	// What Cmd returns dies with the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	state := []toolsroot.Bind{{Host: dir, Inside: insideState, Writable: true}}
	out, err := tools.Cmd(ctx, toolsroot.Command{
		Args: []string{"swtpm_setup", "--tpm2", "--tpm-state", "dir://" + insideState, "--pcr-banks", "sha256,sha384", "--overwrite"},
		Bind: state, Offline: true,
	}).CombinedOutput()
	if err != nil {
		return fmt.Errorf("make a software TPM: %w: %s", err, bytes.TrimSpace(out))
	}
	if err := provisionState(ctx, tools, dir, state, ca); err != nil {
		return fmt.Errorf("prepare the software TPM: %w", err)
	}
	return nil
}

// provisionState runs the TPM once before a VM does.
func provisionState(ctx context.Context, tools *toolsroot.Root, dir string, state []toolsroot.Bind, ca *CA) error {
	const socket = "setup.sock"
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := tools.Cmd(ctx, toolsroot.Command{
		Args: []string{"swtpm", "socket", "--tpm2", "--tpmstate", "dir=" + insideState, "--server", "type=unixio,path=" + insideState + "/" + socket,
			"--flags", "not-need-init", "--terminate", "--seccomp", "action=kill"},
		Bind: state, Offline: true,
	})
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &out, &out, 5*time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	err := func() error {
		conn, err := dial(ctx, dir, socket, ended)
		if err != nil {
			return err
		}
		return Provision(ctx, conn, ca)
	}()
	if err != nil {
		cancel()
	}
	// It ends with the connection, and with that has written its state down.
	if e := <-ended; err == nil && e != nil {
		err = e
	}
	os.Remove(filepath.Join(dir, socket))
	if err != nil && out.Len() > 0 {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(out.Bytes()))
	}
	return err
}

// dial waits until swtpm has made its socket.
func dial(ctx context.Context, dir, socket string, ended chan error) (net.Conn, error) {
	// A unix socket's address has at most 108 bytes, however long the folder's is.
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", fd, socket))
		if err == nil {
			return conn, nil
		}
		select {
		case err := <-ended:
			ended <- err // for whoever waits for it
			return nil, errors.New("swtpm ended at once")
		case <-ctx.Done():
			return nil, fmt.Errorf("swtpm did not start: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
