package measure

import (
	"encoding/binary"
	"fmt"
)

var (
	guidGlobal   = mustGUID("8be4df61-93ca-11d2-aa0d-00e098032b8c") // EFI_GLOBAL_VARIABLE
	guidSecurity = mustGUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f") // EFI_IMAGE_SECURITY_DATABASE_GUID
)

// SecureBootNames are the variables of Secure Boot in the order in which they
// are measured.
var SecureBootNames = []string{"SecureBoot", "PK", "KEK", "db", "dbx"}

// variableData is the UEFI_VARIABLE_DATA of a variable (TCG PC Client Platform
// Firmware Profile, section 10.2.6).
func variableData(vendor guid, name string, data []byte) []byte {
	out := append([]byte{}, vendor[:]...)
	encoded := utf16le(name)
	out = binary.LittleEndian.AppendUint64(out, uint64(len(encoded)/2))
	out = binary.LittleEndian.AppendUint64(out, uint64(len(data)))
	return append(append(out, encoded...), data...)
}

// secureBootEvents are the events of PCR 7. vars holds what is enrolled, by
// name; what it lacks is empty, and SecureBoot as the build makes it.
func secureBootEvents(a Algorithm, p Profile, vars map[string][]byte) ([]Event, error) {
	for name := range vars {
		known := false
		for _, n := range SecureBootNames {
			known = known || n == name
		}
		if !known {
			return nil, fmt.Errorf("there is no Secure Boot variable %q; they are %v", name, SecureBootNames)
		}
	}
	var events []Event
	for i, name := range SecureBootNames {
		vendor := guidGlobal
		if i >= 3 {
			vendor = guidSecurity
		}
		data, given := vars[name]
		if !given && name == "SecureBoot" {
			data = p.SecureBoot
		}
		events = append(events, Event{
			PCR: 7, Type: EvVariableDriverConfig, Name: "secure-boot-" + name,
			Detail: fmt.Sprintf("Secure Boot variable %s, %d bytes", name, len(data)),
			Digest: a.Sum(variableData(vendor, name, data)),
		})
	}
	return append(events, separator(a, 7)), nil
}

func separator(a Algorithm, pcr int) Event {
	return Event{PCR: pcr, Type: EvSeparator, Name: "separator", Detail: "end of the firmware's part", Digest: a.Sum(make([]byte, 4))}
}

func action(a Algorithm, pcr int, name, text string) Event {
	return Event{PCR: pcr, Type: EvAction, Name: name, Detail: text, Digest: a.Sum([]byte(text))}
}

// Variable is a UEFI variable as it is.
type Variable struct {
	Name string
	Data []byte
}

// bootVariables are BootOrder and the Boot#### variables that it lists, in its
// order. slot is the PCI device number of the disk that is started from.
func bootVariables(options []BootOption, slot int) []Variable {
	var order []byte
	list := []Variable{{Name: "BootOrder"}}
	for _, o := range options {
		order = binary.LittleEndian.AppendUint16(order, o.Number)
		list = append(list, Variable{fmt.Sprintf("Boot%04X", o.Number), o.variable(slot)})
	}
	list[0].Data = order
	return list
}
