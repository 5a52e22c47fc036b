// Package contract is the registry's contract: its compiled code, the messages
// it takes and what it stores. The source is registry.tolk beside this file;
// 'make contract' compiles it, and CI compares.
package contract

import (
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/xssnick/tonutils-go/address"
	"github.com/xssnick/tonutils-go/tlb"
	"github.com/xssnick/tonutils-go/tvm/cell"
)

//go:embed registry.boc
var code []byte

// Version is what the get-method version returns.
const Version = 1

// MaxRecord is the largest record in bytes that the contract takes: 130 cells of
// a snake, less what is not used of the last.
const MaxRecord = 130 * snakeBytes

// Limits of the signatures over a record.
const (
	MaxStrangersSignatures = 16 // when others than the owner submit them
	MaxSignatures          = 64
)

// Code is the contract's code.
func Code() *cell.Cell { return mustParse(code) }

func mustParse(boc []byte) *cell.Cell {
	c, err := cell.FromBOC(boc)
	if err != nil {
		panic("contract: the embedded code is broken: " + err.Error())
	}
	return c
}

// Kind is what a record describes.
type Kind uint8

// The kinds of records.
const (
	Image Kind = iota + 1
	Shape
	Engine
	Model
)

var kindNames = [...]string{Image: "image", Shape: "shape", Engine: "engine", Model: "model"}

func (k Kind) String() string {
	if k < Image || k > Model {
		return fmt.Sprintf("kind %d", uint8(k))
	}
	return kindNames[k]
}

// ParseKind is the inverse of String.
func ParseKind(s string) (Kind, error) {
	for k := Image; k <= Model; k++ {
		if kindNames[k] == s {
			return k, nil
		}
	}
	return 0, fmt.Errorf("%q is no kind of record; there are image, shape, engine and model", s)
}

// Status is what the publisher says of a record.
type Status uint8

// The statuses. A revoked record stays so.
const (
	Active Status = iota + 1
	Deprecated
	Revoked
)

var statusNames = [...]string{Active: "active", Deprecated: "deprecated", Revoked: "revoked"}

func (s Status) String() string {
	if s < Active || s > Revoked {
		return fmt.Sprintf("status %d", uint8(s))
	}
	return statusNames[s]
}

// Data is what a new registry of this owner stores.
func Data(owner *address.Address) *cell.Cell {
	return cell.BeginCell().
		MustStoreAddr(owner).
		MustStoreUInt(0, 2). // no pending owner
		MustStoreUInt(0, 64).
		MustStoreUInt(0, 32).
		MustStoreDict(nil).
		EndCell()
}

// StateInit is what the first message to a new registry brings along.
func StateInit(owner *address.Address) *tlb.StateInit {
	return &tlb.StateInit{Code: Code(), Data: Data(owner)}
}

// Address is where the registry of this first owner is, in the basechain.
func Address(owner *address.Address) *address.Address {
	return addressOf(StateInit(owner))
}

func addressOf(init *tlb.StateInit) *address.Address {
	c, err := tlb.ToCell(init)
	if err != nil {
		panic(err) // it has code and data and nothing else
	}
	return address.NewAddress(0, 0, c.Hash())
}

// Operations: the first 32 bits of a message.
const (
	opPut           = 0x43480001
	opSetStatus     = 0x43480002
	opCosign        = 0x43480003
	opDropSignature = 0x43480004
	opTransfer      = 0x43480005
	opAccept        = 0x43480006
)

func begin(op, queryID uint64) *cell.Builder {
	return cell.BeginCell().MustStoreUInt(op, 32).MustStoreUInt(queryID, 64)
}

// Put publishes a record.
type Put struct {
	Key       [32]byte
	Kind      Kind
	NotBefore uint64 // Unix time in seconds, less than 2⁴⁰
	NotAfter  uint64
	Record    []byte
}

// Body is the message's body.
func (p Put) Body(queryID uint64) (*cell.Cell, error) {
	if p.Kind < Image || p.Kind > Model {
		return nil, fmt.Errorf("%v is no kind of record", p.Kind)
	}
	if p.NotBefore >= p.NotAfter || p.NotAfter >= 1<<40 {
		return nil, errors.New("the record's validity ends before it begins")
	}
	if len(p.Record) == 0 || len(p.Record) > MaxRecord {
		return nil, fmt.Errorf("the record has %d bytes; from 1 to %d are possible", len(p.Record), MaxRecord)
	}
	hash := sha256.Sum256(p.Record)
	return begin(opPut, queryID).
		MustStoreSlice(p.Key[:], 256).
		MustStoreUInt(uint64(p.Kind), 8).
		MustStoreUInt(p.NotBefore, 40).
		MustStoreUInt(p.NotAfter, 40).
		MustStoreSlice(hash[:], 256).
		MustStoreRef(Snake(p.Record)).
		EndCell(), nil
}

// SetStatus deprecates or revokes a record.
func SetStatus(queryID uint64, key [32]byte, status Status) *cell.Cell {
	return begin(opSetStatus, queryID).
		MustStoreSlice(key[:], 256).
		MustStoreUInt(uint64(status), 8).
		EndCell()
}

// Cosign adds an auditor's signature over SignedHash.
func Cosign(queryID uint64, key, hash, publicKey [32]byte, signature [64]byte) *cell.Cell {
	return begin(opCosign, queryID).
		MustStoreSlice(key[:], 256).
		MustStoreSlice(hash[:], 256).
		MustStoreRef(cell.BeginCell().
			MustStoreSlice(publicKey[:], 256).
			MustStoreSlice(signature[:], 512).
			EndCell()).
		EndCell()
}

// DropSignature takes an auditor's signature off a record.
func DropSignature(queryID uint64, key, publicKey [32]byte) *cell.Cell {
	return begin(opDropSignature, queryID).
		MustStoreSlice(key[:], 256).
		MustStoreSlice(publicKey[:], 256).
		EndCell()
}

// Transfer names who may become the owner; nil names nobody.
func Transfer(queryID uint64, newOwner *address.Address) *cell.Cell {
	return begin(opTransfer, queryID).MustStoreAddr(newOwner).EndCell()
}

// Accept makes its sender the owner, if Transfer named it.
func Accept(queryID uint64) *cell.Cell { return begin(opAccept, queryID).EndCell() }

// signatureDomain separates what auditors sign from all else that they sign.
const signatureDomain = "chrysalis/cosign/1"

// SignedHash is what an auditor signs with Ed25519: the SHA-256 of the domain,
// the network's global id and the registry's workchain (32 bits each, big-endian),
// its account id, the record's key and the SHA-256 of the record. It must be an
// address in a workchain.
func SignedHash(globalID int32, registry *address.Address, key, hash [32]byte) [32]byte {
	b := append([]byte(nil), signatureDomain...)
	b = binary.BigEndian.AppendUint32(b, uint32(globalID))
	b = binary.BigEndian.AppendUint32(b, uint32(registry.Workchain()))
	b = append(b, registry.Data()...)
	b = append(b, key[:]...)
	b = append(b, hash[:]...)
	return sha256.Sum256(b)
}

// exitCodes are those of enum Error in registry.tolk and those of the TVM that
// a user can do something about.
var exitCodes = map[int32]string{
	13:     "it ran out of gas; attach more",
	37:     "its balance does not cover what it must keep; attach more",
	200:    "the sender is not the registry's owner",
	201:    "the sender is not the one that the owner named",
	202:    "the registry has no such record",
	203:    "the record is revoked, which is final",
	204:    "the record's kind is not the one that the registry has, or none",
	205:    "a record can only become deprecated or revoked",
	206:    "the record's validity ends before it begins",
	207:    "the record is too large",
	208:    "the signature is over another record than the registry has under this key",
	209:    "the signature does not verify, or is not there",
	210:    "the record has as many signatures as others than the owner may add; ask the owner to submit it",
	211:    "the value attached does not pay for storage and gas",
	0xffff: "the registry does not know this operation",
}

// Explain says in words why the contract refused a message.
func Explain(exitCode int32) string { return explain(nil, exitCode) }

// explain looks in a contract's own codes first.
func explain(own map[int32]string, exitCode int32) string {
	for _, codes := range []map[int32]string{own, exitCodes} {
		if text, ok := codes[exitCode]; ok {
			return text
		}
	}
	return fmt.Sprintf("exit code %d", exitCode)
}
