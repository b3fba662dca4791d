// The two packages of the contract, loaded from the .proto files. Their types are generated at build into `gen/`.

import { fileURLToPath } from "node:url";
import { loadPackageDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import type { ProtoGrpcType as OrchestratorPackage } from "./gen/orchestrator.js";
import type { ProtoGrpcType as SubsystemPackage } from "./gen/subsystem.js";

const definition = loadSync(["dreamnet/subsystem/v1/subsystem.proto", "dreamnet/orchestrator/v1/orchestrator.proto"], {
  // Relative to `dist`, the directory of the compiled file.
  includeDirs: [fileURLToPath(new URL("../proto", import.meta.url))],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});

const { dreamnet } = loadPackageDefinition(definition) as unknown as OrchestratorPackage & SubsystemPackage;

/** The RPCs of the orchestrator. */
export const ORCHESTRATOR = dreamnet.orchestrator.v1.Orchestrator.service;

/** The RPCs of a subsystem. */
export const SUBSYSTEM = dreamnet.subsystem.v1.Subsystem.service;

/** The full name of the service of a subsystem, as health checks use it. */
export const SUBSYSTEM_SERVICE = "dreamnet.subsystem.v1.Subsystem";
