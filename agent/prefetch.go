package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
)

const (
	// readaheadKiB is how far the kernel reads ahead of a sequential reader of a
	// verity device. docs/performance.md has the measurement.
	readaheadKiB = 4096
	// prefetchPiece is what one reader of several takes at a time, in bytes.
	prefetchPiece = 16 << 20
)

// prefetching can be turned off in the bench image, to measure what it is worth.
var prefetching = true

// prefetch reads the weights into the page cache while the engines start, as far
// as there is memory for them. An engine maps the same files of the same mount,
// so there is one copy; it is the agent's, not the engine's, in the cgroups' sense.
// A block that does not match ends the VM before a client has had an answer.
func (a *agent) prefetch(ctx context.Context) {
	for _, d := range a.devices {
		path := filepath.Join("/sys/block", filepath.Base(d.Path), "queue/read_ahead_kb")
		if err := os.WriteFile(path, fmt.Append(nil, readaheadKiB), 0); err != nil {
			log.printf("read ahead on %s: %v", d.Path, err)
		}
	}
	if !prefetching {
		return
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		log.printf("prefetch: %v", err)
		return
	}
	// The engines need memory beside the weights; what is read beyond what there is
	// would push out what was read first.
	left := int64(uint64(info.Freeram)*uint64(info.Unit)) - agentReserve - int64(a.profile.Needs.MemoryMiB)<<20
	go a.guard(func() {
		for _, m := range a.models {
			for _, f := range m.card.Files {
				size := min(f.Size, left)
				if size <= 0 {
					return
				}
				left -= size
				if err := readAhead(ctx, filepath.Join(m.path, f.Path), size); err != nil {
					if ctx.Err() == nil && a.diskCorrupt() {
						a.end(because(guest.ReasonDiskCorrupt, err))
					}
					log.printf("prefetch: %v", err)
					return
				}
			}
		}
	})
}

// readAhead reads a file's first size bytes, with a reader for each of a few
// processors: dm-verity hashes what one reader waits for on one of them.
func readAhead(ctx context.Context, path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	var (
		readers sync.WaitGroup
		mu      sync.Mutex
		next    int64
		failed  error
	)
	for range min(runtime.NumCPU(), 8) {
		readers.Go(func() {
			buf := make([]byte, 256<<10) // stays in the processor's cache
			for {
				mu.Lock()
				at := next
				next += prefetchPiece
				stop := failed != nil || ctx.Err() != nil || at >= size
				mu.Unlock()
				if stop {
					return
				}
				for end := min(at+prefetchPiece, size); at < end; {
					n, err := f.ReadAt(buf[:min(int64(len(buf)), end-at)], at)
					at += int64(n)
					if err == io.EOF {
						return // shorter than its card says: the engine will find out
					}
					if err != nil {
						mu.Lock()
						failed = errors.Join(failed, err)
						mu.Unlock()
						return
					}
				}
			}
		})
	}
	readers.Wait()
	return failed
}
