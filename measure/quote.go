package measure

import (
	"bytes"
	"encoding/binary"
	"fmt"
)

// Places in a TDX quote (Intel TDX DCAP Quoting Library API, appendix A.3): a
// header of 48 bytes, in version 5 a type and a size, then the TD report's body.
const (
	quoteHeader   = 48
	quoteBody     = 584 // TD 1.0; TD 1.5 has 64 bytes more, behind it
	atMRTD        = 136
	atMRCONFIGID  = 184
	atRTMR0       = 328
	quoteTDX      = 0x81 // TEE type
	maxQuoteBytes = 64 << 10
)

// ParseTDXQuote returns what a TDX quote of version 4 or 5 says of the registers,
// by their record names, and MRCONFIGID. It verifies no signature: that is for
// the client's policy.
func ParseTDXQuote(name string, data []byte) (map[string][]byte, error) {
	in := input{name, data}
	if len(data) > maxQuoteBytes {
		return nil, fmt.Errorf("%s: %d bytes, a quote has at most %d", name, len(data), maxQuoteBytes)
	}
	head, err := in.slice(0, quoteHeader, "a quote's header")
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	version, tee := le.Uint16(head), le.Uint32(head[4:])
	if version != 4 && version != 5 {
		return nil, in.errorf(0, "a quote of version %d, expected 4 or 5", version)
	}
	if tee != quoteTDX {
		return nil, in.errorf(4, "a quote of TEE type %#x, expected %#x, TDX", tee, quoteTDX)
	}
	at := uint64(quoteHeader)
	if version == 5 {
		kind, err := in.slice(at, 6, "a quote's body type")
		if err != nil {
			return nil, err
		}
		if t := le.Uint16(kind); t != 2 && t != 3 {
			return nil, in.errorf(at, "a body of type %d, expected 2 or 3, a TD report", t)
		}
		at += 6
	}
	body, err := in.slice(at, quoteBody, "a TD report")
	if err != nil {
		return nil, err
	}
	values := map[string][]byte{"mrtd": body[atMRTD:][:48], "mrconfigid": body[atMRCONFIGID:][:48]}
	for i := range 4 {
		values[fmt.Sprintf("rtmr%d", i)] = body[atRTMR0+48*i:][:48]
	}
	return values, nil
}

// CheckTPMQuote compares what a TPM's quote (TPMS_ATTEST, TPM 2.0 Library, part
// 2, section 10.12.8) covers with values of the SHA-256 bank by index. It returns
// what does not fit, or "". It verifies no signature.
func CheckTPMQuote(name string, data []byte, value func(index int) []byte) (string, error) {
	in := input{name, data}
	at := uint64(0)
	take := func(n uint64, what string) ([]byte, error) {
		b, err := in.slice(at, n, what)
		at += n
		return b, err
	}
	sized := func(what string) ([]byte, error) {
		b, err := take(2, what)
		if err != nil {
			return nil, err
		}
		return take(uint64(binary.BigEndian.Uint16(b)), what)
	}
	head, err := take(6, "a quote's header")
	if err != nil {
		return "", err
	}
	if binary.BigEndian.Uint32(head) != 0xff544347 || binary.BigEndian.Uint16(head[4:]) != 0x8018 {
		return "", in.errorf(0, "%x, expected the start of a TPM's quote", head)
	}
	for _, what := range []string{"a quote's signer", "a quote's qualifying data"} {
		if _, err := sized(what); err != nil {
			return "", err
		}
	}
	if _, err := take(17+8, "a quote's clock and firmware version"); err != nil {
		return "", err
	}
	count, err := take(4, "a quote's banks")
	if err != nil {
		return "", err
	}
	if n := binary.BigEndian.Uint32(count); n != 1 {
		return "", in.errorf(at-4, "a quote of %d banks of PCRs, expected 1", n)
	}
	bank, err := take(3, "a quote's bank")
	if err != nil {
		return "", err
	}
	if a := Algorithm(binary.BigEndian.Uint16(bank)); a != SHA256 || bank[2] != 3 {
		return "", in.errorf(at-3, "the bank of %v, expected SHA-256", a)
	}
	selection, err := take(3, "a quote's selection of PCRs")
	if err != nil {
		return "", err
	}
	var values []byte
	for i := range 24 {
		if selection[i/8]>>(i%8)&1 != 0 {
			v := value(i)
			if v == nil {
				return fmt.Sprintf("the quote covers PCR %d, of which the log says nothing", i), nil
			}
			values = append(values, v...)
		}
	}
	digest, err := sized("a quote's digest")
	if err != nil {
		return "", err
	}
	if at != uint64(len(data)) {
		return "", in.errorf(at, "%d bytes follow the quote", uint64(len(data))-at)
	}
	if !bytes.Equal(digest, SHA256.Sum(values)) {
		return "the quote covers other values than the log replays to", nil
	}
	return "", nil
}
