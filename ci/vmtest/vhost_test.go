package vmtest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// vsockDevice is the host's half of a virtio-vsock device, in the hands of an
// attacker: QEMU speaks vhost-user to it (QEMU's docs/interop/vhost-user.rst),
// and it reads and writes the VM's split virtqueues (VIRTIO 1.3, section 2.7).
// What is at all correct is there so that the VM can be asked how it is.
type vsockDevice struct {
	errs chan error // why it no longer works

	mu      sync.Mutex
	regions []memoryRegion
	rx, tx  ring
	ready   bool // both rings have been started

	streams sync.Map // by our port: *stream
	sent    atomic.Int64
}

type memoryRegion struct {
	guest, user, size uint64 // where the VM and QEMU have it
	data              []byte
}

// ring is a virtqueue: of 16-byte descriptors, little-endian throughout.
type ring struct {
	num               int
	desc, avail, used []byte
	kick, call        int
	taken             uint16 // of the buffers that the VM has given
	idx               uint16 // of the used ring
}

// packet is the header of a packet: VIRTIO 1.3, section 5.10.6.
type packet struct {
	SrcCID, DstCID   uint64
	SrcPort, DstPort uint32
	Len              uint32
	Type, Op         uint16
	Flags            uint32
	BufAlloc, FwdCnt uint32
}

const (
	packetSize = 44
	guestCID   = 3

	opRequest, opResponse, opReset, opShutdown, opData, opCreditUpdate, opCreditRequest = 1, 2, 3, 4, 5, 6, 7
)

func (p packet) encode(payload []byte) []byte {
	b := make([]byte, 0, packetSize+len(payload))
	b, _ = binary.Append(b, binary.LittleEndian, p)
	return append(b, payload...)
}

// serveVsock takes QEMU's connection and serves it until it ends.
func serveVsock(ln net.Listener) *vsockDevice {
	d := &vsockDevice{errs: make(chan error, 4)}
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			d.errs <- err
			return
		}
		defer conn.Close()
		d.errs <- d.serve(conn.(*net.UnixConn))
	}()
	return d
}

// serve answers QEMU's requests.
func (d *vsockDevice) serve(conn *net.UnixConn) error {
	for {
		head, oob := make([]byte, 12), make([]byte, 256)
		n, oobn, _, _, err := conn.ReadMsgUnix(head, oob)
		if err != nil || n != len(head) {
			return fmt.Errorf("QEMU: %v", err)
		}
		var fds []int
		messages, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for _, m := range messages {
			more, _ := unix.ParseUnixRights(&m)
			fds = append(fds, more...)
		}
		request, size := binary.LittleEndian.Uint32(head), binary.LittleEndian.Uint32(head[8:])
		body := make([]byte, min(size, 4096))
		for at := 0; at < len(body); {
			n, err := conn.Read(body[at:])
			if err != nil {
				return err
			}
			at += n
		}
		reply, err := d.handle(request, body, fds)
		if err != nil {
			return err
		}
		if reply != nil {
			out := binary.LittleEndian.AppendUint32(nil, request)
			out = binary.LittleEndian.AppendUint32(out, 1|4) // version 1, a reply
			out = binary.LittleEndian.AppendUint32(out, uint32(len(reply)))
			if _, err := conn.Write(append(out, reply...)); err != nil {
				return err
			}
		}
	}
}

func (d *vsockDevice) handle(request uint32, body []byte, fds []int) (reply []byte, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	word := func(i int) uint32 { return binary.LittleEndian.Uint32(body[4*i:]) }
	number := func(n uint64) []byte { return binary.LittleEndian.AppendUint64(nil, n) }
	queue := func() *ring {
		if body[0] == 0 {
			return &d.rx
		}
		return &d.tx
	}
	switch request {
	case 1: // GET_FEATURES: VIRTIO_F_VERSION_1 and vhost-user's own features
		return number(1<<32 | 1<<30), nil
	case 15: // GET_PROTOCOL_FEATURES: CONFIG
		return number(1 << 9), nil
	case 24: // GET_CONFIG: the VM's CID
		copy(body[12:], number(guestCID))
		return body, nil
	case 5: // SET_MEM_TABLE; what an earlier one has mapped stays
		d.regions = nil
		for i := range int(word(0)) {
			r := body[8+32*i:]
			guest, size := binary.LittleEndian.Uint64(r), binary.LittleEndian.Uint64(r[8:])
			user, offset := binary.LittleEndian.Uint64(r[16:]), binary.LittleEndian.Uint64(r[24:])
			data, err := unix.Mmap(fds[i], 0, int(size+offset), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return nil, err
			}
			d.regions = append(d.regions, memoryRegion{guest, user, size, data[offset:]})
		}
	case 8: // SET_VRING_NUM
		queue().num = int(word(1))
	case 9: // SET_VRING_ADDR
		q := queue()
		address := func(i int) uint64 { return binary.LittleEndian.Uint64(body[8+8*i:]) }
		q.desc, q.used, q.avail = d.at(address(0)), d.at(address(1)), d.at(address(2))
		if q.desc == nil || q.used == nil || q.avail == nil {
			return nil, errors.New("a ring is nowhere in memory")
		}
	case 10: // SET_VRING_BASE
		queue().taken, queue().idx = uint16(word(1)), uint16(word(1))
	case 11: // GET_VRING_BASE
		d.ready = false
		return append(binary.LittleEndian.AppendUint32(nil, word(0)), binary.LittleEndian.AppendUint32(nil, uint32(queue().taken))...), nil
	case 12, 13: // SET_VRING_KICK, SET_VRING_CALL
		if len(fds) == 0 {
			break
		}
		if request == 13 {
			queue().call = fds[0]
			break
		}
		queue().kick = fds[0]
		if body[0] == 1 {
			d.ready = true
			go d.transmitted(os.NewFile(uintptr(fds[0]), "kick"))
		}
	}
	return nil, nil
}

// at returns the VM's memory from an address of QEMU's on, up to its region's end.
func (d *vsockDevice) at(user uint64) []byte {
	for _, r := range d.regions {
		if user >= r.user && user-r.user < r.size {
			return r.data[user-r.user : r.size]
		}
	}
	return nil
}

// guest returns the VM's memory from an address of the VM's on, up to its
// region's end.
func (d *vsockDevice) guest(address uint64) []byte {
	for _, r := range d.regions {
		if address >= r.guest && address-r.guest < r.size {
			return r.data[address-r.guest : r.size]
		}
	}
	return nil
}

// take returns the next buffer that the VM has put into a ring.
func (d *vsockDevice) take(q *ring) (id uint16, buffers [][]byte, ok bool) {
	if q.taken == binary.LittleEndian.Uint16(q.avail[2:]) {
		return 0, nil, false
	}
	id = binary.LittleEndian.Uint16(q.avail[4+2*(int(q.taken)%q.num):])
	q.taken++
	for next, n := id, 0; n < q.num; n++ {
		desc := q.desc[16*int(next):]
		memory := d.guest(binary.LittleEndian.Uint64(desc))
		length := binary.LittleEndian.Uint32(desc[8:])
		if memory == nil || uint64(length) > uint64(len(memory)) {
			return 0, nil, false
		}
		buffers = append(buffers, memory[:length])
		if binary.LittleEndian.Uint16(desc[12:])&1 == 0 { // VIRTQ_DESC_F_NEXT
			break
		}
		next = binary.LittleEndian.Uint16(desc[14:])
	}
	return id, buffers, true
}

// give puts a buffer into the used ring, with a length that may be a lie, and
// interrupts the VM.
func (d *vsockDevice) give(q *ring, id, length uint32) {
	entry := q.used[4+8*(int(q.idx)%q.num):]
	binary.LittleEndian.PutUint32(entry, id)
	binary.LittleEndian.PutUint32(entry[4:], length)
	d.jump(q, 1)
}

// jump says that so many buffers were used.
func (d *vsockDevice) jump(q *ring, by uint16) {
	q.idx += by
	// The index comes after what it stands for: a locked exchange orders them.
	d.sent.Add(1)
	binary.LittleEndian.PutUint16(q.used[2:], q.idx)
	d.sent.Add(1)
	_, _ = unix.Write(q.call, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// send gives the VM a packet; length, unless it is below zero, is what the ring
// says of its size.
func (d *vsockDevice) send(data []byte, length int64) error {
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		d.mu.Lock()
		if !d.ready {
			d.mu.Unlock()
			continue
		}
		id, buffers, ok := d.take(&d.rx)
		if !ok {
			d.mu.Unlock()
			continue
		}
		rest := data
		for _, b := range buffers {
			rest = rest[copy(b, rest):]
		}
		if length < 0 {
			length = int64(len(data) - len(rest))
		}
		d.give(&d.rx, uint32(id), uint32(length))
		d.mu.Unlock()
		return nil
	}
	return errors.New("the VM gives no buffers any more")
}

// transmitted hands out what the VM sends.
func (d *vsockDevice) transmitted(kick *os.File) {
	for {
		if _, err := kick.Read(make([]byte, 8)); err != nil {
			// It does not block: nothing yet.
			time.Sleep(time.Millisecond)
		}
		for {
			d.mu.Lock()
			id, buffers, ok := d.take(&d.tx)
			if !ok {
				d.mu.Unlock()
				break
			}
			var data []byte
			for _, b := range buffers {
				data = append(data, b...)
			}
			d.give(&d.tx, uint32(id), 0)
			d.mu.Unlock()
			var p packet
			if n, err := binary.Decode(data, binary.LittleEndian, &p); err != nil || n != packetSize {
				d.errs <- fmt.Errorf("the VM sends %d bytes", len(data))
				continue
			}
			if s, ok := d.streams.Load(p.DstPort); ok {
				s.(*stream).got(p, data[packetSize:])
			}
		}
	}
}

// stream is a connection that the device makes to the VM.
type stream struct {
	d      *vsockDevice
	head   packet // of the packets to the VM
	mu     sync.Mutex
	data   []byte
	opened bool
	closed bool
	change chan struct{}
}

var nextPort atomic.Uint32

// open connects to a port of the VM, from a CID.
func (d *vsockDevice) open(cid uint64, port uint32, limit time.Duration) (*stream, error) {
	s := &stream{d: d, change: make(chan struct{}, 1), head: packet{
		SrcCID: cid, DstCID: guestCID, SrcPort: 10000 + nextPort.Add(1), DstPort: port, Type: 1, BufAlloc: 256 << 10,
	}}
	d.streams.Store(s.head.SrcPort, s)
	if err := s.send(opRequest, nil); err != nil {
		return nil, err
	}
	if !s.wait(limit, func() bool { return s.opened || s.closed }) || s.closed {
		return nil, errors.New("the VM does not answer, or refuses")
	}
	return s, nil
}

func (s *stream) send(op uint16, payload []byte) error {
	s.mu.Lock()
	p := s.head
	p.FwdCnt = uint32(len(s.data))
	s.mu.Unlock()
	p.Op, p.Len = op, uint32(len(payload))
	return s.d.send(p.encode(payload), -1)
}

func (s *stream) got(p packet, payload []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch p.Op {
	case opResponse:
		s.opened = true
	case opData:
		s.data = append(s.data, payload[:min(len(payload), int(p.Len))]...)
	case opReset, opShutdown:
		s.closed = true
	case opCreditRequest:
		go s.send(opCreditUpdate, nil)
	}
	select {
	case s.change <- struct{}{}:
	default:
	}
}

// wait waits until something holds, which is asked under the lock.
func (s *stream) wait(limit time.Duration, holds func() bool) bool {
	deadline := time.After(limit)
	for {
		s.mu.Lock()
		ok := holds()
		s.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-s.change:
		case <-deadline:
			return false
		}
	}
}

// status asks the VM how it is, as its launcher does.
func (d *vsockDevice) status(limit time.Duration) (string, error) {
	s, err := d.open(2, 9000, limit)
	if err != nil {
		return "", err
	}
	defer s.send(opReset, nil)
	if err := s.send(opData, []byte("GET /status HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n\r\n")); err != nil {
		return "", err
	}
	if !s.wait(limit, func() bool { return s.closed }) {
		return "", errors.New("the VM does not end its answer")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.data), nil
}
