// Handwritten digits in JavaScript: the model of digits_numpy.py, with Adam on a stepwire server.
//
//     python examples/export_digits.py digits.json
//     cd examples/javascript && npm install
//     node digits.mjs localhost:50051 ../../digits.json [--cut STEP]
//
// --cut breaks the stream off twice, before the commit of the step and after the commit of the next one. The client
// attaches again and goes on; the parameters at the end are those of an undisturbed training, to the bit.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { parseArgs } from "node:util";
import { Session } from "./session.mjs";

const GREYS = 16;
const CHUNK_ELEMENTS = 1024; // small, so that gradients and replies have several chunks

/** A network with one hidden layer, softmax cross-entropy, and gradients by hand; parameters and gradients are flat. */
class Model {
  constructor(tensors) {
    [this.inputs, this.hidden] = tensors[0].shape;
    this.outputs = tensors[3].shape[0];
    this.parameters = Float32Array.from(tensors.flatMap((tensor) => tensor.values));
  }

  /** The four tensors as views of a flat array: w1, b1, w2, b2. */
  views(flat) {
    const counts = [this.inputs * this.hidden, this.hidden, this.hidden * this.outputs, this.outputs];
    let start = 0;
    return counts.map((count) => flat.subarray(start, (start += count)));
  }

  /** Return the activations of the hidden layer and the logits of one image. */
  forward(image) {
    const [w1, b1, w2, b2] = this.views(this.parameters);
    const active = affine(image, w1, b1).map((value) => Math.max(value, 0));
    return { active, logits: affine(active, w2, b2) };
  }

  /** Return the mean loss of some images, and its gradient. */
  lossAndGradient(images, digits, chosen) {
    const sums = new Float64Array(this.parameters.length);
    const [dw1, db1, dw2, db2] = this.views(sums);
    const [, , w2] = this.views(this.parameters);
    let loss = 0;
    for (const index of chosen) {
      const { active, logits } = this.forward(images[index]);
      const largest = Math.max(...logits);
      const sum = logits.reduce((total, logit) => total + Math.exp(logit - largest), 0);
      loss -= logits[digits[index]] - largest - Math.log(sum);
      const errors = logits.map((logit, k) => Math.exp(logit - largest) / sum - (k === digits[index]));
      const back = active.map((value, j) => (value > 0 ? dot(w2, j * this.outputs, errors) : 0));
      accumulate(dw2, db2, active, errors);
      accumulate(dw1, db1, images[index], back);
    }
    return { loss: loss / chosen.length, gradient: Float32Array.from(sums, (value) => value / chosen.length) };
  }

  /** Return the fraction of images that are classified right. */
  accuracy({ images, digits }) {
    const right = images.filter((image, index) => {
      const { logits } = this.forward(image);
      return logits.indexOf(Math.max(...logits)) === digits[index];
    });
    return right.length / images.length;
  }
}

/** Return x · weights + bias for a row-major matrix of weights. */
function affine(x, weights, bias) {
  const sums = Float64Array.from(bias);
  x.forEach((value, i) => {
    if (value !== 0) for (let j = 0; j < sums.length; j++) sums[j] += value * weights[i * sums.length + j];
  });
  return sums;
}

function dot(matrix, start, vector) {
  return vector.reduce((sum, value, k) => sum + value * matrix[start + k], 0);
}

/** Add the gradient of one image: the outer product of inputs and errors, and the errors themselves. */
function accumulate(weights, bias, inputs, errors) {
  inputs.forEach((value, i) => {
    if (value !== 0) errors.forEach((error, j) => (weights[i * errors.length + j] += value * error));
  });
  errors.forEach((error, j) => (bias[j] += error));
}

function readData(path) {
  const data = JSON.parse(readFileSync(path, "utf8"));
  const scaled = ({ greys, digits }) => ({
    images: greys.map((image) => Float64Array.from(image, (grey) => grey / GREYS)),
    digits,
  });
  return { ...data, train: scaled(data.train), test: scaled(data.test) };
}

const { values: options, positionals } = parseArgs({ allowPositionals: true, options: { cut: { type: "string" } } });
if (positionals.length !== 2) {
  console.error("usage: node digits.mjs HOST:PORT digits.json [--cut STEP]");
  process.exit(2);
}
const [target, path] = positionals;
const data = readData(path);
const model = new Model(data.tensors);
const tensors = data.tensors.map(({ name, shape }) => ({ name, shape }));
process.on("uncaughtException", (error) => {
  console.error(`digits: ${error.reason ?? ""}: ${error.message}`);
  process.exit(1);
});
const session = await Session.create(target, tensors, model.parameters, {
  lr: data.lr,
  label: "digits in JavaScript",
  chunkElements: CHUNK_ELEMENTS,
});
if (options.cut !== undefined) {
  session.cuts.before.add(Number(options.cut));
  session.cuts.after.add(Number(options.cut) + 1);
}
const losses = [];
let last;
for (const batch of data.batches) {
  const { loss, gradient } = model.lossAndGradient(data.train.images, data.train.digits, batch);
  losses.push(loss);
  last = await session.step(gradient);
  model.parameters = last.parameters;
}
await session.close();
console.log(
  JSON.stringify({
    steps: Number(last.result.step),
    first_loss: losses[0],
    last_loss: losses.at(-1),
    test_accuracy: model.accuracy(data.test),
    attached: session.attached,
    replayed: session.replayed,
    parameters: createHash("sha256").update(Buffer.from(model.parameters.buffer)).digest("hex"),
  }),
);
