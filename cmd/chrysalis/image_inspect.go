package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"chrysalis/image/inspect"
	"chrysalis/image/provenance"
	"chrysalis/terminal"
)

// Statuses of 'image inspect' and 'image diff', as those of cmp(1).
const (
	exitDifferent = 1 // or, for inspect, the file says what is not so
	exitBadInput  = 2
)

// ImageInspectCmd shows what is in an artefact.
type ImageInspectCmd struct {
	File   string `arg:"" help:"A UKI or a disk."`
	Source string `default:"." type:"existingdir" placeholder:"DIR" help:"Top of the source tree, whose lock lists the packages where no SBOM or lock is beside the file (default: ${default})."`
	JSON   bool   `name:"json" help:"Print one JSON document."`
}

// An inspection is what is in a file, and what is said about it elsewhere.
type inspection struct {
	*inspect.Report
	Packages *provenance.PackageList `json:"packages,omitempty"`
}

// packages looks for the list of the packages that the file is made of. A list
// that is about another file is a problem of the report.
func (c *ImageInspectCmd) packages(r *inspect.Report) (*provenance.PackageList, error) {
	tree := ""
	if r.UKI != nil {
		tree = "image"
	} else {
		for _, p := range r.Disk.Partitions {
			if p.Verity != nil && p.Verity.Profile != nil {
				tree = "engine/" + p.Verity.Profile.Name
			}
		}
	}
	if tree == "" {
		return nil, nil // nothing on it is from a package
	}
	list, err := provenance.Packages(c.File, r.SHA256, tree, c.Source)
	if errors.Is(err, provenance.ErrOtherFile) {
		r.Problems = append(r.Problems, err.Error())
		return nil, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return list, err
}

// Run prints the report, and fails if the file says of itself what is not so.
func (c *ImageInspectCmd) Run(ctx context.Context) error {
	show := newSteps()
	defer show.done()
	report, err := inspect.Inspect(ctx, c.File, show.step)
	show.done()
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	found := inspection{Report: report}
	if found.Packages, err = c.packages(report); err != nil {
		return &exitError{exitBadInput, err}
	}
	if c.JSON {
		err = json.NewEncoder(os.Stdout).Encode(found)
	} else {
		err = printReport(os.Stdout, found)
	}
	if err != nil {
		return err
	}
	if n := len(report.Problems); n > 0 {
		return &exitError{exitDifferent, fmt.Errorf("%s: what it says of itself does not hold; problems: %d", c.File, n)}
	}
	return nil
}

// printReport prints a report for people. Nothing in it is trusted.
func printReport(out io.Writer, r inspection) error {
	w := tabwriter.NewWriter(terminal.NewWriter(out), 0, 8, 2, ' ', 0)
	line := func(format string, args ...any) {
		for i, arg := range args {
			if s, ok := arg.(string); ok {
				args[i] = terminal.Line(s)
			}
		}
		fmt.Fprintf(w, format+"\n", args...)
	}
	line("file\t%s", r.File)
	line("size\t%d", r.Size)
	line("SHA-256\t%s", r.SHA256)
	if u := r.UKI; u != nil {
		line("stub\t%s", u.Stub)
		line("kernel\t%s", u.Kernel)
		line("command line\t%s", u.CommandLine)
		for _, key := range slices.Sorted(maps.Keys(u.OSRelease)) {
			line("os-release\t%s=%s", key, u.OSRelease[key])
		}
		line("\nsection\toffset\tsize\tSHA-256")
		for _, s := range u.Sections {
			line("%s\t%#x\t%d\t%s", s.Name, s.Offset, s.Size, s.SHA256)
		}
		if i := u.Initrd; i != nil {
			line("\ninitrd: %d bytes, compression %s, %d bytes unpacked", i.PackedSize, i.Compression, i.Size)
			printEntries(line, i.Entries)
		}
	}
	if d := r.Disk; d != nil {
		line("GUID\t%s", d.GUID)
		line("\npartition\toffset\tsize\tattributes\tname\tUUID\ttype")
		for _, p := range d.Partitions {
			kind := p.Type
			if p.Kind != "" {
				kind += " (" + p.Kind + ")"
			}
			line("%d\t%d\t%d\t%s\t%s\t%s\t%s", p.Number, p.Offset, p.Size, p.Attributes, p.Name, p.UUID, kind)
		}
		for _, p := range d.Partitions {
			line("\npartition %d", p.Number)
			line("SHA-256\t%s", p.SHA256)
			if p.Manifest != nil {
				line("manifest\t%s", string(p.Manifest))
			}
			if v := p.Verity; v != nil {
				line("root hash\t%s", v.RootHash)
				line("salt\t%s", v.Salt)
				line("data blocks\t%d", v.DataBlocks)
				line("hash blocks\t%d, in partition %d", v.HashBlocks, v.HashPartition)
				if v.Model != "" {
					line("model\t%s", v.Model)
				}
				if v.Profile != nil {
					line("engine\t%s, profile version %d", v.Profile.Name, v.Profile.Version)
				}
				printEntries(line, v.Entries)
			}
		}
	}
	if list := r.Packages; list != nil {
		line("\npackages, from %s: %s", list.From, list.Detail)
		line("kind\tname\tversion\tSHA-256")
		for _, p := range list.Packages {
			sum := p.SHA256
			if sum == "" {
				sum = "-"
			}
			line("%s\t%s\t%s\t%s", p.Kind, p.Name, p.Version, sum)
		}
	} else if r.UKI != nil {
		line("\npackages: not known, for there is neither an SBOM beside the file nor an image.lock beside it or in --source")
	}
	if len(r.Problems) > 0 {
		line("")
		for _, problem := range r.Problems {
			line("✘ %s", problem)
		}
	}
	return w.Flush()
}

func printEntries(line func(format string, args ...any), entries []inspect.Entry) {
	line("mode\towner\tsize\ttime\tSHA-256\tpath")
	for _, e := range entries {
		sum, path := e.SHA256, e.Path
		if sum == "" {
			sum = "-"
		}
		if e.Target != "" {
			path += " -> " + e.Target
		}
		if e.Device != 0 {
			path += fmt.Sprintf(" (device %d:%d)", e.Device>>32, e.Device&0xffffffff)
		}
		for _, name := range slices.Sorted(maps.Keys(e.Xattrs)) {
			path += fmt.Sprintf(" %s=0x%s", name, e.Xattrs[name])
		}
		line("%v\t%d:%d\t%d\t%s\t%s\t%s", e.Mode, e.UID, e.GID, e.Size, e.Time.Format(time.RFC3339), sum, path)
	}
}

// ImageDiffCmd tells why two artefacts are not the same.
type ImageDiffCmd struct {
	A    string `arg:"" help:"A UKI or a disk."`
	B    string `arg:"" help:"Another of the same kind."`
	All  bool   `help:"List every cause, not only the first."`
	JSON bool   `name:"json" help:"Print one JSON document."`
}

// Run prints "equal", or the first cause of a difference.
func (c *ImageDiffCmd) Run(ctx context.Context) error {
	found, err := inspect.Diff(ctx, c.A, c.B, c.All)
	if err != nil {
		return &exitError{exitBadInput, err}
	}
	if err := printDifferences(os.Stdout, found, c.JSON); err != nil {
		return err
	}
	if len(found) > 0 {
		return &exitError{code: exitDifferent}
	}
	return nil
}

func printDifferences(out io.Writer, found []inspect.Difference, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(map[string]any{
			"equal": len(found) == 0, "differences": append([]inspect.Difference{}, found...),
		})
	}
	if len(found) == 0 {
		_, err := fmt.Fprintln(out, "equal")
		return err
	}
	var failed error
	for _, d := range found {
		_, err := fmt.Fprintln(out, terminal.Line(d.String()))
		failed = errors.Join(failed, err)
	}
	return failed
}
