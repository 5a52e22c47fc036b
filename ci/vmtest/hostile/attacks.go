package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"chrysalis/ci/vmtest/hostile/secret"
)

// An attack is tried once and says what came of it: an errno's name, "done" where
// it worked, or what was found.
type attack struct {
	name string
	try  func() string
}

// inherited are the descriptors that were open when this program started.
var inherited string

func outcome(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "done"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	default:
		return err.Error()
	}
}

// call makes a system call whose arguments do no harm should it be let through.
func call(number uintptr, args ...uintptr) func() string {
	var a [6]uintptr
	copy(a[:], args)
	return func() string {
		_, _, errno := syscall.RawSyscall6(number, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno == 0 {
			return "done"
		}
		return outcome(errno)
	}
}

// text is a string as system calls take it. It is never freed.
func text(s string) uintptr {
	b, err := unix.BytePtrFromString(s)
	if err != nil {
		panic(err)
	}
	texts = append(texts, b)
	return uintptr(unsafe.Pointer(b))
}

var texts []*byte

func open(path string, flags int) func() string {
	return func() string {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		return outcome(err)
	}
}

// x32 marks a call of the x32 table.
const x32 = 0x40000000

// bad is an argument that no call takes.
const bad = ^uintptr(0)

var attacks = func() []attack {
	list := []attack{
		{"descriptors at the start", func() string { return inherited }},
		{"other processes", otherProcesses},
		{"entries of /proc", entries("/proc")},
		{"entries of /dev", entries("/dev")},
		{"entries of /run", entries("/run")},
		{"the way up", wayUp},
		{"network interfaces", interfaces},
		{"huge pages", hugePages},
		{"where a file can be made", writable},
		{"socket families but AF_UNIX", families},

		// The sandbox's own places.
		{"file in the door", open("/run/engine/file", unix.O_CREAT|unix.O_WRONLY)},
		{"folder in the door", func() string { return outcome(unix.Mkdir("/run/engine/folder", 0o700)) }},
		{"pipe in the door", call(unix.SYS_MKNOD, text("/run/engine/pipe"), unix.S_IFIFO|0o600)},
		{"program in /tmp", program},
		{"program in memory", programInMemory},
		{"the engine disk for writing", open(os.Args[0], unix.O_WRONLY)},
		{"the model for writing", modelForWriting},
		{"more open files", limit(unix.RLIMIT_NOFILE, 1<<20)},
		{"core dumps", limit(unix.RLIMIT_CORE, 1<<20)},
		{"entropy", ioctlOn("/dev/urandom", 0x40085203)}, // RNDADDENTROPY
		{"root's credentials on a socket", forgeCredentials},

		// The agent's memory.
		{"process_vm_readv", call(unix.SYS_PROCESS_VM_READV, 1, bad, 1, bad, 1)},
		{"process_vm_writev", call(unix.SYS_PROCESS_VM_WRITEV, 1, bad, 1, bad, 1)},
		{"ptrace", call(unix.SYS_PTRACE, unix.PTRACE_ATTACH, 1)},
		{"ptrace of itself", call(unix.SYS_PTRACE, unix.PTRACE_TRACEME)},
		{"process_madvise", call(unix.SYS_PROCESS_MADVISE, bad)},
		{"pidfd_open", call(unix.SYS_PIDFD_OPEN, 1)},
		{"pidfd_getfd", call(unix.SYS_PIDFD_GETFD, bad)},
		{"kcmp", call(unix.SYS_KCMP, 1, 1)},
		{"move_pages", call(unix.SYS_MOVE_PAGES, 1)},

		// The host.
		{"vsock stream", call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM)},
		{"vsock datagram", call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_DGRAM)},
		{"vsock seqpacket", call(unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_SEQPACKET)},
		{"vsock, upper half set", call(unix.SYS_SOCKET, 1<<32|unix.AF_VSOCK, unix.SOCK_STREAM)},
		{"vsock, upper half clone's number", call(unix.SYS_SOCKET, unix.SYS_CLONE<<32|unix.AF_VSOCK, unix.SOCK_STREAM)},
		{"vsock pair", call(unix.SYS_SOCKETPAIR, unix.AF_VSOCK, unix.SOCK_STREAM, 0, bad)},
		{"vsock by the x32 table", call(x32|unix.SYS_SOCKET, unix.AF_VSOCK, unix.SOCK_STREAM)},
		{"netlink", call(unix.SYS_SOCKET, unix.AF_NETLINK, unix.SOCK_RAW)},
		{"internet", call(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_STREAM)},
		{"packet", call(unix.SYS_SOCKET, unix.AF_PACKET, unix.SOCK_RAW)},
		{"kernel's cryptography", call(unix.SYS_SOCKET, unix.AF_ALG, unix.SOCK_SEQPACKET)},

		// The kernel.
		{"init_module", call(unix.SYS_INIT_MODULE, bad)},
		{"finit_module", call(unix.SYS_FINIT_MODULE, bad)},
		{"delete_module", call(unix.SYS_DELETE_MODULE, bad)},
		{"kexec_load", call(unix.SYS_KEXEC_LOAD)},
		{"kexec_file_load", call(unix.SYS_KEXEC_FILE_LOAD, bad, bad)},
		{"bpf", call(unix.SYS_BPF, 0, bad, 0)},
		{"io_uring_setup", call(unix.SYS_IO_URING_SETUP, 1, bad)},
		{"io_uring_enter", call(unix.SYS_IO_URING_ENTER, bad)},
		{"io_uring_register", call(unix.SYS_IO_URING_REGISTER, bad)},
		{"userfaultfd", call(unix.SYS_USERFAULTFD)},
		{"perf_event_open", call(unix.SYS_PERF_EVENT_OPEN, bad)},
		{"keyctl", call(unix.SYS_KEYCTL, 0)},
		{"add_key", call(unix.SYS_ADD_KEY, text("user"), text("x"), text("x"), 1)},
		{"request_key", call(unix.SYS_REQUEST_KEY, text("user"), text("x"))},
		{"iopl", call(unix.SYS_IOPL, 3)},
		{"ioperm", call(unix.SYS_IOPERM, 0, 1, 1)},
		{"modify_ldt", call(unix.SYS_MODIFY_LDT, 1)},
		{"syslog", call(unix.SYS_SYSLOG, 10)},
		{"reboot", call(unix.SYS_REBOOT, unix.LINUX_REBOOT_MAGIC1, unix.LINUX_REBOOT_MAGIC2, unix.LINUX_REBOOT_CMD_CAD_OFF)},
		{"swapon", call(unix.SYS_SWAPON, bad)},
		{"swapoff", call(unix.SYS_SWAPOFF, bad)},
		{"acct", call(unix.SYS_ACCT, bad)},
		{"quotactl", call(unix.SYS_QUOTACTL, bad)},
		{"clock_settime", call(unix.SYS_CLOCK_SETTIME, unix.CLOCK_REALTIME, bad)},
		{"settimeofday", call(unix.SYS_SETTIMEOFDAY, bad)},
		{"adjtimex", call(unix.SYS_ADJTIMEX, bad)},
		{"clock_adjtime", call(unix.SYS_CLOCK_ADJTIME, unix.CLOCK_REALTIME, bad)},
		{"seccomp", call(unix.SYS_SECCOMP, 1, 0, bad)},
		{"prctl PR_SET_SECCOMP", call(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, bad)},
		{"prctl PR_SET_SECCOMP, upper half set", call(unix.SYS_PRCTL, 1<<32|unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, bad)},
		{"prctl PR_SET_MM", call(unix.SYS_PRCTL, unix.PR_SET_MM, 1)},

		// Files by other ways than their names, and other views of them.
		{"mount", call(unix.SYS_MOUNT, text("tmpfs"), text("/tmp"), text("tmpfs"))},
		{"mount of /proc", call(unix.SYS_MOUNT, text("proc"), text("/tmp"), text("proc"))},
		{"umount2", call(unix.SYS_UMOUNT2, text("/dev"))},
		{"move_mount", call(unix.SYS_MOVE_MOUNT, bad)},
		{"open_tree", call(unix.SYS_OPEN_TREE, bad)},
		{"fsopen", call(unix.SYS_FSOPEN, text("proc"))},
		{"fsmount", call(unix.SYS_FSMOUNT, bad)},
		{"mount_setattr", call(unix.SYS_MOUNT_SETATTR, bad)},
		{"pivot_root", call(unix.SYS_PIVOT_ROOT, text("/tmp"), text("/tmp"))},
		{"chroot", call(unix.SYS_CHROOT, text("/tmp"))},
		{"open_by_handle_at", call(unix.SYS_OPEN_BY_HANDLE_AT, bad)},
		{"name_to_handle_at", call(unix.SYS_NAME_TO_HANDLE_AT, bad)},
		{"fanotify_init", call(unix.SYS_FANOTIFY_INIT)},
		{"mknod of a disk", call(unix.SYS_MKNOD, text("/tmp/vda"), unix.S_IFBLK|0o600, 254<<8)},
		{"mknod of memory", call(unix.SYS_MKNOD, text("/tmp/mem"), unix.S_IFCHR|0o600, 1<<8|1)},
		{"chown", call(unix.SYS_CHOWN, text("/tmp"), 0, 0)},

		// Who it is.
		{"setuid", call(unix.SYS_SETUID, 0)},
		{"setresuid", call(unix.SYS_SETRESUID, 0, 0, 0)},
		{"setgid", call(unix.SYS_SETGID, 0)},
		{"setgroups", call(unix.SYS_SETGROUPS, 0, 0)},
		{"capset", capset},
		{"unshare of users", call(unix.SYS_UNSHARE, unix.CLONE_NEWUSER)},
		{"unshare of mounts", call(unix.SYS_UNSHARE, unix.CLONE_NEWNS)},
		{"unshare of the network", call(unix.SYS_UNSHARE, unix.CLONE_NEWNET)},
		{"setns", call(unix.SYS_SETNS, bad, 0)},
		{"clone into new users", call(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), bad&^15)},
		{"clone into new mounts", call(unix.SYS_CLONE, unix.CLONE_NEWNS|uintptr(unix.SIGCHLD), bad&^15)},
		{"clone into a new network", call(unix.SYS_CLONE, unix.CLONE_NEWNET|uintptr(unix.SIGCHLD), bad&^15)},
		{"clone3", call(unix.SYS_CLONE3, bad, 88)},
		{"sethostname", call(unix.SYS_SETHOSTNAME, text("x"), 1)},
		{"setdomainname", call(unix.SYS_SETDOMAINNAME, text("x"), 1)},
		{"real-time scheduling", realTime},
		{"higher priority", call(unix.SYS_SETPRIORITY, 0, 0, bad-19)}, // -20
	}
	for _, path := range secret.Paths {
		list = append(list, attack{"open " + path, open(path, unix.O_RDONLY)})
	}
	return list
}()

// openFiles lists the open descriptors and what they are.
func openFiles() string {
	var found []string
	for fd := range 4096 {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) != nil {
			continue
		}
		kind := fmt.Sprintf("%#o", st.Mode&unix.S_IFMT)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFCHR:
			kind = fmt.Sprintf("device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		case unix.S_IFIFO:
			kind = "pipe"
		}
		found = append(found, fmt.Sprintf("%d %s", fd, kind))
	}
	return strings.Join(found, ", ")
}

// otherProcesses lists the processes that it can name and that are not itself.
func otherProcesses() string {
	var found []string
	self := os.Getpid()
	for pid := 1; pid < 4096; pid++ {
		if unix.Kill(pid, 0) != unix.ESRCH && unix.Tgkill(self, pid, 0) != nil {
			found = append(found, fmt.Sprint(pid))
		}
	}
	return fmt.Sprintf("itself %d, others [%s]", self, strings.Join(found, " "))
}

func entries(path string) func() string {
	return func() string {
		list, err := os.ReadDir(path)
		if err != nil {
			return outcome(err)
		}
		var names []string
		for _, e := range list {
			names = append(names, e.Name())
		}
		return strings.Join(names, " ")
	}
}

// wayUp looks for what is above the root.
func wayUp() string {
	var root, up unix.Stat_t
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return outcome(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Fstat(fd, &root), unix.Fstatat(fd, "../../..", &up, 0)); err != nil {
		return outcome(err)
	}
	if root.Dev != up.Dev || root.Ino != up.Ino {
		return "there is something above the root"
	}
	return "nothing"
}

// hugePages says whether its memory may have them, which the agent's may not.
func hugePages() string {
	disabled, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
	if err == nil && disabled == 0 {
		return "allowed"
	}
	return fmt.Sprintf("disabled: %d, %v", disabled, err)
}

// interfaces asks a unix socket, which knows its network namespace, for names.
func interfaces() string {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return outcome(err)
	}
	defer unix.Close(fd)
	var names []string
	for index := int32(1); index < 64; index++ {
		var request [40]byte
		*(*int32)(unsafe.Pointer(&request[16])) = index
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCGIFNAME, uintptr(unsafe.Pointer(&request[0])))
		if errno == 0 {
			names = append(names, unix.ByteSliceToString(request[:16]))
		}
	}
	return strings.Join(names, " ")
}

// writable lists the folders in which it can make a file.
func writable() string {
	var found []string
	_ = filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		name := filepath.Join(path, "made-by-the-engine")
		if f, err := os.Create(name); err == nil {
			f.Close()
			os.Remove(name)
			found = append(found, path)
		}
		return nil
	})
	return strings.Join(found, " ")
}

// families lists what it gets from sockets of every family and type but AF_UNIX.
func families() string {
	met := map[string]bool{}
	for family := range uintptr(64) {
		for kind := range uintptr(12) {
			if family == unix.AF_UNIX {
				continue
			}
			met[call(unix.SYS_SOCKET, family, kind)()] = true
		}
	}
	var list []string
	for name := range met {
		list = append(list, name)
	}
	return strings.Join(list, " ")
}

// program copies itself to /tmp and runs the copy.
func program() string {
	const path = "/tmp/program"
	defer os.Remove(path)
	data, err := os.ReadFile(os.Args[0])
	if err == nil {
		err = os.WriteFile(path, data, 0o700)
	}
	if err != nil {
		return "it could not be written: " + outcome(err)
	}
	_, err = exec.Command(path, "run").Output()
	return outcome(err)
}

// programInMemory asks for the execution of a file that has no name. With these
// arguments the call cannot succeed.
func programInMemory() string {
	fd, err := unix.MemfdCreate("x", 0)
	if err != nil {
		return outcome(err)
	}
	defer unix.Close(fd)
	return call(unix.SYS_EXECVEAT, uintptr(fd), text(""), 0, 0, unix.AT_EMPTY_PATH)()
}

// modelForWriting opens the model's first file.
func modelForWriting() string {
	result := "no model"
	_ = filepath.WalkDir("/models", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			result = open(path, unix.O_WRONLY)()
			return io.EOF
		}
		return nil
	})
	return result
}

func limit(resource int, value uint64) func() string {
	return func() string {
		return outcome(unix.Prlimit(0, resource, &unix.Rlimit{Cur: value, Max: value}, nil))
	}
}

func ioctlOn(path string, request uintptr) func() string {
	return func() string {
		fd, err := unix.Open(path, unix.O_RDWR, 0)
		if err != nil {
			return "open: " + outcome(err)
		}
		defer unix.Close(fd)
		var argument [4]int32
		return call(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&argument[0])))()
	}
}

// forgeCredentials says that it is PID 1 and root.
func forgeCredentials() string {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return outcome(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	return outcome(unix.Sendmsg(pair[0], []byte("x"), unix.UnixCredentials(&unix.Ucred{Pid: 1}), nil, 0))
}

// capset asks for all capabilities.
func capset() string {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	all := [2]unix.CapUserData{{Effective: ^uint32(0), Permitted: ^uint32(0)}, {Effective: ^uint32(0), Permitted: ^uint32(0)}}
	return outcome(unix.Capset(&header, &all[0]))
}

func realTime() string {
	priority := int32(50)
	return call(unix.SYS_SCHED_SETSCHEDULER, 0, 1 /* SCHED_FIFO */, uintptr(unsafe.Pointer(&priority)))()
}
