// A process whose module never returns from a method: `node hanging-process.js ORCHESTRATOR`.

import { serveSubsystems } from "dreamnet-modules";

const hang = () => Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
const { address } = await serveSubsystems(
  { NeuralMesh: { hang, fine: () => "fine" } },
  { orchestrator: process.argv[2]! },
);
console.log(`listening on ${address}`);
