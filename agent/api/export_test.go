package api

import "time"

// SetPaymentLimits changes how long requests wait for an admission, for a voucher to
// be durable, and for cover.
func (s *Server) SetPaymentLimits(admit, durable, cover time.Duration) {
	s.till.admitLimit, s.till.durableLimit, s.till.coverLimit = admit, durable, cover
}

// Wanted is how many channels requests wait for.
func (s *Server) Wanted() int {
	s.till.wanted.mu.Lock()
	defer s.till.wanted.mu.Unlock()
	return len(s.till.wanted.channels)
}

// HeldMemory is how many bytes bodies and answers take of the memory set aside.
func (s *Server) HeldMemory() int64 { return defaultMemory - s.memory.Load() }

// Queued is how many requests wait for a place.
func (s *Server) Queued() int { return s.queued() }
