// What a program does with openai-node; run by test_others.py with the name of the package (two major
// versions of it). It waits on its standard input before it asks for a model that has no worker yet. With
// the argument `real` it only asks and prints the answers.

import assert from "node:assert/strict";
import { once } from "node:events";
import { z } from "zod";

const [name, real] = process.argv.slice(2);
const { default: OpenAI, NotFoundError } = await import(name);
const { zodResponseFormat, zodTextFormat, zodFunction } = await import(`${name}/helpers/zod`);
const { VERSION } = await import(`${name}/version`);

const model = process.env.CHAT_MODEL;
const asked = (content) => [{ role: "user", content }];
const Person = z.object({ name: z.string(), age: z.int() });
const client = new OpenAI({ maxRetries: 0 });

async function invoke() {
  const answer = await client.chat.completions.create({ model, messages: asked("!tokens 5") });
  assert.equal(answer.usage.completion_tokens, 5);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.match(answer._request_id, /^req_/);
  return answer.choices[0].message.content;
}

async function stream() {
  const chunks = await client.chat.completions.create({
    model, messages: asked("!tokens 5"), stream: true, stream_options: { include_usage: true },
  });
  let text = "", usage;
  for await (const chunk of chunks) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage;
  }
  assert.equal(usage.completion_tokens, 5);
  return text;
}

async function responses() {
  const whole = await client.responses.create({ model, input: "!tokens 5" });
  assert.equal(whole.usage.output_tokens, 5);
  const pieces = client.responses.stream({ model, input: "!tokens 5" });
  let text = "";
  for await (const event of pieces) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole.output_text);
  assert.equal((await pieces.finalResponse()).output_text, text);
  return text;
}

async function batch() {
  const counts = Array.from({ length: 20 }, (_, at) => at + 1);
  const answers = await Promise.all(counts.map((count) =>
    client.chat.completions.create({ model, messages: asked(`!tokens ${count}`) })));
  assert.deepEqual(answers.map((answer) => answer.usage.completion_tokens), counts);
}

async function embed() {
  // The client asks for base64 by itself; both ways say the same.
  const input = ["a train", "rails"], about = { model: process.env.EMBEDDING_MODEL, input };
  const vectors = async (options) =>
    (await client.embeddings.create({ ...about, ...options })).data.map((one) => one.embedding);
  const found = await vectors({});
  assert.deepEqual(found.map((one) => one.length), [8, 8]);
  assert.deepEqual(await vectors({ encoding_format: "float" }), found);
}

async function tools() {
  const question = asked("What is the weather in 'Kyoto 京都'?");
  const cities = [];
  const weather = zodFunction({
    name: "get_weather",
    parameters: z.object({ city: z.string() }),
    function: ({ city }) => { cities.push(city); return "It rains."; },
  });
  const whole = client.chat.completions.runTools({ model, messages: question, tools: [weather] });
  assert.ok(await whole.finalContent());
  const streamed = client.chat.completions.runTools({
    model, messages: question, tools: [weather], stream: true,
  });
  assert.ok(await streamed.finalContent());
  assert.deepEqual(cities, ["Kyoto 京都", "Kyoto 京都"]);
}

async function structured() {
  const about = "This is 'Ada'; she is 36 years old.";
  const chat = await client.chat.completions.parse({
    model, messages: asked(about), response_format: zodResponseFormat(Person, "person"),
  });
  const response = await client.responses.parse({
    model, input: about, text: { format: zodTextFormat(Person, "person") },
  });
  for (const made of [chat.choices[0].message.parsed, response.output_parsed]) {
    assert.deepEqual(made, { name: "Ada", age: 36 });
  }
}

async function refused() {
  await assert.rejects(
    client.chat.completions.create({ model: "nowhere", messages: asked("Hello") }),
    (error) => error instanceof NotFoundError && error.code === "model_not_found"
      && /^req_/.test(error.requestID),
  );
}

// 503 at first; the client comes back by itself until a worker is there.
async function retried() {
  const patient = new OpenAI({ maxRetries: 10 });
  const answer = await patient.chat.completions.create({
    model: process.env.LATER_MODEL, messages: asked("!tokens 3"),
  });
  assert.equal(answer.usage.completion_tokens, 3);
}

if (real) {
  const question = { model, messages: asked("What is the capital of Japan?"), temperature: 0, max_tokens: 40 };
  console.log((await client.chat.completions.create(question)).choices[0].message.content);
  const pieces = client.chat.completions.stream(question);
  console.log(await pieces.finalContent());
  const vectors = await client.embeddings.create({ model: process.env.EMBEDDING_MODEL, input: "king" });
  console.log(vectors.data[0].embedding.length);
} else {
  const text = await invoke();
  assert.equal(await stream(), text);
  assert.equal(await responses(), text);
  await batch();
  await embed();
  await tools();
  await structured();
  await refused();
  assert.ok((await Array.fromAsync(client.models.list())).some((one) => one.id === model));
  console.log(VERSION);
  await once(process.stdin, "data");
  await retried();
}
process.exit();
