package main

import (
	"fmt"
	"net"

	"github.com/mdlayher/vsock"
)

// listen listens on a vsock port, for peers of any CID.
func listen(port uint32) (net.Listener, error) {
	ln, err := vsock.Listen(port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return ln, nil
}

// isHost reports whether a peer is the host itself, not another VM or a
// process in this one.
func isHost(peer net.Addr) bool {
	a, ok := peer.(*vsock.Addr)
	return ok && a.ContextID == vsock.Host
}
