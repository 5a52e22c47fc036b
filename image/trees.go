package image

import (
	"fmt"
	"slices"
	"strings"
)

// A source says what a locked tree is resolved from.
type source struct {
	tree     string
	suites   []string // in apt's order
	packages []string // what is asked for; apt patterns and NAME=VERSION work
	closure  bool     // with everything they depend on
}

// Kernel is the release of the guest's kernel, as its packages are named.
// INTEL_TDX_GUEST=y, TSM_MEASUREMENTS=y (RTMR extension through sysfs needs
// Linux 6.16 or later; Debian's 6.12 lacks it).
const Kernel = "7.3.4+deb13-cloud-amd64"

// sources is all that image.lock is made from.
var sources = []source{
	{
		// llama-server and exactly the libraries that it loads; the engine disk has
		// nothing else, so dependencies that only maintainer scripts need stay out.
		tree:   "engine/llama.cpp",
		suites: []string{"sid"},
		packages: []string{
			"llama.cpp-tools", "libllama0", "libggml0", "libc6", "libstdc++6",
			"libgcc-s1", "libgomp1", "libssl3t64", "zlib1g", "libzstd1",
		},
	},
	{
		// The UKI: the kernel's image and modules, and systemd-stub 257. Newer stubs
		// write secrets to the ESP, append a console and measure SMBIOS tables that
		// differ from machine to machine.
		tree:   "image",
		suites: []string{"trixie", "trixie-backports"},
		packages: []string{
			"linux-binary-" + Kernel, "linux-modules-" + Kernel, "systemd-boot-efi",
		},
	},
	{
		// Everything that runs at build time or beside the VM.
		tree:   "tools",
		suites: []string{"sid"},
		packages: []string{
			"?essential", "apt",
			"mkosi", "systemd-ukify", "systemd-repart", "kmod", "cpio", "zstd", "xz-utils",
			"erofs-utils", "cryptsetup-bin", "jq",
			"qemu-system-x86", "ovmf-generic", "ovmf-inteltdx",
			"swtpm", "swtpm-tools", "vhost-device-vsock",
		},
		closure: true,
	},
	{
		// The C compiler of the GPU helper, which runs beside the host's Go. Its C
		// library is older than that of any engine disk, so that what it links runs
		// there. Maintainer scripts never run; see compiler.go.
		tree:     "gpu-compiler",
		suites:   []string{"trixie"},
		packages: []string{"gcc-14", "libc6-dev"},
		closure:  true,
	},
}

// checkRecipe refuses a locked tree that is not what its recipe here asks for:
// one that lacks a package, has one too many, or comes from other suites.
func checkRecipe(tree *Tree) error {
	i := slices.IndexFunc(sources, func(s source) bool { return s.tree == tree.Name })
	if i < 0 {
		return nil // an engine of the user's own
	}
	const refresh = "refresh the lock with 'chrysalis image lock', or check that lock and source are of one commit"
	src := sources[i]
	asked := map[string]bool{}
	for _, want := range src.packages {
		if strings.HasPrefix(want, "?") {
			continue // a pattern of apt's
		}
		name, version, pinned := strings.Cut(want, "=")
		asked[name] = true
		p, err := tree.Package(name)
		switch {
		case err != nil:
			return fmt.Errorf("tree %s of %s lacks package %s, which its recipe needs; %s", tree.Name, LockName, name, refresh)
		case pinned && p.Version != version:
			return fmt.Errorf("tree %s of %s has %s %s, and its recipe needs %s; %s", tree.Name, LockName, name, p.Version, version, refresh)
		}
	}
	for _, p := range tree.Packages {
		if !src.closure && !asked[p.Name] {
			return fmt.Errorf("tree %s of %s has package %s, which its recipe does not ask for; %s", tree.Name, LockName, p.Name, refresh)
		}
	}
	var suites []string
	for _, s := range tree.Suites {
		suites = append(suites, s.Name)
	}
	if !slices.Equal(suites, src.suites) {
		return fmt.Errorf("tree %s of %s comes from %v, and its recipe says %v; %s", tree.Name, LockName, suites, src.suites, refresh)
	}
	return nil
}
