package platform

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/report"

	"chrysalis/attest/evidence"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
)

// Where the kernel shows a TD's measurements, in binary, and takes extensions:
// Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest. Each file is
// 48 bytes; writing one extends the register by what is written.
const (
	tdxDevice       = "dev/tdx_guest"
	tdxMeasurements = "sys/devices/virtual/misc/tdx_guest/measurements"
	tdxRTMR3        = "rtmr3:sha384"
	tdxConfigID     = "mrconfigid"
	tdxRegisterSize = 48
)

// ccelData is the event log that ACPI's CCEL table points at: UEFI 2.10, section
// 38.4.1. What the firmware has not used of its memory is 0xff.
const ccelData = "sys/firmware/acpi/tables/data/CCEL"

type tdx struct {
	root string
	tsm  configfsi.Client
	ccel []byte
}

// openTDX takes what makes the interface for quotes, for tests to put another in
// its place.
func openTDX(root string, tsm func() (configfsi.Client, error)) (*tdx, error) {
	if _, err := os.Stat(filepath.Join(root, tdxDevice)); err != nil {
		return nil, fmt.Errorf("the CPU says TDX, but its device is not there: %w", err)
	}
	ccel, err := readLog(filepath.Join(root, ccelData))
	if err != nil {
		return nil, err
	}
	t := &tdx{root: root, ccel: bytes.TrimRight(ccel, "\xff")}
	if len(t.ccel) == 0 {
		return nil, errors.New("the firmware's event log is empty")
	}
	if t.tsm, err = tsm(); err != nil {
		return nil, fmt.Errorf("open the kernel's interface for quotes: %w", err)
	}
	return t, nil
}

func (t *tdx) Register() cel.Register { return cel.RTMR3 }

// read reads one measurement.
func (t *tdx) read(name string) ([]byte, error) {
	value, err := attribute(t.root, tdxMeasurements, name)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(value) != tdxRegisterSize {
		return nil, fmt.Errorf("read %s: %d bytes, expected %d", name, len(value), tdxRegisterSize)
	}
	return value, nil
}

// CheckManifest compares the manifest's SHA-384 with MRCONFIGID. A provider whose
// VMM leaves that at zero has not said which manifest the TD was started for.
func (t *tdx) CheckManifest(encoded []byte) error {
	id, err := t.read(tdxConfigID)
	if err != nil {
		return err
	}
	if want := manifest.SHA384(encoded); !bytes.Equal(id, want[:]) && !bytes.Equal(id, make([]byte, tdxRegisterSize)) {
		return fmt.Errorf("the TD was started for the manifest with SHA-384 %x, the disk carries the one with %x", id, want)
	}
	return nil
}

func (t *tdx) Extend(e cel.Event) error {
	digest := e.SHA384()
	f, err := os.OpenFile(filepath.Join(t.root, tdxMeasurements, tdxRTMR3), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("extend RTMR3: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(digest[:]); err != nil {
		return fmt.Errorf("extend RTMR3: %w", err)
	}
	return nil
}

func (t *tdx) Holds(events []cel.Event) error {
	got, err := t.read(tdxRTMR3)
	if err != nil {
		return err
	}
	if _, want := cel.Replay(events); !bytes.Equal(got, want[:]) {
		return fmt.Errorf("RTMR3 is %x, the events make it %x", got, want)
	}
	return nil
}

// Prove has the kernel get a quote from the host's quoting service. The kernel
// bounds how long that may take.
func (t *tdx) Prove(d *evidence.Document) error {
	data := d.ReportData()
	r, err := report.Get(t.tsm, &report.Request{InBlob: data[:]})
	if err != nil {
		return fmt.Errorf("get a TDX quote: %w", err)
	}
	if r.Provider != "tdx_guest\n" && r.Provider != "tdx_guest" {
		return fmt.Errorf("get a TDX quote: the kernel asked %.40q for it", r.Provider)
	}
	d.TDX = &evidence.TDX{Quote: r.OutBlob, CCEL: t.ccel}
	return nil
}
