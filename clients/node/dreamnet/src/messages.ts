// What the thread of the modules and the thread of the network say to each other.

import type { MessagePort } from "node:worker_threads";
import type { CycleFields, FleetOptions, Issue, JsonObject, Problem, RegistrationOptions } from "dreamnet-subsystem";

/** A module as the thread of the network has to know it. */
export interface Declared {
  readonly name: string;
  readonly registration: RegistrationOptions;
  readonly hasStatus: boolean;
  /** The inputs of which the module gets the methods, if they are in other processes. */
  readonly calls: readonly string[];
}

/** With what the thread of the network starts. */
export interface Start {
  readonly fleet: FleetOptions;
  readonly modules: readonly Declared[];
  readonly peers: readonly string[];
  readonly callTimeoutMs: number;
  readonly calls: MessagePort;
  readonly signal: Int32Array;
}

/** A method or a property of a module in another process. */
export interface Member {
  readonly name: string;
  readonly isMethod: boolean;
  readonly isEnumerable: boolean;
}

/** What is known of a module in another process. */
export interface Description {
  readonly name: string;
  readonly members: readonly Member[];
  /** A copy of it, if it is an array or another collection. */
  readonly copy?: Uint8Array | undefined;
}

/** A call of a method or, without arguments, the reading of a property. */
export interface Call {
  readonly module: string;
  readonly member: string;
  readonly arguments?: Uint8Array | undefined;
}

/** What became of a call. `failed` is the reason why nothing is known of it. */
export type Outcome =
  | { readonly returned: Uint8Array }
  | { readonly threw: Uint8Array }
  | { readonly promised: true }
  | { readonly failed: string };

/** What became of a question for descriptions. */
export type Described = { readonly described: readonly Description[] } | { readonly failed: string };

/**
 * On the port of the calls, in both directions. The asking thread chooses the id. A call has one `outcome`, or a second
 * one after `promised`.
 */
export type CallMessage =
  | { readonly kind: "call"; readonly id: number; readonly call: Call }
  | { readonly kind: "describe"; readonly id: number; readonly names: readonly string[] }
  | { readonly kind: "outcome"; readonly id: number; readonly outcome: Outcome | Described };

/** The result of a module in a cycle. */
export interface Result {
  readonly output: JsonObject;
  readonly metrics: Readonly<Record<string, number>>;
  readonly issues: readonly Issue[];
}

/** How work of a module has failed. `stopped` if it ended because its signal was aborted. */
export type Failed = { readonly failed: string; readonly stopped: boolean };

/** To the thread of the modules, on the port of its work. */
export type ToModules =
  | { readonly kind: "listening"; readonly endpoint: string }
  | { readonly kind: "registered" }
  | { readonly kind: "problem"; readonly problem: Problem }
  | { readonly kind: "log"; readonly line: string }
  | {
      readonly kind: "run";
      readonly id: number;
      readonly name: string;
      readonly cycle: Omit<CycleFields, "signal">;
      readonly described: readonly Description[];
    }
  | { readonly kind: "abort"; readonly id: number; readonly reason: string }
  | { readonly kind: "status"; readonly id: number; readonly name: string }
  | { readonly kind: "ended"; readonly error?: { readonly name: string; readonly message: string } };

/** To the thread of the network, on the port of its work. */
export type ToNetwork =
  | { readonly kind: "done"; readonly id: number; readonly result: Result | JsonObject | Failed }
  | { readonly kind: "stop" };
