package launcher

import "testing"

func TestShapeForGPUs(t *testing.T) {
	if name, err := ShapeForGPUs(1); err != nil || name != "h100x1" {
		t.Errorf("%s, %v", name, err)
	}
	if name, err := ShapeForGPUs(7); err == nil {
		t.Error(name)
	}
}
