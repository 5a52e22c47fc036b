package vmtest

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// tap is a relay's view of a connection: the sizes of the TLS records with data
// that come from the VM (RFC 8446, section 5.1).
type tap struct {
	net.Conn
	rest  []byte
	sizes []int
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.rest = append(c.rest, p[:n]...)
	for len(c.rest) >= 5 {
		size := int(binary.BigEndian.Uint16(c.rest[3:]))
		if len(c.rest) < 5+size {
			break
		}
		if c.rest[0] == 23 { // application_data
			c.sizes = append(c.sizes, size)
		}
		c.rest = c.rest[5+size:]
	}
	return n, err
}

// streamThroughTap asks for a stream of so many tokens, and returns the sizes of
// the pieces that a relay can make out of the records, and the answer's text.
func streamThroughTap(t *testing.T, address, text string, tokens int) (pieces []int, said string) {
	t.Helper()
	raw, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(2 * time.Minute))
	wire := &tap{Conn: raw}
	conn := tls.Client(wire, &tls.Config{InsecureSkipVerify: true})
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	body := fmt.Sprintf(`{"model":"chrysalis/demo","stream":true,"temperature":0,"max_tokens":%d,"messages":[{"role":"user","content":%q}]}`, tokens, text)
	fmt.Fprintf(conn, "POST /v1/chat/completions HTTP/1.1\r\nHost: vm\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	wire.sizes = nil // the handshake is over; TLS 1.3 without tickets has nothing after it
	data, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	header := bytes.Index(data, []byte("\r\n\r\n")) + 4
	resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(data)), nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s, %v: %s", resp.Status, err, answer)
	}
	for line := range strings.Lines(string(answer)) {
		var event struct {
			Choices []struct{ Delta struct{ Content string } }
		}
		if data, ok := strings.CutPrefix(line, "data: {"); ok && json.Unmarshal([]byte("{"+data), &event) == nil && len(event.Choices) > 0 {
			said += event.Choices[0].Delta.Content + "|"
		}
	}
	for i, size := range wire.sizes {
		size -= 17 // the type of what is inside, and the tag
		if i == 0 {
			size -= header
		}
		pieces = append(pieces, size)
	}
	return pieces, said
}

// relaySees records the sizes that a relay sees of answers of equally many tokens.
// Nothing in them differs.
func relaySees(t *testing.T, address string) {
	// A chunk's size in hexadecimal, a line's end, the chunk, a line's end: RFC 9112,
	// section 7.1.
	chunk := func(piece int) int {
		for digits := 1; digits < 6; digits++ {
			if n := piece - digits - 4; n > 0 && len(fmt.Sprintf("%x", n)) == digits {
				return n
			}
		}
		return -1
	}
	const tokens = 12
	totals := map[string]int{}
	var ends []int
	for _, text := range []string{"Who can read my prompt?", "What is a TD?", "What is measured?"} {
		pieces, said := streamThroughTap(t, address, text, tokens)
		total := 0
		// The last are the end of the chunks with the trailer, and the end of the
		// connection.
		data := pieces[:len(pieces)-2]
		sum := 0
		for _, piece := range data {
			// crypto/tls makes small records at first, and takes one more for the rest.
			sum += piece
			if n := chunk(sum); n > 0 && n%256 == 0 {
				total, sum = total+n, 0
			}
		}
		if sum != 0 {
			t.Errorf("pieces of %v, which are not whole blocks and tell of what is in them", data)
		}
		totals[said] = total
		ends = append(ends, pieces[len(pieces)-2])
		t.Logf("%q: pieces of %v", said, pieces)
	}
	if len(totals) != 3 {
		t.Fatalf("the answers do not differ: %v", totals)
	}
	var sums []int
	for _, total := range totals {
		sums = append(sums, total)
	}
	if slices.Min(sums) != slices.Max(sums) {
		t.Errorf("answers of %d tokens take different sums: %v", tokens, totals)
	}
	if slices.Min(ends) != slices.Max(ends) {
		t.Errorf("the trailers take %v bytes", ends)
	}
}

// nothingKept asks for one long prompt again and again, as different clients. The
// engine says each time that it took nothing of it from a cache, and read all of
// it.
func nothingKept(t *testing.T, endpoint string) {
	prompt := "Who can read my prompt? " + strings.Repeat("What is a TD? What is measured? ", 30)
	counted := regexp.MustCompile(`"(cached_tokens|cache_n|prompt_tokens|prompt_n)":([0-9]+)`)
	first := map[string]string{}
	for i := range 4 {
		c := newClient(t, endpoint) // a connection of its own
		resp, body := c.send("POST", "/v1/chat/completions", question(prompt, false))
		c.http.CloseIdleConnections()
		if resp.StatusCode != 200 {
			t.Fatalf("%s: %s", resp.Status, body)
		}
		got := map[string]string{}
		for _, m := range counted.FindAllStringSubmatch(body, -1) {
			got[m[1]] = m[2]
		}
		if i == 0 {
			first = got
			t.Logf("the engine counts %v", got)
		}
		for _, name := range []string{"cached_tokens", "cache_n"} {
			if n, ok := got[name]; !ok || n != "0" {
				t.Errorf("request %d: %s is %q", i, name, n)
			}
		}
		if got["prompt_n"] != first["prompt_n"] || got["prompt_n"] != got["prompt_tokens"] {
			t.Errorf("request %d: the engine read %s of %s tokens, at first %s", i, got["prompt_n"], got["prompt_tokens"], first["prompt_n"])
		}
	}
}
