//! New names of subsystems, at random moments between cycles of callers and of loops: a component is in one cycle at a
//! time, and its latest output is found, whatever it is called.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::future::BoxFuture;
use orchestrator_core::{
    memory::Memory,
    model::{Answer, CycleId, IntervalLoop, LoopSpec, LoopStart, Name, Payload, Subsystem},
    orchestrator::{Orchestrator, Registrar},
    ports::{CallError, Callee, InitializeCall, Left, Reply, RunCall, Snapshot, Subsystems},
};
use proptest::{prelude::*, sample::Index};
use tokio::{runtime::Builder, time::sleep};

use crate::kit::{Process, by_test, in_memory, of, of_all, subsystem, text};

/// Components that take a second for a cycle, and know who they are by their parameters.
#[derive(Default)]
struct Components(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    /// Those that are being called.
    busy: BTreeSet<String>,
    /// The highest cycle of each.
    last: BTreeMap<String, CycleId>,
    violations: Vec<String>,
}

/// The component that gets these parameters.
fn component(parameters: &Payload) -> String {
    parameters.to_json()["text"].as_str().unwrap().to_owned()
}

impl Subsystems for Components {
    fn initialize<'a>(&'a self, _to: Callee<'a>, _call: InitializeCall) -> BoxFuture<'a, Result<(), CallError>> {
        Box::pin(async { Ok(()) })
    }

    fn run_cycle<'a>(&'a self, to: Callee<'a>, call: RunCall) -> BoxFuture<'a, Result<Reply, CallError>> {
        let (id, name) = (component(&call.parameters), to.subsystem.name.clone());
        {
            let Seen { busy, last, violations } = &mut *self.0.lock().unwrap();
            if !busy.insert(id.clone()) {
                violations.push(format!("{id} is called as {name} for cycle {} beside another one", call.cycle_id));
            }
            let before = last.insert(id.clone(), call.cycle_id);
            if before >= Some(call.cycle_id) {
                violations.push(format!("{id} is called as {name} for cycle {} after {before:?}", call.cycle_id));
            }
        }
        Box::pin(async move {
            sleep(Duration::from_secs(1)).await;
            self.0.lock().unwrap().busy.remove(&id);
            let answer = Answer { output: text(&id), ..Answer::default() };
            Ok(Reply { answer, held: Memory::whole(0).try_hold(0).unwrap() })
        })
    }

    fn get_status<'a>(&'a self, _of: Callee<'a>, _timeout: Duration) -> BoxFuture<'a, Result<Snapshot, CallError>> {
        Box::pin(async { Err(CallError::new(orchestrator_core::model::Code::Unimplemented, "")) })
    }

    fn forget(&self, _left: &[Left]) {}
}

/// The names that components have, or may get.
const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

#[derive(Clone, Debug)]
enum Step {
    /// The component of this number gets this name, if it is free.
    Rename(Index, Index),
    /// A cycle over the present names of these components; of all, if none is chosen.
    Run(BTreeSet<usize>),
    /// Time passes, in milliseconds.
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (any::<Index>(), any::<Index>()).prop_map(|(which, name)| Step::Rename(which, name)),
        4 => prop::collection::btree_set(0..3_usize, 0..3).prop_map(Step::Run),
        2 => (0..1500_u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 1..40)
}

/// The present names of the components, by their number, and the latest output of each.
fn found(orchestrator: &Orchestrator) -> BTreeMap<String, (Name, Option<CycleId>)> {
    let subsystems = orchestrator.subsystems(None, 10);
    let of = |member: &orchestrator_core::engine::Member| {
        let latest = member.standing.latest();
        let Subsystem { name, parameters, .. } = &*member.subsystem;
        if let Some(latest) = &latest {
            assert_eq!(latest.payload, text(&component(parameters)), "{name} has an output of another component");
        }
        (component(parameters), (name.clone(), latest.map(|latest| latest.cycle_id)))
    };
    subsystems.iter().map(|entry| of(&entry.member)).collect()
}

async fn live(steps: Vec<Step>) {
    let (store, components) = (in_memory().await, Arc::new(Components::default()));
    let process = || Process { fleet: components.clone(), ..Process::default() };
    let (orchestrator, mut tasks) = process().over(store.clone()).await.unwrap();
    for (number, name) in NAMES.iter().take(3).enumerate() {
        let registered = Subsystem { parameters: text(&number.to_string()), ..subsystem(name) };
        orchestrator.register(registered, None, &Registrar::Anyone, by_test()).await.unwrap();
    }
    // Loops also name names that nobody has.
    for (name, interval, subsystems) in [("one", 2, &NAMES[2..4]), ("other", 3, &NAMES[3..])] {
        let settings = LoopSpec {
            name: name.into(),
            interval: Some(jiff::SignedDuration::from_secs(interval)),
            overlap_policy: Some(orchestrator_core::model::OverlapPolicy::BufferOne),
            subsystems: subsystems.iter().map(ToString::to_string).collect(),
            ..LoopSpec::default()
        };
        let settings = IntervalLoop::from_spec(&settings).unwrap();
        orchestrator.start_loop(LoopStart::Of(settings), by_test()).await.unwrap();
    }
    let mut tickets = Vec::new();
    for step in steps {
        let names: Vec<_> = found(&orchestrator).into_values().map(|(name, _)| name).collect();
        match step {
            Step::Rename(which, name) => {
                let (former, name) = (which.get(&names), Name::parse(NAMES[name.index(NAMES.len())]).unwrap());
                // Others may have the name, or have had it.
                let _ = orchestrator.rename(former, name, |_, _| Ok(()), &Registrar::Anyone, by_test()).await;
            }
            Step::Run(which) => {
                let subset: Vec<_> = which.into_iter().map(|number| names[number].as_str()).collect();
                let request = if subset.is_empty() { of_all() } else { of(&subset) };
                tickets.push(orchestrator.run_cycle(request, true).await.unwrap());
            }
            Step::Wait(ms) => sleep(Duration::from_millis(ms)).await,
        }
    }
    for ticket in tickets {
        ticket.recorded().await.unwrap();
    }
    orchestrator.drain();
    tasks.finished().await.unwrap();
    let now = found(&orchestrator);
    {
        let seen = components.0.lock().unwrap();
        assert_eq!(seen.violations, [""; 0]);
        for (id, (name, latest)) in &now {
            assert_eq!(*latest, seen.last.get(id).copied(), "the latest output of {id}, which is {name}");
        }
    }
    drop(orchestrator);
    let (next, _tasks) = process().over(store).await.unwrap();
    assert_eq!(found(&next), now, "in the next process");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_component_is_in_one_cycle_at_a_time_and_keeps_its_output_whatever_its_name_is(steps in steps()) {
        let runtime = Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(live(steps));
    }
}
