package models

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"hash"
	"io"
	"io/fs"
	"os"
	"time"

	"chrysalis/verity"
)

// modelTree is the file system that Pack packs. /model.json holds the hash of
// /model.gguf, yet the model is read only once: disk.PackTree reads files of
// more than a block in order of their names, small ones after them, and a hash
// in hexadecimal has the same length whatever it is, so the content of
// model.json can wait until its turn. A model of less than a block, for which
// that order is not sure, is read beforehand.
type modelTree struct {
	file    *os.File
	stat    fs.FileInfo // of file, when its header was checked
	content io.ReaderAt
	sum     hash.Hash
	read    int64 // bytes of content that went into sum
	info    Info
}

func newTree(f *os.File, stat fs.FileInfo, name, revision string) (*modelTree, error) {
	t := &modelTree{
		file:    f,
		stat:    stat,
		content: f,
		sum:     sha256.New(),
		info:    Info{Name: name, Revision: revision, Size: stat.Size()},
	}
	if t.info.Size <= verity.BlockSize {
		b := make([]byte, t.info.Size)
		if _, err := io.ReadFull(io.NewSectionReader(f, 0, t.info.Size), b); err != nil {
			return nil, err
		}
		t.content = bytes.NewReader(b)
		t.Write(b)
	}
	return t, nil
}

func (t *modelTree) Open(name string) (fs.File, error) {
	st, err := t.Stat(name)
	if err != nil {
		return nil, err
	}
	switch name {
	case GGUFName:
		r := io.NewSectionReader(t.content, 0, t.info.Size)
		if t.read == t.info.Size {
			return file{st, r}, nil
		}
		return file{st, io.TeeReader(r, t)}, nil
	case InfoName:
		if err := t.finish(); err != nil {
			return nil, err
		}
		return file{st, bytes.NewReader(t.info.json())}, nil
	}
	return nil, &fs.PathError{Op: "open", Path: name, Err: errors.New("is a directory")}
}

// Write takes what is read of the model.
func (t *modelTree) Write(p []byte) (int, error) {
	t.read += int64(len(p))
	return t.sum.Write(p)
}

// finish fixes the model's hash, and refuses a file that was written to since
// its header was checked.
func (t *modelTree) finish() error {
	now, err := t.file.Stat()
	if err != nil {
		return err
	}
	if t.read != t.info.Size || now.Size() != t.stat.Size() || !now.ModTime().Equal(t.stat.ModTime()) {
		return errors.New("the file changed while it was packed")
	}
	t.sum.Sum(t.info.SHA256[:0])
	return nil
}

func (t *modelTree) Stat(name string) (fs.FileInfo, error) {
	switch name {
	case ".":
		return entry{name: ".", mode: fs.ModeDir | 0o755}, nil
	case GGUFName:
		return entry{name: name, mode: 0o444, size: t.info.Size}, nil
	case InfoName:
		return entry{name: name, mode: 0o444, size: int64(len(t.info.json()))}, nil
	}
	return nil, &fs.PathError{Op: "stat", Path: name, Err: fs.ErrNotExist}
}

func (t *modelTree) ReadDir(name string) ([]fs.DirEntry, error) {
	if name != "." {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrNotExist}
	}
	var list []fs.DirEntry
	for _, n := range []string{GGUFName, InfoName} {
		st, err := t.Stat(n)
		if err != nil {
			return nil, err
		}
		list = append(list, fs.FileInfoToDirEntry(st))
	}
	return list, nil
}

type file struct {
	st fs.FileInfo
	io.Reader
}

func (f file) Stat() (fs.FileInfo, error) { return f.st, nil }
func (f file) Close() error               { return nil }

type entry struct {
	name string
	mode fs.FileMode
	size int64
}

func (e entry) Name() string       { return e.name }
func (e entry) Size() int64        { return e.size }
func (e entry) Mode() fs.FileMode  { return e.mode }
func (e entry) ModTime() time.Time { return time.Time{} }
func (e entry) IsDir() bool        { return e.mode.IsDir() }
func (e entry) Sys() any           { return nil }
