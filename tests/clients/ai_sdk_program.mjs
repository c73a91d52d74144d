// What a program does with the AI SDK and its two providers; run by test_others.py with the name of one:
// `openai` (chat and responses) or `openai-compatible`. It waits on its standard input before it asks for a
// model that has no worker yet. With the argument `real` it only asks and prints the answers.

import assert from "node:assert/strict";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embed, embedMany, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const [name, real] = process.argv.slice(2);
const server = { baseURL: process.env.OPENAI_BASE_URL, apiKey: process.env.OPENAI_API_KEY };
const openai = createOpenAI(server);
const compatible = createOpenAICompatible({
  ...server, name: "roundhouse", includeUsage: true, supportsStructuredOutputs: true,
});
const makers = name === "openai" ? [openai.chat, openai.responses] : [compatible.chatModel];
const embedding = name === "openai"
  ? openai.embedding(process.env.EMBEDDING_MODEL)
  : compatible.embeddingModel(process.env.EMBEDDING_MODEL);
const Person = z.object({ name: z.string(), age: z.int() });

async function invoke(model) {
  const answer = await generateText({ model, prompt: "!tokens 5", maxRetries: 0 });
  assert.equal(answer.usage.outputTokens, 5);
  assert.equal(answer.finishReason, "stop");
  return answer.text;
}

async function stream(model) {
  const pieces = streamText({ model, prompt: "!tokens 5", maxRetries: 0 });
  const text = (await Array.fromAsync(pieces.textStream)).join("");
  assert.equal((await pieces.usage).outputTokens, 5);
  return text;
}

async function batch(model) {
  const counts = Array.from({ length: 20 }, (_, at) => at + 1);
  const answers = await Promise.all(counts.map((count) =>
    generateText({ model, prompt: `!tokens ${count}`, maxRetries: 0 })));
  assert.deepEqual(answers.map((answer) => answer.usage.outputTokens), counts);
}

async function tools(model) {
  const cities = [];
  const getWeather = tool({
    description: "The weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: ({ city }) => { cities.push(city); return "It rains."; },
  });
  const asked = {
    model, prompt: "What is the weather in 'Kyoto 京都'?", tools: { get_weather: getWeather },
    stopWhen: isStepCount(3), maxRetries: 0,
  };
  const whole = await generateText(asked);
  assert.equal(whole.steps.length, 2);
  assert.ok(whole.text);
  const streamed = streamText(asked);
  assert.ok((await Array.fromAsync(streamed.textStream)).join(""));
  assert.deepEqual(cities, ["Kyoto 京都", "Kyoto 京都"]);
}

async function structured(model) {
  const asked = {
    model, prompt: "This is 'Ada'; she is 36 years old.", output: Output.object({ schema: Person }),
    maxRetries: 0,
  };
  assert.deepEqual((await generateText(asked)).output, { name: "Ada", age: 36 });
  assert.deepEqual(await streamText(asked).output, { name: "Ada", age: 36 });
}

async function embeddings() {
  const found = await embedMany({ model: embedding, values: ["a train", "rails"], maxRetries: 0 });
  assert.deepEqual(found.embeddings.map((one) => one.length), [8, 8]);
  const one = await embed({ model: embedding, value: "a train", maxRetries: 0 });
  assert.deepEqual(one.embedding, found.embeddings[0]);
}

async function refused(make) {
  await assert.rejects(
    generateText({ model: make("nowhere"), prompt: "Hello", maxRetries: 0 }),
    (error) => APICallError.isInstance(error) && !error.isRetryable && /does not exist/.test(error.message),
  );
}

// 503 at first; the client comes back by itself until a worker is there.
async function retried(make) {
  const answer = await generateText({
    model: make(process.env.LATER_MODEL), prompt: "!tokens 3", maxRetries: 10,
  });
  assert.equal(answer.usage.outputTokens, 3);
}

if (real) {
  for (const make of makers) {
    const question = {
      model: make(process.env.CHAT_MODEL), prompt: "What is the capital of Japan?",
      temperature: 0, maxOutputTokens: 40, maxRetries: 0,
    };
    console.log((await generateText(question)).text);
    console.log((await Array.fromAsync(streamText(question).textStream)).join(""));
  }
  console.log((await embed({ model: embedding, value: "king", maxRetries: 0 })).embedding.length);
} else {
  for (const make of makers) {
    const model = make(process.env.CHAT_MODEL);
    assert.equal(await invoke(model), await stream(model));
    await batch(model);
    await tools(model);
    await structured(model);
    await refused(make);
  }
  await embeddings();
  console.log(JSON.parse(readFileSync(new URL("node_modules/ai/package.json", import.meta.url))).version);
  await once(process.stdin, "data");
  await retried(makers[0]);
}
process.exit();
