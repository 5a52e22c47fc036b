package main

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"chrysalis/attest/evidence"
	"chrysalis/guest"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
)

// fakePlatform remembers what was measured. Each of its errors is returned by the
// method of that name; extend only for the event failAt.
type fakePlatform struct {
	manifest, extend, holds error
	failAt                  string
	events                  []cel.Event
}

func (p *fakePlatform) Register() cel.Register         { return cel.RTMR3 }
func (p *fakePlatform) CheckManifest([]byte) error     { return p.manifest }
func (p *fakePlatform) Prove(*evidence.Document) error { return nil }
func (p *fakePlatform) Holds(events []cel.Event) error {
	if p.holds == nil && !slices.EqualFunc(events, p.events, func(a, b cel.Event) bool { return a.Name == b.Name && bytes.Equal(a.Data, b.Data) }) {
		return errors.New("the log is not what was measured")
	}
	return p.holds
}

func (p *fakePlatform) Extend(e cel.Event) error {
	if p.extend != nil && e.Name == p.failAt {
		return p.extend
	}
	p.events = append(p.events, e)
	return nil
}

func (p *fakePlatform) names() string {
	var names []string
	for _, e := range p.events {
		names = append(names, e.Name)
	}
	return strings.Join(names, " ")
}

func testManifest(t *testing.T) []byte {
	t.Helper()
	disk := manifest.Disk{RootHash: strings.Repeat("ab", 32), DataBlocks: 1}
	m := manifest.Manifest{
		Version: manifest.Version, Engine: disk, Models: []manifest.Model{{Name: "a/b", Revision: "1", Disk: disk}},
		Parameters: map[string]int64{}, Limits: manifest.DefaultLimits,
	}
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestTakeManifest(t *testing.T) {
	good := testManifest(t)
	broken := errors.New("broken")
	for _, c := range []struct {
		name     string
		data     []byte
		platform fakePlatform
		reason   guest.Reason // none: it is taken
	}{
		{"the right one", good, fakePlatform{}, guest.ReasonNone},
		{"not canonical", append(good, ' '), fakePlatform{}, guest.ReasonManifestInvalid},
		{"not the one in MRCONFIGID", good, fakePlatform{manifest: broken}, guest.ReasonManifestOther},
		{"a platform that measures nothing", good, fakePlatform{extend: broken, failAt: cel.Manifest}, guest.ReasonPlatform},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := &agent{platform: &c.platform}
			err := a.takeManifest(c.data)
			if (err == nil) != (c.reason == guest.ReasonNone) || reason(err) != c.reason {
				t.Errorf("got %v with the reason %q, expected %q", err, reason(err), c.reason)
			}
			if err != nil {
				if len(c.platform.events) > 0 || len(a.events) > 0 {
					t.Errorf("measured %s", c.platform.names())
				}
				return
			}
			if c.platform.names() != cel.Manifest || !bytes.Equal(c.platform.events[0].Data, good) || !bytes.Equal(a.encoded, good) {
				t.Errorf("measured %s", c.platform.names())
			}
		})
	}
}

// A disk that cannot be measured is not looked for.
func TestDisksAreMeasuredFirst(t *testing.T) {
	p := &fakePlatform{extend: errors.New("broken"), failAt: cel.Disk}
	a := &agent{platform: p}
	if err := a.takeManifest(testManifest(t)); err != nil {
		t.Fatal(err)
	}
	if err := a.openDisks(t.Context()); reason(err) != guest.ReasonPlatform {
		t.Errorf("got %v with the reason %q", err, reason(err))
	}
	if len(a.devices) > 0 || p.names() != cel.Manifest {
		t.Errorf("%d disks were opened; measured %s", len(a.devices), p.names())
	}
}

func TestCloseLog(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name     string
		platform fakePlatform
		reason   guest.Reason
	}{
		{"what was measured", fakePlatform{}, guest.ReasonNone},
		{"something else in the register", fakePlatform{holds: broken}, guest.ReasonPlatform},
		{"no separator", fakePlatform{extend: broken, failAt: cel.Separator}, guest.ReasonPlatform},
	} {
		a := &agent{platform: &c.platform}
		if err := a.takeManifest(testManifest(t)); err != nil {
			t.Fatal(err)
		}
		err := a.closeLog()
		if (err == nil) != (c.reason == guest.ReasonNone) || reason(err) != c.reason {
			t.Errorf("%s: got %v with the reason %q", c.name, err, reason(err))
		}
		if want := fmt.Sprint(cel.Manifest, " ", cel.Separator); err == nil && c.platform.names() != want {
			t.Errorf("%s: measured %s, expected %s", c.name, c.platform.names(), want)
		}
	}
	// Nothing of the image runs after the log is closed and before the engine but
	// the phases in between, of which there are none.
	for i, phase := range phases {
		if phase.name == guest.PhaseEngine && phases[i-1].name != guest.PhaseLockdown {
			t.Errorf("the phase before the engine's is %s", phases[i-1].name)
		}
	}
}
