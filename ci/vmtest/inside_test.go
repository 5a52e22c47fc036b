package vmtest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"chrysalis/image/imagetest"
	"chrysalis/image/inspect"
	"chrysalis/image/toolsroot"
)

// TestInside runs those tests of other packages, with the tag inside, that need a
// kernel with device-mapper and disks to overwrite: in a VM with the image's own
// kernel, modules and command line, and nothing else of it.
func TestInside(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, pkg string
		disks     int
		want      []string
	}{
		{"verity", "./verity", 2, []string{
			"good disk", "nowhere", "one bad candidate, one good", "only bad candidates", "another salt or size",
			"superblock is not looked at", "corruption is told", "name is taken", "names",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			output := inside(t, c.pkg, "TestActivate", c.disks)
			for _, name := range c.want {
				t.Run(name, func(t *testing.T) {
					line := regexp.MustCompile(`(?m)^ *--- (PASS|FAIL|SKIP): TestActivate/` + regexp.QuoteMeta(strings.ReplaceAll(name, " ", "_")) + ` `)
					if found := line.FindSubmatch(output); found == nil || string(found[1]) != "PASS" {
						t.Errorf("in the VM: %q", found)
					}
				})
			}
			if passed := bytes.Count(output, []byte("--- PASS: TestActivate/")); passed != len(c.want) {
				t.Errorf("%d cases passed in the VM, expected %d:\n%s", passed, len(c.want), output)
			}
		})
	}
}

// inside boots a VM that runs a package's tests, and returns what they print.
func inside(t *testing.T, pkg, run string, disks int) []byte {
	t.Helper()
	dir := t.TempDir()
	tests := filepath.Join(dir, "tests")
	build := exec.Command("go", "test", "-c", "-tags", "inside", "-o", tests, pkg)
	build.Dir = source
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	image, err := inspect.OpenUKI(t.Context(), uki)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()

	var initrd bytes.Buffer
	add := func(name string, mode uint32, data []byte) {
		fmt.Fprintf(&initrd, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		initrd.Write(make([]byte, -initrd.Len()&3))
		initrd.Write(data)
		initrd.Write(make([]byte, -initrd.Len()&3))
	}
	const folder, program, file = 0o40755, 0o100755, 0o100644
	add("modules", folder, nil)
	for _, e := range image.Initrd.Entries {
		if path.Dir(e.Path) != "modules" {
			continue
		}
		data, err := e.Content(16 << 20)
		if err != nil {
			t.Fatal(err)
		}
		add(e.Path, file, data)
	}
	for name, from := range map[string]string{"init": testProgram(t, "inside"), "tests": tests} {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		add(name, program, data)
	}
	add("TRAILER!!!", 0, nil)
	kernel := make([]byte, image.Section(".linux").Content.Size())
	if _, err := image.Section(".linux").Content.ReadAt(kernel, 0); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"kernel": kernel, "initrd": initrd.Bytes(), "console": nil, "output": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}

	argv := []string{
		"qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "512",
		"-bios", "/usr/share/ovmf/OVMF.fd", "-kernel", "/vm/kernel", "-initrd", "/vm/initrd",
		"-append", image.CommandLine + " -- -test.v -test.run " + run + "$",
		"-serial", "file:/vm/console", "-serial", "file:/vm/output",
	}
	for i := range disks {
		name := fmt.Sprintf("disk%d", i)
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		argv = append(argv,
			"-blockdev", fmt.Sprintf(`{"driver":"raw","node-name":"%s","file":{"driver":"file","filename":"/vm/%s"}}`, name, name),
			"-device", "virtio-blk-pci,drive="+name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	runtime.LockOSThread() // see toolsroot.Root.Cmd
	defer runtime.UnlockOSThread()
	cmd := imagetest.Tools(t).Cmd(ctx, toolsroot.Command{
		Args: argv, Offline: true, Bind: []toolsroot.Bind{{Host: dir, Inside: "/vm", Writable: true}},
	})
	said, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("QEMU: %v: %s", err, said)
	}
	output, err := os.ReadFile(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	output = bytes.ReplaceAll(output, []byte("\r"), nil)
	output = output[max(0, bytes.Index(output, []byte("=== RUN"))):] // the firmware clears the screen
	if !bytes.HasSuffix(output, []byte("inside: the tests ended well\n")) {
		console, _ := os.ReadFile(filepath.Join(dir, "console"))
		t.Errorf("the tests did not end well in the VM:\n%s\nits console:\n%s", output, console[max(0, len(console)-4000):])
	}
	return output
}
