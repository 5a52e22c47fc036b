package measure

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// Finding is one difference between a record and a VM.
type Finding struct {
	Register string `json:"register"` // "RTMR1", "PCR 4"
	Event    string `json:"event"`    // as docs/measure.md names it
	Expected string `json:"expected"` // a digest in hexadecimal, "nothing", or text
	Found    string `json:"found"`
	// Text says it in plain words.
	Text string `json:"text"`
}

// Explanation says whether a VM is as a record has it.
type Explanation struct {
	Equal bool   `json:"equal"`
	Shape string `json:"shape"` // the one that fits best, "" where the record has none
	// Causes are what the findings come from, the likeliest first, and what to do
	// about each.
	Causes   []Cause   `json:"causes"`
	Findings []Finding `json:"findings"`
	// Values are the registers that the record predicts, beside what was reported.
	Values []Compared `json:"values"`
	// Unknown are registers that the record does not predict.
	Unknown []string `json:"unknown"`
}

// Cause is why a VM differs.
type Cause struct {
	What string `json:"what"` // "ACPI tables: the VM was started with 4 vCPUs, the record has 2"
	Do   string `json:"do"`
}

// Observed is what a VM reported.
type Observed struct {
	Log *Log
	// Values are registers that a quote covers, by their record name ("rtmr1",
	// "pcr4"); nil where there is no quote.
	Values map[string][]byte
	// Manifest and CEL are what the VM says that it was given, and its log of that;
	// nil where they are not known. Want is the manifest that it should have.
	Manifest, CEL, Want []byte
	// Covered is what is wrong with a quote that has no values of its own but a
	// digest of them, "" where nothing is.
	Covered string
}

// A Guess is a machine that the VM may run on instead: what its tables would be.
type Guess struct {
	What   string // "4 vCPUs, the record has 2"
	Events []Event
}

// Explain compares a log, and what a quote says of the registers, with a record.
// shape names the one to compare with, or is empty for the one that fits best.
// guesses yields machines to try where tables differ; it may be nil.
func Explain(f *record.File, o Observed, shape string, guesses func(record.Shape, func(Guess) bool)) (*Explanation, error) {
	a := SHA256
	if f.Image.Platform == record.TDX {
		a = SHA384
	}
	if !slices.Contains(o.Log.Algorithms, a) {
		return nil, fmt.Errorf("the log has no %v digests, which records of platform %s are made of", a, f.Image.Platform)
	}
	if len(f.Events) == 0 {
		return nil, fmt.Errorf("the record has no events to compare with; make it again with 'chrysalis measure'")
	}
	e := explainer{file: f, o: o, a: a}
	candidates := []string{shape}
	if shape == "" {
		candidates = nil
		// Where several fit alike, the smallest is the likeliest.
		shapes := slices.Clone(f.Shapes)
		slices.SortStableFunc(shapes, func(a, b record.Shape) int {
			return cmp.Or(cmp.Compare(a.GPUs, b.GPUs), cmp.Compare(a.VCPUs, b.VCPUs), cmp.Compare(a.Memory, b.Memory))
		})
		// A machine of which nothing is known would fit any VM.
		for _, s := range shapes {
			if !slices.ContainsFunc(f.Events, func(e record.Event) bool { return e.Shape == s.Name && len(e.Digest) == 0 }) {
				candidates = append(candidates, s.Name)
			}
		}
		if len(candidates) == 0 {
			candidates = []string{""}
		}
	} else if !slices.ContainsFunc(f.Shapes, func(s record.Shape) bool { return s.Name == shape }) {
		return nil, fmt.Errorf("the record has no shape %q", shape)
	}
	var best *Explanation
	for _, name := range candidates {
		x := e.compare(name)
		if best == nil || len(x.Findings) < len(best.Findings) {
			best = x
		}
	}
	best.Equal = len(best.Findings) == 0
	best.Values = e.values(best.Shape)
	e.causes(best, guesses)
	return best, nil
}

type explainer struct {
	file *record.File
	o    Observed
	a    Algorithm
}

// difference is a finding with what it is about.
type difference struct {
	Finding
	expected *record.Event // nil for an event too many
	found    *LogEvent     // nil for one that is missing
}

// index is how the log counts a register.
func index(register string) (int, bool) {
	if n, ok := strings.CutPrefix(register, "rtmr"); ok {
		i, err := strconv.Atoi(n)
		return i + 1, err == nil // 0 is MRTD
	}
	n, ok := strings.CutPrefix(register, "pcr")
	i, err := strconv.Atoi(n)
	return i, ok && err == nil
}

func display(register string) string {
	if n, ok := strings.CutPrefix(register, "pcr"); ok {
		return "PCR " + n
	}
	return strings.ToUpper(register)
}

// registers lists those that events or values are about, in order.
func (e *explainer) registers(shape string) []string {
	names := []string{"pcr0", "pcr1", "pcr2", "pcr3", "pcr4", "pcr5", "pcr6", "pcr7", "pcr8", "pcr9", "pcr11", "pcr12", "pcr13", "pcr14"}
	if e.file.Image.Platform == record.TDX {
		names = []string{"rtmr0", "rtmr1", "rtmr2"}
	}
	return names
}

func (e *explainer) compare(shape string) *Explanation {
	x := &Explanation{Shape: shape, Causes: []Cause{}, Findings: []Finding{}, Unknown: []string{}}
	for _, d := range e.differences(x, shape) {
		x.Findings = append(x.Findings, d.Finding)
	}
	return x
}

func (e *explainer) differences(x *Explanation, shape string) []difference {
	var all []difference
	if mrtd, ok := e.o.Values["mrtd"]; ok && !bytes.Equal(mrtd, e.file.Image.MRTD) {
		all = append(all, difference{Finding: Finding{
			"MRTD", "firmware", e.file.Image.MRTD.String(), hex.EncodeToString(mrtd), "the TD's initial memory, which is its firmware, differs",
		}})
	}
	for _, register := range e.registers(shape) {
		var want []record.Event
		unknown := ""
		for _, event := range e.file.Events {
			if event.Register == register && (event.Shape == "" || event.Shape == shape) {
				if want = append(want, event); len(event.Digest) == 0 {
					unknown = event.Missing
				}
			}
		}
		i, ok := index(register)
		if !ok {
			continue
		}
		var got []LogEvent
		for _, event := range e.o.Log.Events {
			if event.Index == i && event.Type != EvNoAction {
				got = append(got, event)
			}
		}
		if value, ok := e.o.Values[register]; ok {
			if replay := e.o.Log.Replay(e.a, i); !bytes.Equal(value, replay) {
				all = append(all, difference{Finding: Finding{
					display(register), "log", hex.EncodeToString(value), hex.EncodeToString(replay),
					"the quote has another value than the log replays to: the log is not that of this VM, or was changed",
				}})
			}
		}
		if unknown != "" {
			x.Unknown = append(x.Unknown, fmt.Sprintf("%s: %s", display(register), unknown))
			continue
		}
		if len(want) == 0 && register != "rtmr0" && register != "pcr1" {
			want = nil // nothing may be there
		} else if len(want) == 0 {
			x.Unknown = append(x.Unknown, display(register)+": the record has no shape")
			continue
		}
		if register == "pcr5" {
			got = withoutRetries(got)
		}
		all = append(all, diffEvents(display(register), e.a, want, got)...)
	}
	all = append(all, e.given()...)
	if e.o.Covered != "" {
		all = append(all, difference{Finding: Finding{"PCRs", "quote", "the log's values", "others", e.o.Covered}})
	}
	return all
}

// withoutRetries leaves out calls of ExitBootServices that failed and were tried
// again: they say nothing about a VM, and no client looks at PCR 5.
func withoutRetries(list []LogEvent) []LogEvent {
	var out []LogEvent
	for i := range list {
		if strings.HasPrefix(string(list[i].Data), "Exit Boot Services Returned with Failure") && list[i].Type == EvAction && len(out) > 0 {
			out = out[:len(out)-1]
			continue
		}
		out = append(out, list[i])
	}
	return out
}

// diffEvents aligns two lists of events by their longest common subsequence, and
// pairs what is left over between two common ones.
func diffEvents(register string, a Algorithm, want []record.Event, got []LogEvent) []difference {
	n, m := len(want), len(got)
	if n*m > 1<<22 {
		m = min(m, 1<<22/max(n, 1))
		got = got[:m]
	}
	equal := func(i, j int) bool { return bytes.Equal(want[i].Digest, got[j].Digests[a]) }
	length := make([][]int, n+1)
	for i := range length {
		length[i] = make([]int, m+1)
	}
	for i := n - 1; i >= 0; i-- {
		for j := m - 1; j >= 0; j-- {
			if equal(i, j) {
				length[i][j] = length[i+1][j+1] + 1
			} else {
				length[i][j] = max(length[i+1][j], length[i][j+1])
			}
		}
	}
	var all []difference
	for i, j := 0, 0; i < n || j < m; {
		if i < n && j < m && equal(i, j) {
			i, j = i+1, j+1
			continue
		}
		// The block up to the next common event.
		fromI, fromJ := i, j
		for i < n || j < m {
			if i < n && j < m && equal(i, j) {
				break
			}
			if j == m || i < n && length[i+1][j] >= length[i][j+1] {
				i++
			} else {
				j++
			}
		}
		all = append(all, pair(register, a, want[fromI:i], got[fromJ:j])...)
	}
	return all
}

// pair matches events of a block that are of one kind; the others are missing or
// too many.
func pair(register string, a Algorithm, want []record.Event, got []LogEvent) []difference {
	var all []difference
	used := make([]bool, len(got))
	for i := range want {
		w := &want[i]
		match := -1
		for j := range got {
			if !used[j] && sameKind(w, &got[j], i, j) {
				match = j
				break
			}
		}
		d := difference{expected: w, Finding: Finding{Register: register, Event: w.Name, Expected: w.Digest.String(), Found: "nothing"}}
		if match >= 0 {
			used[match] = true
			d.found = &got[match]
			d.Found = hex.EncodeToString(got[match].Digests[a])
			d.Text = fmt.Sprintf("%s differs", cmpText(w))
		} else {
			d.Text = fmt.Sprintf("%s was not measured", cmpText(w))
		}
		all = append(all, d)
	}
	for j := range got {
		if !used[j] {
			all = append(all, difference{found: &got[j], Finding: Finding{
				register, "unexpected", "nothing", hex.EncodeToString(got[j].Digests[a]),
				fmt.Sprintf("%s was measured, which the record does not have", got[j].Text()),
			}})
		}
	}
	return all
}

func cmpText(w *record.Event) string {
	if w.Text != "" {
		return w.Text
	}
	return w.Name
}

// sameKind reports whether a log's event stands for an expected one whose digest
// it does not have. i and j are their places in the block.
func sameKind(w *record.Event, g *LogEvent, i, j int) bool {
	switch {
	case strings.HasPrefix(w.Name, "section"):
		name := "." + w.Name[strings.LastIndexByte(w.Name, '.')+1:]
		return g.Type == EvIPL && fromUTF16(g.Data) == name
	case strings.HasPrefix(w.Name, "acpi-"), strings.HasPrefix(w.Name, "fw-cfg-"):
		return g.Type == EvPlatformConfigFlags && i == j
	case strings.HasPrefix(w.Name, "boot-"), strings.HasPrefix(w.Name, "secure-boot-"):
		_, name, _ := strings.Cut(strings.TrimPrefix(w.Name, "secure-"), "-")
		return (g.Type == EvVariableBoot || g.Type == EvVariableDriverConfig) && g.Text() == "variable "+quote(name)
	case w.Name == "image", w.Name == "kernel":
		return g.Type == EvBootServicesApp && g.FilePath() == "" || g.Type == EvBootServicesApp && i == j
	case w.Name == "command-line":
		return g.Type == EvEventTag && strings.Contains(string(g.Data), "LoadOptions")
	case w.Name == "initrd":
		return g.Type == EvEventTag && strings.Contains(string(g.Data), "initrd")
	case w.Name == "smbios":
		return g.Type == EvHandoffTables
	case w.Name == "td-hob":
		return g.Type == EvHandoffTables2
	case w.Name == "cfv":
		return g.Type == EvFirmwareBlob2
	case w.Name == "gpt":
		return g.Type == EvGPT
	}
	return false
}

// given compares what the VM was given with the record and with the manifest that
// it should have.
func (e *explainer) given() []difference {
	if e.o.CEL == nil {
		return nil
	}
	register := string(cel.PCR15)
	if e.file.Image.Platform == record.TDX {
		register = string(cel.RTMR3)
	}
	finding := func(event, expected, found, format string, args ...any) []difference {
		return []difference{{Finding: Finding{display(register), event, expected, found, fmt.Sprintf(format, args...)}}}
	}
	kind, events, err := cel.Parse(e.o.CEL)
	if err != nil {
		return finding("cel", "a log", "none", "%v", err)
	}
	if string(kind) != register {
		return finding("cel", register, string(kind), "the log is of another register")
	}
	bank256, bank384 := cel.Replay(events)
	value := bank256[:]
	if e.a == SHA384 {
		value = bank384[:]
	}
	if quoted, ok := e.o.Values[register]; ok && !bytes.Equal(quoted, value) {
		return finding("log", hex.EncodeToString(quoted), hex.EncodeToString(value), "the quote has another value than the VM's own log replays to")
	}
	m, err := manifest.Parse(e.o.Manifest)
	if err != nil {
		return finding("manifest", "a manifest", "none", "%v", err)
	}
	var gpus [][]byte
	for _, event := range events {
		if event.Name == cel.GPU {
			gpus = append(gpus, event.Data)
		}
	}
	want, err := cel.Boot(e.o.Manifest, m, gpus)
	if err != nil {
		return finding("manifest", "a manifest", "none", "%v", err)
	}
	for i, event := range want {
		if i >= len(events) || events[i].Name != event.Name || !bytes.Equal(events[i].Data, event.Data) {
			return finding("cel", fmt.Sprintf("%d events", len(want)), fmt.Sprintf("%d events", len(events)), "event %d, %s, is not what the manifest makes it", i, event.Name)
		}
	}
	if len(events) != len(want) {
		return finding("cel", fmt.Sprintf("%d events", len(want)), fmt.Sprintf("%d events", len(events)), "something was measured after the separator")
	}
	if e.o.Want != nil && !bytes.Equal(e.o.Want, e.o.Manifest) {
		return finding("manifest", hex.EncodeToString(SHA384.Sum(e.o.Want)), hex.EncodeToString(SHA384.Sum(e.o.Manifest)),
			"the manifest is another one: %s", manifestDifference(e.o.Want, e.o.Manifest))
	}
	known := func(root string, list int, at func(int) record.Hex) bool {
		for i := range list {
			if at(i).String() == root {
				return true
			}
		}
		return list == 0 // then the record says nothing of them
	}
	if !known(m.Engine.RootHash, len(e.file.Engines), func(i int) record.Hex { return e.file.Engines[i].RootHash }) {
		return finding("engine", "an engine of the record", m.Engine.RootHash, "the manifest names an engine that the record does not have")
	}
	for _, model := range m.Models {
		if !known(model.Disk.RootHash, len(e.file.Models), func(i int) record.Hex { return e.file.Models[i].RootHash }) {
			return finding("model", "a model of the record", model.Disk.RootHash, "the manifest names model %s, which the record does not have", model.ID())
		}
	}
	return nil
}

// manifestDifference names the fields that differ.
func manifestDifference(want, got []byte) string {
	var a, b map[string]json.RawMessage
	if json.Unmarshal(want, &a) != nil || json.Unmarshal(got, &b) != nil {
		return "it cannot be read"
	}
	var names []string
	for name := range a {
		if !bytes.Equal(a[name], b[name]) {
			names = append(names, fmt.Sprintf("%s is %.200s, expected %.200s", name, b[name], a[name]))
		}
	}
	for name := range b {
		if a[name] == nil {
			names = append(names, fmt.Sprintf("%s is %.200s, expected nothing", name, b[name]))
		}
	}
	slices.Sort(names)
	return strings.Join(names, "; ")
}

// Compared is a register's predicted value beside the reported one.
type Compared struct {
	Register  string `json:"register"`
	Predicted string `json:"predicted"`
	Reported  string `json:"reported"`
	Equal     bool   `json:"equal"`
}

// values lists what the record predicts of registers that were reported.
func (e *explainer) values(shape string) []Compared {
	var list []Compared
	add := func(register string, want []byte) {
		got, ok := e.o.Values[register]
		if i, counted := index(register); !ok && counted {
			got = e.o.Log.Replay(e.a, i)
			ok = true
		}
		if ok && len(want) > 0 {
			list = append(list, Compared{display(register), hex.EncodeToString(want), hex.EncodeToString(got), bytes.Equal(want, got)})
		}
	}
	var machine record.Shape
	for _, s := range e.file.Shapes {
		if s.Name == shape {
			machine = s
		}
	}
	i := e.file.Image
	if i.Platform == record.TDX {
		if _, ok := e.o.Values["mrtd"]; ok {
			add("mrtd", i.MRTD)
		}
		add("rtmr0", machine.RTMR0)
		add("rtmr1", i.RTMR1)
		add("rtmr2", i.RTMR2)
	}
	add("pcr1", machine.PCR1)
	for _, pcr := range i.PCRs {
		add(fmt.Sprintf("pcr%d", pcr.Index), pcr.SHA256)
	}
	if m, err := manifest.Parse(e.o.Want); err == nil && m.GPUs == 0 {
		if events, err := cel.Boot(e.o.Want, m, nil); err == nil {
			bank256, bank384 := cel.Replay(events)
			if i.Platform == record.TDX {
				add("rtmr3", bank384[:])
			} else {
				add("pcr15", bank256[:])
			}
		}
	}
	return list
}

// has reports whether an event of that name is among the findings.
func (x *Explanation) has(names ...string) bool {
	return slices.ContainsFunc(x.Findings, func(f Finding) bool { return slices.Contains(names, f.Event) })
}

func (x *Explanation) because(do, format string, args ...any) {
	x.Causes = append(x.Causes, Cause{fmt.Sprintf(format, args...), do})
}

const (
	doShape = "start the VM with 'chrysalis up' and the shape of the record, or measure the machine that you have"
	doImage = "boot the image that the record names, or measure the one that you booted"
	doHost  = "remove it: the host adds nothing to what is measured"
)

// causes says where the differences come from.
func (e *explainer) causes(x *Explanation, guesses func(record.Shape, func(Guess) bool)) {
	if x.Equal {
		return
	}
	all := e.differences(&Explanation{}, x.Shape)
	find := func(match func(difference) bool) *difference {
		if i := slices.IndexFunc(all, match); i >= 0 {
			return &all[i]
		}
		return nil
	}
	named := func(name string) *difference { return find(func(d difference) bool { return d.Event == name }) }
	explained := 0

	if named("log") != nil || named("quote") != nil {
		x.because("take log and quote of one VM at one time", "the quote and the log do not belong together")
		explained++
	}

	// A program that came back: its start failed.
	returned := find(func(d difference) bool {
		return d.found != nil && d.found.Type == EvAction && strings.HasPrefix(string(d.found.Data), "Returning from EFI Application")
	})
	if returned != nil {
		x.because("remove what the host adds through fw_cfg (-initrd, -fw_cfg name=etc/boot/initrd), and look at the console",
			"initrd: the image was started, refused to go on and came back to the firmware; systemd-stub does so where the host adds a second initrd")
		explained++
	}

	// Another image: which part of it.
	var sections []string
	for _, d := range all {
		if strings.HasPrefix(d.Event, "section.") && d.found != nil {
			sections = append(sections, strings.TrimPrefix(d.Event, "section"))
		}
	}
	image := named("image")
	switch {
	case image != nil && len(sections) > 0:
		x.because(doImage, "another image: its section %s differs; the UKI has Authenticode digest %s, the record %s", strings.Join(sections, ", "), image.Found, image.Expected)
		explained++
	case image != nil && returned == nil:
		what := "another image: its headers differ, and no section that the stub measures"
		if x.has("section.linux", "section-name.linux") {
			what = "another image"
		}
		x.because(doImage, "%s; it has Authenticode digest %s, the record %s", what, image.Found, image.Expected)
		explained++
	}

	// What the host adds to the image.
	addon := find(func(d difference) bool {
		return d.Event == "unexpected" && d.found.Type == EvBootServicesApp && strings.Contains(strings.ToLower(d.found.FilePath()), ".addon.efi")
	})
	var overridden, companions []string
	for _, d := range all {
		if d.Event != "unexpected" || d.found == nil || d.found.Type != EvIPL && d.found.Type != EvEventTag {
			continue
		}
		text := d.found.Text()
		switch d.Register {
		case "PCR 12", "PCR 13":
			if strings.Contains(strings.ToLower(text), "credential") || strings.Contains(text, "extension") || strings.Contains(text, "initrd") {
				companions = append(companions, text)
			} else {
				overridden = append(overridden, text)
			}
		case "RTMR2":
			overridden = append(overridden, text)
		}
	}
	if addon != nil {
		x.because(doHost, "addon: %s on the ESP was loaded beside the image", addon.found.Text())
		explained++
	}
	if cmdline := named("command-line"); cmdline != nil && cmdline.found != nil && image == nil {
		given := ""
		if addon == nil && named("smbios") != nil {
			given = " in SMBIOS strings"
		}
		if len(overridden) > 0 {
			given += " " + strings.Join(overridden, ", ")
		}
		x.because("start the VM without -append, without SMBIOS strings of type 11 for the stub, and without addons on the ESP",
			"kernel command line: the host gave another one%s", given)
		explained++
	}
	if len(companions) > 0 {
		x.because("remove them from the ESP: a VM takes its configuration from the manifest only",
			"credentials or extensions on the ESP were added to the initrd (%s)", strings.Join(companions, ", "))
		explained++
	} else if named("initrd") != nil && image == nil && returned == nil {
		x.because(doHost, "initrd: the host added files to it: a second initrd through fw_cfg, or credentials or extensions on the ESP")
		explained++
	}

	// Firmware.
	if d := named("firmware"); d != nil {
		x.because("boot with the firmware that the record names", "another firmware: MRTD is %s, that of the record's (SHA-256 %s) is %s", d.Found, e.file.Image.Firmware, d.Expected)
		explained++
	} else if d := named("cfv"); d != nil {
		x.because("boot with the firmware that the record names", "another firmware: its variable store has digest %s, the record's firmware (SHA-256 %s) has %s", d.Found, e.file.Image.Firmware, d.Expected)
		explained++
	} else if firmware := e.otherFirmware(); firmware != "" {
		x.because("boot with the firmware that the record names", "another firmware: %s; the record's has SHA-256 %s", firmware, e.file.Image.Firmware)
		explained++
	}
	if d := find(func(d difference) bool { return strings.HasPrefix(d.Event, "secure-boot-") }); d != nil {
		x.because("boot with the record's firmware and an empty variable store", "Secure Boot: variable %s differs; keys were enrolled, or another firmware was booted", strings.TrimPrefix(d.Event, "secure-boot-"))
		explained++
	}

	// The machine.
	if e.machineDiffers(all) {
		e.machineCause(x, all, guesses)
		explained++
	}
	if d := named("exit-boot-services-failed"); d != nil || find(func(d difference) bool {
		return d.found != nil && d.found.Type == EvAction && strings.HasPrefix(string(d.found.Data), "Exit Boot Services Returned with Failure")
	}) != nil {
		x.because("make a record with --exit-failures 0 and one with 1: both are the same image", "ExitBootServices failed more or less often than in the record before it succeeded, which RTMR1 shows")
		explained++
	}
	if d := named("gpt"); d != nil {
		x.because("start from the disk that was measured", "partitions: the VM was started from another disk than the record's")
		explained++
	}
	for _, name := range []string{"manifest", "engine", "model", "cel"} {
		if d := named(name); d != nil {
			x.because("start the VM with the manifest, engine and models that the record was made for", "%s: %s", name, d.Text)
			explained++
		}
	}
	if explained == 0 {
		d := all[0]
		x.because("compare the VM's log with the record's events", "%s, %s: %s", d.Register, d.Event, d.Text)
	}
}

// otherFirmware says which firmware a TPM's log is of, where it is not the
// record's.
func (e *explainer) otherFirmware() string {
	if e.file.Image.Platform != record.TPM {
		return ""
	}
	profile := Profiles[known[e.file.Image.Firmware.String()]]
	if profile.CRTM == "" {
		return ""
	}
	volume := 0
	for _, event := range e.o.Log.Events {
		if event.Index != 0 {
			continue
		}
		switch event.Type {
		case EvSCRTMVersion:
			if version := fromUTF16(event.Data); version != profile.CRTM {
				return fmt.Sprintf("it calls itself %s, the record's %s", quote(version), quote(profile.CRTM))
			}
		case EvFirmwareBlob, EvFirmwareBlob2:
			if volume < len(profile.Volumes) && !strings.HasPrefix(hex.EncodeToString(event.Digests[SHA256]), profile.Volumes[volume]) {
				return fmt.Sprintf("its volume %d has SHA-256 %x", volume+1, event.Digests[SHA256])
			}
			volume++
		}
	}
	return ""
}

var machineEvents = []string{"acpi-loader", "acpi-rsdp", "acpi-tables", "acpi-tpm-log", "smbios", "td-hob"}

func (e *explainer) machineDiffers(all []difference) bool {
	return slices.ContainsFunc(all, func(d difference) bool {
		return slices.Contains(machineEvents, d.Event) || strings.HasPrefix(d.Event, "fw-cfg-") || strings.HasPrefix(d.Event, "boot-")
	})
}

// machineCause finds the machine that the VM runs on instead, among the record's
// shapes and the guesses.
func (e *explainer) machineCause(x *Explanation, all []difference, guesses func(record.Shape, func(Guess) bool)) {
	differs := map[string]*difference{}
	for i := range all {
		if _, ok := differs[all[i].Event]; !ok {
			differs[all[i].Event] = &all[i]
		}
	}
	fits := func(events map[string][]byte) bool {
		compared := 0
		for _, name := range machineEvents {
			d := differs[name]
			if d == nil || d.found == nil {
				continue
			}
			if want, ok := events[name]; !ok || !bytes.Equal(want, d.found.Digests[e.a]) {
				return false
			}
			compared++
		}
		return compared > 0
	}
	var own record.Shape
	for _, s := range e.file.Shapes {
		if s.Name == x.Shape {
			own = s
		}
	}
	if guesses != nil && own.Name != "" {
		found := ""
		guesses(own, func(g Guess) bool {
			events := map[string][]byte{}
			for _, event := range g.Events {
				events[event.Name] = event.Digest
			}
			if fits(events) {
				found = g.What
			}
			return found == ""
		})
		if found != "" {
			kind := "ACPI tables"
			if differs["smbios"] != nil || differs["td-hob"] != nil {
				kind = "memory map"
			}
			x.because(doShape, "%s: the VM was started with %s", kind, found)
			return
		}
	}
	switch {
	case differs["smbios"] != nil && differs["td-hob"] == nil && differs["acpi-tables"] == nil && len(x.Causes) > 0:
		// What was added through SMBIOS has been named.
	case differs["smbios"] != nil || differs["td-hob"] != nil:
		if own.Name != "" {
			x.because(doShape, "memory: the VM was started with another amount than the record's %d MiB, or with other SMBIOS strings", own.Memory>>20)
		} else {
			x.because(doShape, "memory: the VM was started with another amount than the record's, or with other SMBIOS strings")
		}
	case differs["acpi-tables"] != nil || differs["acpi-rsdp"] != nil || differs["acpi-loader"] != nil:
		x.because(doShape, "ACPI tables: the VM was started with other devices or vCPUs than the record's (%d vCPUs, %d disks), or by another QEMU than %s", own.VCPUs, own.Disks, e.file.Image.QEMU)
	default:
		x.because(doShape, "boot options: the firmware found other disks, or was told another order")
	}
}
