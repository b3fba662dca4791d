//! The examples agree with their comments.

use std::{collections::BTreeSet, path::Path, sync::Arc, time::Duration};

use orchestrator_core::{
    config::Config,
    engine::{Member, Plan, Standing},
};

#[test]
fn dreamnet_is_28_subsystems_in_ten_phases_every_five_seconds() {
    let text = include_str!("../../examples/dreamnet.toml");
    let config = Config::from_toml_str("examples/dreamnet.toml", text).unwrap();
    assert_eq!(config.subsystems.len(), 28);
    let phases: BTreeSet<_> = config.subsystems.iter().map(|subsystem| subsystem.phase).collect();
    assert_eq!(phases.into_iter().collect::<Vec<_>>(), [0, 10, 15, 20, 30, 40, 50, 55, 56, 60]);
    let names: BTreeSet<_> = config.subsystems.iter().map(|subsystem| &subsystem.name).collect();
    for subsystem in &config.subsystems {
        assert!(subsystem.requires.is_empty(), "{}", subsystem.name);
        assert!(subsystem.input_names().all(|input| names.contains(input)), "{}", subsystem.name);
    }
    let [heartbeat] = &config.loops[..] else { panic!("one loop") };
    assert_eq!(heartbeat.interval, Duration::from_secs(5));
    let longest = heartbeat.deadline.unwrap() + Duration::from_millis(250);
    assert!(longest < heartbeat.interval, "a cycle that takes {longest:?} skips a tick");
    let members = config.subsystems.into_iter().map(|it| Member::new(Arc::new(it), false, Arc::<Standing>::default()));
    Plan::compile(members).unwrap();
}

#[test]
fn the_packages_for_node_have_the_same_contract() {
    const COPY: &str = "clients/node/subsystem";
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in
        ["subsystem/v1/subsystem", "orchestrator/v1/orchestrator", "orchestrator/v1/access", "orchestrator/v1/ledger"]
    {
        let file = format!("proto/dreamnet/{file}.proto");
        let [ours, copy] = [root.join(&file), root.join(COPY).join(&file)]
            .map(|path| std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())));
        assert!(ours == copy, "{COPY}/{file} differs: cp {file} {COPY}/{file}");
    }
}
