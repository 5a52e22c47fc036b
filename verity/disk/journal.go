package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"chrysalis/verity"
)

// A journal says how far an unfinished disk is: for each file, which group its
// hash chain has reached, and the chain's state there. What a chain has passed is
// in its place, with its leaf of the hash tree: both are written before the chain
// gets the bytes, and synced before the journal is. A group is done when all
// chains that have a part in it have passed it.
type journal struct {
	p    *packer
	plan string
	path string
	stop chan struct{}
	over sync.WaitGroup
	err  error
}

const (
	journalSuffix  = ".json"
	journalVersion = 1
	maxJournal     = 64 << 20 // bytes
	journalTick    = 5 * time.Second
)

type journalFile struct {
	Version int            `json:"version"`
	Plan    string         `json:"plan"` // SHA-256 of what is packed, see plan
	Chains  []journalChain `json:"chains"`
}

type journalChain struct {
	File  int    `json:"file"` // index in packer.list
	Next  uint64 `json:"next"` // group
	State []byte `json:"state"`
}

// plan is the SHA-256 of all that decides what is where on the disk.
func (p *packer) plan() string {
	h := sha256.New()
	fmt.Fprintf(h, "chrysalis/pack/1\n%q\n%x\n", p.o.Resume, p.o.Salt)
	for _, n := range p.tree.list() {
		fmt.Fprintf(h, "%q %v %d %d %q\n", n.Path, n.Mode, n.Size, n.block, n.Target)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// openJournal takes up the work where a journal for the same plan says it was, or
// begins anew. From then on it saves the state now and again.
func openJournal(p *packer) (*journal, error) {
	j := &journal{p: p, plan: p.plan(), path: p.file.keep + journalSuffix, stop: make(chan struct{})}
	if err := j.load(); err != nil {
		for _, n := range p.list {
			n.chain = newChain(uint64(n.block)/groupBlocks, n.chain.end)
		}
		if err := p.file.Truncate(0); err != nil {
			return nil, err
		}
	}
	for _, n := range p.list {
		// Whole groups, so that done and skipped come to the same.
		p.done += min(n.Size, max(0, int64(n.chain.next*groupBlocks)-int64(n.block))*verity.BlockSize)
	}
	if p.done > 0 && p.o.Progress != nil {
		p.o.Progress("resume", p.done, p.total)
	}
	j.over.Go(func() {
		tick := time.NewTicker(journalTick)
		defer tick.Stop()
		for {
			select {
			case <-j.stop:
				return
			case <-tick.C:
				if j.err = j.save(); j.err != nil {
					return
				}
			}
		}
	})
	return j, nil
}

var errNewPlan = errors.New("there is no state of the same work")

// load sets the chains as the journal says. After an error some of them are wrong.
func (j *journal) load() error {
	f, err := os.Open(j.path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() > maxJournal {
		return errNewPlan
	}
	var file journalFile
	if err := json.NewDecoder(f).Decode(&file); err != nil {
		return err
	}
	if file.Version != journalVersion || file.Plan != j.plan {
		return errNewPlan
	}
	for _, c := range file.Chains {
		if c.File < 0 || c.File >= len(j.p.list) {
			return errNewPlan
		}
		n := j.p.list[c.File]
		if c.Next < n.chain.next || c.Next > n.chain.end {
			return errNewPlan
		}
		if err := n.chain.hash.UnmarshalBinary(c.State); err != nil {
			return err
		}
		n.chain.next = c.Next
		// What is there must be what was written: at least at the end of it.
		if c.Next > uint64(n.block)/groupBlocks {
			if err := j.check(c.Next - 1); err != nil {
				return err
			}
		}
	}
	return nil
}

// check compares a group on the unfinished disk with its leaf.
func (j *journal) check(g uint64) error {
	buf := make([]byte, min(groupBlocks, j.p.end-g*groupBlocks)*verity.BlockSize)
	want := make([]byte, verity.BlockSize)
	if _, err := j.p.file.ReadAt(buf, verity.DataOffset+int64(g)*groupSize); err != nil {
		return err
	}
	blocks, err := j.p.imageBlocks()
	if err != nil {
		return err
	}
	if _, err := j.p.file.ReadAt(want, verity.Layout(blocks).LeavesOffset+int64(g)*verity.BlockSize); err != nil {
		return err
	}
	if !bytes.Equal(want, newHasher(j.p.o.Salt).makeLeaf(buf)) {
		return errNewPlan
	}
	return nil
}

// skip reports whether a group is done, and tells its files that it is passed over.
func (j *journal) skip(g *group) bool {
	for _, s := range g.segs {
		if !s.chain.finished(g.index) {
			return false
		}
	}
	for _, s := range g.segs {
		s.fetch.left--
	}
	return true
}

// save writes the state to stable storage.
func (j *journal) save() error {
	file := journalFile{Version: journalVersion, Plan: j.plan, Chains: []journalChain{}}
	for i, n := range j.p.list {
		next, state, err := n.chain.snapshot()
		if err != nil {
			return err
		}
		if next > uint64(n.block)/groupBlocks {
			file.Chains = append(file.Chains, journalChain{i, next, state})
		}
	}
	if err := j.p.file.Sync(); err != nil {
		return err
	}
	data, err := json.Marshal(file)
	if err != nil {
		return err
	}
	temp := j.path + ".new"
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		if e := os.Remove(temp); !errors.Is(e, fs.ErrNotExist) {
			err = errors.Join(err, e)
		}
		return err
	}
	return os.Rename(temp, j.path)
}

// close ends the saving, with a last one if the work is not done.
func (j *journal) close(unfinished bool) error {
	close(j.stop)
	j.over.Wait()
	if j.err == nil && unfinished {
		j.err = j.save()
	}
	return j.err
}
