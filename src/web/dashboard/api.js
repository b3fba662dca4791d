// Reads from the service: see the contract, `dreamnet.orchestrator.v1`.

/** An error of the service: `status` is a gRPC code, such as "NOT_FOUND". */
export class Refusal extends Error {
  /** @param {string} status @param {string} message */
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Pauses before further attempts of a request that is refused since too many are open, also those of other people. */
const AGAIN = [250, 500, 1000, 2000];

/** Gets a path below /api with these parameters; lists become repeated ones. */
export async function get(path, parameters = {}, signal) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "") query.append(name, one);
    }
  }
  const ask = () => fetch(`/api/${path}${query.size ? `?${query}` : ""}`, { signal });
  let answer = await ask();
  for (const pause of AGAIN) {
    if (answer.status !== 429) break;
    await new Promise((done) => setTimeout(done, pause));
    answer = await ask();
  }
  if (answer.status === 401) logIn();
  const body = await answer.json();
  if (!answer.ok) throw new Refusal(body.error?.status ?? "UNKNOWN", body.error?.message ?? answer.statusText);
  return body;
}

/** Leads to the page for logins: this browser has no session, or its session has ended. */
function logIn() {
  location.replace(`/login${location.hash}`);
}

/** @type {Promise<any> | null} */
let who = null;

/** This browser, as the service knows it: `WhoAmIResponse`. */
export function whoAmI() {
  const asked = get("whoami");
  // A failed one is not kept.
  who = asked;
  asked.catch(() => {
    who = null;
  });
  return asked;
}

/** True if this browser may see what only operators may see. */
async function operates() {
  const { mode, rights = [] } = await (who ?? whoAmI());
  return mode !== "ACCESS_MODE_ENFORCE" || rights.some(({ role }) => role === "ROLE_OPERATOR" || role === "ROLE_ADMIN");
}

/** True if the caller of this `WhoAmIResponse` may list audit events. */
export function audits({ mode, rights = [] }) {
  return mode !== "ACCESS_MODE_ENFORCE" || rights.some(({ role, subsystems = [] }) =>
    role === "ROLE_ADMIN" || (role === "ROLE_AUDITOR" && subsystems.includes("*")));
}

export const getStatus = async (options = {}) => (await get("status", options)).status ?? {};

export const getCycle = async (id) => (await get(`cycles/${encodeURIComponent(id)}`)).telemetry;

/** The whole plan: further pages contain more of its subsystems. */
export async function getPlan() {
  let page = await get("plan");
  const plan = { ...page.plan, subsystems: page.plan?.subsystems ?? [] };
  while (page.nextPageToken) {
    page = await get("plan", { pageToken: page.nextPageToken });
    plan.subsystems.push(...(page.plan?.subsystems ?? []));
  }
  return plan;
}

export const getLoops = async () => (await get("loops")).loops ?? [];

export const getSubsystem = async (name, options = {}) =>
  (await get(`subsystems/${encodeURIComponent(name)}`, options)).subsystem;

/** A subsystem with its latest output. `outputHidden` if this browser may not see that. */
export async function getSubsystemWithOutput(name) {
  if (await operates()) return getSubsystem(name, { includeOutput: true });
  return { ...(await getSubsystem(name)), outputHidden: true };
}

/** One page: { cycles, unreadable, nextPageToken }. */
export async function listCycles(filter) {
  const page = await get("cycles", filter);
  return { cycles: page.cycles ?? [], unreadable: page.unreadable ?? [], nextPageToken: page.nextPageToken ?? "" };
}

/** One page: { events, unreadable, nextPageToken }. */
export async function listAuditEvents(filter) {
  const page = await get("audit", filter);
  return { events: page.events ?? [], unreadable: page.unreadable ?? [], nextPageToken: page.nextPageToken ?? "" };
}

/**
 * All subsystems, by name. `tell` is called after each page with those read so far.
 * @param {(some: any[]) => void} tell
 */
export async function listSubsystems(tell = () => {}) {
  const all = [];
  let pageToken = "";
  do {
    const page = await get("subsystems", { pageSize: 1000, pageToken });
    all.push(...(page.subsystems ?? []));
    pageToken = page.nextPageToken ?? "";
    tell(all);
  } while (pageToken);
  return all;
}
