// The other processes: where modules are, and the calls that go there.

import type { PeerCertificate } from "node:tls";
import { Client, status, type ServiceError } from "@grpc/grpc-js";
import { Address, Credentials, Orchestrator, OrchestratorError, uriOf, type FleetOptions } from "dreamnet-subsystem";
import { MODULES } from "./contract.js";
import type { CallResponse__Output } from "./gen/dreamnet/modules/v1/CallResponse.js";
import type { DescribeResponse__Output } from "./gen/dreamnet/modules/v1/DescribeResponse.js";
import type { Call, Description, Outcome } from "./messages.js";

/** Modules of another process that can't be described, and why. */
export interface Undescribed {
  readonly names: readonly string[];
  readonly code: status | undefined;
  readonly why: string;
}

/** What is known of modules in other processes. */
export interface Survey {
  readonly described: readonly Description[];
  /** Names that are not registered. */
  readonly missing: readonly string[];
  readonly failed: readonly Undescribed[];
}

/** Finds the processes of modules by their registrations, and keeps a connection to each. */
export class Owners {
  private readonly orchestrator: Orchestrator | undefined;
  private readonly credentials: Credentials;
  private readonly endpoints = new Map<string, string>();
  private readonly clients = new Map<string, Client>();

  constructor(
    { orchestrator, credentials }: FleetOptions,
    /** The names of the modules of this process. */
    private readonly own: ReadonlySet<string>,
    private readonly peers: readonly string[],
  ) {
    const isGiven = orchestrator ?? process.env.ORCHESTRATOR_ADDRESS;
    this.orchestrator = isGiven ? new Orchestrator({ orchestrator, credentials, wait: "0s" }) : undefined;
    this.credentials = new Credentials((credentials ?? process.env.ORCHESTRATOR_CREDENTIALS) || undefined);
  }

  /** Why a caller with this certificate is refused, if it is. */
  denies(certificate: PeerCertificate | undefined): string | undefined {
    const uri = uriOf(certificate);
    if (!this.credentials.hasCertificate || this.isPeer(uri)) return undefined;
    return `${uri ?? "a caller without a URI"} may not call modules here: name it in the option peers`;
  }

  /** True if it can't call other processes. */
  private get isAlone(): boolean {
    return this.credentials.hasCertificate && this.peers.length === 0;
  }

  private isPeer(uri: string | undefined): boolean {
    return this.peers.some((peer) => {
      return peer.endsWith("*") ? uri?.startsWith(peer.slice(0, -1)) : uri === peer;
    });
  }

  /** Asks the owners of those of these modules that are not of this process what they have. */
  async describe(names: readonly string[], timeoutMs: number): Promise<Survey> {
    const missing: string[] = [];
    const failed: Undescribed[] = [];
    const fail = (names: string[], code: status | undefined, why: string) => {
      // Of several modules with the same problem, one issue names all.
      const same = failed.findIndex((it) => it.why === why);
      if (same < 0) failed.push({ names, code, why });
      else failed[same] = { names: [...failed[same]!.names, ...names], code, why };
    };
    const byEndpoint = new Map<string, string[]>();
    const others = names.filter((name) => !this.own.has(name));
    if (others.length > 0 && this.isAlone) {
      const why = "over TLS, modules call only those of the processes that the option peers names";
      return { described: [], missing: [], failed: [{ names: others, code: undefined, why }] };
    }
    // Anew for each survey: a module may have moved.
    await Promise.all(
      others.map(async (name) => {
        try {
          const endpoint = await this.find(name);
          if (endpoint === undefined) missing.push(name);
          else byEndpoint.set(endpoint, [...(byEndpoint.get(endpoint) ?? []), name]);
        } catch (error) {
          fail([name], (error as OrchestratorError).code, (error as Error).message);
        }
      }),
    );
    const described = await Promise.all(
      [...byEndpoint].map(async ([endpoint, names]) => {
        try {
          return await this.ask(endpoint, names, timeoutMs);
        } catch (error) {
          const { code, details, message } = error as ServiceError;
          const why = code === undefined ? message : `${endpoint} answered ${status[code]}: ${details}`;
          fail(names, code, why);
          return [];
        }
      }),
    );
    return { described: described.flat(), missing: missing.sort(), failed };
  }

  /**
   * Calls a method, or reads a property, once. `take` gets the outcome, and a second one after `promised`.
   *
   * @throws an error if the owner can't be found; every later failure is an outcome
   */
  async call(
    { module, member, arguments: given }: Call,
    timeoutMs: number,
    take: (outcome: Outcome) => void,
  ): Promise<void> {
    const what = given === undefined ? `${module}.${member}` : `${module}.${member}()`;
    const endpoint = this.endpoints.get(module) ?? (await this.find(module));
    if (endpoint === undefined) throw new Error(`${what}: no process serves ${module}`);
    const { path, requestSerialize, responseDeserialize } = MODULES.Call;
    const request = { module, member, ...(given && { arguments: Buffer.from(given) }) };
    const stream = this.client(endpoint).makeServerStreamRequest(
      path,
      requestSerialize,
      responseDeserialize as any,
      request,
    );
    // The first response ends the wait of the caller; a promise may take longer.
    const late = setTimeout(() => fail(`no answer within ${timeoutMs} ms`), timeoutMs);
    let isOver = false;
    const over = (outcome: Outcome) => {
      if (isOver) return;
      isOver = true;
      clearTimeout(late);
      take(outcome);
    };
    const fail = (why: string) => {
      over({ failed: `${what} in another process, ${endpoint}: ${why}; it may have been carried out` });
      stream.cancel();
    };
    stream.on("data", (response: CallResponse__Output) => {
      if (response.returned) return over({ returned: response.returned });
      if (response.threw) return over({ threw: response.threw });
      clearTimeout(late);
      take({ promised: true });
    });
    stream.on("error", ({ code, details }: ServiceError) => fail(`${status[code]}: ${details}`));
    stream.on("end", () => fail("it ended without an answer"));
  }

  /** Closes the connections. */
  close(): void {
    for (const client of this.clients.values()) client.close();
  }

  /** The endpoint of a module, or undefined if it is not registered. */
  private async find(name: string): Promise<string | undefined> {
    if (!this.orchestrator) throw new Error("its process can't be found without the option orchestrator");
    try {
      const { subsystem } = await this.orchestrator.call("GetSubsystem", { name });
      const endpoint = subsystem?.registration?.endpoint;
      if (endpoint) this.endpoints.set(name, endpoint);
      return endpoint;
    } catch (error) {
      this.endpoints.delete(name);
      if (error instanceof OrchestratorError && error.code === status.NOT_FOUND) return undefined;
      throw error;
    }
  }

  private ask(endpoint: string, names: readonly string[], timeoutMs: number): Promise<Description[]> {
    const { path, requestSerialize, responseDeserialize } = MODULES.Describe;
    return new Promise((resolve, reject) =>
      this.client(endpoint).makeUnaryRequest(
        path,
        requestSerialize,
        responseDeserialize as (bytes: Buffer) => DescribeResponse__Output,
        { names: [...names] },
        { deadline: Date.now() + timeoutMs },
        (error, answer) => (error ? reject(error) : resolve(answer!.modules)),
      ),
    );
  }

  private client(endpoint: string): Client {
    const known = this.clients.get(endpoint);
    if (known) return known;
    const address = Address.parse("endpoint", endpoint);
    const tls = this.credentials.connecting(address, (uri) => this.isPeer(uri));
    const limits = { "grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1 };
    const client = new Client(address.target, tls, limits);
    this.clients.set(endpoint, client);
    return client;
  }
}
