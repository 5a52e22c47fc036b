package lite

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// Seen is what a client remembers of a network, so that nobody can take it back
// in time.
type Seen struct {
	Pin      BlockID `json:"pin"`       // what everything was proved from
	KeyBlock BlockID `json:"key_block"` // the newest that was proved
	Last     BlockID `json:"last"`      // the newest block that was proved
	Time     uint32  `json:"time"`      // of that block, Unix time
}

// Memory keeps Seen between runs. Update calls change with what is there, and
// keeps what it leaves; two updates never overlap.
type Memory interface {
	Update(change func(*Seen) error) error
}

// NewMemory keeps it in this process only.
func NewMemory() Memory { return &processMemory{} }

type processMemory struct {
	mu   sync.Mutex
	seen Seen
}

func (m *processMemory) Update(change func(*Seen) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.seen
	if err := change(&next); err != nil {
		return err
	}
	m.seen = next
	return nil
}

// FileMemory keeps it in a file, which is replaced as a whole; processes that
// share it take turns.
func FileMemory(path string) Memory { return &fileMemory{path: path} }

type fileMemory struct {
	mu   sync.Mutex
	path string
}

func (m *fileMemory) Update(change func(*Seen) error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := os.MkdirAll(filepath.Dir(m.path), 0o700); err != nil {
		return err
	}
	lock, err := os.OpenFile(m.path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	var seen Seen
	data, err := os.ReadFile(m.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	default:
		// Whoever could empty this file could take the client back in time.
		if err := json.Unmarshal(data, &seen); err != nil {
			return fmt.Errorf("%s is damaged (%w); remove it to trust the pinned key block alone", m.path, err)
		}
	}
	before := seen
	if err := change(&seen); err != nil || seen == before {
		return err
	}
	if data, err = json.MarshalIndent(seen, "", "  "); err != nil {
		return err
	}
	next, err := os.CreateTemp(filepath.Dir(m.path), filepath.Base(m.path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(next.Name())
	_, err = next.Write(append(data, '\n'))
	if err := errors.Join(err, next.Sync(), next.Close()); err != nil {
		return err
	}
	return os.Rename(next.Name(), m.path)
}
