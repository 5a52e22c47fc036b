package voucher

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

var (
	testKey     = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32))
	testPublic  = Key(testKey.Public().(ed25519.PublicKey))
	testChannel = Channel{0: 1, 31: 0xff}
)

// TestSigned fixes what is signed, byte by byte.
func TestSigned(t *testing.T) {
	v := Sign(testKey, -239, testChannel, 0x0102030405060708)
	want := hex.EncodeToString([]byte("chrysalis/voucher/1")) + "ffffff11" + "00000000" +
		"01" + strings.Repeat("00", 30) + "ff" + "0102030405060708"
	if got := hex.EncodeToString(v.signed()); got != want {
		t.Errorf("signed %s\nwant   %s", got, want)
	}
	if len(v.signed()) != 67 {
		t.Errorf("%d bytes", len(v.signed()))
	}
	if err := v.Verify(testPublic); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Voucher){
		"network":   func(v *Voucher) { v.GlobalID++ },
		"channel":   func(v *Voucher) { v.Channel[5] ^= 1 },
		"total":     func(v *Voucher) { v.Total++ },
		"signature": func(v *Voucher) { v.Signature[63] ^= 1 },
	} {
		w := v
		change(&w)
		if err := w.Verify(testPublic); !errors.Is(err, ErrSignature) {
			t.Errorf("another %s: %v", name, err)
		}
	}
	if err := v.Verify(Key{1}); err == nil {
		t.Error("another key")
	}
}

func TestText(t *testing.T) {
	v := Sign(testKey, -7, testChannel, 1<<64-1)
	if len(v.String()) != TextSize {
		t.Errorf("%d characters", len(v.String()))
	}
	got, err := Parse(v.String())
	if err != nil || got != v {
		t.Errorf("%+v, %v", got, err)
	}
	s := v.String()
	for name, bad := range map[string]string{
		"empty": "", "short": s[1:], "long": s + "A", "padded": s[:len(s)-1] + "=", "line": s[:10] + "\n" + s[11:], "other alphabet": s[:10] + "+" + s[11:],
	} {
		if _, err := Parse(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Decode(make([]byte, Size+1)); !errors.Is(err, ErrMalformed) {
		t.Errorf("%v", err)
	}
	for _, bad := range []string{"", "0:", "1:" + strings.Repeat("0", 64), "0:" + strings.Repeat("0", 63), "0:" + strings.Repeat("A", 64), "0:" + strings.Repeat("x", 64)} {
		if c, err := ParseChannel(bad); err == nil {
			t.Errorf("%q is the channel %v", bad, c)
		}
	}
	var c Channel
	if text, err := testChannel.MarshalText(); err != nil || c.UnmarshalText(text) != nil || c != testChannel {
		t.Errorf("%s, %v", text, err)
	}
}

func TestCheckKey(t *testing.T) {
	if err := CheckKey(testPublic); err != nil {
		t.Error(err)
	}
	above := prime // 1, once more
	above[0]++
	for name, key := range map[string]Key{
		"neutral": {0: 1}, "neutral, signed": {0: 1, 31: 0x80}, "zero": {}, "zero, signed": {31: 0x80}, "minus one": minusOne,
		"the prime": prime, "one above the prime": above, "all ones": Key(bytes.Repeat([]byte{0xff}, 32)),
		"order 8": smallOrder[3], "order 8, the other": smallOrder[4],
	} {
		if err := CheckKey(key); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Whoever has no key can sign by one of small order: what the check is for.
	v := Voucher{Signature: [64]byte{0: 1}}
	if err := v.Verify(Key{0: 1}); err != nil {
		t.Errorf("this forgery is none any more: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(Sign(testKey, -239, testChannel, 5).String())
	f.Fuzz(func(t *testing.T, s string) {
		v, err := Parse(s)
		if err == nil && v.String() != s {
			t.Errorf("%q is read, and written as %q", s, v)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	text := Sign(testKey, -239, testChannel, 5).String()
	for b.Loop() {
		v, err := Parse(text)
		if err != nil || v.Verify(testPublic) != nil {
			b.Fatal(err)
		}
	}
}
