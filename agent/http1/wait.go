package http1

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/agent/port"
)

// wait returns when the socket has something to read, which can be its end, or false
// after limit. What package tls has read is used up by then: see records and requests.
// A client that has only new keys to say has HeaderLimit from then on.
func (c *conn) wait(limit time.Duration) bool {
	c.net.SetReadDeadline(time.Now().Add(limit))
	return c.raw.Read(readable) == nil
}

// watch calls gone when the client leaves or is hung up on, until stop is called.
// Nobody else may read meanwhile. What is below may be unable to tell of a client's
// end before that of the whole connection, so a goodbye in TLS counts as well; a byte
// that is none is kept for the next request.
func (c *conn) watch(gone context.CancelFunc) (stop func()) {
	c.net.SetReadDeadline(time.Time{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if recover() != nil { // nobody else would contain it
				port.Bugs.Add(1)
				gone()
			}
		}()
		if err := c.leaves(); !errors.Is(err, os.ErrDeadlineExceeded) {
			gone()
		}
	}()
	return func() {
		c.net.SetReadDeadline(past)
		<-done
	}
}

// leaves returns when the client has left or the connection is closed, or with
// os.ErrDeadlineExceeded.
func (c *conn) leaves() error {
	if !c.kept {
		if err := c.raw.Read(readable); err != nil {
			return err
		}
		n, err := c.tls.Read(c.ahead[:])
		if c.kept = n > 0; err != nil {
			return err
		}
	}
	return c.raw.Read(left)
}

// Read reads what the client has sent.
func (c *conn) Read(p []byte) (int, error) {
	if c.kept && len(p) > 0 {
		c.kept, p[0] = false, c.ahead[0]
		return 1, nil
	}
	return c.tls.Read(p)
}

func readable(fd uintptr) bool { return poll(fd) != 0 }

// left reports whether the client sends no more, whatever is still to be read.
func left(fd uintptr) bool { return poll(fd)&^unix.POLLIN != 0 }

// past is a deadline that ends a read, and lets none begin.
var past = time.Unix(1, 0)

// poll says what there is to read: POLLIN, and others when the peer sends no more.
func poll(fd uintptr) int16 {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}}
	for {
		_, err := unix.Poll(fds, 0)
		switch err {
		case nil:
			return fds[0].Revents
		case unix.EINTR:
		default:
			return unix.POLLERR
		}
	}
}
