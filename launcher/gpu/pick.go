package gpu

import (
	"cmp"
	"fmt"
	"strings"
)

// Pick returns the addresses of the first n GPUs that a VM can have: prepared, not
// in use, and not known to be in another mode than on. Its error says what keeps
// the others.
func Pick(gpus []GPU, n int) ([]string, error) {
	var out, others []string
	for _, g := range gpus {
		switch {
		case g.Driver != driverVFIO:
			others = append(others, fmt.Sprintf("%s is bound to %s ('chrysalis gpu prepare %s --cc on …')", g.Address, cmp.Or(g.Driver, "no driver"), g.Address))
		case len(g.Processes) > 0:
			others = append(others, fmt.Sprintf("%s is in use by %s", g.Address, strings.Join(g.Processes, ", ")))
		case g.Confidential && (g.Mode == ModeOff || g.Mode == ModeDevTools):
			others = append(others, fmt.Sprintf("%s has its confidential mode at %s ('chrysalis gpu prepare %s --cc on …')", g.Address, g.Mode, g.Address))
		default:
			out = append(out, g.Address)
		}
		if len(out) == n {
			return out, nil
		}
	}
	if len(gpus) == 0 {
		return nil, fmt.Errorf("%d GPUs are wanted and there is no NVIDIA GPU on this machine", n)
	}
	return nil, fmt.Errorf("%d GPUs are wanted and %d are ready: %s", n, len(out), cmp.Or(strings.Join(others, "; "), "there are no others"))
}
