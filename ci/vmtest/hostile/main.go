// Command hostile stands in for an inference server that an attacker has taken
// over entirely. It answers its health check, and otherwise does what the last
// message of a request orders: it tries to get out of its sandbox, to use up the
// VM, or to harm the agent with its answers, and says what came of it.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
)

func main() {
	switch {
	case len(os.Args) == 2 && os.Args[1] == "run":
		fmt.Println("it runs")
		return
	case len(os.Args) != 2:
		os.Exit(2)
	}
	inherited = openFiles()
	ln, err := net.Listen("unix", os.Args[1])
	if err != nil {
		fmt.Println("hostile:", err)
		os.Exit(1)
	}
	http.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("POST /v1/chat/completions", obey)
	fmt.Println("hostile:", http.Serve(ln, nil))
	os.Exit(1)
}

// obey carries out an order: "attack", "exhaust NAME", "answer NAME" or "exit".
func obey(w http.ResponseWriter, r *http.Request) {
	var request struct{ Messages []struct{ Content string } }
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&request); err != nil || len(request.Messages) == 0 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	verb, name, _ := strings.Cut(request.Messages[len(request.Messages)-1].Content, " ")
	switch verb {
	case "attack":
		outcomes := map[string]string{}
		for _, a := range attacks {
			outcomes[a.name] = a.try()
		}
		text, err := json.Marshal(outcomes)
		if err != nil {
			panic(err) // strings only
		}
		say(w, string(text))
	case "exhaust":
		if f := exhaustions[name]; f != nil {
			say(w, f())
			return
		}
		say(w, "no such order")
	case "answer":
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			panic(err)
		}
		defer conn.Close()
		answer(conn, name)
	case "exit":
		os.Exit(1)
	default:
		say(w, "hello")
	}
}

// say answers as an OpenAI server does.
func say(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{
		"id": "1", "object": "chat.completion", "created": 1, "model": "m",
		"choices": []any{map[string]any{
			"index": 0, "finish_reason": "stop", "message": map[string]string{"role": "assistant", "content": text},
		}},
		"usage": map[string]int{"prompt_tokens": 7, "completion_tokens": 1},
	})
}
