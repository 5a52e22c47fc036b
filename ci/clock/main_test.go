package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const now = `package main

import (
	"fmt"
	"time"
)

func main() {
	begin := time.Now()
	time.Sleep(10 * time.Millisecond)
	fmt.Println(begin.Unix(), time.Since(begin) < 5*time.Second)
}
`

// TestClock asks programs of several kinds for the time.
func TestClock(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("it takes root")
	}
	dir := t.TempDir()
	clock := filepath.Join(dir, "clock")
	if out, err := exec.Command("go", "build", "-o", clock, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	source, static := filepath.Join(dir, "now.go"), filepath.Join(dir, "now")
	if err := os.WriteFile(source, []byte(now), 0o644); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-o", static, source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const python = "import threading, time; e = threading.Event(); e.wait(0.01); print(int(time.time()))"
	// As mkosi waits for a child's new user namespace.
	const stopped = `
import os, signal, time
pid = os.fork()
if pid == 0:
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
assert os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT).si_code == os.CLD_STOPPED
time.sleep(0.05)
assert "(stopped" in open(f"/proc/{pid}/status").read() or "tracing stop" in open(f"/proc/{pid}/status").read()
os.kill(pid, signal.SIGCONT)
assert os.waitpid(pid, 0)[1] == 0
print(int(time.time()))`
	for _, c := range []struct {
		name string
		args []string
	}{
		{"dynamic", []string{"date", "+%s"}},
		{"static, with threads", []string{static}},
		{"child of a child", []string{"sh", "-c", "(sleep 0; date +%s)"}},
		{"another user", []string{"setpriv", "--reuid", "61234", "--clear-groups", "date", "+%s"}},
		{"other namespaces", []string{"unshare", "--pid", "--fork", "--net", "--mount", "date", "+%s"}},
		{"stopped child", []string{"python3", "-c", stopped}},
		{"Python", []string{"python3", "-c", python}},
	} {
		for _, offset := range []int64{-860000000, 600000000} {
			t.Run(fmt.Sprintf("%s/%d", c.name, offset), func(t *testing.T) {
				if _, err := exec.LookPath(c.args[0]); err != nil {
					t.Skip(err)
				}
				cmd := exec.Command(clock, append([]string{strconv.FormatInt(offset, 10)}, c.args...)...)
				cmd.Stderr = os.Stderr
				out, err := cmd.Output()
				if err != nil {
					t.Fatal(err)
				}
				fields := strings.Fields(string(out))
				got, err := strconv.ParseInt(fields[0], 10, 64)
				if want := time.Now().Unix() + offset; err != nil || got > want || got < want-60 || len(fields) > 1 && fields[1] != "true" {
					t.Errorf("it prints %q, the time is %d", out, want)
				}
			})
		}
	}
	for _, c := range []struct {
		args []string
		want int
	}{
		{[]string{"0", "sh", "-c", "exit 7"}, 7}, {[]string{"0", "sh", "-c", "kill -9 $$"}, 137},
		{[]string{"0", "/nonexistent"}, 127}, {[]string{"soon", "true"}, 1}, {nil, 2},
	} {
		err := exec.Command(clock, c.args...).Run()
		status := 0
		if exit, ok := err.(*exec.ExitError); ok {
			status = exit.ExitCode()
		}
		if status != c.want {
			t.Errorf("%v: it ends with %d (%v), expected %d", c.args, status, err, c.want)
		}
	}
}
