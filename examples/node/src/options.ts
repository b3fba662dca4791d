// Checks options before anything is served or called. An error names the option, its value, and valid values.

import { inspect } from "node:util";
import { distance } from "fastest-levenshtein";
import type { Struct } from "./gen/google/protobuf/Struct.js";
import { snapshot } from "./json.js";
import { TOPOLOGY, type Settings } from "./topology.js";

/** Options of serving modules. */
export interface ServeOptions {
  /** Address to listen on, "HOST:PORT". Port 0 takes a free one. Default "127.0.0.1:0". */
  listen?: string;
  /**
   * Registers with the orchestrator at this "HOST", "HOST:PORT" or "http://HOST:PORT" (with `credentials`, "https://").
   * Without it, the configuration file of the orchestrator has to declare the modules.
   */
  orchestrator?: string;
  /**
   * Directory with cert.pem, key.pem and ca.pem, as `orchestrator certs issue` makes it: serves and calls over TLS.
   * Without it there is no TLS.
   */
  credentials?: string;
  /** With `credentials`, the URI of the only client that may call: the orchestrator. Default "spiffe://fleet/core". */
  caller?: string;
  /** Longest wait for an orchestrator that is not up yet. Default 30 s; 0 does not wait. */
  waitSeconds?: number;
  /** Length of the lease, which is renewed three times as often. Default 30 s. */
  leaseSeconds?: number;
  /** The endpoint to register. Default "http://" (with `credentials`, "https://") and the address it listens on. */
  endpoint?: string;
  /** Names of modules with a `run` that are only read, in addition to `READ_ONLY`. */
  readOnly?: readonly string[];
  /** Names in `READ_ONLY` that cycles run nevertheless. */
  run?: readonly string[];
  /**
   * Fields of the registration, by name of the subsystem: `timeout`, `critical`, `requires`, `parameters` and so on.
   * Missing fields are taken from DreamNet's table, otherwise the service's default. Only with `orchestrator`.
   */
  registrations?: Readonly<Record<string, Settings>>;
  /**
   * True to run the modules of one phase one after another, in the order of DreamNet's table and then of `objects`, as
   * DreamNet's own loop does: live objects that call each other then end in the same state in every cycle. Modules that
   * are only read have no place in that order, and the order of a registration takes precedence. Otherwise they run
   * concurrently. Only with `orchestrator`: it is an `after` in the registration. Default true.
   */
  sequential?: boolean;
}

/** The default port of an orchestrator. */
const PORT = 7700;

/**
 * Parses the address of an orchestrator: "HOST", "HOST:PORT" or "http://HOST:PORT", as its command line does. With
 * `credentials` it is "https://HOST:PORT".
 *
 * @returns "HOST:PORT"
 * @throws an error that names valid values; `option` is the name of the option
 */
export function orchestratorAddress(value: unknown, option = "orchestrator", credentials?: string): string {
  const [own, ownPort] = credentials === undefined ? ["http", 80] : ["https", 443];
  const takes = `HOST, HOST:PORT or ${own}://HOST:PORT`;
  if (typeof value !== "string") return refuse(option, value, takes);
  const [, scheme, rest] = /^(?:(\w+):\/\/)?(.*?)\/?$/s.exec(value.trim())!;
  if (scheme === "https" && own === "http") return refuse(option, value, `${takes}: TLS needs the option credentials`);
  const address = scheme === undefined || scheme === own ? hostAndPort(rest!) : undefined;
  if (!address || (scheme && !address.host)) return refuse(option, value, takes);
  return `${address.host ?? "127.0.0.1"}:${address.port ?? (scheme ? ownPort : PORT)}`;
}

function hostAndPort(text: string): { host?: string; port?: number } | undefined {
  const [, host, port] = /^(\[[\da-f:.]+\]|[\w.-]+)?(?::(\d{1,5}))?$/i.exec(text) ?? [];
  if ((host ?? port) === undefined || Number(port ?? 0) > 65_535) return undefined;
  return { ...(host && { host }), ...(port && { port: Number(port) }) };
}

// -------------------------------------------------------------------------------------------- options

/** Throws an error with the valid values unless `value` is valid. `at` is the name of the option. */
type Check = (value: unknown, at: string) => unknown;

// The compiler reports options, or fields of the contract, that are missing here.
type Checks<T> = { readonly [K in keyof Required<T>]: Check };
type In<K extends keyof Settings> = Checks<NonNullable<Settings[K]>>;

const RETRY: In<"retry"> = {
  maxAttempts: whole(0),
  initialBackoff: duration,
  maxBackoff: duration,
  backoffMultiplier: number("a number", Number.isFinite),
  retryableStatusCodes: names,
};
const BREAKER: In<"breaker"> = { failureThreshold: whole(0), openFor: duration, disabled: flag };
const LIMITS: In<"limits"> = {
  maxMessageBytes: whole(0),
  maxOutputBytes: whole(0),
  maxMetrics: whole(0),
  maxIssues: whole(0),
};
const TLS: In<"tls"> = { peer: text('an identity, such as "cert:modules.example"') };
const REGISTRATION: Checks<Settings> = {
  phase: whole(-(2 ** 31)),
  requires: names,
  after: names,
  reads: names,
  timeout: duration,
  retry: fields(RETRY, "a field of a retry policy"),
  breaker: fields(BREAKER, "a field of a breaker policy"),
  critical: flag,
  parameters: parametersOf,
  limits: fields(LIMITS, "a field of limits"),
  recordOutput: flag,
  tls: fields(TLS, "a field of tls"),
};
const OPTIONS: Checks<ServeOptions> = {
  listen: (value, at) => {
    const { host, port } = (typeof value === "string" && hostAndPort(value)) || {};
    if (host === undefined || port === undefined) refuse(at, value, 'a string, "HOST:PORT"');
  },
  orchestrator: () => {}, // `checkOptions`: its scheme depends on `credentials`.
  credentials: text("a directory with cert.pem, key.pem and ca.pem"),
  caller: text('a URI, such as "spiffe://fleet/core"'),
  waitSeconds: number("seconds, 0 or more", (seconds) => seconds >= 0),
  leaseSeconds: number("seconds, more than 0", (seconds) => seconds > 0),
  endpoint: text('a URL, such as "http://127.0.0.1:50051"'),
  readOnly: names,
  run: names,
  registrations: (value, at) => {
    for (const [name, settings] of entries(value, at, "an object with registrations, by name")) {
      fields(REGISTRATION, "a field of a registration")(settings, `${at}.${name}`);
    }
  },
  sequential: flag,
};
const LOOP_OPTIONS: Checks<ServeOptions & { loop?: string }> = { ...OPTIONS, loop: text("the loop's name") };

/** The names of the modules in `objects`. */
export const namesOf = (objects: unknown): string[] =>
  entries(objects, "the first argument", "an object with the modules by name")
    .filter(([, object]) => object !== null)
    .map(([name]) => name);

/** Refuses unknown options and invalid values. */
export function checkOptions(options: ServeOptions): void {
  fields(OPTIONS, "an option")(options, "");
  checkOrchestrator(options);
}

/** As `checkOptions`, for an interval loop. */
export function checkLoop(intervalMs: number, options: ServeOptions & { loop?: string }): void {
  number("milliseconds, more than 0", (ms) => ms > 0)(intervalMs, "intervalMs");
  fields(LOOP_OPTIONS, "an option")(options, "");
  checkOrchestrator(options);
}

function checkOrchestrator({ orchestrator, credentials }: ServeOptions): void {
  if (orchestrator != null) orchestratorAddress(orchestrator, "orchestrator", credentials);
}

function refuse(at: string, value: unknown, takes: string): never {
  const shown = inspect(value, { depth: 1, breakLength: Infinity, maxStringLength: 80 }).slice(0, 200);
  throw new TypeError(`${at || "options"} is ${shown}: give ${takes}`);
}

function entries(value: unknown, at: string, takes: string): Array<[string, unknown]> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return refuse(at, value, takes);
  return Object.entries(value).filter(([, item]) => item !== undefined);
}

/** An object with no other fields than those of `checks`. */
function fields<T>(checks: Checks<T>, what: string): Check {
  return (value, at) => {
    const known = Object.keys(checks);
    for (const [name, item] of entries(value, at, `an object with ${known.join(", ")}`)) {
      const inside = at ? `${at}.${name}` : name;
      if (!known.includes(name)) {
        throw new TypeError(`${inside} is not ${what}: ${suggest(name, known) ?? `there are ${known.join(", ")}`}`);
      }
      if (item !== null) checks[name as keyof T](item, inside);
    }
  };
}

function flag(value: unknown, at: string): void {
  if (typeof value !== "boolean") refuse(at, value, "true or false");
}

function text(takes: string): Check {
  return (value, at) => (typeof value === "string" && value) || refuse(at, value, takes);
}

function number(takes: string, fits: (value: number) => boolean): Check {
  return (value, at) => (typeof value === "number" && Number.isFinite(value) && fits(value)) || refuse(at, value, takes);
}

/** A whole number of 32 bits. */
function whole(least: number): Check {
  const most = least < 0 ? -least - 1 : 2 ** 32 - 1;
  return number(`a whole number from ${least} to ${most}`, (value) => {
    return Number.isInteger(value) && least <= value && value <= most;
  });
}

function names(value: unknown, at: string): void {
  const fine = Array.isArray(value) && value.every((name) => typeof name === "string");
  if (!fine) refuse(at, value, 'an array of names, such as ["FieldLayer"]');
}

function duration(value: unknown, at: string): void {
  const example = typeof value === "number" && Number.isInteger(value) ? value : 30;
  const takes = `a duration as an object, such as { seconds: ${example} } or { nanos: 500_000_000 }`;
  for (const [field, item] of entries(value, at, takes)) {
    // A number can also be given as a string, or as a Long.
    const fine = Number.isSafeInteger(typeof item === "number" ? item : Number(String(item)));
    if (!fine || (field !== "seconds" && field !== "nanos")) refuse(at, value, takes);
  }
}

/**
 * Parameters as in the contract.
 *
 * @throws an error that names values that can't be sent: values that JSON can't represent, and inexact numbers
 */
export function parametersOf(value: unknown, at: string): Struct {
  entries(value, at, "an object with plain data");
  const { struct, dropped } = snapshot(value);
  if (dropped.length > 0) throw new TypeError(`${at} can't be sent: ${dropped.join("; ")}`);
  return struct;
}

// -------------------------------------------------------------------------------------------- names

/** Suggests a name of `known` that is similar to `name`, if there is one. */
export function suggest(name: string, known: Iterable<string>): string | undefined {
  const meant = alike(name, known);
  return meant && `did you mean ${meant}?`;
}

/** The name among DreamNet's 28 that is similar but not equal to `name`. */
export const misspelt = (name: string): string | undefined =>
  // A number is intended: another instance.
  Object.hasOwn(TOPOLOGY, name) || /\d/.test(name) ? undefined : alike(name, Object.keys(TOPOLOGY));

/** The name in `known` that differs in case, punctuation, "Core", or one or two letters. */
function alike(name: string, known: Iterable<string>): string | undefined {
  const plain = (name: string) => name.toLowerCase().replace(/[^\p{L}\p{N}]|core$/gu, "");
  const near = [...known].map((other) => ({ other, letters: distance(plain(name), plain(other)) }));
  near.sort((a, b) => a.letters - b.letters);
  const [best] = near;
  return best && best.letters <= Math.min(2, Math.floor(best.other.length / 4)) ? best.other : undefined;
}
