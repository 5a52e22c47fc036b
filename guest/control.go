package guest

import "chrysalis/pay"

// MaxControlMessage bounds a control message, request or reply, in bytes with its
// newline.
const MaxControlMessage = 4 << 10

// ControlOp is what the host asks for on the control port.
type ControlOp string

// The operations. None of them can change what a client has verified: the prices
// stay below the ceilings of the manifest.
const (
	OpDrain   ControlOp = "drain"   // admit no new request; reply at once
	OpStop    ControlOp = "stop"    // end the VM with ReasonStopped; reply first
	OpPrices  ControlOp = "prices"  // Payment: who is paid, and the current prices; before the first one nothing that has a price is served
	OpAdmit   ControlOp = "admit"   // Admit: begin to serve on a channel, or take what changed of it
	OpDrop    ControlOp = "drop"    // Channel: forget it, known or not; refused while a request runs on it or something of it is to be collected
	OpCollect ControlOp = "collect" // Ack, WaitMS: what has been paid and used since; the reply has Batch, Balances and Wanted
)

// MaxControlWait bounds ControlRequest.WaitMS, in milliseconds.
const MaxControlWait = 3000

// MaxWanted is how many channels a reply can want.
const MaxWanted = 16

// ControlRequest is one JSON object followed by a newline, at most
// MaxControlMessage bytes. Fields that are unknown, there twice, null or not the
// operation's are refused.
type ControlRequest struct {
	Op      ControlOp       `json:"op"`
	Payment *ControlPayment `json:"payment,omitempty"`
	Admit   *Admission      `json:"admit,omitempty"`
	Channel string          `json:"channel,omitempty"` // 0:HEX
	Ack     uint64          `json:"ack,omitempty"`     // the last Batch that is durable; 0 for none
	WaitMS  int             `json:"wait_ms,omitempty"` // 0 to MaxControlWait: how long to wait for something to tell
}

// ControlPayment says who is paid and how much.
type ControlPayment struct {
	Payee      string      `json:"payee"`             // the owner's account, 0:HEX
	MinDeposit uint64      `json:"min_deposit"`       // nanotons
	MinDelay   int64       `json:"min_delay_seconds"` // of a closing by the payer
	Prices     []pay.Price `json:"prices"`            // in the order of the manifest's models, at or below the ceilings
}

// Admission is a channel that the launcher has checked with proofs.
type Admission struct {
	Channel string `json:"channel"`           // 0:HEX
	Key     string `json:"key"`               // the payer's, Ed25519, lower-case hexadecimal
	Limit   uint64 `json:"limit"`             // the largest total of a voucher that the channel pays, nanotons
	Used    uint64 `json:"used"`              // of that total, what was served before this VM ran
	Best    string `json:"best,omitempty"`    // the best voucher that was taken before, as text
	Closing bool   `json:"closing,omitempty"` // nothing more is served on it
}

// Balance is what the host is told of a channel since what it acknowledged last.
type Balance struct {
	Channel string `json:"channel"`           // 0:HEX
	Voucher string `json:"voucher,omitempty"` // a better one than before, as text
	Uses    []Use  `json:"uses,omitempty"`    // in ascending order of Model
}

// Use is what a model served and was paid for.
type Use struct {
	Model            int    `json:"model"` // index in the manifest
	Requests         uint64 `json:"requests"`
	PromptTokens     uint64 `json:"prompt_tokens"`
	CompletionTokens uint64 `json:"completion_tokens"`
	Earned           uint64 `json:"earned"` // nanotons
}

// The errors of a ControlReply.
const (
	ErrorBadMessage = "bad-message" // not one strict ControlRequest and a newline
	ErrorUnknownOp  = "unknown-op"  // an operation that this version does not have
	ErrorPayment    = "payment"     // the manifest has no payment: the VM serves for free
	ErrorRefused    = "refused"     // a value that cannot be: a price above its ceiling, a bad key, a voucher of another channel
)

// ControlReply is one JSON object followed by a newline.
type ControlReply struct {
	OK     bool   `json:"ok"`
	Error  string `json:"error,omitempty"` // one of the Error constants
	Active int64  `json:"active"`          // requests still being served; of OpDrain and OpStop
	// Batch numbers the balances, from 1. A batch that was not acknowledged is told
	// again, the same under the same number; the next one comes after its Ack. What was
	// paid counts only then.
	Batch    uint64    `json:"batch,omitempty"` // 0 with nothing to tell
	Balances []Balance `json:"balances,omitempty"`
	// Wanted are channels, 0:HEX, that clients named and that have not been admitted.
	Wanted []string `json:"wanted,omitempty"`
}
