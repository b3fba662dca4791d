// Outputs: copies of results as plain data.

import assert from "node:assert/strict";
import { test } from "node:test";
import { describe } from "dreamnet-subsystem";
import { frozen, snapshot } from "../../dreamnet/dist/plain.js";
import { SUBSYSTEM } from "../../subsystem/dist/contract.js";
import { fromStruct, toStruct } from "../../subsystem/dist/objects.js";

/** A value after its way through the bytes of the wire. */
function arrives(value: unknown, never: unknown[] = []) {
  const { output, dropped } = snapshot(value, new Set(never));
  const { responseSerialize, responseDeserialize } = SUBSYSTEM.GetStatus;
  const { status } = responseDeserialize(responseSerialize({ status: toStruct("status", output) }));
  return { data: frozen(fromStruct(status)), dropped };
}

test("values that JSON can represent arrive unchanged", () => {
  const value = { text: "é😀", n: -1.5, yes: true, none: null, list: [1, [2], {}], inner: { a: { b: [] } }, "": 0 };
  assert.deepEqual({ ...arrives(value) }, { data: value, dropped: [] });
});

test("a value that is not an object becomes one", () => {
  assert.deepEqual(arrives(undefined), { data: {}, dropped: [] });
  assert.deepEqual(arrives(null), { data: {}, dropped: [] });
  assert.deepEqual(arrives([1, undefined, 2]), { data: { value: [1, null, 2] }, dropped: [] });
  const { proxy, revoke } = Proxy.revocable({}, {});
  revoke();
  assert.equal(arrives(proxy).dropped.length, 1);
  assert.deepEqual(arrives("text"), { data: { value: "text" }, dropped: [] });
});

test("values with toJSON, class instances and undefined fields are as in JSON.stringify", () => {
  class Point {
    x = 1;
    #secret = 2;
    sum = () => this.#secret;
  }
  const value = {
    at: new Date(0),
    none: undefined,
    point: new Point(),
    boxed: new Number(3),
    bare: Object.create(null),
  };
  const { data, dropped } = arrives(value);
  assert.deepEqual(data, JSON.parse(JSON.stringify(value)));
  assert.deepEqual(dropped, ["point.sum: a function"]);
});

test("values that JSON can't represent are left out and reported", () => {
  const ring: Record<string, unknown> = { fine: 1 };
  ring.self = ring;
  const value = {
    ring,
    big: 1n,
    nan: NaN,
    infinite: -Infinity,
    symbol: Symbol("s"),
    f() {},
    map: new Map(),
    set: new Set(),
    promise: Promise.resolve(),
    bytes: new Uint8Array(2),
    error: new Error("e"),
    list: [() => 0, 1],
    half: "\ud800",
    get broken() {
      throw new Error("no");
    },
    bad: {
      toJSON: () => {
        throw { toString: null };
      },
    },
    ["__proto__"]: 1,
    revoked: (() => {
      const { proxy, revoke } = Proxy.revocable({}, {});
      revoke();
      return proxy;
    })(),
  };
  const { data, dropped } = arrives(value);
  assert.deepEqual(data, { ring: { fine: 1 }, list: [null, 1], half: "\ufffd" });
  const told = dropped.map((drop) => drop.split(":")[0]);
  const names = [
    "ring.self",
    "big",
    "nan",
    "infinite",
    "symbol",
    "f",
    "map",
    "set",
    "promise",
    "bytes",
    "error",
    "list[0]",
  ];
  assert.deepEqual(told, [...names, "half", "broken", "bad", "__proto__", "and 1 more"].slice(0, 17));
});

test("the report of left out values fits into one issue", () => {
  const { dropped } = arrives(
    Object.fromEntries(Array.from({ length: 1000 }, (_, i) => [`${i}`.padEnd(999, "€"), 1n])),
  );
  assert.equal(dropped.at(-1), "and 984 more");
  assert.ok(Buffer.byteLength(dropped.join("; ")) < 4000);
});

test("a value that is infinite as JSON is cut here", () => {
  let deep: unknown = 1;
  for (let i = 0; i < 10_000; i++) deep = { deep };
  let wide: unknown[] = [0];
  for (let i = 0; i < 60; i++) wide = [wide, wide];
  for (const value of [deep, wide, { holes: new Array(1e9) }]) {
    assert.equal(arrives(value).dropped.length > 0, true);
  }
  // As deep as the contract allows.
  let thirty: unknown = { leaf: 1 };
  for (let i = 0; i < 29; i++) thirty = { thirty };
  assert.deepEqual(arrives(thirty), { data: thirty, dropped: [] });
  assert.equal(arrives({ thirty }).dropped.length, 1);
});

test("a subsystem itself is never sent, wherever it occurs", () => {
  const keeper = {
    key: "secret",
    toJSON() {
      return { key: this.key };
    },
  };
  for (const value of [keeper, { keeper }, [[keeper]], { toJSON: () => keeper }]) {
    const { data, dropped } = arrives(value, [keeper]);
    assert.doesNotMatch(JSON.stringify(data), /secret/);
    assert.match(dropped[0]!, /a subsystem itself/);
  }
});

test("data is deeply frozen", () => {
  const { data } = arrives({ inner: { list: [{ a: 1 }] } }) as { data: any };
  for (const part of [data, data.inner, data.inner.list, data.inner.list[0]]) assert.ok(Object.isFrozen(part));
});

test("any thrown value is described", () => {
  const odd = {
    get message() {
      throw new Error("no");
    },
  };
  const thrown = [
    new RangeError("far"),
    "text",
    undefined,
    null,
    7,
    { message: "busy" },
    Object.create(null),
    odd,
    Symbol("s"),
  ];
  const unprintable = "a value that can't be printed";
  const told = ["RangeError: far", "text", "undefined", "null", "7", "busy", unprintable, unprintable, "Symbol(s)"];
  assert.deepEqual(thrown.map(describe), told);
  assert.equal(describe("x".repeat(5000)).length, 1024);
});
