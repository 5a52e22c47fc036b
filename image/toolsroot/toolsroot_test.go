package toolsroot_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"chrysalis/image/imagetest"
	"chrysalis/image/toolsroot"
)

func TestOpen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "root")
	refused := func(what string) {
		t.Helper()
		if _, err := toolsroot.Open(dir); err == nil || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "chrysalis image tools") {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("missing")
	if err := os.MkdirAll(filepath.Join(dir, "usr"), 0o755); err != nil {
		t.Fatal(err)
	}
	refused("half made")
	if err := toolsroot.Seal(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	root, err := toolsroot.Open(dir)
	if err != nil || root.Dir != dir {
		t.Errorf("%+v, %v", root, err)
	}
	if err := toolsroot.Seal(t.Context(), filepath.Join(dir, "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("sealing nothing: %v", err)
	}
}

func TestPath(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "/cache")
	if got, err := toolsroot.Path("0123"); got != "/cache/chrysalis/tools/0123" || err != nil {
		t.Errorf("%s, %v", got, err)
	}
	t.Setenv("XDG_CACHE_HOME", "")
	t.Setenv("HOME", "/home/x")
	if got, err := toolsroot.Path("0123"); got != "/home/x/.cache/chrysalis/tools/0123" || err != nil {
		t.Errorf("%s, %v", got, err)
	}
	t.Setenv("HOME", "")
	if _, err := toolsroot.Path("0123"); err == nil || !strings.Contains(err.Error(), "XDG_CACHE_HOME") {
		t.Errorf("no home: %v", err)
	}
}

// run runs a shell script in the tools root and returns what it printed.
func run(t *testing.T, c toolsroot.Command, script string) string {
	t.Helper()
	c.Args = []string{"sh", "-c", script}
	out, err := imagetest.Tools(t).Cmd(t.Context(), c).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestCommandSees(t *testing.T) {
	dir, hidden := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LEAKED", "from the host")
	file := filepath.Join(dir, "file")
	for _, tt := range []struct {
		name, script, want string
		command            toolsroot.Command
	}{
		{"the tree read-only", `touch /usr/x /etc/x /var/x 2>/dev/null; echo $?; test -e /usr/bin/mkosi && echo tree`, "1\ntree", toolsroot.Command{}},
		{"no folder of the host", `test -e ` + hidden + ` || echo hidden`, "hidden", toolsroot.Command{}},
		{"a read-only folder", `cat ` + file + `; touch ` + dir + `/new 2>/dev/null || echo refused`, "content\nrefused", toolsroot.Command{ReadOnly: []string{dir}}},
		{"a writable folder", `echo written >` + dir + `/new && cat ` + dir + `/new`, "written", toolsroot.Command{ReadWrite: []string{dir}}},
		{"a folder elsewhere", `cat /else/where/file; touch /else/where/x 2>/dev/null || echo refused`, "content\nrefused",
			toolsroot.Command{Bind: []toolsroot.Bind{{Host: dir, Inside: "/else/where"}}}},
		{"a writable folder elsewhere", `touch /else/x && echo written`, "written",
			toolsroot.Command{Bind: []toolsroot.Bind{{Host: dir, Inside: "/else", Writable: true}}}},
		{"its working folder", `pwd`, dir, toolsroot.Command{ReadOnly: []string{dir}, Dir: dir}},
		{"the top, unless told", `pwd`, "/", toolsroot.Command{}},
		{"its own environment", `env -u PWD -u SHLVL -u _ | sort`,
			"HOME=/root\nLC_ALL=C.UTF-8\nLOGNAME=chrysalis\nPATH=/usr/sbin:/usr/bin:/sbin:/bin", toolsroot.Command{}},
		{"variables", `echo "$A|$B|$C"`, "1|x=y z|", toolsroot.Command{Env: []string{"A=1", "B=x=y z", "C="}}},
		{"its own processes", `ls -d /proc/[0-9]* | wc -l | awk '$1 < 6 { print "few" }'`, "few", toolsroot.Command{}},
		{"no network", `tail -n +3 /proc/net/dev | grep -v ' *lo:' | wc -l`, "0", toolsroot.Command{Offline: true}},
		{"few devices", `test -e /dev/null && ls /dev | grep -E '^(mem|kvm|sd|vd|loop)' || echo few`, "few", toolsroot.Command{}},
		{"no capabilities, and none to gain", `grep -E '^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs):' /proc/self/status | cut -f 2 | uniq`,
			"0000000000000000\n1", toolsroot.Command{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := run(t, tt.command, tt.script); got != tt.want {
				t.Errorf("%q, expected %q", got, tt.want)
			}
		})
	}
	if data, err := os.ReadFile(filepath.Join(dir, "new")); string(data) != "written\n" {
		t.Errorf("what it wrote: %q, %v", data, err)
	}
}

// Of the host's devices it sees those that it is given, nodes or folders.
func TestCommandDevices(t *testing.T) {
	given := map[string]string{"/dev/hwrng": "/dev/hwrng", "/dev/net": "/dev/net/tun"} // and what of it to look for
	for host, look := range given {
		if _, err := os.Stat(look); err != nil {
			t.Logf("this host has no %s", look)
			continue
		}
		for other, hidden := range given {
			want := "hidden"
			if other == host {
				want = "seen"
			}
			if got := run(t, toolsroot.Command{Devices: []string{host}}, `test -c `+hidden+` && echo seen || echo hidden`); got != want {
				t.Errorf("given %s, %s is %s", host, hidden, got)
			}
		}
	}
	err := imagetest.Tools(t).Cmd(t.Context(), toolsroot.Command{Args: []string{"true"}, Devices: []string{"/dev/no-such-device"}}).Run()
	if err == nil {
		t.Error("a device that is not there is passed over")
	}
}

func TestCommandReportsFailure(t *testing.T) {
	root := imagetest.Tools(t)
	var exit *exec.ExitError
	if err := root.Cmd(t.Context(), toolsroot.Command{Args: []string{"sh", "-c", "exit 7"}}).Run(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("%v, expected exit status 7", err)
	}
	out, err := root.Cmd(t.Context(), toolsroot.Command{Args: []string{"no-such-program"}}).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "no-such-program") {
		t.Errorf("%v: %s", err, out)
	}
}

// When its context ends, the whole tree of processes ends.
func TestCommandEndsWithItsContext(t *testing.T) {
	root := imagetest.Tools(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	dir := t.TempDir()
	cmd := root.Cmd(ctx, toolsroot.Command{
		Args: []string{"sh", "-c", `trap "" INT TERM; (while :; do date +%N >beat; sleep 0.05; done) & wait`},
		Dir:  dir, ReadWrite: []string{dir},
	})
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	beat := func() string {
		data, _ := os.ReadFile(filepath.Join(dir, "beat"))
		return string(data)
	}
	for deadline := time.Now().Add(20 * time.Second); beat() == ""; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not start")
		}
	}
	cancel()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("it says that it ended well")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on")
	}
	// The kernel ends the namespace's processes with its first one, soon.
	for deadline := time.Now().Add(20 * time.Second); ; {
		before := beat()
		time.Sleep(300 * time.Millisecond)
		if beat() == before {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("a child of it goes on")
		}
	}
}
