// Package attesttest forges evidence for tests: well formed in every part, signed
// by roots that only a test trusts. With it every lie that a host could tell can
// be told, on a machine that has neither TDX nor a TPM.
package attesttest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"sync"
	"time"

	"chrysalis/attest"
	"chrysalis/attest/evidence"
	"chrysalis/attest/nvidia"
	"chrysalis/attest/nvidia/nvidiatest"
	"chrysalis/manifest"
	"chrysalis/measure/cel"
	"chrysalis/measure/record"
)

// Measured is an event of the firmware's log.
type Measured struct {
	Register uint32 // as in the log: a PCR, or an RTMR's number plus one
	Data     []byte
}

// VM is a forged VM. What is changed of it before Evidence is called is lied
// about with a valid signature.
type VM struct {
	Platform record.Platform
	Intel    *Intel
	TPM      *TPM
	TD       TD
	PCRs     map[int][32]byte
	Firmware []Measured
	Manifest *manifest.Manifest
	Events   []cel.Event

	// The GPUs, by PCI address; see AddGPUs.
	Vendor     *nvidiatest.Vendor
	GPUs       []*nvidiatest.GPU
	Identities [][]byte           // what the VM recorded of them when it booted
	Carried    *nvidia.Collateral // what it serves for them; nil serves none
	// Report changes the GPUs' evidence, to which nonce it answers, before it is
	// quoted.
	Report func(e *nvidia.Evidence, nonce [nvidia.NonceSize]byte)

	TLS        tls.Certificate
	SPKI       []byte
	ReceiptKey ed25519.PrivateKey

	// Sign changes a document before it is quoted, Send after.
	Sign func(*evidence.Document)
	Send func(*evidence.Document)
	// KeepRegisters leaves RTMR3, PCR 15 and MRCONFIGID as they are set rather than
	// as the events and the manifest make them.
	KeepRegisters bool
}

// NewVM makes a VM that a policy with its roots accepts.
func NewVM(platform record.Platform) *VM {
	now := time.Now()
	hash := func(s string) string { sum := sha256.Sum256([]byte(s)); return hex.EncodeToString(sum[:]) }
	v := &VM{
		Platform: platform,
		Manifest: &manifest.Manifest{
			Version:    1,
			Engine:     manifest.Disk{RootHash: hash("engine"), Salt: "00ff", DataBlocks: 100},
			Models:     []manifest.Model{{Name: "test/model", Revision: "1", Disk: manifest.Disk{RootHash: hash("model"), DataBlocks: 10}}},
			Parameters: map[string]int64{"context": 2048},
			Limits:     manifest.DefaultLimits,
		},
		TD: TD{
			Version: 5, TEETCBSVN: [16]byte{5, 1, 5}, Attributes: 1 << 28, XFAM: 0x61ae7,
			MRTD: sha512.Sum384([]byte("firmware")), MRSEAM: sha512.Sum384([]byte("module")),
		},
		PCRs: map[int][32]byte{},
	}
	for i := 2; i < 16; i++ {
		v.TD.TEETCBSVN[i] = 5
	}
	if platform == record.TDX {
		v.Intel = NewIntel(now)
		v.Firmware = []Measured{{1, []byte("machine")}, {2, []byte("image")}, {3, []byte("command line")}, {3, []byte("initrd")}}
	} else {
		v.TPM = NewTPM(now)
		v.Firmware = []Measured{{0, []byte("firmware")}, {4, []byte("image")}, {7, []byte("policy")}, {9, []byte("command line")}, {9, []byte("initrd")}, {11, []byte(".linux")}}
	}
	v.Measure()
	v.Boot()
	v.NewKey()
	_, v.ReceiptKey, _ = ed25519.GenerateKey(rand.Reader)
	return v
}

// Measure sets the firmware's registers to what its log makes them.
func (v *VM) Measure() {
	v.TD.RTMR[0], v.TD.RTMR[1], v.TD.RTMR[2] = [48]byte{}, [48]byte{}, [48]byte{}
	v.PCRs = map[int][32]byte{}
	for _, m := range v.Firmware {
		if v.Platform == record.TDX {
			r, sum := &v.TD.RTMR[m.Register-1], sha512.Sum384(m.Data)
			*r = sha512.Sum384(append(r[:], sum[:]...))
		} else {
			r, sum := v.PCRs[int(m.Register)], sha256.Sum256(m.Data)
			v.PCRs[int(m.Register)] = sha256.Sum256(append(r[:], sum[:]...))
		}
	}
}

// Boot sets the events to those that the manifest makes.
func (v *VM) Boot() {
	encoded, err := v.Manifest.Encode()
	must(err)
	v.Events, err = cel.Boot(encoded, v.Manifest, v.Identities)
	must(err)
}

// AddGPUs gives the VM n GPUs of a vendor of its own, which it boots with, and
// which the record and the policy that are made from then on accept.
func (v *VM) AddGPUs(n int) {
	v.Vendor = nvidiatest.NewVendorOf(nvidiatest.Chip, time.Now())
	for range n {
		v.GPUs = append(v.GPUs, v.Vendor.NewGPU())
	}
	v.Manifest.GPUs = n
	v.Carried = v.Vendor.Collateral(v.GPUs...)
	v.Identify()
	v.Boot()
}

// Identify sets Identities to those that a VM would record of its GPUs.
func (v *VM) Identify() {
	var nonce [nvidia.NonceSize]byte
	data, err := v.gpuEvidence(nonce).Encode()
	must(err)
	verifier := nvidia.NewVerifier(v.Vendor.Roots())
	must(verifier.AddCollateral(v.Vendor.Collateral(v.GPUs...)))
	result, err := verifier.Verify(data, nvidia.Policy{Nonce: nonce, GPUs: len(v.GPUs), Models: []string{nvidiatest.Model}, NoClock: true})
	must(err)
	v.Identities = nil
	for _, g := range result.GPUs {
		id, err := g.Identity.Encode()
		must(err)
		v.Identities = append(v.Identities, id)
	}
}

func (v *VM) gpuEvidence(nonce [nvidia.NonceSize]byte) *nvidia.Evidence {
	e := &nvidia.Evidence{Version: nvidia.Version}
	for _, g := range v.GPUs {
		e.GPUs = append(e.GPUs, g.Evidence(nonce))
	}
	return e
}

// NewKey gives the VM another TLS key.
func (v *VM) NewKey() {
	key := newKey()
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(err)
	v.TLS = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	v.SPKI = spki(key)
}

func spki(key *ecdsa.PrivateKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	must(err)
	return der
}

// Log is the firmware's log in TCG's format.
func (v *VM) Log() []byte {
	alg, size := uint16(0x0b), 32
	if v.Platform == record.TDX {
		alg, size = 0x0c, 48
	}
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	spec = binary.LittleEndian.AppendUint32(spec, 1)
	spec = binary.LittleEndian.AppendUint16(spec, alg)
	spec = binary.LittleEndian.AppendUint16(spec, uint16(size))
	spec = append(spec, 0)
	var b bytes.Buffer
	b.Write([]byte{0, 0, 0, 0, 3, 0, 0, 0})
	b.Write(make([]byte, 20))
	binary.Write(&b, binary.LittleEndian, uint32(len(spec)))
	b.Write(spec)
	for _, m := range v.Firmware {
		binary.Write(&b, binary.LittleEndian, []uint32{m.Register, 0xd, 1})
		binary.Write(&b, binary.LittleEndian, alg)
		if alg == 0x0c {
			sum := sha512.Sum384(m.Data)
			b.Write(sum[:])
		} else {
			sum := sha256.Sum256(m.Data)
			b.Write(sum[:])
		}
		binary.Write(&b, binary.LittleEndian, uint32(len(m.Data)))
		b.Write(m.Data)
	}
	return b.Bytes()
}

// Document makes evidence for nonces.
func (v *VM) Document(nonces ...[]byte) *evidence.Document {
	encoded, err := v.Manifest.Encode()
	must(err)
	d := &evidence.Document{
		Version: evidence.Version, TLSKey: v.SPKI, ReceiptKey: evidence.Bytes(v.ReceiptKey.Public().(ed25519.PublicKey)), Manifest: encoded,
	}
	for _, n := range nonces {
		d.Nonces = append(d.Nonces, n)
	}
	register := cel.RTMR3
	if v.Platform == record.TPM {
		register = cel.PCR15
	}
	d.CEL, err = cel.Encode(register, v.Events)
	must(err)
	if len(v.GPUs) > 0 {
		nonce := evidence.GPUNonce(d.Nonces, d.TLSKey)
		e := v.gpuEvidence(nonce)
		if v.Report != nil {
			v.Report(e, nonce)
		}
		d.GPU, err = e.Encode()
		must(err)
	}
	td, pcrs := v.TD, map[int][32]byte{}
	for i, p := range v.PCRs {
		pcrs[i] = p
	}
	if !v.KeepRegisters {
		pcrs[15], td.RTMR[3] = cel.Replay(v.Events)
		td.MRConfigID = manifest.SHA384(encoded)
	}
	if v.Sign != nil {
		v.Sign(d)
	}
	if v.Platform == record.TDX {
		if td.ReportData == ([64]byte{}) {
			td.ReportData = d.ReportData()
		}
		d.TDX = &evidence.TDX{Quote: v.Intel.Quote(&td), CCEL: v.Log()}
	} else {
		q := d.QualifyingData()
		d.TPM = v.TPM.Quote(pcrs, q[:], v.Log())
	}
	if v.Send != nil {
		v.Send(d)
	}
	return d
}

// Evidence is the encoding of Document. It panics if nothing could read it.
func (v *VM) Evidence(nonces ...[]byte) []byte {
	out, err := v.Document(nonces...).Encode()
	must(err)
	return out
}

// Record is what a publisher would sign off for the VM as it is now.
func (v *VM) Record() *record.File {
	image := record.Image{
		Version: 1, Kind: record.KindImage, Name: "chrysalis", Platform: v.Platform, Boot: record.BootKernel,
		Commit: "0123456789012345678901234567890123456789", Lock: make([]byte, 32), UKI: make([]byte, 32), Firmware: make([]byte, 32), QEMU: "11.1.3",
	}
	shape := record.Shape{Version: 1, Kind: record.KindShape, Name: "small", Platform: v.Platform, VCPUs: 2, Memory: 1 << 30, PhysBits: 46, Disks: 3}
	if v.Platform == record.TDX {
		image.MRTD, image.RTMR1, image.RTMR2 = v.TD.MRTD[:], bytes.Clone(v.TD.RTMR[1][:]), bytes.Clone(v.TD.RTMR[2][:])
		image.MRTD = bytes.Clone(image.MRTD)
		shape.RTMR0 = bytes.Clone(v.TD.RTMR[0][:])
	} else {
		for _, index := range record.ImagePCRs {
			value := v.PCRs[index]
			image.PCRs = append(image.PCRs, record.PCR{Index: index, SHA256: value[:]})
		}
		machine := v.PCRs[1]
		shape.PCR1 = machine[:]
	}
	key := image.Key()
	shape.Image = key[:]
	f := &record.File{Version: 1, Image: image, Shapes: []record.Shape{shape}, Engines: []record.Engine{}, Models: []record.Model{}}
	unhex := func(s string) []byte { b, err := hex.DecodeString(s); must(err); return b }
	f.Engines = append(f.Engines, record.Engine{Version: 1, Kind: record.KindEngine, Name: "llama.cpp", RootHash: unhex(v.Manifest.Engine.RootHash), Profile: make([]byte, 32)})
	for _, m := range v.Manifest.Models {
		f.Models = append(f.Models, record.Model{Version: 1, Kind: record.KindModel, Name: m.Name, Revision: m.Revision, RootHash: unhex(m.Disk.RootHash)})
	}
	must(f.Validate())
	return f
}

// Policy trusts the VM's roots.
func (v *VM) Policy() *attest.Policy {
	p := &attest.Policy{Version: attest.PolicyVersion, AllowNotConfidential: true, Platforms: []record.Platform{v.Platform}}
	if v.Intel != nil {
		p.TDXRoots = []string{PEM(v.Intel.Root)}
	}
	if v.TPM != nil {
		p.DevelopmentRoots = []string{PEM(v.TPM.Root)}
	}
	if v.Vendor != nil {
		device, rim := v.Vendor.DeviceRoot.SHA256(), v.Vendor.RIMRoot.SHA256()
		p.GPUModels, p.GPUDeviceRoots, p.GPURIMRoots = []string{nvidiatest.Model}, []record.Hex{device[:]}, []record.Hex{rim[:]}
	}
	must(p.Check())
	return p
}

// Transport verifies like a client that trusts the VM.
func (v *VM) Transport() *attest.Transport {
	t := &attest.Transport{Policy: v.Policy(), Records: []*record.File{v.Record()}}
	if v.Intel != nil {
		t.Collateral = v.Intel.Collateral()
	}
	return t
}

// Server serves a VM's evidence and an API on a local port, and keeps every byte
// that clients send within TLS.
type Server struct {
	URL      string
	Addr     string
	API      http.Handler                                 // what is behind the evidence; nil answers 200 to all
	Evidence func(w http.ResponseWriter, r *http.Request) // nil serves the VM's

	GPUCollateral func(w http.ResponseWriter, r *http.Request) // nil serves the VM's

	mu       sync.Mutex
	vm       *VM
	received bytes.Buffer
	fetched  int
	accepted int
	listener net.Listener
	server   *http.Server
}

// Serve starts a server for a VM. Close it.
func Serve(vm *VM) *Server {
	s := &Server{vm: vm}
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	must(err)
	s.listener = inner
	s.Addr = inner.Addr().String()
	s.URL = "https://" + s.Addr
	s.server = &http.Server{Handler: http.HandlerFunc(s.handle), ErrorLog: log.New(io.Discard, "", 0)}
	go s.server.Serve(&tlsListener{s})
	return s
}

// Replace puts another VM behind the same address. Connections stay.
func (s *Server) Replace(vm *VM) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.vm = vm
}

// Received returns all that clients sent within TLS so far.
func (s *Server) Received() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.received.String()
}

// Counts returns how often evidence was fetched and connections accepted.
func (s *Server) Counts() (evidence, connections int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fetched, s.accepted
}

// Close ends the server and its connections.
func (s *Server) Close() { s.server.Close() }

func (s *Server) handle(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == evidence.GPUCollateralPath {
		s.gpuCollateral(w, r)
		return
	}
	if r.URL.Path != evidence.Path {
		if s.API != nil {
			s.API.ServeHTTP(w, r)
		}
		return
	}
	s.mu.Lock()
	vm := s.vm
	s.fetched++
	s.mu.Unlock()
	if s.Evidence != nil {
		s.Evidence(w, r)
		return
	}
	nonce, err := base64.RawURLEncoding.DecodeString(r.URL.Query().Get("nonce"))
	if err != nil || len(nonce) != evidence.NonceSize {
		http.Error(w, "nonce", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(vm.Evidence(nonce))
}

func (s *Server) gpuCollateral(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	carried := s.vm.Carried
	s.mu.Unlock()
	switch {
	case s.GPUCollateral != nil:
		s.GPUCollateral(w, r)
	case carried == nil:
		http.NotFound(w, r)
	default:
		data, err := carried.Encode()
		must(err)
		w.Write(data)
	}
}

// tlsListener hands the server decrypted connections.
type tlsListener struct{ s *Server }

func (l *tlsListener) Accept() (net.Conn, error) {
	conn, err := l.s.listener.Accept()
	if err != nil {
		return nil, err
	}
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	l.s.accepted++
	cert := l.s.vm.TLS
	return &tee{Conn: tls.Server(conn, &tls.Config{MinVersion: tls.VersionTLS13, SessionTicketsDisabled: true, Certificates: []tls.Certificate{cert}}), s: l.s}, nil
}

func (l *tlsListener) Close() error   { return l.s.listener.Close() }
func (l *tlsListener) Addr() net.Addr { return l.s.listener.Addr() }

type tee struct {
	net.Conn
	s *Server
}

func (t *tee) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if t.s.received.Len() < 64<<20 {
		t.s.received.Write(b[:n])
	}
	return n, err
}
