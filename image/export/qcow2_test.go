package export

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/image"
	"chrysalis/image/imagetest"
)

// convert has QEMU itself turn a qcow2 image back into a raw one, and returns
// that one's path.
func convert(t *testing.T, path string, size int64) string {
	t.Helper()
	dir := filepath.Dir(path)
	raw := path + ".raw"
	if err := os.WriteFile(raw, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(raw, size); err != nil {
		t.Fatal(err)
	}
	cmd := imagetest.Command(t, dir, "qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio",
		"-blockdev", "qcow2,node-name=from,read-only=on,file.driver=file,file.filename="+path+",file.locking=off",
		"-blockdev", "raw,node-name=to,file.driver=file,file.filename="+raw+",file.locking=off")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(in, `{"execute":"qmp_capabilities"}`)
	fmt.Fprintln(in, `{"execute":"blockdev-backup","arguments":{"job-id":"copy","device":"from","target":"to","sync":"full"}}`)
	var said bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		said.Write(buf[:n])
		if strings.Contains(said.String(), "BLOCK_JOB_COMPLETED") || strings.Contains(said.String(), `"error"`) || err != nil {
			break
		}
	}
	fmt.Fprintln(in, `{"execute":"quit"}`)
	if err := cmd.Wait(); err != nil || strings.Contains(said.String(), `"error"`) {
		t.Fatalf("QEMU: %v: %s %s", err, said.String(), stderr.String())
	}
	return raw
}

// sameFiles compares two files that may be large.
func sameFiles(t *testing.T, a, b string) bool {
	t.Helper()
	sumA, _, err := image.HashFile(a)
	if err != nil {
		t.Fatal(err)
	}
	sumB, _, err := image.HashFile(b)
	if err != nil {
		t.Fatal(err)
	}
	return sumA == sumB
}

// TestQCOW2 converts an export back, and compares.
func TestQCOW2(t *testing.T) {
	raw, qcow2 := artefacts(t), artefacts(t)
	qcow2.Format = QCOW2
	r := export(t, raw)
	export(t, qcow2)
	if !sameFiles(t, convert(t, qcow2.Out, r.Size), raw.Out) {
		t.Error("the qcow2 image holds another disk than the raw one")
	}
	a, err := os.Stat(qcow2.Out)
	if err != nil {
		t.Fatal(err)
	}
	if a.Size() >= r.Size {
		t.Errorf("%d bytes for a disk of %d", a.Size(), r.Size)
	}
}

// TestQCOW2Writer writes here and there, across clusters and L2 tables.
func TestQCOW2Writer(t *testing.T) {
	imagetest.Tools(t)
	const size = 600<<20 + 512 // more than the 512 MiB of one L2 table
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	q := newQCOW2(f)
	type write struct {
		at   int64
		data []byte
	}
	var writes []write
	random := rand.New(rand.NewPCG(1, 2))
	for _, at := range []int64{0, 100, 65535, 200 << 10, 512<<20 - 5, 550 << 20, size - 40} {
		data := make([]byte, 40+random.IntN(100000))
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		data = data[:min(int64(len(data)), size-at)]
		writes = append(writes, write{at, data})
	}
	// Zeros over what is there must not be left out.
	writes = append(writes, write{70000, make([]byte, 1000)}, write{300 << 20, make([]byte, 1<<20)})
	want, err := os.Create(path + ".want")
	if err == nil {
		defer want.Close()
		err = want.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range writes {
		if n, err := q.WriteAt(w.data, w.at); n != len(w.data) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		if _, err := want.WriteAt(w.data, w.at); err != nil {
			t.Fatal(err)
		}
	}
	end, err := q.finish(size)
	if err == nil {
		err = f.Truncate(end)
	}
	if err != nil {
		t.Fatal(err)
	}
	if end > 2<<20 {
		t.Errorf("an image of %d bytes", end)
	}
	if !sameFiles(t, convert(t, path, size), want.Name()) {
		t.Error("QEMU reads another disk")
	}
}
