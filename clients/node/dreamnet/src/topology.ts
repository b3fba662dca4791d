// DreamNet's 28 subsystems, in the order of its own loop. `examples/dreamnet.toml` declares the same for the
// orchestrator; a test compares the two.

import type { RegistrationOptions } from "dreamnet-subsystem";

const place = (phase: number, reads = "", after = "") => ({ phase, after: words(after), reads: words(reads) });
const words = (text: string) => text.split(" ").filter(Boolean);

export const TOPOLOGY = {
  IdentityGrid: place(0),
  ReputationLattice: place(0),
  NarrativeField: place(0),
  NeuralMesh: place(0),
  AgentWalletManager: place(0),
  QuantumAnticipation: place(0),
  SlugTimeMemory: place(0),
  StarBridgeLungs: place(0),
  DreamCortex: place(0),
  WolfPack: place(0),
  PredatorScavengerLoop: place(0),
  CitadelCore: place(10, "NeuralMesh"),
  LatentCollaboration: place(15, "NeuralMesh AgentWalletManager", "CitadelCore"),
  FieldLayer: place(
    20,
    "ReputationLattice QuantumAnticipation SlugTimeMemory StarBridgeLungs DreamCortex WolfPack " +
      "PredatorScavengerLoop NeuralMesh",
  ),
  AgentRegistryCore: place(30, "ReputationLattice NarrativeField NeuralMesh", "FieldLayer"),
  EconomicEngineCore: place(
    30,
    "IdentityGrid ZenGardenCore DreamBetCore DreamVault DreamShop SocialHubCore DreamTankCore InitRitualCore " +
      "NarrativeField NeuralMesh",
    "FieldLayer AgentRegistryCore",
  ),
  DreamTankCore: place(
    40,
    "DreamCortex DreamVault ReputationLattice FieldLayer IdentityGrid NarrativeField NeuralMesh",
  ),
  InitRitualCore: place(
    40,
    "IdentityGrid DreamCortex DreamVault ZenGardenCore SocialHubCore FieldLayer NarrativeField NeuralMesh",
    "DreamTankCore",
  ),
  ZenGardenCore: place(50, "IdentityGrid FieldLayer DreamVault DreamCortex NeuralMesh"),
  DreamBetCore: place(50, "IdentityGrid ReputationLattice FieldLayer NeuralMesh"),
  SocialHubCore: place(
    50,
    "IdentityGrid ReputationLattice FieldLayer DreamCortex DreamTankCore NarrativeField NeuralMesh",
  ),
  DreamShop: place(50, "DreamVault IdentityGrid ReputationLattice DreamCortex NeuralMesh"),
  DreamVault: place(50, "DreamCortex IdentityGrid NarrativeField NeuralMesh"),
  LiquidityEngine: place(50, "FieldLayer NeuralMesh CivicPanelCore"),
  WolfPackFundingCore: place(
    55,
    "ReputationLattice FieldLayer DreamTankCore EconomicEngineCore NarrativeField AgentRegistryCore NeuralMesh",
  ),
  WolfPackAnalystCore: place(56, "NeuralMesh NarrativeField", "WolfPackFundingCore"),
  CivicPanelCore: place(
    60,
    "DreamVault DreamShop FieldLayer DreamBetCore ZenGardenCore DreamCortex ReputationLattice NarrativeField " +
      "IdentityGrid DreamTankCore LiquidityEngine SocialHubCore InitRitualCore EconomicEngineCore " +
      "AgentRegistryCore NeuralMesh WolfPackFundingCore",
  ),
  DreamNetOSCore: place(
    60,
    "DreamVault DreamShop FieldLayer DreamBetCore ZenGardenCore DreamTankCore LiquidityEngine SocialHubCore " +
      "InitRitualCore EconomicEngineCore AgentRegistryCore NeuralMesh",
    "CivicPanelCore",
  ),
} as const satisfies Record<string, RegistrationOptions>;

/** The name of one of the 28 modules. */
export type SubsystemName = keyof typeof TOPOLOGY;

/**
 * Modules with a `run` that DreamNet's loop passes to the others but never runs. NeuralMesh and AgentWalletManager,
 * which it doesn't run either, have no `run`.
 */
export const READ_ONLY = [
  "IdentityGrid",
  "ReputationLattice",
  "NarrativeField",
  "QuantumAnticipation",
  "SlugTimeMemory",
  "StarBridgeLungs",
  "DreamCortex",
  "WolfPack",
  "PredatorScavengerLoop",
] as const satisfies readonly SubsystemName[];

/** Modules that DreamNet's loop never runs: those in `READ_ONLY`, and two that have no `run`. */
export const NOT_RUN: ReadonlySet<string> = new Set([...READ_ONLY, "NeuralMesh", "AgentWalletManager"]);

// Keys that don't follow from the name.
const KEYS: ReadonlyMap<string, string> = new Map([
  ["CitadelCore", "citadelSnapshot"],
  ["StarBridgeLungs", "starBridge"],
  ["PredatorScavengerLoop", "predatorScavenger"],
]);

/** Modules of which the others get the last result of `run` instead of the object. */
export const ONLY_OUTPUT: ReadonlySet<string> = new Set(["CitadelCore"]);

/** The key under which the others find a subsystem in their context: `FieldLayer` is `fieldLayer`. */
export const contextKey = (name: string): string => KEYS.get(name) ?? name.charAt(0).toLowerCase() + name.slice(1);
