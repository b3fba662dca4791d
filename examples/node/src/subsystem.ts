// A small stand-alone subsystem: its `value` is one more than the sum of its inputs' `value`.
//
//   node dist/src/subsystem.js --listen 127.0.0.1:0 --name total --orchestrator 127.0.0.1:7700 --reads sensor

import { setTimeout } from "node:timers/promises";
import { parseArgs } from "node:util";
import { status, type ServiceError } from "@grpc/grpc-js";
import { serveSubsystems, type Cycle, type Served } from "./dreamnet.js";

const USAGE = `usage: node dist/src/subsystem.js [options]

  --listen HOST:PORT        where to listen (default: 127.0.0.1:50051); port 0 takes a free one
  --name NAME               the subsystem's name (default: total)
  --orchestrator HOST:PORT  where to register (default: not registered)
  --credentials DIR         cert.pem, key.pem and ca.pem for TLS (default: no TLS)
  --caller URI              with TLS: the orchestrator's URI (default: spiffe://fleet/core)
  --requires A,B  --after A,B  --reads A,B
                            names of other subsystems`;

/** Ends the process with a message instead of a stack: the cause is in the arguments or outside of the process. */
function quit(message: string, code: 1 | 2): never {
  console.error(message);
  process.exit(code);
}

function parse() {
  try {
    return parseArgs({
      options: {
        help: { type: "boolean", short: "h", default: false },
        listen: { type: "string", default: "127.0.0.1:50051" },
        name: { type: "string", default: "total" },
        orchestrator: { type: "string" },
        credentials: { type: "string" },
        caller: { type: "string" },
        requires: { type: "string", default: "" },
        after: { type: "string", default: "" },
        reads: { type: "string", default: "" },
      },
    }).values;
  } catch (error) {
    return quit(`${(error as Error).message}\n${USAGE}`, 2);
  }
}

const flags = parse();
if (flags.help) {
  console.log(USAGE);
  process.exit();
}
const names = (list: string) => list.split(",").filter(Boolean);

class Total {
  private cycles = 0;
  private value = 0;

  async run(_context: unknown, cycle: Cycle) {
    // Simulates work. A late or cancelled call ends it, before anything has changed.
    const workMs = cycle.parameters.work_ms;
    if (typeof workMs === "number") await setTimeout(workMs, undefined, { signal: cycle.signal });
    this.cycles += 1;
    this.value = 1;
    for (const [name, { output }] of cycle.inputs) {
      if (typeof output?.value === "number") this.value += output.value;
      else cycle.issue("WARNING", "NO_VALUE", `${name} gave no value`);
    }
    cycle.metric("cycles", this.cycles);
    return this.status();
  }

  status() {
    return { value: this.value, cycles: this.cycles };
  }
}

const serve = () =>
  serveSubsystems(
    { [flags.name]: Total },
    {
      listen: flags.listen,
      ...(flags.orchestrator && { orchestrator: flags.orchestrator, waitSeconds: 5 }),
      ...(flags.credentials && { credentials: flags.credentials }),
      ...(flags.caller && { caller: flags.caller }),
      registrations: {
        [flags.name]: { requires: names(flags.requires), after: names(flags.after), reads: names(flags.reads) },
      },
    },
  );

let served: Served | undefined;
while (!served) {
  try {
    served = await serve();
  } catch (error) {
    const { code, message } = error as ServiceError;
    if (code !== status.UNAVAILABLE && code !== status.DEADLINE_EXCEEDED) quit(message, 1);
    // The orchestrator is not up yet: reports it, and retries without a limit.
    console.error(`${message}; trying again`);
    await setTimeout(1000);
  }
}
const { address, stop: stopServing } = served;
const stop = () => void stopServing().then(() => process.exit());
for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, stop);
console.log(`listening on ${address}`);
