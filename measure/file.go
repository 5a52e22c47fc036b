package measure

import (
	"fmt"
	"strings"

	"chrysalis/measure/record"
)

// Machine is a shape to predict.
type Machine struct {
	Shape  record.Shape // without Image, RTMR0 and PCR1
	Tables *Tables
}

// File predicts an image on a platform and the shapes that it runs on. base has
// what is not measured of the image record: names, commit, hashes. notes say of
// each shape that is left out why it is. It is an error where the image's own
// registers cannot be predicted.
func File(base record.Image, s System, machines []Machine, order PageOrder) (f *record.File, notes []string, err error) {
	base.Version, base.Kind = record.Version, record.KindImage
	base.Platform, base.Boot = s.Platform, s.Boot
	if s.Firmware == nil || s.Image == nil {
		return nil, nil, fmt.Errorf("a record needs a firmware and an image")
	}
	base.UKI, base.Firmware = s.Image.SHA256[:], s.Firmware.SHA256[:]
	f = &record.File{
		Version: record.Version, Shapes: []record.Shape{}, Engines: []record.Engine{}, Models: []record.Model{},
	}
	events, err := s.Events()
	if err != nil {
		return nil, nil, err
	}
	shapePCRs := map[string]bool{"RTMR0": true}
	var registers []Register
	if s.Platform == record.TDX {
		if base.MRTD, err = s.Firmware.MRTD(order); err != nil {
			return nil, nil, err
		}
		registers = RTMRs(events)
		base.RTMR1, base.RTMR2 = registers[1].Value, registers[2].Value
	} else {
		shapePCRs = map[string]bool{"PCR 1": true}
		registers = PCRs(SHA256, events)
		for _, i := range record.ImagePCRs {
			base.PCRs = append(base.PCRs, record.PCR{Index: i, SHA256: registers[i].Value})
		}
	}
	for _, r := range registers {
		if shapePCRs[r.Name] {
			continue
		}
		if r.Value == nil && (s.Platform == record.TDX || isImagePCR(r.Name)) {
			return nil, nil, fmt.Errorf("%s is not predicted: %s", r.Name, r.Missing)
		}
		f.Events = appendEvents(f.Events, r, "")
	}
	f.Image = base
	if u := s.Firmware.Profile.Untested; u != "" && s.Platform == record.TDX {
		notes = append(notes, "firmware "+s.Firmware.Profile.Name+": "+u)
	}
	key := base.Key()
	for _, m := range machines {
		one := s
		one.Tables, one.Memory = m.Tables, uint64(m.Shape.Memory)
		events, err := one.Events()
		if err != nil {
			return nil, nil, fmt.Errorf("shape %s: %w", m.Shape.Name, err)
		}
		own := m.Shape
		own.Version, own.Kind, own.Platform, own.Image = record.Version, record.KindShape, s.Platform, key[:]
		var r Register
		if s.Platform == record.TDX {
			r = RTMRs(events)[0]
			own.RTMR0 = r.Value
		} else {
			r = PCRs(SHA256, events)[1]
			own.PCR1 = r.Value
		}
		if r.Value == nil {
			notes = append(notes, fmt.Sprintf("shape %s is left out: %s is not predicted: %s", own.Name, r.Name, r.Missing))
			continue
		}
		f.Shapes = append(f.Shapes, own)
		f.Events = appendEvents(f.Events, r, own.Name)
	}
	return f, notes, nil
}

func isImagePCR(name string) bool {
	for _, i := range record.ImagePCRs {
		if name == fmt.Sprintf("PCR %d", i) {
			return true
		}
	}
	return false
}

func appendEvents(list []record.Event, r Register, shape string) []record.Event {
	register := strings.ToLower(strings.ReplaceAll(r.Name, " ", ""))
	for _, e := range r.Events {
		list = append(list, record.Event{
			Register: register, Shape: shape, Name: e.Name, Text: plain(e.Detail), Digest: e.Digest, Missing: plain(e.Missing),
		})
	}
	return list
}

// plain keeps of a text what a canonical document carries.
func plain(s string) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '"' || r == '`':
			return '\''
		case r < ' ' || r > '~' || strings.ContainsRune(`\<>&`, r):
			return '?'
		}
		return r
	}, s)
	if len(s) > 512 {
		s = s[:512]
	}
	return s
}
