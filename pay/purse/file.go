package purse

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"chrysalis/channel/voucher"
	"chrysalis/outfile"
)

// The file is a line that names the network and the key, and then a line for each
// record: the CRC-32C of the rest (8 hexadecimal digits), a space, and JSON. A record
// holds the whole of what it is about. What follows the last line's end was being
// written when the process was killed, and so was never given out; anything else that
// does not read is damage, since to go on without it could mean to sign less than
// before.
const (
	header   = "chrysalis/purse/1"
	fileName = "purse.log"
	lockName = "lock"
	maxFile  = 64 << 20
	maxLine  = 64 << 10

	compactSize = 4 << 20 // a file that has grown by more is written anew
)

// record is what one line of the file holds.
type record struct {
	Accounts []accountRecord   `json:"accounts,omitempty"`
	Bars     []Bar             `json:"bars,omitempty"`
	Forgiven []voucher.Channel `json:"forgiven,omitempty"` // payees
}

type accountRecord struct {
	Channel voucher.Channel `json:"channel"`
	Payee   voucher.Channel `json:"payee"` // 0:HEX
	Worker  string          `json:"worker"`
	Signed  uint64          `json:"signed"`
	Taken   uint64          `json:"taken"`
	Used    uint64          `json:"used"`
	Step    uint64          `json:"step,omitempty"`
	Dirty   bool            `json:"dirty,omitempty"`
	Gone    bool            `json:"gone,omitempty"`
}

func (a *Account) record() accountRecord {
	return accountRecord{a.id, voucher.Channel(a.payee), a.worker, a.signed, a.taken, a.used, a.step, a.dirty, false}
}

// state is what a file says.
type state struct {
	accounts map[voucher.Channel]accountRecord
	bars     map[[32]byte]Bar
	mend     bool // the last line has no end
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encode(r record) ([]byte, error) {
	body, err := json.Marshal(r)
	if err == nil && len(body) > maxLine {
		err = fmt.Errorf("a record of %d bytes", len(body))
	}
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%08x %s\n", crc32.Checksum(body, castagnoli), body), nil
}

// decode reads a line without its end.
func decode(line []byte) (r record, err error) {
	if len(line) < 9 || line[8] != ' ' || len(line) > maxLine+9 {
		return r, errors.New("it is malformed")
	}
	body := line[9:]
	if string(line[:8]) != fmt.Sprintf("%08x", crc32.Checksum(body, castagnoli)) {
		return r, errors.New("its checksum is wrong")
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		return r, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return r, errors.New("something follows it")
	}
	return r, nil
}

// read reads a file. end is how much of it is whole.
func read(data []byte, title string) (s state, end int, err error) {
	s = state{map[voucher.Channel]accountRecord{}, map[[32]byte]Bar{}, false}
	for number := 1; ; number++ {
		length := bytes.IndexByte(data[end:], '\n')
		if length < 0 {
			break
		}
		line := data[end : end+length]
		if number == 1 {
			if string(line) != title {
				return s, 0, fmt.Errorf("it begins with %.160q, expected %q", line, title)
			}
		} else {
			r, err := decode(line)
			if err == nil {
				err = s.apply(r)
			}
			if err != nil {
				return s, 0, fmt.Errorf("line %d: %w", number, err)
			}
		}
		end += length + 1
	}
	// A last line of which the end alone is missing may have been given out.
	if tail := data[end:]; end > 0 && len(tail) > 1 {
		r, err := decode(tail)
		if err != nil {
			r, err = decode(tail[:len(tail)-1])
		}
		if err == nil {
			if err := s.apply(r); err != nil {
				return s, 0, fmt.Errorf("its last line: %w", err)
			}
			s.mend = true
		}
	}
	return s, end, nil
}

// apply takes a record over. What was signed or taken never becomes less.
func (s *state) apply(r record) error {
	for _, a := range r.Accounts {
		before, known := s.accounts[a.Channel]
		switch {
		case a.Gone:
			delete(s.accounts, a.Channel)
			continue
		case known && (before.Payee != a.Payee || before.Worker != a.Worker):
			return fmt.Errorf("channel %v has another payee or worker than before", a.Channel)
		case known && a.Signed < before.Signed:
			return fmt.Errorf("channel %v: %d is signed, after %d", a.Channel, a.Signed, before.Signed)
		case a.Taken > a.Signed:
			return fmt.Errorf("channel %v: %d is taken of %d that are signed", a.Channel, a.Taken, a.Signed)
		}
		s.accounts[a.Channel] = a
	}
	for _, b := range r.Bars {
		s.bars[b.Payee] = b
	}
	for _, payee := range r.Forgiven {
		delete(s.bars, payee)
	}
	return nil
}

// Open opens the purse of a key and a network in a folder, or makes it. So many
// nanotons can be signed until it is closed. The errors are ErrLocked where a process
// has it open, and ErrDamaged.
func Open(dir string, globalID int32, key ed25519.PrivateKey, budget uint64) (*Purse, error) {
	if err := voucher.CheckKey(voucher.Key(key.Public().(ed25519.PublicKey))); err != nil {
		return nil, err
	}
	p := &Purse{
		path: filepath.Join(dir, fileName), globalID: globalID, key: key, now: time.Now, budget: budget,
		accounts: map[voucher.Channel]*Account{}, bars: map[[32]byte]Bar{},
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	var err error
	if p.lock, err = outfile.Lock(filepath.Join(dir, lockName)); errors.Is(err, outfile.ErrLocked) {
		return nil, fmt.Errorf("%w: %s", ErrLocked, dir)
	} else if err != nil {
		return nil, err
	}
	if err := p.open(); err != nil {
		p.lock.Close()
		return nil, err
	}
	return p, nil
}

func (p *Purse) title() string {
	key := p.Key()
	return header + " " + strconv.Itoa(int(p.globalID)) + " " + hex.EncodeToString(key[:])
}

func (p *Purse) open() error {
	data, err := outfile.Read(p.path, maxFile)
	if errors.Is(err, outfile.ErrNoFile) {
		return fmt.Errorf("%w: %s is not a purse's file", ErrDamaged, p.path)
	}
	if errors.Is(err, os.ErrNotExist) {
		return p.rewrite()
	}
	if err != nil {
		return err
	}
	s, end, err := read(data, p.title())
	if err == nil && end == 0 {
		err = errors.New("it has no first line")
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %w; close its channels with 'chrysalis channel close' and move the file away to begin a new one, or put a copy back that is not older than the last voucher", ErrDamaged, p.path, err)
	}
	for id, r := range s.accounts {
		p.accounts[id] = &Account{
			purse: p, id: id, payee: r.Payee, worker: r.Worker, signed: r.Signed, taken: r.Taken, used: r.Used, step: r.Step, dirty: r.Dirty, running: map[*Request]bool{},
		}
	}
	p.bars = s.bars
	if len(data) > compactSize || s.mend {
		return p.rewrite()
	}
	f, err := os.OpenFile(p.path, os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err = f.Truncate(int64(end)); err == nil {
		_, err = f.Seek(int64(end), io.SeekStart)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		f.Close()
		return err
	}
	p.file, p.size = f, int64(end)
	return nil
}

// rewrite writes the whole to a new file in place of the old one.
func (p *Purse) rewrite() error {
	out := []byte(p.title() + "\n")
	put := func(r record) error {
		line, err := encode(r)
		out = append(out, line...)
		return err
	}
	for _, a := range p.accounts {
		if err := put(record{Accounts: []accountRecord{a.record()}}); err != nil {
			return err
		}
	}
	for _, b := range p.bars {
		if err := put(record{Bars: []Bar{b}}); err != nil {
			return err
		}
	}
	if err := outfile.Write(p.path, out, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(p.path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if p.file != nil {
		p.file.Close()
	}
	p.file, p.size, p.base = f, int64(len(out)), int64(len(out))
	return nil
}

// append writes a record; durable waits until it is on disk. After an error nothing
// more is written, since what the file holds is not known.
func (p *Purse) append(durable bool, r record) error {
	if p.broken != nil {
		return p.broken
	}
	err := os.ErrClosed
	var line []byte
	if p.file != nil {
		line, err = encode(r)
	}
	if err == nil {
		_, err = p.file.Write(line)
	}
	if err == nil && durable {
		err = p.file.Sync()
	}
	if err == nil {
		if p.size += int64(len(line)); p.size > compactSize+p.base {
			// The record once more, since what it says may not be in memory yet.
			if err = p.rewrite(); err == nil {
				_, err = p.file.Write(line)
				err = errors.Join(err, p.file.Sync())
			}
		}
	}
	if err != nil {
		p.broken = fmt.Errorf("%w: %w", ErrBroken, err)
		return p.broken
	}
	return nil
}

// Forget takes a channel that is closed off the purse. Its address must never be used
// again, which a new salt for each channel sees to.
func (p *Purse) Forget(id voucher.Channel) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.accounts[id]
	if a == nil {
		return nil
	}
	if len(a.running) > 0 {
		return fmt.Errorf("requests run on the channel %v", id)
	}
	r := a.record()
	r.Gone = true
	if err := p.append(true, record{Accounts: []accountRecord{r}}); err != nil {
		return err
	}
	delete(p.accounts, id)
	return nil
}

// Close closes the purse. What was signed is on disk already.
func (p *Purse) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var failed error
	for _, a := range p.accounts {
		if _, doubted := a.doubted(); a.dirty && a.known && len(a.running) == 0 && doubted == 0 {
			a.dirty = false
			failed = errors.Join(failed, p.append(false, record{Accounts: []accountRecord{a.record()}}))
		}
	}
	if p.file != nil {
		failed = errors.Join(failed, p.file.Sync(), p.file.Close())
		p.file = nil
	}
	return errors.Join(failed, p.lock.Close())
}
