//! The orchestrator from inside, on paused time: in this process, over scripted subsystems and a store whose commits
//! each test decides. These tests are only for behaviour that users can't cause at will; other behaviour is tested
//! through the front door.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod admission;
mod attended;
mod checkpoints;
mod crashes;
mod history;
mod kit;
mod loops;
mod registry;
mod reload;
mod renaming;
mod tasks;
mod watching;
mod writing;
