package guest

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"chrysalis/pay"
)

func TestPhases(t *testing.T) {
	const want = "mounts devices modules platform manifest disks gpu lockdown engine identity serve"
	var names []string
	for _, p := range Phases {
		names = append(names, string(p))
	}
	if got := strings.Join(names, " "); got != want {
		t.Errorf("phases %s, expected %s", got, want)
	}
}

// Reasons leave the guest as they are: enumerated values, never text.
func TestReasons(t *testing.T) {
	name := regexp.MustCompile(`^[a-z]+(-[a-z]+)*$`)
	explained := map[string]Reason{}
	for reason, text := range explanations {
		if reason != ReasonNone && !name.MatchString(string(reason)) {
			t.Errorf("%q is not a reason's name", reason)
		}
		if other, ok := explained[text]; ok {
			t.Errorf("%q and %q have one explanation", reason, other)
		}
		explained[text] = reason
		if !reason.Known() || reason.Explain() != text || strings.HasSuffix(text, ".") || text == "" {
			t.Errorf("%q: %q", reason, text)
		}
	}
	if unknown := Reason("made-up"); unknown.Known() || !strings.Contains(unknown.Explain(), "does not know") {
		t.Errorf("an unknown reason: %q", unknown.Explain())
	}
}

// The status document is read by launchers of other versions.
func TestStatusDocument(t *testing.T) {
	data, err := json.Marshal(Status{Version: 1, Image: "chrysalis", Phase: PhaseServe, Ready: true, Phases: []PhaseTime{{PhaseMounts, 7}}})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"version":1,"image":"chrysalis","phase":"serve","ready":true,"draining":false,` +
		`"uptime_ms":0,"kernel_ms":0,"phases":[{"name":"mounts","ms":7}],` +
		`"counters":{"connections":0,"requests":0,"active":0,"paid":0,"unpaid":0,"refused":0,"busy":0,"unavailable":0,` +
		`"engine_errors":0,"cancelled":0,"engine_restarts":0,"agent_rss_kib":0,"agent_peak_kib":0,` +
		`"agent_goroutines":0,"agent_descriptors":0}}`
	if string(data) != want {
		t.Errorf("%s\nexpected\n%s", data, want)
	}
}

func TestControlMessages(t *testing.T) {
	channel := "0:" + strings.Repeat("ab", 32)
	for _, tt := range []struct {
		value any
		want  string
	}{
		{ControlRequest{Op: OpDrain}, `{"op":"drain"}`},
		{ControlRequest{Op: OpStop}, `{"op":"stop"}`},
		{ControlRequest{Op: OpPrices, Payment: &ControlPayment{channel, 5, 6, []pay.Price{{Prompt: 7, Completion: 8}}}},
			`{"op":"prices","payment":{"payee":"` + channel + `","min_deposit":5,"min_delay_seconds":6,"prices":[{"prompt_price":7,"completion_price":8}]}}`},
		{ControlRequest{Op: OpAdmit, Admit: &Admission{channel, "cd", 5, 4, "v", true}},
			`{"op":"admit","admit":{"channel":"` + channel + `","key":"cd","limit":5,"used":4,"best":"v","closing":true}}`},
		{ControlRequest{Op: OpDrop, Channel: channel}, `{"op":"drop","channel":"` + channel + `"}`},
		{ControlRequest{Op: OpCollect, Ack: 7, WaitMS: 3000}, `{"op":"collect","ack":7,"wait_ms":3000}`},
		{ControlReply{OK: true, Active: 3}, `{"ok":true,"active":3}`},
		{ControlReply{Error: "unknown-op"}, `{"ok":false,"error":"unknown-op","active":0}`},
		{ControlReply{OK: true, Batch: 8, Balances: []Balance{{channel, "v", []Use{{1, 2, 3, 4, 5}}}}, Wanted: []string{channel}},
			`{"ok":true,"active":0,"batch":8,"balances":[{"channel":"` + channel + `","voucher":"v","uses":[` +
				`{"model":1,"requests":2,"prompt_tokens":3,"completion_tokens":4,"earned":5}]}],"wanted":["` + channel + `"]}`},
	} {
		if data, err := json.Marshal(tt.value); err != nil || string(data) != tt.want {
			t.Errorf("%s, %v; expected %s", data, err, tt.want)
		}
	}
}

// Ports and the chunk are part of what an image is; a launcher relies on them.
func TestConstants(t *testing.T) {
	if got := []int{PortInference, PortStatus, PortControl, MaxChunk, MaxControlMessage}; !slices.Equal(got, []int{443, 9000, 9001, 8192, 4096}) {
		t.Errorf("%v", got)
	}
}
