// Checks options before anything is served or called. An error names the option, its value, and what to give.

import { inspect } from "node:util";
import {
  closest,
  Fleet,
  FLEET_OPTIONS,
  OptionError,
  type DurationText,
  type FleetOptions,
  type RegistrationOptions,
} from "dreamnet-subsystem";
import { TOPOLOGY } from "./topology.js";

/** Options of serving modules: those of a fleet, and those below. */
export interface ServeOptions extends Omit<FleetOptions, "log"> {
  /** Longest wait for an orchestrator that is not up yet: up to 1 h. Default "30s"; "0s" does not wait. */
  wait?: DurationText | undefined;
  /** Names of modules with a `run` that are only read, in addition to `READ_ONLY`. */
  readOnly?: readonly string[] | undefined;
  /** Names in `READ_ONLY` that cycles run nevertheless. */
  run?: readonly string[] | undefined;
  /**
   * Fields of the registration, by name of the subsystem: `timeout`, `critical`, `requires`, `parameters` and so on.
   * Missing fields are taken from DreamNet's table, otherwise the service's default. They have no effect if others
   * register the modules.
   */
  registrations?: Readonly<Record<string, RegistrationOptions>> | undefined;
  /**
   * True to run the modules of one phase one after another, in the order of DreamNet's table and then of `objects`, as
   * DreamNet's own loop does, whichever processes they are in: modules that call each other then end in the same state
   * in every cycle. Modules that are only read have no place in that order, and the order of a registration takes
   * precedence. Otherwise they run concurrently. It is an `after` in the registration. Default true.
   */
  sequential?: boolean | undefined;
  /** Longest time that a call of a method in another process blocks this one: 1 ms to 1 h. Default "5s". */
  callTimeout?: DurationText | undefined;
  /**
   * With TLS, the URIs of the processes whose modules and these call each other; a `*` at the end stands for any rest,
   * as in "spiffe://dreamnet/process/*". Default: none. Without TLS, any process may call.
   */
  peers?: readonly string[] | undefined;
}

/** Options of the familiar calls. The orchestrator is by default at ORCHESTRATOR_ADDRESS, else at 127.0.0.1:7700. */
export type CallOptions = ServeOptions;

/** Options of an interval loop. */
export interface LoopOptions extends CallOptions {
  /** Its name. Default "dreamnet". */
  loop?: string | undefined;
}

// A null is as good as a missing option.
type Given = Readonly<Record<string, unknown>>;

// The compiler reports an option that is missing here.
const OWN: { readonly [K in Exclude<keyof ServeOptions, keyof FleetOptions>]-?: (given: unknown, option: K) => void } =
  {
    wait: duration(0),
    readOnly: names,
    run: names,
    registrations: (given, option) => {
      if (!isObject(given)) refuse(option, given, "an object with registrations, by name");
      for (const [name, item] of Object.entries(given)) {
        if (!isObject(item)) refuse(`${option}.${name}`, item, 'an object, such as { timeout: "30s" }');
      }
    },
    sequential: (given, option) => {
      if (typeof given !== "boolean") refuse(option, given, "true or false");
    },
    callTimeout: duration(1),
    peers: names,
  };
const FLEET = FLEET_OPTIONS.filter((option) => option !== "log");

/** The options of a fleet among these. */
export function fleetOptions(options: ServeOptions): FleetOptions {
  return Object.fromEntries(FLEET.map((option) => [option, options[option] ?? undefined]));
}

/** A duration that has been checked, in milliseconds. */
export function toMs(text: DurationText): number {
  const [, digits, unit] = /^([\d.]+)(ms|s|m|h)$/.exec(text)!;
  return Number(digits) * { ms: 1, s: 1000, m: 60_000, h: 3_600_000 }[unit as "ms" | "s" | "m" | "h"];
}

/** Refuses unknown options and invalid values. */
export function checkOptions(options: ServeOptions, others: readonly string[] = []): void {
  if (!isObject(options)) refuse("options", options, "an object");
  const known = [...FLEET, ...Object.keys(OWN), ...others];
  const unknown = Object.keys(options).find((option) => !known.includes(option));
  if (unknown !== undefined) {
    const close = closest(unknown, known);
    throw new OptionError(
      `${unknown} is not an option: ${close ? `did you mean ${close}?` : `the options are ${known.join(", ")}`}`,
    );
  }
  for (const [option, check] of Object.entries(OWN)) {
    const given = (options as Given)[option] ?? undefined;
    if (given !== undefined) (check as (given: unknown, option: string) => void)(given, option);
  }
  new Fleet(fleetOptions(options));
}

/** As `checkOptions`, for an interval loop. */
export function checkLoop(intervalMs: number, options: LoopOptions): void {
  if (typeof intervalMs !== "number" || !Number.isFinite(intervalMs) || intervalMs <= 0) {
    refuse("intervalMs", intervalMs, "milliseconds, more than 0");
  }
  checkOptions(options, ["loop"]);
  const loop: unknown = options.loop;
  if (loop !== undefined && (typeof loop !== "string" || !loop)) refuse("loop", loop, "the name of the loop");
}

/** The names of the modules in `objects`. */
export function namesOf(objects: unknown): string[] {
  if (!isObject(objects)) return refuse("the first argument", objects, "an object with the modules by name");
  return Object.entries(objects)
    .filter(([, object]) => object !== null && object !== undefined)
    .map(([name]) => name);
}

/** Refuses options with names that are not in `given`, and names that look like a misspelt name of DreamNet. */
export function checkNames(given: readonly string[], options: ServeOptions): void {
  const { readOnly, run, registrations } = options;
  const settings = registrations ?? {};
  for (const name of given) {
    const meant = misspelt(name);
    if (meant && !given.includes(meant) && !Object.hasOwn(settings, name)) {
      const own = `For a module of your own, add it to registrations: { ${JSON.stringify(name)}: {} }`;
      throw new OptionError(`${name} is not a name of DreamNet: did you mean ${meant}? ${own}`);
    }
  }
  const named = { readOnly: readOnly ?? [], run: run ?? [], registrations: Object.keys(settings) };
  for (const [option, names] of Object.entries(named)) {
    const unknown = names.find((name) => !given.includes(name));
    if (unknown === undefined) continue;
    const meant = alike(unknown, given);
    throw new OptionError(
      `${option} names ${unknown}, which is not among the objects${meant ? `: did you mean ${meant}?` : ""}`,
    );
  }
  const both = named.run.find((name) => named.readOnly.includes(name));
  if (both !== undefined) throw new OptionError(`${both} is named in run and in readOnly`);
  for (const [name, { requires = [], after = [], reads = [] }] of Object.entries(settings)) {
    for (const input of [...requires, ...after, ...reads]) {
      const meant = given.includes(input) ? undefined : misspelt(input);
      if (!meant) continue;
      throw new OptionError(
        `registrations.${name} names ${input}, which is not a name of DreamNet: did you mean ${meant}?`,
      );
    }
  }
}

/** The name among DreamNet's 28 that is similar but not equal to `name`. */
const misspelt = (name: string): string | undefined =>
  // A number is intended: another instance.
  Object.hasOwn(TOPOLOGY, name) || /\d/.test(name) ? undefined : alike(name, Object.keys(TOPOLOGY));

/** The name in `known` that is close to `name`, also without "Core" at the end of either. */
function alike(name: string, known: readonly string[]): string | undefined {
  const short = (name: string) => name.replace(/[-_]?core$/i, "");
  const meant = closest(short(name), known.map(short));
  return known.find((other) => short(other) === meant);
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function names(given: unknown, option: string): void {
  if (Array.isArray(given) && given.every((name) => typeof name === "string")) return;
  refuse(option, given, 'an array of names, such as ["FieldLayer"]');
}

function duration(leastMs: number) {
  return (given: unknown, option: string): void => {
    if (typeof given === "string" && /^\d+(\.\d+)?(ms|s|m|h)$/.test(given)) {
      const ms = toMs(given as DurationText);
      if (leastMs <= ms && ms <= 3_600_000) return;
    }
    refuse(option, given, `a duration of ${leastMs} ms to 1 h, such as "30s"`);
  };
}

function refuse(option: string, given: unknown, give: string): never {
  const shown = inspect(given, { depth: 1, breakLength: Number.POSITIVE_INFINITY, maxStringLength: 80 });
  throw new OptionError(`${option} is ${shown.slice(0, 200)}; give ${give}`);
}
