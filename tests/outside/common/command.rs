//! Commands that run to their end.

use std::{path::Path, process::Stdio};

use tokio::process::Command;

use super::patiently;

/// Runs a command to its end. Returns its exit code, and its output followed by its errors.
pub async fn run(mut command: Command) -> (i32, String) {
    let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = patiently("a command to end", output).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), text)
}

/// Runs a program with these arguments.
pub async fn run_with(program: &str, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(program);
    command.args(args);
    run(command).await
}

/// Runs `orchestrator` with these credentials, if any, and arguments.
pub async fn orchestrator(credentials: Option<&Path>, args: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    command.args(args).env_remove("ORCHESTRATOR_CREDENTIALS");
    if let Some(path) = credentials {
        command.env("ORCHESTRATOR_CREDENTIALS", path);
    }
    let (code, text) = run(command).await;
    assert!(!text.contains(char::REPLACEMENT_CHARACTER), "it prints UTF-8: {text}");
    (code, text)
}
