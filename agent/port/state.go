package port

import (
	"context"
	"slices"
	"sync"
	"time"

	"chrysalis/guest"
)

// State is what the agent tells its host about itself. Its methods never wait
// for a reader.
type State struct {
	start    time.Time
	counters func() guest.CounterTable

	mu        sync.Mutex
	status    guest.Status
	phaseAt   time.Time
	inPhase   bool
	serving   bool
	engine    bool
	changed   chan struct{} // closed at the next change
	delivered chan struct{} // closed when a reader has the reason
}

// NewState returns the state of a VM that runs the named image. start is the
// time of PID 1's first instruction, kernel the time that the kernel took until
// then. counters is called for each status document and may be nil.
func NewState(image string, start time.Time, kernel time.Duration, counters func() guest.CounterTable) *State {
	if counters == nil {
		counters = func() guest.CounterTable { return guest.CounterTable{} }
	}
	return &State{
		start:    start,
		counters: counters,
		status: guest.Status{
			Version:  1,
			Image:    image,
			KernelMS: kernel.Milliseconds(),
			Phases:   []guest.PhaseTime{},
		},
		changed:   make(chan struct{}),
		delivered: make(chan struct{}),
	}
}

// Begin says that a phase begins, and so that the one before it is finished.
func (s *State) Begin(phase guest.Phase) {
	s.change(func(status *guest.Status) {
		s.finishPhase(status)
		status.Phase = phase
		s.phaseAt, s.inPhase = time.Now(), true
	})
}

// FinishPhase says that the last phase that began is finished. It stays the
// current one.
func (s *State) FinishPhase() { s.change(s.finishPhase) }

func (s *State) finishPhase(status *guest.Status) {
	if s.inPhase {
		status.Phases = append(status.Phases, guest.PhaseTime{Name: status.Phase, MS: time.Since(s.phaseAt).Milliseconds()})
		s.inPhase = false
	}
}

// SetServing says that clients are being served from now on.
func (s *State) SetServing() {
	s.change(func(*guest.Status) { s.serving = true })
}

// SetEngine says whether the engine answers.
func (s *State) SetEngine(up bool) {
	s.change(func(*guest.Status) { s.engine = up })
}

// Drain says that no new requests are admitted from now on.
func (s *State) Drain() {
	s.change(func(status *guest.Status) { status.Draining = true })
}

// End says why the VM is about to end. The first reason stays: what fails later
// is usually its consequence.
func (s *State) End(reason guest.Reason) {
	s.change(func(status *guest.Status) {
		if status.Reason == guest.ReasonNone {
			status.Reason = reason
		}
	})
}

// MissRIMs says which reference manifests of the GPUs nobody has given.
func (s *State) MissRIMs(names []string) {
	s.change(func(status *guest.Status) { status.RIMs = slices.Clone(names) })
}

func (s *State) change(edit func(*guest.Status)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	edit(&s.status)
	s.status.Ready = s.serving && s.engine && s.status.Reason == guest.ReasonNone
	close(s.changed)
	s.changed = make(chan struct{})
}

// Status returns the status document of this moment.
func (s *State) Status() guest.Status {
	status, _ := s.watch()
	return status
}

// watch returns the status and a channel that is closed when it has changed. A
// reader that is slow sees the latest status next and not every one in between,
// so nothing is queued for it.
func (s *State) watch() (guest.Status, <-chan struct{}) {
	s.mu.Lock()
	status, changed := s.status, s.changed
	status.Phases = slices.Clone(status.Phases)
	s.mu.Unlock()
	// Outside the lock: counters is the agent's code and may call back.
	status.UptimeMS = time.Since(s.start).Milliseconds()
	status.Counters = s.counters()
	return status, changed
}

// WaitDelivered waits until at least one event reader has been given the reason
// that the VM ends for, and reports whether one has before ctx was done. Only
// then is it safe to power off: what is still in the guest's vsock queue is lost.
func (s *State) WaitDelivered(ctx context.Context) bool {
	select {
	case <-s.delivered:
		return true
	case <-ctx.Done():
		return false
	}
}

func (s *State) markDelivered() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.delivered:
	default:
		close(s.delivered)
	}
}
