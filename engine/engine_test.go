package engine

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"chrysalis/engine/enginetest"
	"chrysalis/image/profile"
	"chrysalis/verity/disk"
)

const testProfile = `{"version":1,"name":"test","argv":[{"args":["/usr/bin/serve","--uds","${socket}"]}],"environment":{},"parameters":{},
"formats":["gguf"],"needs":{"memory_mib":0,"gpus":{"min":0,"max":0}},"loopback":false,"cache":"none","status":"untested",
"health":"/health","ready_seconds":5,"seccomp":[]}`

var (
	file = enginetest.File
	dir  = enginetest.Dir
	link = enginetest.Link
)

// base is what every test's lowest layer has: a merged /usr and the program.
func base(more ...enginetest.Entry) enginetest.Layer {
	return append(enginetest.Layer{dir("usr/"), dir("usr/bin"), link("bin", "usr/bin"), file("./usr/bin/serve", "#!", 0o4755)}, more...)
}

func packed(t *testing.T, src string, o Options) (Info, map[string]string) {
	t.Helper()
	if o.Out == "" {
		o.Out = filepath.Join(t.TempDir(), "engine.disk")
	}
	if o.Profile == nil {
		o.Profile = []byte(testProfile)
	}
	info, err := Pack(context.Background(), src, o)
	if err != nil {
		t.Fatal(err)
	}
	return info, content(t, o.Out)
}

// content returns what is on a disk: files, links with an arrow, folders with a
// slash.
func content(t *testing.T, path string) map[string]string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, _ := f.Stat()
	_, fsys, err := disk.OpenTree(f, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	err = fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			out[name+"/"] = ""
		case d.Type() == fs.ModeSymlink:
			out[name], err = fs.ReadLink(fsys, name)
			out[name] = "→" + out[name]
		default:
			var b []byte
			b, err = fs.ReadFile(fsys, name)
			out[name] = string(b)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestLayers(t *testing.T) {
	for _, tt := range []struct {
		name   string
		layers []enginetest.Layer
		want   map[string]string // beside base; "" is gone
	}{
		{"one", []enginetest.Layer{base(file("etc/a", "1", 0o644))}, map[string]string{"etc/a": "1"}},
		{"a file over a file", []enginetest.Layer{base(file("a", "1", 0o644)), {file("a", "2", 0o644)}}, map[string]string{"a": "2"}},
		{"a whiteout", []enginetest.Layer{base(file("d/a", "1", 0o644), file("d/b", "2", 0o644)), {file("d/.wh.a", "", 0)}}, map[string]string{"d/a": "", "d/b": "2"}},
		{"a whiteout of a folder", []enginetest.Layer{base(file("d/x/y/z", "1", 0o644)), {file("d/.wh.x", "", 0)}}, map[string]string{"d/x/": "", "d/x/y/z": "", "d/": "/"}},
		{"a whiteout hides earlier layers only", []enginetest.Layer{base(file("d/a", "1", 0o644)), {file("d/a", "2", 0o644), file("d/.wh.a", "", 0)}}, map[string]string{"d/a": "2"}},
		{"an opaque folder", []enginetest.Layer{base(file("d/a", "1", 0o644), file("d/s/b", "1", 0o644)), {file("d/c", "3", 0o644), file("d/.wh..wh..opq", "", 0), file("d/e", "4", 0o644)}},
			map[string]string{"d/a": "", "d/s/": "", "d/c": "3", "d/e": "4"}},
		{"a whiteout and back", []enginetest.Layer{base(file("a", "1", 0o644)), {file(".wh.a", "", 0)}, {file("a", "3", 0o644)}}, map[string]string{"a": "3"}},
		{"a file over a folder", []enginetest.Layer{base(file("d/a", "1", 0o644)), {file("d", "2", 0o644)}}, map[string]string{"d": "2", "d/": "", "d/a": ""}},
		{"a folder over a file", []enginetest.Layer{base(file("d", "1", 0o644)), {dir("d"), file("d/a", "2", 0o644)}}, map[string]string{"d": "", "d/a": "2"}},
		{"through a link", []enginetest.Layer{base(), {file("bin/tool", "1", 0o755)}}, map[string]string{"usr/bin/tool": "1", "bin": "→usr/bin"}},
		{"through a link that climbs", []enginetest.Layer{base(link("out", "../../../../../../etc")), {file("out/passwd", "mine", 0o644)}}, map[string]string{"etc/passwd": "mine"}},
		{"through an absolute link", []enginetest.Layer{base(link("out", "/etc")), {file("out/passwd", "mine", 0o644)}}, map[string]string{"etc/passwd": "mine"}},
		{"a hard link", []enginetest.Layer{base(file("a", "1", 0o644)), {{Header: tar.Header{Name: "b", Linkname: "./a", Typeflag: tar.TypeLink}}, file("a", "2", 0o644)}}, map[string]string{"a": "2", "b": "1"}},
		{"what is mounted over", []enginetest.Layer{base(file("tmp/x", "1", 0o644), file("run/y", "1", 0o644),
			enginetest.Entry{Header: tar.Header{Name: "dev/null", Typeflag: tar.TypeChar}})}, map[string]string{"tmp/x": "", "run/y": "", "dev/null": "", "tmp/": "/"}},
		{"a device elsewhere", []enginetest.Layer{base(enginetest.Entry{Header: tar.Header{Name: "x", Typeflag: tar.TypeBlock}})}, map[string]string{"x": ""}},
		{"an absolute name", []enginetest.Layer{base(file("/etc/a", "1", 0o644))}, map[string]string{"etc/a": "1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src := enginetest.New(t, tt.layers...).Write(t)
			info, got := packed(t, src, Options{})
			if !strings.HasSuffix(src, info.Source) || info.Source == "" || got["usr/bin/serve"] != "#!" || got[profile.Path] != testProfile {
				t.Errorf("%+v, %v", info, got)
			}
			for name, want := range tt.want {
				v, there := got[name]
				if want == "/" && there || want == "" && !there || want == v && there {
					continue
				}
				t.Errorf("%s: %q (%v), expected %q", name, v, there, want)
			}
		})
	}
}

// The same files from a folder, a tar stream and an image give the same disk.
func TestSourcesAgree(t *testing.T) {
	layer := base(file("etc/a", "1", 0o600), link("etc/b", "a"), dir("etc/empty"))
	image, _ := packed(t, enginetest.New(t, layer).Write(t), Options{})
	stream, _ := packed(t, "-", Options{Stream: bytes.NewReader(layer.Tar(t))})
	top := t.TempDir()
	os.Chmod(top, 0o755)
	for _, e := range layer {
		path := filepath.Join(top, e.Name)
		switch e.Typeflag {
		case tar.TypeDir:
			os.MkdirAll(path, 0o755)
		case tar.TypeSymlink:
			os.MkdirAll(filepath.Dir(path), 0o755)
			os.Symlink(e.Linkname, path)
		default:
			os.MkdirAll(filepath.Dir(path), 0o755)
			os.WriteFile(path, []byte(e.Content), 0o600)
			os.Chmod(path, fs.FileMode(e.Mode).Perm())
		}
	}
	folder, _ := packed(t, top, Options{})
	if image.Disk.RootHash != stream.Disk.RootHash || image.Disk.RootHash != folder.Disk.RootHash {
		t.Errorf("image %s, stream %s, folder %s", image.Disk.RootHash, stream.Disk.RootHash, folder.Disk.RootHash)
	}
}

func TestIndex(t *testing.T) {
	im := enginetest.New(t, base())
	im.Manifest["config"] = im.AddJSON(t, im.Config, "application/vnd.oci.image.config.v1+json")
	m := im.AddJSON(t, im.Manifest, "application/vnd.oci.image.manifest.v1+json")
	platform := func(arch string) map[string]any {
		c := maps.Clone(m)
		c["platform"] = map[string]any{"os": "linux", "architecture": arch}
		return c
	}
	const kind = "application/vnd.oci.image.index.v1+json"
	src := im.WriteAs(t, im.AddJSON(t, map[string]any{"schemaVersion": 2, "manifests": []any{platform("arm64"), platform("amd64")}}, kind))
	packed(t, src, Options{})
	for name, list := range map[string][]any{"none": {platform("arm64")}, "two": {platform("amd64"), platform("amd64")}, "empty": {}} {
		src := im.WriteAs(t, im.AddJSON(t, map[string]any{"schemaVersion": 2, "manifests": list}, kind))
		if _, err := Pack(context.Background(), src, Options{Out: filepath.Join(t.TempDir(), "x"), Profile: []byte(testProfile)}); !errors.Is(err, ErrImage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPackRefuses(t *testing.T) {
	blob := func(im *enginetest.Image, i int) string {
		return im.Manifest["layers"].([]any)[i].(map[string]any)["digest"].(string)
	}
	layerOf := func(e ...enginetest.Entry) func(*testing.T) string {
		return func(t *testing.T) string { return enginetest.New(t, base(), enginetest.Layer(e)).Write(t) }
	}
	change := func(f func(*enginetest.Image)) func(*testing.T) string {
		return func(t *testing.T) string {
			im := enginetest.New(t, base())
			f(im)
			return im.Write(t)
		}
	}
	for _, tt := range []struct {
		name    string
		src     func(*testing.T) string
		profile string
		want    error
		says    string
	}{
		{"a tag", func(*testing.T) string { return "oci:/x:latest" }, testProfile, ErrImage, "digest"},
		{"a short digest", func(*testing.T) string { return "docker://x/y@sha256:12" }, testProfile, ErrImage, "sha256"},
		{"another algorithm", func(*testing.T) string { return "oci:/x@sha512:" + strings.Repeat("ab", 64) }, testProfile, ErrImage, "sha256"},
		{"no layout", func(t *testing.T) string { return "oci:" + t.TempDir() + "@" + enginetest.Digest(nil) }, testProfile, ErrImage, "layout"},
		{"no such manifest", func(t *testing.T) string {
			src := enginetest.New(t, base()).Write(t)
			return src[:strings.Index(src, "@")+1] + enginetest.Digest(nil)
		}, testProfile, fs.ErrNotExist, ""},
		{"a manifest that was changed", func(t *testing.T) string {
			src := enginetest.New(t, base()).Write(t)
			dir, hex := src[4:strings.Index(src, "@")], src[len(src)-64:]
			path := filepath.Join(dir, "blobs/sha256", hex)
			b, _ := os.ReadFile(path)
			os.WriteFile(path, append(b, ' '), 0o644)
			return src
		}, testProfile, ErrImage, "has the SHA-256"},
		{"a layer that was changed", change(func(im *enginetest.Image) {
			b := im.Blobs[blob(im, 0)]
			b[len(b)-1] ^= 1
		}), testProfile, nil, "layer"},
		{"a layer that is cut", change(func(im *enginetest.Image) { im.Blobs[blob(im, 0)] = im.Blobs[blob(im, 0)][:100] }), testProfile, nil, "layer"},
		{"a layer with more behind it", change(func(im *enginetest.Image) {
			im.Blobs[blob(im, 0)] = append(im.Blobs[blob(im, 0)], "more"...)
		}), testProfile, nil, "layer"},
		{"another layer's content", change(func(im *enginetest.Image) {
			im.Config["rootfs"] = map[string]any{"diff_ids": []string{enginetest.Digest(nil)}}
		}), testProfile, ErrImage, "expected"},
		{"layers not in the configuration", change(func(im *enginetest.Image) { im.Config["rootfs"] = map[string]any{"diff_ids": []string{}} }), testProfile, ErrImage, "0 in its configuration"},
		{"another machine's", change(func(im *enginetest.Image) { im.Config["architecture"] = "arm64" }), testProfile, ErrImage, "arm64"},
		{"no layers", change(func(im *enginetest.Image) { im.Manifest["layers"] = []any{} }), testProfile, ErrImage, "0 layers"},
		{"a foreign layer", change(func(im *enginetest.Image) {
			im.Manifest["layers"].([]any)[0].(map[string]any)["mediaType"] = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
		}), testProfile, ErrImage, "type"},
		{"an index and an image", change(func(im *enginetest.Image) { im.Manifest["manifests"] = []any{} }), testProfile, ErrImage, "at once"},
		{"a path that climbs", layerOf(file("../x", "", 0)), testProfile, ErrRoot, "climbs"},
		{"a hard link that climbs", layerOf(enginetest.Entry{Header: tar.Header{Name: "x", Linkname: "../../etc/passwd", Typeflag: tar.TypeLink}}), testProfile, ErrRoot, "climbs"},
		{"a hard link to nothing", layerOf(enginetest.Entry{Header: tar.Header{Name: "x", Linkname: "none", Typeflag: tar.TypeLink}}), testProfile, ErrRoot, "no file"},
		{"links in circles", layerOf(link("a", "b"), link("b", "a"), file("a/x", "", 0)), testProfile, ErrRoot, "circles"},
		{"a file in a file", layerOf(file("a", "", 0), file("a/b", "", 0)), testProfile, ErrRoot, "no folder"},
		{"an odd whiteout", layerOf(file(".wh.", "", 0)), testProfile, ErrRoot, "whiteout"},
		{"a mount point that is a link", layerOf(link("tmp", "/etc")), testProfile, ErrRoot, "/tmp is no folder"},
		{"no program", layerOf(file("usr/bin/.wh.serve", "", 0)), testProfile, ErrRoot, "not there"},
		{"a program that cannot run", layerOf(file("usr/bin/serve", "", 0o644)), testProfile, ErrRoot, "executable"},
		{"a profile of its own", layerOf(file("chrysalis/profile.json", testProfile, 0o644)), testProfile, ErrRoot, "of its own"},
		{"a profile that is none", layerOf(), `{"version":2}`, nil, "version is 2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out := filepath.Join(t.TempDir(), "engine.disk")
			_, err := Pack(context.Background(), tt.src(t), Options{Out: out, Profile: []byte(tt.profile)})
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, expected %q", err, tt.says)
			}
			if left, _ := os.ReadDir(filepath.Dir(out)); len(left) != 0 {
				t.Errorf("left %v", left)
			}
		})
	}
	out := filepath.Join(t.TempDir(), "engine.disk")
	if _, err := Pack(context.Background(), enginetest.New(t, base()).Write(t), Options{Out: out}); !errors.Is(err, ErrRoot) || !strings.Contains(err.Error(), "give a profile") {
		t.Errorf("without a profile: %v", err)
	}
	own := base(file("chrysalis/profile.json", testProfile, 0o644))
	if info, err := Pack(context.Background(), enginetest.New(t, own).Write(t), Options{Out: out}); err != nil || info.Profile.Name != "test" {
		t.Errorf("with a profile of its own: %v", err)
	}
}

// FuzzReadTar puts two hostile layers on top of each other. What comes out is a
// tree that a disk can hold.
func FuzzReadTar(f *testing.F) {
	seed := func(l enginetest.Layer) []byte { return l.Tar(f) }
	f.Add(seed(base()), seed(enginetest.Layer{file("usr/bin/.wh.serve", "", 0), link("x", "../.."), file("x/y", "1", 0o644)}))
	f.Add(seed(base(link("a", "b"), link("b", "a"))), seed(enginetest.Layer{file("d/.wh..wh..opq", "", 0)}))
	out := filepath.Join(f.TempDir(), "x")
	f.Fuzz(func(t *testing.T, a, b []byte) {
		r, err := newRoot(out)
		if err != nil {
			t.Fatal(err)
		}
		defer r.spool.Close()
		for _, layer := range [][]byte{a, b} {
			if err := r.readTar(t.Context(), io.LimitReader(bytes.NewReader(layer), 1<<20), true); err != nil {
				return
			}
		}
		var paths []string
		for _, e := range r.list() {
			if !fs.ValidPath(e.Path) {
				t.Errorf("path %q", e.Path)
			}
			paths = append(paths, e.Path)
		}
		slices.Sort(paths)
		if len(slices.Compact(paths)) != len(r.list()) {
			t.Error("a path is there twice")
		}
	})
}

// FuzzManifest reads hostile manifests, indexes and configurations.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"sha256:` + strings.Repeat("ab", 32) + `","size":1},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:` + strings.Repeat("ab", 32) + `","size":1}]}`))
	f.Add([]byte(`{"manifests":[{"platform":{"os":"linux","architecture":"amd64"}}]}`))
	f.Add([]byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":["sha256:` + strings.Repeat("ab", 32) + `"]}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if index, err := parseIndex(raw); err == nil && index != nil {
			_, _ = pick(index)
		}
		m, err := parseManifest(raw)
		if err != nil {
			return
		}
		_, _ = parseConfig(raw, m)
	})
}
