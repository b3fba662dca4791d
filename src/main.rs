//! The `orchestrator` binary.

#![warn(clippy::disallowed_methods)]

use std::process::ExitCode;

use orchestrator_core::cli::Cli;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    Cli::read().run()
}
