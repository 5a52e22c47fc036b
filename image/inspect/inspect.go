// Package inspect looks into the artefacts that package image makes: UKIs and
// disks. Inspect tells what is inside one; Diff tells why two are not the same.
//
// It is for auditors, who point it at files that they do not trust. Reading is
// strict, and bounded by what a file holds, never by what its headers say: what
// is not understood is an error that names the place, so that nothing goes
// unseen. It never mounts, executes or writes what it reads.
package inspect

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"chrysalis/image/profile"
	"chrysalis/models/card"
)

// Progress is told how far a step is, in bytes.
type Progress func(step string, done, total int64)

// A file is a file or block device, open for reading.
type file struct {
	*os.File
	size int64
}

func openFile(path string) (*file, error) {
	info, err := os.Stat(path) // before it is opened: a pipe would block
	if err != nil {
		return nil, err
	}
	if m := info.Mode(); !m.IsRegular() && m.Type() != os.ModeDevice {
		return nil, fmt.Errorf("%s: not a file or block device", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &file{f, size}, nil
}

// An artefact is an open UKI or disk; one of the two is nil.
type artefact struct {
	*file
	path string
	uki  *UKI
	disk *Disk
}

// open finds out what the file at path is.
func open(ctx context.Context, path string) (_ *artefact, err error) {
	f, err := openFile(path)
	if err != nil {
		return nil, err
	}
	a := &artefact{file: f, path: path}
	start := make([]byte, min(f.size, 520))
	if err = readAt(f, start, 0, f.size, "its start"); err == nil {
		switch {
		case len(start) == 520 && string(start[512:]) == "EFI PART":
			a.disk, err = newDisk(ctx, f)
		case len(start) >= 2 && string(start[:2]) == "MZ":
			a.uki, err = newUKI(ctx, f)
		case len(start) >= 4 && string(start[:4]) == "QFI\xfb":
			err = errors.New("a qcow2 image; convert it first, with 'qemu-img convert -O raw'")
		default:
			err = errors.New("neither a UKI (no \"MZ\" at byte 0) nor a disk with a GPT (no \"EFI PART\" at byte 512)")
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return a, nil
}

func (a *artefact) Close() error {
	if a.uki != nil {
		return a.uki.Close()
	}
	return a.file.Close()
}

// A Report is what an artefact holds. Its JSON form is part of the command
// line's interface.
type Report struct {
	File   string      `json:"file"`
	Size   int64       `json:"size"` // bytes
	SHA256 string      `json:"sha256"`
	UKI    *UKIReport  `json:"uki,omitempty"`
	Disk   *DiskReport `json:"disk,omitempty"`
	// Problems are what the artefact says of itself and is not so.
	Problems []string `json:"problems"`
}

// A UKIReport is what a UKI holds.
type UKIReport struct {
	Sections    []SectionReport   `json:"sections"`
	CommandLine string            `json:"command_line"`
	Kernel      string            `json:"kernel"`
	Stub        string            `json:"stub"`
	OSRelease   map[string]string `json:"os_release"`
	Initrd      *InitrdReport     `json:"initrd,omitempty"`
}

// A SectionReport describes a PE section's content, without padding.
type SectionReport struct {
	Name   string `json:"name"`
	Offset uint32 `json:"offset"` // in the file, in bytes
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// An InitrdReport lists an initrd in its own order.
type InitrdReport struct {
	Compression string  `json:"compression"`
	PackedSize  int64   `json:"packed_size"`
	Size        int64   `json:"size"`
	Entries     []Entry `json:"entries"`
}

// A DiskReport is what a disk holds.
type DiskReport struct {
	GUID       string            `json:"guid"`
	Partitions []PartitionReport `json:"partitions"`
}

// A PartitionReport describes a partition; at most one of the last two is set.
type PartitionReport struct {
	Number     int             `json:"number"` // from 1
	Type       string          `json:"type"`
	Kind       string          `json:"kind"` // what the type means to Chrysalis, or ""
	UUID       string          `json:"uuid"`
	Name       string          `json:"name"`
	Attributes string          `json:"attributes"` // hexadecimal, for a program may read numbers as floating point
	Offset     int64           `json:"offset"`     // bytes
	Size       int64           `json:"size"`       // bytes
	SHA256     string          `json:"sha256"`
	Verity     *VerityReport   `json:"verity,omitempty"`
	Manifest   json.RawMessage `json:"manifest,omitempty"`
}

// A VerityReport is on the data partition of a verity disk.
type VerityReport struct {
	RootHash      string  `json:"root_hash"`
	Salt          string  `json:"salt"` // hexadecimal
	DataBlocks    uint64  `json:"data_blocks"`
	HashBlocks    uint64  `json:"hash_blocks"`
	HashPartition int     `json:"hash_partition"` // its number
	Entries       []Entry `json:"entries"`
	// Model is NAME@REVISION:ROOTHASH of a model disk.
	Model string `json:"model,omitempty"`
	// Profile is the profile of an engine disk.
	Profile *profile.Profile `json:"profile,omitempty"`
}

// Inspect tells what is inside the UKI or disk at path. It reads all of it, and
// checks every block of a verity disk. An error means that it cannot be read as
// either; what can be read and does not hold is under Problems.
func Inspect(ctx context.Context, path string, progress Progress) (*Report, error) {
	a, err := open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	if progress == nil {
		progress = func(string, int64, int64) {}
	}
	progress("hash "+path, 0, 0)
	r := &Report{File: path, Size: a.size, Problems: []string{}}
	if r.SHA256, err = sectionContent(io.NewSectionReader(a, 0, a.size)).sum(ctx); err == nil {
		if a.uki != nil {
			r.UKI, err = a.uki.report(ctx)
		} else {
			r.Disk, err = a.disk.report(ctx, r, progress)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r *Report) problem(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

func (u *UKI) report(ctx context.Context) (*UKIReport, error) {
	r := &UKIReport{CommandLine: u.CommandLine, Kernel: u.Kernel, Stub: u.Stub, OSRelease: u.OSRelease}
	for _, s := range u.Sections {
		sum, err := sectionContent(s.Content).sum(ctx)
		if err != nil {
			return nil, fmt.Errorf("section %s: %w", s.Name, err)
		}
		r.Sections = append(r.Sections, SectionReport{s.Name, s.Offset, s.Content.Size(), sum})
	}
	if i := u.Initrd; i != nil {
		if err := hash(ctx, i.Entries); err != nil {
			return nil, fmt.Errorf("section .initrd: %w", err)
		}
		r.Initrd = &InitrdReport{i.Compression, i.PackedSize, i.Size, i.Entries}
	}
	return r, nil
}

func (d *Disk) report(ctx context.Context, r *Report, progress Progress) (*DiskReport, error) {
	out := &DiskReport{GUID: d.Table.Disk.String()}
	for i, p := range d.Table.Partitions {
		sum, err := d.partition(i).sum(ctx)
		if err != nil {
			return nil, fmt.Errorf("partition %d: %w", i+1, err)
		}
		pr := PartitionReport{
			Number: i + 1, Type: p.Type.String(), Kind: kind(p.Type), UUID: p.UUID.String(), Name: p.Name,
			Attributes: fmt.Sprintf("%#x", p.Attributes), Offset: p.Offset, Size: p.Size, SHA256: sum,
		}
		if raw, err := d.manifest(i); err != nil {
			r.problem("partition %d: %v", i+1, err)
		} else if raw != nil {
			pr.Manifest = raw
		}
		if err := d.broken[i]; err != nil {
			r.problem("partition %d: %v", i+1, err)
		}
		if v := d.Trees[i]; v != nil {
			if err := v.verify(ctx, func(done, total int64) { progress("check the hash tree", done, total) }); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				r.problem("partition %d: %v", i+1, err)
			}
			progress("hash the files", 0, 0)
			if err := hash(ctx, v.Entries); err != nil {
				return nil, fmt.Errorf("partition %d: %w", i+1, err)
			}
			pr.Verity = v.report(i+1, r)
		}
		out.Partitions = append(out.Partitions, pr)
	}
	return out, nil
}

func (v *Tree) report(number int, r *Report) *VerityReport {
	out := &VerityReport{
		RootHash: v.RootHash.String(), Salt: fmt.Sprintf("%x", v.Salt), DataBlocks: v.DataBlocks, HashBlocks: v.HashBlocks,
		HashPartition: v.HashPartition + 1, Entries: v.Entries,
	}
	for _, e := range v.Entries {
		switch e.Path {
		case profile.Path:
			raw, err := e.Content(profile.MaxSize)
			if err == nil {
				out.Profile, err = profile.Parse(raw)
			}
			if err != nil {
				r.problem("partition %d: %v", number, err)
			}
		case card.Path:
			info, err := v.model()
			if err != nil {
				r.problem("partition %d: %v", number, err)
				continue
			}
			out.Model = info.Ref()
			sums := map[string]string{}
			for _, file := range info.Files {
				sums[file.Path] = file.SHA256
			}
			for _, file := range v.Entries {
				if sum, ok := sums[file.Path]; ok && file.SHA256 != sum {
					r.problem("partition %d: /%s has the SHA-256 %s, /%s says %s", number, file.Path, file.SHA256, card.Path, sum)
				}
			}
		}
	}
	return out
}

// parseOSRelease reads os-release(5), as far as it needs no shell.
func parseOSRelease(text string) map[string]string {
	values := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		values[key] = value
	}
	return values
}
