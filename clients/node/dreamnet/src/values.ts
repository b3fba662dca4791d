// Arguments and results of calls between processes: copied when they are taken, as by a structured clone, except for
// modules, which cross as references.

import { deserialize, serialize } from "node:v8";
import { types } from "node:util";
import { describe } from "dreamnet-subsystem";

/** What a reference to a module is among copied values; see modules.proto. */
const MODULE = "dreamnet.modules.v1/module";

/** The modules that a process knows. */
export interface Modules {
  /** The name of an object that is a module of this process, or stands for one of another process. */
  nameOf(object: object): string | undefined;
  /** The module of this name: the live object, or an object that stands for it. */
  named(name: string): unknown;
}

/**
 * Copies a value.
 *
 * @throws TypeError that says which part can't be copied; `place` names the value
 */
export function encode(value: unknown, place: string, modules: Modules): Buffer {
  const copy = copied(value, place, modules, new Map());
  try {
    return serialize(copy);
  } catch (error) {
    // Such as a Promise, deep inside.
    throw new TypeError(`${place} can't be copied to another process: ${describe(error)}`);
  }
}

function copied(value: unknown, place: string, modules: Modules, known: Map<object, unknown>): unknown {
  if (typeof value === "symbol") throw new TypeError(`${place} is a symbol, which can't be copied to another process`);
  if ((typeof value !== "object" && typeof value !== "function") || value === null) return value;
  const module = modules.nameOf(value);
  if (module !== undefined) return { [MODULE]: module };
  if (typeof value === "function")
    throw new TypeError(`${place} is a function, which can't be copied to another process`);
  if (known.has(value)) return known.get(value);
  const remembered = <T extends object>(made: T): T => {
    known.set(value, made);
    return made;
  };
  if (types.isMap(value)) {
    const made = remembered(new Map());
    for (const [key, item] of value) {
      made.set(copied(key, `a key of ${place}`, modules, known), copied(item, `an item of ${place}`, modules, known));
    }
    return made;
  }
  if (types.isSet(value)) {
    const made = remembered(new Set());
    for (const item of value) made.add(copied(item, `an item of ${place}`, modules, known));
    return made;
  }
  if (isOpaque(value)) return value;
  // Fields of an object, whatever its class; an array keeps its holes.
  const made: Record<string, unknown> = remembered(Array.isArray(value) ? (new Array(value.length) as any) : {});
  for (const [key, item] of Object.entries(value)) {
    made[key] = copied(item, Array.isArray(value) ? `${place}[${key}]` : `${place}.${key}`, modules, known);
  }
  return made;
}

/** True for objects that `serialize` copies, or refuses, by itself. */
function isOpaque(value: object): boolean {
  return (
    types.isDate(value) ||
    types.isRegExp(value) ||
    types.isNativeError(value) ||
    types.isAnyArrayBuffer(value) ||
    ArrayBuffer.isView(value) ||
    types.isBoxedPrimitive(value) ||
    types.isPromise(value) ||
    types.isWeakMap(value) ||
    types.isWeakSet(value)
  );
}

/** The copy. */
export function decode(bytes: Uint8Array, modules: Modules): unknown {
  return resolved(deserialize(bytes), modules, new Set());
}

function resolved(value: unknown, modules: Modules, seen: Set<object>): unknown {
  if (typeof value !== "object" || value === null || seen.has(value)) return value;
  seen.add(value);
  if (types.isMap(value)) {
    const items = [...value];
    value.clear();
    for (const [key, item] of items) value.set(resolved(key, modules, seen), resolved(item, modules, seen));
  } else if (types.isSet(value)) {
    const items = [...value];
    value.clear();
    for (const item of items) value.add(resolved(item, modules, seen));
  } else if (!isOpaque(value)) {
    const fields = value as Record<string, unknown>;
    const keys = Object.keys(fields);
    if (keys.length === 1 && keys[0] === MODULE) return modules.named(String(fields[MODULE]));
    for (const key of keys) fields[key] = resolved(fields[key], modules, seen);
  }
  return value;
}

/** An error as it crosses: a structured clone loses its class and its fields. */
interface Thrown {
  name: string;
  message: string;
  stack: string;
  fields: Record<string, unknown>;
}

/** A thrown value as it crosses. Parts that can't be copied are left out. Never throws. */
export function encodeThrown(error: unknown, modules: Modules): Buffer {
  if (types.isNativeError(error)) {
    try {
      const own = Object.entries({ ...error, ...("cause" in error && { cause: error.cause }) });
      const fields = Object.fromEntries(own.filter(([, value]) => isCopied(value, modules)));
      const made: Thrown = { name: `${error.name}`, message: `${error.message}`, stack: `${error.stack}`, fields };
      return encode({ error: made }, "an error", modules);
    } catch {
      // It can't be read.
    }
  }
  return encode({ value: isCopied(error, modules) ? error : describe(error) }, "a thrown value", modules);
}

function isCopied(value: unknown, modules: Modules): boolean {
  try {
    encode(value, "", modules);
    return true;
  } catch {
    return false;
  }
}

const STANDARD: Readonly<Record<string, new (message: string) => Error>> = {
  EvalError,
  RangeError,
  ReferenceError,
  SyntaxError,
  TypeError,
  URIError,
};

/** The thrown value: an error has its name, message, fields, and the stack from the other process. */
export function decodeThrown(bytes: Uint8Array, modules: Modules): unknown {
  const { error, value } = decode(bytes, modules) as { error?: Thrown; value?: unknown };
  if (!error) return value;
  const made = new (STANDARD[error.name] ?? Error)(error.message);
  if (made.name !== error.name)
    Object.defineProperty(made, "name", { value: error.name, configurable: true, writable: true });
  const { cause, ...fields } = error.fields;
  if (cause !== undefined) Object.defineProperty(made, "cause", { value: cause, configurable: true, writable: true });
  return Object.assign(made, fields, { stack: error.stack });
}
