package launcher

import (
	"fmt"
	"strings"
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
