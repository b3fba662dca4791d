// Calls of the orchestrator.

import { Client, status, type ServiceError } from "@grpc/grpc-js";
import type { MethodDefinition } from "@grpc/proto-loader";
import { ORCHESTRATOR } from "./contract.js";
import { Address, Credentials } from "./credentials.js";
import type { OrchestratorDefinition } from "./gen/dreamnet/orchestrator/v1/Orchestrator.js";
import { milliseconds, refuseUnknown, type DurationText } from "./options.js";

/** An RPC of the orchestrator that returns one answer. */
export type Rpc = Exclude<keyof OrchestratorDefinition, "WatchCycles">;
/** Its request: the message of the contract, in which every field may be missing. */
export type RequestOf<R extends Rpc> =
  OrchestratorDefinition[R] extends MethodDefinition<infer Q, any, any, any> ? Q : never;
/** Its answer. */
export type AnswerOf<R extends Rpc> =
  OrchestratorDefinition[R] extends MethodDefinition<any, any, any, infer A> ? A : never;

/** Timeout of calls that return at once, in milliseconds. */
export const ANSWER_MS = 10_000;

const HOUR_MS = 3_600_000;

/** Where an orchestrator is, and how it is called. */
export interface OrchestratorOptions {
  /**
   * `http://HOST:PORT`, `https://HOST:PORT` or `unix:/PATH`. Default: ORCHESTRATOR_ADDRESS, else http://127.0.0.1:7700.
   */
  orchestrator?: string | undefined;
  /**
   * A directory with cert.pem, key.pem and ca.pem, or a file with a token. Default: ORCHESTRATOR_CREDENTIALS. They are
   * read for each connection.
   */
  credentials?: string | undefined;
  /** Longest wait for an orchestrator that is not up yet: up to 1 h. Default 30 s. "0s" does not wait. */
  wait?: DurationText | undefined;
}

/** Where the orchestrator is by these options and the environment, and what is shown to it. */
export function connectionOf({ orchestrator, credentials }: OrchestratorOptions): {
  address: Address | undefined;
  credentials: Credentials;
} {
  const own = new Credentials(
    (credentials ?? process.env.ORCHESTRATOR_CREDENTIALS) || undefined,
    process.env.ORCHESTRATOR_CA_FILE || undefined,
  );
  const [option, given] =
    orchestrator === undefined
      ? ["ORCHESTRATOR_ADDRESS", process.env.ORCHESTRATOR_ADDRESS]
      : ["orchestrator", orchestrator];
  const address = given ? Address.parse(option, given, own.hasCertificate ? "https" : "http") : undefined;
  own.check(address);
  return { address, credentials: own };
}

/** A call of the orchestrator that failed. Its message names the address, the code and the reason. */
export class OrchestratorError extends Error {
  override readonly name = "OrchestratorError";

  constructor(
    message: string,
    /** The status code. */
    readonly code: status,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

/** Calls an RPC of any service, once. */
export function callOnce<Q, A>(
  client: Client,
  method: MethodDefinition<Q, any, any, A>,
  request: Q,
  credentials: Credentials,
  answerMs = ANSWER_MS,
): Promise<A> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + answerMs };
    client.makeUnaryRequest(
      method.path,
      method.requestSerialize,
      method.responseDeserialize as (bytes: Buffer) => A,
      request,
      credentials.metadata(),
      options,
      (error, answer) => (error ? reject(error) : resolve(answer!)),
    );
  });
}

/**
 * An orchestrator, for programs that run cycles, control loops or read the history. Calls wait until it is up. They
 * share a connection, which does not keep the process alive.
 */
export class Orchestrator {
  readonly address: Address;
  private readonly credentials: Credentials;
  private readonly waitMs: number;
  private client: Client | undefined;

  /** @throws OptionError */
  constructor(options: OrchestratorOptions = {}) {
    refuseUnknown("Orchestrator", options, ["orchestrator", "credentials", "wait"]);
    const { address, credentials } = connectionOf(options);
    this.address = address ?? Address.parse("orchestrator", "http://127.0.0.1:7700");
    if (!address) credentials.check(this.address);
    this.credentials = credentials;
    this.waitMs = milliseconds(0, HOUR_MS)("wait", options.wait ?? "30s");
  }

  /**
   * Calls an RPC. `answerMs` is the longest wait for its answer: 10 s by default, Infinity for one that runs a cycle.
   *
   * @throws OrchestratorError
   */
  async call<R extends Rpc>(rpc: R, request: RequestOf<R>, answerMs = ANSWER_MS): Promise<AnswerOf<R>> {
    // One that starts is detected within a second.
    this.client ??= new Client(this.address.target, this.credentials.connecting(this.address), {
      "grpc.max_reconnect_backoff_ms": 1000,
    });
    const { client } = this;
    try {
      await this.ready(client);
      const method = ORCHESTRATOR[rpc] as unknown as MethodDefinition<RequestOf<R>, any, any, AnswerOf<R>>;
      return await callOnce(client, method, request, this.credentials, answerMs);
    } catch (error) {
      if (error instanceof OrchestratorError) throw error;
      const { code, details } = error as ServiceError;
      // The next connection uses the certificate as it is then.
      if (code === status.UNAUTHENTICATED || code === status.UNAVAILABLE) this.close();
      throw this.failure(`answered ${status[code]}: ${details}`, error);
    }
  }

  /** Closes the connection. A later call makes a new one. */
  close(): void {
    this.client?.close();
    this.client = undefined;
  }

  /** Waits until it is up. */
  private async ready(client: Client): Promise<void> {
    const isUp = await new Promise<boolean>((resolve) =>
      client.waitForReady(Date.now() + this.waitMs, (error) => resolve(!error)),
    );
    if (isUp) return;
    // Only a call returns the reason, or succeeds by now.
    await callOnce(client, ORCHESTRATOR.GetStatus, {}, this.credentials).catch((error: ServiceError) => {
      if (error.code !== status.UNAVAILABLE && error.code !== status.DEADLINE_EXCEEDED) return;
      const limit = this.waitMs > 0 ? ` within ${this.waitMs / 1000} s` : "";
      this.close();
      throw this.failure(`can't be reached${limit}: ${status[error.code]}: ${error.details}`, error);
    });
  }

  private failure(what: string, error: unknown): OrchestratorError {
    // The library ends some messages with the heading of a note that is missing.
    const message = `the orchestrator at ${this.address.url} ${what.replace(/ Resolution note: *$/, "")}`;
    return new OrchestratorError(message, (error as ServiceError).code, { cause: error });
  }
}
