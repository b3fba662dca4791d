/**
 * DreamNet's modules as subsystems, in one process or in many, with the calls that they are used to.
 *
 * `serve.ts` says what a module can rely on, `link.ts` how modules call each other across processes, and `topology.ts`
 * has DreamNet's table.
 *
 * @module
 */

export { Cycle, type Json, type JsonObject, type RegistrationOptions } from "dreamnet-subsystem";
export {
  getStatus,
  OrchestratorCore,
  runSingleCycle,
  startIntervalLoop,
  stopServing,
  type CycleTelemetry,
  type IntervalLoop,
  type OrchestratorContext,
  type OrchestratorStatus,
} from "./familiar.js";
export type { CallOptions, LoopOptions, ServeOptions } from "./options.js";
export type { Module } from "./runner.js";
export { serveSubsystems, type Servable, type Served } from "./serve.js";
export { READ_ONLY, type SubsystemName } from "./topology.js";
