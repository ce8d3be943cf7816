// Opens the model of the folder with onnxruntime-web. `ort` is where the files of its `dist` folder are: a folder or an address, ending in "/".

/** {ort, session, manifest}: the runtime, the graph opened by it, and what manifest.json says. `graph` is model.onnx or model.ort. */
export async function open(folder, ort = new URL("ort/", folder), graph = "model.onnx") {
  const manifest = await (await fetched(new URL("manifest.json", folder))).json();
  const runtime = await import(new URL("ort.wasm.min.mjs", ort));
  runtime.env.wasm.wasmPaths = String(ort);
  if (!globalThis.crossOriginIsolated) runtime.env.wasm.numThreads = 1; // threads share memory, which other pages may not get
  const weights = "model.weights" in manifest.files && graph === "model.onnx";
  const session = await runtime.InferenceSession.create(String(new URL(graph, folder)), {
    executionProviders: ["wasm"],
    enableCpuMemArena: !manifest.extra.memory, // a graph scheduled for little memory gives back at once what it no longer needs
    enableMemPattern: !manifest.extra.memory,
    externalData: weights ? [{ path: "model.weights", data: String(new URL("model.weights", folder)) }] : [],
  });
  return { ort: runtime, session, manifest };
}

export async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${answer.statusText}`);
  return answer;
}

/** The page's own words where onnxruntime-web is not there yet. */
export function missing(error) {
  return /import|module/i.test(String(error))
    ? `${error.message}\nonnxruntime-web is not in ort/: copy the files of its dist folder there (npm pack onnxruntime-web), ` +
        "or open this page with ?ort= and their address."
    : String(error.message ?? error);
}
