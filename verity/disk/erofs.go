package disk

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io/fs"
	"path"
	"slices"
	"strings"

	"chrysalis/verity"
)

// The image is the plainest EROFS there is (kernel, fs/erofs/erofs_fs.h): no
// compression, no extended attributes, every inode in its 64-byte form, every
// file in whole blocks of its own. What a file system can do without is left out
// so that the writer can be read in one sitting and the data be written before
// the metadata that points at it:
//
//	block 0   superblock, at byte 1024
//	1 …       the files' content, each from the start of a block, in order of path
//	…         the late file, see Options.Late
//	…         inodes, in order of path, the top folder's first; links' targets
//	          follow their inode
//	…         folders' entries, in order of path
//
// Block numbers have 32 bits, so an image has at most 16 TiB.
const (
	superOffset = 1024
	superMagic  = 0xE0F5E1E2

	inodeSize  = 64
	nidUnit    = 32 // inode numbers count these from the start of the inodes
	direntSize = 12

	layoutPlain  = 0 // content in whole blocks
	layoutInline = 2 // content behind the inode

	// maxTarget is the longest target of a link: it must fit into its inode's block.
	maxTarget = verity.BlockSize - inodeSize
	maxName   = 255 // EROFS_NAME_LEN
)

// A node is an entry of the image.
type node struct {
	Entry
	name  string // last part of Path
	block uint32 // where the content begins
	nid   uint64
	links uint32
	sub   []*node // of a folder, in order of name
	up    *node
	chain *chain // of a file whose SHA-256 is wanted
	fetch fetcher
}

func (n *node) blocks() uint64 { return blocksOf(n.Size) }

func blocksOf(size int64) uint64 {
	return (uint64(size) + verity.BlockSize - 1) / verity.BlockSize
}

// comparePaths orders paths as a walk meets them that takes each folder's
// entries in order of their bytes: part by part.
func comparePaths(a, b string) int {
	for a != "" && b != "" {
		x, restA, _ := strings.Cut(a, "/")
		y, restB, _ := strings.Cut(b, "/")
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
		a, b = restA, restB
	}
	return len(a) - len(b)
}

// A tree collects the entries of an image.
type tree struct {
	nodes map[string]*node
	root  *node
}

func newTree() *tree {
	root := &node{Entry: Entry{Path: ".", Mode: fs.ModeDir | 0o755}, links: 2}
	root.up = root
	return &tree{nodes: map[string]*node{".": root}, root: root}
}

// add adds an entry, and folders above it that are not there yet.
func (t *tree) add(e Entry) (*node, error) {
	if !fs.ValidPath(e.Path) || strings.ContainsRune(e.Path, 0) {
		return nil, fmt.Errorf("%q cannot be a path on a disk", e.Path)
	}
	e.Mode &= fs.ModeType | fs.ModePerm
	old := t.nodes[e.Path]
	switch e.Mode.Type() {
	case fs.ModeDir:
		if old != nil && old.Mode.IsDir() {
			old.Mode = e.Mode
			return old, nil
		}
	case fs.ModeSymlink:
		if e.Target == "" || len(e.Target) > maxTarget || strings.ContainsRune(e.Target, 0) {
			return nil, fmt.Errorf("%s: a link to %d bytes, expected 1 to %d", e.Path, len(e.Target), maxTarget)
		}
		e.Size = int64(len(e.Target))
		e.Mode |= fs.ModePerm
	case 0:
		if e.Size < 0 || e.Size > verity.MaxDataBlocks*verity.BlockSize {
			return nil, fmt.Errorf("%s: a file of %d bytes", e.Path, e.Size)
		}
	default:
		return nil, fmt.Errorf("%s: %v: only files, folders and symbolic links can be packed", e.Path, e.Mode.Type())
	}
	if old != nil {
		return nil, fmt.Errorf("%s is there twice", e.Path)
	}
	n := &node{Entry: e, name: path.Base(e.Path), links: 1}
	if len(n.name) > maxName {
		return nil, fmt.Errorf("%.80s…: a name of %d bytes, at most %d are allowed", e.Path, len(n.name), maxName)
	}
	up := t.nodes[path.Dir(e.Path)]
	if up == nil {
		var err error
		if up, err = t.add(Entry{Path: path.Dir(e.Path), Mode: fs.ModeDir | 0o755}); err != nil {
			return nil, err
		}
	}
	if !up.Mode.IsDir() {
		return nil, fmt.Errorf("%s: %s is no folder", e.Path, up.Path)
	}
	if n.Mode.IsDir() {
		n.links = 2
		up.links++
	}
	n.up = up
	up.sub = append(up.sub, n)
	t.nodes[e.Path] = n
	return n, nil
}

// list returns all nodes in order of path, the top folder first.
func (t *tree) list() []*node {
	list := make([]*node, 0, len(t.nodes))
	var walk func(n *node)
	walk = func(n *node) {
		list = append(list, n)
		slices.SortFunc(n.sub, func(a, b *node) int { return strings.Compare(a.name, b.name) })
		for _, s := range n.sub {
			walk(s)
		}
	}
	walk(t.root)
	return list
}

// metadata returns the image's blocks from metaBlock on, for nodes whose files
// have their place: inodes and folders.
func (t *tree) metadata(metaBlock uint64) ([]byte, error) {
	list := t.list()
	// Numbers first: a folder's entries need those of what is in it. Inode number 0
	// is taken for "no entry" by readdir's users, so the first is left empty.
	at := uint64(inodeSize)
	for _, n := range list {
		need := uint64(inodeSize)
		if n.Mode.Type() == fs.ModeSymlink {
			need += uint64(n.Size)
		}
		if at%verity.BlockSize+need > verity.BlockSize {
			at = roundUp(at, verity.BlockSize)
		}
		n.nid = at / nidUnit
		at = roundUp(at+need, nidUnit)
	}
	out := make([]byte, roundUp(at, verity.BlockSize))
	for _, n := range list {
		if n.Mode.IsDir() {
			content := n.entries()
			n.Size = int64(len(content))
			block := metaBlock + uint64(len(out))/verity.BlockSize
			if block > 1<<32-1 {
				return nil, fmt.Errorf("more than 2^32 blocks of %d bytes", verity.BlockSize)
			}
			n.block = uint32(block)
			out = append(out, content...)
			out = append(out, make([]byte, roundUp(uint64(len(out)), verity.BlockSize)-uint64(len(out)))...)
		}
	}
	for i, n := range list {
		n.encode(out[n.nid*nidUnit:], uint32(i+1))
	}
	return out, nil
}

func roundUp(n, unit uint64) uint64 { return (n + unit - 1) / unit * unit }

// encode writes struct erofs_inode_extended and, for a link, its target.
func (n *node) encode(b []byte, ino uint32) {
	layout, mode := uint16(layoutPlain), uint16(n.Mode.Perm())
	switch n.Mode.Type() {
	case fs.ModeDir:
		mode |= 0o040000
	case fs.ModeSymlink:
		mode |= 0o120000
		layout = layoutInline
		copy(b[inodeSize:], n.Target)
	default:
		mode |= 0o100000
	}
	binary.LittleEndian.PutUint16(b[0:], layout<<1|1)
	binary.LittleEndian.PutUint16(b[4:], mode)
	binary.LittleEndian.PutUint64(b[8:], uint64(n.Size))
	binary.LittleEndian.PutUint32(b[16:], n.block)
	binary.LittleEndian.PutUint32(b[20:], ino)
	// Owner, group and time are 0.
	binary.LittleEndian.PutUint32(b[44:], n.links)
}

// entries returns a folder's content: blocks of struct erofs_dirent, in order of
// name, each block's names behind its entries.
func (n *node) entries() []byte {
	type entry struct {
		name string
		nid  uint64
		kind byte
	}
	list := []entry{{".", n.nid, 2}, {"..", n.up.nid, 2}}
	for _, s := range n.sub {
		kind := byte(1) // EROFS_FT_REG_FILE
		switch s.Mode.Type() {
		case fs.ModeDir:
			kind = 2
		case fs.ModeSymlink:
			kind = 7
		}
		list = append(list, entry{s.name, s.nid, kind})
	}
	slices.SortFunc(list, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	var out []byte
	for len(list) > 0 {
		count, size := 0, 0
		for count < len(list) && size+direntSize+len(list[count].name) <= verity.BlockSize {
			size += direntSize + len(list[count].name)
			count++
		}
		block := make([]byte, size)
		at := count * direntSize
		for i, e := range list[:count] {
			d := block[i*direntSize:]
			binary.LittleEndian.PutUint64(d, e.nid)
			binary.LittleEndian.PutUint16(d[8:], uint16(at))
			d[10] = e.kind
			at += copy(block[at:], e.name)
		}
		if list = list[count:]; len(list) > 0 {
			block = append(block, make([]byte, verity.BlockSize-size)...)
		}
		out = append(out, block...)
	}
	return out
}

// superblock returns block 0 of an image: struct erofs_super_block.
func (t *tree) superblock(metaBlock, blocks uint64) []byte {
	const (
		compatChecksum = 1
		compatMtime    = 2
	)
	block := make([]byte, verity.BlockSize)
	b := block[superOffset:]
	binary.LittleEndian.PutUint32(b[0:], superMagic)
	binary.LittleEndian.PutUint32(b[8:], compatChecksum|compatMtime)
	b[12] = 12 // log2 of the block size
	binary.LittleEndian.PutUint16(b[14:], uint16(t.root.nid))
	binary.LittleEndian.PutUint64(b[16:], uint64(len(t.nodes)))
	binary.LittleEndian.PutUint32(b[36:], uint32(blocks))
	binary.LittleEndian.PutUint32(b[40:], uint32(metaBlock))
	// CRC-32C from the superblock to the end of its block, without the final
	// inversion (erofs_superblock_csum_verify).
	binary.LittleEndian.PutUint32(b[4:], ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return block
}
