package attest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"chrysalis/attest/evidence"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// replayCEL reads the event log and compares what it makes of the register with
// what the quote says: pcr for a TPM, rtmr for a TD.
func replayCEL(log []byte, register cel.Register, pcr, rtmr []byte) ([]cel.Event, outcome) {
	of, events, err := cel.Parse(log)
	if err != nil {
		return nil, fail("%s", plain(err))
	}
	if of != register {
		return nil, fail("the log is of %s, expected %s", of, register)
	}
	sha256, sha384 := cel.Replay(events)
	want, got := sha384[:], rtmr
	if register == cel.PCR15 {
		want, got = sha256[:], pcr
	}
	if o := same("the log does not replay to the register", got, want); o.status != Passed {
		return nil, o
	}
	return events, pass("%d events", len(events))
}

// verifyWorkload makes the checks of what runs in the VM, given its measured
// events, which are nil when they are not proven. mrConfigID is nil on a TPM.
func (r *run) verifyWorkload(ctx context.Context, d *evidence.Document, events []cel.Event, mrConfigID []byte, in *Input) {
	var m *manifest.Manifest
	if events == nil {
		r.over = true
	}
	r.must(CheckManifest, func() outcome {
		parsed, err := manifest.Parse(d.Manifest)
		if err != nil {
			return fail("%s", plain(err))
		}
		if events[0].Name != cel.Manifest {
			return fail("the first event is %q, expected %q", events[0].Name, cel.Manifest)
		}
		sum, measured := manifest.SHA384(d.Manifest), events[0].SHA384()
		if sum != measured {
			return same("another manifest was measured", measured[:], sum[:])
		}
		if mrConfigID != nil && !bytes.Equal(mrConfigID, sum[:]) {
			if !zero(mrConfigID) || !in.Policy.AllowUnsetMRConfigID {
				return same("MRCONFIGID is of another manifest", mrConfigID, sum[:])
			}
		}
		short := sha256.Sum256(d.Manifest)
		if list := in.Policy.Manifests; len(list) > 0 && !slices.ContainsFunc(list, func(h record.Hex) bool { return bytes.Equal(h, short[:]) }) {
			return outcome{Failed, "the policy does not list this manifest", one(list), hex.EncodeToString(short[:])}
		}
		m = parsed
		r.verdict.Manifest = short[:]
		return pass("SHA-256 %x", short)
	})
	r.check(CheckDisks, "", func() outcome { return checkEvents(d.Manifest, m, events) })
	r.check(CheckEngine, "", func() outcome {
		for _, f := range in.Records {
			for _, e := range f.Engines {
				if e.RootHash.String() == m.Engine.RootHash {
					r.verdict.Engine = e.Name
					return pass("%s, in the records", e.Name)
				}
			}
		}
		for _, a := range in.Policy.Engines {
			if a.RootHash.String() == m.Engine.RootHash {
				r.verdict.Engine = a.Name
				return pass("%s, in the policy", a.Name)
			}
		}
		return outcome{Failed, "no record and no policy approves it", "a recorded root hash", m.Engine.RootHash}
	})
	if m == nil {
		r.check(CheckModel, "", nil)
	} else {
		for _, model := range m.Models {
			r.check(CheckModel, model.ID(), func() outcome { return checkModel(model, in) })
			r.verdict.Models = append(r.verdict.Models, model.ID())
			root, _ := hex.DecodeString(model.Disk.RootHash)
			r.verdict.ModelRoots = append(r.verdict.ModelRoots, root)
		}
	}
	r.verifyGPUs(ctx, d, m, events, in)
}

// checkModel wants name, revision and root hash in one place: the host writes the
// manifest, so a name alone proves nothing.
func checkModel(model manifest.Model, in *Input) outcome {
	wrong := ""
	for _, f := range in.Records {
		for _, known := range f.Models {
			switch {
			case known.RootHash.String() == model.Disk.RootHash && known.ID() == model.ID():
				return pass("in the records")
			case known.ID() == model.ID():
				wrong = known.RootHash.String()
			}
		}
	}
	for _, a := range in.Policy.Models {
		switch {
		case a.RootHash.String() == model.Disk.RootHash && a.Name == model.ID():
			return pass("in the policy")
		case a.Name == model.ID():
			wrong = a.RootHash.String()
		}
	}
	if wrong != "" {
		return outcome{Failed, "this name is approved with another disk", wrong, model.Disk.RootHash}
	}
	return outcome{Failed, "no record and no policy approves it under this name", "a recorded name and root hash", model.Disk.RootHash}
}

// checkEvents compares what was measured with what the manifest makes a VM
// measure: these disks in this order, the GPUs, one separator last.
func checkEvents(encoded []byte, m *manifest.Manifest, events []cel.Event) outcome {
	var gpus [][]byte
	for _, e := range events {
		if e.Name == cel.GPU {
			gpus = append(gpus, e.Data)
		}
	}
	if len(gpus) != m.GPUs {
		return fail("%d GPUs were measured, the manifest has %d", len(gpus), m.GPUs)
	}
	want, err := cel.Boot(encoded, m, gpus)
	if err != nil {
		return fail("%s", plain(err))
	}
	for i := range max(len(want), len(events)) {
		switch {
		case i >= len(events):
			return fail("event %d is missing: %s", i, describe(want[i]))
		case i >= len(want):
			return fail("event %d is one too many: %s", i, describe(events[i]))
		case events[i].Name != want[i].Name || !bytes.Equal(events[i].Data, want[i].Data):
			return outcome{Failed, fmt.Sprintf("event %d is not what the manifest makes it", i), describe(want[i]), describe(events[i])}
		}
	}
	return pass("%d", 1+len(m.Models))
}

func describe(e cel.Event) string {
	if e.Name == cel.Disk && len(e.Data) < 1024 {
		return fmt.Sprintf("%s %q", e.Name, e.Data)
	}
	return fmt.Sprintf("%s, SHA-256 %x", e.Name, e.SHA256())
}
