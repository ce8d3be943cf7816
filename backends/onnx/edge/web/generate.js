// Greedy decoding with the language model of the folder; token ids in and out.
import { open } from "./session.js";

const ARRAYS = { float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array };

export class Model {
  constructor({ ort, session, manifest }) {
    Object.assign(this, { ort, session, manifest });
  }

  static async open(folder, ort, graph) {
    return new Model(await open(folder, ort, graph));
  }

  /** The likeliest tokens behind `prompt`, one a pass, at most `count`. */
  async *greedy(prompt, count) {
    const { ort, session, manifest } = this;
    const { capacity, vocab_size: known } = manifest.signature;
    if (!prompt.length || prompt.length + count > capacity || prompt.some((id) => !(Number.isInteger(id) && id >= 0 && id < known)))
      throw new Error(`ids must be 0 to ${known - 1}, and prompt and answer together 1 to ${capacity} tokens`);
    const slots = prompt.length + count + 1; // a pass of one row may use a spare slot behind its own
    const whole = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
    const past = {};
    for (const { name, type, shape } of session.inputMetadata.filter(({ name }) => name.startsWith("past."))) {
      const full = [1, shape[1], slots, shape[3]];
      past[name] = new ort.Tensor(type, new ARRAYS[type](full.reduce((a, b) => a * b)), full);
    }
    for (let rows = prompt, done = 0, made = 0; made < count; made++) {
      const feeds = {
        input_ids: whole(rows, [1, rows.length]),
        position_ids: whole(rows.map((_, i) => done + i), [1, rows.length]),
        lengths: whole([done], [1]),
        logits_from: whole([rows.length - 1], [1]),
      };
      const read = Object.fromEntries(Object.entries(feeds).filter(([name]) => session.inputNames.includes(name)));
      const outputs = await session.run({ ...read, ...past }, ["argmax", ...session.outputNames.filter((name) => name.startsWith("present."))]);
      const ids = outputs.argmax.data;
      const token = Number(ids[ids.length - 1]);
      for (const name in past) past[name] = outputs[name.replace("past.", "present.")];
      done += rows.length;
      rows = [token];
      yield token;
      if (manifest.eos_ids.includes(token)) return;
    }
  }
}
