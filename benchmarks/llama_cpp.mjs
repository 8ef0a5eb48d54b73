// One llama.cpp, by node-llama-cpp, that does what a line on stdin says and answers in one line of JSON.
// {model, threads, context} loads; {prefix} makes these tokens the cache; {query, tokens} goes on from it and goes back.
import readline from "node:readline";
import { getLlama } from "node-llama-cpp";

let sequence, context, model;
const llama = await getLlama({ gpu: false, build: "never", logLevel: "error" });

async function load({ model: path, threads, context: size }) {
  await context?.dispose();
  model ??= await llama.loadModel({ modelPath: path, gpuLayers: 0 });
  context = await model.createContext({ contextSize: size, threads: { ideal: threads, min: threads }, batchSize: 512 });
  sequence = context.getSequence();
  return {};
}

async function prefix({ prefix: tokens }) {
  await sequence.clearHistory();
  const started = performance.now();
  await sequence.evaluateWithoutGeneratingNewTokens(tokens);
  return { seconds: (performance.now() - started) / 1000 };
}

async function query({ query: tokens, tokens: count }) {
  const before = sequence.nextTokenIndex;
  const started = performance.now();
  let first = 0, made = 0;
  for await (const _ of sequence.evaluate(tokens, { temperature: 0, yieldEogToken: true })) {
    made += 1;
    if (made === 1) first = performance.now();
    if (made === count) break;
  }
  const ended = performance.now();
  await sequence.eraseContextTokenRanges([{ start: before, end: sequence.nextTokenIndex }]);
  return { ttft: (first - started) / 1000, rate: made > 1 ? ((made - 1) * 1000) / (ended - first) : 0, made };
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  const asked = JSON.parse(line);
  const answer = asked.model ? await load(asked) : asked.prefix ? await prefix(asked) : await query(asked);
  console.log(JSON.stringify(answer));
}
process.exit(0);
