// A subsystem made with the kit in clients/node: what is left is what it does. Its `value` is the sum of its inputs'
// `value`, and of `start` (a parameter).
//
//   node dist/subsystem.js --listen 127.0.0.1:0 --name total --orchestrator http://127.0.0.1:7700 --reads sensor

import { parseArgs } from "node:util";
import { Failure, Fleet, OptionError, type Cycle, type JsonObject } from "dreamnet-subsystem";

const USAGE = `usage: node dist/subsystem.js [options]

  --name NAME        the subsystem's name (default: total)
  --listen HOST:PORT, --orchestrator URL, --credentials PATH, --caller URI
                     the options of a Fleet
  --requires A,B  --after A,B  --reads A,B
                     names of other subsystems`;

class Total {
  private start = 1;
  private cycles = 0;
  private value = 0;

  initialize({ start = 1 }: JsonObject): void {
    if (typeof start !== "number")
      throw new Failure(`start is ${JSON.stringify(start)}, not a number`, "INVALID_ARGUMENT");
    this.start = start;
  }

  async runCycle(cycle: Cycle): Promise<object> {
    await cycle.sleep(Number(cycle.parameters.work_ms ?? 0)); // Simulates work.
    let sum = this.start;
    for (const [name, { output }] of cycle.inputs) {
      if (typeof output.value === "number") sum += output.value;
      else cycle.issue("NO_VALUE", `${name} gave no value`);
    }
    this.value = sum;
    this.cycles += 1;
    cycle.metric("cycles", this.cycles);
    return this.status();
  }

  status(): object {
    return { value: this.value, cycles: this.cycles };
  }
}

function parse() {
  const text = { type: "string" } as const;
  const options = { name: text, listen: text, orchestrator: text, credentials: text, caller: text };
  const names = { ...text, default: "" };
  const help = { type: "boolean", short: "h" } as const;
  return parseArgs({ options: { ...options, requires: names, after: names, reads: names, help } }).values;
}

/** Ends the process with a message instead of a stack: the cause is in the arguments. */
function quit(error: unknown): never {
  console.error((error as Error).message);
  process.exit(2);
}

let flags: ReturnType<typeof parse>;
try {
  flags = parse();
} catch (error) {
  console.error(USAGE);
  quit(error);
}
if (flags.help) {
  console.log(USAGE);
  process.exit();
}

const { name = "total", listen, orchestrator, credentials, caller } = flags;
const names = (list: string) => list.split(",").filter(Boolean);
const total = new Total();
let fleet: Fleet;
try {
  fleet = new Fleet({ listen, orchestrator, credentials, caller });
  fleet.subsystem(
    name,
    {
      requires: names(flags.requires),
      after: names(flags.after),
      reads: names(flags.reads),
      initialize: (parameters) => total.initialize(parameters),
      status: () => total.status(),
    },
    (cycle) => total.runCycle(cycle),
  );
} catch (error) {
  if (!(error instanceof OptionError)) throw error;
  quit(error);
}
await fleet.run({ onListening: (endpoint) => console.log(`listening on ${endpoint.replace(/^https?:\/\//, "")}`) });
