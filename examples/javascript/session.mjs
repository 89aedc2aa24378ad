// A client of stepwire.v1 for one training loop, written from proto/ and docs/protocol.md alone.

import { once } from "node:events";
import { randomUUID } from "node:crypto";
import { endianness } from "node:os";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import protobuf from "protobufjs";

const PROTO = fileURLToPath(new URL("../../proto", import.meta.url));
const FIRST_PAUSE_MS = 50;
const LONGEST_PAUSE_MS = 2000;
const REPEATED = new Set([grpc.status.UNAVAILABLE, grpc.status.CANCELLED]);

// gRPC's own retry is off: a step is repeated by its number.
const CHANNEL = { "grpc.enable_retries": 0, "grpc.use_local_subchannel_pool": 1 };

if (endianness() !== "LE") throw new Error("payloads are little-endian, and this machine is not");

const { stepwire } = grpc.loadPackageDefinition(
  protoLoader.loadSync("stepwire/v1/optimizer_service.proto", {
    includeDirs: [PROTO],
    keepCase: true, // names as in the contract
    longs: String, // tokens have 64 bits, and a number holds 53
    enums: String,
    defaults: true,
    oneofs: true,
  }),
);

/** An error of the server or of gRPC, with the reason that programs compare. */
export class StepwireError extends Error {
  /** @param {grpc.ServiceError} error the error of a call */
  constructor(error) {
    const info = errorInfo(error);
    super(error.details || error.message);
    this.code = error.code;
    this.reason = info?.reason ?? "";
    this.values = info?.metadata ?? {};
  }

  /** True if the same call may be made again. */
  get repeatable() {
    return REPEATED.has(this.code);
  }
}

/** One session, stepped over one attached stream. */
export class Session {
  /** The numbers of steps at which the stream is cut once, for trials: before its commit, or after it. */
  cuts = { before: new Set(), after: new Set() };
  /** The number of times that the stream was attached. */
  attached = 0;
  /** The number of replies that a server gave a second time. */
  replayed = 0;

  #client;
  #stream;
  #replies;

  constructor(client, session, token, { chunkElements, timeoutMs }) {
    this.#client = client;
    this.id = session.session_id;
    this.layout = session.layout;
    this.token = token;
    this.epoch = session.epoch;
    this.load = 0;
    this.appliedStep = 0;
    this.chunkElements = chunkElements;
    this.timeoutMs = timeoutMs;
  }

  /**
   * Create a session with parameters in it.
   *
   * @param {string} target host:port of a server without TLS
   * @param {{name: string, shape: number[]}[]} tensors the tensors, in the order of the flat space
   * @param {Float32Array} parameters their values, one after another
   * @param {{lr: number, label?: string, chunkElements?: number, timeoutMs?: number}} options
   */
  static async create(target, tensors, parameters, { lr, label = "", chunkElements = 1 << 18, timeoutMs = 60_000 }) {
    const client = new stepwire.v1.OptimizerService(target, grpc.credentials.createInsecure(), CHANNEL);
    const config = {
      tensors,
      optimizer: { rule: "RULE_ADAM", hyperparameters: { lr } },
      initialization: "INITIALIZATION_LOAD",
      label,
    };
    const request = { request_id: randomUUID(), config };
    const created = await repeated(timeoutMs, () => unary(client, "CreateSession", request, timeoutMs));
    const session = new Session(client, created.session, created.attach_token, { chunkElements, timeoutMs });
    await session.#upload(parameters);
    return session;
  }

  /**
   * Apply the next step, exactly once, and return the new parameters.
   *
   * @param {Float32Array} gradient in the order of the flat space
   * @returns {Promise<{parameters: Float32Array, result: object}>}
   */
  async step(gradient) {
    const number = this.appliedStep + 1;
    const { parameters, result } = await repeated(this.timeoutMs, () => this.#attempt(number, gradient));
    this.appliedStep = number;
    this.replayed += result.replayed;
    return { parameters, result };
  }

  /** End the session and the connection. */
  async close() {
    this.#stream?.end();
    await unary(this.#client, "DeleteSession", { session_id: this.id, attach_token: this.token }, this.timeoutMs);
    this.#client.close();
  }

  async #attempt(number, gradient) {
    const applied = this.#stream ? this.appliedStep : await this.#attach();
    const limit = setTimeout(() => this.#stream?.cancel(), this.timeoutMs);
    try {
      // A step that was applied, whose reply was lost, is asked for without its gradient.
      await this.#send(number, applied >= number ? null : gradient);
      return await this.#receive();
    } catch (error) {
      this.#stream?.cancel();
      this.#stream = undefined;
      throw error;
    } finally {
      clearTimeout(limit);
    }
  }

  /** Attach a stream, and return the number of the last applied step. */
  async #attach() {
    const stream = this.#client.Attach();
    stream.on("error", () => {}); // told to whoever reads, below
    this.#stream = stream;
    this.#replies = stream[Symbol.asyncIterator]();
    try {
      await this.#write({ open: { session_id: this.id, attach_token: this.token, epoch: this.epoch } });
      const { opened } = await this.#read();
      this.token = opened.attach_token;
      this.attached += 1;
      return Number(opened.applied_step);
    } catch (error) {
      this.#stream = undefined;
      throw error;
    }
  }

  async #send(number, gradient) {
    const reply = { chunk_bytes: 4 * this.chunkElements };
    let head = { begin: { step: number, epoch: this.epoch, load: this.load, reply } };
    const chunks = gradient === null ? [] : [...this.#chunks(gradient)];
    for (const [index, chunk] of chunks.entries()) {
      const last = index === chunks.length - 1;
      if (last && this.cuts.before.delete(number)) this.#stream.cancel();
      await this.#write({ ...head, ...chunk, ...(last ? { commit: {} } : {}) });
      head = {};
    }
    if (chunks.length === 0) await this.#write({ ...head, commit: {} });
    if (this.cuts.after.delete(number)) {
      await this.#read(); // the step is applied: its reply has begun
      this.#stream.cancel();
    }
  }

  /** Read the chunks of a reply up to its result. */
  async #receive() {
    const parameters = new Float32Array(Number(this.layout.size));
    const bytes = new Uint8Array(parameters.buffer);
    for (;;) {
      const message = await this.#read();
      if (message.chunk) bytes.set(message.payload, 4 * Number(message.chunk.offset));
      if (message.result) return { parameters, result: message.result };
    }
  }

  /** Load parameters: load number 1, of the slot `param`. */
  async #upload(parameters) {
    const open = { session_id: this.id, attach_token: this.token, epoch: this.epoch, load: 1, slots: ["param"] };
    await repeated(this.timeoutMs, () => new Promise((resolve, reject) => {
      const deadline = Date.now() + this.timeoutMs;
      const call = this.#client.Load({ deadline }, (error) => (error ? reject(new StepwireError(error)) : resolve()));
      call.write({ open });
      for (const chunk of this.#chunks(parameters)) call.write({ slot: "param", ...chunk });
      call.end({ commit: true });
    }));
    this.load = 1;
  }

  *#chunks(values) {
    for (let offset = 0; offset < values.length; offset += this.chunkElements) {
      const part = values.subarray(offset, offset + this.chunkElements);
      const payload = Buffer.from(part.buffer, part.byteOffset, part.byteLength);
      yield { chunk: { offset, count: part.length }, payload };
    }
  }

  /** Send a message, and wait where gRPC has enough of them already. */
  async #write(message) {
    if (!this.#stream.write(message)) await Promise.race([once(this.#stream, "drain"), once(this.#stream, "close")]);
  }

  async #read() {
    try {
      const { value, done } = await this.#replies.next();
      if (done) throw Object.assign(new Error("the server ended the stream"), { code: grpc.status.UNAVAILABLE });
      return value;
    } catch (error) {
      throw new StepwireError(error);
    }
  }
}

function unary(client, method, request, timeoutMs) {
  return new Promise((resolve, reject) => {
    const answered = (error, response) => (error ? reject(new StepwireError(error)) : resolve(response));
    client[method](request, { deadline: Date.now() + timeoutMs }, answered);
  });
}

/** Repeat a call after a random fraction of a growing pause, until the time is over. */
async function repeated(timeoutMs, call) {
  const end = Date.now() + timeoutMs;
  for (let pause = FIRST_PAUSE_MS; ; pause = Math.min(2 * pause, LONGEST_PAUSE_MS)) {
    try {
      return await call();
    } catch (error) {
      if (!(error instanceof StepwireError && error.repeatable) || Date.now() + pause > end) throw error;
      await new Promise((resume) => setTimeout(resume, Math.random() * pause));
    }
  }
}

const status = new protobuf.Root();
status.resolvePath = (_, path) => (path.startsWith("stepwire/") ? `${PROTO}/${path}` : path);
status.loadSync("stepwire/v1/status.proto");

/** Decode the `ErrorInfo` of an error; undefined for an error that is gRPC's own. */
function errorInfo(error) {
  const [details] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!details) return undefined;
  const found = status.lookupType("stepwire.v1.RichStatus").decode(details).details;
  const info = found.find((any) => any.type_url.endsWith("/google.rpc.ErrorInfo"));
  return info && status.lookupType("stepwire.v1.ErrorInfo").decode(info.value);
}
