package api

import (
	"encoding/json"
	"net/http"
)

// apiError is an answer that is not the one that was asked for, in the form that
// OpenAI's clients read. It holds nothing of a request but names of fields, and
// of an engine's answer only the message of a 4xx, which goes to the client that
// caused it.
type apiError struct {
	status  int
	code    string // stable: clients may depend on it
	param   string // the field at fault, if any
	message string
	retry   string // Retry-After in seconds, if the same request may succeed then
	engine  bool   // the engine's refusal, not the agent's
	terms   []byte // of an answer 402: its body
}

func (e *apiError) Error() string { return e.code + ": " + e.message }

// body returns the error as JSON.
func (e *apiError) body() []byte {
	type detail struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    string  `json:"code"`
	}
	d := detail{Message: e.message, Type: "server_error", Code: e.code}
	switch {
	case e.status == http.StatusTooManyRequests:
		d.Type = "rate_limit_error"
	case e.status == http.StatusPaymentRequired:
		d.Type = "payment_required"
	case e.status < 500:
		d.Type = "invalid_request_error"
	}
	if e.param != "" {
		d.Param = &e.param
	}
	body, err := json.Marshal(struct {
		Error detail `json:"error"`
	}{d})
	if err != nil {
		panic(err) // a struct of strings always encodes
	}
	return body
}

// How long a client is asked to wait, in seconds: for another request to end, and
// for an engine to start again.
const (
	retryBusy        = "1"
	retryUnavailable = "5"
)

var (
	errPath        = &apiError{status: http.StatusNotFound, code: "unknown_path", message: "there is no such path"}
	errMethod      = &apiError{status: http.StatusMethodNotAllowed, code: "method_not_allowed", message: "this path does not take this method"}
	errQuery       = &apiError{status: http.StatusBadRequest, code: "query_not_allowed", message: "this path takes no query"}
	errNonce       = &apiError{status: http.StatusBadRequest, code: "nonce_invalid", param: "nonce", message: "the query must be nonce= and 32 bytes in base64url without padding, and nothing else"}
	errNoBody      = &apiError{status: http.StatusBadRequest, code: "body_not_allowed", message: "this path takes no body"}
	errToken       = &apiError{status: http.StatusUnauthorized, code: "invalid_api_key", message: "this VM answers only clients with a token that its manifest names (Authorization: Bearer TOKEN)"}
	errContentType = &apiError{status: http.StatusUnsupportedMediaType, code: "content_type", message: "the body must be application/json in UTF-8, without a content encoding"}
	errTooLarge    = &apiError{status: http.StatusRequestEntityTooLarge, code: "body_too_large", message: "the body is larger than this VM takes"}
	errSlowBody    = &apiError{status: http.StatusRequestTimeout, code: "body_timeout", message: "the body did not arrive in time"}
	errBrokenBody  = &apiError{status: http.StatusBadRequest, code: "body_malformed", message: "the body is not framed as HTTP/1.1 says"}

	errBusy         = &apiError{status: http.StatusTooManyRequests, code: "busy", message: "all places are taken; try again", retry: retryBusy}
	errMemory       = &apiError{status: http.StatusTooManyRequests, code: "busy", message: "the bodies of other requests take all memory set aside for them; try again", retry: retryBusy}
	errNotReady     = &apiError{status: http.StatusServiceUnavailable, code: "engine_not_ready", message: "the engine is starting; try again", retry: retryUnavailable}
	errEvidenceBusy = &apiError{status: http.StatusTooManyRequests, code: "busy", message: "too many clients wait for evidence; try again", retry: retryBusy}
	errEvidence     = &apiError{status: http.StatusServiceUnavailable, code: "evidence_failed", message: "the VM's platform gave no evidence; try again", retry: retryUnavailable}

	errDraining = &apiError{status: http.StatusServiceUnavailable, code: "draining", message: "this VM admits no new requests; ask another one", retry: retryUnavailable}

	errEngineFailed  = &apiError{status: http.StatusBadGateway, code: "engine_failed", message: "the engine broke off"}
	errEngineSilent  = &apiError{status: http.StatusGatewayTimeout, code: "engine_timeout", message: "the engine sent nothing for longer than this VM allows"}
	errTotal         = &apiError{status: http.StatusGatewayTimeout, code: "time_limit", message: "the request took longer than this VM allows"}
	errNotSupported  = &apiError{status: http.StatusNotImplemented, code: "not_supported", message: "this VM's engine or model cannot do this"}
	errAnswerTooLong = &apiError{status: http.StatusBadGateway, code: "answer_too_large", message: "the answer is larger than this VM forwards"}
	errInternal      = &apiError{status: http.StatusInternalServerError, code: "internal", message: "the agent met a bug in itself"}
)

func badRequest(code, param, message string) *apiError {
	return &apiError{status: http.StatusBadRequest, code: code, param: param, message: message}
}
