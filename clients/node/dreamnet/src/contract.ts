// The RPCs by which modules call each other, loaded from the .proto file. Their types are generated into `gen/`.

import { fileURLToPath } from "node:url";
import { loadPackageDefinition } from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import type { ProtoGrpcType } from "./gen/modules.js";

const definition = loadSync("dreamnet/modules/v1/modules.proto", {
  // Relative to `dist`, the directory of the compiled file.
  includeDirs: [fileURLToPath(new URL("../proto", import.meta.url))],
  defaults: true,
  oneofs: true,
});

const { dreamnet } = loadPackageDefinition(definition) as unknown as ProtoGrpcType;

/** Describes modules and calls their methods. */
export const MODULES = dreamnet.modules.v1.Modules.service;
