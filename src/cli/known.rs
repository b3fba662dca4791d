//! Names that a user gives: whether the service knows them, and which names were probably meant. A typing error would
//! otherwise look like a subsystem or a loop without data.

use tonic::Code;

use super::{
    Exit, Failure,
    output::{clean, note},
    remote::{Client, Remote, is_renamed},
    subsystems,
};
use crate::{model::nearest, proto::orchestrator::v1 as pb};

/// A name that the service does not know.
#[derive(Clone, Debug)]
pub(super) enum Unknown {
    Subsystem(String),
    Loop(String),
}

impl Unknown {
    fn name(&self) -> &str {
        match self {
            Self::Subsystem(name) | Self::Loop(name) => name,
        }
    }

    /// Says that the name is not known now.
    pub(super) fn message(&self) -> String {
        let name = clean(self.name());
        match self {
            Self::Subsystem(_) => format!("subsystem {name} is not registered"),
            Self::Loop(_) => format!("loop {name} does not exist"),
        }
    }

    /// The command that lists the known names.
    pub(super) fn list(&self) -> &'static str {
        match self {
            Self::Subsystem(_) => "orchestrator subsystems list",
            Self::Loop(_) => "orchestrator loops list",
        }
    }

    /// The known name that was probably meant.
    async fn meant<F: clap::Args>(&self, remote: &Remote<F>, client: &mut Client) -> Result<Option<String>, Failure> {
        let names = match self {
            Self::Subsystem(_) => subsystems(remote, client).await?,
            Self::Loop(_) => loops(remote, client).await?,
        };
        Ok(nearest(self.name(), names.iter().map(String::as_str)).map(str::to_owned))
    }

    /// The remedy.
    async fn hint<F: clap::Args>(&self, remote: &Remote<F>, client: &mut Client) -> String {
        // The refusal is reported even if the known names can't be listed.
        let meant = self.meant(remote, client).await.unwrap_or_default();
        let did_you_mean = meant.map_or_else(String::new, |meant| format!("Did you mean {}? ", clean(&meant)));
        format!("{did_you_mean}To list all: {}{}", self.list(), remote.flag())
    }

    async fn into_failure<F: clap::Args>(self, message: &str, remote: &Remote<F>, client: &mut Client) -> Failure {
        Failure::new(Exit::Refused, format!("{message}\n{}", self.hint(remote, client).await))
    }
}

/// The same failure, with the probable name if the service does not know the given one.
pub(super) async fn explain<F: clap::Args>(failure: Failure, remote: &Remote<F>, client: &mut Client) -> Failure {
    match failure.unknown {
        Some(unknown) => unknown.into_failure(&failure.message, remote, client).await,
        None => failure,
    }
}

/// Checks that the service knows these subsystems and loops: they exist now, or are in the history.
///
/// # Errors
/// The service does not know one of them, or can't be reached.
pub(super) async fn check<F: clap::Args>(
    remote: &Remote<F>,
    client: &mut Client,
    subsystems: &[String],
    of_loops: &[String],
) -> Result<(), Failure> {
    for name in missing(remote, client, subsystems).await? {
        let request = pb::ListCyclesRequest { subsystem: name.clone(), ..pb::ListCyclesRequest::default() };
        if !is_in_record(remote, client, request).await? {
            let message = format!("subsystem {} is not registered, and is in no cycle of the history", clean(&name));
            return Err(Unknown::Subsystem(name).into_failure(&message, remote, client).await);
        }
    }
    if of_loops.is_empty() {
        return Ok(());
    }
    let loops = loops(remote, client).await?;
    for name in of_loops.iter().filter(|name| !loops.contains(name)) {
        let request = pb::ListCyclesRequest { r#loop: name.clone(), ..pb::ListCyclesRequest::default() };
        if !is_in_record(remote, client, request).await? {
            let message = format!("loop {} does not exist, and the history has no cycle of it", clean(name));
            return Err(Unknown::Loop(name.clone()).into_failure(&message, remote, client).await);
        }
    }
    Ok(())
}

/// Prints a note on names that are not registered: they may be registered later, or be typing errors.
pub(super) async fn note_missing(remote: &Remote, client: &mut Client, names: &[String], consequence: &str) {
    // This is only a note: the command has succeeded.
    for name in missing(remote, client, names).await.unwrap_or_default() {
        let unknown = Unknown::Subsystem(name);
        note(&format!("{}: {consequence}\n{}", unknown.message(), unknown.hint(remote, client).await));
    }
}

/// The names that are not registered, and are not former names of registered subsystems.
async fn missing<F: clap::Args>(
    remote: &Remote<F>,
    client: &mut Client,
    names: &[String],
) -> Result<Vec<String>, Failure> {
    /// Most names that are checked: longer lists were not typed by hand.
    const MAX: usize = 32;
    let mut missing = Vec::new();
    for name in names.iter().take(MAX) {
        let request = pb::GetSubsystemRequest { name: name.clone(), ..pb::GetSubsystemRequest::default() };
        let call = async {
            match client.get_subsystem(request).await {
                Ok(_) => Ok(true),
                Err(status) if status.code() == Code::NotFound => Ok(is_renamed(&status)),
                Err(status) => Err(status),
            }
        };
        if !remote.quickly(call).await? {
            missing.push(name.clone());
        }
    }
    Ok(missing)
}

/// The names of all registered subsystems.
///
/// # Errors
/// The service does not say.
pub(super) async fn subsystems<F: clap::Args>(remote: &Remote<F>, client: &mut Client) -> Result<Vec<String>, Failure> {
    let mut names = Vec::new();
    let take = |page: Vec<pb::SubsystemStatus>| {
        names.extend(page.iter().map(subsystems::name));
        Ok(())
    };
    subsystems::pages(remote, client, take).await?;
    Ok(names)
}

/// The names of all loops.
///
/// # Errors
/// The service does not say.
pub(super) async fn loops<F: clap::Args>(remote: &Remote<F>, client: &mut Client) -> Result<Vec<String>, Failure> {
    let loops = super::loops::all(remote, client).await?;
    Ok(loops.into_iter().filter_map(|status| status.r#loop).map(|settings| settings.name).collect())
}

/// True if a cycle passes this filter.
async fn is_in_record<F: clap::Args>(
    remote: &Remote<F>,
    client: &mut Client,
    mut request: pb::ListCyclesRequest,
) -> Result<bool, Failure> {
    /// The service examines about 10,000 records for a page. In a longer history, an unknown name is not reported.
    const PAGES: usize = 20;
    request.page_size = 1;
    for _ in 0..PAGES {
        let page = remote.quickly(client.list_cycles(request.clone())).await?.into_inner();
        if !(page.cycles.is_empty() && page.unreadable.is_empty()) {
            return Ok(true);
        }
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}
