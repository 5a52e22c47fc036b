package inspect

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"unicode/utf8"
)

const (
	// maxExplained is the largest content, in bytes, that is looked into. Of
	// longer ones only the first byte that differs is named.
	maxExplained = 32 << 20
	// maxShown is how much of a line or value is shown, in bytes.
	maxShown = 160
)

func bytesContent(b []byte) *content {
	return &content{int64(len(b)), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }}
}

// firstDifference returns the first byte at which two contents differ, which is
// the end of the shorter one if that is how the other begins, or -1.
func firstDifference(ctx context.Context, a, b *content) (int64, error) {
	x, err := a.open()
	if err != nil {
		return 0, err
	}
	defer x.Close()
	y, err := b.open()
	if err != nil {
		return 0, err
	}
	defer y.Close()
	p, q := make([]byte, 128<<10), make([]byte, 128<<10)
	for at := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := io.ReadFull(x, p[:min(int64(len(p)), a.size-at)])
		if err != nil {
			return 0, fmt.Errorf("read byte %d: %w", at+int64(n), err)
		}
		m, err := io.ReadFull(y, q[:min(int64(len(q)), b.size-at)])
		if err != nil {
			return 0, fmt.Errorf("read byte %d: %w", at+int64(m), err)
		}
		if both := min(n, m); !bytes.Equal(p[:both], q[:both]) {
			return at + int64(firstByte(p[:both], q[:both])), nil
		} else if n != m {
			return at + int64(both), nil
		}
		if n == 0 {
			return -1, nil
		}
		at += int64(n)
	}
}

// firstByte is the index of the first byte that differs, which is the shorter
// one's length if that is how the other begins.
func firstByte(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// content finds why two contents differ, if they do.
func (f finder) content(a, b *content) error {
	at, err := firstDifference(f.ctx, a, b)
	if err != nil || at < 0 {
		return err
	}
	if a.size > maxExplained || b.size > maxExplained {
		return f.bytes(a, b, at)
	}
	x, err := a.bytes(maxExplained)
	if err != nil {
		return err
	}
	y, err := b.bytes(maxExplained)
	if err != nil {
		return err
	}
	// A malformed file is no error here: then it is just bytes.
	f = f.in("")
	for _, explain := range []func(x, y []byte) error{f.elf, f.pe, f.json, f.text} {
		if err := explain(x, y); err != nil {
			return err
		}
		if !f.none() {
			return nil
		}
	}
	return f.bytes(a, b, at)
}

// bytes reports the difference at a byte.
func (f finder) bytes(a, b *content, at int64) error {
	show := func(c *content) string {
		if at >= c.size {
			return fmt.Sprintf("the end of %d bytes", c.size)
		}
		r, err := c.open()
		if err != nil {
			return err.Error()
		}
		defer r.Close()
		if _, err := io.CopyN(io.Discard, r, at); err != nil {
			return err.Error()
		}
		p := make([]byte, min(8, c.size-at))
		if _, err := io.ReadFull(r, p); err != nil {
			return err.Error()
		}
		return fmt.Sprintf("%x", p)
	}
	return f.differ(fmt.Sprintf("byte %d", at), show(a), show(b))
}

// moduleSignature ends a signed kernel module: scripts/sign-file.c.
const moduleSignature = "~Module signature appended~\n"

func (f finder) elf(x, y []byte) error {
	var a, b *elf.File
	err := guard("ELF", func() (err error) {
		if a, err = elf.NewFile(bytes.NewReader(x)); err == nil {
			b, err = elf.NewFile(bytes.NewReader(y))
		}
		return err
	})
	if err != nil {
		return nil
	}
	f = f.in("") // what is found from here on
	if err := f.goBuild(x, y); err != nil || !f.none() {
		return err
	}
	namesA, inA := elfSections(a, x)
	namesB, inB := elfSections(b, y)
	for _, name := range namesA {
		f, p := f.in("ELF section "+plain(name)), inA[name]
		q, ok := inB[name]
		var err error
		if !ok {
			err = f.differ(presence, fmt.Sprintf("%d bytes", len(p)), "")
		} else if !bytes.Equal(p, q) {
			err = f.bytes(bytesContent(p), bytesContent(q), int64(firstByte(p, q)))
		}
		if err != nil {
			return err
		}
	}
	for _, name := range namesB {
		if q, ok := inB[name]; !ok || inA[name] != nil || slices.Contains(namesA, name) {
			continue
		} else if err := f.in("ELF section "+plain(name)).differ(presence, "", fmt.Sprintf("%d bytes", len(q))); err != nil {
			return err
		}
	}
	if !f.none() {
		return nil
	}
	f = f.in("outside of the ELF sections")
	if bytes.HasSuffix(x, []byte(moduleSignature)) && bytes.HasSuffix(y, []byte(moduleSignature)) {
		f = f.in("signature of the kernel module")
	}
	return f.bytes(bytesContent(x), bytesContent(y), int64(firstByte(x, y)))
}

// elfSections returns the sections that have bytes in the file, in order. A name
// that is there again gets a number.
func elfSections(file *elf.File, data []byte) (names []string, content map[string][]byte) {
	content = map[string][]byte{}
	for _, s := range file.Sections {
		size := uint64(len(data))
		if s.Type == elf.SHT_NULL || s.Type == elf.SHT_NOBITS || s.Offset > size || s.FileSize > size-s.Offset {
			continue
		}
		name := s.Name
		for n := 2; ; n++ {
			if _, again := content[name]; !again {
				break
			}
			name = fmt.Sprintf("%s (number %d)", s.Name, n)
		}
		names, content[name] = append(names, name), data[s.Offset:][:s.FileSize:s.FileSize]
	}
	return names, content
}

// goBuild compares what Go programs say of how they were built.
func (f finder) goBuild(x, y []byte) error {
	var a, b *buildinfo.BuildInfo
	err := guard("Go program", func() (err error) {
		if a, err = buildinfo.Read(bytes.NewReader(x)); err == nil {
			b, err = buildinfo.Read(bytes.NewReader(y))
		}
		return err
	})
	if err != nil {
		return nil
	}
	return f.in("Go build information").text([]byte(a.String()), []byte(b.String()))
}

// pe names the section of a PE image, such as a kernel.
func (f finder) pe(x, y []byte) error {
	a, err := ReadPE(bytes.NewReader(x), int64(len(x)))
	if err != nil {
		return nil
	}
	if _, err := ReadPE(bytes.NewReader(y), int64(len(y))); err != nil {
		return nil
	}
	f = f.in("")
	if err := f.same("kernel version", fmt.Sprintf("%q", kernelVersion(x)), fmt.Sprintf("%q", kernelVersion(y))); err != nil || !f.none() {
		return err
	}
	at := int64(firstByte(x, y))
	return f.in(a.region(at)).bytes(bytesContent(x), bytesContent(y), at)
}

// kernelVersion is what a bzImage's setup header points to, or "": the kernel's
// Documentation/arch/x86/boot.rst, kernel_version.
func kernelVersion(b []byte) string {
	if len(b) < 0x210 || string(b[0x202:0x206]) != "HdrS" {
		return ""
	}
	at := 0x200 + int(b[0x20e]) + int(b[0x20f])<<8
	if at == 0x200 || at >= len(b) {
		return ""
	}
	version, _, _ := bytes.Cut(b[at:min(len(b), at+256)], []byte{0})
	return string(version)
}

// json names the values that differ, by their path from the top, "$".
func (f finder) json(x, y []byte) error {
	parse := func(b []byte) (v any, ok bool) {
		// Text that only happens to be JSON, such as a number, is just text.
		if trimmed := bytes.TrimSpace(b); len(b) > 1<<20 || len(trimmed) == 0 || trimmed[0] != '{' && trimmed[0] != '[' {
			return nil, false
		}
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		if d.Decode(&v) != nil {
			return nil, false
		}
		_, err := d.Token()
		return v, err == io.EOF
	}
	a, ok := parse(x)
	if !ok {
		return nil
	}
	b, ok := parse(y)
	if !ok {
		return nil
	}
	return f.value("$", a, b)
}

func (f finder) value(path string, a, b any) error {
	switch a := a.(type) {
	case map[string]any:
		b, ok := b.(map[string]any)
		if !ok {
			break
		}
		keys := maps.Clone(a)
		maps.Copy(keys, b)
		for _, key := range slices.Sorted(maps.Keys(keys)) {
			p, inA := a[key]
			q, inB := b[key]
			path := path + "." + plain(key)
			var err error
			switch {
			case !inB:
				err = f.differ(path, shown(p), "missing")
			case !inA:
				err = f.differ(path, "missing", shown(q))
			default:
				err = f.value(path, p, q)
			}
			if err != nil {
				return err
			}
		}
		return nil
	case []any:
		b, ok := b.([]any)
		if !ok {
			break
		}
		for i := range min(len(a), len(b)) {
			if err := f.value(fmt.Sprintf("%s[%d]", path, i), a[i], b[i]); err != nil {
				return err
			}
		}
		return f.same("length of "+path, strconv.Itoa(len(a)), strconv.Itoa(len(b)))
	}
	return f.same(path, shown(a), shown(b))
}

func shown(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// text names the first line that differs.
func (f finder) text(x, y []byte) error {
	isText := func(b []byte) bool {
		// Builders end some texts with NULs.
		b = bytes.TrimRight(b, "\x00")
		return utf8.Valid(b) && bytes.IndexByte(b, 0) < 0
	}
	if !isText(x) || !isText(y) || bytes.Equal(x, y) {
		return nil
	}
	at := firstByte(x, y)
	start := 1 + bytes.LastIndexByte(x[:at], '\n')
	line := func(b []byte) string {
		if start == len(b) {
			return "behind the end"
		}
		b = b[start:]
		if end := bytes.IndexByte(b, '\n'); end >= 0 {
			b = b[:end+1] // with the line's end, which may be all that differs
		}
		return strconv.Quote(string(b))
	}
	return f.differ(fmt.Sprintf("line %d", 1+bytes.Count(x[:at], []byte("\n"))), line(x), line(y))
}

// excerpts cuts two long texts down to where they begin to differ.
func excerpts(a, b string) (string, string) {
	start := 0
	if at := firstByte([]byte(a), []byte(b)); at > maxShown/2 {
		for start = at - maxShown/4; start > 0 && !utf8.RuneStart(a[start]); start-- {
		}
	}
	cut := func(s string) string {
		if start > 0 {
			s = "…" + s[start:]
		}
		if len(s) > maxShown {
			end := maxShown
			for ; end > 0 && !utf8.RuneStart(s[end]); end-- {
			}
			s = s[:end] + "…"
		}
		return s
	}
	return cut(a), cut(b)
}
