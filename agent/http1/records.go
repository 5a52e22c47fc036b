package http1

import (
	"encoding/binary"
	"net"
)

// records is a connection below TLS that is read by one record at a time (RFC 8446,
// section 5.1). Package tls reads on for as long as it has room, and would have the
// beginning of the next request while its socket says that there is nothing to read.
type records struct {
	net.Conn
	header [5]byte
	have   int // bytes of the header
	left   int // bytes of the record
}

func (r *records) Read(p []byte) (int, error) {
	if r.left > 0 {
		n, err := r.Conn.Read(p[:min(len(p), r.left)])
		r.left -= n
		return n, err
	}
	n, err := r.Conn.Read(p[:min(len(p), len(r.header)-r.have)])
	r.have += copy(r.header[r.have:], p[:n])
	if r.have == len(r.header) {
		r.have, r.left = 0, int(binary.BigEndian.Uint16(r.header[3:]))
	}
	return n, err
}
