// The two packages of the contract, loaded from the .proto files. Their types are generated at build into `gen/`.

import { fileURLToPath } from "node:url";
import { loadPackageDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import type { ProtoGrpcType as OrchestratorPackage } from "./gen/orchestrator.js";
import type { ProtoGrpcType as SubsystemPackage } from "./gen/subsystem.js";

const definition = loadSync(
  ["dreamnet/subsystem/v1/subsystem.proto", "dreamnet/orchestrator/v1/orchestrator.proto"],
  {
    // Relative to `dist/src`, the directory of the compiled file.
    includeDirs: [fileURLToPath(new URL("../../proto", import.meta.url))],
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  },
);

const { dreamnet } = loadPackageDefinition(definition) as unknown as OrchestratorPackage & SubsystemPackage;

/** The client of the orchestrator. */
export const OrchestratorClient = dreamnet.orchestrator.v1.Orchestrator;

/** The client of a subsystem, and the interface of its server. */
export const SubsystemClient = dreamnet.subsystem.v1.Subsystem;
