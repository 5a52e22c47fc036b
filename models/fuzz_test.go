package models

import (
	"archive/tar"
	"bytes"
	"io"
	"testing"
)

// FuzzConfig reads a model's config.json.
func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"model_type":"llama","max_position_embeddings":4096,"text_config":{"max_position_embeddings":8192},"rope":NaN}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := readConfig(bytes.NewReader(data), int64(len(data))); err == nil && c.contextLength < 0 {
			t.Errorf("a context of %d", c.contextLength)
		}
	})
}

// FuzzIndex reads the index of a model's shards.
func FuzzIndex(f *testing.F) {
	f.Add([]byte(`{"metadata":{"total_size":8},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		index, err := readIndex(bytes.NewReader(data), int64(len(data)))
		if err == nil && len(index) > len(data) {
			t.Errorf("%d tensors in %d bytes", len(index), len(data))
		}
	})
}

// FuzzLicence reads the licence out of a model's page.
func FuzzLicence(f *testing.F) {
	f.Add([]byte("---\nlicense: apache-2.0\ntags:\n- a\n---\n# A model\n"))
	f.Fuzz(func(t *testing.T, data []byte) { readLicence(bytes.NewReader(data)) })
}

// FuzzTar reads a model that comes as a tar stream.
func FuzzTar(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range map[string][]byte{"config.json": []byte("{}"), "sub/model.safetensors": shard("a")} {
		w.WriteHeader(&tar.Header{Name: name, Size: int64(len(data)), Mode: 0o644})
		w.Write(data)
	}
	w.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		var left []string
		next := tarEntries(bytes.NewReader(data), newChecker(nil), nil, &left)
		for {
			e, r, err := next()
			if err != nil {
				return
			}
			if n, err := io.Copy(io.Discard, r); err == nil && n != e.Size {
				t.Errorf("%s: %d bytes, it was said to have %d", e.Path, n, e.Size)
			}
		}
	})
}
