// An application that knows nothing of Chrysalis: OpenAI's own client, with
// another base URL. It lists models, completes, streams, and cancels.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });

const models = [];
for await (const model of client.models.list()) models.push(model.id);
assert.deepEqual(models, ["chrysalis/demo@1"]);

const ask = { model: models[0], temperature: 0, max_tokens: 96,
  messages: [{ role: "user", content: "Who can read my prompt?" }] };
const whole = await client.chat.completions.create(ask);
assert.match(whole.choices[0].message.content, /prompt/);
assert.equal(whole.choices[0].finish_reason, "stop");
assert.ok(whole.usage.completion_tokens > 0);

let streamed = "", events = 0;
const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
for await (const event of stream) {
  streamed += event.choices[0]?.delta?.content ?? "";
  events++;
}
assert.equal(streamed, whole.choices[0].message.content);
assert.ok(events > 5);

const tools = [{ type: "function", function: { name: "look_up", description: "Looks a word up",
  parameters: { type: "object", properties: { word: { type: "string" } }, required: ["word"] } } }];
const offered = await client.chat.completions.create({ ...ask, max_tokens: 16, tools });
assert.ok(offered.choices[0].message.content || offered.choices[0].message.tool_calls);

const plain = await client.completions.create({ model: models[0], prompt: "Chrysalis", max_tokens: 8 });
assert.ok(plain.choices[0].text.length > 0);

await assert.rejects(client.chat.completions.create({ ...ask, model: "gpt-4" }), OpenAI.NotFoundError);
console.log(`${models.length} model, ${events} events: ${streamed}`);
