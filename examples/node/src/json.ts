// Converts results of modules to `google.protobuf.Struct` and back.

import { types } from "node:util";
import type { Struct, Struct__Output } from "./gen/google/protobuf/Struct.js";
import type { Value, Value__Output } from "./gen/google/protobuf/Value.js";
import { describe } from "./thrown.js";

/** Plain data, as in JSON. */
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

/** A copy of a value as plain data, and its changes: "PATH: REASON" each. */
export interface Snapshot {
  struct: Struct;
  dropped: string[];
}

// The contract's limit for an output is 90 nested messages: an object takes three, an array two.
const MAX_NESTING = 90;
// A value that refers to the same parts many times is small in memory but huge as JSON.
const MAX_VALUES = 200_000;
// They must fit into the message of one issue, 4 KiB: 80 characters each, of up to three bytes.
const MAX_TOLD = 16;

/**
 * Copies `value` like `JSON.stringify`. Values that JSON can't represent are left out and reported in `dropped`, as are
 * the objects in `never`, wherever they occur. Never throws.
 *
 * An output is an object: an array, or any other value, becomes its only field, `value`. `undefined` becomes an empty
 * object.
 */
export function snapshot(value: unknown, never: ReadonlySet<unknown> = new Set()): Snapshot {
  const dropped: string[] = [];
  let drops = 0;
  const tell = (what: string): undefined => {
    if (++drops <= MAX_TOLD) dropped.push(what.slice(0, 80).toWellFormed());
  };
  const above = new Set<object>();
  let left = MAX_VALUES;

  // `undefined` means left out; an array gets null in its place.
  function copy(value: unknown, path: string, nesting: number): Value | undefined {
    const drop = (why: string): undefined => tell(`${path || "the value"}: ${why}`);
    if (--left < 0) return undefined;
    try {
      if (never.has(value)) return drop("a subsystem itself");
      if (typeof value === "object" && value !== null && "toJSON" in value && typeof value.toJSON === "function") {
        value = value.toJSON("");
        if (never.has(value)) return drop("a subsystem itself");
      }
      if (value instanceof Number || value instanceof String || value instanceof Boolean) value = value.valueOf();
      switch (typeof value) {
        case "undefined":
          return undefined;
        case "boolean":
          return { boolValue: value };
        case "number":
          if (!Number.isFinite(value)) return drop(String(value));
          if (Math.abs(value) > Number.MAX_SAFE_INTEGER) drop("over 2^53, so not exact: give it as a string");
          return { numberValue: value };
        case "bigint":
          return drop("a BigInt: give it as a string");
        case "string":
          if (!value.isWellFormed()) drop("half a surrogate pair, replaced");
          return { stringValue: value.toWellFormed() };
        case "object":
          break;
        default:
          return drop(`a ${typeof value}`);
      }
      if (value === null) return { nullValue: "NULL_VALUE" };
      if (above.has(value)) return drop("a circular reference");
      const unfit = unfitFor(value);
      if (unfit) return drop(unfit);
      const below = nesting + (Array.isArray(value) ? 2 : 3);
      if (below > MAX_NESTING) return drop("nested too deep");
      above.add(value);
      try {
        if (Array.isArray(value)) {
          const values: Value[] = [];
          // An array can be long but empty.
          for (let i = 0; i < value.length && left >= 0; i++) {
            values.push(copy(value[i], `${path}[${i}]`, below) ?? { nullValue: "NULL_VALUE" });
          }
          return { listValue: { values } };
        }
        const fields: Record<string, Value> = {};
        for (const key of Object.keys(value)) {
          const inner = path ? `${path}.${key}` : key;
          if (key === "__proto__" || !key.isWellFormed()) {
            tell(`${inner}: the name can't be sent`);
            continue;
          }
          let item: unknown;
          try {
            item = (value as Record<string, unknown>)[key];
          } catch (error) {
            tell(`${inner}: its getter failed: ${describe(error)}`);
            continue;
          }
          const copied = copy(item, inner, below);
          if (copied) fields[key] = copied;
        }
        return { structValue: { fields } };
      } finally {
        above.delete(value);
      }
    } catch (error) {
      return drop(`it can't be read: ${describe(error)}`);
    }
  }

  // An array is wrapped in an object. This can throw: a proxy may be revoked.
  const copied = copy(value, "", types.isProxy(value) || Array.isArray(value) ? 3 : 0);
  if (left < 0) dropped.unshift(`all values after the first ${MAX_VALUES}`);
  if (drops > MAX_TOLD) dropped.push(`and ${drops - MAX_TOLD} more`);
  if (!copied || copied.nullValue) return { struct: { fields: {} }, dropped };
  return { struct: copied.structValue ?? { fields: { value: copied } }, dropped };
}

// JSON.stringify converts these to `{}`, which would be misleading.
function unfitFor(value: object): string | undefined {
  if (types.isMap(value)) return "a Map";
  if (types.isSet(value)) return "a Set";
  if (types.isWeakMap(value) || types.isWeakSet(value)) return "a weak collection";
  if (types.isPromise(value)) return "a Promise";
  if (types.isRegExp(value)) return "a RegExp";
  if (types.isNativeError(value)) return "an Error";
  if (types.isAnyArrayBuffer(value) || ArrayBuffer.isView(value)) return "binary data";
  return undefined;
}

/** The fields of a `Struct` as plain data, deeply frozen. */
export function frozen(struct: Struct__Output | null): Readonly<Record<string, Json>> {
  const fields = Object.entries(struct?.fields ?? {}).map(([key, value]) => [key, plain(value)] as const);
  return Object.freeze(Object.fromEntries(fields));
}

function plain(value: Value__Output): Json {
  switch (value.kind) {
    case "boolValue":
      return value.boolValue!;
    case "numberValue":
      return value.numberValue!;
    case "stringValue":
      return value.stringValue!;
    case "structValue":
      return frozen(value.structValue!) as Json;
    case "listValue":
      return Object.freeze(value.listValue!.values.map(plain)) as Json[];
    default:
      return null;
  }
}
