// The real service, a scripted fleet, and a real browser.

import { spawn, spawnSync } from "node:child_process";
import { generateKeyPairSync, sign } from "node:crypto";
import { once } from "node:events";
import { existsSync, mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { credentials, loadPackageDefinition, Metadata, Server, ServerCredentials, status } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import axe from "axe-core";
import puppeteer from "puppeteer-core";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const PROGRAM = process.env.ORCHESTRATOR ?? path.join(ROOT, process.env.CARGO_TARGET_DIR ?? "target", "debug", "orchestrator");
const CHROMIUM = [process.env.CHROMIUM, "/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"]
  .find((program) => program && existsSync(program));

/**
 * Most milliseconds for which a test waits for an event, and that a call of a subsystem and a cycle may take. It only
 * turns a hang into a failure, so it is long enough for a busy machine.
 */
const PATIENCE = 300_000;
const PATIENT = { seconds: PATIENCE / 1000 };

const { dreamnet } = loadPackageDefinition(loadSync(
  ["dreamnet/subsystem/v1/subsystem.proto", "dreamnet/orchestrator/v1/orchestrator.proto"],
  { includeDirs: [path.join(ROOT, "proto")], longs: Number, enums: String, defaults: true, oneofs: true },
));

// ----------------------------------------------------------------------------------------- the fleet

/** A JSON object as a `google.protobuf.Struct`. */
export function struct(object) {
  return { fields: Object.fromEntries(Object.entries(object).map(([key, each]) => [key, value(each)])) };
}

function value(of) {
  if (of === null) return { nullValue: "NULL_VALUE" };
  if (Array.isArray(of)) return { listValue: { values: of.map(value) } };
  if (typeof of === "object") return { structValue: struct(of) };
  return { [{ number: "numberValue", string: "stringValue", boolean: "boolValue" }[typeof of]]: of };
}

/** Subsystems behind one port. Each follows its script: a function that answers or throws. */
export class Fleet {
  scripts = new Map();
  #server = new Server();

  static async start() {
    const fleet = new Fleet();
    fleet.#server.addService(dreamnet.subsystem.v1.Subsystem.service, {
      Initialize: (_, answer) => answer({ code: status.UNIMPLEMENTED }),
      GetStatus: (_, answer) => answer(null, { status: struct({ state: "at work" }) }),
      RunCycle: async ({ request }, answer) => {
        try {
          answer(null, await (fleet.scripts.get(request.subsystem) ?? echo)(request));
        } catch (error) {
          answer({ code: error.code ?? status.INTERNAL, message: error.message });
        }
      },
    });
    const port = await new Promise((done, fail) =>
      fleet.#server.bindAsync("127.0.0.1:0", ServerCredentials.createInsecure(), (error, port) => (error ? fail(error) : done(port))));
    fleet.endpoint = `http://127.0.0.1:${port}`;
    return fleet;
  }

  /** Sets the script of a subsystem. */
  script(name, run) {
    this.scripts.set(name, run);
  }

  /** From now on, a subsystem does not answer until the returned function is called. */
  hold(name) {
    let release;
    const held = new Promise((done) => (release = done));
    this.script(name, async (request) => {
      await held;
      return echo(request);
    });
    return release;
  }

  stop() {
    this.#server.forceShutdown();
  }
}

function echo(request) {
  return { output: struct({ by: request.subsystem, cycle: request.cycleId }) };
}

/** An error that a script throws to fail. */
export function failure(message, code = status.INTERNAL) {
  return Object.assign(new Error(message), { code });
}

// --------------------------------------------------------------------------------------- the service

/** Runs a command of the service to its end. Returns its output. */
function command(...args) {
  const { status, stdout, stderr } = spawnSync(PROGRAM, args, { encoding: "utf8" });
  if (status !== 0) throw new Error(`orchestrator ${args.join(" ")}: ${stderr}`);
  return stdout;
}

/** Certificates of the service, a file with a token for each name, and a key that signs JWTs. */
export class Secrets {
  directory = mkdtempSync(path.join(tmpdir(), "secrets-"));
  tokensFile = path.join(this.directory, "tokens.toml");
  #texts = new Map();
  #signing = generateKeyPairSync("ed25519");

  constructor(...names) {
    const keys = [this.#signing.publicKey.export({ format: "jwk" })];
    writeFileSync(path.join(this.directory, "jwks.json"), JSON.stringify({ keys }));
    command("certs", "init", "--dir", path.join(this.directory, "pki"), "--host", "127.0.0.1");
    for (const name of names) {
      const [text] = /orc_\S+/.exec(command("token", "create", name, "--file", this.tokensFile)) ?? [];
      this.#texts.set(name, text);
    }
  }

  /** The token of this name. */
  token(name) {
    return this.#texts.get(name);
  }

  /** A JWT of this subject. */
  jwt(sub) {
    const part = (json) => Buffer.from(JSON.stringify(json)).toString("base64url");
    const claims = { iss: "tests", aud: "dashboard", sub, exp: Math.floor(Date.now() / 1000) + 3600 };
    const signed = `${part({ alg: "EdDSA" })}.${part(claims)}`;
    return `${signed}.${sign(null, Buffer.from(signed), this.#signing.privateKey).toString("base64url")}`;
  }

  /** The section of the configuration that accepts its JWTs. */
  get jwtSettings() {
    return `[access.jwt]\nissuer = "tests"\naudience = "dashboard"\njwks_file = "${this.directory}/jwks.json"\n`;
  }

  /** The keys of a section of TLS. */
  get tls() {
    const core = path.join(this.directory, "pki", "core");
    return `cert_file = "${core}/cert.pem"\nkey_file = "${core}/key.pem"\n`;
  }

  remove() {
    rmSync(this.directory, { recursive: true });
  }
}

/** The service, with a client. It keeps its record and its admin address through restarts. */
export class Service {
  /** The token of its client, if it needs one. */
  token = "";
  #home = mkdtempSync(path.join(tmpdir(), "dashboard-"));
  #config;
  #admin = "127.0.0.1:0";
  #child;
  #client;

  static async start(config = "") {
    const service = new Service();
    service.#config = path.join(service.#home, "orchestrator.toml");
    writeFileSync(service.#config, config);
    await service.restart();
    return service;
  }

  get #database() {
    return path.join(this.#home, "o.db");
  }

  /** Moves the database away under the running service; the returned function moves it back. */
  moveDatabaseAway() {
    const files = ["", "-wal", "-shm"].map((suffix) => this.#database + suffix).filter((file) => existsSync(file));
    for (const file of files) renameSync(file, `${file}.away`);
    return () => {
      for (const file of files) renameSync(`${file}.away`, file);
    };
  }

  /** Damages the record of a cycle in the database. */
  damageRecord(cycleId) {
    const script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute(\"UPDATE cycles SET record = x'ff' WHERE cycle_id = ?\", [sys.argv[2]]); db.commit()";
    const { status, stderr } = spawnSync("python3", ["-c", script, this.#database, String(cycleId)], { encoding: "utf8" });
    if (status !== 0) throw new Error(`can't damage a record: ${stderr}`);
  }

  async restart() {
    this.#child = spawn(PROGRAM, [
      "serve", "--listen", "127.0.0.1:0", "--admin-listen", this.#admin,
      "--store", `sqlite:${this.#database}`, "--config", this.#config, "--log-filter", "warn",
    ], { stdio: ["ignore", "pipe", "inherit"] });
    const lines = createInterface({ input: this.#child.stdout })[Symbol.asyncIterator]();
    const address = await named(lines, /^listening on (.+)$/);
    this.url = await named(lines, /^dashboard at (.+)\/$/);
    this.#admin = new URL(this.url).host;
    this.#client?.close();
    this.#client = new dreamnet.orchestrator.v1.Orchestrator(address, credentials.createInsecure(),
      { "grpc.max_receive_message_length": 64 << 20 });
  }

  /** Kills it with SIGKILL. */
  async kill() {
    this.#child.kill("SIGKILL");
    await once(this.#child, "exit");
  }

  async stop() {
    if (this.#child.exitCode === null && this.#child.signalCode === null) await this.kill();
    this.#client.close();
    rmSync(this.#home, { recursive: true });
  }

  call(method, request = {}) {
    const metadata = new Metadata();
    if (this.token) metadata.set("authorization", `Bearer ${this.token}`);
    return new Promise((done, fail) =>
      this.#client[method](request, metadata, { deadline: Date.now() + PATIENCE }, (error, answer) => (error ? fail(error) : done(answer))));
  }

  register(fleet, name, registration = {}) {
    return this.call("RegisterSubsystem", { registration: { name, endpoint: fleet.endpoint, timeout: PATIENT, ...registration } });
  }

  async run(request = {}) {
    return (await this.call("RunCycle", { deadline: PATIENT, ...request })).telemetry;
  }
}

async function named(lines, pattern) {
  const { value: line } = await lines.next();
  const [, found] = pattern.exec(line ?? "") ?? [];
  if (!found) throw new Error(`the service printed ${line}`);
  return found;
}

// --------------------------------------------------------------------------------------- the browser

/** A browser whose pages collect all errors. */
export class Browser {
  #browser;

  static async start() {
    if (!CHROMIUM) throw new Error("Chromium is missing; install Debian's chromium, or name one in CHROMIUM");
    const browser = new Browser();
    const isRoot = process.getuid() === 0;
    browser.#browser = await puppeteer.launch({ executablePath: CHROMIUM, acceptInsecureCerts: true, timeout: PATIENCE, protocolTimeout: PATIENCE, args: isRoot ? ["--no-sandbox"] : [] });
    return browser;
  }

  stop() {
    return this.#browser.close();
  }

  /** Closes the pages of a test. */
  async closePages() {
    const [, ...pages] = await this.#browser.pages();
    await Promise.all(pages.map((page) => page.close()));
  }

  /** A page at this address of the dashboard, once it is connected. */
  async open(url, options = {}) {
    const page = await this.visit(url, options);
    await page.waitForSelector("#connection[data-connection=open]");
    return page;
  }

  /** A page at this address. `page.problems` are errors on its console and broken policies. */
  async visit(url, { width = 1280, theme = "light", events = "of the service" } = {}) {
    const page = await this.#browser.newPage();
    page.setDefaultTimeout(PATIENCE);
    page.problems = [];
    page.on("console", (message) => ["error", "warn"].includes(message.type()) && page.problems.push(message.text()));
    page.on("pageerror", (error) => page.problems.push(error.message));
    page.on("dialog", (dialog) => {
      page.problems.push(`a dialog: ${dialog.message()}`);
      dialog.dismiss();
    });
    await page.evaluateOnNewDocument(() => {
      addEventListener("securitypolicyviolation", (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`));
    });
    if (events === "scripted") await page.evaluateOnNewDocument(scriptEvents);
    await page.setViewport({ width, height: 844 });
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: theme }]);
    await page.goto(url);
    return page;
  }
}

/** Runs in the page: its stream of events starts with a bookmark, and continues with the events of `happens`. */
function scriptEvents() {
  window.EventSource = class extends EventTarget {
    constructor() {
      super();
      window.happen = (name, data) => this.dispatchEvent(new MessageEvent(name, { data: JSON.stringify(data) }));
      queueMicrotask(() => window.happen("bookmark", { revision: "0", bookmark: {} }));
    }

    close() {}
  };
}

/** A site of someone else on this machine, with a link and a form to a URL. Returns its port. */
export async function foreignForm(t, url) {
  const form = `<!doctype html><form method="post" action="${url}"><button>Win</button></form><a href="${url}">Go</a>`;
  const server = createServer((_, answer) => answer.writeHead(200, { "content-type": "text/html" }).end(form));
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  t.after(() => server.close());
  return server.address().port;
}

/** Sends an event to a page whose events are scripted. */
export async function happens(page, name, event) {
  await page.evaluate((name, data) => window.happen(name, data), name, { [name]: event });
}

/** Shows another view. */
export async function show(page, hash) {
  await page.evaluate((hash) => (location.hash = hash), hash);
}

/** Waits until an element of this selector contains this text. */
export async function says(page, selector, text) {
  try {
    await page.waitForFunction((selector, text) => [...document.querySelectorAll(selector)].some((one) => one.textContent.includes(text)), {}, selector, text);
  } catch {
    const found = await page.$$eval(selector, (all) => all.map((one) => one.textContent.slice(0, 300)));
    throw new Error(`no ${selector} contains ${JSON.stringify(text)}, but: ${JSON.stringify(found.slice(0, 20))}`);
  }
}

/** The serious and critical findings of axe. */
export async function inaccessible(page) {
  await page.evaluate(axe.source);
  const { violations } = await page.evaluate(() => axe.run());
  return violations.filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map((node) => `${node.html} (${node.failureSummary})`).join(" | ")}`);
}
