package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"chrysalis/attest/receipt"
	"chrysalis/ci/vmtest/hostile/secret"
	"chrysalis/guest"
	"chrysalis/image/profile"
	"chrysalis/launcher"
)

// refusedCalls is what the hostile engine tries and its filter of system calls
// refuses, whatever its profile says.
var refusedCalls = []string{
	"process_vm_readv", "process_vm_writev", "ptrace", "ptrace of itself", "process_madvise", "pidfd_getfd", "kcmp",
	"init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load",
	"bpf", "io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "perf_event_open",
	"keyctl", "add_key", "request_key", "iopl", "ioperm", "modify_ldt", "syslog", "reboot", "swapon", "swapoff", "acct", "quotactl",
	"clock_settime", "settimeofday", "adjtimex", "clock_adjtime",
	"seccomp", "prctl PR_SET_SECCOMP", "prctl PR_SET_SECCOMP, upper half set", "prctl PR_SET_MM",
	"mount", "mount of /proc", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "mount_setattr", "pivot_root", "chroot",
	"open_by_handle_at", "name_to_handle_at", "fanotify_init", "program in memory",
	"unshare of users", "unshare of mounts", "unshare of the network", "setns",
	"clone into new users", "clone into new mounts", "clone into a new network", "sethostname", "setdomainname",
	"vsock stream", "vsock datagram", "vsock seqpacket", "vsock, upper half set", "vsock, upper half clone's number", "vsock pair",
	"netlink", "internet", "packet", "kernel's cryptography", "socket families but AF_UNIX",
}

// refusedByList is what is refused because neither the agent's list of system
// calls nor the profile has it, and what the kernel says to one that a profile
// adds: the engine has no capability.
var refusedByList = map[string]string{
	"pidfd_open": "done", "move_pages": "done", // of itself
	"mknod of a disk": "EACCES", "mknod of memory": "EACCES", "pipe in the door": "EACCES", "chown": "EPERM",
	"setuid": "EPERM", "setresuid": "EPERM", "setgid": "EPERM", "setgroups": "EPERM", "capset": "EPERM",
	"real-time scheduling": "EPERM", "higher priority": "EACCES",
}

// wideProfile adds every call to the engine's profile that a profile can add and
// that the engine tries.
var wideProfile = []string{
	"pidfd_open", "move_pages", "mknod", "chown", "setuid", "setresuid", "setgid", "setgroups", "capset",
	"sched_setscheduler", "setpriority",
}

// attackOutcomes is what each attack must come to, under the narrowest profile or
// under the widest.
func attackOutcomes(wide bool) map[string]string {
	want := map[string]string{
		"descriptors at the start":       "0 device 1:3, 1 pipe, 2 pipe",
		"other processes":                "itself 1, others []",
		"entries of /proc":               "",
		"entries of /dev":                "full null random urandom zero",
		"entries of /run":                "engine",
		"the way up":                     "nothing",
		"network interfaces":             "lo",
		"huge pages":                     "allowed",
		"where a file can be made":       "/tmp",
		"file in the door":               "EACCES",
		"folder in the door":             "EACCES",
		"program in /tmp":                "EACCES",
		"the engine disk for writing":    "EROFS",
		"the model for writing":          "EROFS",
		"more open files":                "EPERM",
		"core dumps":                     "EPERM",
		"entropy":                        "EPERM",
		"root's credentials on a socket": "EPERM",
		"clone3":                         "ENOSYS",
		"vsock by the x32 table":         "ENOSYS",
	}
	for _, name := range refusedCalls {
		want[name] = "EPERM"
	}
	for name, byKernel := range refusedByList {
		want[name] = "EPERM"
		if wide {
			want[name] = byKernel
		}
	}
	for _, path := range secret.Paths {
		want["open "+path] = "ENOENT"
	}
	return want
}

// order is a request that has the hostile engine do something.
func order(text string, stream bool) io.Reader {
	data, err := json.Marshal(map[string]any{
		"model": "chrysalis/demo", "stream": stream, "messages": []map[string]string{{"role": "user", "content": text}},
	})
	if err != nil {
		panic(err)
	}
	return bytes.NewReader(data)
}

// obeyed returns what the hostile engine says to an order, and the status.
func (c *client) obeyed(text string) (int, string) {
	c.t.Helper()
	resp, body := c.send("POST", "/v1/chat/completions", order(text, false))
	var answer struct {
		Choices []struct{ Message struct{ Content string } }
		Error   struct{ Code string }
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil {
		c.t.Fatalf("%s: %s: %v: %.500s", text, resp.Status, err, body)
	}
	if len(answer.Choices) == 0 {
		return resp.StatusCode, answer.Error.Code
	}
	return resp.StatusCode, answer.Choices[0].Message.Content
}

// attack has the engine try all that it knows, and compares.
func attack(t *testing.T, c *client, wide bool) {
	status, text := c.obeyed("attack")
	got := map[string]string{}
	if err := json.Unmarshal([]byte(text), &got); err != nil || status != 200 {
		t.Fatalf("%d: %v: %.500s", status, err, text)
	}
	want := attackOutcomes(wide)
	for _, name := range slices.Sorted(maps.Keys(want)) {
		t.Run(name, func(t *testing.T) {
			if outcome, tried := got[name]; !tried {
				t.Error("the engine did not try")
			} else if outcome != want[name] {
				t.Errorf("it came to %q, expected %q", outcome, want[name])
			}
		})
	}
	for name := range got {
		if _, known := want[name]; !known {
			t.Errorf("%s: it came to %q, and nothing is expected", name, got[name])
		}
	}
}

// ports dials a VM's ports as its launcher does.
func (h *host) ports() *launcher.UserDialer {
	h.t.Helper()
	found, err := filepath.Glob(filepath.Join(h.dir, "chrysalis", "vms", "*", "runs", "*", "io", "vsock.sock"))
	if err != nil || len(found) != 1 {
		h.t.Skipf("this VM's vsock is the host kernel's: %d sockets", len(found))
	}
	// A unix socket's address has 108 bytes.
	short, err := os.MkdirTemp("", "vm")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { os.RemoveAll(short) })
	link := filepath.Join(short, "vsock")
	if err := os.Symlink(found[0], link); err != nil {
		h.t.Fatal(err)
	}
	d := launcher.NewUserDialer(link)
	h.t.Cleanup(func() { d.Close() })
	return d
}

// ask sends a GET request to the status port.
func ask(d launcher.Dialer, path string, limit time.Duration) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	conn, err := d.Dial(ctx, guest.PortStatus)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n", path)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	return string(data), err
}

// metric returns one of the VM's counters.
func metric(t *testing.T, d launcher.Dialer, name string) int64 {
	t.Helper()
	text, err := ask(d, "/metrics", time.Minute)
	if err != nil {
		t.Fatalf("metrics: %v", err)
	}
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, "chrysalis_"+name+" "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				t.Fatalf("metrics: %q", line)
			}
			return n
		}
	}
	t.Fatalf("there is no metric %s:\n%s", name, text)
	return 0
}

// watched asks the status port again and again while something happens, each time
// for no longer than a limit, and returns the longest that an answer took.
func watched(t *testing.T, d launcher.Dialer, limit time.Duration, happens func()) time.Duration {
	t.Helper()
	done := make(chan struct{})
	var longest time.Duration
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			begin := time.Now()
			if _, err := ask(d, "/status", limit); err != nil {
				t.Errorf("the status port, after %v: %v", time.Since(begin), err)
				return
			}
			longest = max(longest, time.Since(begin))
			select {
			case <-done:
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	func() {
		defer watch.Wait()
		defer close(done)
		happens()
	}()
	return longest
}

// agentWell checks what must hold after any attack: the agent has met no bug, and
// gives its memory back.
func agentWell(t *testing.T, d launcher.Dialer) {
	t.Helper()
	if n := metric(t, d, "agent_bugs_total"); n != 0 {
		t.Errorf("the agent has met %d bugs", n)
	}
	var kib int64
	for range 60 {
		if kib = metric(t, d, "agent_resident_bytes") >> 10; kib <= 30<<10 {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
	t.Errorf("the agent takes %d KiB of memory", kib)
}

// TestHostileEngine boots an engine that an attacker has taken over, under the
// narrowest profile.
func TestHostileEngine(t *testing.T) {
	h := newHost(t)
	engine := packEngine(t, "hostile", nil)
	endpoint := h.up("--engine", engine, "--model", demo)
	c := newClient(t, endpoint)
	ports := h.ports()

	t.Run("attacks", func(t *testing.T) { attack(t, c, false) })
	t.Run("answers", func(t *testing.T) { hostileAnswers(t, c, ports) })
	t.Run("the evidence is what it was", func(t *testing.T) {
		h.verify(0, "", "--record", recordOf(t, h, uki, engine, demo), "--allow-not-confidential", endpoint)
	})
	t.Run("the agent is well", func(t *testing.T) { agentWell(t, ports) })
}

// TestGreedyEngine boots the same engine under the widest profile that there can
// be. It tries all attacks again, of which some now get as far as the kernel, and
// then to use up the VM.
func TestGreedyEngine(t *testing.T) {
	h := newHost(t)
	engine := packEngine(t, "hostile", func(p *profile.Profile) { p.Seccomp = wideProfile })
	endpoint := h.up("--engine", engine, "--model", demo)
	c := newClient(t, endpoint)
	ports := h.ports()

	t.Run("attacks", func(t *testing.T) { attack(t, c, true) })
	for _, name := range []string{
		"/tmp", "the door", "its own log", "inotify", "epoll and timers", "names", "reads of its disk", "processor", "processes",
		"mappings", "descriptors", "pipes", "unix sockets", "memory in a file", "memory",
	} {
		t.Run(name, func(t *testing.T) {
			var status int
			var said string
			longest := watched(t, ports, 30*time.Second, func() { status, said = c.obeyed("exhaust " + name) })
			// Either it could not, or it is what died of it.
			if status != 200 && said != "engine_failed" {
				t.Errorf("%d: %s", status, said)
			}
			t.Logf("%d: %s; the status port answered within %v", status, said, longest)
			for range 300 {
				if status, said = c.obeyed("hello"); status == 200 && said == "hello" {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
			t.Errorf("the engine did not come back: %d %s", status, said)
		})
	}
	t.Run("only the engine died", func(t *testing.T) {
		t.Logf("%d restarts", metric(t, ports, "engine_restarts_total"))
		agentWell(t, ports)
	})
}

// hostileAnswers has the engine answer as none should.
func hostileAnswers(t *testing.T, c *client, ports launcher.Dialer) {
	for _, r := range []struct {
		name   string
		status int
		code   string // of the error
	}{
		{"nothing", 502, "engine_failed"},
		{"no HTTP", 502, "engine_failed"},
		{"another protocol", 502, "engine_failed"},
		{"endless status line", 502, "engine_failed"},
		{"endless header line", 502, "engine_failed"},
		{"endless header", 502, "engine_failed"},
		{"endless provisional answers", 502, "engine_failed"},
		{"another protocol's connection", 502, "engine_failed"},
		{"redirect", 502, "engine_failed"},
		{"two lengths", 502, "engine_failed"},
		{"length below zero", 502, "engine_failed"},
		{"length of an exabyte", 502, "engine_failed"},
		{"chunk of too many digits", 502, "engine_failed"},
		{"endless chunk extension", 502, "engine_failed"},
		{"endless trailer", 502, "engine_failed"},
		{"gzip bomb", 502, "engine_failed"},
		{"no JSON", 502, "engine_failed"},
		{"deep JSON", 502, "engine_failed"},
		{"another type", 502, "engine_failed"},
		{"its own error", 502, "engine_failed"},
		{"long refusal", 400, "engine_refused"},
	} {
		t.Run(r.name, func(t *testing.T) {
			resp, body := c.send("POST", "/v1/chat/completions", order("answer "+r.name, false))
			if resp.StatusCode != r.status || !strings.Contains(body, `"`+r.code+`"`) || strings.Contains(body, "secret") || len(body) > 2<<10 {
				t.Errorf("%s, expected %d and %s: %.3000s", resp.Status, r.status, r.code, body)
			}
		})
	}
	t.Run("headers of its own", func(t *testing.T) {
		resp, body := c.send("POST", "/v1/chat/completions", order("answer headers of its own", false))
		for _, name := range []string{"Set-Cookie", "Alt-Svc", "X-Engine", receipt.Trailer} {
			if resp.Header.Get(name) != "" {
				t.Errorf("the client got the engine's %s", name)
			}
		}
		if resp.StatusCode != 200 || !strings.Contains(resp.Trailer.Get(receipt.Trailer), "signature") {
			t.Errorf("%s: %v: %s", resp.Status, resp.Trailer, body)
		}
	})
	// Counts are cut to what the sizes of request and answer allow.
	for _, r := range []struct{ name, has string }{
		{"tokens below zero", `"completion_tokens":0,`},
		{"tokens beyond all bounds", `{"manifest"`}, // no counts
		{"more tokens than bytes", `"completion_tokens":72,`},
		{"tokens that are no numbers", `{"manifest"`},
	} {
		t.Run(r.name, func(t *testing.T) {
			resp, body := c.send("POST", "/v1/chat/completions", order("answer "+r.name, false))
			signed := resp.Trailer.Get(receipt.Trailer)
			if resp.StatusCode != 200 || !strings.Contains(signed, "signature") || !strings.Contains(signed, r.has) {
				t.Errorf("%s: receipt %s, expected %s in it: %s", resp.Status, signed, r.has, strings.TrimSpace(body))
			}
		})
	}

	for _, r := range []struct {
		name, has string
		ends      bool // well
	}{
		{"stream: garbage", "engine_failed", false},
		{"stream: endless line", "engine_failed", false},
		{"stream: endless event", "engine_failed", false},
		{"stream: cut off", "engine_failed", false},
		{"stream: line breaks of other kinds", "engine_failed", false},
		{"stream: a receipt of its own", "answered", true},
		{"stream: more after its end", "answered", true},
		{"stream: tokens below zero", "answered", true},
		{"stream: as an answer", "engine_failed", false},
	} {
		t.Run(r.name, func(t *testing.T) {
			_, body := c.send("POST", "/v1/chat/completions", order("answer "+r.name, true))
			_, signed, err := receipt.SplitStream([]byte(body))
			ended := err == nil && strings.Contains(body, "data: [DONE]")
			if !strings.Contains(body, r.has) || ended != r.ends || strings.Count(body, receipt.CommentPrefix) > 1 || strings.Contains(string(signed), `tokens":-`) {
				t.Errorf("it ended well: %v, expected %v and %q: %.2000s", ended, r.ends, r.has, body)
			}
		})
	}
	for _, r := range []struct {
		name   string
		stream bool
	}{{"endless answer", false}, {"stream: endless", true}, {"stream: endless comments", true}} {
		t.Run(r.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, "POST", c.endpoint+"/v1/chat/completions", order("answer "+r.name, r.stream))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			n := int64(0)
			longest := watched(t, ports, 30*time.Second, func() {
				if resp, err := c.http.Do(req); err == nil {
					n, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
				}
			})
			t.Logf("%d bytes before the client had enough; the status port answered within %v", n, longest)
			for range 100 {
				if metric(t, ports, "requests_active") == 0 {
					return
				}
				time.Sleep(100 * time.Millisecond)
			}
			t.Error("the request goes on without its client")
		})
	}
}
