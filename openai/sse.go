package openai

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
)

// maxEvent bounds one event of a stream, in bytes.
const maxEvent = 1 << 20

// errUnfinished is a stream that ended before [DONE].
var errUnfinished = errors.New("it ended before it was complete")

// readSSE calls each with the data of every event of a stream (WHATWG HTML,
// section 9.2.6) until "[DONE]", which ends OpenAI's streams. Comments, with
// which a server may pad, and fields other than data are ignored.
func readSSE(r io.Reader, each func(data []byte) error) error {
	in := bufio.NewReaderSize(r, 16<<10)
	var data []byte
	has := false
	size := 0
	for {
		line, err := readLine(in, maxEvent)
		if err == io.EOF {
			return errUnfinished // an event without its empty line does not count
		}
		if err != nil {
			return err
		}
		if len(line) == 0 {
			if has {
				if string(data) == "[DONE]" {
					return nil
				}
				if err := each(data); err != nil {
					return err
				}
			}
			data, has, size = data[:0], false, 0
			continue
		}
		if size += len(line); size > maxEvent {
			return fmt.Errorf("an event of more than %d bytes", maxEvent)
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		if string(name) != "data" {
			continue
		}
		if has {
			data = append(data, '\n')
		}
		data = append(data, bytes.TrimPrefix(value, []byte(" "))...)
		has = true
	}
}

// readLine reads a line without its end, LF or CRLF, of at most limit bytes. It
// returns io.EOF for a line that has no end.
func readLine(in *bufio.Reader, limit int) ([]byte, error) {
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if len(line)+len(part) > limit {
			return nil, fmt.Errorf("a line of more than %d bytes", limit)
		}
		line = append(line, part...)
		if err == bufio.ErrBufferFull {
			continue
		}
		if err != nil {
			return nil, err
		}
		return bytes.TrimSuffix(line[:len(line)-1], []byte("\r")), nil
	}
}
