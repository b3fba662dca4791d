/**
 * Subsystems of DreamNet in Node: a function for each. The rules of the contract are kept here, once.
 *
 * ```ts
 * import { Fleet } from "dreamnet-subsystem";
 *
 * const fleet = new Fleet({ orchestrator: "http://127.0.0.1:7700" });
 * fleet.subsystem("average", { after: ["sensor"], timeout: "4s" }, (cycle) => {
 *   return { mean: cycle.inputs.get("sensor").output.value ?? 0 };
 * });
 * await fleet.run();
 * ```
 *
 * `Fleet` is where to start reading; `calls.ts` has the rules of the contract, `registering.ts` those of the
 * registration.
 *
 * @module
 */

export type { Awaitable, Output, RunCycle } from "./calls.js";
export { Address, Credentials, uriOf } from "./credentials.js";
export {
  Cycle,
  Inputs,
  type CycleFields,
  type Freshness,
  type Input,
  type Issue,
  type Severity,
} from "./cycle.js";
export {
  describe,
  describeWithPlace,
  describeWithStack,
  Failure,
  FleetError,
  OptionError,
  Stopped,
  Unavailable,
  type Code,
} from "./errors.js";
export { Fleet, FLEET_OPTIONS, type FleetOptions, type Hooks, type SubsystemOptions } from "./fleet.js";
export { isUnfit, type Json, type JsonObject } from "./objects.js";
export {
  closest,
  type Breaker,
  type DurationText,
  type Limits,
  type RegistrationOptions,
  type Retry,
} from "./options.js";
export {
  Orchestrator,
  OrchestratorError,
  type AnswerOf,
  type OrchestratorOptions,
  type RequestOf,
  type Rpc,
} from "./orchestrator.js";
export type { Problem } from "./registering.js";
