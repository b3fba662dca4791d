// The options of a registration: checked where they are given, and put into the contract's message.

import { inspect } from "node:util";
import { status } from "@grpc/grpc-js";
import { distance } from "fastest-levenshtein";
import { isCode, OptionError, type Code } from "./errors.js";
import type { Duration } from "./gen/google/protobuf/Duration.js";
import type { Struct } from "./gen/google/protobuf/Struct.js";
import type { Registration } from "./gen/dreamnet/orchestrator/v1/Registration.js";
import { toStruct, type JsonObject } from "./objects.js";

/** A duration with its unit: "500ms", "4s", "2m" or "1h". */
export type DurationText = string;

/** How calls are retried. */
export interface Retry {
  /** Most calls, including the first one: 1 to 10. Default 3. */
  maxAttempts?: number;
  /** 1 ms to 1 h. Default 100 ms. */
  initialBackoff?: DurationText;
  /** At least `initialBackoff`, at most 1 h. Default 1 s. */
  maxBackoff?: DurationText;
  /** 1 to 100. Default 2. */
  backoffMultiplier?: number;
  /** Without CANCELLED. Default ["UNAVAILABLE"]. */
  retryableStatusCodes?: readonly Code[];
}

/** When calls are held back. */
export interface Breaker {
  /** Number of consecutive failed cycles that opens the circuit breaker: 1 to 1,000. Default 5. */
  failureThreshold?: number;
  /** How long it stays open before one probe call: 1 ms to 24 h. Default 30 s. */
  openFor?: DurationText;
  /** True if it never opens. */
  disabled?: boolean;
}

/** Limits on answers. An answer over one of them fails the call. */
export interface Limits {
  /** Up to 64 MiB. Default 4 MiB. */
  maxMessageBytes?: number;
  /** Up to 64 MiB. Default 1 MiB. */
  maxOutputBytes?: number;
  /** Up to 4,096. Default 64. */
  maxMetrics?: number;
  /** Up to 1,024. Default 32. */
  maxIssues?: number;
}

/** The registration of a subsystem, without its name and endpoint. A field that is undefined has its default. */
export interface RegistrationOptions {
  /** Names of subsystems to run after. It does not run if one of them fails. Their outputs are its inputs. */
  requires?: readonly string[];
  /** Names of subsystems to run after, even if they fail. Their outputs are its inputs. */
  after?: readonly string[];
  /** Names of subsystems whose latest outputs are its inputs, without an order. */
  reads?: readonly string[];
  /** Every subsystem of a lower phase ends before. −1,000,000 to 1,000,000. Default 0. */
  phase?: number;
  /** The time for its part in a cycle, with all repeated calls: 1 ms to 24 h. Default 10 s. */
  timeout?: DurationText;
  /** True if a cycle in which it fails is FAILED. */
  critical?: boolean;
  /** What `initialize` and `Cycle.parameters` get. At most 64 KiB. */
  parameters?: JsonObject;
  /** True if the record of every cycle contains its output. */
  recordOutput?: boolean;
  retry?: Retry;
  breaker?: Breaker;
  limits?: Limits;
}

// The contract sets these.
const MAX_NAMES = 1024;
const MAX_PARAMETERS_BYTES = 64 * 1024;
const [HOUR, DAY] = [3_600_000, 86_400_000];

/** Reads an option: returns its value as the contract has it, or throws an OptionError that says what to give. */
export type Parse<T = unknown> = (option: string, given: unknown) => T;

/** Refuses an option, with its value and what to give. */
export function refuse(option: string, given: unknown, give: string): never {
  const shown = inspect(given, { depth: 1, breakLength: Number.POSITIVE_INFINITY, maxStringLength: 80 });
  throw new OptionError(`${option} is ${shown.slice(0, 200)}; give ${give}`);
}

/** The name in `known` that is close to `name`, for a suggestion. Case and punctuation don't count. */
export function closest(name: string, known: Iterable<string>): string | undefined {
  const plain = (name: string) => name.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
  const near = [...known].map((other) => ({ other, letters: distance(plain(name), plain(other)) }));
  near.sort((a, b) => a.letters - b.letters);
  const [best] = near;
  return best && best.letters <= Math.min(2, Math.floor(best.other.length / 4)) ? best.other : undefined;
}

/** Refuses the first option that does not exist. `where` is what has the options. */
export function refuseUnknown(where: string, given: object, known: readonly string[]): void {
  const unknown = Object.keys(given).find((option) => !known.includes(option));
  if (unknown === undefined) return;
  const close = closest(unknown, known);
  const advice = close ? `did you mean ${close}?` : `the options are ${[...known].sort().join(", ")}`;
  throw new OptionError(`${where} has no option ${unknown}: ${advice}`);
}

/** A text that is not empty. `give` describes it. */
export const text =
  (give: string): Parse<string> =>
  (option, given) =>
    typeof given === "string" && given !== "" ? given : refuse(option, given, give);

export const flag: Parse<boolean> = (option, given) =>
  typeof given === "boolean" ? given : refuse(option, given, "true or false");

/** The name of a subsystem. */
export const name: Parse<string> = (option, given) =>
  typeof given === "string" && /^[A-Za-z][A-Za-z0-9_.-]{0,62}$/.test(given)
    ? given
    : refuse(option, given, "1 to 63 letters, digits, '_', '-' or '.', first a letter");

/** Names of subsystems. */
export const names: Parse<string[]> = (option, given) => {
  const example = inspect([typeof given === "string" ? given : "sensor"]);
  if (!Array.isArray(given)) return refuse(option, given, `an array of names, such as ${example}`);
  return given.map((item) => name(option, item));
};

/** A whole number in these bounds. */
export const whole =
  (least: number, most: number): Parse<number> =>
  (option, given) =>
    Number.isInteger(given) && least <= (given as number) && (given as number) <= most
      ? (given as number)
      : refuse(option, given, `a whole number from ${least} to ${most}`);

const decimal =
  (least: number, most: number): Parse<number> =>
  (option, given) =>
    typeof given === "number" && least <= given && given <= most
      ? given
      : refuse(option, given, `a number from ${least} to ${most}`);

const UNITS = { ms: 1, s: 1000, m: 60_000, h: HOUR } as const;

/** A duration in these bounds, such as "4s", in milliseconds. */
export const milliseconds =
  (least: number, most: number): Parse<number> =>
  (option, given) => {
    if (typeof given === "number") {
      throw new OptionError(`${option} is ${given} without a unit; give "${given}s" or "${given}ms"`);
    }
    const [, digits, unit] = (typeof given === "string" && /^(\d+(?:\.\d+)?)(ms|s|m|h)$/.exec(given.trim())) || [];
    if (digits === undefined) return refuse(option, given, 'a duration such as "500ms", "4s" or "2m"');
    const made = Number(digits) * UNITS[unit as keyof typeof UNITS];
    return least <= made && made <= most ? made : refuse(option, given, `${spoken(least)} to ${spoken(most)}`);
  };

function spoken(ms: number): string {
  const [unit, size] = Object.entries(UNITS).findLast(([, size]) => ms >= size) ?? ["ms", 1];
  return `${ms / size} ${unit}`;
}

/** Milliseconds as the contract has them. */
export const toDuration = (ms: number): Duration => ({
  seconds: Math.floor(ms / 1000),
  nanos: Math.min(Math.round((ms % 1000) * 1e6), 999_999_999),
});

const duration =
  (least: number, most: number): Parse<Duration> =>
  (option, given) =>
    toDuration(milliseconds(least, most)(option, given));

const codes: Parse<string[]> = (option, given) => {
  const known = Object.keys(status).filter((code) => isCode(code) && code !== "CANCELLED");
  if (!Array.isArray(given)) return refuse(option, given, 'an array of names, such as ["UNAVAILABLE"]');
  const unknown = given.find((code) => !known.includes(code));
  if (unknown !== undefined) {
    throw new OptionError(`${option} contains ${inspect(unknown)}; give names of ${known.join(", ")}`);
  }
  return given;
};

const parameters: Parse<Struct> = (option, given) => {
  if (typeof given !== "object" || given === null || Array.isArray(given)) return refuse(option, given, "an object");
  let struct: Struct;
  try {
    struct = toStruct(option, given);
  } catch (error) {
    throw new OptionError((error as Error).message);
  }
  const bytes = Buffer.byteLength(JSON.stringify(given));
  if (bytes > MAX_PARAMETERS_BYTES) {
    throw new OptionError(`${option} takes ${bytes} bytes; give at most ${MAX_PARAMETERS_BYTES}`);
  }
  return struct;
};

/** An object with some of these options. */
function table(parsers: Readonly<Record<string, Parse>>): Parse<Record<string, unknown>> {
  return (option, given) => {
    if (typeof given !== "object" || given === null || Array.isArray(given)) {
      return refuse(option, given, `an object with some of ${Object.keys(parsers).join(", ")}`);
    }
    refuseUnknown(option, given, Object.keys(parsers));
    return parsed(`${option}.`, given, parsers);
  };
}

function parsed(prefix: string, given: object, parsers: Readonly<Record<string, Parse>>): Record<string, unknown> {
  const present = Object.entries(given).filter(([, value]) => value !== undefined);
  return Object.fromEntries(present.map(([key, value]) => [key, parsers[key]!(prefix + key, value)]));
}

// How each option is read. The compiler reports one that is missing here.
type Parsers<T> = { readonly [K in keyof Required<T>]: Parse };

const RETRY: Parsers<Retry> = {
  maxAttempts: whole(1, 10),
  initialBackoff: duration(1, HOUR),
  maxBackoff: duration(1, HOUR),
  backoffMultiplier: decimal(1, 100),
  retryableStatusCodes: codes,
};
const BREAKER: Parsers<Breaker> = { failureThreshold: whole(1, 1000), openFor: duration(1, DAY), disabled: flag };
const LIMITS: Parsers<Limits> = {
  maxMessageBytes: whole(1, 64 << 20),
  maxOutputBytes: whole(1, 64 << 20),
  maxMetrics: whole(1, 4096),
  maxIssues: whole(1, 1024),
};
const REGISTRATION: Parsers<RegistrationOptions> = {
  requires: names,
  after: names,
  reads: names,
  phase: whole(-1_000_000, 1_000_000),
  timeout: duration(1, DAY),
  critical: flag,
  parameters,
  recordOutput: flag,
  retry: table(RETRY),
  breaker: table(BREAKER),
  limits: table(LIMITS),
};

/** The names of the options of a registration. */
export const REGISTRATION_OPTIONS: readonly string[] = Object.keys(REGISTRATION);

/**
 * The registration with these options, without an endpoint.
 *
 * @throws OptionError for the first one that does not exist or has a bad value
 */
export function registration(subsystem: string, given: RegistrationOptions): Registration & { name: string } {
  const where = `subsystem ${subsystem}`;
  refuseUnknown(where, given, REGISTRATION_OPTIONS);
  try {
    name("its name", subsystem);
    const made = parsed("", given, REGISTRATION);
    const others = [given.requires, given.after, given.reads].flatMap((list) => list ?? []);
    if (others.includes(subsystem)) {
      throw new OptionError("it can't be its own input: keep its latest output in a variable");
    }
    if (others.length > MAX_NAMES) {
      throw new OptionError(`requires, after and reads have ${others.length} names; give at most ${MAX_NAMES}`);
    }
    return { name: subsystem, ...made };
  } catch (error) {
    throw error instanceof OptionError ? new OptionError(`${where}: ${error.message}`) : error;
  }
}
