//! Whole simulations of the service: on one thread, on paused time, over a network, a database and subsystems that fail
//! as the seed decides, with clients that use it all the time. Afterwards, what everyone has seen has to keep the
//! promises.
//!
//! `ORCHESTRATOR_TEST_SEEDS` sets the number of simulations of each kind, and `ORCHESTRATOR_TEST_SEED` runs one of them
//! again and prints what happened in it; with the fault that `ORCHESTRATOR_TEST_FAULT` names, if it does.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod callers;
mod chance;
mod fleet;
mod history;
mod network;
mod records;
mod terms;
mod world;

use std::{
    env, fs,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use orchestrator_core::{fault::Fault, ledger::SigningKey};
use tempfile::TempDir;
use world::{Outcome, Service, simulate};

/// Simulations that run at one time.
const THREADS: u64 = 2;
/// The first seeds are simulated twice.
const TWICE: u64 = 5;
/// A fault is found within this number of seeds: the rarest is shown by one of a hundred.
const TO_FIND: u64 = 500;

/// The service in whose simulations a fault has to be found.
fn shows(fault: Fault) -> Service {
    match fault {
        Fault::UncappedReads | Fault::LocalRenewal | Fault::ArrivalValidity => Service::Replicas,
        _ => Service::Alone,
    }
}

/// The file of the key of the log, for all simulations.
struct Key(TempDir);

impl Key {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = SigningKey::of_seed("simulated", [7; SigningKey::SEED]).unwrap();
        let this = Self(directory);
        fs::write(this.path(), format!("{}\n", key.to_secret())).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(this.path(), fs::Permissions::from_mode(0o600)).unwrap();
        }
        this
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("key")
    }
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Simulates these seeds, on several threads, until one of them is enough.
fn each_seed(service: Service, seeds: u64, fault: Option<Fault>, is_enough: impl Fn(u64, Outcome) -> bool + Sync) {
    let (next, key) = (AtomicU64::new(0), Key::new());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    if is_enough(seed, simulate(service, seed, fault, &key.path())) {
                        next.store(seeds, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}

/// Simulates the seeds that the environment asks for.
fn check(service: Service, default: u64) {
    if let Some(seed) = number("ORCHESTRATOR_TEST_SEED") {
        let fault = env::var("ORCHESTRATOR_TEST_FAULT").ok();
        let fault = fault.map(|name| Fault::ALL.into_iter().find(|fault| format!("{fault:?}") == name).unwrap());
        let Outcome { violations, trace, .. } = simulate(service, seed, fault, &Key::new().path());
        println!("{}", trace.join("\n"));
        return assert_eq!(violations, [""; 0]);
    }
    let seeds = number("ORCHESTRATOR_TEST_SEEDS").unwrap_or(default);
    let (failed, cycles) = (Mutex::new(Vec::new()), AtomicU64::new(0));
    each_seed(service, seeds, None, |seed, outcome| {
        cycles.fetch_add(outcome.cycles as u64, Ordering::Relaxed);
        if !outcome.violations.is_empty() {
            println!("{service:?}, ORCHESTRATOR_TEST_SEED={seed}: {:#?}", outcome.violations);
            failed.lock().unwrap().push(seed);
        }
        false
    });
    println!("{seeds} simulations with {} cycles", cycles.into_inner());
    assert_eq!(*failed.lock().unwrap(), [0; 0], "run one with ORCHESTRATOR_TEST_SEED to see what happened");
}

#[test]
fn promises_hold_in_every_simulation() {
    check(Service::Alone, 300);
}

#[test]
fn promises_hold_in_every_simulation_of_three_replicas() {
    check(Service::Replicas, 50);
}

#[test]
fn a_seed_gives_the_same_trace_twice() {
    let (key, seeds) = (Key::new(), number("ORCHESTRATOR_TEST_SEEDS").unwrap_or(TWICE));
    for (service, seed) in (0..seeds).flat_map(|seed| [(Service::Alone, seed), (Service::Replicas, seed)]) {
        let [first, second] = [(); 2].map(|()| simulate(service, seed, None, &key.path()));
        if first.hash() != second.hash() {
            let differs = first.trace.iter().zip(&second.trace).position(|(one, other)| one != other);
            let at = differs.unwrap_or(first.trace.len().min(second.trace.len()));
            let [one, other] =
                [&first, &second].map(|it| it.trace.get(at.saturating_sub(3)..(at + 3).min(it.trace.len())));
            panic!("{service:?}, seed {seed}: {one:#?} and then {other:#?}");
        }
    }
}

#[test]
fn each_planted_fault_is_found() {
    for fault in Fault::ALL {
        let found = Mutex::new(None);
        each_seed(shows(fault), TO_FIND, Some(fault), |seed, outcome| {
            let is_found = !outcome.violations.is_empty();
            if is_found {
                found.lock().unwrap().get_or_insert((seed, outcome.violations));
            }
            is_found
        });
        let found = found.into_inner().unwrap();
        let (seed, violations) = found.unwrap_or_else(|| panic!("{fault:?} is not found in {TO_FIND} simulations"));
        println!("{fault:?} is found with seed {seed}: {:?}", violations.first());
    }
}
