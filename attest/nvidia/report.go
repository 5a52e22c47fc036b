package nvidia

import (
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Sizes of a report, in bytes.
const (
	NonceSize     = 32
	MaxReportSize = 8192 // NVML_CC_GPU_ATTESTATION_REPORT_SIZE

	requestSize   = 37 // SPDM 1.1 GET_MEASUREMENTS with a nonce and a slot
	signatureSize = 96 // ECDSA on P-384: r ‖ s, 48 bytes each, big endian
	digestSize    = 48 // SHA-384
)

// SPDM 1.1 (DMTF DSP0274 1.1.0), section 10.11.
const (
	spdmVersion         = 0x11
	spdmGetMeasurements = 0xe0
	spdmMeasurements    = 0x60
	spdmWithSignature   = 0x01 // GET_MEASUREMENTS, param 1
	spdmAll             = 0xff // GET_MEASUREMENTS, param 2
	specificationDMTF   = 0x01 // of a measurement block
)

// Field is the type of an opaque field. NVIDIA publishes the list with its
// attestation SDK.
type Field uint16

// The opaque fields that are looked into.
const (
	FieldDriverVersion Field = 3  // text, ends with NUL
	FieldVBIOSVersion  Field = 6  // 8 bytes, see vbiosVersion
	FieldNVDEC0        Field = 11 // 1 byte: statusEnabled or statusDisabled
	FieldChipSKU       Field = 15 // text, padded with NULs
	FieldProject       Field = 17 // text
	FieldProjectSKU    Field = 18 // text
	FieldFWID          Field = 20 // SHA-384 of the firmware that holds the key
	FieldProtectedPCIe Field = 21 // 1 byte: statusEnabled or statusDisabled
	FieldChip          Field = 35 // text, for example GB100, from Blackwell on
	FieldFeatureFlag   Field = 36 // which confidential mode, from driver 570 on; little endian
)

const (
	statusEnabled  = 0xaa
	statusDisabled = 0x55
)

// What the feature flag says.
const (
	featureSinglePass    = 0 // one GPU for itself
	featureMultiPass     = 1 // several with encrypted NVLink
	featureProtectedPCIe = 2
)

// Report is a parsed attestation report: an SPDM request and the response to it,
// as NVML returns them, one after the other. Parsing proves nothing.
type Report struct {
	Nonce        [NonceSize]byte  // the request's: what the caller asked with
	Measurements [][]byte         // by the index that RIMs use, from 0; SHA-384 each
	Opaque       map[Field][]byte // in the response, under its signature

	Driver     string // for example 550.90.07
	VBIOS      string // for example 96.00.9F.00.01
	Project    string // for example 1010
	ProjectSKU string // for example 0200
	ChipSKU    string // for example 882
	Chip       string // for example GB100; empty in reports of Hopper

	signed    []byte // all but the signature
	signature []byte
}

var (
	driverRE = regexp.MustCompile(`^[0-9]{1,4}(?:\.[0-9]{1,4}){1,3}$`)
	boardRE  = regexp.MustCompile(`^[A-Z0-9]{1,8}$`)
)

// ParseReport parses a GPU's report. It refuses anything that is not exactly one
// signed request for all measurements and one response.
func ParseReport(data []byte) (*Report, error) {
	r, err := parseSPDM(data)
	if err != nil {
		return nil, err
	}
	if r.Driver, err = r.text(FieldDriverVersion, driverRE); err != nil {
		return nil, fmt.Errorf("driver version: %w", err)
	}
	if r.Project, err = r.text(FieldProject, boardRE); err != nil {
		return nil, fmt.Errorf("project: %w", err)
	}
	if r.ProjectSKU, err = r.text(FieldProjectSKU, boardRE); err != nil {
		return nil, fmt.Errorf("project SKU: %w", err)
	}
	if r.ChipSKU, err = r.text(FieldChipSKU, boardRE); err != nil {
		return nil, fmt.Errorf("chip SKU: %w", err)
	}
	if r.VBIOS, err = vbiosVersion(r.Opaque[FieldVBIOSVersion]); err != nil {
		return nil, fmt.Errorf("VBIOS version: %w", err)
	}
	for _, f := range []Field{FieldNVDEC0, FieldProtectedPCIe} {
		if v, ok := r.Opaque[f]; ok && (len(v) != 1 || v[0] != statusEnabled && v[0] != statusDisabled) {
			return nil, fmt.Errorf("opaque field %d is neither enabled nor disabled", f)
		}
	}
	if _, ok := r.Opaque[FieldChip]; ok {
		if r.Chip, err = r.text(FieldChip, chipRE); err != nil {
			return nil, fmt.Errorf("chip: %w", err)
		}
	}
	if v, ok := r.Opaque[FieldFeatureFlag]; ok {
		if len(v) < 1 || len(v) > 8 || v[0] > featureProtectedPCIe || slices.ContainsFunc(v[1:], func(b byte) bool { return b != 0 }) {
			return nil, fmt.Errorf("opaque field %d, %.40x, is no mode that is known", FieldFeatureFlag, v)
		}
	}
	if v, ok := r.Opaque[FieldFWID]; ok && len(v) != digestSize {
		return nil, fmt.Errorf("opaque field %d has %d bytes, expected %d", FieldFWID, len(v), digestSize)
	}
	return r, nil
}

// MultiGPU is how the GPU says that it works together with others. The feature
// flag decides where there is one, as in NVIDIA's own verifier.
func (r *Report) MultiGPU() MultiGPU {
	if v, ok := r.Opaque[FieldFeatureFlag]; ok {
		return [...]MultiGPU{featureSinglePass: MultiGPUNone, featureMultiPass: MultiGPUNVLE, featureProtectedPCIe: MultiGPUProtectedPCIe}[v[0]]
	}
	if v := r.Opaque[FieldProtectedPCIe]; len(v) == 1 && v[0] == statusEnabled {
		return MultiGPUProtectedPCIe
	}
	return MultiGPUNone
}

// nvdec0Disabled reports whether the first video decoder is off; then nothing is
// measured at index 35.
func (r *Report) nvdec0Disabled() bool {
	v := r.Opaque[FieldNVDEC0]
	return len(v) == 1 && v[0] == statusDisabled
}

// parseSPDM parses what reports of GPUs and of switches have in common.
func parseSPDM(data []byte) (*Report, error) {
	if len(data) > MaxReportSize {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(data), MaxReportSize)
	}
	if len(data) < requestSize {
		return nil, errors.New("truncated in the SPDM request")
	}
	request := data[:requestSize]
	if request[0] != spdmVersion || request[1] != spdmGetMeasurements || request[2] != spdmWithSignature || request[3] != spdmAll {
		return nil, fmt.Errorf("starts with %x, not with an SPDM 1.1 request for all measurements and a signature", request[:4])
	}
	r := &Report{Opaque: map[Field][]byte{}}
	copy(r.Nonce[:], request[4:])

	b := reader{data: data[requestSize:]}
	header := b.take(8, "response header")
	if b.err != nil {
		return nil, b.err
	}
	if header[0] != spdmVersion || header[1] != spdmMeasurements {
		return nil, fmt.Errorf("the response starts with %x, not as SPDM 1.1 measurements", header[:2])
	}
	blocks := int(header[4])
	record := reader{data: b.take(int(header[5])|int(header[6])<<8|int(header[7])<<16, "measurement record")}
	for i := range blocks {
		head := record.take(7, "measurement block")
		if record.err != nil {
			return nil, record.err
		}
		// Section 10.11.1: index, specification, size; DMTF's type and size.
		if int(head[0]) != i+1 {
			return nil, fmt.Errorf("measurement block %d has index %d", i+1, head[0])
		}
		if head[1] != specificationDMTF {
			return nil, fmt.Errorf("measurement block %d is not in DMTF's format", i+1)
		}
		size, inner := int(binary.LittleEndian.Uint16(head[2:])), int(binary.LittleEndian.Uint16(head[5:]))
		if inner != digestSize || size != inner+3 {
			return nil, fmt.Errorf("measurement block %d has %d bytes with a value of %d, expected one SHA-384", i+1, size, inner)
		}
		r.Measurements = append(r.Measurements, record.take(inner, "measurement"))
	}
	if record.err != nil {
		return nil, record.err
	}
	if b.err == nil && len(record.data) > 0 {
		return nil, fmt.Errorf("%d bytes after the last measurement block", len(record.data))
	}
	b.take(NonceSize, "response nonce") // the GPU's own; fresh by its choice
	size := b.take(2, "opaque length")
	if b.err != nil {
		return nil, b.err
	}
	opaque := reader{data: b.take(int(binary.LittleEndian.Uint16(size)), "opaque fields")}
	if b.err != nil {
		return nil, b.err
	}
	for len(opaque.data) > 0 {
		head := opaque.take(4, "opaque field")
		if opaque.err != nil {
			return nil, opaque.err
		}
		field := Field(binary.LittleEndian.Uint16(head))
		value := opaque.take(int(binary.LittleEndian.Uint16(head[2:])), "opaque field")
		if opaque.err != nil {
			return nil, opaque.err
		}
		if _, twice := r.Opaque[field]; twice {
			return nil, fmt.Errorf("opaque field %d is there twice", field)
		}
		r.Opaque[field] = value
	}
	r.signature = b.take(signatureSize, "signature")
	if b.err != nil {
		return nil, b.err
	}
	if len(b.data) > 0 {
		return nil, fmt.Errorf("%d bytes after the signature", len(b.data))
	}
	r.signed = data[:len(data)-signatureSize]
	return r, nil
}

// reader takes bytes off the front. After its first error it returns nil.
type reader struct {
	data []byte
	err  error
}

func (r *reader) take(n int, what string) []byte {
	if r.err == nil && n > len(r.data) {
		r.err = fmt.Errorf("truncated in the %s", what)
	}
	if r.err != nil {
		return nil
	}
	out := r.data[:n:n]
	r.data = r.data[n:]
	return out
}

// text returns a field that holds text up to its first NUL, with nothing but
// NULs behind it.
func (r *Report) text(f Field, form *regexp.Regexp) (string, error) {
	v, ok := r.Opaque[f]
	if !ok {
		return "", fmt.Errorf("opaque field %d is missing", f)
	}
	s := strings.TrimRight(string(v), "\x00")
	if !form.MatchString(s) {
		return "", fmt.Errorf("%.40q is not one", s)
	}
	return s, nil
}

// vbiosVersion writes a VBIOS version as NVIDIA does: the upper 4 bytes of the
// little-endian number's low half, then the byte above them. 00 9f 00 96 01 00 00
// 00 is 96.00.9F.00.01.
func vbiosVersion(v []byte) (string, error) {
	if len(v) != 8 {
		return "", fmt.Errorf("%d bytes, expected 8", len(v))
	}
	if v[5] != 0 || v[6] != 0 || v[7] != 0 {
		return "", fmt.Errorf("%x is not one", v)
	}
	low := slices.Clone(v[:4])
	slices.Reverse(low)
	return fmt.Sprintf("%02X.%02X.%02X.%02X.%02X", low[0], low[1], low[2], low[3], v[4]), nil
}
