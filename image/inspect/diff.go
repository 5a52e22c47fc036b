package inspect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/verity"
	"chrysalis/verity/gpt"
)

// A Difference is one cause for which two artefacts are not the same.
type Difference struct {
	// Where it is, from the outside in, such as "section .initrd: init".
	Where string `json:"where"`
	// What differs there: "mode", "owner", "time", "line 3" and so on, or
	// "presence", where A and B are a description and "".
	What string `json:"what"`
	A    string `json:"a"`
	B    string `json:"b"`
}

const presence = "presence"

// String tells the difference in one sentence. File names in it are quoted as
// Go quotes them where they are not plain.
func (d Difference) String() string {
	where := ""
	if d.Where != "" {
		where = d.Where + ": "
	}
	switch {
	case d.What != presence:
		return fmt.Sprintf("%s%s is %s in A, %s in B", where, d.What, d.A, d.B)
	case d.B == "":
		return fmt.Sprintf("%sonly A has it, %s", where, d.A)
	default:
		return fmt.Sprintf("%sonly B has it, %s", where, d.B)
	}
}

// Diff compares the artefacts, both UKIs or both disks, at two paths. It returns
// nothing if and only if they are the same, byte for byte, and otherwise the
// first cause for which they are not or, with all, every cause.
//
// A cause is what an unlike builder, input or setting put there. What follows
// from it is not: checksums, addresses, sizes, hash trees, UUIDs made of hashes.
// So causes are looked for in this order, and consequences are named only where
// there is no cause:
//
//   - UKI: PE header, sections, and in the initrd each entry in order of path:
//     type, mode, owner, time, links, device, target, attributes, content.
//   - disk: fields of the GPT, partitions, and on a verity partition each file
//     likewise; then the file system's superblock and layout; then the salt.
//   - content: the ELF section, the JSON value, the line, or the byte.
func Diff(ctx context.Context, a, b string, all bool) ([]Difference, error) {
	// In turn: the first may already not be what it should.
	x, err := open(ctx, a)
	if err != nil {
		return nil, err
	}
	defer x.Close()
	y, err := open(ctx, b)
	if err != nil {
		return nil, err
	}
	defer y.Close()
	if (x.uki == nil) != (y.uki == nil) {
		kinds := map[bool]string{true: "a disk", false: "a UKI"}
		return nil, fmt.Errorf("%s is %s and %s is %s; compare two of a kind", a, kinds[x.uki == nil], b, kinds[y.uki == nil])
	}
	whole := func(f *artefact) *content { return sectionContent(io.NewSectionReader(f, 0, f.size)) }
	at, err := firstDifference(ctx, whole(x), whole(y))
	if err != nil || at < 0 {
		return nil, err
	}
	f := finder{ctx: ctx, all: all, found: new([]Difference), compared: map[[2]*content]bool{}}
	if x.uki != nil {
		err = f.uki(x.uki, y.uki)
	} else {
		err = f.disk(x.disk, y.disk)
	}
	if err == nil && f.none() {
		var region string
		if x.uki != nil {
			region = x.uki.region(at)
		} else {
			region = x.disk.region(at)
		}
		err = f.in(region).bytes(whole(x), whole(y), at)
	}
	if err != nil && !errors.Is(err, errEnough) {
		return nil, fmt.Errorf("compare %s and %s: %w", a, b, err)
	}
	return *f.found, nil
}

// errEnough ends the search.
var errEnough = errors.New("enough")

// A finder collects differences. Its methods return errEnough when one is found
// and only the first is wanted.
type finder struct {
	ctx   context.Context
	all   bool
	found *[]Difference
	// compared are files that need no second look: hard links.
	compared map[[2]*content]bool
	where    string
	from     int // differences found before this place was entered
}

// in is the finder for a place inside of f's or, with "", for f's own, where
// nothing has been found yet.
func (f finder) in(place string) finder {
	if f.where != "" && place != "" {
		place = f.where + ": " + place
	}
	f.where, f.from = cmp.Or(place, f.where), len(*f.found)
	return f
}

// none tells whether nothing has been found in this place.
func (f finder) none() bool { return len(*f.found) == f.from }

func (f finder) differ(what, a, b string) error {
	if what != presence {
		a, b = excerpts(a, b)
	}
	*f.found = append(*f.found, Difference{Where: f.where, What: what, A: a, B: b})
	if !f.all {
		return errEnough
	}
	return f.ctx.Err()
}

// same reports a difference unless a and b are the same.
func (f finder) same(what, a, b string) error {
	if a == b {
		return nil
	}
	return f.differ(what, a, b)
}

// each calls its functions in turn until one fails.
func each(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

func (f finder) uki(a, b *UKI) error {
	header := f.in("PE header")
	for _, field := range peFields {
		if !field.follows {
			if err := header.same(field.name, field.value(a.header), field.value(b.header)); err != nil {
				return err
			}
		}
	}
	pairs, err := f.sections(a.PE, b.PE)
	if err != nil {
		return err
	}
	for _, p := range pairs {
		f := f.in("section " + p.name)
		if err := f.same("characteristics", fmt.Sprintf("%#x", p.a.Characteristics), fmt.Sprintf("%#x", p.b.Characteristics)); err != nil {
			return err
		}
		if p.name == ".initrd" && a.Initrd != nil && b.Initrd != nil {
			f = f.in("")
			if err := f.initrd(a.Initrd, b.Initrd); err != nil {
				return err
			}
			if !f.none() {
				continue
			}
		}
		if err := f.content(sectionContent(p.a.Content), sectionContent(p.b.Content)); err != nil {
			return err
		}
	}
	if !f.none() {
		return nil
	}
	for _, p := range pairs {
		f, number := f.in("section "+p.name), func(v uint32) string { return fmt.Sprintf("%#x", v) }
		if err := each(
			func() error { return f.same("virtual size", number(p.a.VirtualSize), number(p.b.VirtualSize)) },
			func() error { return f.same("address", number(p.a.VirtualAddress), number(p.b.VirtualAddress)) },
			func() error { return f.same("size in the file", number(p.a.RawSize), number(p.b.RawSize)) },
			func() error { return f.same("offset in the file", number(p.a.Offset), number(p.b.Offset)) },
		); err != nil {
			return err
		}
	}
	for _, field := range peFields {
		if field.follows {
			if err := header.same(field.name, field.value(a.header), field.value(b.header)); err != nil {
				return err
			}
		}
	}
	return nil
}

// A pair is a section that both images have.
type pair struct {
	name string
	a, b *Section
}

// sections pairs sections of the same name, the first with the first and so on.
func (f finder) sections(a, b *PE) ([]pair, error) {
	// index has the sections by name and number: UKIs may repeat a name.
	index := func(p *PE) (keys []string, byKey map[string]*Section) {
		byKey = map[string]*Section{}
		for i := range p.Sections {
			key := p.Sections[i].Name
			for n := 2; byKey[key] != nil; n++ {
				key = fmt.Sprintf("%s (number %d)", p.Sections[i].Name, n)
			}
			keys, byKey[key] = append(keys, key), &p.Sections[i]
		}
		return keys, byKey
	}
	keysA, inA := index(a)
	keysB, inB := index(b)
	var pairs []pair
	for _, key := range keysA {
		if inB[key] != nil {
			pairs = append(pairs, pair{key, inA[key], inB[key]})
		} else if err := f.in("section "+key).differ(presence, fmt.Sprintf("%d bytes", inA[key].Content.Size()), ""); err != nil {
			return nil, err
		}
	}
	for _, key := range keysB {
		if inA[key] == nil {
			if err := f.in("section "+key).differ(presence, "", fmt.Sprintf("%d bytes", inB[key].Content.Size())); err != nil {
				return nil, err
			}
		}
	}
	// With the same names, the order can differ still.
	if len(keysA) == len(keysB) && len(pairs) == len(keysA) {
		return pairs, f.same("order of sections", strings.Join(keysA, " "), strings.Join(keysB, " "))
	}
	return pairs, nil
}

func (f finder) initrd(a, b *Initrd) error {
	if err := f.same("compression", a.Compression, b.Compression); err != nil {
		return err
	}
	if err := f.entries(a.Entries, b.Entries); err != nil || !f.none() {
		return err
	}
	// The same entries: where the archives differ, it is in how they are laid out.
	for i := range a.Entries {
		x, y := a.Entries[i], b.Entries[i]
		if err := f.same(fmt.Sprintf("entry %d", i+1), plain(x.Path), plain(y.Path)); err != nil {
			return err
		}
		if x.Path != y.Path {
			break // the rest would only be shifted
		}
		if err := f.in(plain(x.Path)).numbers(x, y); err != nil {
			return err
		}
	}
	if !f.none() {
		return nil
	}
	x, y := sectionContent(a.archive), sectionContent(b.archive)
	at, err := firstDifference(f.ctx, x, y)
	if err != nil {
		return err
	}
	if at >= 0 {
		return f.in("unpacked").bytes(x, y, at)
	}
	if a.PackedSize != b.PackedSize {
		return f.differ("packed size of the same archive", fmt.Sprint(a.PackedSize), fmt.Sprint(b.PackedSize))
	}
	return nil // the section's content differs then, or nothing does
}

// entries compares two lists in order of path.
func (f finder) entries(a, b []Entry) error {
	byPath := func(x, y Entry) int { return cmp.Compare(x.Path, y.Path) }
	a, b = slices.SortedFunc(slices.Values(a), byPath), slices.SortedFunc(slices.Values(b), byPath)
	for len(a) > 0 || len(b) > 0 {
		order := 0
		switch {
		case len(b) == 0:
			order = -1
		case len(a) == 0:
			order = 1
		default:
			order = byPath(a[0], b[0])
		}
		var err error
		if order < 0 {
			err = f.in(plain(a[0].Path)).differ(presence, a[0].describe(), "")
		} else if order > 0 {
			err = f.in(plain(b[0].Path)).differ(presence, "", b[0].describe())
		} else {
			err = f.in(plain(a[0].Path)).entry(a[0], b[0])
		}
		if err != nil {
			return err
		}
		if order <= 0 {
			a = a[1:]
		}
		if order >= 0 {
			b = b[1:]
		}
	}
	return nil
}

func (e Entry) describe() string {
	switch {
	case e.Mode.is(unix.S_IFREG):
		return fmt.Sprintf("a file of %d bytes", e.Size)
	case e.Mode.is(unix.S_IFLNK):
		return fmt.Sprintf("a link to %q", e.Target)
	}
	return "a " + e.Mode.Type()
}

func (f finder) entry(a, b Entry) error {
	if a.Mode.Type() != b.Mode.Type() {
		return f.differ("type", a.Mode.Type(), b.Mode.Type())
	}
	return each(
		func() error { return f.same("mode", a.Mode.String(), b.Mode.String()) },
		func() error { return f.same("owner", fmt.Sprint(a.UID, ":", a.GID), fmt.Sprint(b.UID, ":", b.GID)) },
		func() error { return f.same("time", stamp(a.Time), stamp(b.Time)) },
		func() error {
			if a.Mode.is(unix.S_IFDIR) {
				return nil // follows from the folders in it
			}
			return f.same("number of hard links", fmt.Sprint(a.Links), fmt.Sprint(b.Links))
		},
		func() error { return f.same("device number", deviceText(a.Device), deviceText(b.Device)) },
		func() error { return f.same("target", fmt.Sprintf("%q", a.Target), fmt.Sprintf("%q", b.Target)) },
		func() error { return f.xattrs(a.Xattrs, b.Xattrs) },
		func() error {
			if a.content == nil || f.compared[[2]*content{a.content, b.content}] {
				return nil
			}
			f.compared[[2]*content{a.content, b.content}] = true
			return f.content(a.content, b.content)
		},
	)
}

// numbers compares what nothing in a running system depends on.
func (f finder) numbers(a, b Entry) error {
	return each(
		func() error { return f.same("number of hard links", fmt.Sprint(a.Links), fmt.Sprint(b.Links)) },
		func() error { return f.same("inode", fmt.Sprint(a.Inode), fmt.Sprint(b.Inode)) },
		func() error { return f.same("device it was on", deviceText(a.on), deviceText(b.on)) },
	)
}

func (f finder) xattrs(a, b map[string]string) error {
	names := map[string]bool{}
	for name := range a {
		names[name] = true
	}
	for name := range b {
		names[name] = true
	}
	value := func(m map[string]string, name string) string {
		if v, ok := m[name]; ok {
			return "0x" + v
		}
		return "missing"
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if err := f.same(fmt.Sprintf("attribute %q", name), value(a, name), value(b, name)); err != nil {
			return err
		}
	}
	return nil
}

func stamp(t time.Time) string {
	return fmt.Sprintf("%s (%d)", t.UTC().Format(time.RFC3339Nano), t.Unix())
}

func deviceText(d uint64) string { return fmt.Sprint(d>>32, ":", d&0xffffffff) }

// plain is a path as it can be printed.
func plain(path string) string {
	if q := fmt.Sprintf("%q", path); q[1:len(q)-1] != path {
		return q
	}
	return path
}

func (f finder) disk(a, b *Disk) error {
	table := f.in("GPT")
	// The disk's GUID follows from the salt, or the manifest, unless it is the
	// only one of them that differs.
	guid := func() error { return table.same("disk GUID", a.Table.Disk.String(), b.Table.Disk.String()) }
	guidIsCause := len(a.Trees) > 0 && slices.Equal(a.salts(), b.salts())
	if guidIsCause {
		if err := guid(); err != nil {
			return err
		}
	}
	x, y := a.Table.Partitions, b.Table.Partitions
	for i := range max(len(x), len(y)) {
		f := table.in(fmt.Sprintf("partition %d", i+1))
		var err error
		switch {
		case i >= len(y):
			err = f.differ(presence, describePartition(x[i]), "")
		case i >= len(x):
			err = f.differ(presence, "", describePartition(y[i]))
		default:
			err = each(
				func() error { return f.same("type", typeText(x[i].Type), typeText(y[i].Type)) },
				func() error { return f.same("name", fmt.Sprintf("%q", x[i].Name), fmt.Sprintf("%q", y[i].Name)) },
				func() error {
					return f.same("attributes", fmt.Sprintf("%#x", x[i].Attributes), fmt.Sprintf("%#x", y[i].Attributes))
				},
			)
		}
		if err != nil {
			return err
		}
	}
	hashes := map[int]bool{} // partitions that follow from others
	for i := range min(len(x), len(y)) {
		s, t := a.Trees[i], b.Trees[i]
		if x[i].Type != y[i].Type {
			continue
		}
		f := f.in(fmt.Sprintf("partition %d", i+1))
		switch {
		case s != nil && t != nil:
			hashes[s.HashPartition] = true
			if err := f.tree(s, t); err != nil {
				return err
			}
		case (s == nil) != (t == nil):
			if err := f.differ("hash tree", a.treeText(i), b.treeText(i)); err != nil {
				return err
			}
		case x[i].Type == gpt.ManifestType:
			if err := f.manifest(a, b, i); err != nil {
				return err
			}
		case x[i].Type != verity.TypeHash:
			if err := f.content(a.partition(i), b.partition(i)); err != nil {
				return err
			}
		}
	}
	if !f.none() {
		return nil
	}
	// Hash trees over the same data with the same salt, and the layout.
	for i := range x {
		f := f.in(fmt.Sprintf("partition %d", i+1))
		if x[i].Type == verity.TypeHash {
			if err := f.hashes(a.partition(i), b.partition(i), hashes[i]); err != nil {
				return err
			}
		}
		f = table.in(fmt.Sprintf("partition %d", i+1))
		if err := each(
			func() error { return f.same("offset", fmt.Sprint(x[i].Offset), fmt.Sprint(y[i].Offset)) },
			func() error { return f.same("size", fmt.Sprint(x[i].Size), fmt.Sprint(y[i].Size)) },
			func() error { return f.same("UUID", x[i].UUID.String(), y[i].UUID.String()) },
		); err != nil {
			return err
		}
	}
	if !guidIsCause {
		if err := guid(); err != nil {
			return err
		}
	}
	return f.same("size of the disk", fmt.Sprint(a.file.size), fmt.Sprint(b.file.size))
}

func (d *Disk) salts() []string {
	var list []string
	for _, i := range slices.Sorted(maps.Keys(d.Trees)) {
		list = append(list, fmt.Sprintf("%d:%x", i, d.Trees[i].Salt))
	}
	return list
}

// treeText tells whether a data partition has a hash tree.
func (d *Disk) treeText(i int) string {
	if err := d.broken[i]; err != nil {
		return "unusable (" + err.Error() + ")"
	}
	return "there"
}

func describePartition(p gpt.Partition) string {
	return fmt.Sprintf("%d bytes of type %s, named %q", p.Size, typeText(p.Type), p.Name)
}

func typeText(t gpt.GUID) string {
	if k := kind(t); k != "" {
		return k
	}
	return t.String()
}

// region names the part of the disk that a byte belongs to.
func (d *Disk) region(at int64) string {
	// UEFI 2.10, section 5.2: MBR, header, and at least 16 KiB of entries.
	switch {
	case at < gpt.SectorSize:
		return "protective MBR"
	case at < 2*gpt.SectorSize:
		return "GPT header"
	case at < 34*gpt.SectorSize:
		return "GPT entries"
	case at >= d.file.size-33*gpt.SectorSize:
		return "backup GPT"
	}
	for i, p := range d.Table.Partitions {
		if at >= p.Offset && at < p.Offset+p.Size {
			return fmt.Sprintf("partition %d", i+1)
		}
	}
	return "outside of the partitions"
}

// tree compares two file systems and the salts of their hash trees.
func (f finder) tree(a, b *Tree) error {
	f = f.in("")
	if err := f.entries(a.Entries, b.Entries); err != nil {
		return err
	}
	if f.none() {
		if err := f.erofs(a, b); err != nil {
			return err
		}
	}
	return f.same("salt of the hash tree", saltText(a.Salt), saltText(b.Salt))
}

func saltText(salt []byte) string {
	if len(salt) == 0 {
		return "empty"
	}
	return fmt.Sprintf("%x", salt)
}

// erofsSuperblock is where the superblock lies in an EROFS image and the fields
// of it that a builder chooses: the kernel's fs/erofs/erofs_fs.h. The rest
// follows from the files.
const erofsSuperblock, erofsSuperblockSize = 1024, 128

var erofsFields = []field{
	{"compatible features", 8, 4, false},
	{"block size (bits)", 12, 1, false},
	{"time of the file system", 24, 8, false},
	{"nanoseconds of the file system's time", 32, 4, false},
	{"UUID of the file system", 48, 16, false},
	{"volume name", 64, 16, false},
	{"incompatible features", 80, 4, false},
	{"number of inodes", 16, 8, true},
	{"root inode", 14, 2, true},
	{"number of blocks", 36, 4, true},
	{"metadata block", 40, 4, true},
	{"attributes block", 44, 4, true},
}

// erofs compares two images that hold the same files.
func (f finder) erofs(a, b *Tree) error {
	f = f.in("EROFS")
	var super [2][erofsSuperblockSize]byte
	for i, t := range []*Tree{a, b} {
		if err := readAt(t.data, super[i][:], erofsSuperblock, t.data.Size(), "an EROFS superblock"); err != nil {
			return err
		}
	}
	for _, field := range erofsFields {
		if err := f.same(field.name, field.value(super[0][:]), field.value(super[1][:])); err != nil {
			return err
		}
	}
	if !f.none() {
		return nil
	}
	x, y := sectionContent(a.data), sectionContent(b.data)
	at, err := firstDifference(f.ctx, x, y)
	if err != nil || at < 0 {
		return err
	}
	return f.in(fmt.Sprintf("layout of the same files, block %d", at/verity.BlockSize)).bytes(x, y, at)
}

// manifest compares two manifests in words, if that is what the partitions hold.
func (f finder) manifest(a, b *Disk, i int) error {
	x, errA := a.manifest(i)
	y, errB := b.manifest(i)
	if errA != nil || errB != nil {
		return f.content(a.partition(i), b.partition(i))
	}
	return f.in("manifest").content(bytesContent(x), bytesContent(y))
}

// hashes compares two hash partitions.
func (f finder) hashes(a, b *content, belongs bool) error {
	at, err := firstDifference(f.ctx, a, b)
	if err != nil || at < 0 {
		return err
	}
	switch block := at / verity.BlockSize; {
	case !belongs:
		return f.bytes(a, b, at)
	case block == 0 && at < 512:
		return f.in("superblock of the hash tree").bytes(a, b, at)
	default:
		return f.in(fmt.Sprintf("hash tree over the same data, block %d", block)).bytes(a, b, at)
	}
}
