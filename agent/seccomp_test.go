package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Answers of a filter, seccomp(2).
const (
	allow   = uint32(unix.SECCOMP_RET_ALLOW)
	refused = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EPERM)
	absent  = uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.ENOSYS)
)

// interpreter runs the filters as the kernel does, without a call being made.
type interpreter []*bpf.VM

func newInterpreter(t *testing.T, extra ...string) interpreter {
	t.Helper()
	var vms interpreter
	for i, policy := range enginePolicies(extra, false) {
		program, err := policy.Assemble()
		if err != nil {
			t.Fatalf("filter %d: %v", i, err)
		}
		vm, err := bpf.NewVM(program)
		if err != nil {
			t.Fatalf("filter %d: %v", i, err)
		}
		vms = append(vms, vm)
	}
	return vms
}

// answer is the strictest answer: the one with the smallest action, seccomp(2).
func (vms interpreter) answer(t *testing.T, abi, number uint32, arg0 uint64) uint32 {
	t.Helper()
	// struct seccomp_data. The kernel loads its words in the host's order, the
	// interpreter in the network's.
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[0:], number)
	binary.BigEndian.PutUint32(data[4:], abi)
	binary.BigEndian.PutUint32(data[16:], uint32(arg0))
	binary.BigEndian.PutUint32(data[20:], uint32(arg0>>32))
	strictest := allow
	for _, vm := range vms {
		got, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		if uint32(got)&unix.SECCOMP_RET_ACTION_FULL < strictest&unix.SECCOMP_RET_ACTION_FULL {
			strictest = uint32(got)
		}
	}
	return strictest
}

// TestFiltersSayWhatThePolicySays asks for every call of the table, with first
// arguments that hit every condition and, in the upper half, the number of every
// other call.
func TestFiltersSayWhatThePolicySays(t *testing.T) {
	extra := []string{"sched_setscheduler", "mbind"}
	vms := newInterpreter(t, extra...)
	low := []uint64{0, unix.AF_UNIX, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK, unix.AF_PACKET, unix.AF_VSOCK,
		unix.CLONE_VM | unix.CLONE_THREAD, unix.CLONE_NEWUSER, unix.CLONE_NEWNET | unix.CLONE_VM, 1 << 31}
	low = append(low, enginePrctls...)
	low = append(low, unix.PR_SET_SECCOMP, unix.PR_SET_MM, unix.PR_SET_SPECULATION_CTRL, unix.PR_SET_SYSCALL_USER_DISPATCH)
	highest := slices.Max(slices.Collect(maps.Keys(arch.X86_64.SyscallNumbers)))
	for number := range highest + 2 {
		name := arch.X86_64.SyscallNumbers[number]
		args := slices.Clone(low)
		if slices.Contains([]string{"socket", "socketpair", "clone", "clone3", "prctl", "read", "mount"}, name) {
			for high := range highest + 2 {
				for _, l := range low {
					args = append(args, uint64(high)<<32|l)
				}
			}
		}
		for _, arg := range args {
			want := refused
			switch {
			case name == "socket" || name == "socketpair":
				if arg == unix.AF_UNIX {
					want = allow
				}
			case name == "clone":
				if arg&newNamespaces == 0 {
					want = allow
				}
			case name == "clone3":
				want = absent
			case name == "prctl":
				if slices.Contains(enginePrctls, arg) {
					want = allow
				}
			case slices.Contains(engineSyscalls, name) || slices.Contains(extra, name):
				want = allow
			}
			if got := vms.answer(t, uint32(arch.X86_64.ID), uint32(number), arg); got != want {
				t.Fatalf("%s (%d) with %#x: %#x, expected %#x", name, number, arg, got, want)
			}
		}
	}
}

func TestFiltersRefuseOtherABIs(t *testing.T) {
	vms := newInterpreter(t)
	for number := range uint32(600) {
		if got := vms.answer(t, uint32(arch.I386.ID), number, unix.AF_UNIX); got != refused {
			t.Fatalf("i386 call %d: %#x", number, got)
		}
		if got := vms.answer(t, uint32(arch.X86_64.ID), number|uint32(arch.X32.SeccompMask), unix.AF_UNIX); got != absent {
			t.Fatalf("x32 call %d: %#x", number, got)
		}
	}
}

func TestProfileCannotAddForbiddenCalls(t *testing.T) {
	known := arch.X86_64.SyscallNames
	for _, name := range engineSyscalls {
		if _, ok := known[name]; !ok || neverSyscalls[name] {
			t.Errorf("%s is allowed: known %v, forbidden %v", name, ok, neverSyscalls[name])
		}
	}
	all := slices.Collect(maps.Keys(neverSyscalls))
	vms := newInterpreter(t, append(all, "read", "mbind", "mbind")...)
	for _, name := range all {
		number, ok := known[name]
		if !ok {
			t.Errorf("%s is forbidden and no call's name", name)
		}
		if got := vms.answer(t, uint32(arch.X86_64.ID), uint32(number), 0); got == allow {
			t.Errorf("a profile can add %s", name)
		}
	}
	if got := vms.answer(t, uint32(arch.X86_64.ID), uint32(known["mbind"]), 0); got != allow {
		t.Errorf("a profile cannot add mbind: %#x", got)
	}
	// A name that is no call's is an error and not left out.
	bad := enginePolicies([]string{"no_such_call"}, false)
	if _, err := bad[len(bad)-1].Assemble(); err == nil || !strings.Contains(err.Error(), "no_such_call") {
		t.Errorf("an unknown call: %v", err)
	}
}

// TestFiltersTakeManyCalls has a profile add so many that the library needs long
// jumps.
func TestFiltersTakeManyCalls(t *testing.T) {
	var extra []string
	for name := range arch.X86_64.SyscallNames {
		extra = append(extra, name)
	}
	slices.Sort(extra)
	vms := newInterpreter(t, extra...)
	for name, number := range arch.X86_64.SyscallNames {
		want := allow
		switch {
		case name == "clone3":
			want = absent
		case neverSyscalls[name]:
			want = refused
		}
		if got := vms.answer(t, uint32(arch.X86_64.ID), uint32(number), unix.AF_UNIX); got != want {
			t.Errorf("%s: %#x, expected %#x", name, got, want)
		}
	}
}

// attempt is a call that the filtered child makes, and what comes of it.
type attempt struct {
	Name   string
	Number uintptr
	Args   [3]uintptr
	Errno  unix.Errno // wanted, then met
}

func attempts() []attempt {
	const x32 = 0x40000000
	list := []attempt{
		{"socket AF_UNIX", unix.SYS_SOCKET, [3]uintptr{unix.AF_UNIX, unix.SOCK_STREAM}, 0},
		{"socket AF_INET", unix.SYS_SOCKET, [3]uintptr{unix.AF_INET, unix.SOCK_STREAM}, unix.EPERM},
		{"socket AF_INET6", unix.SYS_SOCKET, [3]uintptr{unix.AF_INET6, unix.SOCK_DGRAM}, unix.EPERM},
		{"socket AF_VSOCK", unix.SYS_SOCKET, [3]uintptr{unix.AF_VSOCK, unix.SOCK_STREAM}, unix.EPERM},
		{"socket AF_NETLINK", unix.SYS_SOCKET, [3]uintptr{unix.AF_NETLINK, unix.SOCK_RAW}, unix.EPERM},
		{"socket AF_PACKET", unix.SYS_SOCKET, [3]uintptr{unix.AF_PACKET, unix.SOCK_RAW}, unix.EPERM},
		{"socket AF_ALG", unix.SYS_SOCKET, [3]uintptr{unix.AF_ALG, unix.SOCK_SEQPACKET}, unix.EPERM},
		// The kernel cuts a domain to 32 bits.
		{"socket AF_UNIX, upper half set", unix.SYS_SOCKET, [3]uintptr{1<<32 | unix.AF_UNIX, unix.SOCK_STREAM}, unix.EPERM},
		{"socket AF_VSOCK, upper half clone's number", unix.SYS_SOCKET, [3]uintptr{unix.SYS_CLONE<<32 | unix.AF_VSOCK, unix.SOCK_STREAM}, unix.EPERM},
		{"socket AF_INET, upper half clone's number", unix.SYS_SOCKET, [3]uintptr{unix.SYS_CLONE<<32 | unix.AF_INET, unix.SOCK_STREAM}, unix.EPERM},
		{"socketpair AF_INET", unix.SYS_SOCKETPAIR, [3]uintptr{unix.AF_INET, unix.SOCK_STREAM}, unix.EPERM},
		{"clone CLONE_NEWUSER", unix.SYS_CLONE, [3]uintptr{unix.CLONE_NEWUSER | uintptr(unix.SIGCHLD)}, unix.EPERM},
		{"clone CLONE_NEWNET", unix.SYS_CLONE, [3]uintptr{unix.CLONE_NEWNET | uintptr(unix.SIGCHLD)}, unix.EPERM},
		{"prctl PR_GET_NO_NEW_PRIVS", unix.SYS_PRCTL, [3]uintptr{unix.PR_GET_NO_NEW_PRIVS}, 0},
		{"prctl PR_SET_SECCOMP", unix.SYS_PRCTL, [3]uintptr{unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER}, unix.EPERM},
		{"prctl PR_SET_SECCOMP, upper half set", unix.SYS_PRCTL, [3]uintptr{1<<32 | unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER}, unix.EPERM},
		{"clone3", unix.SYS_CLONE3, [3]uintptr{}, unix.ENOSYS},
		{"x32 socket", x32 | unix.SYS_SOCKET, [3]uintptr{unix.AF_INET, unix.SOCK_STREAM}, unix.ENOSYS},
		{"x32 getpid", x32 | unix.SYS_GETPID, [3]uintptr{}, unix.ENOSYS},
	}
	// Every call that is not on the list, with arguments that do no harm should it
	// be made.
	for number, name := range arch.X86_64.SyscallNumbers {
		// Filters do not see uprobe and uretprobe, which end whoever makes them on
		// purpose: the kernel answers with a signal.
		if name != "clone3" && !strings.HasSuffix(name, "probe") && !slices.Contains(engineSyscalls, name) {
			list = append(list, attempt{name, uintptr(number), [3]uintptr{^uintptr(0), ^uintptr(0), ^uintptr(0)}, unix.EPERM})
		}
	}
	return list
}

// filteredChild loads the filters and becomes the program that the arguments
// name, as the agent's child becomes the engine.
func filteredChild() error {
	runtime.LockOSThread()
	if err := loadFilters(nil, false); err != nil {
		return err
	}
	return unix.Exec(os.Args[1], os.Args[1:], []string{childVariable + "=" + os.Args[2]})
}

// attemptsChild runs under the filters from its first instruction on.
func attemptsChild() error {
	done := attempts()
	for i, a := range done {
		_, _, done[i].Errno = unix.RawSyscall(a.Number, a.Args[0], a.Args[1], a.Args[2])
	}
	if pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0); err != nil {
		return fmt.Errorf("socketpair AF_UNIX: %w", err)
	} else if _, err := unix.Write(pair[0], []byte("x")); err != nil {
		return err
	}
	// Threads, more than the runtime has by now.
	var group sync.WaitGroup
	threads := make(chan int, 16)
	for range cap(threads) {
		group.Go(func() {
			runtime.LockOSThread()
			threads <- unix.Gettid()
			for len(threads) < cap(threads) {
				runtime.Gosched()
			}
		})
	}
	group.Wait()
	close(threads)
	seen := map[int]bool{}
	for id := range threads {
		seen[id] = true
	}
	if len(seen) != cap(threads) {
		return fmt.Errorf("%d threads, expected %d", len(seen), cap(threads))
	}
	return json.NewEncoder(os.Stdout).Encode(done)
}

// TestFiltersInTheKernel has a Go program run under the filters: it works, and
// cannot do what it should not.
func TestFiltersInTheKernel(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := child(t, "filtered", self, "attempts")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var got []attempt
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]unix.Errno{}
	for _, a := range attempts() {
		want[a.Name] = a.Errno
	}
	if len(got) != len(want) {
		t.Errorf("%d attempts, expected %d", len(got), len(want))
	}
	for _, a := range got {
		if a.Errno != want[a.Name] {
			t.Errorf("%s: %v, expected %v", a.Name, a.Errno, want[a.Name])
		}
	}
}

// interruptChild calls getpid (20) of the i386 table by int 0x80, from a page of
// machine code: there is no other way to from a 64-bit program.
func interruptChild() error {
	code := []byte{
		0xb8, 20, 0, 0, 0, // mov eax, 20
		0xcd, 0x80, // int 0x80
		0x48, 0x98, // cdqe
		0xc3, // ret
	}
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	copy(page, code)
	if err := unix.Mprotect(page, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		return err
	}
	entry := unsafe.Pointer(&page)                 // a slice starts with its address,
	call := *(*func() int)(unsafe.Pointer(&entry)) // a function is one of its code's
	fmt.Println(call())
	return nil
}

func TestFiltersRefuseInt80(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := child(t, "interrupt").CombinedOutput()
	if pid, _ := strconv.Atoi(strings.TrimSpace(string(out))); err != nil || pid <= 0 {
		t.Skipf("this kernel takes no i386 calls, as the guest's does not (ia32_emulation=0): %v", err)
	}
	out, err = child(t, "filtered", self, "interrupt").CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("%v: %s", err, out)
	}
	if got := strings.TrimSpace(string(out)); got != strconv.Itoa(-int(unix.EPERM)) {
		t.Errorf("getpid by int 0x80: %s, expected -EPERM", got)
	}
}
