package image

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
)

// fakeBwrap puts a bubblewrap into PATH that says something and fails.
func fakeBwrap(t *testing.T, says string) {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho '%s' >&2\nexit 1\n", says)
	if err := os.WriteFile(filepath.Join(dir, "bwrap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// settings makes a /proc/sys of a test's own.
func settings(t *testing.T, values map[string]string) {
	t.Helper()
	old := sysctls
	t.Cleanup(func() { sysctls = old })
	sysctls = t.TempDir()
	for name, value := range values {
		path := filepath.Join(sysctls, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// What bubblewrap 0.8 to 0.11 says.
const (
	noUserNS  = "bwrap: No permissions to create new namespace, likely because the kernel does not allow non-privileged user namespaces. On e.g. debian this can be enabled with \"sysctl kernel.unprivileged_userns_clone=1\"."
	noUIDMap  = "bwrap: setting up uid map: Permission denied"
	noNewNS   = "bwrap: Creating new namespace failed: Operation not permitted"
	noSpace   = "bwrap: Creating new namespace failed: nesting depth or /proc/sys/user/max_*_namespaces exceeded (ENOSPC)"
	noProc    = "bwrap: Can`t mount proc on /newroot/proc: Operation not permitted"
	noNetlink = "bwrap: loopback: Failed RTM_NEWADDR: Operation not permitted"
)

func TestSandboxAdvice(t *testing.T) {
	for _, tt := range []struct {
		name, said string
		root       bool
		settings   map[string]string
		says       []string
	}{
		{"Debian's switch", noUserNS, false, map[string]string{"kernel/unprivileged_userns_clone": "0"},
			[]string{"sysctl -w kernel.unprivileged_userns_clone=1", "/etc/sysctl.d/", "or build as root"}},
		{"AppArmor", noUIDMap, false, map[string]string{"kernel/unprivileged_userns_clone": "1", "kernel/apparmor_restrict_unprivileged_userns": "1"},
			[]string{"AppArmor", "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0", "or build as root"}},
		{"AppArmor at the network", noNetlink, false, map[string]string{"kernel/apparmor_restrict_unprivileged_userns": "1"},
			[]string{"sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"}},
		{"none allowed", noSpace, false, map[string]string{"user/max_user_namespaces": "0"},
			[]string{"no user namespaces", "sysctl -w user.max_user_namespaces=10000"}},
		{"no network namespaces, root", noSpace, true, map[string]string{"user/max_user_namespaces": "0", "user/max_net_namespaces": "0", "kernel/unprivileged_userns_clone": "0"},
			[]string{"no net namespaces", "sysctl -w user.max_net_namespaces=10000"}},
		{"a container", noNewNS, true, map[string]string{"user/max_user_namespaces": "1000"}, []string{"--privileged", "seccomp=unconfined"}},
		{"a container, user", noUserNS, false, nil, []string{"--privileged"}},
		{"a container that hides /proc", noProc, false, nil, []string{"systempaths=unconfined"}},
		{"anything else", "bwrap: what now", false, nil, []string{"try 'bwrap"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			settings(t, tt.settings)
			got := sandboxAdvice(tt.said, tt.root)
			for _, says := range tt.says {
				if !strings.Contains(got, says) {
					t.Errorf("%q does not say %q", got, says)
				}
			}
			if tt.root && strings.Contains(got, "build as root") {
				t.Errorf("root is told %q", got)
			}
		})
	}
}

// A build where the sandbox is forbidden ends at once, with bubblewrap's own
// words and what to do.
func TestSandboxForbidden(t *testing.T) {
	settings(t, map[string]string{"kernel/unprivileged_userns_clone": "1"})
	fakeBwrap(t, noNewNS)
	for name, run := range map[string]func() error{
		"image": func() error {
			b := &Builder{Source: "..", Out: t.TempDir(), Progress: quiet}
			_, err := b.UKI(t.Context(), "")
			return err
		},
		"tools": func() error {
			cacheDir(t)
			lock, err := ReadLock("..")
			if err == nil {
				_, err = MakeTools(t.Context(), lock, nil, quiet)
			}
			return err
		},
	} {
		if err := run(); err == nil || !strings.Contains(err.Error(), noNewNS) || !strings.Contains(err.Error(), "--privileged") {
			t.Errorf("%s: %v", name, err)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if err := checkSandbox(t.Context()); err == nil || !strings.Contains(err.Error(), "apt install bubblewrap") {
		t.Errorf("no bubblewrap: %v", err)
	}
}

func TestSubIDs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "subuid")
	if err := os.WriteFile(file, []byte("root:1:2\nann:100000:65536\n1007:3:4\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, uid string
		want      bool
	}{{"ann", "1", true}, {"an", "2", false}, {"bob", "1007", true}, {"bob", "100", false}} {
		if got := hasSubIDs(file, &user.User{Username: tt.name, Uid: tt.uid}); got != tt.want {
			t.Errorf("%s, %s: %v", tt.name, tt.uid, got)
		}
	}
	if hasSubIDs(file+"x", &user.User{Username: "ann"}) {
		t.Error("from a file that is not there")
	}
}

// What a build step sees of the network: loopback, and nothing else.
func TestOfflineHasNoInterfaces(t *testing.T) {
	if err := checkSandbox(t.Context()); err != nil {
		t.Skip(err)
	}
	commands := map[string]*exec.Cmd{"of the host": offline(t.Context(), "cat", "/proc/net/dev")}
	lock, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	if tools, err := OpenTools(lock); err == nil {
		c := mkosiCommand(t.TempDir(), lock.Trees[0].Epoch(), nil)
		c.Args, c.Dir = []string{"cat", "/proc/net/dev"}, "/"
		commands["mkosi's"] = tools.Cmd(t.Context(), c)
	}
	for name, cmd := range commands {
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("%s: %v", name, commandError(err))
		}
		var interfaces []string
		for line := range strings.Lines(string(out)) {
			if device, _, ok := strings.Cut(line, ":"); ok {
				interfaces = append(interfaces, strings.TrimSpace(device))
			}
		}
		if len(interfaces) != 1 || interfaces[0] != "lo" {
			t.Errorf("%s: interfaces %q", name, interfaces)
		}
	}
	// A listener of ours is out of reach, even on loopback.
	var reached atomic.Bool
	address := testMirror(t, func(http.ResponseWriter, *http.Request) { reached.Store(true) })
	host := strings.TrimSuffix(strings.TrimPrefix(address, "http://"), "/debian")
	script := fmt.Sprintf("exec 3<>/dev/tcp/%s && printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3 && cat <&3", strings.Replace(host, ":", "/", 1))
	if err := exec.Command("bash", "-c", script).Run(); err != nil || !reached.Load() {
		t.Fatalf("the test's own connection fails: %v", err)
	}
	if reached.Store(false); offline(t.Context(), "bash", "-c", script).Run() == nil || reached.Load() {
		t.Error("a build step reaches a server")
	}
}

// offlineBuild is set in a copy of this test that has no network.
const offlineBuild = "CHRYSALIS_TEST_OFFLINE_BUILD"

// TestBuildWithoutNetwork builds the agent, the image and the engine in a network
// namespace in which nothing is up, with everything in the cache: only fetching
// needs a network.
func TestBuildWithoutNetwork(t *testing.T) {
	if dir := os.Getenv(offlineBuild); dir != "" {
		interfaces, err := net.Interfaces()
		if err != nil || len(interfaces) > 1 {
			t.Fatalf("%v, %v", interfaces, err)
		}
		if len(interfaces) == 1 && interfaces[0].Flags&net.FlagUp != 0 {
			t.Fatalf("%s is up", interfaces[0].Name)
		}
		b := &Builder{Source: "..", Out: dir, Progress: quiet}
		if _, err := b.Engine(context.Background(), "llama.cpp"); err != nil {
			t.Fatal(err)
		}
		if _, err := b.UKI(context.Background(), ""); err != nil {
			t.Fatal(err)
		}
		return
	}
	if testing.Short() {
		t.Skip("it takes 15 seconds")
	}
	if err := checkSandbox(t.Context()); err != nil {
		t.Skip(err)
	}
	lock, err := ReadLock("..")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenTools(lock); err != nil {
		t.Skip(err)
	}
	if version, err := toolchain(t.Context(), ".."); err != nil || version != lock.Go.Toolchain {
		t.Skipf("Go is %s, the lock's is %s (%v)", version, lock.Go.Toolchain, err)
	}
	for _, name := range []string{"image", "engine/llama.cpp"} {
		tree, err := lock.Tree(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Fetch(t.Context(), tree, nil, quiet); err != nil {
			t.Skip(err)
		}
	}
	if _, err := fetchModules(t.Context(), "..", lock.Go, nil, quiet); err != nil {
		t.Skip(err)
	}
	out := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestBuildWithoutNetwork$", "-test.v")
	cmd.Env = append(os.Environ(), offlineBuild+"="+out)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if id := os.Getuid(); id != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: id, HostID: id, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
	}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	for _, name := range []string{"chrysalis.efi", "llama.cpp.disk"} {
		if _, err := os.Stat(filepath.Join(out, name)); err != nil {
			t.Error(err)
		}
	}
}

// Only indices that Debian signed make a lock.
func TestResolveRefuses(t *testing.T) {
	if _, err := exec.LookPath("apt-get"); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	for _, suite := range []string{"sid"} {
		path := filepath.Join(dir, "dists", suite, "InRelease")
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("Suite: unstable\nCodename: sid\nDate: Sat, 12 Sep 2026 07:55:41 UTC\nSHA256:\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, m := range map[string]string{
		"not signed":          dir,
		"not signed, address": testMirror(t, http.StripPrefix("/debian", http.FileServer(http.Dir(dir))).ServeHTTP),
		"a page about an error": testMirror(t, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, "<html>Please log in to this network</html>")
		}),
		"nothing":            testMirror(t, http.NotFound),
		"a name with a line": "http://host/\ndeb [trusted=yes] http://host",
	} {
		lock, err := resolveFrom(t.Context(), m, quiet)
		if err == nil || lock != nil {
			t.Errorf("%s: it makes a lock", name)
		}
		t.Logf("%s: %v", name, err)
	}
}
