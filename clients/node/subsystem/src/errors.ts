// How calls fail, and how thrown values, which can be anything, are described.

import { inspect } from "node:util";
import { status } from "@grpc/grpc-js";

/** The name of a gRPC status code, without OK. */
export type Code = Exclude<keyof typeof status, "OK">;

/** An option is unknown, or has a bad value. The message names it, and what to give instead. */
export class OptionError extends TypeError {
  override readonly name = "OptionError";
}

/** The fleet can't be served, or its registration is invalid. The message says what to do. */
export class FleetError extends Error {
  override readonly name = "FleetError";
}

/** Fails the call with a code of gRPC, recorded with the message. An error of another kind becomes INTERNAL. */
export class Failure extends Error {
  override readonly name: string = "Failure";

  constructor(
    message: string,
    readonly code: Code = "UNKNOWN",
  ) {
    super(message);
    if (!isCode(code)) throw new TypeError(`${inspect(code)} is not the name of a gRPC status code other than OK`);
  }
}

/** Nothing was done, and it is safe to call again: the orchestrator does, as the registration's `retry` says. */
export class Unavailable extends Failure {
  override readonly name = "Unavailable";

  constructor(message: string) {
    super(message, "UNAVAILABLE");
  }
}

/** The answer can't be used any more, so the work ends: the reason of `Cycle.signal`. */
export class Stopped extends Error {
  // As of every error by which something that was aborted ends.
  override readonly name = "AbortError";
}

/** True for the name of a status code that a failed call can have. */
export function isCode(code: unknown): code is Code {
  return typeof code === "string" && code !== "OK" && typeof status[code as Code] === "number";
}

/** A thrown value in one line, of at most 1,024 characters: "TypeError: no such field". */
export function describe(error: unknown): string {
  let text: string;
  try {
    // The `message` of an object that is not an Error is more useful than its text.
    const { message = error } = Object(error) as { message?: unknown };
    text = error instanceof Error ? `${error.name}: ${error.message}` : String(message);
  } catch {
    text = "a value that can't be printed";
  }
  return text.slice(0, 1024).toWellFormed();
}

/** As `describe`, and where it was thrown: "TypeError: no such field, at run (file:///modules/field.js:12:5)". */
export function describeWithPlace(error: unknown): string {
  let place: string | undefined;
  try {
    const stack = error instanceof Error ? String(error.stack) : "";
    [, place] = /^ +at ((?!.*\bnode:internal\b).+)$/m.exec(stack) ?? [];
  } catch {
    // Its stack can't be read.
  }
  return describe(error) + (place ? `, at ${place.slice(0, 256).toWellFormed()}` : "");
}

/** With its stack, its causes and its fields, for the log. */
export function describeWithStack(error: unknown): string {
  try {
    return inspect(error).slice(0, 16_384);
  } catch {
    return describe(error);
  }
}

/** The text, cut to this many bytes of UTF-8. */
export function shortened(text: string, most: number): string {
  const bytes = Buffer.from(text.toWellFormed());
  if (bytes.length <= most) return bytes.toString();
  // A character that is cut in its middle becomes a replacement character, which is removed.
  const kept = bytes.subarray(0, most - "…".length * 3).toString();
  return `${kept.replace(/\uFFFD+$/, "")}…`;
}
