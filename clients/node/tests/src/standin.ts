// A stand-in of DreamNet: 28 modules, made from a seed, that do to each other what DreamNet's do. They keep state, read
// each other synchronously, with arguments and without, test for the presence of methods, write into others in the
// middle of `run` and read that back, return nothing, and change objects after they have returned them.

import { contextKey, NOT_RUN, TOPOLOGY } from "../../dreamnet/dist/topology.js";
import type { SubsystemName } from "dreamnet-modules";

/** The 28 names, in the order of DreamNet's own loop. */
export const NAMES = Object.keys(TOPOLOGY) as SubsystemName[];

/** The modules that DreamNet's loop runs. */
export const LOOP = NAMES.filter((name) => !NOT_RUN.has(name));

// These differ in what they have, which others test for.
const WITHOUT_RUN: readonly string[] = ["NeuralMesh", "AgentWalletManager"];
const WITHOUT_STATUS: readonly string[] = ["AgentWalletManager", "LatentCollaboration"];

/** Numbers from 0 to 1, the same for the same seed: mulberry32. */
function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

interface Point {
  x: number;
  y: number;
}

interface Sample {
  from: string;
  value: number;
  at: Point;
}

/** What all modules have. */
class Base {
  level: number;
  protected readonly next: () => number;
  protected samples: Sample[] = [];
  protected readonly notes = new Map<string, number>();
  protected report: { level: number; runs: number; worst?: number | undefined } = { level: 0, runs: 0 };
  protected runs = 0;

  constructor(
    readonly id: string,
    seed: number,
  ) {
    this.next = random(seed);
    this.level = this.next();
  }

  /** Reads with arguments, and so from state that others have just changed. */
  sample(field: string, point: Point): number {
    const base = Math.sin(point.x * this.level + field.length) * Math.cos(point.y / (1 + this.samples.length));
    return base + (this.notes.get(field) ?? -0);
  }

  /** Returns an object that it keeps and changes later. */
  list(): Sample[] {
    return this.samples;
  }

  /** Returns what the caller goes on with. */
  addSample(sample: Sample): number {
    sample.value += 1e-9; // Its own copy: in one process, the caller's object.
    this.samples.push(sample);
    if (this.samples.length > 12) this.samples.shift();
    this.level = (this.level + sample.value / 3) % 1;
    return this.level;
  }

  /** Returns nothing. */
  remember(key: string, value: number | undefined): void {
    this.notes.set(key, value ?? -0);
    this.report.worst = value;
  }

  /** Throws for some, which callers handle. */
  demand(amount: number): number {
    if (amount > this.level) throw new RangeError(`${this.id} has ${this.level} of ${amount}`);
    this.level -= amount / 2;
    return this.level;
  }

  async forecast(steps: number): Promise<number[]> {
    await null;
    return Array.from({ length: steps }, (_, i) => this.level ** (i + 1));
  }

  state() {
    return {
      level: this.level,
      runs: this.runs,
      samples: this.samples,
      notes: [...this.notes].sort(([a], [b]) => (a < b ? -1 : 1)),
      report: this.report,
      zero: -0 * this.level,
    };
  }
}

type Other = Partial<Base> & Record<string, any>;

/** A module that is run. `row` decides what else it has and does. */
class Stateful extends Base {
  protected citadel: unknown;

  constructor(
    id: string,
    seed: number,
    private readonly row: number,
  ) {
    super(id, seed);
    // Some have no `sample`, some no `addSample`: others test for these.
    if (row % 5 === 3) Object.defineProperty(this, "sample", { value: undefined });
    if (row % 7 === 2) Object.defineProperty(this, "addSample", { value: undefined });
  }

  /** One of the others calls it. */
  pulse(other: Other | undefined, depth = 0): string {
    this.level = (this.level * 31 + depth / 7) % 1;
    // A module that was passed on is used like one of one's own.
    if (other && typeof other.remember === "function") other.remember(`pulse of ${this.id}`, this.level);
    return `${this.id}:${this.level}`;
  }

  work(context: Record<string, Other>): object | undefined {
    this.runs += 1;
    const { citadelSnapshot, ...others } = context;
    if (citadelSnapshot) this.citadel = JSON.stringify(citadelSnapshot);
    for (const key of Object.keys(others).sort()) {
      const other = others[key]!;
      const at = { x: this.next(), y: this.next() * 10 };
      if (other.sample) this.level = (this.level + Math.abs(other.sample(key, at))) % 1;
      if ("status" in other && typeof other.status === "function") {
        const { level, samples } = other.status() as { level: number; samples: Sample[] };
        this.level = (this.level + level / 5 + samples.length / 64) % 1;
      }
      if (typeof other.addSample === "function") {
        const sample = { from: this.id, value: this.level, at };
        const after = other.addSample(sample);
        // It reads back what it has just written.
        const last = other.list!().at(-1)!;
        this.notes.set(`wrote ${key}`, after + last.at.x + (other.level ?? 0));
      }
      other.remember?.(this.id, this.runs % 2 ? this.level : undefined);
      try {
        this.level = (this.level + (other.demand?.(this.next()) ?? 0)) % 1;
      } catch (error) {
        if (!(error instanceof RangeError)) throw error;
        this.notes.set("refused", error.message.length);
      }
      if (typeof other.pulse === "function") this.notes.set("pulse", other.pulse(this as Other, this.runs).length);
      try {
        other.noSuchMethod();
      } catch (error) {
        if (!(error instanceof TypeError)) throw error;
      }
    }
    this.report.level = this.level;
    this.report.runs = this.runs;
    const returned = this.report;
    // It is changed again when the next one calls `remember`. Some return nothing.
    return this.row % 4 === 1 ? undefined : returned;
  }

  async workLater(context: Record<string, Other>): Promise<object | undefined> {
    for (let turn = 0; turn < this.row % 3; turn++) await new Promise((resolve) => setImmediate(resolve));
    const returned = this.work(context);
    const { neuralMesh } = context;
    for (const value of (await neuralMesh?.forecast?.(3)) ?? []) this.level = (this.level + value) % 1;
    await Promise.resolve();
    neuralMesh?.remember?.(`later ${this.id}`, this.level);
    return returned;
  }
}

/** The module of this name, which is the same for the same seed. `order` records the names that run. */
export function standIn(name: SubsystemName, seed: number, order: string[] = []): Base & { run?: any; status?: any } {
  const row = NAMES.indexOf(name);
  const module: Stateful & { run?: any; status?: any } = new Stateful(name, seed * 1000 + row, row);
  if (!WITHOUT_STATUS.includes(name)) module.status = module.state;
  if (!WITHOUT_RUN.includes(name)) {
    const isAsync = row % 2 === 0;
    module.run = (context: Record<string, Other>) => {
      order.push(name);
      return isAsync ? module.workLater(context) : module.work(context);
    };
  }
  return module;
}

/** A cycle as in DreamNet's own loop: in one process, one after another, each with its part of the context. */
export async function original(modules: Readonly<Record<string, ReturnType<typeof standIn>>>): Promise<void> {
  let citadelSnapshot: unknown;
  for (const name of LOOP) {
    const { after, reads } = TOPOLOGY[name];
    const inputs = [...after, ...reads].map((input) => [
      contextKey(input),
      input === "CitadelCore" ? citadelSnapshot : modules[input],
    ]);
    const returned = await modules[name]!.run(Object.fromEntries(inputs));
    if (name === "CitadelCore") citadelSnapshot = returned && structuredClone(returned);
  }
}
