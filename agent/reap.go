package main

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// reaper waits for every child, the agent's own and the orphans that PID 1
// inherits. Nothing else in the agent may wait: two waiters steal each other's
// children.
var reaper = &processes{exits: map[int]chan syscall.WaitStatus{}}

type processes struct {
	mu    sync.Mutex // held over fork, so that no child is reaped before it is known
	exits map[int]chan syscall.WaitStatus
}

// fork starts a process. The channel gets its exit status, once.
func (p *processes) fork(path string, argv []string, attr *syscall.ProcAttr) (pid int, exit <-chan syscall.WaitStatus, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	pid, err = syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, err
	}
	ended := make(chan syscall.WaitStatus, 1)
	p.exits[pid] = ended
	return pid, ended, nil
}

// run reaps until the machine goes down.
func (p *processes) run() {
	children := make(chan os.Signal, 16)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		p.reap()
		<-children
	}
}

func (p *processes) reap() {
	for {
		p.mu.Lock()
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if pid > 0 {
			if exit := p.exits[pid]; exit != nil {
				delete(p.exits, pid)
				exit <- status
			}
		}
		p.mu.Unlock()
		if err == syscall.EINTR {
			continue
		}
		if pid <= 0 {
			return
		}
	}
}
