// A module of another process, as the modules of this one see it: an object with exactly its methods and properties.

import { types } from "node:util";
import type { Description, Member } from "./messages.js";

/** Calls a method or, without arguments, reads a property. */
type Use = (member: string, given?: readonly unknown[]) => unknown;

export class Remote {
  /** It can be tested for the presence of a method, and a method that it does not have can't be called. */
  readonly object: object = {};
  private readonly members: string;

  constructor({ name, members }: Description, use: Use) {
    this.members = JSON.stringify(members);
    for (const { name: member, isMethod, isEnumerable } of members) {
      const shared = { enumerable: isEnumerable, configurable: false };
      if (isMethod) {
        const value = { [member]: (...given: unknown[]) => use(member, given) }[member];
        Object.defineProperty(this.object, member, { ...shared, value, writable: false });
      } else {
        const set = () => {
          throw new TypeError(`${name}.${member} can't be set: ${name} is in another process; call a method of it`);
        };
        Object.defineProperty(this.object, member, { ...shared, get: () => use(member), set });
      }
    }
    Object.preventExtensions(this.object);
  }

  /** True if the module has the methods and properties that it had. */
  isAsIn({ members }: Description): boolean {
    return JSON.stringify(members) === this.members;
  }

  /** Describes a module of this process for others. */
  static describe(name: string, object: object, copy: (value: unknown, place: string) => Uint8Array): Description {
    // Of a new collection: a module itself crosses as a reference.
    const collection = collected(object);
    if (collection) return { name, members: [], copy: copy(collection, name) };
    const members = new Map<string, Member>();
    for (const at of chainOf(object)) {
      for (const [key, { value, enumerable = false }] of Object.entries(Object.getOwnPropertyDescriptors(at))) {
        if (members.has(key) || isHidden(at, key)) continue;
        members.set(key, {
          name: key,
          isMethod: typeof value === "function",
          isEnumerable: enumerable && at === object,
        });
      }
    }
    return { name, members: [...members.values()] };
  }

  /** True if others see this method or property of a module of this process. */
  static isMember(object: object, member: string): boolean {
    return chainOf(object).some((at) => Object.hasOwn(at, member) && !isHidden(at, member));
  }
}

// Of every class, if a class itself is the module.
const OF_FUNCTIONS: readonly string[] = ["length", "name", "prototype", "arguments", "caller"];

function isHidden(at: object, key: string): boolean {
  return key === "constructor" || (typeof at === "function" && OF_FUNCTIONS.includes(key));
}

/** The object and the prototypes from which it inherits, without those of every object. */
function chainOf(object: object): object[] {
  const chain: object[] = [];
  for (let at: object | null = object; at !== null; at = Object.getPrototypeOf(at)) {
    if (at === Object.prototype || at === Function.prototype) break;
    chain.push(at);
  }
  return chain;
}

/** The same collection anew: others get a copy of objects without methods of their own. Undefined for other objects. */
function collected(object: object): object | undefined {
  if (Array.isArray(object)) return object.slice();
  if (types.isMap(object)) return new Map(object);
  return types.isSet(object) ? new Set(object) : undefined;
}
