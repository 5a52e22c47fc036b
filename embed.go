// Package chrysalis carries the lock that this build of the programs belongs to,
// so that a VM can be booted without a source tree at hand.
package chrysalis

import _ "embed"

// ImageLock is image.lock.
//
//go:embed image.lock
var ImageLock []byte
