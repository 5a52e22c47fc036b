package main

import (
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// landlockVersion is the version of the kernel's Landlock that the rules below
// were written for: the first that keeps abstract unix sockets and signals inside
// (landlock(7), "Versions"). An older one would leave rules out in silence.
const landlockVersion = 6

const (
	landlockRead  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	landlockWrite = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	// What else can be made has to be known to somebody else to be of use, and
	// devices to nobody.
	landlockMake = unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_MAKE_SYM |
		unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_FIFO
	landlockMove = unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REFER

	// All that version 6 knows of files. What no rule allows is refused.
	landlockFiles = landlockRead | landlockWrite | landlockMake | landlockMove |
		unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK |
		unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	landlockScopes = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
)

// A landlockRule allows something below a path, or on the file that it names.
type landlockRule struct {
	path   string
	access uint64
}

// landlockRules is what the engine may do with files, as it sees them. Mounts and
// permissions say much the same; this holds where one of them is got around. It
// also says what they cannot: in the door the engine makes its socket and nothing
// else.
var landlockRules = []landlockRule{
	{"/", unix.LANDLOCK_ACCESS_FS_READ_DIR},
	{"/models", landlockRead},
	// Only what was mounted there, one by one. A GPU is spoken to by ioctl.
	{"/dev", unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	{"/run/engine", unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE},
	{"/tmp", landlockRead | landlockWrite | landlockMake | landlockMove},
}

// notPrograms are the folders of the engine's root that are not the engine disk's
// own, and those that have no place in it.
var notPrograms = map[string]bool{"dev": true, "models": true, "proc": true, "run": true, "sys": true, "tmp": true}

// restrictFiles puts the rules on this thread, for the rest of its life and of
// what it executes. The engine's root is the root by now.
func restrictFiles() error {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return fmt.Errorf("ask for the kernel's version of landlock: %w", errno)
	}
	if version < landlockVersion {
		return fmt.Errorf("the kernel has version %d of landlock, expected at least %d", version, landlockVersion)
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: landlockFiles, Scoped: landlockScopes}
	// Up to Scoped: what comes after it belongs to later versions.
	ruleset, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Offsetof(attr.Quiet_access_fs), 0)
	if errno != 0 {
		return fmt.Errorf("make a landlock ruleset: %w", errno)
	}
	defer unix.Close(int(ruleset))
	rules := landlockRules
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		// What a link names is in one of the other folders.
		if notPrograms[e.Name()] || e.Type()&os.ModeSymlink != 0 {
			continue
		}
		access := uint64(landlockRead | unix.LANDLOCK_ACCESS_FS_EXECUTE)
		if !e.IsDir() {
			access &^= unix.LANDLOCK_ACCESS_FS_READ_DIR
		}
		rules = append(rules, landlockRule{filepath.Join("/", e.Name()), access})
	}
	for _, rule := range rules {
		if err := addLandlockRule(int(ruleset), rule); err != nil {
			return fmt.Errorf("allow %s with landlock: %w", rule.path, err)
		}
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0); errno != 0 {
		return fmt.Errorf("restrict the engine with landlock: %w", errno)
	}
	// Read back, by doing what no rule allows and nothing else forbids yet.
	if _, err := os.Create("/run/engine/forbidden"); err == nil {
		return fmt.Errorf("landlock does not restrict the engine")
	}
	return nil
}

func addLandlockRule(ruleset int, rule landlockRule) error {
	fd, err := unix.Open(rule.path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	attr := unix.LandlockPathBeneathAttr{Allowed_access: rule.access, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&attr)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
