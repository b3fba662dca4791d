//! A subsystem in any language, as a process.

use std::{path::Path, process::Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::patiently;

/// A process that has printed where it listens. It is killed when it is dropped.
pub struct Running {
    pub process: Child,
    pub address: String,
}

impl Running {
    /// Starts it, and waits until it listens.
    pub async fn start(mut command: Command, name: &str) -> Self {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let line = patiently(&format!("{name} to listen"), lines.next_line()).await.unwrap();
        let line = line.unwrap_or_else(|| panic!("{name} ended without listening"));
        let address = line.strip_prefix("listening on ").unwrap().to_owned();
        Self { process, address }
    }

    /// Starts a script of `tests/python`, which gets the folder of the contract and this argument.
    pub async fn python(script: &str, argument: impl ToString) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new("python3");
        command.arg(root.join("tests/python").join(script)).arg(root.join("proto")).arg(argument.to_string());
        Self::start(command, script).await
    }

    /// Where it is dialed.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let id = self.process.id().unwrap();
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    /// Ends it with SIGKILL.
    pub async fn kill(mut self) {
        self.process.kill().await.unwrap();
    }
}
