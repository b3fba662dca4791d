// A program with a fleet, as users write it: `node program.js LISTEN`.

import { Fleet } from "dreamnet-subsystem";

const fleet = new Fleet({ listen: process.argv[2] });
fleet.subsystem("it", () => ({ a: 1 }));
await fleet.run({ onListening: (endpoint) => console.log(`listening on ${endpoint}`) });
