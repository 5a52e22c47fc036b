package models

import (
	"fmt"
	"io/fs"
	"syscall"
)

// inode returns what the kernel knows of a file beside size and time: its number,
// and the time of the last change, which no program can set.
func inode(i fs.FileInfo) string {
	st, ok := i.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf(" %d %d %d.%d", st.Dev, st.Ino, st.Ctim.Sec, st.Ctim.Nsec)
}
