package verity

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"time"
	"unsafe"

	"github.com/anatol/devmapper.go"
	"golang.org/x/sys/unix"
)

// Params is what the VM must know about a disk before it looks at any. All of
// it comes from the measured manifest. (The number of hash blocks follows from
// DataBlocks.)
type Params struct {
	RootHash   RootHash
	Salt       []byte
	DataBlocks uint64
}

// MaxCandidates is how many disks with the right UUIDs Find tries. A host can
// attach any number of them; this bounds the time it can waste.
const MaxCandidates = 32

// A Device is an active dm-verity device.
type Device struct {
	// Path is the block device node, /dev/dm-N, made by devtmpfs: there is
	// no udev in the VM and so nothing under /dev/mapper.
	Path string

	name   string // of the verity device; the linear one is name + dataSuffix
	linear string
}

// dataSuffix names the linear device that stands for the data partition.
const dataSuffix = "-data"

// Activate maps the verity disk at the block device path as the device-mapper
// device name, read-only. It needs the kernel modules dm-mod and dm-verity,
// devtmpfs on /dev, and CAP_SYS_ADMIN.
//
// The partitions' offsets are read once, from the GPT alone, and go straight
// into the two device-mapper tables; the kernel's own partition scanning is
// not relied on. What the disk holds is not checked here: dm-verity checks
// each block when it is read and fails the read with EIO if it does not match.
// Zero blocks are checked like all others (no ignore_zero_blocks), and no
// panic or restart on corruption is asked for: how the VM ends is the agent's
// decision, see Watch.
//
// The error wraps ErrNotFound or ErrInvalid as FindPartitions does, or is that
// of a system call.
func (p Params) Activate(name, path string) (*Device, error) {
	l, err := p.locate(path)
	if err != nil {
		return nil, fmt.Errorf("activate %s from %s: %w", name, path, err)
	}
	d, err := p.activate(name, l)
	if err != nil {
		return nil, fmt.Errorf("activate %s from %s: %w", name, path, err)
	}
	return d, nil
}

// A location is a disk and where its partitions begin.
type location struct {
	Partitions
	number string // of the whole disk, major:minor
}

func (p Params) locate(path string) (location, error) {
	disk, err := os.Open(path)
	if err != nil {
		return location{}, err
	}
	defer disk.Close()
	number, err := deviceNumber(disk)
	if err != nil {
		return location{}, err
	}
	size, err := disk.Seek(0, io.SeekEnd)
	if err != nil {
		return location{}, fmt.Errorf("size of the disk: %w", err)
	}
	parts, err := FindPartitions(disk, size, p.RootHash, p.DataBlocks)
	return location{parts, number}, err
}

func (p Params) activate(name string, disk location) (_ *Device, err error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	if len(p.Salt) > MaxSalt {
		return nil, fmt.Errorf("%w: salt of %d bytes", ErrInvalid, len(p.Salt))
	}
	length := p.DataBlocks * BlockSize
	linear, err := create(name+dataSuffix, devmapper.LinearTable{
		Length:        length,
		BackendDevice: disk.number,
		BackendOffset: uint64(disk.DataOffset),
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, remove(name+dataSuffix))
		}
	}()
	salt := "-" // verity.rst: a dash stands for no salt
	if len(p.Salt) > 0 {
		salt = hex.EncodeToString(p.Salt)
	}
	node, err := create(name, devmapper.VerityTable{
		Length:        length,
		HashType:      1,
		DataDevice:    linear.number,
		HashDevice:    disk.number,
		DataBlockSize: BlockSize,
		HashBlockSize: BlockSize,
		NumDataBlocks: p.DataBlocks,
		// The block after the superblock's, which is never read.
		HashStartBlock: uint64(disk.HashOffset)/BlockSize + 1,
		Algorithm:      "sha256",
		Digest:         p.RootHash.String(),
		Salt:           salt,
	})
	if err != nil {
		return nil, err
	}
	return &Device{Path: node.path, name: name, linear: name + dataSuffix}, nil
}

// Find activates the first of the candidate block devices that carries the
// disk, and reads its first block to see that the path from there to the root
// hash is good. A candidate with the right UUIDs that fails is closed again
// and the next is tried, up to MaxCandidates of them. A candidate without the
// UUIDs, or whose partition table cannot be read, does not count.
//
// The error wraps ErrNotFound if no candidate carries the UUIDs, ErrCorrupt if
// one does and does not match the root hash, and is otherwise that of a system
// call (device-mapper is not there, say).
func (p Params) Find(name string, candidates []string) (*Device, error) {
	var failed []error
	for _, path := range candidates {
		if len(failed) == MaxCandidates {
			break
		}
		disk, err := p.locate(path)
		if errors.Is(err, ErrInvalid) {
			failed = append(failed, fmt.Errorf("%s: %w: %w", path, ErrCorrupt, err))
		}
		if err != nil {
			continue
		}
		d, err := p.activate(name, disk)
		if err == nil {
			if err = d.readFirst(); err == nil {
				return d, nil
			}
			err = errors.Join(fmt.Errorf("%w: %w", ErrCorrupt, err), d.Close())
		}
		failed = append(failed, fmt.Errorf("%s: %w", path, err))
	}
	if len(failed) == 0 {
		return nil, fmt.Errorf("find disk %s for %s among %d: %w", p.RootHash, name, len(candidates), ErrNotFound)
	}
	return nil, fmt.Errorf("find disk %s for %s: %w", p.RootHash, name, errors.Join(failed...))
}

func (d *Device) readFirst() error {
	f, err := os.Open(d.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	return readFull(f, make([]byte, BlockSize), 0)
}

// Corrupted reports whether the kernel has met a block that does not match
// since the device was made. Blocks that were never read have not been
// checked.
func (d *Device) Corrupted() (bool, error) {
	status, err := tableStatus(d.name)
	if err != nil {
		return false, fmt.Errorf("status of %s: %w", d.name, err)
	}
	bad, err := parseStatus(status)
	if err != nil {
		return false, fmt.Errorf("status of %s: %w", d.name, err)
	}
	return bad, nil
}

// Close removes the device. It must not be mounted or open; the kernel then
// refuses with EBUSY.
func (d *Device) Close() error {
	if err := remove(d.name); err != nil {
		return err
	}
	return remove(d.linear)
}

// watchTick is how often Watch asks without being told to. dm-verity's uevent
// is only sent for the first hundred bad blocks, and a full socket buffer
// loses it.
const watchTick = 5 * time.Second

// Watch waits until the kernel has met a corrupt block on one of the devices, and
// returns that device. It returns ctx.Err() when ctx ends first, and another error
// if it can no longer tell.
//
// The kernel's uevents only wake it up; the tables' status decides. So nothing
// in a uevent is trusted, and a lost one costs at most a few seconds.
func Watch(ctx context.Context, devices []*Device) (*Device, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("watch disks: uevent socket: %w", err)
	}
	// os.File puts the socket on the runtime's poller, for deadlines.
	events := os.NewFile(uintptr(fd), "uevent")
	defer events.Close()
	const kernelGroup = 1
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		return nil, fmt.Errorf("watch disks: bind uevent socket: %w", err)
	}
	defer context.AfterFunc(ctx, func() { events.Close() })()

	buf := make([]byte, 8192) // the kernel's UEVENT_BUFFER_SIZE is 2048
	for {
		for _, d := range devices {
			bad, err := d.Corrupted()
			if err != nil {
				return nil, fmt.Errorf("watch disks: %w", err)
			}
			if bad {
				return d, nil
			}
		}
		deadline := time.Now().Add(watchTick)
		for {
			if err := events.SetReadDeadline(deadline); err != nil && ctx.Err() == nil {
				return nil, fmt.Errorf("watch disks: %w", err)
			}
			n, err := events.Read(buf)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, unix.ENOBUFS) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("watch disks: read uevent: %w", err)
			}
			// DM_VERITY_ENV_VAR_NAME, drivers/md/dm-verity-target.c
			if bytes.Contains(buf[:n], []byte("\x00DM_VERITY_ERR_BLOCK_NR=")) {
				break
			}
		}
	}
}

// checkName allows what fits a device-mapper name (128 bytes with its NUL and
// dataSuffix) and needs no escaping; devmapper.go would cut a longer one.
func checkName(name string) error {
	ok := len(name) > 0 && len(name) <= 64
	for _, c := range []byte(name) {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}
	if !ok {
		return fmt.Errorf("device name %q: want 1 to 64 letters, digits, - or _", name)
	}
	return nil
}

// deviceNumber returns "major:minor" of an open block device. The tables name
// devices so and not by path: a path could by then lead elsewhere.
func deviceNumber(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", errors.New("not a block device")
	}
	return formatDev(st.Rdev), nil
}

func formatDev(dev uint64) string {
	return strconv.FormatUint(uint64(unix.Major(dev)), 10) + ":" + strconv.FormatUint(uint64(unix.Minor(dev)), 10)
}

type mapped struct {
	path   string // /dev/dm-N
	number string // major:minor
}

// create makes a read-only device with one target. Nothing is left of it if
// any step fails.
func create(name string, table devmapper.Table) (_ mapped, err error) {
	if err := devmapper.Create(name, ""); err != nil {
		return mapped{}, fmt.Errorf("create device %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, remove(name))
		}
	}()
	if err := devmapper.Load(name, devmapper.ReadOnlyFlag, table); err != nil {
		return mapped{}, fmt.Errorf("load table of %s: %w", name, err)
	}
	if err := devmapper.Resume(name); err != nil {
		return mapped{}, fmt.Errorf("resume %s: %w", name, err)
	}
	info, err := devmapper.InfoByName(name)
	if err != nil {
		return mapped{}, fmt.Errorf("look up %s: %w", name, err)
	}
	m := mapped{
		path:   "/dev/dm-" + strconv.FormatUint(uint64(unix.Minor(info.DevNo)), 10),
		number: formatDev(info.DevNo),
	}
	var st unix.Stat_t
	if err := unix.Stat(m.path, &st); err != nil {
		return mapped{}, fmt.Errorf("node of %s: %s: %w", name, m.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || formatDev(st.Rdev) != m.number {
		return mapped{}, fmt.Errorf("node of %s: %s is not block device %s", name, m.path, m.number)
	}
	return m, nil
}

// remove removes a device. A file just closed can keep it busy for a moment.
func remove(name string) error {
	var err error
	for range 20 {
		if err = devmapper.Remove(name); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}

// tableStatus returns the result of DM_TABLE_STATUS, which devmapper.go lacks:
// a struct dm_ioctl followed by what it points to (linux/dm-ioctl.h).
func tableStatus(name string) ([]byte, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	buf := make([]byte, 4096)
	head := (*unix.DmIoctl)(unsafe.Pointer(&buf[0]))
	head.Version = [3]uint32{4, 0, 0}
	head.Data_size = uint32(len(buf))
	head.Data_start = unix.SizeofDmIoctl
	head.Flags = unix.DM_NOFLUSH_FLAG
	copy(head.Name[:], name)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), unix.DM_TABLE_STATUS, uintptr(unsafe.Pointer(&buf[0])))
	runtime.KeepAlive(control)
	if errno != 0 {
		return nil, os.NewSyscallError("DM_TABLE_STATUS", errno)
	}
	return buf, nil
}

// parseStatus reads the status of a device with one verity target: its first
// word is V while all blocks read were good, and C once one was not
// (verity.rst, "Status").
func parseStatus(b []byte) (corrupted bool, err error) {
	const head, spec = unix.SizeofDmIoctl, unix.SizeofDmTargetSpec
	if len(b) < head+spec {
		return false, fmt.Errorf("%d bytes of status", len(b))
	}
	start := binary.NativeEndian.Uint32(b[16:]) // dm_ioctl.data_start
	count := binary.NativeEndian.Uint32(b[20:]) // dm_ioctl.target_count
	flags := binary.NativeEndian.Uint32(b[28:]) // dm_ioctl.flags
	if flags&unix.DM_BUFFER_FULL_FLAG != 0 || count != 1 || start < head || int64(start) > int64(len(b)-spec) {
		return false, fmt.Errorf("%d targets at byte %d, flags %#x", count, start, flags)
	}
	target, text := b[start:][:spec], b[start+spec:]
	// dm_target_spec.target_type, 16 bytes with its NUL
	if kind, _, _ := bytes.Cut(target[24:], []byte{0}); string(kind) != "verity" {
		return false, errors.New("not a verity target")
	}
	end := bytes.IndexByte(text, 0)
	if end < 0 {
		return false, errors.New("status without an end")
	}
	// Newer kernels append fields about error correction.
	word, _, _ := bytes.Cut(text[:end], []byte(" "))
	switch string(word) {
	case "V":
		return false, nil
	case "C":
		return true, nil
	}
	return false, fmt.Errorf("unknown status %q", text[:end])
}
