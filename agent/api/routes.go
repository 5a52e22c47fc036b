package api

import (
	"net/http"

	"chrysalis/attest/evidence"
)

// A route is one path that clients can ask for, with the one method that it
// takes. What is not in the table does not exist: the engine has many more paths
// (slots, properties, saved states, raw metrics), which show or change what other
// clients do.
type route struct {
	method  string
	path    string
	fields  []field // of the request's body; nil if the agent answers by itself
	query   bool    // it takes a query
	open    bool    // it takes no token
	gpus    bool    // it is there in a VM with GPUs only
	payment bool    // it is there in a VM that is paid only
}

// A field is a top-level field that a request may have. The engine's own ones
// (slot selection, samplers, grammars, adapters, its prompt cache) are left out on
// purpose: some reach into other clients' requests, and for the rest nobody has
// shown that they do not.
type field struct {
	name     string
	engine   string // the engine's name for it; "" if the engine does not need it
	check    check
	required bool
}

var routes = []route{
	{method: http.MethodGet, path: evidence.Path, query: true, open: true},
	{method: http.MethodGet, path: evidence.GPUCollateralPath, gpus: true, open: true},
	{method: http.MethodGet, path: paymentPath, payment: true},
	{method: http.MethodPost, path: paymentPath, payment: true},
	{method: http.MethodGet, path: "/v1/models"},
	{method: http.MethodPost, path: "/v1/chat/completions", fields: append([]field{
		{name: "messages", engine: "messages", check: listOf(1, 4096, message), required: true},
		{name: "max_completion_tokens", engine: "max_tokens", check: integer(1, 1<<31-1)},
		{name: "logprobs", engine: "logprobs", check: boolean},
		{name: "top_logprobs", engine: "top_logprobs", check: integer(0, 20)},
		{name: "response_format", engine: "response_format", check: responseFormat},
		{name: "tools", engine: "tools", check: tools},
		{name: "tool_choice", engine: "tool_choice", check: toolChoice},
		{name: "parallel_tool_calls", engine: "parallel_tool_calls", check: boolean},
	}, generation...)},
	{method: http.MethodPost, path: "/v1/completions", fields: append([]field{
		// One prompt: each further one would be a request of its own in the engine,
		// past the limit on how many there are at a time.
		{name: "prompt", engine: "prompt", check: either(isArray, listOf(1, 1, text(0)), text(0)), required: true},
		{name: "logprobs", engine: "logprobs", check: integer(0, 5)},
		{name: "best_of", engine: "", check: integer(1, 1)},
	}, generation...)},
	{method: http.MethodPost, path: "/v1/embeddings", fields: []field{
		{name: "model", engine: "model", check: text(maxModel), required: true},
		{name: "input", engine: "input", check: either(isArray, listOf(1, 2048, text(0)), text(0)), required: true},
		{name: "encoding_format", engine: "encoding_format", check: oneOf("float", "base64")},
		{name: "user", engine: "", check: text(maxKey)},
	}},
}

// generation are the fields that both kinds of completion have.
var generation = []field{
	{name: "model", engine: "model", check: text(maxModel), required: true},
	{name: "stream", engine: "stream", check: boolean},
	{name: "stream_options", engine: "stream_options", check: object(nil, map[string]check{"include_usage": boolean})},
	{name: "max_tokens", engine: "max_tokens", check: integer(1, 1<<31-1)},
	{name: "temperature", engine: "temperature", check: number(0, 2)},
	{name: "top_p", engine: "top_p", check: number(0, 1)},
	{name: "frequency_penalty", engine: "frequency_penalty", check: number(-2, 2)},
	{name: "presence_penalty", engine: "presence_penalty", check: number(-2, 2)},
	{name: "seed", engine: "seed", check: integer(-1<<53+1, 1<<53-1)},
	{name: "stop", engine: "stop", check: either(isArray, listOf(0, 16, text(1024)), text(1024))},
	{name: "logit_bias", engine: "logit_bias", check: logitBias},
	// More answers than one multiply a request's cost past the limit on how many
	// requests there are at a time.
	{name: "n", engine: "", check: integer(1, 1)},
	// Says who the client's own user is: the engine has no use for it.
	{name: "user", engine: "", check: text(maxKey)},
}

// constants end every body that the engine is sent. Without this one the engine
// keeps a prompt for the next request that begins alike, and the next client can
// tell by the time to its first token.
const constants = `,"cache_prompt":false}`

var message = object([]string{"role"}, map[string]check{
	"role": oneOf("system", "developer", "user", "assistant", "tool"),
	// Text only. Images and files are given as addresses, and there is no network
	// to fetch them from.
	"content": nullOr(either(isArray, listOf(1, 1024, object([]string{"type", "text"}, map[string]check{
		"type": oneOf("text"),
		"text": text(0),
	})), text(0))),
	"name":              text(maxKey),
	"tool_calls":        nullOr(listOf(1, 128, schemaOf(isObject, "must be an object"))),
	"tool_call_id":      text(maxKey),
	"refusal":           nullOr(text(0)),
	"reasoning_content": nullOr(text(0)),
})

var responseFormat = object([]string{"type"}, map[string]check{
	"type":        oneOf("text", "json_object", "json_schema"),
	"json_schema": schemaOf(isObject, "must be an object"),
})

func tools(raw []byte) error {
	if err := schema(raw); err != nil {
		return err
	}
	return listOf(0, 128, object([]string{"type", "function"}, map[string]check{
		"type":     oneOf("function"),
		"function": schemaOf(isObject, "must be an object"),
	}))(raw)
}

var toolChoice = either(isString, oneOf("none", "auto", "required"),
	object([]string{"type", "function"}, map[string]check{
		"type":     oneOf("function"),
		"function": object([]string{"name"}, map[string]check{"name": text(maxKey)}),
	}))
