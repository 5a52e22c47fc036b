// Package sha256x2 computes two SHA-256 hashes at a time on one processor.
//
// A round of SHA-256 needs the one before it, so that one hash leaves most of a
// processor's SHA unit waiting; a second, independent one fits into the gaps. The
// hash trees of verity disks have as many independent hashes as they have blocks,
// and a file that is put on such a disk has one more over the same bytes.
//
// It is for the host, where disks are made and checked. Package verity, which the
// VM links too, does not import it: no assembly of ours is in the VM.
//
// With amd64's SHA extensions (and without the build tag purego) the compression
// function is blocks2, in assembly; everywhere else, and for what is left over,
// all is done by crypto/sha256. The digests are the same.
//
// Source: FIPS 180-4 sections 5.1.1 (padding), 5.3.3 (initial value) and 6.2.2 (the
// computation).
package sha256x2

import (
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"hash"
)

const (
	chunk = sha256.BlockSize // bytes that a step of the compression function takes
	size  = sha256.Size
)

// state is the hash value H of FIPS 180-4 section 6.2.2, a to h.
type state [8]uint32

// initial is H(0), FIPS 180-4 section 5.3.3.
var initial = state{
	0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
	0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
}

// Fast reports whether two hashes at a time are faster here than one after the
// other.
func Fast() bool { return fast }

// A Salted computes SHA-256(salt ‖ block) for blocks of one length, as dm-verity's
// format 1 wants it. It is for one goroutine at a time.
type Salted struct {
	salt   []byte
	length int
	one    hash.Hash
	sum    [size]byte

	start state // after the salt's whole chunks
	// What a block's message is cut into behind those: head, which begins with the
	// rest of the salt; chunks in the block itself; tail, which ends with the padding.
	rest int // bytes of salt in head; 0 if there is no head
	body int // bytes of the block behind head, in whole chunks
	lane [2]struct {
		h    state
		head [chunk]byte
		tail [2 * chunk]byte
	}
	tail int // bytes of tail: one chunk or two
}

// NewSalted returns a Salted for blocks of so many bytes, a positive multiple of 64.
func NewSalted(salt []byte, length int) *Salted {
	if length <= 0 || length%chunk != 0 {
		panic("sha256x2: the length of blocks is not a positive multiple of 64")
	}
	s := &Salted{salt: append([]byte(nil), salt...), length: length, one: sha256.New()}
	if !fast {
		return s
	}
	s.start = initial
	whole := len(salt) / chunk * chunk
	if whole > 0 {
		// Both lanes do the same: this is once for many blocks.
		other := initial
		blocks2(&s.start, &other, &s.salt[0], &s.salt[0], whole/chunk)
	}
	s.rest = len(salt) - whole
	s.body = length
	if s.rest > 0 {
		s.body -= chunk // its first chunk-rest bytes are in head, its last rest in tail
	}
	s.tail = chunk
	if s.rest+1+8 > chunk {
		s.tail = 2 * chunk
	}
	for i := range s.lane {
		l := &s.lane[i]
		copy(l.head[:], s.salt[whole:])
		l.tail[s.rest] = 0x80
		binary.BigEndian.PutUint64(l.tail[s.tail-8:], uint64(len(salt)+length)*8)
	}
	return s
}

// Sum puts the digests of the blocks in data, which is whole blocks, into digests,
// 32 bytes each, one after the other.
func (s *Salted) Sum(digests, data []byte) {
	digests, data = s.check(digests, data)
	if fast {
		for len(data) >= 2*s.length {
			s.two(digests, data)
			digests, data = digests[2*size:], data[2*s.length:]
		}
	}
	for len(data) > 0 {
		s.one.Reset()
		s.one.Write(s.salt)
		s.one.Write(data[:s.length])
		copy(digests, s.one.Sum(s.sum[:0]))
		digests, data = digests[size:], data[s.length:]
	}
}

// SumWith is Sum(digests, data) and f.Write(p), done together: for about the time
// that one of the two takes where Fast is true and they are about as long. p may
// be a part of data.
func (s *Salted) SumWith(digests, data []byte, f *Stream, p []byte) {
	digests, data = s.check(digests, data)
	if n := min(len(p), f.missing()); n > 0 {
		f.Write(p[:n])
		p = p[n:]
	}
	per := s.chunks() * chunk // bytes of p that go with a block
	if fast && len(p) >= per && len(data) > 0 {
		if h, ok := f.load(); ok {
			n := 0
			for len(data) > 0 && len(p)-n >= per {
				s.withStream(digests, data, &h, p[n:n+per])
				n += per
				digests, data = digests[size:], data[s.length:]
			}
			f.store(&h, n)
			p = p[n:]
		}
	}
	f.Write(p)
	s.Sum(digests, data)
}

// check returns data, and the part of digests that belongs to it.
func (s *Salted) check(digests, data []byte) ([]byte, []byte) {
	if len(data)%s.length != 0 {
		panic("sha256x2: data is not whole blocks")
	}
	return digests[:len(data)/s.length*size], data
}

// chunks is how many chunks follow start in the message of one block.
func (s *Salted) chunks() int {
	n := (s.body + s.tail) / chunk
	if s.rest > 0 {
		n++
	}
	return n
}

// begin prepares a lane for a block and returns the block's whole chunks.
func (s *Salted) begin(i int, block []byte) *byte {
	l := &s.lane[i]
	l.h = s.start
	if s.rest == 0 {
		return &block[0]
	}
	copy(l.head[s.rest:], block)
	copy(l.tail[:s.rest], block[s.length-s.rest:s.length])
	if s.body == 0 { // nothing is read there
		return &l.head[0]
	}
	return &block[chunk-s.rest]
}

func (s *Salted) end(i int, digest []byte) {
	for j, v := range s.lane[i].h {
		binary.BigEndian.PutUint32(digest[4*j:], v)
	}
}

// two hashes the first two blocks of data.
func (s *Salted) two(digests, data []byte) {
	a, b := &s.lane[0], &s.lane[1]
	bodyA, bodyB := s.begin(0, data[:s.length]), s.begin(1, data[s.length:2*s.length])
	if s.rest > 0 {
		blocks2(&a.h, &b.h, &a.head[0], &b.head[0], 1)
	}
	blocks2(&a.h, &b.h, bodyA, bodyB, s.body/chunk)
	blocks2(&a.h, &b.h, &a.tail[0], &b.tail[0], s.tail/chunk)
	s.end(0, digests[:size])
	s.end(1, digests[size:2*size])
}

// withStream hashes the first block of data while h takes p, chunks chunks.
func (s *Salted) withStream(digests, data []byte, h *state, p []byte) {
	a := &s.lane[0]
	body := s.begin(0, data[:s.length])
	if s.rest > 0 {
		blocks2(&a.h, h, &a.head[0], &p[0], 1)
		p = p[chunk:]
	}
	blocks2(&a.h, h, body, &p[0], s.body/chunk)
	p = p[s.body:]
	blocks2(&a.h, h, &a.tail[0], &p[0], s.tail/chunk)
	s.end(0, digests[:size])
}

// A Stream is a running SHA-256 that Salted.SumWith can advance. As a hash.Hash,
// and in its encoded state, it is crypto/sha256's.
type Stream struct {
	hash.Hash
	buf []byte // room for the state
}

// NewStream returns the hash of nothing yet.
func NewStream() *Stream { return &Stream{Hash: sha256.New()} }

// MarshalBinary returns the hash's state, for UnmarshalBinary of this or of
// crypto/sha256's hash.
func (f *Stream) MarshalBinary() ([]byte, error) {
	return f.Hash.(encoding.BinaryMarshaler).MarshalBinary()
}

// UnmarshalBinary sets the state to one that MarshalBinary returned.
func (f *Stream) UnmarshalBinary(state []byte) error {
	return f.Hash.(encoding.BinaryUnmarshaler).UnmarshalBinary(state)
}

// crypto/sha256 encodes its state as a magic word, H, the bytes of a chunk that is
// not full, and the length so far in bytes; numbers are big-endian.
const (
	stateMagic  = "sha\x03"
	stateLength = len(stateMagic) + size + chunk + 8
)

// encoded returns the state in f.buf, or false if it does not look as expected.
func (f *Stream) encoded() (length uint64, ok bool) {
	appender, ok := f.Hash.(encoding.BinaryAppender)
	if !ok {
		return 0, false
	}
	buf, err := appender.AppendBinary(f.buf[:0])
	if err != nil || len(buf) != stateLength || string(buf[:len(stateMagic)]) != stateMagic {
		return 0, false
	}
	f.buf = buf
	return binary.BigEndian.Uint64(buf[stateLength-8:]), true
}

// missing is how many bytes complete a chunk that has been begun.
func (f *Stream) missing() int {
	length, ok := f.encoded()
	if !ok {
		return 0
	}
	return int(-length % chunk)
}

// load returns H, if no chunk has been begun.
func (f *Stream) load() (h state, ok bool) {
	length, ok := f.encoded()
	if !ok || length%chunk != 0 {
		return h, false
	}
	for i := range h {
		h[i] = binary.BigEndian.Uint32(f.buf[len(stateMagic)+4*i:])
	}
	return h, true
}

// store sets H, which has come n bytes further since load.
func (f *Stream) store(h *state, n int) {
	for i, v := range h {
		binary.BigEndian.PutUint32(f.buf[len(stateMagic)+4*i:], v)
	}
	length := f.buf[stateLength-8:]
	binary.BigEndian.PutUint64(length, binary.BigEndian.Uint64(length)+uint64(n))
	if err := f.UnmarshalBinary(f.buf); err != nil {
		panic("sha256x2: " + err.Error()) // it was crypto/sha256's own, but for the numbers
	}
}
