// Names what an image shows, with the classifier of the folder.
import { fetched, open } from "./session.js";

const ONE = 1 << 22; // of a weight of resizing, as in Pillow, so that both make the same pixels

export class Model {
  constructor({ ort, session, manifest }, labels) {
    Object.assign(this, { ort, session, manifest, labels });
  }

  static async open(folder, ort, graph) {
    const opened = await open(folder, ort, graph);
    const text = "labels.txt" in opened.manifest.files ? await (await fetched(new URL("labels.txt", folder))).text() : "";
    return new Model(opened, text.split("\n"));
  }

  /** The likeliest classes of an ImageData (or {data, width, height}, RGBA), best first. */
  async classify(image, top = 5) {
    const spec = this.manifest.image;
    const [rows, columns] = spec.size;
    const shape = spec.layout === "NCHW" ? [1, 3, rows, columns] : [1, rows, columns, 3];
    const { logits } = await this.session.run({ images: new this.ort.Tensor("float32", prepare(image, spec), shape) }, ["logits"]);
    const values = Array.from(logits.data);
    const most = Math.max(...values);
    const shares = values.map((value) => Math.exp(value - most));
    const total = shares.reduce((a, b) => a + b);
    const order = values.map((_, i) => i).sort((a, b) => values[b] - values[a] || a - b);
    return order.slice(0, top).map((i) => ({ index: i, label: this.labels[i] || String(i), probability: shares[i] / total }));
  }
}

/** The input of the model: the image resized, cropped in the middle, and scaled. */
export function prepare({ data, width, height }, spec) {
  const [rows, columns] = spec.size;
  const share = spec.resize === null ? null : spec.resize / Math.min(width, height);
  const [high, wide] = share === null ? [rows, columns] : [Math.max(rows, even(height * share)), Math.max(columns, even(width * share))];
  const across = weights(width, wide, spec.interpolation);
  const down = weights(height, high, spec.interpolation);
  const narrow = new Float64Array(height * wide * 3); // one axis after the other, in whole numbers between them
  for (let y = 0; y < height; y++)
    for (let x = 0; x < wide; x++)
      for (let c = 0; c < 3; c++) narrow[(y * wide + x) * 3 + c] = mixed(across[x], (i) => data[(y * width + i) * 4 + c]);
  const [top, left] = [Math.floor((high - rows) / 2), Math.floor((wide - columns) / 2)];
  const out = new Float32Array(rows * columns * 3);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < columns; x++)
      for (let c = 0; c < 3; c++) {
        const pixel = mixed(down[y + top], (i) => narrow[(i * wide + x + left) * 3 + c]);
        out[spec.layout === "NCHW" ? (c * rows + y) * columns + x : (y * columns + x) * 3 + c] = (pixel - spec.mean[c]) / spec.std[c];
      }
  return out;
}

/** Per new pixel of an axis the old ones that it is made of, [first, weights]: stretched when the image shrinks, against aliasing. */
function weights(old, size, kind) {
  const scale = old / size;
  const reach = Math.max(scale, 1);
  const found = [];
  for (let i = 0, place = scale / 2; i < size; i++, place += scale) {
    if (kind === "nearest" || old === size) {
      found.push([Math.floor(place), [ONE]]);
      continue;
    }
    const centre = (i + 0.5) * scale;
    const radius = (kind === "bilinear" ? 1 : 2) * reach;
    const first = Math.max(0, Math.floor(centre - radius));
    const last = Math.min(old, Math.ceil(centre + radius));
    const line = [];
    for (let j = first; j < last; j++) line.push(filter(Math.abs(j + 0.5 - centre) / reach, kind));
    const total = line.reduce((a, b) => a + b);
    found.push([first, line.map((w) => (w / total) * ONE).map((w) => Math.trunc(w + (w < 0 ? -0.5 : 0.5)))]);
  }
  return found;
}

function filter(x, kind) {
  if (kind === "bilinear") return Math.max(1 - x, 0);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0; // Keys' cubic with a = -1/2
}

function mixed([first, line], pixel) {
  let sum = 0;
  for (let i = 0; i < line.length; i++) sum += line[i] * pixel(first + i);
  return Math.min(255, Math.max(0, Math.floor((sum + ONE / 2) / ONE)));
}

/** Rounded as Python does it: halves to even. */
function even(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}
