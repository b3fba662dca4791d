// The dashboard, in a real browser, against the real service.

import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { Browser, failure, Fleet, foreignForm, happens, inaccessible, says, Secrets, Service, show, struct } from "./harness.js";

let browser;
before(async () => (browser = await Browser.start()));
after(() => browser?.stop());

/** A service and a fleet for one test. */
async function stage(t, config) {
  const fleet = await Fleet.start();
  const service = await Service.start(typeof config === "function" ? config(fleet) : config);
  t.after(async () => {
    await browser.closePages();
    await service.stop();
    fleet.stop();
  });
  return { fleet, service };
}

/** The row of a subsystem. */
const row = (name) => `main tr[data-key="${name}"]`;

const sees = (page, selector) => page.waitForSelector(selector, { visible: true });

test("the page loads, and each view has its title", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "alpha");
  await service.run();
  const page = await browser.open(service.url);
  for (const [hash, heading, content] of [
    ["#/fleet", "Fleet", row("alpha")],
    ["#/live", "Live", row("alpha")],
    ["#/cycles", "Cycles", 'main tr[data-key="1"]'],
    ["#/cycles/1", "Cycle 1", row("alpha")],
    ["#/cycles/1/alpha", "alpha in cycle 1", "main .json"],
    ["#/plan", "Plan", "main .graph .node"],
    ["#/loops", "Loops", "main"],
    ["#/audit", "Audit", "main .audit tbody tr"],
    ["#/subsystems/alpha", "alpha", "main .settings"],
  ]) {
    await show(page, hash);
    await says(page, "h1", heading);
    await sees(page, content);
    assert.equal(await page.title(), `${heading} · orchestrator`);
    assert.equal(await page.$$eval("h1", (all) => all.length), 1);
  }
  await show(page, "#/nosuch");
  await says(page, "main .problem", 'There is no view "nosuch".');
  assert.deepEqual(page.problems, []);
});

/**
 * The configuration of a service that enforces rights: `wall` is a viewer, `ops` an administrator, `audit` an auditor,
 * and `part` a viewer, and an auditor of a part only.
 */
const enforced = (secrets) => `
  [access]
  mode = "enforce"
  tokens_file = "${secrets.tokensFile}"
  [[access.grants]]
  who = ["token:wall"]
  role = "viewer"
  subsystems = ["*"]
  [[access.grants]]
  who = ["token:ops"]
  role = "admin"
  [[access.grants]]
  who = ["token:part"]
  role = "auditor"
  subsystems = ["a*"]
  [[access.grants]]
  who = ["token:part"]
  role = "viewer"
  subsystems = ["*"]
  [[access.grants]]
  who = ["token:audit"]
  role = "auditor"
  subsystems = ["*"]
`;

/** Logs in on a page that shows the login. */
async function logIn(page, token) {
  await page.type("#token", token);
  await Promise.all([page.waitForNavigation(), page.click("main button")]);
}

for (const scheme of ["http", "https"]) {
  test(`with ${scheme}, a browser logs in with a token, and sees live cycles until it logs out`, async (t) => {
    const secrets = new Secrets("wall", "ops");
    t.after(() => secrets.remove());
    const { fleet, service } = await stage(t, enforced(secrets) + (scheme === "https" ? `[admin.tls]\n${secrets.tls}` : ""));
    service.token = secrets.token("ops");
    await service.register(fleet, "alpha");
    const page = await browser.visit(`${service.url}/#/live`);
    await says(page, "h1", "Log in");
    assert.deepEqual(await inaccessible(page), []);
    await logIn(page, secrets.token("wall").replace(/.{64}$/, "0".repeat(64)));
    await says(page, "main .problem", "This token is not valid");
    await logIn(page, secrets.token("wall"));

    // The view of the first address is shown, and moves.
    await says(page, "h1", "Live");
    await says(page, "#access", "access: enforce · token:wall");
    await page.waitForSelector("#connection[data-connection=open]");
    const release = fleet.hold("alpha");
    const running = service.run();
    await sees(page, `${row("alpha")} [data-state=RUNNING].bar`);
    release();
    await running;
    await sees(page, `${row("alpha")} [data-state=SUCCEEDED].bar`);
    const [cookie, ...others] = await page.cookies();
    const { name, path, httpOnly, secure, sameSite, session } = cookie;
    const isSecure = scheme === "https";
    assert.deepEqual({ name, path, httpOnly, secure, sameSite, session, others }, {
      name: `${isSecure ? "__Host-" : ""}orc-${new URL(service.url).port}`, path: "/", httpOnly: true, secure: isSecure,
      sameSite: "Strict", session: true, others: [],
    });
    assert.equal(await page.evaluate(() => document.cookie), "");

    // A page of the same host gets the cookie sent with its form, and one of another host does not.
    for (const host of ["127.0.0.1", "localhost"]) {
      for (const form of ["login", "logout"]) {
        const foreign = await browser.visit(`http://${host}:${await foreignForm(t, `${service.url}/${form}`)}/`);
        const [answer] = await Promise.all([foreign.waitForNavigation(), foreign.click("button")]);
        assert.equal(answer.status(), 403, `${form} from ${host}`);
      }
    }
    // The browser does not send the cookie to the first page after a link of another site.
    const linked = await browser.visit(`http://localhost:${await foreignForm(t, `${service.url}/`)}/`);
    await Promise.all([linked.waitForNavigation(), linked.click("a")]);
    await says(linked, "h1", "Log in");
    await linked.click("main a");
    await linked.waitForSelector("#connection[data-connection=open]");
    const other = await browser.open(`${service.url}/#/cycles`);
    await sees(other, 'main tr[data-key="1"]');
    await page.bringToFront();
    await page.waitForSelector("#connection[data-connection=open]");

    await page.click("#logout button");
    await says(page, "h1", "Log in");
    assert.deepEqual(await page.cookies(), []);
    await other.bringToFront();
    await says(other, "h1", "Log in");
    assert.deepEqual([...page.problems, ...other.problems].filter((text) => !/status of 401/.test(text)), []);
  });
}

test("a browser logs in with a JWT, and out", async (t) => {
  const secrets = new Secrets("wall");
  t.after(() => secrets.remove());
  const grant = '[[access.grants]]\nwho = ["jwt:anna"]\nrole = "viewer"\nsubsystems = ["*"]\n';
  const { service } = await stage(t, enforced(secrets) + grant + secrets.jwtSettings);
  const page = await browser.visit(service.url);
  await logIn(page, secrets.jwt("anna"));
  await says(page, "#access", "access: enforce · jwt:anna");
  await sees(page, "#logout");
  await Promise.all([page.waitForNavigation(), page.click("#logout button")]);
  await says(page, "h1", "Log in");
  assert.deepEqual(page.problems.filter((text) => !/status of 401/.test(text)), []);
});

test("a viewer sees everything but outputs and parameters, also beyond a limit of its requests", async (t) => {
  const secrets = new Secrets("wall", "ops");
  t.after(() => secrets.remove());
  const { fleet, service } = await stage(t, `${enforced(secrets)}[limits]\nhistory_reads = 1\n`);
  service.token = secrets.token("ops");
  const inputs = ["a", "b", "c", "d", "e", "f"];
  for (const name of inputs) await service.register(fleet, name);
  await service.register(fleet, "last", { reads: inputs, parameters: struct({ key: "hidden" }) });
  await service.run();
  await service.run({ subsystems: ["last"] });
  const page = await browser.visit(`${service.url}/#/cycles/2/last`);
  await logIn(page, secrets.token("wall"));
  await page.waitForFunction((count) => document.querySelectorAll("main .state[data-state=STALE]").length === count, {}, inputs.length);
  await says(page, "main", "Only operators see its latest output here.");
  await show(page, "#/subsystems/last");
  await says(page, "main", "Only operators see it here.");
  await says(page, "main", "Only its owner and operators see its parameters.");
  assert.equal(await page.$eval("main", (main) => main.textContent.includes("hidden")), false);
  assert.deepEqual(page.problems.filter((text) => !/status of 429/.test(text)), []);

  await Promise.all([page.waitForNavigation(), page.click("#logout button")]);
  await logIn(page, secrets.token("ops"));
  await show(page, "#/subsystems/last");
  await says(page, "main .json", "hidden");
});

test("those who may list audit events see them, and others are not offered the view", async (t) => {
  const secrets = new Secrets("wall", "part", "audit", "ops");
  t.after(() => secrets.remove());
  const { fleet, service } = await stage(t, enforced(secrets));
  service.token = secrets.token("ops");
  await service.register(fleet, "alpha");
  const page = await browser.visit(service.url);
  for (const name of ["wall", "part"]) {
    await logIn(page, secrets.token(name));
    await says(page, "#access", `token:${name}`);
    assert.equal(await page.$eval("#audit", (item) => item.hidden), true, name);
    await show(page, "#/audit");
    await says(page, "main .problem", `token:${name} may not call ListAuditEvents`);
    await Promise.all([page.waitForNavigation(), page.click("#logout button")]);
  }

  await logIn(page, secrets.token("audit"));
  await sees(page, "#audit");
  await page.keyboard.press("6");
  await says(page, "h1", "Audit");
  await says(page, ".audit tr", "RegisterSubsystem");
  // The dashboard's own reads have events as well.
  await page.select("#show", "changes");
  await says(page, "main .summary", "1 event, newest first.");
  // New events appear by themselves.
  await service.run();
  await says(page, ".audit tr", "RunCycle");
  const cells = await page.$$eval(".audit tbody tr", (rows) => rows.map((row) => [...row.cells].slice(1).map((cell) => cell.textContent)));
  assert.deepEqual(cells, [
    ["token:ops", "127.0.0.1", "RunCycle", "*", "1", "allowed", "OK", "1"],
    ["token:ops", "127.0.0.1", "RegisterSubsystem", "alpha", "–", "allowed", "OK", "1"],
  ]);
  assert.deepEqual(page.problems.filter((text) => !/status of 40[13]/.test(text)), []);
});

test("audit events can be filtered and read page by page", async (t) => {
  const secrets = new Secrets("wall", "ops");
  t.after(() => secrets.remove());
  const { fleet, service } = await stage(t, enforced(secrets).replace('"enforce"', '"dry_run"') + secrets.jwtSettings);
  // Names in JWTs have no spaces.
  const attack = "<svg/onload=window.harmed=1>";
  const register = async (token, phase) => {
    service.token = token;
    await service.register(fleet, "alpha", { phase });
  };
  await register(secrets.jwt(attack), 100);
  for (let phase = 0; phase < 55; phase += 1) await register(secrets.token("ops"), phase);
  // The reads of this page would be denied as well.
  const page = await browser.open(`${service.url}/#/audit?show=changes`);
  const areShown = (count) => page.waitForFunction((count) => document.querySelectorAll(".audit tbody tr").length === count, {}, count);
  await says(page, "main .summary", "50 events, newest first; there are more.");
  await page.keyboard.press("]");
  await areShown(6);
  await page.reload();
  await areShown(6);
  await page.keyboard.press("[");
  await areShown(50);
  await page.select("#show", "denied");
  await page.waitForFunction(() => {
    const rows = [...document.querySelectorAll(".audit tbody tr")];
    return rows.length > 0 && rows.every((row) => row.textContent.includes("would be denied"));
  });
  assert.match(page.url(), /show=denied/);
  // The caller of an event is a link to all of its events. This one is the oldest.
  await (await page.waitForSelector(".audit tr:last-child td a")).click();
  await says(page, "main .summary", "1 event, newest first.");
  await areShown(1);
  await says(page, ".audit a", `jwt:${attack}`);
  assert.equal(await page.$eval("#caller", (field) => field.value), `jwt:${attack}`);
  assert.deepEqual(await page.evaluate(() => ["harmed" in window, document.querySelectorAll("main [onload]").length]), [false, 0]);
  assert.deepEqual(page.problems, []);
});

test("the mode of access control is shown", async (t) => {
  const { service } = await stage(t);
  const page = await browser.open(service.url);
  await says(page, "#access", "access: off");
  assert.equal(await page.$eval("#logout", (form) => form.hidden), true);
  assert.equal(await page.$eval("#insecure", (banner) => banner.hidden), true);

  const { service: exposed } = await stage(t, '[access]\nmode = "dry_run"\n[server]\ninsecure_listen_beyond_loopback = true\n');
  const other = await browser.open(exposed.url);
  await says(other, "#access", "access: dry_run · nobody");
  await sees(other, "#insecure");
  await says(other, "#insecure", "Other machines may be able to use this service without any right");
  assert.deepEqual(await inaccessible(other), []);
  assert.deepEqual([...page.problems, ...other.problems], []);
});

test("expected subsystems that are not registered are named", async (t) => {
  const { service } = await stage(t, '[registry]\nexpected = ["b", "a"]\n');
  const page = await browser.open(service.url);
  await says(page, "#missing", "Expected, but not registered: a, b");
  assert.deepEqual(await inaccessible(page), []);
  assert.deepEqual(page.problems, []);
});

test("a replica that can't lead is named, with the reason", async (t) => {
  const { service } = await stage(t);
  const page = await browser.open(service.url);
  await page.setRequestInterception(true);
  page.on("request", async (request) => {
    if (!request.url().includes("/api/status")) return request.continue();
    const answer = await (await fetch(request.url())).json();
    Object.assign(answer.status, { replica: { name: "b" }, unableToLead: "the key is missing" });
    return request.respond({ contentType: "application/json", body: JSON.stringify(answer) });
  });
  await page.reload();
  await says(page, "#unable-to-lead", "The replica b can't lead, and only follows until it can: the key is missing");
  assert.deepEqual(await inaccessible(page), []);
  assert.deepEqual(page.problems, []);
});

test("each empty view says that it is empty", async (t) => {
  const { service } = await stage(t);
  const page = await browser.open(service.url);
  for (const [hash, text] of [
    ["#/fleet", "No subsystem is registered."],
    ["#/live", "No cycle has run yet."],
    ["#/cycles", "No cycle is recorded."],
    ["#/cycles?state=FAILED", "No recorded cycle matches the filter."],
    ["#/plan", "No subsystem is registered."],
    ["#/loops", "No loops"],
    ["#/audit", "No event is recorded."],
    ["#/audit?show=denied", "No event matches the filter."],
  ]) {
    await show(page, hash);
    await says(page, "main .summary", text);
    // biome-ignore lint/performance/useDomNodeTextContent: only visible text counts
    const seen = await page.$eval("main", (main) => main.innerText);
    assert.ok(!seen.includes("…"), `${hash} still reads: ${seen}`);
    assert.equal(await page.$("main .graph"), null, hash);
  }
  assert.deepEqual(page.problems, []);
});

test("an unknown order of the fleet is replaced by the names", async (t) => {
  const { fleet, service } = await stage(t);
  for (const name of ["beta", "alpha"]) await service.register(fleet, name);
  const page = await browser.open(`${service.url}/#/fleet?sort=recent`);
  await sees(page, `${row("alpha")} + ${row("beta").replace("main ", "")}`);
  assert.deepEqual(page.problems, []);
});

test("a running cycle shows its progress, and its critical path at its end", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "first");
  await service.register(fleet, "second", { after: ["first"] });
  const releases = [fleet.hold("first"), fleet.hold("second")];
  const page = await browser.open(`${service.url}/#/live`);
  await says(page, "main .summary", "No cycle has run yet");

  const running = service.run();
  await sees(page, `${row("first")} [data-state=RUNNING].bar`);
  await sees(page, `${row("second")} .state[data-state=WAITING]`);
  // The bar of a running subsystem grows by itself, without an event.
  const lasted = `${row("first")} td:nth-child(5)`;
  const early = await page.$eval(lasted, (cell) => cell.textContent);
  await page.waitForFunction((selector, early) => document.querySelector(selector).textContent !== early, {}, lasted, early);
  releases[0]();
  await sees(page, `${row("first")} [data-state=SUCCEEDED].bar`);
  await sees(page, `${row("second")} [data-state=RUNNING].bar`);
  assert.equal(await page.$eval("progress", (bar) => bar.value), 1);
  releases[1]();
  await running;
  await sees(page, `${row("second")}.critical .critical-mark`);
  await says(page, ".headline .state", "succeeded");
  assert.equal(await page.$$eval("main tr.critical", (all) => all.length), 2);
  assert.deepEqual(page.problems, []);
});

test("a page opened during a cycle shows its current state", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "first");
  await service.register(fleet, "second", { after: ["first"] });
  const release = fleet.hold("second");
  const running = service.run();
  const page = await browser.open(`${service.url}/#/live`);
  await sees(page, `${row("second")} [data-state=RUNNING].bar`);
  await sees(page, `${row("first")} .state[data-state=SUCCEEDED]`);
  const waiting = service.run();
  await says(page, "#waiting", "Cycle 2, manual, has waited");
  await says(page, "#waiting", "for cycle 1 (all subsystems)");

  // A held cycle stays, even when another one starts.
  await page.click("#hold");
  release();
  await running;
  await waiting;
  await page.waitForSelector("#waiting", { hidden: true });
  await says(page, "main .summary", "held");
  await says(page, ".cycle-name", "Cycle 1");
  await page.click("#hold");
  await says(page, ".cycle-name", "Cycle 2");
  assert.deepEqual(page.problems, []);
});

test("cycles that run at the same time are listed, and one of them is shown", async (t) => {
  const { service } = await stage(t);
  const page = await browser.open(`${service.url}/#/live`, { events: "scripted" });
  const starts = (cycleId, loop, subsystems) =>
    happens(page, "started", { cycleId, startedAt: new Date().toISOString(), trigger: "TRIGGER_LOOP", loop, subsystems });
  const moves = (cycleId, name, state) =>
    happens(page, "progress", { cycleId, updates: [{ name, state: `SUBSYSTEM_STATE_${state}`, elapsedMs: 5 }] });
  const ends = (cycleId, revision, loop, subsystems) => happens(page, "recorded", {
    cycleId, revision, loop, state: "CYCLE_STATE_SUCCEEDED", trigger: "TRIGGER_LOOP",
    startedAt: new Date().toISOString(), finishedAt: new Date().toISOString(), durationMs: 9,
    subsystems: subsystems.map((name) => ({ name, state: "SUBSYSTEM_STATE_SUCCEEDED", startedAt: new Date().toISOString(), durationMs: 5 })),
  });
  const chip = (id) => `#running [data-key="${id}"]`;

  await starts("8", "fast", ["gamma"]);
  await says(page, ".cycle-name", "Cycle 8");
  // It has waited, and starts later.
  await starts("7", "slow", ["alpha", "beta"]);
  await moves("8", "gamma", "RUNNING");
  await moves("7", "alpha", "RUNNING");
  await moves("7", "alpha", "FAILED");
  await sees(page, chip("8"));
  await says(page, chip("7"), "Cycle 7, loop slow1 of 2");
  assert.deepEqual(await page.$$eval("#running .chip", (all) => all.map((one) => one.dataset.key)), ["7", "8"]);
  // The shown cycle stays while it runs.
  await says(page, ".cycle-name", "Cycle 8");
  await sees(page, `${row("gamma")} [data-state=RUNNING].bar`);
  assert.equal(await page.$(row("alpha")), null);
  await page.click(chip("7"));
  await says(page, ".cycle-name", "Cycle 7");
  await sees(page, `${row("alpha")} .state[data-state=FAILED]`);
  await sees(page, `${row("beta")} .state[data-state=WAITING]`);
  await sees(page, `${chip("7")}[aria-pressed=true]`);
  assert.deepEqual(await inaccessible(page), []);

  // The later cycle ends first. The other one keeps its progress.
  await ends("8", "1", "fast", ["gamma"]);
  await page.waitForSelector("#running", { hidden: true });
  await sees(page, `${row("alpha")} .state[data-state=FAILED]`);
  await starts("9", "fast", ["gamma"]);
  await sees(page, chip("9"));
  await show(page, "#/fleet");
  await says(page, ".facts", "Running2 cycles, 1 of 3");
  await says(page, ".facts", "Cycles1");
  await ends("7", "2", "slow", ["alpha", "beta"]);
  await says(page, ".facts", "Runningcycle 9, 0 of 1");
  await says(page, ".facts", "Cycles2");
  await show(page, "#/live");
  await says(page, ".cycle-name", "Cycle 9");
  await ends("9", "3", "fast", ["gamma"]);
  await says(page, ".headline .state", "succeeded");
  await says(page, ".cycle-name", "Cycle 9");
  await show(page, "#/fleet");
  await says(page, ".facts", "Runningnone");

  // A subsystem is in one cycle at a time, so the earlier cycle has ended, although no event reported that.
  await starts("10", "fast", ["gamma"]);
  await starts("11", "slow", ["alpha", "beta"]);
  await starts("12", "fast", ["gamma"]);
  await says(page, ".facts", "Running2 cycles, 0 of 3");
  assert.deepEqual(page.problems, []);
});

test("every view shows a failed subsystem", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "sound");
  await service.register(fleet, "broken");
  await service.register(fleet, "hungry", { requires: ["broken"] });
  const page = await browser.open(service.url);
  await sees(page, row("broken"));
  await service.run();
  await says(page, `${row("broken")} .state`, "succeeded");
  fleet.script("broken", () => {
    throw failure("the disk is gone");
  });
  await service.run();
  await says(page, `${row("broken")} .state`, "failed");
  await says(page, `${row("broken")} .reason`, "INTERNAL: the disk is gone");
  await says(page, `${row("hungry")} .reason`, "which did not succeed");
  await says(page, `${row("broken")} [data-freshness]`, "stale");
  await says(page, "main .summary", "2 failed");
  // The two are distinguished, and add up.
  await says(page, ".chip[data-state=FAILED]", "failed1");
  await says(page, ".chip[data-state=SKIPPED_FOR_A_FAILURE]", "skipped for a failure1");
  await sees(page, 'main .stacked[aria-label="Last parts: 1 failed, 1 skipped for a failure, 1 succeeded"]');

  // The list is filtered, and the filter is in the address.
  await page.click(".chip[data-state=FAILED]");
  await page.waitForFunction(() => document.querySelectorAll("main tbody tr").length === 1);
  assert.match(page.url(), /#\/fleet\?state=FAILED$/);

  await show(page, "#/cycles");
  await says(page, 'main tr[data-key="2"].failed', "INTERNAL: the disk is gone");
  await sees(page, 'main tr[data-key="2"] .stacked [data-state=SKIPPED_FOR_A_FAILURE]');
  await sees(page, ".chart .mark[data-state=DEGRADED]");
  await show(page, "#/cycles/2");
  await says(page, ".failures", "INTERNAL: the disk is gone");
  await sees(page, `${row("broken")}.failed`);
  await show(page, "#/cycles/2/broken");
  await says(page, ".problem", "the disk is gone");
  await says(page, "main", "It made no output in this cycle. Its latest output, of cycle 1:");
  await show(page, "#/cycles/2/hungry");
  await says(page, "main table tbody tr", "brokenrequiresabsent");

  // The plan shows subsystems that can't run, with the reason.
  await service.register(fleet, "lonely", { requires: ["nobody"] });
  await show(page, "#/plan");
  await says(page, row("lonely"), "will be skipped: it requires nobody, which is not registered");
  assert.deepEqual(page.problems, []);
});

test("the outputs of a cycle, and their changes", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "maker", { recordOutput: true });
  await service.register(fleet, "reader", { after: ["maker"], reads: ["nobody"] });
  for (const level of [1, 2]) {
    fleet.script("maker", () => ({
      output: struct({ level, same: true, list: [1, level], ...(level === 2 && { added: "x" }) }),
      metrics: { load: level / 4 },
      issues: [{ severity: "SEVERITY_ERROR", code: "LATE", message: "a feed is late" }],
    }));
    await service.run();
  }
  const page = await browser.open(`${service.url}/#/cycles/2/maker`);
  await says(page, ".json", '"level": 2');
  await says(page, ".diff caption", "3 values differ");
  assert.deepEqual(await page.$$eval(".diff tbody tr", (rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)).sort()),
    [["added", "none", '"x"'], ["level", "1", "2"], ["list[1]", "1", "2"]]);
  await says(page, "main table", "load");
  await says(page, "main table", "a feed is late");
  await show(page, "#/cycles/1/maker");
  await says(page, "main", "It has no previous output");
  await show(page, "#/cycles/1/reader");
  await says(page, "main", "The output is not in the record");
  await says(page, "main table tbody tr", "makerafterfreshcycle 1");
  await says(page, "main table tbody tr", "nobodyreadsabsent");
  await says(page, "main details", '"level": 1');
  await show(page, "#/subsystems/maker");
  await says(page, ".json", '"level": 2');
  await (await sees(page, "main button")).click();
  await says(page, ".json", "at work");
  assert.deepEqual(page.problems, []);
});

test("the ticks of a loop add up", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "slow");
  const release = fleet.hold("slow");
  const page = await browser.open(`${service.url}/#/loops`);
  await says(page, "main .summary", "No loops");
  await service.call("StartIntervalLoop", { loop: { name: "quick", interval: { nanos: 50_000_000 } } });
  // The first cycle holds; the ticks after it are skipped.
  await page.waitForFunction(() => Number(document.querySelector("[data-tick=skipped] td")?.textContent) > 2);
  await sees(page, ".not-run tbody tr");
  release();
  await page.waitForFunction(() => Number(document.querySelector("[data-tick=ran] td")?.textContent) > 2);
  const [due, ...ends] = await page.$eval(".equation", (line) => line.textContent.replaceAll(",", "").match(/\d+/g).map(Number));
  assert.equal(due, ends.reduce((sum, end) => sum + end, 0));
  await service.call("PauseIntervalLoops", { all: true });
  await says(page, "#paused", "All loops are paused");
  await says(page, "article .state", "paused");
  await service.call("ResumeIntervalLoops", { all: true });
  await says(page, "article .state", "on");
  await page.waitForFunction(() => document.querySelector("#paused").hidden);
  await service.call("StopIntervalLoop", { name: "quick" });
  assert.deepEqual(page.problems, []);
});

test("a page reconnects to a service that was killed and restarted", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "steady");
  await service.run();
  const page = await browser.open(service.url);
  await sees(page, row("steady"));
  const release = fleet.hold("steady");
  const interrupted = service.run().catch(() => {});
  await says(page, ".facts", "cycle 2, 0 of 1");
  await service.kill();
  await interrupted;
  await sees(page, "#connection[data-connection=lost]");
  await says(page, "#connection", "Connection lost, reconnecting");
  await says(page, "#announcer", "Connection lost");
  // The last known state stays visible.
  await says(page, `${row("steady")} .state`, "succeeded");
  release();
  await service.restart();
  await sees(page, "#connection[data-connection=open]");
  // Its last part is restored from the record.
  await says(page, `${row("steady")} .state`, "succeeded");
  const { status } = await (await fetch(new URL("/api/status", service.url))).json();
  await says(page, ".facts", `Epoch${status.epoch}`);

  // A view that is opened while the service is down is shown as soon as it is up again.
  await service.kill();
  await sees(page, "#connection[data-connection=lost]");
  await show(page, "#/cycles/1/steady");
  await says(page, "main .summary", "Reading the record");
  await service.restart();
  await says(page, "main", "still the latest known output");

  // The same while the history is shown.
  await show(page, "#/cycles");
  await says(page, 'main tr[data-key="2"]', "interrupted");
  await service.kill();
  await sees(page, "#connection[data-connection=lost]");
  await service.restart();
  await sees(page, "#connection[data-connection=open]");
  await service.run();
  await says(page, 'main tr[data-key="3"]', "succeeded");
  // The browser itself reports that a connection broke, or was refused.
  assert.deepEqual(page.problems.filter((text) => !/net::ERR_(CONNECTION|INCOMPLETE|EMPTY)/.test(text)), []);
});

test("unreadable records are marked, and the others are shown", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "steady");
  for (let i = 0; i < 4; i += 1) await service.run();
  for (const cycleId of [2, 3]) service.damageRecord(cycleId);
  const page = await browser.open(`${service.url}/#/cycles`);
  await says(page, 'main tr[data-key="3"]', "unreadable");
  await says(page, 'main tr[data-key="2"]', "unreadable");
  await says(page, 'main tr[data-key="1"]', "succeeded");
  assert.deepEqual(await page.$$eval("main tbody th", (all) => all.map((one) => one.textContent)), ["4", "3", "2", "1"]);
  await says(page, "main .summary", "4 cycles, newest first: The records of 2 are damaged and can't be read.");
  await says(page, "figcaption", "none of 4 did not succeed");
  await show(page, "#/fleet");
  await sees(page, `${row("steady")} .ticks[title="2 of 2 succeeded; 2 records can't be read"]`);
  await show(page, "#/subsystems/steady");
  await says(page, "main .problem", "cycle 3, cycle 2");
  await show(page, "#/cycles/3");
  await says(page, "main .problem", "can't be read");
  assert.deepEqual(await inaccessible(page), []);
  assert.deepEqual(page.problems.filter((text) => !/status of 500/.test(text)), []);
});

test("an error of the store is shown until the store can be written again", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "alpha");
  await service.run();
  const page = await browser.open(service.url);
  await sees(page, row("alpha"));
  const release = fleet.hold("alpha");
  const refused = assert.rejects(service.run(), /the store is not available now/);
  await says(page, ".facts", "cycle 2, 0 of 1");
  const putBack = service.moveDatabaseAway();
  release();
  await refused;
  await sees(page, "#store-error");
  await says(page, "#store-error", "The store can't be written, and no cycle starts until it can: ");
  assert.equal(await page.$eval("#store-error", (banner) => banner.getAttribute("role")), "alert");
  assert.deepEqual(await inaccessible(page), []);
  // The error stays visible in all views, and so does the last known state.
  await show(page, "#/cycles");
  await says(page, 'main tr[data-key="1"]', "succeeded");
  await sees(page, "#store-error");
  putBack();
  await page.waitForSelector("#store-error", { hidden: true });
  await says(page, 'main tr[data-key="2"]', "succeeded");
  assert.deepEqual(page.problems, []);
});

test("a cycle that is recorded while the recent ones are read counts once", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "alpha");
  await service.run();
  const page = await browser.open(service.url);
  await says(page, `${row("alpha")} td a`, "cycle 1");
  for (const isAnsweredBefore of [true, false]) {
    let answer;
    const asked = new Promise((done) => (answer = done));
    await page.setRequestInterception(true);
    const hold = (request) => (request.url().includes("/api/cycles") ? answer(request) : request.continue());
    page.on("request", hold);
    await service.kill();
    await sees(page, "#connection[data-connection=lost]");
    await service.restart();
    const request = await asked;
    const read = async () => ({ contentType: "application/json", body: await (await fetch(`${new URL(new URL(request.url()).pathname, service.url)}?pageSize=30`)).text() });
    const early = isAnsweredBefore && await read();
    const { cycleId } = await service.run();
    await says(page, `${row("alpha")} td a`, `cycle ${cycleId}`);
    await request.respond(early || await read());
    page.off("request", hold);
    await page.setRequestInterception(false);
    await sees(page, "#connection[data-connection=open]");
    await page.waitForSelector(`${row("alpha")} .ticks[title="${cycleId} of ${cycleId} succeeded"]`);
  }
});

test("moving rows keep the focus", async (t) => {
  const { fleet, service } = await stage(t);
  for (const name of ["first", "second", "last"]) await service.register(fleet, name, name === "last" ? { after: ["first", "second"] } : {});
  // The two change places with every cycle: in the fleet by their durations, and in the plan on its critical path.
  const slow = async (name) => {
    for (const other of ["first", "second"]) {
      fleet.script(other, async ({ cycleId }) => {
        if (other === name) await new Promise((done) => setTimeout(done, 150));
        return { output: struct({ cycle: cycleId }) };
      });
    }
    return (await service.run()).cycleId;
  };
  await slow("first");
  const page = await browser.open(`${service.url}/#/fleet?sort=duration`);
  const leads = (selector, name) => page.waitForFunction((selector, name) => document.querySelector(selector)?.textContent.startsWith(name), {}, selector, name);
  const focused = () => page.evaluate(() => document.activeElement.textContent);
  for (const [at, name] of [["main tbody tr th", "first"], ["main tbody tr th", "second"]]) {
    await slow(name);
    await leads(at, name);
    await page.focus(`${row("first")} a`);
    await slow(name === "first" ? "second" : "first");
    await leads(at, name === "first" ? "second" : "first");
    assert.equal(await focused(), "first");
  }

  await show(page, "#/plan");
  await leads(".node[data-critical]", "first");
  await page.focus(".node");
  await says(page, ".readout", "first: ");
  for (let i = 0; i < 8; i += 1) await slow("second");
  await leads(".node[data-critical]", "second");
  assert.match(await focused(), /^first/);
  await says(page, ".readout", "first: ");
  assert.deepEqual(page.problems, []);
});

test("a chosen theme takes precedence over that of the system", async (t) => {
  const { service } = await stage(t);
  for (const theme of ["light", "dark"]) {
    const page = await browser.open(service.url, { theme });
    const shown = () => page.evaluate(() => [document.documentElement, document.querySelector("header")].map((one) => getComputedStyle(one).backgroundColor));
    const grounds = { light: ["rgb(246, 247, 249)", "rgb(255, 255, 255)"], dark: ["rgb(15, 19, 24)", "rgb(23, 28, 35)"] };
    for (const [chosen, expected] of [["auto", theme], ["light", "light"], ["dark", "dark"], ["auto", theme]]) {
      assert.equal(await page.$eval("#theme", (button) => button.textContent), `Theme: ${chosen}`);
      assert.deepEqual(await shown(), grounds[expected], `${chosen} on ${theme}`);
      if (chosen !== "auto" || expected === theme) await page.keyboard.press("t");
    }
    // Restores the default, for later pages.
    await page.evaluate(() => localStorage.clear());
    await page.close();
  }
});

test("a hidden page disconnects, and is up to date once it is shown", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "alpha");
  const page = await browser.open(`${service.url}/#/cycles`);
  await says(page, "main .summary", "No cycle is recorded");
  const other = await browser.open(service.url);
  await says(other, ".facts", "Watchers1");
  await service.run();
  await page.bringToFront();
  await sees(page, 'main tr[data-key="1"]');
  await sees(page, "#connection[data-connection=open]");
  assert.deepEqual([...page.problems, ...other.problems], []);
});

test("texts from subsystems have no effect", async (t) => {
  const attack = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script><style>*{display:none}</style>';
  const turned = "safe\u202egnp.exe\u0000\u0007\u200b\u2066\u3164\u{e0041}";
  const long = "M".repeat(5000);
  const { fleet, service } = await stage(t);
  const hostile = `${attack}${turned}${long}`;
  await service.register(fleet, "hostile", { recordOutput: true, parameters: struct({ [attack]: turned }) });
  await service.register(fleet, "failing", { after: ["hostile"] });
  fleet.script("hostile", ({ cycleId }) => ({
    output: struct({ [attack]: `${hostile}${cycleId}`, constructor: attack, ["__proto__"]: turned, [turned]: cycleId, javascript: "javascript:alert(1)" }),
    metrics: { '<b onclick="alert(1)">': 1 },
    issues: [{ severity: "SEVERITY_ERROR", code: `<script>alert(1)</script>${"C".repeat(100)}`, message: `${attack}${turned}${"m".repeat(1000)}` }],
  }));
  fleet.script("failing", () => {
    throw failure(`${attack}\u202e${long}`);
  });
  await service.run();
  await service.run({ requestId: attack });
  const page = await browser.open(service.url, { width: 390 });
  const before = await page.$$eval("head script", (all) => all.length);
  for (const [hash, selector, text] of [
    ["#/fleet", `${row("failing")} .reason`, "<img src=x"],
    ["#/live", row("failing"), "failed"],
    ["#/cycles", "main tr", "<img src=x"],
    ["#/cycles/2", ".failures", "<img src=x"],
    ["#/cycles/2/hostile", ".diff", "<img src=x"],
    ["#/cycles/2/hostile", "main", "safe\\u202egnp.exe\\u0000\\u0007\\u200b\\u2066\\u3164\\u{e0041}"],
    ["#/cycles/2/hostile", "main table", "<b onclick"],
    ["#/cycles/2/failing", ".problem", "<img src=x"],
    ["#/subsystems/hostile", ".json", "<img src=x"],
    ["#/plan", ".node", "hostile"],
    [`#/audit?caller=${encodeURIComponent(attack)}&show=${encodeURIComponent(attack)}`, "main .summary", "No event matches"],
    [`#/subsystems/${encodeURIComponent(attack)}`, ".problem", "<img"],
    [`#/cycles/${encodeURIComponent(attack)}`, ".problem", "<img"],
    [`#/fleet?q=${encodeURIComponent(attack)}&state=${encodeURIComponent(attack)}`, ".empty", "No subsystem matches"],
    ["#/%E0%A4%A/%ff", "h1", "Fleet"],
  ]) {
    await show(page, hash);
    await says(page, selector, text);
    const seen = await page.evaluate(() => ({
      isHarmed: "harmed" in window,
      made: document.querySelectorAll("main img, main script, main style, main b, main iframe").length,
      handlers: [...document.querySelectorAll("main *")].filter((one) => one.getAttributeNames().some((name) => name.startsWith("on"))).length,
      links: [...document.querySelectorAll("main a[href]")].filter((one) => !one.getAttribute("href").startsWith("#/")).length,
      // biome-ignore lint/suspicious/noControlCharactersInRegex: these characters must be missing
      turned: /[\u0000\u202e\u2066\u200b\u3164\u{e0041}]/u.test(document.body.textContent),
      scrolls: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    }));
    assert.deepEqual(seen, { isHarmed: false, made: 0, handlers: 0, links: 0, turned: false, scrolls: false }, hash);
  }
  assert.equal(await page.$$eval("head script", (all) => all.length), before);
  // The message of an issue has enough space even beside a long code.
  await show(page, "#/cycles/2/hostile");
  await sees(page, ".issues .message");
  const share = await page.$eval(".issues .message", (cell) => cell.clientWidth / document.documentElement.clientWidth);
  assert.ok(share > 0.7, `${share} of the width`);
  // The service refuses a missing cycle and a missing subsystem, which the browser reports.
  assert.deepEqual(page.problems.filter((text) => !/status of 40[04]/.test(text)), []);
});

test("all controls can be reached by keyboard", async (t) => {
  const { fleet, service } = await stage(t);
  for (const name of ["beta", "alpha"]) await service.register(fleet, name);
  await service.run();
  const page = await browser.open(service.url);
  await sees(page, row("alpha"));
  const focused = () => page.evaluate(() => document.activeElement.textContent || document.activeElement.id);

  await page.keyboard.press("Tab");
  assert.equal(await focused(), "Skip to the content");
  await page.keyboard.press("Enter");
  assert.equal(await focused(), "Fleet");

  // From the top, every stop shows that it has the focus, and all controls are among the stops.
  await page.evaluate(() => {
    document.activeElement.blur();
    getSelection().removeAllRanges();
  });
  await page.reload();
  await sees(page, row("alpha"));
  const stops = [];
  for (;;) {
    await page.keyboard.press("Tab");
    const stop = await page.evaluate(() => {
      const it = document.activeElement;
      if (it === document.body) return null;
      const style = getComputedStyle(it);
      return { text: (it.getAttribute("aria-label") ?? it.textContent ?? "").trim() || it.id, isSeen: style.outlineStyle !== "none" && Number.parseFloat(style.outlineWidth) >= 2 };
    });
    if (!stop) break;
    stops.push(stop);
    assert.ok(stops.length < 80, "the focus never leaves the page");
  }
  assert.deepEqual(stops.filter((stop) => !stop.isSeen), []);
  const texts = stops.map((stop) => stop.text);
  for (const text of ["Fleet", "Live", "Cycles", "Plan", "Loops", "Theme: auto", "Keyboard shortcuts", "search", "alpha", "beta", "Duration", "cycle 1"]) {
    assert.ok(texts.includes(text), `${text} is not among ${texts.join(", ")}`);
  }

  for (const [key, heading] of [["2", "Live"], ["3", "Cycles"], ["4", "Plan"], ["5", "Loops"], ["1", "Fleet"]]) {
    await page.keyboard.press(key);
    await says(page, "h1", heading);
    // A screen reader continues from the new heading.
    assert.equal(await focused(), heading);
  }
  await page.keyboard.press("/");
  await page.keyboard.type("alp3?");
  assert.equal(await page.$eval("#search", (field) => field.value), "alp3?");
  await page.keyboard.press("Backspace");
  await page.keyboard.press("Backspace");
  await page.waitForFunction(() => document.querySelectorAll("main tbody tr").length === 1);
  await page.keyboard.press("Escape");
  await page.keyboard.press("?");
  await sees(page, "#help[open]");
  await page.keyboard.press("Escape");
  await page.waitForSelector("#help:not([open])");
  // The browser moves the focus out of a closed dialog a little later.
  await page.waitForFunction(() => !document.activeElement?.closest("dialog"));
  await page.keyboard.press("t");
  assert.equal(await page.evaluate(() => document.documentElement.dataset.theme), "light");

  await page.focus(`${row("alpha")} a`);
  await page.keyboard.press("Enter");
  await says(page, "h1", "alpha");
  await service.run();
  await show(page, "#/cycles/2");
  await sees(page, "[rel=prev]");
  assert.equal(await page.$("[rel=next]:not([hidden])"), null);
  await page.keyboard.press("[");
  await says(page, "h1", "Cycle 1");
  await sees(page, "[rel=next]");
  await page.keyboard.press("]");
  await says(page, "h1", "Cycle 2");
  // The next cycle has a link as soon as it is recorded.
  await service.run();
  await sees(page, "[rel=next]");
  assert.deepEqual(page.problems, []);
});

test("the history can be filtered and read page by page", async (t) => {
  const { fleet, service } = await stage(t);
  await service.register(fleet, "alpha");
  await service.register(fleet, "beta");
  for (let i = 0; i < 55; i += 1) await service.run({ subsystems: i % 10 === 0 ? ["beta"] : [] });
  const page = await browser.open(`${service.url}/#/cycles`);
  const ids = () => page.$$eval("main tbody th", (all) => all.map((one) => Number(one.textContent)));
  await sees(page, 'main tr[data-key="55"]');
  assert.equal((await ids()).length, 50);
  await page.keyboard.press("]");
  await sees(page, 'main tr[data-key="1"]');
  assert.deepEqual(await ids(), [5, 4, 3, 2, 1]);
  await page.reload();
  await sees(page, 'main tr[data-key="1"]');
  assert.deepEqual(await ids(), [5, 4, 3, 2, 1]);
  await page.keyboard.press("[");
  await sees(page, 'main tr[data-key="55"]');
  // The newest page grows by itself.
  await service.run();
  await sees(page, 'main tr[data-key="56"]');
  await page.type("#subsystem", "alpha");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => !document.querySelector('main tr[data-key="51"]'));
  assert.equal((await ids()).length, 50);
  assert.match(page.url(), /subsystem=alpha/);
  assert.deepEqual(page.problems, []);
});

test("10,000 subsystems stay usable", async (t) => {
  const SUBSYSTEMS = 10_000;
  /** Elements in the page: what is drawn is bounded, however many there are. */
  const NODES = 3000;
  const { fleet, service } = await stage(t, (fleet) => Array.from({ length: SUBSYSTEMS }, (_, i) =>
    `[[subsystems]]\nname = "s${i}"\nendpoint = "${fleet.endpoint}"\ntimeout = "300s"\n${i % 10 ? `after = ["s${i - 1}"]\n` : ""}`).join(""));
  fleet.script("s4321", () => {
    throw failure("one among many");
  });
  const page = await browser.open(service.url);
  await says(page, "main .summary", "10,000 subsystems: no subsystem has run");
  const isBounded = async () => {
    const nodes = await page.evaluate(() => document.querySelectorAll("*").length);
    assert.ok(nodes < NODES, `${nodes} elements at ${page.url()}`);
    return nodes;
  };
  await isBounded();

  // A cycle of a large fleet, watched while it runs.
  await show(page, "#/live");
  const release = fleet.hold("s9999");
  const running = service.run();
  await sees(page, ".levels tbody tr");
  await says(page, "main .summary", "9,999 of 10,000 subsystems ended");
  await isBounded();
  release();
  const cycle = await running;
  assert.equal(cycle.subsystems.length, SUBSYSTEMS);
  await says(page, ".headline .state", "degraded");
  await isBounded();
  await (await page.waitForSelector("::-p-xpath(//button[text()='failed'])")).click();
  await page.waitForFunction(() => document.querySelectorAll("main .gantt tbody tr").length === 1);
  await sees(page, `${row("s4321")}.failed`);

  await show(page, "#/fleet");
  await says(page, "main .summary", "10,000 subsystems: 1 failed");
  // Columns without values take no space in a large fleet.
  // biome-ignore lint/performance/useDomNodeTextContent: only visible text counts
  assert.ok(await page.$eval(".fleet thead", (head) => !head.innerText.includes("Recent cycles")));
  assert.equal(await page.$$eval("main tbody tr", (rows) => rows.length), 100);
  await page.keyboard.press("]");
  await says(page, ".pager", "101 to 200 of 10,000");
  await page.type("#search", "s777");
  await page.waitForFunction(() => document.querySelectorAll("main tbody tr").length === 11);
  await isBounded();

  for (const [hash, selector, text] of [
    ["#/cycles", 'main tr[data-key="1"]', "degraded"],
    ["#/cycles/1", ".levels caption", "By level"],
    ["#/cycles/1/s4321", ".problem", "one among many"],
    ["#/plan", ".levels tbody tr:last-child", "9"],
    ["#/subsystems/s4321", ".problem", "one among many"],
  ]) {
    await show(page, hash);
    await says(page, selector, text);
    t.diagnostic(`${hash}: ${await isBounded()} elements`);
  }
  assert.deepEqual(page.problems, []);
});

describe("for everyone: contrast, names, order, and no sideways scrolling", () => {
  let fleet;
  let service;

  before(async () => {
    fleet = await Fleet.start();
    service = await Service.start();
    const names = ["a-subsystem-with-quite-a-long-name-as-some-have", "beta", "gamma", "delta", "suspended", "late"];
    for (const [i, name] of names.entries()) {
      await service.register(fleet, name, { after: i ? [names[i - 1]] : [], phase: i > 2 ? 10 : 0, recordOutput: true, ...(name === "late" && { timeout: { nanos: 50_000_000 } }) });
    }
    await service.register(fleet, "needy", { phase: 10, requires: ["late"], reads: ["beta", "nobody"], recordOutput: true, breaker: { failureThreshold: 1 } });
    await service.call("SuspendSubsystem", { name: "suspended" });
    await service.call("StartIntervalLoop", { loop: { name: "daily", interval: { seconds: 86_400 } } });
    await service.run();
    await service.run({ recordOutputs: true });
    fleet.script("beta", () => ({ output: struct({ by: "beta", more: [1, 2, 3] }), metrics: { load: 0.5 }, issues: [{ code: "OLD", message: "a feed is old" }] }));
    fleet.script("gamma", () => {
      throw failure("it has no memory left, and this message explains the reason at length", 8);
    });
    fleet.hold("late");
    await service.run();
  });
  after(async () => {
    await service?.stop();
    fleet?.stop();
  });

  const VIEWS = {
    "#/fleet": ".fleet tbody tr.failed",
    "#/live": ".gantt tbody tr.failed",
    "#/cycles": ".cycles tbody tr.failed",
    "#/cycles/3": ".failures li",
    "#/cycles/3/beta": ".diff",
    "#/cycles/3/needy": "main table",
    "#/plan": ".graph .node",
    "#/loops": ".card",
    "#/audit": ".audit tbody tr",
    "#/subsystems/gamma": ".settings",
  };
  for (const theme of ["light", "dark"]) {
    for (const width of [1280, 390]) {
      test(`${theme}, ${width} wide`, async (t) => {
        const page = await browser.open(service.url, { theme, width });
        for (const [hash, selector] of Object.entries(VIEWS)) {
          await show(page, hash);
          await sees(page, selector);
          assert.deepEqual(await inaccessible(page), [], hash);
          const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
          assert.equal(wide, 0, `${hash} scrolls sideways`);
        }
        await page.keyboard.press("?");
        await sees(page, "#help[open]");
        assert.deepEqual(await inaccessible(page), [], "help");
        assert.deepEqual(page.problems, []);
        t.diagnostic(`${Object.keys(VIEWS).length + 1} views, nothing serious`);
        await page.close();
      });
    }
  }
});
