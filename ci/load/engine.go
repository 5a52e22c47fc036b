// Package load puts a VM, or its parts in processes of their own, under the load of
// many clients, good ones and bad ones, and measures what that does to the good ones
// and to the parts.
package load

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// Engine stands in for an inference server: it streams as many events as the last
// message says, "EVENTS MILLISECONDS", one each so many milliseconds. Each says how
// many microseconds after the request it was sent.
func Engine(w http.ResponseWriter, r *http.Request) {
	begin := time.Now()
	var request struct {
		Messages []struct{ Content string }
	}
	var events, pause int
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil || len(request.Messages) == 0 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	if n, _ := fmt.Sscanf(request.Messages[len(request.Messages)-1].Content, "%d %d", &events, &pause); n != 2 || events < 1 || pause < 1 {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	flush := http.NewResponseController(w).Flush
	tick := time.NewTicker(time.Duration(pause) * time.Millisecond)
	defer tick.Stop()
	for range events {
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
		fmt.Fprintf(w, "data: {\"id\":\"1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\"%d \"}}]}\n\n", time.Since(begin).Microseconds())
		if flush() != nil {
			return
		}
	}
	fmt.Fprint(w, "data: [DONE]\n\n")
}
