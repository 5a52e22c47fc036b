package vmtest

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/evidence"
	"chrysalis/image"
	"chrysalis/image/imagetest"
	"chrysalis/image/toolsroot"
	"chrysalis/launcher"
	"chrysalis/measure"
	"chrysalis/measure/plan"
	"chrysalis/measure/record"
	"chrysalis/verity/gpt"
)

// predicted is a record in a file, and what is predicted beside it.
type predicted struct {
	*plan.Result
	path, manifest string // of the record and of the manifest
}

// predict makes the record of the image for VMs with a TPM.
func predict(t *testing.T, boot record.Boot, disk string, shapes ...string) predicted {
	t.Helper()
	lock, err := os.ReadFile(filepath.Join(source, "image.lock"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := plan.Run(t.Context(), plan.Options{
		Platform: record.TPM, Boot: boot, Image: uki, Engine: llama, Models: []string{demo}, Shapes: shapes, Disk: disk, ExitFailures: -1,
		Commit: strings.Repeat("0", 40), Lock: lock, Tools: imagetest.Tools(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := r.File.Encode()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	p := predicted{r, filepath.Join(dir, "record.json"), filepath.Join(dir, "manifest.json")}
	for path, data := range map[string][]byte{p.path: encoded, p.manifest: r.Manifest} {
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// explain runs 'chrysalis measure explain' and returns what it says.
func (h *host) explain(p predicted, log []byte, code int) (x measure.Explanation, text string) {
	h.t.Helper()
	path := filepath.Join(h.t.TempDir(), "log")
	if err := os.WriteFile(path, log, 0o644); err != nil {
		h.t.Fatal(err)
	}
	args := []string{"measure", "explain", "--record", p.path, "--log", path, "--manifest", p.manifest}
	r := h.run(3*time.Minute, append(args, "--json")...)
	if err := json.Unmarshal([]byte(r.stdout), &x); err != nil || r.code != code {
		h.t.Fatalf("explain: expected exit status %d: %v: %s", code, err, r)
	}
	words := h.run(3*time.Minute, args...)
	if words.code != code {
		h.t.Fatalf("explain: expected exit status %d: %s", code, words)
	}
	return x, words.stdout
}

// checkPrediction requires that evidence is what was predicted: each event, in
// order, and every register that the record has, as the TPM has quoted it. A
// client whose policy names the shape accepts it.
func checkPrediction(t *testing.T, h *host, p predicted, shape string, document []byte, root *x509.Certificate) {
	t.Helper()
	x, text := h.explain(p, document, 0)
	if !x.Equal || x.Shape != shape {
		t.Errorf("shape %q: %s", x.Shape, text)
	}
	// The firmware's own register is what the record does not have, and of the
	// machine's it compares every event.
	for _, unknown := range x.Unknown {
		if !strings.HasPrefix(unknown, "PCR 0: ") {
			t.Error("not compared:", unknown)
		}
	}
	d, err := evidence.Parse(document)
	if err != nil {
		t.Fatal(err)
	}
	quoted := map[int][]byte{}
	for _, pcr := range d.TPM.PCRs {
		quoted[pcr.Index] = pcr.SHA256
	}
	for _, pcr := range p.File.Image.PCRs {
		t.Logf("PCR %d: predicted %s, quoted %x", pcr.Index, pcr.SHA256, quoted[pcr.Index])
		if !bytes.Equal(pcr.SHA256, quoted[pcr.Index]) {
			t.Errorf("PCR %d is not as predicted", pcr.Index)
		}
	}
	t.Logf("PCR 15: predicted %x, quoted %x", p.Last, quoted[15])
	if !bytes.Equal(p.Last, quoted[15]) {
		t.Error("PCR 15 is not as predicted")
	}
	for _, i := range []int{8, 12, 13, 14} {
		if !bytes.Equal(quoted[i], make([]byte, 32)) {
			t.Errorf("PCR %d is %x, expected zeros", i, quoted[i])
		}
	}
	for _, s := range p.File.Shapes {
		v := judge(t, d, root, s.Name, p.File)
		switch {
		case s.Name == shape && (!v.OK || v.Shape != shape):
			t.Errorf("a client that wants shape %s refuses it: %v", shape, v.Err())
		case s.Name != shape && v.Failed != attest.CheckPCR1:
			t.Errorf("a client that wants shape %s refuses it by %q, expected %q", s.Name, v.Failed, attest.CheckPCR1)
		}
	}
}

// root is the development root of the host's software TPMs.
func (h *host) root() *x509.Certificate {
	h.t.Helper()
	path, err := launcher.DevelopmentRoot(filepath.Join(h.dir, "chrysalis"))
	if err != nil {
		h.t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		h.t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		h.t.Fatal(err)
	}
	return root
}

// fetchEvidence gets the evidence document of a VM.
func fetchEvidence(t *testing.T, c *client) []byte {
	t.Helper()
	nonce := make([]byte, evidence.NonceSize)
	rand.Read(nonce)
	resp, body := c.send("GET", evidence.Path+"?nonce="+base64.RawURLEncoding.EncodeToString(nonce), nil)
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("evidence: %s: %s", resp.Status, body)
	}
	return []byte(body)
}

// What is predicted is what VMs of two shapes measure that were started with
// -kernel.
func TestPredictedKernel(t *testing.T) {
	p := predict(t, record.BootKernel, "", "small", "medium")
	for _, shape := range []string{"small", "medium"} {
		t.Run(shape, func(t *testing.T) {
			h := newHost(t)
			endpoint := h.up("--shape", shape, "--accel", "tcg", "--engine", llama, "--model", demo)
			checkPrediction(t, h, p, shape, fetchEvidence(t, newClient(t, endpoint)), h.root())
		})
	}
}

// What is predicted is what a VM measures that was started from an exported disk. The
// other shape's boot, which takes two minutes of an emulated machine, is for `make soak`.
func TestPredictedDisk(t *testing.T) {
	t.Parallel()
	shapes := []string{"small"}
	if os.Getenv("CHRYSALIS_SOAK") != "" {
		shapes = append(shapes, "medium")
	}
	h := newHost(t)
	exported := filepath.Join(t.TempDir(), "export.raw")
	if r := h.run(2*time.Minute, "image", "export", "-o", exported, "--image", uki, "--engine", llama, "--model", demo); r.code != 0 {
		t.Fatalf("export: %s", r)
	}
	p := predict(t, record.BootDisk, exported, "small", "medium")
	for _, shape := range shapes {
		t.Run(shape, func(t *testing.T) {
			disk := filepath.Join(t.TempDir(), "copy.raw") // the VM can write to it
			changeFile(t, exported, disk, nil)
			vm := bootDisk(t, shape, disk)
			checkPrediction(t, h, p, shape, fetchEvidence(t, vm.serving()), vm.root)
			vm.powerOff()
		})
	}
}

// change is one thing that is not as it was measured.
type change struct {
	name  string
	boot  record.Boot
	argv  func(t *testing.T, argv []string) []string
	shape func(*launcher.Shape)
	image func(t *testing.T, uki []byte) []byte
	// firmware returns another one's file.
	firmware func(t *testing.T) string
	disk     func(t *testing.T, disk []byte) []byte // the exported disk
	// cause is part of what explain says first.
	cause string
	// registers of the record, or of those that a client wants to be zero, that
	// are not as they should be. A client refuses on each of them.
	registers []int
	// refused is the check by which a client's policy refuses the VM.
	refused attest.Name
	// returns says that the image comes back to the firmware.
	returns bool
}

// One thing is changed at a time, and 'measure explain' names it.
func TestExplainChanges(t *testing.T) {
	add := func(more ...string) func(*testing.T, []string) []string {
		return func(_ *testing.T, argv []string) []string { return append(argv, more...) }
	}
	extraInitrd := func(t *testing.T, argv []string) []string {
		return append(argv, "-fw_cfg", "name=etc/boot/initrd,file=/vm/extra")
	}
	for _, c := range []change{
		{name: "vCPUs", shape: func(s *launcher.Shape) { s.VCPUs = 4 }, cause: "ACPI tables: the VM was started with 4 vCPUs, the record has 2", registers: []int{1}, refused: attest.CheckPCR1},
		{name: "memory", shape: func(s *launcher.Shape) { s.Memory = 1536 << 20 }, cause: "the VM was started with 1536 MiB of memory, the record has 1024 MiB", registers: []int{1}, refused: attest.CheckPCR1},
		{name: "device", argv: add("-device", "virtio-net-pci"), cause: "ACPI tables: the VM was started with one more device", registers: []int{1}, refused: attest.CheckPCR1},
		{name: "a byte of the image", image: func(t *testing.T, uki []byte) []byte {
			i := bytes.Index(uki, []byte("ID=chrysalis"))
			if i < 0 {
				t.Fatal("the image has no os-release")
			}
			uki[i+3] ^= 1
			return uki
		}, cause: "another image: its section .osrel differs", registers: []int{4, 9, 11}, refused: attest.CheckPCR4},
		{name: "command line", argv: add("-append", "console=ttyS0 init=/bin/sh"), cause: "kernel command line: the host gave another one \"console=ttyS0 init=/bin/sh\"", registers: []int{9, 12}, refused: attest.CheckPCR9},
		{name: "second initrd", argv: extraInitrd, cause: "initrd: the image was started, refused to go on", registers: []int{4, 9}, refused: attest.CheckPCR4, returns: true},
		{name: "SMBIOS strings", argv: add("-smbios", "type=11,value=io.systemd.stub.kernel-cmdline-extra=debug"), cause: "kernel command line: the host gave another one in SMBIOS strings \"debug\"", registers: []int{1, 9, 12}, refused: attest.CheckPCR9},
		{name: "firmware", firmware: debian12OVMF, cause: "another firmware: it calls itself", registers: []int{1, 7}, refused: attest.CheckPCR7},
		{name: "addon", boot: record.BootDisk, disk: addToESP("EFI/BOOT/BOOTX64.EFI.extra.d/more.addon.efi", addon), cause: "addon: program \"", registers: []int{4, 9, 12}, refused: attest.CheckPCR4},
		{name: "credential", boot: record.BootDisk, disk: addToESP("EFI/BOOT/BOOTX64.EFI.extra.d/more.cred", func(*testing.T) []byte { return []byte("secret") }), cause: "credentials or extensions on the ESP", registers: []int{9, 12}, refused: attest.CheckPCR9},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.run(t)
		})
	}
}

func (c change) run(t *testing.T) {
	if c.boot == "" {
		c.boot = record.BootKernel
	}
	h := newHost(t)
	dir := t.TempDir()
	exported := filepath.Join(dir, "export.raw")
	if c.boot == record.BootDisk {
		if r := h.run(2*time.Minute, "image", "export", "-o", exported, "--image", uki, "--engine", llama, "--model", demo); r.code != 0 {
			t.Fatalf("export: %s", r)
		}
	}
	p := predict(t, c.boot, exported, "small")
	shape, err := launcher.LookupShape("small")
	if err != nil {
		t.Fatal(err)
	}
	if c.shape != nil {
		c.shape(&shape)
	}
	a := launcher.Artefacts{
		Platform: launcher.PlatformTCG, Transport: launcher.TransportUser, Firmware: "/usr/share/ovmf/OVMF.fd", Disks: 3, GuestCID: 3,
	}
	booted := uki
	var binds []toolsroot.Bind
	if c.boot == record.BootDisk {
		a.Disks, a.FromDisk = 1, true
		changeFile(t, exported, exported, c.disk)
		binds = disks(exported)
	} else {
		encoded, err := os.Create(filepath.Join(dir, "manifest.disk"))
		if err != nil {
			t.Fatal(err)
		}
		size, err := gpt.WriteManifestDisk(encoded, p.Manifest, nil)
		if err == nil {
			err = encoded.Truncate(size)
		}
		if err != nil {
			t.Fatal(err)
		}
		encoded.Close()
		if c.image != nil {
			booted = filepath.Join(dir, "image.efi")
			changeFile(t, uki, booted, c.image)
		}
		binds = append(disks(encoded.Name(), llama, demo), toolsroot.Bind{Host: booted, Inside: "/vm/image.efi"})
	}
	if c.firmware != nil {
		a.Firmware = "/vm/firmware.fd"
		binds = append(binds, toolsroot.Bind{Host: c.firmware(t), Inside: a.Firmware})
	}
	argv := launcher.Command(shape, a)
	if c.argv != nil {
		argv = c.argv(t, argv)
	}
	extra := filepath.Join(dir, "extra")
	if err := os.WriteFile(extra, []byte("another initrd"), 0o644); err != nil {
		t.Fatal(err)
	}
	vm := startQEMU(t, append(argv, "-no-shutdown"), append(binds, toolsroot.Bind{Host: extra, Inside: "/vm/extra"})...)
	// The kernel has measured all when its driver runs, or when the agent has
	// refused what it found.
	looked := time.Now()
	vm.await(func() bool {
		if !c.returns {
			return vm.stopped() || vm.driverRuns()
		}
		if time.Since(looked) < 15*time.Second {
			return false
		}
		returned := slices.ContainsFunc(firmwareLogs(vm.memory(int64(shape.Memory))), func(log firmwareLog) bool {
			return bytes.Contains(log.data, []byte("Returning from EFI Application"))
		})
		vm.execute("cont", nil)
		looked = time.Now()
		return returned
	})
	if c.returns {
		time.Sleep(20 * time.Second) // until the firmware has tried everything and waits
	}
	logs := firmwareLogs(vm.memory(int64(shape.Memory)))
	document := vm.evidence(p.Manifest, p.CEL)
	values := map[int][]byte{}
	for _, pcr := range document.TPM.PCRs {
		values[pcr.Index] = pcr.SHA256
	}
	// The log is not made up, and this is all of it: it replays to what the TPM has.
	var log []byte
	for n, copied := range logs {
		var other []string
		for _, i := range []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14} {
			if replay := copied.Replay(measure.SHA256, i); !bytes.Equal(replay, values[i]) {
				other = append(other, fmt.Sprintf("PCR %d: it replays to %x, the TPM has %x", i, replay, values[i]))
			}
		}
		if len(other) == 0 {
			log = copied.data
		} else {
			t.Logf("copy %d of the log, %d bytes: %s", n, len(copied.data), strings.Join(other, "; "))
		}
	}
	if log == nil {
		t.Fatal("no copy of the firmware's log in memory replays to what the TPM has")
	}
	document.TPM.Log = log
	x, text := h.explain(p, log, 1)
	t.Log(text)
	if len(x.Causes) == 0 || !strings.Contains(x.Causes[0].What, c.cause) {
		t.Errorf("the first cause is not %q", c.cause)
	}
	var differ []int
	if !bytes.Equal(p.File.Shapes[0].PCR1, values[1]) {
		differ = append(differ, 1)
	}
	for _, pcr := range p.File.Image.PCRs {
		if !bytes.Equal(pcr.SHA256, values[pcr.Index]) {
			differ = append(differ, pcr.Index)
		}
	}
	for _, i := range []int{8, 12, 13, 14} {
		if !bytes.Equal(values[i], make([]byte, 32)) {
			differ = append(differ, i)
		}
	}
	if !slices.Equal(differ, c.registers) {
		t.Errorf("registers %v differ from what a client wants, expected %v", differ, c.registers)
	}
	if v := judge(t, document, vm.root, "small", p.File); v.Failed != c.refused || !v.Refused() {
		t.Errorf("a client's policy refuses it by %q, expected %q: %v", v.Failed, c.refused, v.Err())
	}
}

// changeFile copies a file, changed.
func changeFile(t *testing.T, from, to string, f func(*testing.T, []byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if f != nil {
		data = f(t, data)
	}
	if err := os.WriteFile(to, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// A manifest is measured by the agent: another one makes another PCR 15, and
// explain says in which field it differs.
func TestPredictedManifest(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	p := predict(t, record.BootKernel, "", "small")
	endpoint := h.up("--accel", "tcg", "--engine", llama, "--model", demo, "--parameter", "context=1024")
	document := fetchEvidence(t, newClient(t, endpoint))
	d, err := evidence.Parse(document)
	if err != nil {
		t.Fatal(err)
	}
	if got := d.TPM.PCRs[len(d.TPM.PCRs)-1]; got.Index != 15 || bytes.Equal(got.SHA256, p.Last) {
		t.Errorf("PCR %d is %x with another manifest too", got.Index, got.SHA256)
	}
	measured := sha256.Sum256(p.Manifest)
	v := judge(t, d, h.root(), "small", p.File, func(policy *attest.Policy) { policy.Manifests = []record.Hex{measured[:]} })
	if v.Failed != attest.CheckManifest || !v.Refused() {
		t.Errorf("a client's policy that lists the manifest refuses it by %q, expected %q: %v", v.Failed, attest.CheckManifest, v.Err())
	}
	x, text := h.explain(p, document, 1)
	if len(x.Causes) != 1 || !strings.Contains(x.Causes[0].What, `parameters is {"context":1024}, expected {}`) {
		t.Error(text)
	}
}

// debian12OVMF is the firmware of Debian 12, whose package is known by its hash.
func debian12OVMF(t *testing.T) string {
	t.Helper()
	mirrors, err := image.HostMirrors(t.Context())
	if err != nil {
		t.Skipf("the package's mirrors are not known: %v", err)
	}
	paths, err := image.Fetch(t.Context(), &image.Tree{Name: "firmware", Packages: []image.Package{{
		Name: "ovmf", Version: "2022.11-6+deb12u2", Arch: "all", Path: "pool/main/e/edk2/ovmf_2022.11-6+deb12u2_all.deb",
		Size: 7683456, SHA256: "e73d3d1a8799f7f6fc16b73501d913edcdd86237556fbff30693e747e6dc262e",
	}}}, mirrors, func(string, int64, int64) {})
	if err != nil {
		t.Skipf("the package with another firmware is out of reach: %v", err)
	}
	dir := t.TempDir()
	deb := filepath.Join(dir, "package.deb")
	changeFile(t, paths[0], deb, nil)
	if out, err := imagetest.Command(t, dir, "dpkg-deb", "-x", deb, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return filepath.Join(dir, "usr/share/ovmf/OVMF.fd")
}

// addon is a UKI addon that extends the command line.
func addon(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	out := filepath.Join(dir, "more.addon.efi")
	if output, err := imagetest.Command(t, dir, "ukify", "build", "--stub=/usr/lib/systemd/boot/efi/addonx64.efi.stub", "--cmdline=debug", "--output="+out).CombinedOutput(); err != nil {
		t.Fatalf("make an addon: %v: %s", err, output)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// addToESP puts a file on an exported disk's ESP.
func addToESP(name string, content func(*testing.T) []byte) func(*testing.T, []byte) []byte {
	return func(t *testing.T, disk []byte) []byte {
		t.Helper()
		dir := t.TempDir()
		image, file := filepath.Join(dir, "disk"), filepath.Join(dir, "file")
		for path, data := range map[string][]byte{image: disk, file: content(t)} {
			if err := os.WriteFile(path, data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		// The ESP is the first partition, at 1 MiB.
		const offset = "@@1M"
		parts := strings.Split(filepath.Dir(name), "/")
		for i := range parts {
			folder := strings.Join(parts[:i+1], "/")
			imagetest.Command(t, dir, "mmd", "-i", image+offset, "-D", "s", "::"+folder).Run()
		}
		if output, err := imagetest.Command(t, dir, "mcopy", "-i", image+offset, file, "::"+name).CombinedOutput(); err != nil {
			t.Fatalf("mcopy: %v: %s", err, output)
		}
		out, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
}
