// openai for Node: models, chats, streams, structured output, responses.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Name a ship." }];
const short = { model, messages, max_tokens: 5, temperature: 0 };

const answer = await client.chat.completions.create(short);
let text = "";
let usage = null;
const chunks = await client.chat.completions.create({ ...short, stream: true, stream_options: { include_usage: true } });
for await (const chunk of chunks) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, answer.choices[0].message.content);
assert.equal(usage.completion_tokens, answer.usage.completion_tokens);

const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] }, on: { type: "boolean" } },
  required: ["colour", "on"],
  additionalProperties: false,
};
const structured = await client.chat.completions.parse({
  ...short,
  max_tokens: 200,
  response_format: { type: "json_schema", json_schema: { name: "light", strict: true, schema } },
});
assert.equal(typeof JSON.parse(structured.choices[0].message.content).on, "boolean");

const fields = { model, max_output_tokens: 5, temperature: 0 };
const response = await client.responses.create({ ...fields, input: "Name a ship." });
assert.equal(response.output_text, text);
const stream = client.responses.stream({ ...fields, input: "More?", previous_response_id: response.id });
const kinds = [];
for await (const event of stream) kinds.push(event.type);
assert.deepEqual(kinds.slice(0, 2), ["response.created", "response.in_progress"]);
const final = await stream.finalResponse();
assert.ok(final.usage.input_tokens_details.cached_tokens > 0);
await client.responses.delete(response.id);
await assert.rejects(client.responses.retrieve(response.id), OpenAI.NotFoundError);
