package main

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"net"
	"strings"
)

const (
	whole = `{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"answered"}}]%s}`
	chunk = `data: {"id":"1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":{"content":"answered"}}]}` + "\n\n"

	jsonHead   = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
	streamHead = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
)

// answer writes bytes to the agent that no engine should.
func answer(conn net.Conn, name string) {
	say := func(head, body string) {
		fmt.Fprintf(conn, "%sContent-Length: %d\r\n\r\n%s", head, len(body), body)
	}
	usage := func(fields string) { say(jsonHead, fmt.Sprintf(whole, `,"usage":{`+fields+`}`)) }
	endless := func(piece string) {
		for {
			if _, err := io.WriteString(conn, piece); err != nil {
				return
			}
		}
	}
	switch name {
	case "nothing":
	case "no HTTP":
		io.WriteString(conn, "\x00\xff\xfe\r\n\r\n\x16\x03\x01")
	case "another protocol":
		io.WriteString(conn, "HTTP/2.0 200 OK\r\n\r\n")
	case "endless status line":
		io.WriteString(conn, "HTTP/1.1 200 ")
		endless(strings.Repeat("x", 4096))
	case "endless header line":
		io.WriteString(conn, jsonHead+"X: ")
		endless(strings.Repeat("x", 4096))
	case "endless header":
		io.WriteString(conn, jsonHead)
		endless(strings.Repeat("X: x\r\n", 512))
	case "endless provisional answers":
		endless("HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")
	case "another protocol's connection":
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: vsock\r\n\r\n")
		endless(strings.Repeat("x", 4096))
	case "redirect":
		say("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://1/v1/models\r\n", "")
	case "two lengths":
		io.WriteString(conn, jsonHead+"Content-Length: 2\r\nContent-Length: 200\r\n\r\n{}")
	case "length below zero":
		io.WriteString(conn, jsonHead+"Content-Length: -1\r\n\r\n{}")
	case "length of an exabyte":
		io.WriteString(conn, jsonHead+"Content-Length: 1000000000000000000\r\n\r\n{}")
	case "chunk of too many digits":
		io.WriteString(conn, jsonHead+"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFF\r\n{}")
	case "endless chunk extension":
		io.WriteString(conn, jsonHead+"Transfer-Encoding: chunked\r\n\r\n1;")
		endless(strings.Repeat("x", 4096))
	case "endless trailer":
		io.WriteString(conn, jsonHead+"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
		endless(strings.Repeat("X: x\r\n", 512))
	case "gzip bomb":
		var packed bytes.Buffer
		z, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		for range 16 {
			z.Write(make([]byte, 1<<20))
		}
		z.Close()
		say(jsonHead+"Content-Encoding: gzip\r\n", packed.String())
	case "no JSON":
		say(jsonHead, "<html>")
	case "deep JSON":
		say(jsonHead, strings.Repeat(`{"a":`, 20000)+"1"+strings.Repeat("}", 20000))
	case "another type":
		say("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n", fmt.Sprintf(whole, ""))
	case "its own error":
		say("HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n", `{"error":{"message":"the prompt was: secret"}}`)
	case "long refusal":
		say("HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n", `{"error":{"message":"`+strings.Repeat("x", 60<<10)+`"}}`)
	case "headers of its own":
		say(jsonHead+"Set-Cookie: a=b\r\nChrysalis-Receipt: {}\r\nTrailer: Chrysalis-Receipt\r\nAlt-Svc: h3=\":443\"\r\nX-Engine: 1\r\n", fmt.Sprintf(whole, ""))
	case "tokens below zero":
		usage(`"prompt_tokens":-1,"completion_tokens":-9223372036854775808`)
	case "tokens beyond all bounds":
		usage(`"prompt_tokens":9223372036854775807,"completion_tokens":1e300`)
	case "more tokens than bytes":
		usage(`"prompt_tokens":1000000,"completion_tokens":1000000`)
	case "tokens that are no numbers":
		usage(`"prompt_tokens":"1","completion_tokens":{}`)
	case "endless answer":
		io.WriteString(conn, jsonHead+"Connection: close\r\n\r\n{\"a\":\"")
		endless(strings.Repeat("x", 4096))

	case "stream: garbage":
		io.WriteString(conn, streamHead+"\x00\x01\x02\n\ndata: {\n\n")
	case "stream: endless line":
		io.WriteString(conn, streamHead+chunk+"data: ")
		endless(strings.Repeat("x", 4096))
	case "stream: endless event":
		io.WriteString(conn, streamHead+chunk)
		endless(strings.Repeat("data: 1\n", 512))
	case "stream: endless comments":
		io.WriteString(conn, streamHead+chunk)
		endless(strings.Repeat(": x\n\n", 512))
	case "stream: a receipt of its own":
		io.WriteString(conn, streamHead+chunk+": chrysalis-receipt {\"version\":1}\n\nevent: x\nid: 1\nretry: 1\n"+chunk+"data: [DONE]\n\n")
	case "stream: line breaks of other kinds":
		io.WriteString(conn, streamHead+"data: {\"a\":\rdata: \"b\"}\r\n\r\n")
	case "stream: more after its end":
		io.WriteString(conn, streamHead+chunk+"data: [DONE]\n\n"+chunk+chunk)
		endless(chunk)
	case "stream: tokens below zero":
		io.WriteString(conn, streamHead+chunk+"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":-5,\"completion_tokens\":-5}}\n\ndata: [DONE]\n\n")
	case "stream: endless":
		io.WriteString(conn, streamHead)
		endless(chunk)
	case "stream: cut off":
		io.WriteString(conn, streamHead+chunk+"data: {\"id\"")
	case "stream: as an answer":
		say(jsonHead, fmt.Sprintf(whole, ""))
	}
}
