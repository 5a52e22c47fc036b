package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"sync"

	"chrysalis/verity"
	"chrysalis/verity/sha256x2"
)

// The pipeline. The image is cut into groups of verity.GroupSize bytes. A worker,
// one for each processor, takes a group, reads what belongs into it from the
// files, writes it to its place and makes the group's leaf of the hash tree. Where
// the files' own SHA-256 are wanted, it then hands the group on to the files' hash
// chains, which need their bytes in order: whoever brings the next bytes of a file
// hashes them and all that wait behind them. Where all of a group is one file's, the
// chain makes the leaf too, for two hashes of the same bytes take little longer than
// one (see package sha256x2). So each byte is read once and written once, both hashes
// see it while it is in the processor's cache, and memory is a few groups for each
// processor.
type packer struct {
	ctx  context.Context
	o    Options
	file *output
	tree *tree
	list []*node // files with content, in the order in which they are in the image
	late *node   // see Options.Late

	end    uint64      // block behind the files' content
	leaves io.WriterAt // takes the leaf of group n at n blocks

	mu      sync.Mutex
	stopped error
	done    int64 // bytes of files
	total   int64
	free    chan *group
	halt    chan struct{}      // closed when the work stops early
	next    func(*group) error // fills in which group is next, under mu; io.EOF behind the last

	state *journal // nil without Options.Resume
}

const (
	groupSize   = verity.GroupSize
	groupBlocks = groupSize / verity.BlockSize
	// bigFile is the size in bytes from which a file can begin a run: see runs.
	bigFile = 64 << 20
)

// A group is a buffer and what is in it.
type group struct {
	index uint64
	buf   []byte // whole blocks; what no segment covers is zero
	segs  []segment
	users int // segments that are not hashed yet, under packer.mu
}

// A segment is a part of a file in a group.
type segment struct {
	*node
	at     int64 // in the file
	lo, hi int   // in the buffer
}

// run works through all groups. While one worker writes, there is one for each
// processor to hash.
func (p *packer) run() error {
	workers := runtime.GOMAXPROCS(0) + 1
	p.buffers(workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			h := newHasher(p.o.Salt)
			for {
				g := p.take()
				if g == nil {
					return
				}
				p.fail(p.work(g, h))
			}
		})
	}
	wg.Wait()
	return p.stopped
}

// buffers makes the groups that go round: two for each worker, and one for each
// active run, whose first group waits for the end of the run before it.
func (p *packer) buffers(workers int) {
	p.halt = make(chan struct{})
	p.free = make(chan *group, 2*workers+active(workers)+1)
	for range cap(p.free) {
		p.free <- &group{buf: alignedBuffer(groupSize)}
	}
}

func (p *packer) fail(err error) {
	if err == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop(err)
}

// stop is fail under mu. Segments that wait for others then wait for ever, and
// their groups with them.
func (p *packer) stop(err error) {
	if p.stopped == nil {
		p.stopped = err
		close(p.halt)
	}
}

// take returns the next group to work on, or nil when there is no more.
func (p *packer) take() *group {
	var g *group
	select {
	case g = <-p.free:
	case <-p.halt:
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ctx.Err(); err != nil {
		p.stop(err)
	}
	if p.stopped == nil {
		g.segs = g.segs[:0]
		g.buf = g.buf[:groupSize]
		err := p.next(g)
		if err == nil {
			g.users = len(g.segs) + 1 // and the worker
			return g
		}
		if err != io.EOF {
			p.stop(err)
		}
	}
	p.free <- g
	return nil
}

// release says that one user of a group is done with it.
func (p *packer) release(g *group) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.users--; g.users == 0 {
		p.free <- g
	}
}

func (p *packer) work(g *group, h *hasher) error {
	handed := 0
	defer func() {
		for range len(g.segs) - handed + 1 {
			p.release(g)
		}
	}()
	var bytes int64
	for _, s := range g.segs {
		bytes += int64(s.hi - s.lo)
		if s.Open == nil {
			continue // a stream's, which next has read
		}
		if err := s.fetch.read(s.node, g.buf[s.lo:s.hi], s.at); err != nil {
			return err
		}
	}
	if !allZero(g.buf) { // what is not written reads as zeros
		if err := p.file.writeGroup(g.buf, verity.DataOffset+int64(g.index)*groupSize); err != nil {
			return err
		}
	}
	if !g.together() {
		if err := p.writeLeaf(g, h.makeLeaf(g.buf)); err != nil {
			return err
		}
	}
	p.mu.Lock()
	p.done += bytes
	if p.o.Progress != nil && p.stopped == nil {
		p.o.Progress("pack", p.done, p.total)
	}
	p.mu.Unlock()
	for _, s := range g.segs {
		handed++
		if s.chain == nil {
			p.release(g)
			continue
		}
		if err := s.chain.deliver(p, g, s, h); err != nil {
			return err
		}
	}
	return nil
}

// together reports whether the chain of the group's only file makes the leaf.
func (g *group) together() bool {
	return sha256x2.Fast() && len(g.segs) == 1 && g.segs[0].chain != nil
}

func (p *packer) writeLeaf(g *group, leaf []byte) error {
	_, err := p.leaves.WriteAt(leaf, int64(g.index)*verity.BlockSize)
	return err
}

func allZero(b []byte) bool {
	const step = 4096
	var zeros [step]byte
	for len(b) > 0 {
		n := min(step, len(b))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// A chain makes the SHA-256 of one file out of segments that come in any order.
type chain struct {
	mu   sync.Mutex
	next uint64 // group whose segment comes next
	end  uint64 // group behind the last
	busy bool
	held map[uint64]heldSegment

	hashing sync.Mutex // held while hash and next change together
	hash    *sha256x2.Stream
}

type heldSegment struct {
	g *group
	s segment
}

func newChain(first, end uint64) *chain {
	return &chain{next: first, end: end, held: map[uint64]heldSegment{}, hash: sha256x2.NewStream()}
}

// deliver hashes a segment if it is the next, and whatever waits behind it, and makes
// the leaves of the groups that are together. Otherwise the segment waits. After an
// error the chain stands still.
func (c *chain) deliver(p *packer, g *group, s segment, h *hasher) error {
	c.mu.Lock()
	if g.index < c.next { // hashed before an interruption, and its leaf made
		c.mu.Unlock()
		p.release(g)
		return nil
	}
	c.held[g.index] = heldSegment{g, s}
	for !c.busy {
		held, ok := c.held[c.next]
		if !ok {
			break
		}
		delete(c.held, c.next)
		c.busy = true
		c.mu.Unlock()

		err := c.advance(p, held, h)
		p.release(held.g)
		if err != nil {
			return err
		}
		c.mu.Lock()
	}
	c.mu.Unlock()
	return nil
}

// advance hashes the next segment. The leaf is written before the chain says that it
// has passed the group: the journal relies on that.
func (c *chain) advance(p *packer, held heldSegment, h *hasher) error {
	g, part := held.g, held.g.buf[held.s.lo:held.s.hi]
	c.hashing.Lock()
	defer c.hashing.Unlock()
	if !g.together() {
		c.hash.Write(part)
	} else if err := p.writeLeaf(g, h.makeLeafWith(g.buf, c.hash, part)); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next++
	c.busy = false
	return nil
}

// finished reports whether a group's segment has been hashed.
func (c *chain) finished(group uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.next > group
}

// snapshot returns how far the chain is, and the hash's state there.
func (c *chain) snapshot() (uint64, []byte, error) {
	c.hashing.Lock()
	defer c.hashing.Unlock()
	state, err := c.hash.MarshalBinary()
	return c.next, state, err
}

// A fetcher reads a file's segments and keeps it open from the first to the last.
type fetcher struct {
	mu   sync.Mutex
	file Content
	left uint64 // segments to come
}

func (f *fetcher) read(n *node, p []byte, at int64) error {
	f.mu.Lock()
	if f.file == nil {
		file, err := n.Open()
		if err != nil {
			f.mu.Unlock()
			return err
		}
		f.file = file
	}
	file := f.file
	f.mu.Unlock()
	if got, err := file.ReadAt(p, at); got < len(p) {
		if err == nil || err == io.EOF {
			err = fmt.Errorf("%w: the file became shorter while it was packed", io.ErrUnexpectedEOF)
		}
		return fmt.Errorf("read %s: %w", n.Path, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left--; f.left == 0 {
		f.file = nil
		return file.Close()
	}
	return nil
}

func (f *fetcher) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file == nil {
		return nil
	}
	return f.file.Close()
}

// place gives the files of a tree their blocks, from block 1 on, and the late file
// the blocks behind them.
func (p *packer) place() {
	block := uint64(1)
	for _, n := range p.tree.list() {
		if !n.Mode.IsRegular() || n == p.late {
			continue
		}
		p.total += n.Size
		if n.blocks() == 0 {
			if p.o.sums() {
				n.chain = newChain(0, 0)
			}
			continue
		}
		n.block = uint32(block)
		first := block / groupBlocks
		block += n.blocks()
		end := (block-1)/groupBlocks + 1
		n.fetch.left = end - first
		if p.o.sums() {
			n.chain = newChain(first, end)
		}
		p.list = append(p.list, n)
	}
	p.end = block
}

// segments fills in what of the placed files is in a group.
func (p *packer) segments(g *group) {
	first := g.index * groupBlocks
	blocks := min(groupBlocks, p.end-first)
	g.buf = g.buf[:blocks*verity.BlockSize]
	i, _ := slices.BinarySearchFunc(p.list, first, func(n *node, block uint64) int {
		if uint64(n.block)+n.blocks() <= block {
			return -1
		}
		return 1
	})
	covered := 0
	for ; i < len(p.list) && uint64(p.list[i].block) < first+blocks; i++ {
		n := p.list[i]
		s := segment{node: n, lo: 0}
		if uint64(n.block) < first {
			s.at = int64(first-uint64(n.block)) * verity.BlockSize
		} else {
			s.lo = int(uint64(n.block)-first) * verity.BlockSize
		}
		s.hi = int(min(int64(len(g.buf)), int64(s.lo)+n.Size-s.at))
		clear(g.buf[covered:s.lo])
		covered = s.hi
		g.segs = append(g.segs, s)
	}
	clear(g.buf[covered:])
}

// A run is consecutive groups that are handed out in order.
type run struct{ next, end uint64 }

// runs cuts the image where a big file begins, so that the chains of several files
// can go on at a time.
func (p *packer) runs() []run {
	last := (p.end + groupBlocks - 1) / groupBlocks
	var list []run
	begin := uint64(0)
	for _, n := range p.list {
		if at := uint64(n.block) / groupBlocks; n.Size >= bigFile && at > begin {
			list = append(list, run{begin, at})
			begin = at
		}
	}
	return append(list, run{begin, last})
}

// active is how many runs go on at a time: each keeps one processor busy with its
// files' hash chains and, where the two do not go together, another with the tree.
func active(workers int) int {
	if sha256x2.Fast() {
		return workers
	}
	return max(1, workers/2)
}

// planned hands out the groups of placed files: from a few runs in turn.
func (p *packer) planned(count int) func(*group) error {
	runs, turn := p.runs(), 0
	return func(g *group) error {
		for len(runs) > 0 {
			turn = (turn + 1) % min(count, len(runs))
			r := &runs[turn]
			if r.next == r.end {
				runs = slices.Delete(runs, turn, turn+1)
				continue
			}
			g.index = r.next
			r.next++
			g.segs = g.segs[:0]
			p.segments(g)
			if p.state == nil || !p.state.skip(g) {
				return nil
			}
			g.buf = g.buf[:groupSize]
		}
		return io.EOF
	}
}

// finish writes what stands around the files' content: the late file, the
// metadata, the superblock, the rest of the hash tree and the partition table.
func (p *packer) finish(leaves io.ReaderAt) (verity.Description, error) {
	late := p.late
	for _, n := range p.list {
		if n.chain != nil && !n.chain.finished(n.chain.end-1) {
			return verity.Description{}, fmt.Errorf("%s: its hash is not complete", n.Path) // a fault of this package
		}
	}
	tail := p.end
	var last []byte
	if late != nil {
		sums := map[string][32]byte{}
		for _, n := range p.tree.nodes {
			if n.chain != nil {
				sums[n.Path] = [32]byte(n.chain.hash.Sum(nil))
			}
		}
		content, err := p.o.Late.Content(sums)
		if err != nil {
			return verity.Description{}, err
		}
		if int64(len(content)) != late.Size {
			return verity.Description{}, fmt.Errorf("%s has %d bytes, was said to have %d", late.Path, len(content), late.Size)
		}
		late.block = uint32(tail)
		last = append(content, make([]byte, late.blocks()*verity.BlockSize-uint64(late.Size))...)
	}
	metaBlock := tail + uint64(len(last))/verity.BlockSize
	meta, err := p.tree.metadata(metaBlock)
	if err != nil {
		return verity.Description{}, err
	}
	last = append(last, meta...)
	blocks := tail + uint64(len(last))/verity.BlockSize
	if blocks > verity.MaxDataBlocks-1 {
		return verity.Description{}, fmt.Errorf("the image has %d blocks, at most 2^32-1 fit", blocks)
	}
	if _, err := p.file.WriteAt(last, verity.DataOffset+int64(tail)*verity.BlockSize); err != nil {
		return verity.Description{}, err
	}
	if _, err := p.file.WriteAt(p.tree.superblock(metaBlock, blocks), verity.DataOffset); err != nil {
		return verity.Description{}, err
	}
	// The groups that were touched again get new leaves.
	h, buf := newHasher(p.o.Salt), make([]byte, groupSize)
	for g := uint64(0); g*groupBlocks < blocks; g++ {
		part := buf[:min(groupBlocks, blocks-g*groupBlocks)*verity.BlockSize]
		if _, err := p.file.ReadAt(part, verity.DataOffset+int64(g)*groupSize); err != nil {
			return verity.Description{}, err
		}
		if _, err := p.leaves.WriteAt(h.makeLeaf(part), int64(g)*verity.BlockSize); err != nil {
			return verity.Description{}, err
		}
		if g == 0 && tail/groupBlocks > 0 {
			g = tail/groupBlocks - 1
		}
	}
	return verity.FinishDisk(p.file, int64(blocks)*verity.BlockSize, leaves, verity.TreeOptions{Salt: p.o.Salt, UUID: diskUUID(p.o.Salt)})
}

// imageBlocks is how many blocks the image will have whose files are placed.
func (p *packer) imageBlocks() (uint64, error) {
	meta, err := p.tree.metadata(p.end)
	if err != nil {
		return 0, err
	}
	blocks := p.end + uint64(len(meta))/verity.BlockSize
	if p.late != nil {
		blocks += p.late.blocks()
	}
	if blocks > verity.MaxDataBlocks-1 {
		return 0, fmt.Errorf("the image would have %d blocks, at most 2^32-1 fit", blocks)
	}
	return blocks, nil
}

// Pack makes a verity disk out of entries; the order in which they are given does
// not matter. Folders that no entry names get the mode 0755. See the package's
// documentation for what the disk is a function of.
func Pack(ctx context.Context, entries []Entry, out string, o Options) (verity.Description, error) {
	d, err := pack(ctx, entries, out, o)
	if err != nil {
		return d, fmt.Errorf("pack %s: %w", out, err)
	}
	return d, nil
}

func pack(ctx context.Context, entries []Entry, out string, o Options) (d verity.Description, err error) {
	p := &packer{ctx: ctx, o: o, tree: newTree()}
	for _, e := range entries {
		if e.Mode.IsRegular() && e.Open == nil {
			return d, fmt.Errorf("%s: nothing to read it from", e.Path)
		}
		if _, err := p.tree.add(e); err != nil {
			return d, err
		}
	}
	if p.late, err = p.addLate(); err != nil {
		return d, err
	}
	p.place()
	blocks, err := p.imageBlocks()
	if err != nil {
		return d, err
	}
	layout := verity.Layout(blocks)

	f, err := openOutput(out, o)
	if err != nil {
		return d, err
	}
	p.file = f
	defer func() { err = errors.Join(err, f.end(ctx, err, o)) }()
	defer func() {
		for _, n := range p.list {
			err = errors.Join(err, n.fetch.close())
		}
	}()
	if err := f.room(layout.Size); err != nil {
		return d, err
	}
	p.leaves = io.NewOffsetWriter(f, layout.LeavesOffset)
	if o.Resume != "" {
		if p.state, err = openJournal(p); err != nil {
			return d, err
		}
	}
	// A write that does not make the file longer need not wait for others.
	if err := f.Truncate(layout.Size); err != nil {
		return d, f.explain(err, layout.Size)
	}
	p.next = p.planned(active(runtime.GOMAXPROCS(0)))
	err = p.run()
	if p.state != nil {
		err = errors.Join(err, p.state.close(err != nil))
	}
	if err != nil {
		return d, f.explain(err, layout.Size)
	}
	if d, err = p.finish(nil); err != nil {
		return d, f.explain(err, layout.Size)
	}
	if err := p.commit(d); err != nil {
		return d, f.explain(err, layout.Size)
	}
	return d, nil
}

func (p *packer) addLate() (*node, error) {
	if p.o.Late == nil {
		return nil, nil
	}
	size, err := p.o.Late.Size()
	if err != nil {
		return nil, err
	}
	return p.tree.add(Entry{Path: p.o.Late.Path, Mode: p.o.Late.Mode, Size: size})
}

// PackStream is Pack for entries that come one after the other, each read before
// the next is asked for; next returns io.EOF behind the last. Their number and
// size need not be known before. If they come in order of path (each folder's
// entries in order of their names' bytes), they are written where they will stay;
// otherwise the disk is made from what was written, in a second pass. The disk is
// the same either way. Options.Resume is not used: a stream cannot be read again.
func PackStream(ctx context.Context, next func() (Entry, io.Reader, error), out string, o Options) (verity.Description, error) {
	d, err := packStream(ctx, next, out, o)
	if err != nil {
		return d, fmt.Errorf("pack %s: %w", out, err)
	}
	return d, nil
}

func packStream(ctx context.Context, next func() (Entry, io.Reader, error), out string, o Options) (d verity.Description, err error) {
	o.Resume = ""
	f, err := openOutput(out, o)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, f.end(ctx, err, o)) }()
	leaves, err := temporary(out)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, leaves.Close()) }()

	p := &packer{ctx: ctx, o: o, file: f, tree: newTree(), leaves: leaves, end: 1}
	s := &stream{p: p, next: next, ordered: true}
	p.next = s.group
	if err := p.run(); err != nil {
		return d, f.explain(err, 0)
	}
	if !s.ordered {
		return p.repack(out)
	}
	if p.late, err = p.addLate(); err != nil {
		return d, err
	}
	if d, err = p.finish(leaves); err != nil {
		return d, f.explain(err, 0)
	}
	if err := p.commit(d); err != nil {
		return d, f.explain(err, 0)
	}
	return d, nil
}

// stream fills groups from entries as they come.
type stream struct {
	p       *packer
	next    func() (Entry, io.Reader, error)
	node    *node // being read
	r       io.Reader
	at      int64
	last    string
	ordered bool
	at0     uint64 // group to fill next
	over    bool
}

func (s *stream) group(g *group) error {
	if s.over {
		return io.EOF
	}
	g.index = s.at0
	pos := 0
	if g.index == 0 {
		pos = verity.BlockSize // the superblock's
	}
	clear(g.buf[:pos])
	for pos < groupSize {
		if s.node == nil {
			if err := s.advance(); err == io.EOF {
				s.over = true
				break
			} else if err != nil {
				return err
			}
			if s.node == nil {
				continue
			}
			s.node.block = uint32(g.index*groupBlocks + uint64(pos)/verity.BlockSize)
			if s.p.o.sums() {
				first := g.index
				s.node.chain = newChain(first, (uint64(s.node.block)+s.node.blocks()-1)/groupBlocks+1)
			}
			s.p.list = append(s.p.list, s.node)
		}
		want := int(min(int64(groupSize-pos), s.node.Size-s.at))
		if _, err := io.ReadFull(s.r, g.buf[pos:pos+want]); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return fmt.Errorf("read %s: %w", s.node.Path, err)
		}
		g.segs = append(g.segs, segment{node: s.node, at: s.at, lo: pos, hi: pos + want})
		s.at += int64(want)
		end := int(roundUp(uint64(pos+want), verity.BlockSize))
		clear(g.buf[pos+want : end])
		pos = end
		if s.at == s.node.Size {
			s.node = nil
		}
	}
	if pos == 0 {
		return io.EOF
	}
	g.buf = g.buf[:pos]
	s.p.end = g.index*groupBlocks + uint64(pos)/verity.BlockSize
	if s.p.end > verity.MaxDataBlocks-1 {
		return errors.New("the stream has more than 2^32 blocks of data")
	}
	s.at0++
	return nil
}

// advance goes to the next entry; s.node stays nil if that has no content.
func (s *stream) advance() error {
	e, r, err := s.next()
	if err != nil {
		return err
	}
	e.Open = nil
	if late := s.p.o.Late; late != nil && e.Path == late.Path {
		return fmt.Errorf("%s is in the way of a file of this name that is added", e.Path)
	}
	n, err := s.p.tree.add(e)
	if err != nil {
		return err
	}
	if s.last != "" && comparePaths(s.last, e.Path) >= 0 && n.Mode.IsRegular() {
		s.ordered = false
	}
	if n.Mode.IsRegular() {
		s.last = e.Path
		if n.Size > 0 {
			s.node, s.r, s.at = n, r, 0
		} else if s.p.o.sums() {
			n.chain = newChain(0, 0)
		}
	}
	return nil
}

// repack packs what the stream's disk holds, from the places it is in.
func (p *packer) repack(out string) (verity.Description, error) {
	var entries []Entry
	for _, n := range p.tree.nodes {
		e := n.Entry
		if n.Mode.IsRegular() {
			at, size := verity.DataOffset+int64(n.block)*verity.BlockSize, n.Size
			e.Open = func() (Content, error) {
				return noClose{io.NewSectionReader(p.file, at, size)}, nil
			}
		}
		if n != p.tree.root {
			entries = append(entries, e)
		}
	}
	o := p.o
	o.Progress = nil
	o.KeepPartial = false // what would be kept is what this is made from
	return pack(p.ctx, entries, out, o)
}

type noClose struct{ io.ReaderAt }

func (noClose) Close() error { return nil }

// PackTree is Pack for a file system. Its files must implement io.ReaderAt, as
// those of os.DirFS do.
func PackTree(ctx context.Context, fsys fs.FS, out string, o Options) (verity.Description, error) {
	entries, err := Walk(ctx, fsys)
	if err != nil {
		return verity.Description{}, fmt.Errorf("pack %s: %w", out, err)
	}
	return Pack(ctx, entries, out, o)
}

// Walk returns the entries of a file system.
func Walk(ctx context.Context, fsys fs.FS) ([]Entry, error) {
	var entries []Entry
	err := fs.WalkDir(fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		e := Entry{Path: path, Mode: info.Mode()}
		switch info.Mode().Type() {
		case 0:
			e.Size = info.Size()
			e.Open = func() (Content, error) {
				f, err := fsys.Open(path)
				if err != nil {
					return nil, err
				}
				if c, ok := f.(Content); ok {
					return c, nil
				}
				return nil, errors.Join(fmt.Errorf("%s: cannot be read at any place", path), f.Close())
			}
		case fs.ModeSymlink:
			if e.Target, err = fs.ReadLink(fsys, path); err != nil {
				return err
			}
		}
		entries = append(entries, e)
		return nil
	})
	return entries, err
}
