package launcher

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"chrysalis/guest"
	"chrysalis/launcher/softtpm"
	"chrysalis/launcher/till"
)

// What the launcher keeps, below the user's state folder, all of it 0700:
//
//	accel.json          which accelerators were found to work (accel.go)
//	development-root.*  the issuer of software TPMs' certificates (softtpm)
//	channels/NETWORK/   which VM serves on which payment channel (package till)
//	vms/NAME/till/NETWORK/  what clients have paid: vouchers and earnings (channel/store)
//	vms/NAME/lock       held by `up` while it starts a VM of that name
//	vms/NAME/runs/ID/   one start of a VM; IDs sort by time
//	    lock            held by the supervisor for as long as it lives
//	    config.json     what `up` asked for
//	    state.json      State at the last change
//	    control.sock    the supervisor's own API
//	    supervisor.log  engine.log
//	    manifest.disk   io/ (sockets, console.log)  tpm/
//
// The kernel drops a lock with its holder, so a run whose lock is free is over,
// whatever its state says: after a crash, a kill or a restart of the machine.

// Life is what a VM is doing, seen from the host.
type Life string

// The lives.
const (
	LifeStarting Life = "starting"
	LifeReady    Life = "ready"
	LifeDraining Life = "draining"
	LifeStopping Life = "stopping"
	LifeEnded    Life = "ended"
)

// State describes one run of a VM.
type State struct {
	Name       string        `json:"name"`
	Run        string        `json:"run"`
	Life       Life          `json:"state"`
	Phase      guest.Phase   `json:"phase,omitempty"`
	Reason     guest.Reason  `json:"reason,omitempty"`
	Ended      string        `json:"ended,omitempty"`    // one sentence: how it ended
	Failed     bool          `json:"failed,omitempty"`   // it ended although nobody asked for it
	Endpoint   string        `json:"endpoint,omitempty"` // https://HOST:PORT
	Listen     string        `json:"listen"`             // as asked for
	Platform   Platform      `json:"accel,omitempty"`
	Transport  Transport     `json:"transport,omitempty"`
	Note       string        `json:"note,omitempty"` // why this accelerator
	Shape      string        `json:"shape"`
	Supervisor int           `json:"pid"` // the supervisor's process id
	StartedAt  time.Time     `json:"started_at"`
	ReadyAt    time.Time     `json:"ready_at,omitzero"`
	EndedAt    time.Time     `json:"ended_at,omitzero"`
	Guest      *guest.Status `json:"guest,omitempty"` // the VM's own last words
	Relay      RelayCounters `json:"relay"`
	Payment    *till.State   `json:"payment,omitempty"` // of a VM whose clients pay
}

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

func checkName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%q is not a name for a VM; use 1 to 32 lower-case letters, digits and '-', not '-' first", name)
	}
	return nil
}

// StateDir returns where the launcher keeps its state when Options name no other
// place: $XDG_STATE_HOME/chrysalis, by default ~/.local/state/chrysalis.
func StateDir() (string, error) {
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "chrysalis"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the state folder: %w; set XDG_STATE_HOME", err)
	}
	return filepath.Join(home, ".local", "state", "chrysalis"), nil
}

// DevelopmentRoot returns the path of the certificate (PEM) that software TPMs'
// evidence of this state folder ends in, and makes it when there is none yet. The
// folder is StateDir() when empty.
func DevelopmentRoot(stateDir string) (string, error) {
	st, err := openStore(stateDir)
	if err != nil {
		return "", err
	}
	if _, err := softtpm.OpenCA(st.dir); err != nil {
		return "", err
	}
	return filepath.Join(st.dir, softtpm.CertificateFile), nil
}

// store is a state folder.
type store struct{ dir string }

func openStore(dir string) (store, error) {
	if dir == "" {
		var err error
		if dir, err = StateDir(); err != nil {
			return store{}, err
		}
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return store{}, err
	}
	return store{dir}, nil
}

func (s store) vm(name string) string { return filepath.Join(s.dir, "vms", name) }

// run is one run's folder.
type run struct {
	dir  string
	name string
	id   string
}

func (s store) run(name, id string) run {
	return run{dir: filepath.Join(s.vm(name), "runs", id), name: name, id: id}
}

func (r run) path(elem ...string) string { return filepath.Join(append([]string{r.dir}, elem...)...) }

// lockFile takes a lock of the file at path, which it makes; how is as in
// flock(2). With LOCK_NB it returns errLocked when somebody else's is in the way.
func lockFile(path string, how int) (*os.File, error) {
	return openLock(path, os.O_RDWR|os.O_CREATE, how)
}

// openLock is lockFile with the flags of open(2): looking at a run must work where
// nothing can be written any more.
func openLock(path string, flags, how int) (*os.File, error) {
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), how)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

var errLocked = errors.New("locked")

// runTime is how an ID begins.
const runTime = "20060102t150405.000"

// newRun makes the folder of a new run and takes its lock, which the caller
// hands to the supervisor.
func (s store) newRun(name string, now time.Time) (run, *os.File, error) {
	var random [3]byte
	rand.Read(random[:])
	// The newest run sorts last even where the clock was set back since another.
	at := now.UTC().Format(runTime)
	if earlier, err := s.runs(name); err == nil && len(earlier) > 0 {
		last, _, _ := strings.Cut(earlier[len(earlier)-1].id, "-")
		if then, err := time.Parse(runTime, last); err == nil && last >= at {
			at = then.Add(time.Millisecond).Format(runTime)
		}
	}
	r := s.run(name, at+"-"+hex.EncodeToString(random[:]))
	// Under another name until the lock is held: a folder whose lock is free
	// counts as a run that is over.
	making := filepath.Join(filepath.Dir(r.dir), ".new-"+r.id)
	for _, dir := range []string{making, filepath.Join(making, "io"), filepath.Join(making, "tpm")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return run{}, nil, fmt.Errorf("make the VM's state folder: %w", err)
		}
	}
	lock, err := lockFile(filepath.Join(making, "lock"), unix.LOCK_EX)
	if err != nil {
		return run{}, nil, fmt.Errorf("make the VM's state folder: %w", err)
	}
	if err := os.Rename(making, r.dir); err != nil {
		lock.Close()
		return run{}, nil, fmt.Errorf("make the VM's state folder: %w", err)
	}
	return r, lock, nil
}

// names lists the VMs that have a folder.
func (s store) names() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, "vms"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the state folder: %w", err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && nameRE.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// runs lists a VM's runs, the oldest first.
// named is the VM of that name alone, or all when name is empty.
func (s store) named(name string) ([]string, error) {
	if name == "" {
		return s.names()
	}
	if err := checkName(name); err != nil {
		return nil, err
	}
	return []string{name}, nil
}

func (s store) runs(name string) ([]run, error) {
	entries, err := os.ReadDir(filepath.Join(s.vm(name), "runs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the state folder: %w", err)
	}
	var runs []run
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			runs = append(runs, s.run(name, e.Name()))
		}
	}
	return runs, nil
}

// settle reports whether the run is alive. One that is over is tidied: processes that
// outlived a killed supervisor are ended, its sockets and TPM state go, and its state
// says that it has ended.
func (r run) settle() (alive bool, err error) {
	// Shared, so that two who look at a run that is over do not take each other
	// for its supervisor.
	lock, err := openLock(r.path("lock"), os.O_RDONLY, unix.LOCK_SH|unix.LOCK_NB)
	if err == errLocked {
		return true, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at the VM's state: %w", err)
	}
	defer lock.Close()
	state, changed := r.lastState()
	if changed {
		if state.Supervisor > 0 { // known before it starts anything
			if err := killSession(state.Supervisor, r.dir); err != nil {
				return false, err
			}
		}
		// Somebody else who looks at it may have removed it; and a full or read-only
		// disk keeps nobody from being told how it ended.
		err := r.writeState(state)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) && !errors.Is(err, unix.EROFS) {
			return false, err
		}
	}
	r.tidy()
	return false, nil
}

// lastState returns the state of a run that is over, and whether that is another
// than what is written.
func (r run) lastState() (state State, changed bool) {
	state, err := r.readState()
	if err != nil {
		// up was killed before the supervisor wrote anything, or the disk was full.
		state = State{Name: r.name, Run: r.id}
	}
	if state.Life == LifeEnded {
		return state, false
	}
	state.Life = LifeEnded
	state.Failed = true
	state.Ended = "its supervisor is gone: it was killed, or the machine restarted"
	if state.EndedAt.IsZero() {
		state.EndedAt = time.Now()
	}
	return state, true
}

// tidy removes what only a live VM needs. Logs and state stay.
func (r run) tidy() {
	os.Remove(r.path("control.sock"))
	os.RemoveAll(r.path("tpm"))
	os.Remove(r.path("manifest.disk"))
	entries, _ := os.ReadDir(r.path("io"))
	for _, e := range entries {
		if e.Type()&fs.ModeSocket != 0 {
			os.Remove(r.path("io", e.Name()))
		}
	}
}

// live returns the runs of a VM that are alive, the oldest first, and tidies the
// others.
func (s store) live(name string) ([]run, error) {
	runs, err := s.runs(name)
	if err != nil {
		return nil, err
	}
	var alive []run
	for _, r := range runs {
		is, err := r.settle()
		if err != nil {
			return nil, err
		}
		if is {
			alive = append(alive, r)
		}
	}
	return alive, nil
}

// prune removes a VM's dead runs but the last, whose logs somebody may want. The
// caller holds the VM's lock.
func (s store) prune(name string) error {
	runs, err := s.runs(name)
	if err != nil {
		return err
	}
	kept := false
	for _, r := range slices.Backward(runs) {
		alive, err := r.settle()
		if err != nil {
			return err
		}
		if alive {
			continue
		}
		if !kept {
			kept = true
			continue
		}
		if err := os.RemoveAll(r.dir); err != nil {
			return fmt.Errorf("remove an old run: %w", err)
		}
	}
	// What an `up` that was killed in newRun left.
	left, _ := filepath.Glob(filepath.Join(s.vm(name), "runs", ".new-*"))
	for _, dir := range left {
		os.RemoveAll(dir)
	}
	return nil
}

// maxStateFile bounds state.json and config.json, in bytes.
const maxStateFile = 1 << 20

func (r run) readState() (State, error) {
	var state State
	err := readJSON(r.path("state.json"), &state)
	return state, err
}

func (r run) writeState(state State) error { return writeJSON(r.path("state.json"), state) }

func readJSON(path string, into any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxStateFile+1))
	if err != nil {
		return err
	}
	if len(data) > maxStateFile {
		return fmt.Errorf("%s is larger than %d bytes", path, maxStateFile)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

// writeJSON replaces the file at path in one step.
func writeJSON(path string, value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".tmp-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(append(data, '\n')); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
