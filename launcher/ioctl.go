package launcher

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// vhostVsockSetGuestCID is VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h:
// _IOW(VHOST_VIRTIO 0xaf, 0x60, __u64).
const vhostVsockSetGuestCID = 1<<30 | 8<<16 | 0xaf<<8 | 0x60

func ioctlPointer(fd int, request uint, value *uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(value)))
	if errno != 0 {
		return errno
	}
	return nil
}
