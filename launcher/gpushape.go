package launcher

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"chrysalis/attest/nvidia"
)

// ShapeForGPUs returns the name of the first shape with n GPUs whose memory
// regions have these sizes, in bytes.
func ShapeForGPUs(n int, bars []uint64) (string, error) {
	var others []string
	for _, s := range shapes {
		if s.GPUs == n && slices.Equal(s.GPUBARs, bars) {
			return s.Name, nil
		}
		if s.GPUs > 0 {
			others = append(others, fmt.Sprintf("%s (%s)", s.Name, Sizes(s.GPUBARs)))
		}
	}
	return "", fmt.Errorf("there is no shape with %d GPUs whose memory regions have %s; the shapes with GPUs are %s", n, Sizes(bars), strings.Join(others, ", "))
}

// CheckGPU reports that a GPU is none of the shape's: with memory regions of other
// sizes, in bytes, the VM would measure what no record has.
func (s Shape) CheckGPU(address string, bars []uint64) error {
	if slices.Equal(bars, s.GPUBARs) {
		return nil
	}
	return fmt.Errorf("GPU %s has memory regions of %s, and shape %s is for %s, with %s; take another shape, or set the host's resizable BARs back to what the GPU comes with",
		address, Sizes(bars), s.Name, s.GPUModel, Sizes(s.GPUBARs))
}

// Sizes says what memory regions have, like "16 MiB + 128 GiB + 32 MiB".
func Sizes(bars []uint64) string {
	var words []string
	for _, size := range bars {
		if size >= gib {
			words = append(words, fmt.Sprintf("%d GiB", size/gib))
		} else {
			words = append(words, fmt.Sprintf("%d MiB", size/mib))
		}
	}
	if words == nil {
		return "nothing"
	}
	return strings.Join(words, " + ")
}

// OtherGPUs are the numbers and kinds of GPUs that shapes have, and none, but for
// those given.
func OtherGPUs(n int, bars []uint64) (list []Shape) {
	if n > 0 {
		list = append(list, Shape{})
	}
	for _, s := range shapes {
		same := func(o Shape) bool { return o.GPUs == s.GPUs && slices.Equal(o.GPUBARs, s.GPUBARs) }
		if s.GPUs > 0 && !same(Shape{GPUs: n, GPUBARs: bars}) && !slices.ContainsFunc(list, same) {
			list = append(list, Shape{GPUs: s.GPUs, GPUBARs: s.GPUBARs})
		}
	}
	return list
}

// CollateralPath is where a state folder keeps GPU collateral: 'chrysalis gpu
// collateral' writes it, and VMs with GPUs are given it.
func CollateralPath(stateDir string) string { return filepath.Join(stateDir, "gpu-collateral.json") }

// collateral returns what a VM of a shape is given to verify its GPUs by, or nil.
// It is checked for its form only: the VM verifies its signatures.
func (o Options) collateral(shape Shape) ([]byte, error) {
	path := o.GPUCollateral
	if shape.GPUs+shape.StandIns == 0 {
		if path != "" {
			return nil, fmt.Errorf("GPU collateral was given, and the shape %s has no GPU", shape.Name)
		}
		return nil, nil
	}
	given := path != ""
	if !given {
		st, err := openStore(o.StateDir)
		if err != nil {
			return nil, err
		}
		path = CollateralPath(st.dir)
	}
	f, err := os.Open(path)
	if !given && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the GPU collateral: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, nvidia.MaxCollateralSize+1))
	if err == nil {
		_, err = nvidia.ParseCollateral(data)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w; make it with 'chrysalis gpu collateral'", path, err)
	}
	return data, nil
}
