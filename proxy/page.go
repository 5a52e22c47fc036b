package proxy

import (
	"bytes"
	_ "embed"
	"html/template"
	"net/http"
	"time"

	"chrysalis/attest"
)

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// row is a worker on the page.
type row struct {
	Endpoint string
	State    string
	Problem  string
	Ago      time.Duration
	InFlight int64
	Verdict  *attest.Verdict
}

// page shows each worker with its checks. It takes nothing from elsewhere.
func (p *Proxy) page(w http.ResponseWriter, _ *http.Request) {
	var rows []row
	for _, worker := range p.workers {
		worker.mu.Lock()
		r := row{worker.endpoint, worker.state.String(), worker.problem, 0, worker.inFlight.Load(), nil}
		if !worker.at.IsZero() {
			r.Ago = time.Since(worker.at).Round(time.Second)
		}
		if worker.session != nil {
			r.Verdict = worker.session.Verdict
		}
		worker.mu.Unlock()
		rows = append(rows, r)
	}
	var out bytes.Buffer
	if err := pageTemplate.Execute(&out, rows); err != nil {
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store")
	w.Write(out.Bytes())
}
