package doctor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"
	"unsafe"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"chrysalis/launcher"
)

// Host is the machine that the program runs on. stateDir is the launcher's.
func Host(stateDir string) System {
	return System{Root: "/", RunsGuest: runsGuest, Images: func() (int, int) { return launcher.KVMVerdicts(stateDir) }, Quotes: quotes, Reach: dial, Free: free, ClockSync: clockSync}
}

// quotes connects to the quote generation service over the kernel's own loopback.
func quotes(ctx context.Context) error {
	// Without the loopback module this hangs.
	failed := make(chan error, 1)
	go func() {
		const local, port = 1, 4050
		c, err := vsock.Dial(local, port, nil)
		if err == nil {
			err = c.Close()
		}
		failed <- err
	}()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return errors.New("no answer")
	}
}

func dial(ctx context.Context, address string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return c.Close()
}

func free(path string) (uint64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, err
	}
	return s.Bavail * uint64(s.Bsize), nil
}

// clockSync asks the kernel whether something disciplines its clock (adjtimex(2)).
func clockSync() (bool, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return false, err
	}
	const timeError = 5 // TIME_ERROR
	return state != timeError && t.Status&unix.STA_UNSYNC == 0, nil
}

// From linux/kvm.h.
const (
	kvmCreateVM            = 0xae01
	kvmGetVCPUMmapSize     = 0xae04
	kvmSetTSSAddr          = 0xae47
	kvmCreateVCPU          = 0xae41
	kvmSetUserMemoryRegion = 0x4020ae46
	kvmRun                 = 0xae80
	kvmGetSregs            = 0x8138ae83
	kvmSetSregs            = 0x4138ae84
	kvmSetRegs             = 0x4090ae82

	kvmExitIO = 2

	sregsSize     = 0x138
	regsSize      = 0x90
	runExitReason = 8 // offset in struct kvm_run
)

// runsGuest runs a few instructions in 64-bit mode under KVM, with a memory, page
// tables and one processor of its own.
func runsGuest() error {
	done := make(chan error, 1)
	go func() {
		// A virtual processor belongs to a thread.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- runGuest()
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(probeTime):
		return errors.New("a guest of a few instructions does not end")
	}
}

func ioctl(fd int, request, argument uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, argument)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

func runGuest() error {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer kvm.Close()
	vm, err := ioctl(int(kvm.Fd()), kvmCreateVM, 0)
	if err != nil {
		return fmt.Errorf("make a VM: %w", err)
	}
	defer unix.Close(vm)
	// Below 4 GiB and away from the guest's memory; Intel needs it.
	_, _ = ioctl(vm, kvmSetTSSAddr, 0xfffbd000)

	const size = 2 << 20
	memory, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(memory)
	const code, pml4, pdpt, pd = 0x1000, 0x2000, 0x3000, 0x4000
	// mov eax, 42; push rax; pop rbx; mov eax, ebx; out 0x10, al; hlt
	copy(memory[code:], []byte{0xb8, 42, 0, 0, 0, 0x50, 0x5b, 0x89, 0xd8, 0xe6, 0x10, 0xf4})
	const present, writable, large = 1, 2, 0x80
	binary.LittleEndian.PutUint64(memory[pml4:], pdpt|present|writable)
	binary.LittleEndian.PutUint64(memory[pdpt:], pd|present|writable)
	binary.LittleEndian.PutUint64(memory[pd:], present|writable|large)
	region := struct {
		Slot, Flags          uint32
		Guest, Size, Address uint64
	}{0, 0, 0, size, uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("give it memory: %w", err)
	}
	vcpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fmt.Errorf("give it a processor: %w", err)
	}
	defer unix.Close(vcpu)
	runSize, err := ioctl(int(kvm.Fd()), kvmGetVCPUMmapSize, 0)
	if err != nil || runSize < 4096 {
		return fmt.Errorf("map its processor: %d bytes: %w", runSize, err)
	}
	run, err := unix.Mmap(vcpu, 0, runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map its processor: %w", err)
	}
	defer unix.Munmap(run)

	var sregs [sregsSize]byte
	if _, err := ioctl(vcpu, kvmGetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("read its registers: %w", err)
	}
	// struct kvm_sregs: eight segments of 24 bytes (base 8, limit 4, selector 2,
	// type, present, dpl, db, s, l, g, avl), two tables of 16, then cr0, cr2, cr3,
	// cr4, cr8, efer of 8 bytes each.
	for segment := range 6 { // cs, ds, es, fs, gs, ss
		s := sregs[24*segment : 24*segment+24]
		clear(s)
		binary.LittleEndian.PutUint32(s[8:], 0xffffffff)
		s[12], s[14], s[15], s[18], s[20] = 0x10, 3, 1, 1, 1 // data: writable, accessed; 4 KiB units
		s[17] = 1
		if segment == 0 {
			s[12], s[14], s[17], s[19] = 0x08, 11, 0, 1 // code: readable, accessed; 64-bit
		}
	}
	const controls = 8*24 + 2*16
	binary.LittleEndian.PutUint64(sregs[controls:], 0x80050033) // cr0: PG, AM, WP, NE, ET, MP, PE
	binary.LittleEndian.PutUint64(sregs[controls+16:], pml4)    // cr3
	binary.LittleEndian.PutUint64(sregs[controls+24:], 0x20)    // cr4: PAE
	binary.LittleEndian.PutUint64(sregs[controls+40:], 0x500)   // efer: LMA, LME
	if _, err := ioctl(vcpu, kvmSetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("set its registers: %w", err)
	}
	// struct kvm_regs: 16 registers, of which the seventh is rsp, then rip, rflags.
	var regs [regsSize]byte
	binary.LittleEndian.PutUint64(regs[6*8:], size)
	binary.LittleEndian.PutUint64(regs[16*8:], code)
	binary.LittleEndian.PutUint64(regs[17*8:], 2)
	if _, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs))); err != nil {
		return fmt.Errorf("set its registers: %w", err)
	}
	for {
		_, err := ioctl(vcpu, kvmRun, 0)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return fmt.Errorf("run it: %w", err)
		}
		break
	}
	if reason := binary.LittleEndian.Uint32(run[runExitReason:]); reason != kvmExitIO {
		return fmt.Errorf("it ended with KVM's exit reason %d", reason)
	}
	return nil
}
