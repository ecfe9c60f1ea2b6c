// One GGUF file in llama.cpp, through node-llama-cpp: what beside_llama_cpp.py runs.
//
//     node llama_cpp_worker.mjs FOLDER_OF_NODE_MODULES FILE.gguf THREADS CONTEXT_SIZE
//
// It says once what it runs on. Each line that it then reads, {"ids": [...], "num_new": N}, is a prompt. It writes N
// tokens greedily, whatever they are, and answers {"ids", "first_token_seconds", "seconds"}.
import { createInterface } from "node:readline";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, modelPath, threads, contextSize] = process.argv.slice(2);
const entry = join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(entry).href);
const maxThreads = Number(threads);
const llama = await getLlama({ gpu: false, build: "never", maxThreads, logLevel: LlamaLogLevel.error });
const model = await llama.loadModel({ modelPath, gpuLayers: 0 });
const context = await model.createContext({ contextSize: Number(contextSize), threads: maxThreads });
const sequence = context.getSequence();

function say(answer) {
  process.stdout.write(JSON.stringify(answer) + "\n");
}

say({ system: llama.systemInfo, release: llama.llamaCppRelease.release, threads: context.currentThreads });
for await (const line of createInterface({ input: process.stdin })) {
  const { ids, num_new } = JSON.parse(line);
  await sequence.clearHistory(); // or the last prompt's beginning would be read from the cache
  const written = [];
  const start = process.hrtime.bigint();
  let first = start;
  for await (const id of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
    if (written.length === 0) first = process.hrtime.bigint();
    written.push(id);
    if (written.length === num_new) break;
  }
  const seconds = (end) => Number(end - start) / 1e9;
  say({ ids: written, first_token_seconds: seconds(first), seconds: seconds(process.hrtime.bigint()) });
}
