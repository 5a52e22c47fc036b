package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/outfile"
)

// The log is header, and then records: marker, the payload's length, a CRC-32C of
// these two, which tells a record that is cut short from one that is damaged (32 bits
// each, big-endian), the first 8 bytes of the payload's SHA-256, and the payload,
// JSON.
const (
	header     = "chrysalis/vouchers/1\n"
	marker     = "\xc5VR\x01"
	headSize   = len(marker) + 4 + 4 + sumSize
	sumSize    = 8
	maxPayload = 4 << 20

	// A log is written anew when it is longer than both.
	minCompact    = 1 << 20
	compactFactor = 4
	perRecord     = 256 // channels or rows, in a log that is written anew

	maxLog = 4 << 30
)

const (
	logName  = "vouchers.log"
	oldName  = "vouchers.log.old"
	nextName = "vouchers.log.next"
	lockName = "lock"
)

// record is what one record of the log holds.
type record struct {
	Channels []channelRecord `json:"channels,omitempty"`
	Rows     []Row           `json:"rows,omitempty"`
}

// row adds a row as it is now, in place of the same one before.
func (r *record) row(row *Row) {
	for i := range r.Rows {
		if r.Rows[i].Day == row.Day && r.Rows[i].Model == row.Model {
			r.Rows[i] = *row
			return
		}
	}
	r.Rows = append(r.Rows, *row)
}

// channelRecord is a channel in the log.
type channelRecord struct {
	ID       voucher.Channel `json:"id"`
	Gone     bool            `json:"gone,omitempty"`
	GlobalID int32           `json:"global_id,omitempty"`
	Key      string          `json:"key,omitempty"`
	Chain    Chain           `json:"chain"`
	Best     string          `json:"best,omitempty"`
	Since    int64           `json:"since,omitempty"`
	Settled  uint64          `json:"settled,omitempty"`
	Shares   []share         `json:"shares,omitempty"`
}

func (c *channel) record() channelRecord {
	r := channelRecord{
		ID: c.ID, GlobalID: c.GlobalID, Key: hex.EncodeToString(c.Key[:]), Chain: c.Chain,
		Since: c.Since, Settled: c.settled, Shares: slices.Clone(c.shares),
	}
	if c.Best.Total > 0 {
		r.Best = c.Best.String()
	}
	return r
}

// apply takes a record of the log into the store. A voucher whose signature is wrong
// is none, whatever the checksum says.
func (s *Store) apply(r *record) error {
	for _, row := range r.Rows {
		if len(row.Day) != len(time.DateOnly) || row.Model != NoModel && !modelRE.MatchString(row.Model) {
			return errors.New("a row that is malformed")
		}
	}
	var list []*channel
	for _, cr := range r.Channels {
		if cr.Gone {
			list = append(list, &channel{Channel: Channel{ID: cr.ID}})
			continue
		}
		key, err := hex.DecodeString(cr.Key)
		if err != nil || len(key) != len(voucher.Key{}) {
			return fmt.Errorf("channel %v has no key", cr.ID)
		}
		c := &channel{
			Channel: Channel{ID: cr.ID, GlobalID: cr.GlobalID, Key: voucher.Key(key), Chain: cr.Chain, Since: cr.Since},
			settled: cr.Settled, shares: cr.Shares,
		}
		for i, sh := range c.shares {
			c.shares[i].Model = s.row(sh.Day, sh.Model).Model // one string for all
		}
		if cr.Best != "" {
			if c.Best, err = voucher.Parse(cr.Best); err != nil {
				return err
			}
			if before := s.channels[cr.ID]; before != nil && before.Best == c.Best {
				// It has been verified.
			} else if c.Best.Channel != cr.ID || c.Best.GlobalID != cr.GlobalID || c.Best.Verify(c.Key) != nil {
				return fmt.Errorf("channel %v: %w", cr.ID, voucher.ErrSignature)
			}
			if before := s.channels[cr.ID]; before != nil && before.Best.Total > c.Best.Total {
				c.Best = before.Best
			}
		}
		list = append(list, c)
	}
	for i, c := range list {
		if r.Channels[i].Gone {
			delete(s.channels, c.ID)
		} else {
			s.channels[c.ID] = c
		}
	}
	for _, row := range r.Rows {
		*s.row(row.Day, row.Model) = row
	}
	return nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func frame(r *record) ([]byte, error) {
	payload, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("a record of %d bytes", len(payload))
	}
	sum := sha256.Sum256(payload)
	b := append(make([]byte, 0, headSize+len(payload)), marker...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(append(b, sum[:sumSize]...), payload...), nil
}

// unframe reads the record at the beginning of data, and returns its size. whole
// reports whether there is as much data as a record's head promises.
func unframe(data []byte) (r *record, size int, whole bool) {
	if len(data) < headSize || string(data[:len(marker)]) != marker {
		return nil, 0, len(data) >= headSize
	}
	length, check := binary.BigEndian.Uint32(data[len(marker):]), binary.BigEndian.Uint32(data[len(marker)+4:])
	if length > maxPayload || check != crc32.Checksum(data[:len(marker)+4], castagnoli) {
		return nil, 0, true
	}
	size = headSize + int(length)
	if len(data) < size {
		return nil, 0, false
	}
	payload := data[headSize:size]
	sum := sha256.Sum256(payload)
	if !bytes.Equal(sum[:sumSize], data[headSize-sumSize:headSize]) {
		return nil, 0, true
	}
	dec := json.NewDecoder(bytes.NewReader(payload))
	dec.DisallowUnknownFields()
	r = new(record)
	if err := dec.Decode(r); err != nil {
		return nil, 0, true
	}
	return r, size, true
}

// replay takes a log into the store. It returns how much of it is whole, and what is
// damaged. An end that is cut short is not: a process that was killed leaves one, of
// a record that nobody was told was durable.
func (s *Store) replay(data []byte) (end int, damage []string) {
	at := len(header)
	if len(data) < at || string(data[:at]) != header {
		if len(data) == 0 {
			return 0, nil
		}
		damage, at = append(damage, "its header is not one"), 0
	}
	for at < len(data) {
		r, size, whole := unframe(data[at:])
		if r != nil {
			if err := s.apply(r); err != nil {
				damage = append(damage, fmt.Sprintf("the record at byte %d: %v", at, err))
			}
			at += size
			end = at
			continue
		}
		next := s.resume(data, at+1)
		if next < 0 {
			// A file system may have made the file longer and written nothing yet.
			if whole && len(bytes.TrimRight(data[at:], "\x00")) > 0 {
				damage = append(damage, fmt.Sprintf("from byte %d to its end, %d", at, len(data)))
			}
			break
		}
		damage = append(damage, fmt.Sprintf("from byte %d to %d", at, next))
		at = next
	}
	return max(end, min(len(header), len(data))), damage
}

// resume finds the next record that is whole, or -1.
func (s *Store) resume(data []byte, at int) int {
	for at < len(data) {
		i := bytes.Index(data[at:], []byte(marker))
		if i < 0 {
			return -1
		}
		at += i
		if r, _, _ := unframe(data[at:]); r != nil {
			return at
		}
		at++
	}
	return -1
}

// Open opens the store in a folder, or makes it. Where it is damaged the last state
// that is whole is used: Damage says so, and the damaged file is kept beside it.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s := &Store{dir: dir}
	var err error
	if s.lock, err = outfile.Lock(filepath.Join(dir, lockName)); errors.Is(err, outfile.ErrLocked) {
		return nil, fmt.Errorf("%w: %s", ErrLocked, dir)
	} else if err != nil {
		return nil, err
	}
	if err := s.open(); err != nil {
		s.lock.Close()
		return nil, fmt.Errorf("the vouchers in %s: %w", dir, err)
	}
	return s, nil
}

func (s *Store) reset() {
	s.channels, s.rows, s.names = map[voucher.Channel]*channel{}, map[rowKey]*Row{}, map[string]string{}
}

func (s *Store) open() error {
	s.reset()
	path := filepath.Join(s.dir, logName)
	data, err := readLog(path)
	missing := errors.Is(err, os.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	old, oldErr := readLog(filepath.Join(s.dir, oldName))
	end, damage := s.replay(data)
	if missing && oldErr == nil {
		damage = append(damage, "it is gone, and the one before it is there")
	}
	if len(damage) > 0 {
		// The log before has what this one began with.
		s.reset()
		if oldErr == nil {
			s.replay(old)
		}
		s.replay(data)
		if !missing {
			aside := fmt.Sprintf("%s.damaged-%d", path, time.Now().UnixNano())
			if err := os.WriteFile(aside, data, 0o600); err != nil {
				return err
			}
			damage = append(damage, "the damaged file is kept as "+filepath.Base(aside))
		}
		s.damage = damage
		return s.rewrite(false)
	}
	if len(data) < len(header) { // a new one, or one that was never finished
		return s.rewrite(false)
	}
	if s.file, err = os.OpenFile(path, os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := s.file.Truncate(int64(end)); err != nil {
		return err
	}
	if _, err := s.file.Seek(int64(end), io.SeekStart); err != nil {
		return err
	}
	s.size, s.compact = int64(end), minCompact/compactFactor
	return s.file.Sync()
}

func readLog(path string) ([]byte, error) {
	data, err := outfile.Read(path, maxLog)
	if errors.Is(err, outfile.ErrNoFile) {
		return nil, fmt.Errorf("%s is not a log", path)
	}
	return data, err
}

// commit writes a record and returns when it is durable. It is called with s.mu held
// and releases it.
func (s *Store) commit(r record) error {
	if s.broken != nil {
		defer s.mu.Unlock()
		return s.broken
	}
	b, err := frame(&r)
	if err != nil {
		// What is in memory is not what is on disk any more.
		s.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		defer s.mu.Unlock()
		return s.broken
	}
	s.buffer = append(s.buffer, b...)
	s.appended++
	mine := s.appended
	s.mu.Unlock()

	// Whoever comes first writes for all that wait.
	s.io.Lock()
	defer s.io.Unlock()
	if s.synced >= mine {
		return nil
	}
	s.mu.Lock()
	if s.broken != nil {
		defer s.mu.Unlock()
		return s.broken
	}
	buffer, upTo := s.buffer, s.appended
	s.buffer = nil
	s.mu.Unlock()
	if err := s.write(buffer); err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return s.broken
	}
	s.synced = upTo
	if s.size > max(minCompact, compactFactor*s.compact) {
		// What has been acknowledged is durable, whatever becomes of this.
		return s.compactLocked()
	}
	return nil
}

func (s *Store) write(b []byte) error {
	if s.file == nil {
		return os.ErrClosed
	}
	if _, err := s.file.Write(b); err != nil {
		return err
	}
	s.size += int64(len(b))
	return s.file.Sync()
}

// Compact writes the log anew.
func (s *Store) Compact() error {
	s.io.Lock()
	defer s.io.Unlock()
	return s.compactLocked()
}

func (s *Store) compactLocked() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return s.broken
	}
	if s.file == nil {
		return os.ErrClosed
	}
	// What waits to be written is in memory, and so in what is written now.
	upTo := s.appended
	if err := s.rewrite(true); err != nil {
		s.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return s.broken
	}
	s.buffer, s.synced = nil, upTo
	return nil
}

// rewrite writes the whole state to a new log and puts it in place of the other,
// which is kept if it is to be.
func (s *Store) rewrite(keep bool) error {
	path, next, old := filepath.Join(s.dir, logName), filepath.Join(s.dir, nextName), filepath.Join(s.dir, oldName)
	f, err := os.OpenFile(next, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	size, err := s.dump(f)
	if err == nil {
		err = f.Sync()
	}
	if err == nil && keep {
		if err = os.Remove(old); errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		if err == nil {
			err = os.Link(path, old)
		}
	}
	if err == nil {
		err = os.Rename(next, path)
	}
	if err == nil {
		err = syncDir(s.dir)
	}
	if err != nil {
		f.Close()
		return err
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file, s.size, s.compact = f, size, size
	return nil
}

func (s *Store) dump(w io.Writer) (size int64, err error) {
	put := func(b []byte) error {
		n, err := w.Write(b)
		size += int64(n)
		return err
	}
	if err := put([]byte(header)); err != nil {
		return size, err
	}
	var r record
	flush := func() error {
		b, err := frame(&r)
		r = record{}
		if err != nil {
			return err
		}
		return put(b)
	}
	for _, row := range s.sortedRows() {
		if r.Rows = append(r.Rows, row); len(r.Rows) == perRecord {
			if err := flush(); err != nil {
				return size, err
			}
		}
	}
	for _, c := range s.channels {
		r.Channels = append(r.Channels, c.record())
		// One with many shares is large.
		if len(r.Channels) == perRecord || len(c.shares) > perRecord {
			if err := flush(); err != nil {
				return size, err
			}
		}
	}
	return size, flush()
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Close closes the store. Everything that was acknowledged is durable already.
func (s *Store) Close() error {
	s.io.Lock()
	defer s.io.Unlock()
	var err error
	if s.file != nil {
		err = s.file.Close()
		s.file = nil
	}
	return errors.Join(err, s.lock.Close())
}
