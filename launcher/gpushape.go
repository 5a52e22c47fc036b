package launcher

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"chrysalis/attest/nvidia"
)

// ShapeForGPUs returns the name of the first shape with n GPUs.
func ShapeForGPUs(n int) (string, error) {
	var others []string
	for _, s := range shapes {
		if s.GPUs == n {
			return s.Name, nil
		}
		if s.GPUs > 0 {
			others = append(others, s.Name)
		}
	}
	return "", fmt.Errorf("there is no shape with %d GPUs; the shapes with GPUs are %s", n, strings.Join(others, ", "))
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
