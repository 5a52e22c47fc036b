// Command engine stands in for an inference server where a test needs one that
// misbehaves on purpose. It speaks as much of the OpenAI API as the agent asks
// of an engine.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"chrysalis/ci/load"
)

func main() {
	if len(os.Args) == 1 { // as the GPU helper is called
		fmt.Println("a helper that is none")
		time.Sleep(time.Hour)
	}
	mode, socket := os.Args[1], os.Args[2]
	if i := slices.Index(os.Args, "--uds"); i > 0 { // as vLLM is called
		mode, socket = "vllm", os.Args[i+1]
	}
	switch mode {
	case "vllm":
		likeVLLM()
	case "gpu":
		var names []string
		for _, name := range []string{"nvidiactl", "nvidia0", "nvidia1", "nvidia2", "nvidia-uvm"} {
			if f, err := os.OpenFile("/dev/"+name, os.O_RDWR, 0); err == nil {
				names = append(names, name)
				f.Close()
			}
		}
		fmt.Println("engine: opens", strings.Join(names, " "))
	case "exit":
		fmt.Println("engine: exits at once")
		os.Exit(7)
	case "hang":
		fmt.Println("engine: never answers")
		time.Sleep(time.Hour)
	}
	fmt.Println("engine: serves")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Println("engine:", err)
		os.Exit(1)
	}
	http.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("POST /v1/chat/completions", map[bool]http.HandlerFunc{true: crowd, false: chat}[mode == "crowd"])
	err = http.Serve(ln, nil)
	fmt.Println("engine:", err)
	os.Exit(1)
}

// likeVLLM looks around as a server of sharded models does, and says what it finds.
func likeVLLM() {
	fmt.Println("engine: called with", strings.Join(os.Args[1:], " "))
	model := os.Args[slices.Index(os.Args, "--model")+1]
	var names []string
	entries, err := os.ReadDir(model)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	fmt.Println("engine: sees", strings.Join(names, " "), "in", model, "errors:", err)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		var conn net.Conn
		if conn, err = net.Dial("tcp", ln.Addr().String()); err == nil {
			conn.Close()
		}
	}
	if err == nil {
		fmt.Println("engine: talks to itself over 127.0.0.1")
	} else {
		fmt.Println("engine:", err)
	}
	_, errOut := net.DialTimeout("tcp", "10.0.2.2:80", time.Second)
	const vsock = 40 // AF_VSOCK
	_, errVsock := syscall.Socket(vsock, syscall.SOCK_STREAM, 0)
	if errOut != nil && errVsock != nil {
		fmt.Println("engine: nothing else can be reached")
	}
}

// crowd does what load.Engine does, or else says on both of its outputs what it was
// asked, and answers with it.
func crowd(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if strings.Contains(string(body), `"say `) {
		fmt.Println("engine: asked on stdout", string(body))
		fmt.Fprintln(os.Stderr, "engine: asked on stderr", string(body))
		r.Body = io.NopCloser(bytes.NewReader(body))
		echo(w, r)
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	load.Engine(w, r)
}

// echo answers with the last message, which begins with "say ". With "refuse" in it
// that is an error's message, with "crash" the engine dies over it.
func echo(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Stream   bool
		Messages []struct{ Content string }
	}
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil || len(request.Messages) == 0 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	text, _ := json.Marshal(request.Messages[len(request.Messages)-1].Content)
	switch {
	case strings.Contains(string(text), "refuse"):
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":{"message":%s}}`, text)
	case strings.Contains(string(text), "fail"):
		w.WriteHeader(http.StatusInternalServerError)
		fmt.Fprintf(w, `{"error":{"message":%s}}`, text)
	case !request.Stream:
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":%s}}]}`, text)
	default:
		w.Header().Set("Content-Type", "text/event-stream")
		for range 20 {
			fmt.Fprintf(w, "data: {\"id\":\"1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":%s}}]}\n\n", text)
			w.(http.Flusher).Flush()
			if strings.Contains(string(text), "crash") {
				panic(string(text)) // net/http prints it
			}
			time.Sleep(20 * time.Millisecond)
		}
		fmt.Fprint(w, "data: [DONE]\n\n")
	}
}

// chat obeys the last message: "die" ends the engine after three events,
// "stall" streams an event now and again for ever, anything else is answered.
func chat(w http.ResponseWriter, r *http.Request) {
	var request struct {
		Stream   bool
		Messages []struct{ Content string }
	}
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil || len(request.Messages) == 0 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	order := request.Messages[len(request.Messages)-1].Content
	if !request.Stream {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"id":"1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"done"}}]}`)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	send := func(text string) {
		fmt.Fprintf(w, "data: {\"id\":\"1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":%q}}]}\n\n", text)
		w.(http.Flusher).Flush()
	}
	for i := 0; ; i++ {
		send(fmt.Sprintf("%d ", i))
		switch {
		case order == "die" && i == 2:
			time.Sleep(200 * time.Millisecond) // what was sent is on its way
			os.Exit(9)
		case order == "stall":
			select {
			case <-r.Context().Done():
				fmt.Println("engine: the client went away")
				return
			case <-time.After(500 * time.Millisecond):
			}
		case !strings.Contains("die stall", order) && i == 4:
			fmt.Fprint(w, "data: [DONE]\n\n")
			return
		}
	}
}
