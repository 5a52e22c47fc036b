package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
)

// steps shows work that goes from step to step: a bar on a terminal, else a
// line when a step begins.
type steps struct {
	mu   sync.Mutex
	what string
	bar  *progressbar.ProgressBar
	tty  bool
}

func newSteps() *steps { return &steps{tty: isTerminal(os.Stderr)} }

// step says that a step has done some of its total bytes; a total of 0 is not
// known.
func (s *steps) step(what string, done, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if what != s.what {
		s.clear()
		s.what = what
		if !s.tty {
			fmt.Fprintln(os.Stderr, what)
		} else if total > 0 {
			s.bar = progressbar.NewOptions64(total, progressbar.OptionSetDescription(what),
				progressbar.OptionSetWriter(os.Stderr), progressbar.OptionShowBytes(true), progressbar.OptionShowCount(),
				progressbar.OptionSetWidth(20), progressbar.OptionThrottle(100*time.Millisecond),
				progressbar.OptionUseANSICodes(true), progressbar.OptionClearOnFinish())
		} else {
			s.bar = progressbar.NewOptions(-1, progressbar.OptionSetDescription(what),
				progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSpinnerType(14))
			s.bar.RenderBlank()
		}
	}
	if s.bar != nil && total > 0 {
		s.bar.Set64(done)
	}
}

// done takes the bar off the screen.
func (s *steps) done() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clear()
}

func (s *steps) clear() {
	if s.bar != nil {
		s.bar.Clear()
		s.bar = nil
	}
}
