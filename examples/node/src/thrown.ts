// Describes thrown values, which can be anything, in bounded length.

import { inspect } from "node:util";

/** In one line, for callers. */
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
