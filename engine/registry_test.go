package engine

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"chrysalis/engine/enginetest"
)

// serve answers as a registry that has an image; change may answer instead, for
// a digest, and says whether it has.
func serve(t *testing.T, im *enginetest.Image, change func(w http.ResponseWriter, r *http.Request, digest string) bool) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			t.Error("credentials were sent")
		}
		digest := path.Base(r.URL.Path)
		if change != nil && change(w, r, digest) || r.URL.Path == "/v2/" {
			return
		}
		b, ok := im.Blobs[digest]
		if !ok || !strings.HasPrefix(r.URL.Path, "/v2/acme/engine/manifests/") && !strings.HasPrefix(r.URL.Path, "/v2/acme/engine/blobs/") {
			http.NotFound(w, r)
			return
		}
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
		}
		w.Header().Set("Docker-Content-Digest", digest)
		w.Write(b)
	}))
	t.Cleanup(s.Close)
	return "docker://" + strings.TrimPrefix(s.URL, "http://") + "/acme/engine@"
}

// An image from a registry gives the same disk as the same image in a layout.
func TestRegistry(t *testing.T) {
	im := enginetest.New(t, base(), enginetest.Layer{file("etc/a", "1", 0o600)})
	layout, _ := packed(t, im.Write(t), Options{})
	digest := im.Seal(t)
	got, _ := packed(t, serve(t, im, nil)+digest, Options{})
	if got.Disk.RootHash != layout.Disk.RootHash || got.Source != digest {
		t.Errorf("%s of %s, expected %s of %s", got.Disk.RootHash, got.Source, layout.Disk.RootHash, digest)
	}

	// Registries keep layers elsewhere.
	blobs := strings.Split(strings.TrimPrefix(serve(t, im, nil), "docker://"), "/")[0]
	from := serve(t, im, func(w http.ResponseWriter, r *http.Request, _ string) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		http.Redirect(w, r, "http://"+blobs+r.URL.Path, http.StatusTemporaryRedirect)
		return true
	})
	if got, _ := packed(t, from+digest, Options{}); got.Disk.RootHash != layout.Disk.RootHash {
		t.Error("another disk by way of another host")
	}
}

func TestRegistryRefuses(t *testing.T) {
	layerOf := func(im *enginetest.Image) string {
		return im.Manifest["layers"].([]any)[0].(map[string]any)["digest"].(string)
	}
	type answer func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool
	// forLayer changes the answer for the layer.
	forLayer := func(f func(w http.ResponseWriter, b []byte)) answer {
		return func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if digest == layerOf(im) {
				f(w, im.Blobs[digest])
				return true
			}
			return false
		}
	}
	forManifest := func(f func(w http.ResponseWriter, r *http.Request, b []byte)) answer {
		return func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if strings.Contains(r.URL.Path, "/manifests/") {
				f(w, r, im.Blobs[digest])
				return true
			}
			return false
		}
	}
	for _, tt := range []struct {
		name string
		do   answer
		says string
	}{
		{"another manifest", forManifest(func(w http.ResponseWriter, _ *http.Request, b []byte) { w.Write(append(bytes.Clone(b), ' ')) }), "does not match requested digest"},
		{"another manifest that claims the digest", forManifest(func(w http.ResponseWriter, r *http.Request, b []byte) {
			w.Header().Set("Docker-Content-Digest", path.Base(r.URL.Path))
			w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
			w.Write(append(bytes.Clone(b), ' '))
		}), "has the SHA-256"},
		{"an endless manifest", forManifest(func(w http.ResponseWriter, _ *http.Request, b []byte) {
			io.Copy(w, io.LimitReader(spaces{}, maxManifest+1<<20))
		}), "longer than it may be"},
		{"no manifest", forManifest(func(w http.ResponseWriter, r *http.Request, _ []byte) { http.NotFound(w, r) }), "404"},
		{"another layer", forLayer(func(w http.ResponseWriter, b []byte) {
			b = bytes.Clone(b)
			b[9] ^= 0xff // gzip's operating system, which nothing else depends on
			w.Write(b)
		}), "layer"},
		{"a layer that is cut", forLayer(func(w http.ResponseWriter, b []byte) { w.Write(b[:len(b)-8]) }), "layer"},
		{"a layer that ends before its announced end", forLayer(func(w http.ResponseWriter, b []byte) {
			w.Header().Set("Content-Length", "1000000")
			w.Write(b)
		}), "layer"},
		{"a layer longer than the manifest says", func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if digest == layerOf(im) {
				w.Write(im.Blobs[digest])
				w.Write(make([]byte, 1<<20))
				return true
			}
			return false
		}, "layer"},
		{"an endless layer", forLayer(func(w http.ResponseWriter, b []byte) {
			w.Write(b)
			io.Copy(w, io.LimitReader(spaces{}, maxManifest+64<<20))
		}), "layer"},
		{"an endless configuration", func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if digest != im.Manifest["config"].(map[string]any)["digest"] {
				return false
			}
			io.Copy(w, io.LimitReader(spaces{}, maxManifest+1<<20))
			return true
		}, "longer than it may be"},
		{"credentials wanted", func(w http.ResponseWriter, r *http.Request, _ *enginetest.Image, _ string) bool {
			if r.URL.Path != "/v2/" {
				http.Error(w, "", http.StatusUnauthorized)
			}
			return true
		}, "no credentials are sent"},
		{"forbidden", forManifest(func(w http.ResponseWriter, _ *http.Request, _ []byte) { w.WriteHeader(http.StatusForbidden) }), "no credentials are sent"},
		{"a layer elsewhere, without TLS", func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if digest != layerOf(im) {
				return false
			}
			http.Redirect(w, r, "http://192.0.2.1/layer", http.StatusTemporaryRedirect)
			return true
		}, "192.0.2.1 without TLS"},
		{"a layer in a file", func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if digest != layerOf(im) {
				return false
			}
			http.Redirect(w, r, "file:///etc/passwd", http.StatusTemporaryRedirect)
			return true
		}, "without TLS"},
		{"in circles", func(w http.ResponseWriter, r *http.Request, im *enginetest.Image, digest string) bool {
			if digest != layerOf(im) {
				return false
			}
			http.Redirect(w, r, r.URL.Path, http.StatusTemporaryRedirect)
			return true
		}, "redirects"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			im := enginetest.New(t, base())
			digest := im.Seal(t)
			src := serve(t, im, func(w http.ResponseWriter, r *http.Request, d string) bool { return tt.do(w, r, im, d) })
			out := filepath.Join(t.TempDir(), "engine.disk")
			_, err := Pack(context.Background(), src+digest, Options{Out: out, Profile: []byte(testProfile)})
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, expected %q", err, tt.says)
			}
			if left, _ := os.ReadDir(filepath.Dir(out)); len(left) != 0 {
				t.Errorf("left %v", left)
			}
		})
	}
}

// Nobody is asked by a name that is refused.
func TestRegistryNames(t *testing.T) {
	digest := enginetest.Digest(nil)
	for src, says := range map[string]string{
		"docker://localhost:1/x/y:latest":            "no digest",
		"docker://localhost:1/x/y":                   "no digest",
		"docker://10.0.0.1:5000/x/y@" + digest:       "without TLS",
		"docker://192.168.1.1/x/y@" + digest:         "without TLS",
		"docker://registry.local:5000/x/y@" + digest: "without TLS",
		"docker://x y/z@" + digest:                   "",
		"docker://@" + digest:                        "",
	} {
		if _, _, err := openImage(src); !errors.Is(err, ErrImage) || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", src, err)
		}
	}
	for _, src := range []string{"docker://127.0.0.1:5000/x/y@", "docker://[::1]:5000/x/y@", "docker://localhost:5000/x/y@", "docker://registry.example/x/y@"} {
		if _, _, err := openImage(src + digest); err != nil {
			t.Errorf("%s: %v", src, err)
		}
	}
}

// A registry elsewhere cannot send to this machine, or to anyone without TLS.
func TestGuarded(t *testing.T) {
	for _, tt := range []struct {
		url   string
		local bool
		want  bool
	}{
		{"https://blobs.example/x", false, true},
		{"http://blobs.example/x", false, false},
		{"https://127.0.0.1/x", false, false},
		{"http://localhost:5000/x", false, false},
		{"https://[::1]/x", false, false},
		{"https://blobs.example/x", true, true},
		{"http://blobs.example/x", true, false},
		{"http://127.0.0.1:5000/x", true, true},
	} {
		req := httptest.NewRequest(http.MethodGet, tt.url, nil)
		_, err := guarded{reached{}, tt.local, 1}.RoundTrip(req)
		if got := err == nil; got != tt.want || err != nil && !errors.Is(err, ErrImage) {
			t.Errorf("%s from a local registry %v: %v", tt.url, tt.local, err)
		}
	}
}

type reached struct{}

func (reached) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
}

// spaces never ends.
type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}
