// Command mutate takes defences out, one at a time, and runs the test that should
// notice.
//
//	mutate [REGEXP]
//
// The source tree stays as it is: the go command is given another text for one file.
// It exits with 1 if a test passes all the same, or if a defence is no longer where
// this program looks for it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"chrysalis/ci/overlay"
)

// A mutant is a defence that is taken out: a text, which a file must hold exactly
// once, and what stands there instead.
type mutant struct {
	defence  string // what is taken out
	file     string
	old, new string
	pkg      string // the folder of the test
	test     string // a regular expression for -run
}

var mutants = []mutant{
	{"a request's header has names that are names", "agent/http1/request.go",
		"name == \"\" || strings.Trim(name, tokenBytes) != \"\"", "name == \"\"", "agent/http1", "TestAsNetHTTP"},
	{"TLS is read by the record, so that nothing waits unseen", "agent/http1/server.go",
		"tls.Server(&records{Conn: c.net}, c.s.TLS)", "tls.Server(c.net, c.s.TLS)", "agent/http1", "TestRecordWithTwoRequests"},
	{"a client that asks for more has not left", "agent/http1/wait.go",
		"return poll(fd)&^unix.POLLIN != 0", "return poll(fd) != 0", "agent/http1", "TestAskingMoreIsNotLeaving"},
	{"a disk's fragment is written before the disk has its name", "verity/disk/output_linux.go",
		"\t\tif err := writeFragment(p.file.path, p.o.Fragment(d)); err != nil {\n\t\t\treturn err\n\t\t}\n\t}\n\treturn p.file.commit()",
		"\t\tif err := p.file.commit(); err != nil {\n\t\t\treturn err\n\t\t}\n\t\treturn writeFragment(p.file.path, p.o.Fragment(d))\n\t}\n\treturn p.file.commit()",
		"ci/fault", "TestModelPack/kill"},
	{"an engine disk has no name until it is whole", "verity/disk/output_linux.go",
		"unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o644)", "unix.Open(path, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o644)",
		"ci/fault", "TestEnginePack$/kill"},
	{"a file that is being written is not taken for an abandoned one", "outfile/outfile.go",
		"if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {\n\t\t\tos.Remove(path)", "if true {\n\t\t\tos.Remove(path)",
		"outfile", "TestSweep|TestTogether"},
	{"an export that fails or is killed leaves nothing under its name", "outfile/outfile.go",
		"f, err := os.CreateTemp(dir, prefix+\"*\")", "f, err := os.Create(path)", "ci/fault", "TestImageExport/(kill|ENOSPC)"},
	{"a run that is over is told so although the disk is full", "launcher/state.go",
		" && !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT)", "", "launcher", "TestUnwritableState"},
	{"looking at a run writes nothing", "launcher/state.go",
		`openLock(r.path("lock"), os.O_RDONLY, `, `openLock(r.path("lock"), os.O_RDWR|os.O_CREATE, `, "launcher", "TestUnwritableState"},
	{"the newest run sorts last although the clock was set back", "launcher/state.go",
		"err == nil && last >= at {", "err == nil && false {", "launcher", "TestClockSetBack"},
	{"a process is believed to be the supervisor only if it has the run's lock", "launcher/down.go",
		"err == nil && os.SameFile(info, want) {", "err == nil && (true || os.SameFile(info, want)) {", "launcher", "TestHolder"},
	{"a second prepare that fails keeps what the first one found", "launcher/gpu/prepare.go",
		"forget = func() error { return writeRecord(path, earlier) }", "", "launcher/gpu", "TestSecondPrepareFails"},
	{"one program at a time changes a GPU", "launcher/gpu/prepare.go",
		"unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)", "unix.Flock(int(lock.Fd()), unix.LOCK_UN)", "launcher/gpu", "TestPrepareTogether"},
	{"a GPU's record is kept until the GPU is what it was", "launcher/gpu/prepare.go",
		"\tp := &Plan{\n\t\thost: h, lock: lockPath(stateDir, g.Address),", "\tos.Remove(path)\n\tp := &Plan{\n\t\thost: h, lock: lockPath(stateDir, g.Address),", "launcher/gpu", "TestKilled"},
	{"build folders of killed builds are removed", "image/files.go",
		"removeTree(path) // one that does not go is in nobody's way", "", "image", "TestStageDir"},
	{"a TD's attributes must be exactly one value", "attest/tdx.go",
		"got := binary.LittleEndian.Uint64(t.attributes); got != septVEDisable {", "got := binary.LittleEndian.Uint64(t.attributes); got&1 != 0 {", "attest", "TestAttacks"},
	{"XFAM has only features that the policy allows", "attest/tdx.go",
		"if got&^allowed != 0 || got&xfamRequired != xfamRequired {", "if got&xfamRequired != xfamRequired {", "attest", "TestAttacks"},
	{"evidence answers this client's nonce", "attest/verify.go",
		"if len(in.Nonce) != evidence.NonceSize || !d.Lists(in.Nonce) {", "if len(in.Nonce) != evidence.NonceSize {", "attest", "TestAttacks"},
	{"evidence is of the key of this connection", "attest/verify.go",
		"if !bytes.Equal(d.TLSKey, in.TLSKey) || len(in.TLSKey) == 0 {", "if !bytes.Equal(d.TLSKey, d.TLSKey) || len(in.TLSKey) == 0 {", "attest", "TestAttacks"},
	{"a document is in its canonical encoding", "canonical/canonical.go",
		"return compare(data, encoded)", "_ = compare(data, encoded)\n\treturn nil", "manifest", "TestParseRefuses"},
	{"a package has the hash that the lock says", "image/fetch.go",
		"if sum = hex.EncodeToString(h.Sum(nil)); sum == d.p.SHA256 {", "if sum = hex.EncodeToString(h.Sum(nil)); sum != \"\" {", "image", "TestFetch"},
	{"a GPU in devtools mode is refused", "attest/nvidia/verify.go",
		"if g.State.DevTools {", "if g.State.DevTools && false {", "attest/nvidia", "TestRefusals"},
	{"a voucher covers only when it is durable", "pay/credit.go",
		"\ta.next = v\n", "\ta.next, a.cover = v, v.Total\n", "agent/api", "TestDurableFirst"},
	{"what is not covered is not sent", "agent/api/padding.go",
		"if x.bill != nil && !x.bill.Send(e.Text) {", "if x.bill != nil && !x.bill.Send(e.Text) && false {", "agent/api", "TestCutOff"},
	{"who pays proves to have the channel's key", "pay/credit.go",
		"if err := p.Verify(key, b.spki); err != nil {\n\t\treturn Session{}, err", "if err := p.Verify(key, b.spki); err != nil && false {\n\t\treturn Session{}, err", "agent/api", "TestUnpaid$"},
	{"a voucher is acknowledged once it is on disk", "launcher/till/collect.go",
		"if err := t.keep(reply.Balances); err != nil {", "if err := t.keep(reply.Balances); err != nil && false {", "launcher/till", "TestFullDisk"},
	{"a batch that is told again counts once", "launcher/till/collect.go",
		"if reply.Batch <= t.acked {", "if reply.Batch <= t.acked && false {", "launcher/till", "TestRefusesVouchers"},
	{"a channel is served on by one VM of an owner", "launcher/till/admit.go",
		"if name != t.o.Name {", "if name != t.o.Name && false {", "launcher/till", "TestPaid"},
	{"a channel that is bad is not served on", "launcher/till/admit.go",
		"if bad != nil && !kept {", "if bad != nil && !kept && false {", "launcher/till", "TestBadChannels"},
	{"what is read because somebody named it is limited", "launcher/till/admit.go",
		"if b.left < 1 {", "if b.left < 1 && false {", "launcher/till", "TestNoise"},
	{"a channel that is used up is not served on again with its old cover", "launcher/till/admit.go",
		"Limit: chain.Cover, Used: known.Used, Closing: closing,", "Limit: chain.Cover, Closing: closing,", "launcher/till", "TestPaid|TestDamaged"},
	{"a head that is too old is refused", "registry/lite/client.go",
		"return fmt.Errorf(\"%w: its last block %d is %v old, at most %v is allowed\", ErrStale,", "_ = fmt.Errorf(\"%w: its last block %d is %v old, at most %v is allowed\", ErrStale,", "registry/lite", "TestClock|TestLies|TestBackwards"},
}

func main() {
	pattern := ""
	if len(os.Args) > 1 {
		pattern = os.Args[1]
	}
	only, err := regexp.Compile(pattern)
	if err != nil || len(os.Args) > 2 {
		fmt.Fprintln(os.Stderr, "usage: mutate [REGEXP]")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	bad, all := 0, 0
	for _, m := range mutants {
		if !only.MatchString(m.defence) || ctx.Err() != nil {
			continue
		}
		all++
		begin := time.Now()
		failed, err := m.try(ctx)
		if err != nil {
			bad++
			fmt.Printf("NOT NOTICED  %s: %v\n", m.defence, err)
			continue
		}
		fmt.Printf("noticed  %s: %s %s (%.0f s)\n", m.defence, m.pkg, failed, time.Since(begin).Seconds())
	}
	fmt.Printf("%d defences taken out, %d not noticed\n", all, bad)
	if bad > 0 || ctx.Err() != nil {
		os.Exit(1)
	}
}

var failure = regexp.MustCompile(`(?m)^ *--- FAIL: (\S+) `)

// try returns the test that failed without the defence.
func (m mutant) try(ctx context.Context) (string, error) {
	path, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	without := overlay.Files{}
	if err := without.Replace(path, m.old, m.new); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "chrysalis-mutate-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	flag, err := without.Flag(dir)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	// In the environment, so that what a test builds is without the defence, too.
	env := append(os.Environ(), strings.TrimSpace("GOFLAGS="+os.Getenv("GOFLAGS")+" "+flag))
	run := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = env
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := run("build", "./"+filepath.Dir(m.file)); err != nil {
		return "", fmt.Errorf("it does not compile, which proves nothing: %s", out)
	}
	out, err := run("test", "-count=1", "-run", m.test, "./"+m.pkg)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err == nil {
		return "", errors.New("the test passes")
	}
	found := failure.FindAllStringSubmatch(out, -1)
	if len(found) == 0 {
		return "", fmt.Errorf("no test failed: %s", out)
	}
	return found[len(found)-1][1], nil
}
