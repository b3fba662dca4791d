// JSON objects as JavaScript has them, to and from `google.protobuf.Struct`.

import { types } from "node:util";
import type { Struct, Struct__Output } from "./gen/google/protobuf/Struct.js";
import type { Value, Value__Output } from "./gen/google/protobuf/Value.js";

/** Plain data, as in JSON. */
export type Json = null | boolean | number | string | readonly Json[] | JsonObject;

/** A JSON object. */
export interface JsonObject {
  readonly [key: string]: Json;
}

// Nested messages: protobuf libraries of some languages stop at 100. The contract sets it. An object takes three of
// them, an array two.
const MAX_DEPTH = 90;

/** The object. */
export function fromStruct(struct: Struct__Output | null | undefined): JsonObject {
  return Object.fromEntries(Object.entries(struct?.fields ?? {}).map(([key, value]) => [key, fromValue(value)]));
}

function fromValue(value: Value__Output): Json {
  switch (value.kind) {
    case "boolValue":
      return value.boolValue!;
    case "numberValue":
      return value.numberValue!;
    case "stringValue":
      return value.stringValue!;
    case "structValue":
      return fromStruct(value.structValue);
    case "listValue":
      return value.listValue!.values.map(fromValue);
    default:
      return null;
  }
}

/**
 * The message of an object. As in `JSON.stringify`, `toJSON` is called, and fields that are undefined are left out.
 *
 * @throws TypeError with the place of a value that JSON can't represent, such as `output.prices[3]`
 */
export function toStruct(place: string, given: unknown): Struct {
  const value = toValue(place, given, 0, new Set());
  if (!value.structValue) throw new TypeError(`${place} is ${kindOf(given)}; give an object`);
  return value.structValue;
}

function toValue(place: string, given: unknown, depth: number, above: Set<object>): Value {
  if (typeof given === "object" && given !== null && "toJSON" in given && typeof given.toJSON === "function") {
    given = given.toJSON("");
  }
  switch (typeof given) {
    case "boolean":
      return { boolValue: given };
    case "number":
      if (!Number.isFinite(given)) throw new TypeError(`${place} is ${given}, which JSON can't represent; send null`);
      return { numberValue: given };
    case "string":
      if (!given.isWellFormed()) throw new TypeError(`${place} contains half of a surrogate pair`);
      return { stringValue: given };
    case "bigint":
      throw new TypeError(`${place} is a BigInt, which JSON can't represent; send a string`);
    case "object":
      break;
    default:
      throw new TypeError(`${place} is ${kindOf(given)}, which JSON can't represent`);
  }
  if (given === null) return { nullValue: "NULL_VALUE" };
  if (isUnfit(given)) throw new TypeError(`${place} is ${kindOf(given)}, which JSON can't represent`);
  if (above.has(given)) throw new TypeError(`${place} refers to an object that contains it`);
  const below = depth + (Array.isArray(given) ? 2 : 3);
  if (below > MAX_DEPTH) throw new TypeError(`${place.slice(0, 80)}… nests deeper than ${MAX_DEPTH / 3} objects`);
  above.add(given);
  const made: Value = Array.isArray(given)
    ? { listValue: { values: Array.from(given, (item, i) => toValue(`${place}[${i}]`, item, below, above)) } }
    : { structValue: { fields: fieldsOf(place, given, below, above) } };
  above.delete(given);
  return made;
}

function fieldsOf(place: string, given: object, depth: number, above: Set<object>): Record<string, Value> {
  const fields: Record<string, Value> = {};
  for (const [key, item] of Object.entries(given)) {
    if (item === undefined) continue;
    // Setting it on an object would set its prototype.
    if (key === "__proto__" || !key.isWellFormed())
      throw new TypeError(`${place}.${key} has a name that can't be sent`);
    fields[key] = toValue(`${place}.${key}`, item, depth, above);
  }
  return fields;
}

/** True for objects that `JSON.stringify` would turn into `{}` silently. */
export function isUnfit(value: object): boolean {
  return (
    types.isMap(value) ||
    types.isSet(value) ||
    types.isWeakMap(value) ||
    types.isWeakSet(value) ||
    types.isPromise(value) ||
    types.isRegExp(value) ||
    types.isNativeError(value) ||
    types.isAnyArrayBuffer(value) ||
    ArrayBuffer.isView(value)
  );
}

/** The kind of a value, for messages: "a Map". */
export function kindOf(value: unknown): string {
  if (value === null || value === undefined) return String(value);
  const kind = typeof value === "object" ? (value.constructor?.name ?? "object") : typeof value;
  return `${/^[aeiou]/i.test(kind) ? "an" : "a"} ${kind}`;
}
