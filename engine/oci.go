package engine

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"
)

// ErrImage is what every refusal of an OCI image wraps.
var ErrImage = errors.New("not a usable OCI image")

// Bounds of an image.
const (
	maxManifest  = 4 << 20  // bytes of a manifest, an index or a configuration
	maxLayers    = 512      // overlayfs allows fewer
	maxLayerSize = 64 << 30 // bytes of a layer when it is unpacked
	maxWindow    = 128 << 20
)

func refuseImage(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrImage}, args...)...)
}

// A store gives out an image's blobs by digest. What it gives is checked against
// the digest by whoever reads it.
type store interface {
	manifest(ctx context.Context, h v1.Hash) (io.ReadCloser, error)
	// blob gives out a blob that should have at most size bytes.
	blob(ctx context.Context, h v1.Hash, size int64) (io.ReadCloser, error)
}

// openImage takes "oci:DIR@sha256:…" or "docker://NAME@sha256:…" apart. An image is
// named by digest, never by tag.
func openImage(src string) (store, v1.Hash, error) {
	scheme, rest, _ := strings.Cut(src, ":")
	at := strings.LastIndex(rest, "@")
	if at < 0 {
		return nil, v1.Hash{}, refuseImage("%s names no digest; add @sha256:…", src)
	}
	h, err := v1.NewHash(rest[at+1:])
	if err != nil || h.Algorithm != "sha256" {
		return nil, v1.Hash{}, refuseImage("%q is not sha256: and 64 hexadecimal digits", rest[at+1:])
	}
	if scheme == "oci" {
		path, err := layout.FromPath(rest[:at])
		if err != nil {
			return nil, v1.Hash{}, fmt.Errorf("%w: %s is not an OCI layout: %w", ErrImage, rest[:at], err)
		}
		return folder{path}, h, nil
	}
	ref, err := name.NewDigest(strings.TrimPrefix(rest, "//"))
	if err != nil {
		return nil, v1.Hash{}, fmt.Errorf("%w: %w", ErrImage, err)
	}
	r := registry{ref.Context()}
	if r.Scheme() == "http" && !r.local() {
		return nil, v1.Hash{}, refuseImage("%s would be asked without TLS, which only one on this machine is; give its name in the DNS", r.RegistryStr())
	}
	return r, h, nil
}

// folder is an OCI layout.
type folder struct{ layout.Path }

func (f folder) manifest(_ context.Context, h v1.Hash) (io.ReadCloser, error) { return f.Blob(h) }
func (f folder) blob(_ context.Context, h v1.Hash, _ int64) (io.ReadCloser, error) {
	return f.Blob(h)
}

// registry is a repository in a registry, read without credentials.
type registry struct{ name.Repository }

func (r registry) manifest(ctx context.Context, h v1.Hash) (io.ReadCloser, error) {
	d, err := remote.Get(r.Digest(h.String()), r.options(ctx, maxManifest)...)
	if err != nil {
		return nil, explain(err)
	}
	return io.NopCloser(bytes.NewReader(d.Manifest)), nil
}

func (r registry) blob(ctx context.Context, h v1.Hash, size int64) (io.ReadCloser, error) {
	l, err := remote.Layer(r.Digest(h.String()), r.options(ctx, max(size, maxManifest))...)
	if err != nil {
		return nil, explain(err)
	}
	blob, err := l.Compressed()
	return blob, explain(err)
}

func (r registry) options(ctx context.Context, limit int64) []remote.Option {
	return []remote.Option{remote.WithContext(ctx), remote.WithTransport(guarded{remote.DefaultTransport, r.local(), limit})}
}

// local reports whether the registry is on this machine.
func (r registry) local() bool { return loopback((&url.URL{Host: r.RegistryStr()}).Hostname()) }

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// explain adds what a user can do about an image that not everyone may read.
func explain(err error) error {
	refused, ok := errors.AsType[*transport.Error](err)
	if ok && (refused.StatusCode == http.StatusUnauthorized || refused.StatusCode == http.StatusForbidden) {
		return fmt.Errorf("%w; no credentials are sent: copy the image to an OCI layout (skopeo copy) and give oci:DIR@sha256:…", err)
	}
	return err
}

// guarded is the way to a registry, and to wherever it sends: registries keep blobs
// on other hosts. What comes from there is checked by its digest; here it is bounded,
// and nobody is asked without TLS but a registry on this machine, nor does one
// elsewhere get this machine to ask itself.
type guarded struct {
	http.RoundTripper
	local bool
	limit int64 // bytes of an answer
}

func (g guarded) RoundTrip(req *http.Request) (*http.Response, error) {
	here := loopback(req.URL.Hostname())
	switch {
	case here && !g.local:
		return nil, refuseImage("the registry sends to %s, which is this machine", req.URL.Host)
	case req.URL.Scheme != "https" && !here:
		return nil, refuseImage("the registry sends to %s without TLS", req.URL.Host)
	}
	resp, err := g.RoundTripper.RoundTrip(req)
	if err == nil {
		resp.Body = &limited{resp.Body, g.limit}
	}
	return resp, err
}

// limited is an answer that may have so many bytes.
type limited struct {
	io.ReadCloser
	left int64
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return 0, refuseImage("the registry's answer is longer than it may be")
	}
	return n, err
}

// readSmall reads a blob of at most maxManifest bytes and checks its digest.
func readSmall(r io.ReadCloser, err error, h v1.Hash) ([]byte, error) {
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", h, err)
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", h, err)
	}
	if len(data) > maxManifest {
		return nil, refuseImage("%s has more than %d bytes", h, maxManifest)
	}
	if sum := sha256.Sum256(data); hex.EncodeToString(sum[:]) != h.Hex {
		return nil, refuseImage("%s has the SHA-256 %x", h, sum)
	}
	return data, nil
}

// layer is one layer of an image.
type layer struct {
	digest, diffID v1.Hash
	size           int64
}

// layers reads an image's manifest and configuration and returns its layers, the
// lowest first. Of an index, the image for Linux on x86-64 is taken.
func layers(ctx context.Context, s store, h v1.Hash) ([]layer, error) {
	r, err := s.manifest(ctx, h)
	raw, err := readSmall(r, err, h)
	if err != nil {
		return nil, err
	}
	if index, err := parseIndex(raw); err != nil {
		return nil, err
	} else if index != nil {
		child, err := pick(index)
		if err != nil {
			return nil, err
		}
		r, err := s.manifest(ctx, child)
		if raw, err = readSmall(r, err, child); err != nil {
			return nil, err
		}
	}
	m, err := parseManifest(raw)
	if err != nil {
		return nil, err
	}
	r, err = s.blob(ctx, m.Config.Digest, maxManifest)
	if raw, err = readSmall(r, err, m.Config.Digest); err != nil {
		return nil, err
	}
	return parseConfig(raw, m)
}

// decode reads JSON that may have fields that this program does not know.
func decode(raw []byte, what string, v any) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrImage, what, err)
	}
	return nil
}

// parseIndex returns nil for what is no index.
func parseIndex(raw []byte) (*v1.IndexManifest, error) {
	var head struct {
		MediaType types.MediaType   `json:"mediaType"`
		Manifests []json.RawMessage `json:"manifests"`
		Layers    []json.RawMessage `json:"layers"`
	}
	if err := decode(raw, "manifest", &head); err != nil {
		return nil, err
	}
	if head.Manifests == nil {
		return nil, nil
	}
	if head.Layers != nil {
		return nil, refuseImage("its manifest is an index and an image at once")
	}
	var index v1.IndexManifest
	return &index, decode(raw, "index", &index)
}

func pick(index *v1.IndexManifest) (v1.Hash, error) {
	var found []v1.Hash
	for _, m := range index.Manifests {
		if p := m.Platform; p != nil && p.OS == "linux" && p.Architecture == "amd64" && m.MediaType.IsImage() {
			found = append(found, m.Digest)
		}
	}
	if len(found) != 1 || found[0].Algorithm != "sha256" {
		return v1.Hash{}, refuseImage("its index names %d images for Linux on x86-64, expected one; name the image's own digest", len(found))
	}
	return found[0], nil
}

func parseManifest(raw []byte) (*v1.Manifest, error) {
	var m v1.Manifest
	if err := decode(raw, "manifest", &m); err != nil {
		return nil, err
	}
	if m.SchemaVersion != 2 || m.MediaType != "" && !m.MediaType.IsImage() {
		return nil, refuseImage("its manifest has version %d and type %q", m.SchemaVersion, m.MediaType)
	}
	if len(m.Layers) == 0 || len(m.Layers) > maxLayers {
		return nil, refuseImage("%d layers, expected 1 to %d", len(m.Layers), maxLayers)
	}
	for _, d := range append([]v1.Descriptor{m.Config}, m.Layers...) {
		if d.Digest.Algorithm != "sha256" || len(d.Digest.Hex) != 64 || d.Size < 0 {
			return nil, refuseImage("a part of it has the digest %q and %d bytes", d.Digest, d.Size)
		}
	}
	for _, l := range m.Layers {
		if !l.MediaType.IsLayer() || !l.MediaType.IsDistributable() {
			return nil, refuseImage("a layer has the type %q", l.MediaType)
		}
	}
	return &m, nil
}

func parseConfig(raw []byte, m *v1.Manifest) ([]layer, error) {
	var c v1.ConfigFile
	if err := decode(raw, "configuration", &c); err != nil {
		return nil, err
	}
	if c.OS != "linux" || c.Architecture != "amd64" {
		return nil, refuseImage("it is for %q on %q, expected Linux on amd64", c.OS, c.Architecture)
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, refuseImage("%d layers, and %d in its configuration", len(m.Layers), len(c.RootFS.DiffIDs))
	}
	var list []layer
	for i, l := range m.Layers {
		if c.RootFS.DiffIDs[i].Algorithm != "sha256" {
			return nil, refuseImage("a layer has the content digest %q", c.RootFS.DiffIDs[i])
		}
		list = append(list, layer{l.Digest, c.RootFS.DiffIDs[i], l.Size})
	}
	return list, nil
}

// hashed counts and hashes what is read.
type hashed struct {
	r     io.Reader
	sum   hash.Hash
	n     int64
	limit int64
	what  string
}

func (h *hashed) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.sum.Write(p[:n])
	if h.n += int64(n); h.n > h.limit {
		return 0, refuseImage("%s has more than %d bytes", h.what, h.limit)
	}
	return n, err
}

func (h *hashed) check(want v1.Hash) error {
	if got := hex.EncodeToString(h.sum.Sum(nil)); got != want.Hex {
		return refuseImage("%s has the SHA-256 %s, expected %s", h.what, got, want.Hex)
	}
	return nil
}

// readLayer unpacks a layer into a root. Nothing of it may be used if it fails: a
// digest is known only at the end.
func (r *root) readLayer(ctx context.Context, s store, l layer) error {
	blob, err := s.blob(ctx, l.digest, l.size)
	if err != nil {
		return fmt.Errorf("read layer %s: %w", l.digest, err)
	}
	defer blob.Close()
	packed := &hashed{blob, sha256.New(), 0, l.size, "layer " + l.digest.String()}
	buffered := bufio.NewReaderSize(packed, 1<<20)
	plain, err := uncompress(buffered)
	if err != nil {
		return fmt.Errorf("layer %s: %w", l.digest, err)
	}
	defer plain.Close()
	content := &hashed{plain, sha256.New(), 0, maxLayerSize, "the content of layer " + l.digest.String()}
	if err := r.readTar(ctx, content, true); err != nil {
		return fmt.Errorf("layer %s: %w", l.digest, err)
	}
	// tar ends before the file does: padding, and whatever else is there.
	if _, err := io.Copy(io.Discard, content); err != nil {
		return fmt.Errorf("layer %s: %w", l.digest, err)
	}
	if _, err := io.Copy(io.Discard, buffered); err != nil {
		return fmt.Errorf("layer %s: %w", l.digest, err)
	}
	if err := packed.check(l.digest); err != nil {
		return err
	}
	return content.check(l.diffID)
}

// uncompress tells by its first bytes how a layer is compressed, if at all.
func uncompress(r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzip.NewReader(r)
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(r), nil
}
