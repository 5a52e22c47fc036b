package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"chrysalis/models"
)

const (
	// layers is how many layers the demo model gets for reading it to take a while.
	layers = 200
	// diskRate is how fast QEMU lets the VM read its disks, in bytes a second: slow
	// enough for the disk to be what is waited for, whatever the host has in memory
	// and however its processors are shared.
	diskRate = 16e6
)

// prefetch boots the bench image with a larger model, whose agent measures reading
// its disk, and compares how long the engine takes to its first answer with and
// without prefetch, in turn. See agent/bench_disks.go for the revisions.
func (h host) prefetch() error {
	demo, err := os.ReadFile("models/demo/demo.gguf")
	if err != nil {
		return err
	}
	grown, err := grow(demo, layers)
	if err != nil {
		return fmt.Errorf("grow the demo model: %w", err)
	}
	src := filepath.Join(h.state, "grown.gguf")
	if err := os.WriteFile(src, grown, 0o644); err != nil {
		return err
	}
	disks := map[string]string{}
	for _, revision := range []string{"read", "cold", "warm"} {
		disks[revision] = filepath.Join(h.state, revision+".disk")
		if _, err := models.Pack(context.Background(), src, models.PackOptions{Name: "chrysalis/grown", Revision: revision, Out: disks[revision]}); err != nil {
			return err
		}
	}
	console, err := h.prefetchBoot(disks["read"])
	if err != nil {
		return err
	}
	for _, m := range regexp.MustCompile(`bench read_ahead_kib=(\d+) raw_mb_s=([0-9.]+) verity_mb_s=([0-9.]+)`).FindAllStringSubmatch(console, -1) {
		raw, _ := strconv.ParseFloat(m[2], 64)
		verity, _ := strconv.ParseFloat(m[3], 64)
		figure(fmt.Sprintf("in the VM, %s, disk of %.0f MB/s: reading in order through dm-verity, read-ahead %s KiB, median of 3", strings.ToUpper(*accel), diskRate/1e6, m[1]), "MB/s", verity)
		figure("the same, in times of the raw disk", "", verity/raw)
	}
	ready := map[string][]float64{}
	for range 3 {
		for _, revision := range []string{"cold", "warm"} {
			console, err := h.prefetchBoot(disks[revision])
			if err != nil {
				return err
			}
			m := regexp.MustCompile(`bench engine_ready_ms=([0-9]+)`).FindStringSubmatch(console)
			if m == nil {
				return errors.New("the bench image did not say when the engine was ready")
			}
			ms, _ := strconv.ParseFloat(m[1], 64)
			ready[revision] = append(ready[revision], ms/1000)
		}
	}
	figure(fmt.Sprintf("engine's start to ready, %d MB of weights on that disk, without prefetch, best of 3", len(grown)/1e6), "s", slices.Min(ready["cold"]))
	figure("the same with prefetch", "s", slices.Min(ready["warm"]))
	figure("reading the weights alone takes at least", "s", float64(len(grown))/diskRate)
	return nil
}

// prefetchBoot boots the bench image with a model on a slow disk, and returns what
// its console had when it was ready.
func (h host) prefetchBoot(disk string) (string, error) {
	if _, err := h.run("up", "grown", "--accel", *accel, "--listen", "127.0.0.1:0", "--timeout", "9m", "--image", "out/chrysalis-bench.efi",
		"--engine", "out/llama.cpp.disk", "--model", disk, "--parameter", "context=256", "--disk-rate", strconv.Itoa(diskRate)); err != nil {
		return "", err
	}
	console, err := h.run("logs", "grown", "--console")
	if err != nil {
		return "", err
	}
	_, err = h.run("down", "grown", "--now")
	return console, err
}

// grow repeats the layers of a GGUF model. What it says is
// nonsense, but an engine loads it as any other.
func grow(src []byte, count int) ([]byte, error) {
	r := &ggufReader{b: src}
	if string(r.take(4)) != "GGUF" || r.u32() != 3 {
		return nil, errors.New("not GGUF 3")
	}
	tensors, keys := r.u64(), r.u64()
	var head bytes.Buffer
	old := 0
	for range keys {
		from := r.at
		key := r.str()
		typ := r.u32()
		value := r.at
		r.skip(typ)
		kv := slices.Clone(src[from:r.at])
		if strings.HasSuffix(key, ".block_count") {
			old = int(binary.LittleEndian.Uint32(src[value:]))
			binary.LittleEndian.PutUint32(kv[value-from:], uint32(count))
		}
		head.Write(kv)
	}
	type tensor struct {
		name string
		info []byte // dimensions and type
		data []byte
		at   uint64
		size int
	}
	var list []tensor
	for range tensors {
		t := tensor{name: r.str()}
		from := r.at
		elements := 1
		for range r.u32() {
			elements *= int(r.u64())
		}
		switch r.u32() {
		case 0:
			t.size = 4 * elements
		case 1:
			t.size = 2 * elements
		case 8:
			t.size = elements / 32 * 34
		default:
			return nil, fmt.Errorf("tensor %s is neither F32, F16 nor Q8_0", t.name)
		}
		t.info = src[from:r.at]
		t.at = r.u64()
		list = append(list, t)
	}
	data := (r.at + 31) / 32 * 32
	var out []tensor
	for _, t := range list {
		t.data = src[data+int(t.at):][:t.size]
		if !strings.HasPrefix(t.name, "blk.") {
			out = append(out, t)
		}
	}
	for i := range count {
		for _, t := range list {
			if rest, ok := strings.CutPrefix(t.name, fmt.Sprintf("blk.%d.", i%old)); ok {
				t.data = src[data+int(t.at):][:t.size]
				t.name = fmt.Sprintf("blk.%d.%s", i, rest)
				out = append(out, t)
			}
		}
	}
	var b bytes.Buffer
	b.WriteString("GGUF")
	put := func(v any) { binary.Write(&b, binary.LittleEndian, v) }
	put(uint32(3))
	put(uint64(len(out)))
	put(keys)
	b.Write(head.Bytes())
	at := uint64(0)
	for _, t := range out {
		put(uint64(len(t.name)))
		b.WriteString(t.name)
		b.Write(t.info)
		put(at)
		at += uint64(t.size+31) / 32 * 32
	}
	pad := func() { b.Write(make([]byte, (32-b.Len()%32)%32)) }
	pad()
	for _, t := range out {
		b.Write(t.data)
		pad()
	}
	return b.Bytes(), nil
}

// ggufReader reads the demo model's header, which is ours.
type ggufReader struct {
	b  []byte
	at int
}

func (r *ggufReader) take(n int) []byte {
	r.at += n
	return r.b[r.at-n : r.at]
}
func (r *ggufReader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *ggufReader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }
func (r *ggufReader) str() string { return string(r.take(int(r.u64()))) }

// skip passes over a value of a type.
func (r *ggufReader) skip(typ uint32) {
	sizes := map[uint32]int{0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
	switch typ {
	case 8:
		r.str()
	case 9:
		element, n := r.u32(), r.u64()
		for range n {
			r.skip(element)
		}
	default:
		r.take(sizes[typ])
	}
}
