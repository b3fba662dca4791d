// The thread of the modules' end of the calls between processes.
//
// A method of a module in another process is called synchronously, as modules call each other in one process: this
// thread waits for the outcome, while the thread of the network makes the call. Meanwhile it carries out the calls that
// come in, so that two processes may call each other at the same time.

import { performance } from "node:perf_hooks";
import { MessageChannel, receiveMessageOnPort, type MessagePort } from "node:worker_threads";
import { describe } from "dreamnet-subsystem";
import type { Call, CallMessage, Described, Description, Outcome } from "./messages.js";
import { Remote } from "./remote.js";
import { decode, decodeThrown, encode, encodeThrown, type Modules } from "./values.js";

/** Increased and notified by a thread of the network when it has sent a message to this thread. */
const signal = new Int32Array(new SharedArrayBuffer(Int32Array.BYTES_PER_ELEMENT));

/** All links of this thread: while one waits, each has to answer. */
const links = new Set<Link>();

const CLOSED = "the modules of this process are no longer served";

// How long this thread waits for the other one, beyond the limit that the other one keeps.
const MARGIN_MS = 5000;

/** The calls between the modules of a thread of the network and those of other processes. */
export class Link implements Modules {
  /** For the thread of the network. */
  readonly port: MessagePort;
  readonly signal = signal;
  private readonly calls: MessagePort;
  private lastId = 0;
  /** What has arrived and was not taken yet: a call can have two, and both while another one is waited for. */
  private readonly outcomes = new Map<number, Array<Outcome | Described>>();
  private readonly promises = new Map<
    number,
    { resolve: (value: unknown) => void; reject: (reason: unknown) => void }
  >();
  private readonly remotes = new Map<string, Remote>();
  private readonly names = new Map<object, string>();
  private isClosed = false;

  constructor(
    private readonly own: ReadonlyMap<string, object>,
    private readonly callTimeoutMs: number,
  ) {
    for (const [name, object] of own) this.names.set(object, name);
    const { port1, port2 } = new MessageChannel();
    this.calls = port1;
    this.port = port2;
    this.calls.on("message", (message: CallMessage) => this.take(message));
    // Modules are served as long as the other thread runs; this port alone keeps no process alive.
    this.calls.unref();
    links.add(this);
  }

  close(): void {
    this.isClosed = true;
    links.delete(this);
    this.calls.close();
    for (const { reject } of this.promises.values()) reject(new Error(CLOSED));
  }

  nameOf(object: object): string | undefined {
    return this.names.get(object);
  }

  named(name: string): unknown {
    const own = this.own.get(name);
    if (own) return own;
    const known = this.remotes.get(name);
    if (known) return known.object;
    const [description] = this.waitFor("describe", { names: [name] }, `the module ${name}`).described;
    return this.standIn(description!);
  }

  /** An object with the methods of a module in another process: the same one as long as these don't change. */
  standIn(description: Description): unknown {
    if (description.copy) return decode(description.copy, this);
    const { name } = description;
    const known = this.remotes.get(name);
    if (known?.isAsIn(description)) return known.object;
    const made = new Remote(description, (member, given) => this.call(name, member, given));
    this.remotes.set(name, made);
    this.names.set(made.object, name);
    return made.object;
  }

  /** Calls a method, or reads a property if there are no arguments. Throws what it throws. */
  private call(module: string, member: string, given?: readonly unknown[]): unknown {
    const what = given ? `${module}.${member}()` : `${module}.${member}`;
    const call: Call = { module, member, arguments: given && encode(given, `${what}: arguments`, this) };
    const { id, outcome } = this.waitFor("call", { call }, what);
    if ("returned" in outcome) return decode(outcome.returned, this);
    if ("threw" in outcome) throw decodeThrown(outcome.threw, this);
    return new Promise((resolve, reject) => {
      this.promises.set(id, { resolve, reject });
      // It can have settled while this thread waited for something else.
      const settled = this.next(id);
      if (settled) this.settle(id, settled as Outcome);
    });
  }

  private waitFor(
    kind: "call",
    question: { call: Call },
    what: string,
  ): { id: number; outcome: Exclude<Outcome, { failed: string }> };
  private waitFor(kind: "describe", question: { names: string[] }, what: string): { described: readonly Description[] };
  private waitFor(kind: "call" | "describe", question: object, what: string): unknown {
    if (this.isClosed) throw new Error(`${what}: ${CLOSED}`);
    const id = ++this.lastId;
    this.calls.postMessage({ kind, id, ...question } as CallMessage);
    const giveUp = performance.now() + this.callTimeoutMs + MARGIN_MS;
    for (;;) {
      const seen = Atomics.load(signal, 0);
      const outcome = this.next(id);
      if (outcome) {
        if ("failed" in outcome) throw new Error(outcome.failed);
        return "described" in outcome ? outcome : { id, outcome };
      }
      if ([...links].some((link) => link.takeNext())) continue;
      const leftMs = giveUp - performance.now();
      if (leftMs <= 0) throw new Error(`${what}: the thread of the network does not answer`);
      Atomics.wait(signal, 0, seen, leftMs);
    }
  }

  /** The next outcome that has arrived, if there is one. */
  private next(id: number): Outcome | Described | undefined {
    const [first, ...others] = this.outcomes.get(id) ?? [];
    if (others.length > 0) this.outcomes.set(id, others);
    else this.outcomes.delete(id);
    return first;
  }

  /** Takes a message without waiting for the event loop. False if there is none. */
  private takeNext(): boolean {
    const received = receiveMessageOnPort(this.calls);
    if (received) this.take(received.message);
    return received !== undefined;
  }

  private take(message: CallMessage): void {
    const { id } = message;
    const answer = (outcome: Outcome | Described) => this.calls.postMessage({ kind: "outcome", id, outcome });
    switch (message.kind) {
      case "call":
        this.carryOut(message.call, answer);
        break;
      case "describe":
        answer(this.describe(message.names));
        break;
      case "outcome":
        if (this.promises.has(id)) this.settle(id, message.outcome as Outcome);
        else this.outcomes.set(id, [...(this.outcomes.get(id) ?? []), message.outcome]);
    }
  }

  private settle(id: number, outcome: Outcome): void {
    const { resolve, reject } = this.promises.get(id)!;
    this.promises.delete(id);
    try {
      if ("returned" in outcome) resolve(decode(outcome.returned, this));
      else if ("threw" in outcome) reject(decodeThrown(outcome.threw, this));
      else reject(new Error("failed" in outcome ? outcome.failed : "it was promised twice"));
    } catch (error) {
      reject(error); // A module in it can't be described.
    }
  }

  // ------------------------------------------------------------------------------------------ calls that come in

  private describe(names: readonly string[]): Described {
    const copy = (value: unknown, place: string) => encode(value, place, this);
    try {
      return { described: names.map((name) => Remote.describe(name, this.own.get(name)!, copy)) };
    } catch (error) {
      return { failed: describe(error) }; // A collection can't be copied.
    }
  }

  private carryOut({ module, member, arguments: given }: Call, answer: (outcome: Outcome) => void): void {
    const what = given ? `the result of ${module}.${member}()` : `${module}.${member}`;
    const returned = (value: unknown) => answer({ returned: encode(value, what, this) });
    const threw = (error: unknown) => answer({ threw: encodeThrown(error, this) });
    try {
      const object = this.own.get(module) as Record<string, any>;
      if (!Remote.isMember(object, member)) throw new TypeError(`${module} has no member ${member}`);
      const result = given ? object[member](...(decode(given, this) as unknown[])) : object[member];
      if (isThenable(result)) {
        answer({ promised: true });
        Promise.resolve(result).then(returned).catch(threw);
      } else {
        returned(result);
      }
    } catch (error) {
      threw(error);
    }
  }
}

/** True for a promise, and for anything that can be awaited as one. */
export function isThenable(value: unknown): value is PromiseLike<unknown> {
  try {
    return typeof (value as { then?: unknown } | null | undefined)?.then === "function";
  } catch {
    // It can't be read: the copy, which is made next, reports that.
    return false;
  }
}
