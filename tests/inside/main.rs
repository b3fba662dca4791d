//! The heart from inside, on paused time: an orchestrator in this process, over scripted subsystems and a store whose
//! commits each test decides. What users meet is tested through the front door; here is what they can't bring about at
//! will.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

mod crashes;
mod history;
mod kit;
mod tasks;
mod watching;
mod writing;
