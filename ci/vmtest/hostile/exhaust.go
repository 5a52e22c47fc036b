package main

import (
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// exhaustions use up something of the VM, for as long as attackTime, and say how
// far they came. Some end this process before it can.
var exhaustions = map[string]func() string{
	"processes":         forkBomb,
	"processor":         spin,
	"memory":            func() string { return alone(hogMemory) },
	"memory in a file":  func() string { return alone(hogFile) },
	"/tmp":              fillTmp,
	"the door":          fillDoor,
	"descriptors":       func() string { return many(hogDescriptors) },
	"pipes":             func() string { return many(hogPipes) },
	"unix sockets":      func() string { return many(hogSockets) },
	"inotify":           func() string { return many(hogInotify) },
	"epoll and timers":  func() string { return many(hogEpoll) },
	"mappings":          func() string { return alone(hogMappings) },
	"names":             func() string { return alone(missNames) },
	"its own log":       floodLog,
	"reads of its disk": func() string { return alone(rereadDisk) },
}

const attackTime = 3 * time.Second

// fork makes a process that runs f, which must not return. The child has one
// thread of a Go program, so f is restricted to raw system calls.
func fork(f func()) bool {
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return false
	}
	if pid == 0 {
		f()
	}
	return true
}

// reapAll kills every process but this one, which is the first of its namespace,
// until there is no other, and returns how many there were.
func reapAll() int {
	n := 0
	for {
		_ = unix.Kill(-1, unix.SIGKILL)
		pid, err := unix.Wait4(-1, nil, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil || pid <= 0:
			return n
		default:
			n++
		}
	}
}

func wait() {
	pause := unix.Timespec{Sec: 1}
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, addressOf(&pause), 0, 0)
	}
}

// alone runs f in one process, many in 16, for as long as attackTime.
func alone(f func()) string { return children(1, f) }
func many(f func()) string  { return children(16, f) }

func children(n int, f func()) string {
	made := 0
	for range n {
		if fork(f) {
			made++
		}
	}
	time.Sleep(attackTime)
	return fmt.Sprintf("%d of %d processes were made, %d were there at the end", made, n, reapAll())
}

func forkBomb() string {
	fork(func() {
		pause := unix.Timespec{Nsec: 1e6}
		for { // each that it makes goes on here, too
			if _, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0); errno != 0 {
				_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, addressOf(&pause), 0, 0)
			}
		}
	})
	time.Sleep(attackTime)
	return fmt.Sprintf("%d processes", reapAll())
}

func spin() string {
	// Each takes the time of the one that makes them.
	for range 24 {
		fork(func() {
			for {
				_, _, _ = unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
			}
		})
	}
	time.Sleep(attackTime)
	return fmt.Sprintf("%d processes", reapAll())
}

// hogMemory takes memory until there is none.
func hogMemory() {
	const piece = 16 << 20
	for {
		at, _, errno := unix.RawSyscall6(unix.SYS_MMAP, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE, ^uintptr(0), 0)
		if errno != 0 || at == 0 {
			wait()
		}
	}
}

var zeroes [64 << 10]byte

func hogFile() {
	fd, _, errno := unix.RawSyscall(unix.SYS_MEMFD_CREATE, addressOf(&emptyName), 0, 0)
	for errno == 0 {
		_, _, errno = unix.RawSyscall(unix.SYS_WRITE, fd, addressOf(&zeroes), uintptr(len(zeroes)))
	}
	wait()
}

var emptyName [1]byte

func hogDescriptors() {
	for {
		if _, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM, 0); errno != 0 {
			wait()
		}
	}
}

func hogPipes() {
	var pair [2]int32
	for {
		if _, _, errno := unix.RawSyscall(unix.SYS_PIPE2, addressOf(&pair), unix.O_NONBLOCK, 0); errno != 0 {
			wait()
		}
		for {
			if _, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(pair[1]), addressOf(&zeroes), uintptr(len(zeroes))); errno != 0 {
				break
			}
		}
	}
}

func hogSockets() {
	var pair [2]int32
	for {
		if _, _, errno := unix.RawSyscall6(unix.SYS_SOCKETPAIR, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0, addressOf(&pair), 0, 0); errno != 0 {
			wait()
		}
		for {
			if _, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(pair[1]), addressOf(&zeroes), uintptr(len(zeroes))); errno != 0 {
				break
			}
		}
	}
}

var tmpName = [...]byte{'/', 't', 'm', 'p', 0}

func hogInotify() {
	for {
		fd, _, errno := unix.RawSyscall(unix.SYS_INOTIFY_INIT1, 0, 0, 0)
		if errno != 0 {
			wait()
		}
		_, _, _ = unix.RawSyscall(unix.SYS_INOTIFY_ADD_WATCH, fd, addressOf(&tmpName), unix.IN_ALL_EVENTS)
	}
}

// hogEpoll has timers that fire all the time, and waits for them in many ways.
func hogEpoll() {
	var timers [64]uintptr
	often := unix.ItimerSpec{Interval: unix.Timespec{Nsec: 1000}, Value: unix.Timespec{Nsec: 1000}}
	for i := range timers {
		fd, _, errno := unix.RawSyscall(unix.SYS_TIMERFD_CREATE, unix.CLOCK_MONOTONIC, 0, 0)
		if errno != 0 {
			wait()
		}
		timers[i] = fd
		_, _, _ = unix.RawSyscall6(unix.SYS_TIMERFD_SETTIME, fd, 0, addressOf(&often), 0, 0, 0)
	}
	event := unix.EpollEvent{Events: unix.EPOLLIN}
	for {
		fd, _, errno := unix.RawSyscall(unix.SYS_EPOLL_CREATE1, 0, 0, 0)
		if errno != 0 {
			wait()
		}
		for _, timer := range timers {
			_, _, _ = unix.RawSyscall6(unix.SYS_EPOLL_CTL, fd, unix.EPOLL_CTL_ADD, timer, addressOf(&event), 0, 0)
		}
	}
}

func hogMappings() {
	protection := uintptr(unix.PROT_READ)
	for {
		// Neighbours with the same protection would become one.
		protection ^= unix.PROT_WRITE
		if _, _, errno := unix.RawSyscall6(unix.SYS_MMAP, 0, 4096, protection, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE, ^uintptr(0), 0); errno != 0 {
			wait()
		}
	}
}

// missNames looks for files that are not there, which the kernel remembers.
func missNames() {
	name := [...]byte{'/', 't', 'm', 'p', '/', '0', '0', '0', '0', '0', '0', '0', 0}
	for {
		for i := len(name) - 2; i > 4; i-- {
			if name[i]++; name[i] <= '9' {
				break
			}
			name[i] = '0'
		}
		_, _, _ = unix.RawSyscall(unix.SYS_ACCESS, addressOf(&name), 0, 0)
	}
}

// rereadDisk has the kernel forget its own program and read it again.
func rereadDisk() {
	fd, _, errno := unix.RawSyscall(unix.SYS_OPEN, programName, unix.O_RDONLY, 0)
	for errno == 0 {
		_, _, _ = unix.RawSyscall6(unix.SYS_FADVISE64, fd, 0, 0, unix.FADV_DONTNEED, 0, 0)
		var n uintptr
		for offset := uintptr(0); ; offset += n {
			if n, _, errno = unix.RawSyscall6(unix.SYS_PREAD64, fd, addressOf(&zeroes), uintptr(len(zeroes)), offset, 0, 0); errno != 0 || n == 0 {
				break
			}
		}
	}
	wait()
}

var programName = text(os.Args[0])

// fillTmp fills /tmp with bytes, then with names, and leaves nothing there.
func fillTmp() string {
	defer os.Remove("/tmp/full")
	f, err := os.Create("/tmp/full")
	if err != nil {
		return outcome(err)
	}
	defer f.Close()
	written := 0
	for err == nil {
		var n int
		n, err = f.Write(zeroes[:])
		written += n
	}
	bytes := fmt.Sprintf("%d MiB, then %s", written>>20, outcome(err))
	f.Truncate(0)
	names, err := 0, error(nil)
	for ; err == nil; names++ {
		err = os.WriteFile(fmt.Sprintf("/tmp/name-%d", names), nil, 0o600)
	}
	for i := range names {
		os.Remove(fmt.Sprintf("/tmp/name-%d", i))
	}
	return fmt.Sprintf("%s; %d names, then %s", bytes, names-1, outcome(err))
}

// fillDoor fills the door with sockets.
func fillDoor() string {
	n := 0
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return outcome(err)
		}
		path := fmt.Sprintf("/run/engine/%d", n)
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: path})
		unix.Close(fd)
		if err != nil {
			for i := range n {
				os.Remove(fmt.Sprintf("/run/engine/%d", i))
			}
			return fmt.Sprintf("%d sockets, then %s", n, outcome(err))
		}
		n++
	}
}

// floodLog writes to its log as fast as it can.
func floodLog() string {
	written := 0
	for end := time.Now().Add(attackTime); time.Now().Before(end); runtime.Gosched() {
		n, err := os.Stdout.Write(zeroes[:])
		if err != nil {
			return outcome(err)
		}
		written += n
	}
	return fmt.Sprintf("%d KiB", written>>10)
}

func addressOf[T any](p *T) uintptr { return uintptr(unsafe.Pointer(p)) }
