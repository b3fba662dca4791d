// Copies results of modules as plain data, which an output is: values that JSON can't represent are left out.

import { types } from "node:util";
import { describe, isUnfit, type Json, type JsonObject } from "dreamnet-subsystem";

/** A copy of a value as plain data, and its changes: "PATH: REASON" each. */
export interface Snapshot {
  output: JsonObject;
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
  function copy(value: unknown, path: string, nesting: number): Json | undefined {
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
          return value;
        case "number":
          if (!Number.isFinite(value)) return drop(String(value));
          if (Math.abs(value) > Number.MAX_SAFE_INTEGER) drop("over 2^53, so not exact: give it as a string");
          return value;
        case "bigint":
          return drop("a BigInt: give it as a string");
        case "string":
          if (!value.isWellFormed()) drop("half a surrogate pair, replaced");
          return value.toWellFormed();
        case "object":
          break;
        default:
          return drop(`a ${typeof value}`);
      }
      if (value === null) return null;
      if (above.has(value)) return drop("a circular reference");
      if (isUnfit(value)) return drop(kindOf(value));
      const below = nesting + (Array.isArray(value) ? 2 : 3);
      if (below > MAX_NESTING) return drop("nested too deep");
      above.add(value);
      try {
        if (Array.isArray(value)) {
          const values: Json[] = [];
          // An array can be long but empty.
          for (let i = 0; i < value.length && left >= 0; i++) {
            values.push(copy(value[i], `${path}[${i}]`, below) ?? null);
          }
          return values;
        }
        const fields: Record<string, Json> = {};
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
          if (copied !== undefined) fields[key] = copied;
        }
        return fields;
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
  if (copied === undefined || copied === null) return { output: {}, dropped };
  return { output: isObject(copied) ? copied : { value: copied }, dropped };
}

function isObject(value: Json): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

// `isUnfit` lists them: JSON.stringify converts them to `{}`, which would be misleading.
function kindOf(value: object): string {
  if (types.isMap(value)) return "a Map";
  if (types.isSet(value)) return "a Set";
  if (types.isPromise(value)) return "a Promise";
  if (types.isRegExp(value)) return "a RegExp";
  if (types.isNativeError(value)) return "an Error";
  return types.isWeakMap(value) || types.isWeakSet(value) ? "a weak collection" : "binary data";
}

/** The same plain data, deeply frozen: several modules get it. */
export function frozen<T extends Json>(value: T): T {
  if (typeof value === "object" && value !== null) {
    Object.values(value).forEach(frozen);
    Object.freeze(value);
  }
  return value;
}
