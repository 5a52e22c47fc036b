package port

import "sync"

// LogSize is how much of the engine's latest output a Log keeps, in bytes.
const LogSize = 64 << 10

// Log is a ring of the engine's latest output. It is an io.Writer that never
// blocks and never fails, so that a peer that reads slowly, or not at all, cannot
// hold up the engine: what such a reader misses is lost to it.
//
// The zero value is ready for use.
type Log struct {
	mu     sync.Mutex
	ring   []byte
	end    int64         // bytes written since boot; the next one goes to end % LogSize
	more   chan struct{} // closed at the next write or at Close, then nil
	closed bool
}

// Write keeps the last LogSize bytes, or none after Close.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return len(p), nil
	}
	if l.ring == nil {
		l.ring = make([]byte, LogSize)
	}
	tail := p[max(0, len(p)-LogSize):]
	l.end += int64(len(p) - len(tail))
	for len(tail) > 0 {
		n := copy(l.ring[l.end%LogSize:], tail)
		tail, l.end = tail[n:], l.end+int64(n)
	}
	l.wake()
	return len(p), nil
}

// Close forgets what was written and discards what will be. It is called before
// the first byte of a client is read: from then on the output may hold parts of a
// prompt. It cannot be undone, and it may be called again.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	clear(l.ring)
	l.ring = nil
	l.wake()
	return nil
}

func (l *Log) wake() {
	if l.more != nil {
		close(l.more)
		l.more = nil
	}
}

// read copies what was written from position at on, or from the oldest byte
// that is still there, and returns the position after it. With nothing to copy it
// returns a channel that is closed when that may have changed.
func (l *Log) read(at int64, p []byte) (n int, next int64, more <-chan struct{}, closed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, at, nil, true
	}
	at = max(at, l.end-LogSize)
	for n < len(p) && at < l.end {
		from := at % LogSize
		c := copy(p[n:], l.ring[from:min(LogSize, from+l.end-at)])
		n, at = n+c, at+int64(c)
	}
	if n == 0 {
		if l.more == nil {
			l.more = make(chan struct{})
		}
		more = l.more
	}
	return n, at, more, false
}
