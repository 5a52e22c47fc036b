// Package engine makes engine disks: verity disks whose root file system is an
// inference server's, with the profile that says how it is run.
//
// The root comes from a folder, a tar stream, or an OCI image that is named by its
// digest: its layers are put on top of each other, and every digest on the way from
// the name to the content is compared. A disk is a function of the files and the
// profile; see package disk.
package engine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"chrysalis/image/driver"
	"chrysalis/image/profile"
	"chrysalis/verity"
	"chrysalis/verity/disk"
)

// Options say what goes onto an engine disk and where it goes.
type Options struct {
	Out     string // path of the disk; what it is is at Out + ".json"
	Replace bool   // take the place of what is at Out
	// Profile is the engine's profile. Nil takes the one that the root has at
	// profile.Path; otherwise it must have none.
	Profile []byte
	// GPUDriver is a folder with a GPU driver (package image/driver), "" for none. Its
	// modules must be for the kernel of that release, and may depend on those of
	// KernelModules, which the image loads before.
	GPUDriver     string
	Kernel        string
	KernelModules []string

	KeepPartial bool
	Progress    func(step string, done, total int64)
	Note        func(string)
	Stream      io.Reader // read if the source is "-"
}

// Info describes an engine disk.
type Info struct {
	Profile     *profile.Profile
	ProfileHash [32]byte // SHA-256 of the profile's bytes
	Source      string   // the image's digest, or ""
	Disk        verity.Description
	Driver      *driver.Driver // of GPUs, or nil

	closers []io.Closer
}

// mountPoints are what the sandbox mounts over: they are empty folders on a disk.
var mountPoints = []string{"dev", "models", "proc", "run", "tmp"}

// Pack makes an engine disk from src: a folder, "-" for a tar stream,
// "oci:DIR@sha256:…" for an image in an OCI layout, or "docker://NAME@sha256:…" for
// one in a registry. Set-id bits, extended attributes and device nodes are dropped,
// and so is what is in /dev, /models, /proc, /run, /tmp.
//
// The error wraps ErrImage or ErrRoot, is the profile's, or the file system's.
func Pack(ctx context.Context, src string, o Options) (Info, error) {
	info, err := pack(ctx, src, o)
	if err != nil {
		return Info{}, fmt.Errorf("pack engine %s: %w", src, err)
	}
	return info, nil
}

func pack(ctx context.Context, src string, o Options) (info Info, err error) {
	progress := func(step string, done, total int64) {
		if o.Progress != nil {
			o.Progress(step, done, total)
		}
	}
	var entries []disk.Entry
	if src == "-" || strings.HasPrefix(src, "oci:") || strings.HasPrefix(src, "docker://") {
		r, openErr := newRoot(o.Out)
		if openErr != nil {
			return info, openErr
		}
		defer func() { err = errors.Join(err, r.spool.Close()) }()
		if src == "-" {
			progress("unpack", 0, 0)
			err = r.readTar(ctx, o.Stream, false)
		} else {
			info.Source, err = r.readImage(ctx, src, progress)
		}
		if err != nil {
			return info, err
		}
		if r.dropped > 0 && o.Note != nil {
			o.Note(fmt.Sprintf("%d device nodes or pipes are left out", r.dropped))
		}
		entries = r.list()
	} else if entries, err = disk.Walk(ctx, os.DirFS(src)); err != nil {
		return info, err
	}
	if entries, err = info.addProfile(entries, o.Profile); err != nil {
		return info, err
	}
	defer func() {
		for _, c := range info.closers {
			err = errors.Join(err, c.Close())
		}
	}()
	if o.GPUDriver != "" {
		if entries, err = info.addDriver(ctx, entries, o); err != nil {
			return info, err
		}
	} else if info.Profile.Needs.GPUs.Min > 0 && o.Note != nil {
		o.Note("the profile needs GPUs, and the disk carries no driver for them: give one with --gpu-driver")
	}
	salt := sha256.Sum256([]byte("chrysalis/engine-salt/v1\n" + info.Profile.Name))
	info.Disk, err = disk.Pack(ctx, entries, o.Out, disk.Options{
		Salt: salt[:], Replace: o.Replace, KeepPartial: o.KeepPartial, Progress: o.Progress,
		Fragment: func(d verity.Description) any {
			info.Disk = d
			return info.Fragment()
		},
	})
	return info, err
}

// readImage reads an image's layers, and returns its digest.
func (r *root) readImage(ctx context.Context, src string, progress func(string, int64, int64)) (string, error) {
	s, h, err := openImage(src)
	if err != nil {
		return "", err
	}
	list, err := layers(ctx, s, h)
	if err != nil {
		return "", err
	}
	for i, l := range list {
		progress(fmt.Sprintf("unpack layer %d of %d", i+1, len(list)), 0, 0)
		if err := r.readLayer(ctx, s, l); err != nil {
			return "", err
		}
	}
	return h.String(), nil
}

// addProfile puts the profile and the mount points into their places, and checks
// that the program is there.
func (i *Info) addProfile(entries []disk.Entry, given []byte) ([]disk.Entry, error) {
	byPath := map[string]disk.Entry{}
	var out []disk.Entry
	for _, e := range entries {
		top, _, below := strings.Cut(e.Path, "/")
		mount := false
		for _, m := range mountPoints {
			mount = mount || top == m
		}
		if mount {
			if !below && !e.Mode.IsDir() {
				return nil, refuseRoot("/%s is no folder; the sandbox mounts something there", top)
			}
			continue
		}
		byPath[e.Path] = e
		if e.Path != profile.Path || given == nil {
			out = append(out, e)
		}
	}
	for _, m := range mountPoints {
		out = append(out, disk.Entry{Path: m, Mode: fs.ModeDir | 0o755})
	}
	own, has := byPath[profile.Path]
	switch {
	case given == nil && !has:
		return nil, refuseRoot("it has no /%s; give a profile", profile.Path)
	case given != nil && has:
		return nil, refuseRoot("it has a /%s of its own", profile.Path)
	case given == nil:
		f, err := own.Open()
		if err != nil {
			return nil, err
		}
		given, err = io.ReadAll(io.NewSectionReader(f, 0, min(own.Size, profile.MaxSize+1)))
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	default:
		out = append(out, disk.Entry{
			Path: profile.Path, Mode: 0o444, Size: int64(len(given)),
			Open: func() (disk.Content, error) { return noClose{strings.NewReader(string(given))}, nil },
		})
	}
	p, err := profile.Parse(given)
	if err != nil {
		return nil, err
	}
	i.Profile, i.ProfileHash = p, sha256.Sum256(given)
	program, err := lookUp(byPath, p.Argv[0].Args[0])
	if err != nil {
		return nil, err
	}
	if !program.Mode.IsRegular() || program.Mode&0o111 == 0 {
		return nil, refuseRoot("the profile's program %s is not an executable file", p.Argv[0].Args[0])
	}
	return out, nil
}

// lookUp finds what a path leads to, links followed inside the root.
func lookUp(byPath map[string]disk.Entry, name string) (disk.Entry, error) {
	parts, at := strings.Split(strings.TrimPrefix(name, "/"), "/"), "."
	var e disk.Entry
	for links := 0; len(parts) > 0; {
		if parts[0] == "" || parts[0] == "." {
			parts = parts[1:]
			continue
		}
		next := path.Join(at, parts[0])
		if parts[0] == ".." {
			next = strings.TrimPrefix(path.Join("/", at, ".."), "/")
		}
		parts = parts[1:]
		if next == "" || next == "." {
			at = "."
			continue
		}
		var ok bool
		if e, ok = byPath[next]; !ok {
			return e, refuseRoot("the profile's program %s is not there: /%s is missing", name, next)
		}
		at = next
		if e.Mode.Type() == fs.ModeSymlink {
			if links++; links > maxLinks {
				return e, refuseRoot("the profile's program %s is a link that leads round in circles", name)
			}
			if at = path.Dir(next); path.IsAbs(e.Target) {
				at = "."
			}
			parts = append(strings.Split(e.Target, "/"), parts...)
		}
	}
	return e, nil
}

// A Fragment is what is written beside an engine disk.
type Fragment struct {
	Name          string `json:"name"`
	Status        string `json:"status"` // the profile's
	ProfileSHA256 string `json:"profile_sha256"`
	Source        string `json:"source,omitempty"`     // the image's digest
	GPUDriver     string `json:"gpu_driver,omitempty"` // its version
	Disk          struct {
		RootHash   string `json:"root_hash"`
		Salt       string `json:"salt"`
		DataBlocks uint64 `json:"data_blocks"`
		DataOffset int64  `json:"data_offset"` // bytes
		HashOffset int64  `json:"hash_offset"` // bytes
		Size       int64  `json:"size"`        // bytes
	} `json:"disk"`
}

// Fragment describes the disk for a program.
func (i Info) Fragment() Fragment {
	f := Fragment{Name: i.Profile.Name, Status: i.Profile.Status, ProfileSHA256: hex.EncodeToString(i.ProfileHash[:]), Source: i.Source}
	if i.Driver != nil {
		f.GPUDriver = i.Driver.Driver
	}
	f.Disk.RootHash, f.Disk.Salt, f.Disk.DataBlocks = i.Disk.RootHash.String(), hex.EncodeToString(i.Disk.Salt), i.Disk.DataBlocks
	f.Disk.DataOffset, f.Disk.HashOffset, f.Disk.Size = i.Disk.DataOffset, i.Disk.HashOffset, i.Disk.Size
	return f
}
