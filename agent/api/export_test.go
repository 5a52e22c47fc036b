package api

import "time"

// SetPaymentLimits changes how long requests wait for an admission, for a voucher to
// be durable, and for cover.
func (s *Server) SetPaymentLimits(admit, durable, cover time.Duration) {
	s.till.admitLimit, s.till.durableLimit, s.till.coverLimit = admit, durable, cover
}
