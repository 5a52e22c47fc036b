package launcher

import "testing"

func TestKVMVerdicts(t *testing.T) {
	s := store{t.TempDir()}
	if works, fails := KVMVerdicts(s.dir); works != 0 || fails != 0 {
		t.Errorf("%d, %d without a file", works, fails)
	}
	s.remember("a", verdictFails)
	s.remember("b", verdictWorks)
	s.remember("c", verdictFails)
	if works, fails := KVMVerdicts(s.dir); works != 1 || fails != 2 {
		t.Errorf("%d, %d", works, fails)
	}
}
