//go:build bench

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
)

// The bench image measures how long the engine takes to be ready. The first model's
// revision says what else: with "read" its disk is read before, raw and through
// dm-verity, with several read-ahead sizes; with "cold" it is not read ahead.
func init() {
	at := slices.IndexFunc(phases, func(p phase) bool { return p.name == guest.PhaseEngine })
	phases[at].run = func(a *agent, ctx context.Context) error {
		if err := a.measureDisks(ctx); err != nil {
			return err
		}
		begin := time.Now()
		err := a.startEngine(ctx)
		log.printf("bench engine_ready_ms=%d", time.Since(begin).Milliseconds())
		return err
	}
}

// benchBytes is how much is read each time.
const benchBytes = 16 << 20

func (a *agent) measureDisks(context.Context) error {
	revision := a.manifest.Models[0].Revision
	prefetching = revision != "cold"
	if revision != "read" {
		return nil
	}
	verity := a.devices[1].Path
	raw, err := backing(verity)
	if err != nil {
		return fmt.Errorf("measure the disks: %w", err)
	}
	size, err := deviceSize(verity)
	if err != nil {
		return err
	}
	if size < benchBytes {
		return fmt.Errorf("measure the disks: the model's has %d bytes, expected %d or more", size, benchBytes)
	}
	for _, kib := range []int{128, readaheadKiB, 4 * readaheadKiB} {
		var times [2][]float64
		for range 3 {
			for i, path := range []string{raw, verity} {
				took, err := timeRead(path, kib)
				if err != nil {
					return fmt.Errorf("measure %s: %w", path, err)
				}
				times[i] = append(times[i], took)
			}
		}
		slices.Sort(times[0])
		slices.Sort(times[1])
		log.printf("bench read_ahead_kib=%d raw_mb_s=%.1f verity_mb_s=%.1f", kib, benchBytes/1e6/times[0][1], benchBytes/1e6/times[1][1])
	}
	return nil
}

// backing returns the disk that a verity device's data is on.
func backing(device string) (string, error) {
	at := filepath.Base(device)
	for {
		slaves, err := os.ReadDir(filepath.Join("/sys/block", at, "slaves"))
		if err != nil {
			return "", err
		}
		if len(slaves) == 0 {
			return "/dev/" + at, nil
		}
		// The hash device is the disk itself, the data device a linear one on it.
		at = slaves[0].Name()
	}
}

func deviceSize(path string) (int64, error) {
	data, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "size"))
	if err != nil {
		return 0, err
	}
	sectors, err := strconv.ParseInt(string(bytes.TrimSpace(data)), 10, 64)
	return sectors * 512, err
}

// timeRead reads the start of a device in order, with nothing of it in memory, and
// returns the seconds that it took.
func timeRead(path string, kib int) (float64, error) {
	queue := filepath.Join("/sys/block", filepath.Base(path), "queue/read_ahead_kb")
	if err := os.WriteFile(queue, fmt.Append(nil, kib), 0); err != nil {
		return 0, err
	}
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return 0, err
	}
	begin := time.Now()
	buf := make([]byte, 1<<20)
	for at := int64(1 << 20); at < benchBytes; {
		n, err := f.ReadAt(buf, at)
		if n == 0 {
			return 0, errors.Join(errors.New("short read"), err)
		}
		at += int64(n)
	}
	return time.Since(begin).Seconds(), nil
}
