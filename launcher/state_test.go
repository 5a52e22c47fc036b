package launcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func testRun(t *testing.T, s store, name string, state Life) (run, *os.File) {
	t.Helper()
	if err := os.MkdirAll(s.vm(name), 0o700); err != nil {
		t.Fatal(err)
	}
	r, lock, err := s.newRun(name, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	if state != "" {
		if err := r.writeState(State{Name: name, Run: r.id, Life: state}); err != nil {
			t.Fatal(err)
		}
	}
	return r, lock
}

// give starts another process, which has the lock from now on.
func give(t *testing.T, lock *os.File) *exec.Cmd {
	t.Helper()
	holder := exec.Command("sleep", "60")
	holder.ExtraFiles = []*os.File{lock}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { holder.Process.Kill() })
	lock.Close()
	return holder
}

func TestCheckName(t *testing.T) {
	for name, ok := range map[string]bool{
		"default": true, "a": true, "vm-2": true, "0": true, strings.Repeat("a", 32): true,
		"": false, "-a": false, "A": false, "a/b": false, "..": false, ".": false, "a b": false, "a.b": false,
		"ä": false, "a\n": false, strings.Repeat("a", 33): false,
	} {
		if err := checkName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// A run is alive exactly as long as somebody holds its lock; what is over is
// tidied, and says so.
func TestSettle(t *testing.T) {
	for _, before := range []Life{LifeReady, LifeStarting, LifeEnded, ""} {
		t.Run("state "+string(before), func(t *testing.T) {
			s := store{t.TempDir()}
			r, lock := testRun(t, s, "vm", before)
			sock := r.path("io", "qmp.sock")
			l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(l)
			if err := unix.Bind(l, &unix.SockaddrUnix{Name: sock}); err != nil {
				t.Fatal(err)
			}
			os.WriteFile(r.path("io", "console.log"), []byte("x"), 0o600)

			if alive, err := r.settle(); !alive || err != nil {
				t.Fatalf("with its lock held: %v, %v", alive, err)
			}
			if _, err := os.Stat(sock); err != nil {
				t.Error("a live run was tidied")
			}
			lock.Close()
			if alive, err := r.settle(); alive || err != nil {
				t.Fatalf("with its lock free: %v, %v", alive, err)
			}
			state, err := r.readState()
			if err != nil || state.Life != LifeEnded || state.Name != "vm" {
				t.Errorf("%+v, %v", state, err)
			}
			if (before != LifeEnded) != strings.Contains(state.Ended, "supervisor is gone") {
				t.Errorf("it ended thus: %q", state.Ended)
			}
			if _, err := os.Lstat(sock); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("its socket is still there: %v", err)
			}
			if _, err := os.Stat(r.path("io", "console.log")); err != nil {
				t.Errorf("its console is gone: %v", err)
			}
		})
	}
}

// Those who look at a run that is over at the same time all see that it is.
func TestSettleTogether(t *testing.T) {
	s := store{t.TempDir()}
	r, lock := testRun(t, s, "vm", LifeReady)
	lock.Close()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 50 {
				if alive, err := r.settle(); alive || err != nil {
					t.Errorf("alive %v, %v", alive, err)
					return
				}
			}
		})
	}
	all.Wait()
}

// A run that is just being made has no supervisor that answers; down waits for it.
func TestDownWhileStarting(t *testing.T) {
	dir := t.TempDir()
	r, lock := testRun(t, store{dir}, "vm", "")
	go func() {
		time.Sleep(200 * time.Millisecond)
		s := testSupervisor(t, r)
		s.save()
		time.Sleep(100 * time.Millisecond)
		api, err := s.serveAPI()
		if err != nil {
			t.Error(err)
			lock.Close()
			return
		}
		if req := <-s.stop; req.Now || req.Timeout != time.Second {
			t.Errorf("it was asked to %+v", req)
		}
		api.Close()
		lock.Close()
	}()
	start := time.Now()
	if err := Down(t.Context(), "vm", DownOptions{StateDir: dir, Timeout: time.Second}); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took < 300*time.Millisecond {
		t.Errorf("it came back after %v", took)
	}
}

// A supervisor that is ending closes its socket whoever is asking, and has its lock
// for a moment longer, in which it writes down how its VM ended. down waits for that.
func TestDownWhileEnding(t *testing.T) {
	for name, answer := range map[string]string{
		"request broken off": "", "answer broken off": "HTTP/1.1 202 Acc", "no such request": "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			r, lock := testRun(t, store{dir}, "vm", "")
			supervisor := give(t, lock)
			if err := r.writeState(State{Name: "vm", Run: r.id, Life: LifeReady, Supervisor: supervisor.Process.Pid}); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", testSupervisor(t, r).short(controlSocket))
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				for range 2 {
					conn, err := l.Accept()
					if err != nil {
						t.Error(err)
						break
					}
					conn.Read(make([]byte, 1))
					io.WriteString(conn, answer)
					conn.Close()
				}
				l.Close()
				time.Sleep(200 * time.Millisecond)
				supervisor.Process.Signal(syscall.SIGTERM)
			}()
			down := make(chan error, 1)
			go func() { down <- Down(t.Context(), "vm", DownOptions{StateDir: dir}) }()
			supervisor.Wait()
			if how := supervisor.ProcessState.Sys().(syscall.WaitStatus); how.Signal() != syscall.SIGTERM {
				t.Errorf("it ended with %v", supervisor.ProcessState)
			}
			if err := <-down; err != nil {
				t.Error(err)
			}
		})
	}
}

// The supervisor of a VM that replaces one which is just ending waits until that one
// frees the address, and says so when another program has it.
func TestTakeOverFromEnding(t *testing.T) {
	t.Parallel()
	for name, frees := range map[string]bool{"freed": true, "taken by another program": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st := store{t.TempDir()}
			old, _ := testRun(t, st, "vm", LifeReady)
			sock, err := net.Listen("unix", testSupervisor(t, old).short(controlSocket))
			if err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := sock.Accept()
				if err != nil {
					t.Error(err)
					return
				}
				conn.Close()
				sock.Close()
				if frees {
					time.Sleep(200 * time.Millisecond)
					l.Close()
				}
			}()
			r, _ := testRun(t, st, "vm", LifeStarting)
			s := testSupervisor(t, r)
			s.cfg.Replaces, s.cfg.Listen = old.id, l.Addr().String()
			got, err := s.takeOver()
			if frees {
				if err != nil {
					t.Fatal(err)
				}
				defer got.Close()
				if got.Addr().String() != s.cfg.Listen {
					t.Errorf("it listens on %v", got.Addr())
				}
			} else if err == nil || !strings.Contains(err.Error(), "address already in use") || !strings.Contains(err.Error(), s.cfg.Listen) {
				t.Errorf("%v", err)
			}
		})
	}
}

// The lock goes with the process that has it, however that process ends.
func TestLockOfKilledProcess(t *testing.T) {
	s := store{t.TempDir()}
	r, lock := testRun(t, s, "vm", LifeReady)
	holder := give(t, lock)
	if alive, err := r.settle(); !alive || err != nil {
		t.Errorf("while the other process lives: %v, %v", alive, err)
	}
	holder.Process.Kill()
	holder.Wait()
	if alive, err := r.settle(); alive || err != nil {
		t.Errorf("when it was killed: %v, %v", alive, err)
	}
}

// What outlives a supervisor that was killed is ended by whoever looks at the run
// next, and nothing else is.
func TestLeftBehind(t *testing.T) {
	s := store{t.TempDir()}
	r, lock := testRun(t, s, "vm", LifeReady)
	lock.Close()
	// session runs a leader that ends and leaves a process with its command line.
	session := func(arg string) (leader, left int) {
		cmd := exec.Command("sh", "-c", `sh -c 'echo $$; exec >&- 2>&-; while :; do sleep 1; done' "$1" &`, "sh", arg)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		out, err := cmd.Output()
		if err == nil {
			left, err = strconv.Atoi(strings.TrimSpace(string(out)))
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		return cmd.Process.Pid, left
	}
	alive := func(pid int) bool {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return err == nil && len(line) > 0
	}
	leader, left := session(r.path("io"))
	_, other := session(r.path("io"))
	if !alive(left) || !alive(other) {
		t.Fatal("they ended with their leaders")
	}
	state, err := r.readState()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		run  run
		ends bool
	}{
		{"of another run", s.run("vm", r.id+"x"), false},
		{"of this run", r, true},
	} {
		os.MkdirAll(tt.run.dir, 0o700)
		os.WriteFile(tt.run.path("lock"), nil, 0o600)
		state.Supervisor, state.Life = leader, LifeReady
		if err := tt.run.writeState(state); err != nil {
			t.Fatal(err)
		}
		if is, err := tt.run.settle(); is || err != nil {
			t.Errorf("%s: %v, %v", tt.name, is, err)
		}
		if alive(left) == tt.ends {
			t.Errorf("%s: alive is %v", tt.name, alive(left))
		}
	}
	if !alive(other) {
		t.Error("a process of another session was killed")
	}
}

// Prune keeps what lives and the logs of the last run that does not.
func TestPrune(t *testing.T) {
	s := store{t.TempDir()}
	var all []run
	for range 4 {
		r, lock := testRun(t, s, "vm", LifeReady)
		all = append(all, r)
		if len(all) != 2 {
			lock.Close()
		}
		time.Sleep(2 * time.Millisecond) // ids sort by time
	}
	left := filepath.Join(s.vm("vm"), "runs", ".new-x")
	os.Mkdir(left, 0o700)
	if err := s.prune("vm"); err != nil {
		t.Fatal(err)
	}
	got, err := s.runs("vm")
	if err != nil || len(got) != 2 || got[0].id != all[1].id || got[1].id != all[3].id {
		t.Errorf("%v are left, %v", got, err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Error("a half-made run is left")
	}
}

func TestStatusOfRuns(t *testing.T) {
	dir := t.TempDir()
	s := store{dir}
	if states, err := Status(context.Background(), dir, ""); err != nil || len(states) != 0 {
		t.Errorf("an empty folder: %v, %v", states, err)
	}
	if _, err := Status(context.Background(), dir, "vm"); err == nil {
		t.Error("a VM that never was")
	}
	testRun(t, s, "alive", LifeReady)
	_, lock := testRun(t, s, "dead", LifeReady)
	lock.Close()
	states, err := Status(context.Background(), dir, "")
	if err != nil || len(states) != 2 || states[0].Life != LifeReady || states[1].Life != LifeEnded || !states[1].Failed {
		t.Errorf("%+v, %v", states, err)
	}
	if names, err := Running(dir); err != nil || len(names) != 1 || names[0] != "alive" {
		t.Errorf("%v, %v", names, err)
	}
	if err := Down(context.Background(), "dead", DownOptions{StateDir: dir}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("down: %v", err)
	}
}

// A process id in a state file is only believed when that process has the lock.
func TestHolder(t *testing.T) {
	s := store{t.TempDir()}
	r, lock := testRun(t, s, "vm", LifeReady)
	if err := r.writeState(State{Name: "vm", Run: r.id, Life: LifeReady, Supervisor: os.Getpid()}); err != nil {
		t.Fatal(err)
	}
	if pid, err := r.holder(); err != nil || pid != os.Getpid() {
		t.Errorf("%d, %v", pid, err)
	}
	lock.Close()
	if pid, err := r.holder(); err == nil {
		t.Errorf("without the lock: %d", pid)
	}
}

func TestLogOfRun(t *testing.T) {
	dir := t.TempDir()
	r, lock := testRun(t, store{dir}, "vm", LifeReady)
	if err := os.WriteFile(r.path("io", "console.log"), []byte("a\x1b[2Jb\r\n\x1b]0;title\x07c"), 0o600); err != nil {
		t.Fatal(err)
	}
	lock.Close()
	var out strings.Builder
	if err := Log(t.Context(), dir, "vm", LogConsole, true, &out); err != nil || out.String() != "ab\nc" {
		t.Errorf("%q, %v", out.String(), err)
	}
	if err := Log(t.Context(), dir, "vm", LogEngine, false, &out); err == nil || !strings.Contains(err.Error(), "no engine log") {
		t.Errorf("a log that is not there: %v", err)
	}
	if got := consoleTail(r.path("io", "console.log")); strings.Join(got, "|") != "ab|c" {
		t.Errorf("%q", got)
	}
}

// An interrupt while the replaced VM drains leaves both, and says so in a line.
func TestAwaitEndInterrupted(t *testing.T) {
	old, _ := testRun(t, store{t.TempDir()}, "vm", LifeDraining)
	ctx, cancel := context.WithCancel(t.Context())
	told := 0
	err := awaitEnd(ctx, old, time.Minute, func(e Event) {
		if e.Kind == EventDraining {
			told++
		}
		cancel()
	})
	if err == nil || !strings.Contains(err.Error(), "both run on") || strings.Contains(err.Error(), "\n") || told != 1 {
		t.Errorf("%v; told %d times", err, told)
	}
	if alive, err := old.settle(); !alive || err != nil {
		t.Errorf("the old run: alive %v, %v", alive, err)
	}
}

func TestSameAddress(t *testing.T) {
	for _, tt := range []struct {
		asked, bound string
		want         bool
	}{
		{"127.0.0.1:8443", "127.0.0.1:8443", true},
		{"localhost:8443", "127.0.0.1:8443", true},
		{"127.0.0.1:0", "127.0.0.1:8443", false},
		{"127.0.0.1:8444", "127.0.0.1:8443", false},
		{"127.0.0.2:8443", "127.0.0.1:8443", false},
		{"nonsense", "127.0.0.1:8443", false},
	} {
		if got := sameAddress(tt.asked, tt.bound); got != tt.want {
			t.Errorf("%s and %s: %v", tt.asked, tt.bound, got)
		}
	}
}

// A run made after the clock was set back is the newest all the same.
func TestClockSetBack(t *testing.T) {
	dir := t.TempDir()
	s := store{dir}
	if err := os.MkdirAll(s.vm("vm"), 0o700); err != nil {
		t.Fatal(err)
	}
	var last string
	for i, at := range []time.Duration{0, -48 * time.Hour, -49 * time.Hour, time.Hour, -time.Hour} {
		r, lock, err := s.newRun("vm", time.Now().Add(at))
		if err != nil {
			t.Fatal(err)
		}
		lock.Close()
		last = r.id
		all, err := s.runs("vm")
		if err != nil || len(all) != i+1 || all[i].id != last {
			t.Fatalf("run %d is %s, of %v; %v", i, last, all, err)
		}
	}
	if err := s.prune("vm"); err != nil {
		t.Fatal(err)
	}
	if states, err := Status(t.Context(), dir, "vm"); err != nil || len(states) != 1 || states[0].Run != last {
		t.Errorf("%+v, %v", states, err)
	}
}

// On a state folder that is full, or read-only, a VM that lives can be seen and
// stopped, and one that is gone is seen to be gone.
func TestUnwritableState(t *testing.T) {
	for _, how := range []string{"full", "read-only"} {
		t.Run(how, func(t *testing.T) {
			dir := t.TempDir()
			if err := unix.Mount("none", dir, "tmpfs", 0, "size=256k"); err != nil {
				t.Skipf("a small file system cannot be mounted: %v", err)
			}
			defer unix.Unmount(dir, unix.MNT_DETACH)
			s := store{dir}
			_, dead := testRun(t, s, "dead", LifeReady)
			dead.Close()
			r, lock := testRun(t, s, "alive", LifeReady)
			sup := testSupervisor(t, r)
			sup.state.Life = LifeReady
			api, err := sup.serveAPI()
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				req := <-sup.stop
				if req.Timeout != time.Second {
					t.Errorf("it was asked to %+v", req)
				}
				api.Close()
				lock.Close()
			}()
			if how == "full" {
				f, err := os.Create(filepath.Join(dir, "fill"))
				if err != nil {
					t.Fatal(err)
				}
				for err == nil {
					_, err = f.Write(make([]byte, 4096))
				}
				f.Close()
			} else {
				// Another mount of the same, for the supervisor's own files are open.
				ro := t.TempDir()
				for _, flags := range []uintptr{unix.MS_BIND, unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY} {
					if err := unix.Mount(dir, ro, "", flags, ""); err != nil {
						t.Fatal(err)
					}
				}
				defer unix.Unmount(ro, unix.MNT_DETACH)
				dir = ro
			}
			states, err := Status(t.Context(), dir, "")
			if err != nil || len(states) != 2 || states[0].Life != LifeReady || states[1].Life != LifeEnded {
				t.Errorf("%+v, %v", states, err)
			}
			if err := Down(t.Context(), "alive", DownOptions{StateDir: dir, Timeout: time.Second}); err != nil {
				t.Errorf("down: %v", err)
			}
		})
	}
}
