// The caller is recognized by the names in its certificate, as Node writes them.

import assert from "node:assert/strict";
import type { PeerCertificate } from "node:tls";
import { test } from "node:test";
import { isOf } from "../src/tls.js";

test("a certificate is that of a URI if it has this one and no other", () => {
  const is = (subjectaltname?: string) => isOf({ subjectaltname } as PeerCertificate, "spiffe://fleet/core");
  for (const names of [
    "URI:spiffe://fleet/core",
    "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1, URI:spiffe://fleet/core",
  ]) {
    assert.ok(is(names), names);
  }
  for (const names of [
    undefined,
    "",
    "DNS:localhost",
    "DNS:spiffe://fleet/core",
    "URI:spiffe://fleet/core/more",
    "URI:spiffe://fleet/other, URI:spiffe://fleet/core",
    // One name, which contains the other.
    'DNS:"a, URI:spiffe://fleet/core, b"',
  ]) {
    assert.ok(!is(names), names);
  }
  assert.ok(!isOf(undefined, "spiffe://fleet/core"));
});
