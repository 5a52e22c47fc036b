package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
)

// sysctls is where the kernel's settings are; tests put theirs elsewhere.
var sysctls = "/proc/sys"

// offline returns a command of the host's that has no network: its network
// namespace has no interface but loopback. The host's files are there as they
// are.
func offline(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "bwrap", append([]string{
		"--die-with-parent", "--dev-bind", "/", "/", "--unshare-net", "--"}, args...)...)
}

// checkSandbox tries the sandbox that every build step runs in and says what to
// do where it is forbidden.
func checkSandbox(ctx context.Context) error {
	if _, err := exec.LookPath("bwrap"); err != nil {
		return errors.New("bubblewrap is not installed, and every build step runs in it; install it ('apt install bubblewrap')")
	}
	cmd := exec.CommandContext(ctx, "bwrap", "--die-with-parent", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net",
		"--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", "--", "true")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	said := strings.TrimSpace(stderr.String())
	if said == "" {
		said = err.Error()
	}
	return fmt.Errorf("the sandbox that builds run in does not start (%s): %s", lastLines(said, 3), sandboxAdvice(said, os.Geteuid() == 0))
}

// sandboxAdvice says why bubblewrap was refused its namespaces and what to do.
func sandboxAdvice(said string, root bool) string {
	setting := func(name string) string {
		data, err := os.ReadFile(filepath.Join(sysctls, filepath.FromSlash(strings.ReplaceAll(name, ".", "/"))))
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(data))
	}
	set := func(why, name, value string) string {
		return fmt.Sprintf("%s; as root, run 'sysctl -w %s=%s' (and put '%s = %s' into /etc/sysctl.d/60-chrysalis.conf to keep it), or build as root",
			why, name, value, name, value)
	}
	if !root && setting("kernel.unprivileged_userns_clone") == "0" {
		return set("ordinary users may not make user namespaces here", "kernel.unprivileged_userns_clone", "1")
	}
	if !root && setting("kernel.apparmor_restrict_unprivileged_userns") == "1" {
		return set("AppArmor keeps ordinary users from using user namespaces here", "kernel.apparmor_restrict_unprivileged_userns", "0")
	}
	for _, kind := range []string{"user", "net", "pid", "mnt", "ipc", "uts"} {
		if name := "user.max_" + kind + "_namespaces"; setting(name) == "0" && (kind != "user" || !root) {
			return strings.TrimSuffix(set("this system allows no "+kind+" namespaces", name, "10000"), ", or build as root")
		}
	}
	switch {
	case strings.Contains(said, "proc"):
		return "/proc cannot be mounted, as in a container that hides parts of it; run the container with --security-opt systempaths=unconfined, or with --privileged, or build outside of it"
	case strings.Contains(said, "namespace") || strings.Contains(said, "not permitted") || strings.Contains(said, "ermission denied"):
		return "namespaces are forbidden, as in a container; run the container with --privileged, or with --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN, or build outside of it"
	}
	return "try 'bwrap --ro-bind / / --unshare-net true' and make that work first"
}

// subIDFiles are where ordinary users' ranges of user ids are.
var subIDFiles = []string{"/etc/subuid", "/etc/subgid"}

// checkSubIDs checks what an ordinary user's mmdebstrap needs to unpack a system
// that has more than one user.
func checkSubIDs() error {
	if os.Geteuid() == 0 {
		return nil
	}
	if _, err := exec.LookPath("newuidmap"); err != nil {
		return errors.New("newuidmap is not installed, with which ordinary users make the tools root; install it ('apt install uidmap'), or run as root")
	}
	me, err := user.Current()
	if err != nil {
		return fmt.Errorf("find out who runs this: %w", err)
	}
	for _, file := range subIDFiles {
		if !hasSubIDs(file, me) {
			return fmt.Errorf("%s gives %s no range of ids, with which ordinary users make the tools root; as root, run 'usermod --add-subuids 100000-165535 --add-subgids 100000-165535 %s', or build as root",
				file, me.Username, me.Username)
		}
	}
	return nil
}

func hasSubIDs(file string, u *user.User) bool {
	data, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if name, _, _ := strings.Cut(line, ":"); name == u.Username || name == u.Uid {
			return true
		}
	}
	return false
}
