// Options are refused where they are given, with a message that says what to give instead.

import assert from "node:assert/strict";
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { Failure, Fleet, Orchestrator, OptionError } from "dreamnet-subsystem";
import { registration } from "../../subsystem/dist/options.js";
import { atEnd } from "./support.js";

const fleet = (options: object = {}) => new Fleet({ orchestrator: "", ...options });

/** Checks that a call is refused with a message that contains this text. */
function refused(call: () => unknown, text: string): void {
  assert.throws(call, (error: Error) => {
    assert.ok(error instanceof OptionError, String(error));
    assert.ok(error.message.includes(text), error.message);
    return true;
  });
}

test("a bad option of a subsystem is named", () => {
  const cases: Array<[object, string]> = [
    [{ timeut: "4s" }, "subsystem it has no option timeut: did you mean timeout?"],
    [{ quux: 1 }, "subsystem it has no option quux: the options are after, breaker, critical, initialize, "],
    [{ after: "sensor" }, "subsystem it: after is 'sensor'; give an array of names, such as [ 'sensor' ]"],
    [{ reads: ["a b"] }, "reads is 'a b'; give 1 to 63 letters"],
    [{ requires: ["it"] }, "subsystem it: it can't be its own input"],
    [{ reads: Array.from({ length: 1025 }, (_, i) => `n${i}`) }, "have 1025 names; give at most 1024"],
    [{ timeout: 4 }, 'timeout is 4 without a unit; give "4s" or "4ms"'],
    [{ timeout: "4 parsecs" }, "timeout is '4 parsecs'; give a duration such as"],
    [{ timeout: "0s" }, "timeout is '0s'; give 1 ms to 24 h"],
    [{ timeout: "49h" }, "give 1 ms to 24 h"],
    [{ phase: "1" }, "phase is '1'; give a whole number from -1000000 to 1000000"],
    [{ critical: 1 }, "critical is 1; give true or false"],
    [{ retry: { maxAttemps: 3 } }, "retry has no option maxAttemps: did you mean maxAttempts?"],
    [{ retry: { maxAttempts: 11 } }, "retry.maxAttempts is 11; give a whole number from 1 to 10"],
    [{ retry: { backoffMultiplier: true } }, "retry.backoffMultiplier is true; give a number from 1 to 100"],
    [{ retry: { retryableStatusCodes: ["BUSY"] } }, "contains 'BUSY'; give names of UNKNOWN"],
    [{ limits: 3 }, "limits is 3; give an object with some of maxMessageBytes"],
    [{ parameters: { a: [Number.POSITIVE_INFINITY] } }, "parameters.a[0] is Infinity"],
    [{ parameters: { a: "x".repeat(70_000) } }, "give at most 65536"],
    [{ status: { a: 1 } }, "subsystem it: status is { a: 1 }; give a function"],
  ];
  for (const [options, message] of cases) refused(() => fleet().subsystem("it", options, () => {}), message);
  refused(
    () => fleet().subsystem("it", {}, undefined as any),
    "subsystem it is undefined; give a function as the last argument",
  );
});

test("names are checked and unique", () => {
  for (const name of ["", "x y", "1a", "é", "a".repeat(64)]) {
    refused(() => fleet().subsystem(name, () => {}), "give 1 to 63 letters");
  }
  const twice = fleet();
  twice.subsystem("it", () => {});
  refused(() => twice.subsystem("it", () => {}), "subsystem it is declared twice");
});

test("options are put into the registration", () => {
  const made = registration("it", {
    after: ["a"],
    timeout: "1.5s",
    retry: { initialBackoff: "20ms", retryableStatusCodes: ["INTERNAL"] },
    breaker: { openFor: "1m", disabled: true },
    limits: { maxIssues: 5 },
    parameters: { a: 1 },
  });
  assert.deepEqual(made, {
    name: "it",
    after: ["a"],
    timeout: { seconds: 1, nanos: 500_000_000 },
    retry: { initialBackoff: { seconds: 0, nanos: 20_000_000 }, retryableStatusCodes: ["INTERNAL"] },
    breaker: { openFor: { seconds: 60, nanos: 0 }, disabled: true },
    limits: { maxIssues: 5 },
    parameters: { fields: { a: { numberValue: 1 } } },
  });
});

test("a bad option of the fleet is named", () => {
  const directory = mkdtempSync(join(tmpdir(), "options-"));
  atEnd(() => rmSync(directory, { recursive: true }));
  const file = (name: string, content: string, mode: number) => {
    const path = join(directory, name);
    writeFileSync(path, content);
    chmodSync(path, mode);
    return path;
  };
  const token = file("token", "orc_1_2\n", 0o600);
  const exposed = file("exposed", "orc_1_2\n", 0o644);
  const empty = file("empty", "", 0o600);
  const cases: Array<[object, string]> = [
    [{ orchestrater: "" }, "Fleet has no option orchestrater: did you mean orchestrator?"],
    [{ orchestrator: "ftp://x:1" }, "orchestrator is 'ftp://x:1'; give http://HOST:PORT, https://"],
    [{ orchestrator: "localhost" }, "orchestrator is 'localhost'; give http://HOST:PORT"],
    [{ orchestrator: "http://x:99999" }, "orchestrator is 'http://x:99999'; give"],
    [{ listen: "nope" }, "listen is 'nope'"],
    [{ listen: "http://127.0.0.1:1" }, "give HOST:PORT or unix:/PATH, without a scheme"],
    [{ listen: "0.0.0.0:0", orchestrator: "http://a:1" }, 'give endpoint: "http://HOST:PORT" as well'],
    [{ lease: "500ms" }, "lease is '500ms'; give 1 s to 24 h"],
    [{ unregister: "no" }, "unregister is 'no'; give true or false"],
    [{ log: "stderr" }, "log is 'stderr'; give a function"],
    [{ caller: "" }, "caller is ''; give a URI"],
    [{ credentials: "/nowhere" }, "credentials: /nowhere does not exist; give a directory with cert.pem"],
    [{ credentials: directory }, "key.pem can't be read: Error: ENOENT"],
    [{ credentials: token, orchestrator: "http://a:1" }, "the token would be sent in clear to http://a:1"],
    [{ credentials: exposed, orchestrator: "https://a:1" }, "has mode 0644"],
    [{ credentials: empty, orchestrator: "https://a:1" }, "contains no token"],
  ];
  for (const [options, message] of cases) refused(() => fleet(options), message);
  for (const orchestrator of ["http://127.0.0.1:1", "http://[::1]:1", "localhost:1", "unix:/o", "https://a:1"]) {
    fleet({ credentials: token, orchestrator });
  }
});

test("the environment names the orchestrator and the credentials", () => {
  for (const [variable, message] of [
    ["ORCHESTRATOR_ADDRESS", "ORCHESTRATOR_ADDRESS is '/nowhere'; give http://HOST:PORT"],
    ["ORCHESTRATOR_CREDENTIALS", "credentials: /nowhere does not exist"],
  ] as const) {
    process.env[variable] = "/nowhere";
    try {
      refused(() => new Fleet(), message);
      refused(() => new Orchestrator(), message);
    } finally {
      delete process.env[variable];
    }
  }
  assert.equal(new Orchestrator().address.url, "http://127.0.0.1:7700");
  refused(() => new Orchestrator({ wait: "2h" }), "wait is '2h'; give 0 ms to 1 h");
});

test("a failure has the name of a status code", () => {
  assert.equal(new Failure("bad").code, "UNKNOWN");
  for (const code of ["OK", "BUSY", 3])
    assert.throws(() => new Failure("bad", code as any), /is not the name of a gRPC status code/);
});
