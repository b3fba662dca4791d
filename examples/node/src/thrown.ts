// What was thrown, in words. It can be anything, and is told in bounded length.

import { inspect } from "node:util";

/** In one line, for those who call. */
export function describe(error: unknown): string {
  let text: string;
  try {
    // Of an object that is no error, its message says more than its text.
    const { message = error } = Object(error) as { message?: unknown };
    text = error instanceof Error ? `${error.name}: ${error.message}` : String(message);
  } catch {
    text = "something that can't be printed";
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
    // It has none that can be read.
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
