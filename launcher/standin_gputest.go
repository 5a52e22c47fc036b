//go:build gputest

package launcher

import "fmt"

// Shapes for the image chrysalis-gputest, on machines without a GPU.
func init() {
	for n := 1; n <= 2; n++ {
		shapes = append(shapes, Shape{Name: fmt.Sprintf("gputest%d", n), VCPUs: 2, Memory: 1 * gib, PhysBits: 40, TDXBits: 52, StandIns: n})
	}
}
