package lite

import (
	"context"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/xssnick/tonutils-go/adnl"
	"github.com/xssnick/tonutils-go/adnl/keys"
	"github.com/xssnick/tonutils-go/liteclient"
	"github.com/xssnick/tonutils-go/tl"
	"github.com/xssnick/tonutils-go/ton"
)

// maxAnswer bounds one answer of a liteserver, in bytes. Sixteen links of a proof
// with the mainnet's validators are 700 kB.
const maxAnswer = 4 << 20

// A conn is a connection to one liteserver: ADNL over TCP, one query at a time.
//
// tonutils-go has a client too. It parses what the server sends in a goroutine of
// its own, where a panic cannot be caught; here that happens in the caller's, after
// the size is known.
type conn struct {
	server Liteserver

	mu     sync.Mutex
	tcp    net.Conn
	in     cipher.Stream
	out    cipher.Stream
	closed bool

	received atomic.Int64 // bytes
}

// Constructors of the messages that frame an answer.
const (
	adnlAnswer = 0x0fac8416 // adnl.message.answer query_id:int256 answer:bytes
	tcpPong    = 0xdc69fb03 // tcp.pong random_id:long
)

var errClosed = errors.New("the client is closed")

// dial connects, if there is no connection, and shakes hands.
func (c *conn) dial(ctx context.Context) error {
	if c.closed {
		return errClosed
	}
	if c.tcp != nil {
		return nil
	}
	var d net.Dialer
	tcp, err := d.DialContext(ctx, "tcp", c.server.Address)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { tcp.SetDeadline(time.Unix(1, 0)) })
	err = c.handshake(tcp)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		tcp.Close()
		return fmt.Errorf("handshake: %w", err)
	}
	c.tcp = tcp
	return nil
}

// handshake sends the session's keys, encrypted for the server, and waits for an
// empty packet.
func (c *conn) handshake(tcp net.Conn) error {
	_, own, err := ed25519.GenerateKey(nil)
	if err != nil {
		return err
	}
	shared, err := keys.SharedKey(own, c.server.Key)
	if err != nil {
		return err
	}
	var session [160]byte
	rand.Read(session[:])
	sum := sha256.Sum256(session[:])
	key := append(append([]byte(nil), shared[:16]...), sum[16:32]...)
	iv := append(append([]byte(nil), sum[:4]...), shared[20:32]...)
	wrap, err := keys.NewCipherCtr(key, iv)
	if err != nil {
		return err
	}
	if c.in, err = keys.NewCipherCtr(session[:32], session[64:80]); err != nil {
		return err
	}
	if c.out, err = keys.NewCipherCtr(session[32:64], session[80:96]); err != nil {
		return err
	}
	id, err := tl.Hash(keys.PublicKeyED25519{Key: c.server.Key})
	if err != nil {
		return err
	}
	hello := append(append([]byte(nil), id...), own.Public().(ed25519.PublicKey)...)
	hello = append(hello, sum[:]...)
	wrap.XORKeyStream(session[:], session[:])
	if _, err := tcp.Write(append(hello, session[:]...)); err != nil {
		return err
	}
	payload, err := c.read(tcp)
	if err == nil && len(payload) != 0 {
		err = errors.New("the answer is not empty")
	}
	return err
}

// read reads one packet: size, nonce, payload, SHA-256.
func (c *conn) read(tcp net.Conn) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(tcp, size[:]); err != nil {
		return nil, err
	}
	c.in.XORKeyStream(size[:], size[:])
	n := binary.LittleEndian.Uint32(size[:])
	if n < 64 || n > maxAnswer {
		return nil, fmt.Errorf("a packet of %d bytes; at most %d are read", n, maxAnswer)
	}
	// Memory grows with what comes, not with what is announced.
	packet, err := io.ReadAll(io.LimitReader(tcp, int64(n)))
	if err != nil {
		return nil, err
	}
	c.received.Add(int64(len(packet)) + 4)
	if len(packet) != int(n) {
		return nil, io.ErrUnexpectedEOF
	}
	c.in.XORKeyStream(packet, packet)
	body := packet[:n-32]
	if sha256.Sum256(body) != [32]byte(packet[n-32:]) {
		return nil, errors.New("a packet's checksum is wrong")
	}
	return body[32:], nil
}

func (c *conn) write(payload []byte) error {
	packet := binary.LittleEndian.AppendUint32(make([]byte, 0, 4+64+len(payload)), uint32(64+len(payload)))
	var nonce [32]byte
	rand.Read(nonce[:])
	packet = append(append(packet, nonce[:]...), payload...)
	sum := sha256.Sum256(packet[4:])
	packet = append(packet, sum[:]...)
	c.out.XORKeyStream(packet, packet)
	_, err := c.tcp.Write(packet)
	return err
}

// ask sends a query and returns the bytes of the answer. After an error the
// connection is given up, and the next query makes another.
func (c *conn) ask(ctx context.Context, query tl.Serializable) (answer []byte, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var id [32]byte
	rand.Read(id[:])
	message, err := tl.Serialize(adnl.MessageQuery{ID: id[:], Data: liteclient.LiteServerQuery{Data: query}}, true)
	if err != nil {
		return nil, err
	}
	if err := c.dial(ctx); err != nil {
		return nil, err
	}
	tcp := c.tcp
	stop := context.AfterFunc(ctx, func() { tcp.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() || err != nil {
			tcp.Close()
			c.tcp = nil
			if ctx.Err() != nil && err != nil {
				err = fmt.Errorf("no answer in time: %w", ctx.Err())
			}
		}
	}()
	if err := c.write(message); err != nil {
		return nil, err
	}
	for {
		payload, err := c.read(c.tcp)
		if err != nil {
			return nil, err
		}
		if len(payload) < 4 {
			continue // nothing in it
		}
		switch binary.LittleEndian.Uint32(payload) {
		case tcpPong:
			continue
		case adnlAnswer:
			if len(payload) < 36 {
				return nil, errors.New("an answer that is cut short")
			}
			if [32]byte(payload[4:36]) != id {
				continue // to a query that was given up
			}
			return tlBytes(payload[36:])
		default:
			return nil, fmt.Errorf("a message of an unknown kind, %08x", payload[:4])
		}
	}
}

// tlBytes reads the one field of type bytes that ends a message.
func tlBytes(b []byte) ([]byte, error) {
	short := errors.New("an answer that is cut short")
	if len(b) == 0 {
		return nil, short
	}
	n, skip := int(b[0]), 1
	if n == 0xfe {
		if len(b) < 4 {
			return nil, short
		}
		n, skip = int(b[1])|int(b[2])<<8|int(b[3])<<16, 4
	} else if n == 0xff {
		return nil, errors.New("an answer with a length that TL does not have")
	}
	if len(b) != (skip+n+3)/4*4 {
		return nil, short
	}
	return b[skip : skip+n], nil
}

func (c *conn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.tcp != nil {
		c.tcp.Close()
		c.tcp = nil
	}
}

// An Error is a liteserver's own word that it cannot answer.
type Error struct {
	Code int32
	Text string
}

func (e *Error) Error() string { return fmt.Sprintf("it says %q (code %d)", clip(e.Text), e.Code) }

// clip keeps what somebody else made short.
func clip(s string) string {
	if len(s) > 160 {
		s = s[:160] + "…"
	}
	return s
}

// parse reads an answer of one type.
func parse[T any](answer []byte) (out T, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the answer is malformed: %v", r)
		}
	}()
	var value any
	rest, err := tl.Parse(&value, answer, true)
	if err != nil {
		return out, errors.New(clip("the answer is malformed: " + err.Error()))
	}
	if len(rest) != 0 {
		return out, errors.New("the answer is malformed: something follows it")
	}
	switch v := value.(type) {
	case T:
		return v, nil
	case ton.LSError:
		return out, &Error{v.Code, v.Text}
	}
	return out, fmt.Errorf("the answer is of another type, %T", value)
}

// checked runs a check on bytes that somebody else made; a panic is an error.
func checked(what string, f func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%s: malformed: %v", what, r)
		}
	}()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
