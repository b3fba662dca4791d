//! TLS of the listening addresses: its files are read at the start, and again when they change.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use tokio::{select, sync::Notify, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    config::{self, Config, TlsVersion},
    file::{self, Changes, FileError, NamedFile},
    listen::{Clients, Entrance, Loaded, Material, Pem, Protocol, Tls},
    transport::Listener,
};

/// The TLS of all addresses that have it.
pub(super) struct Certificates {
    server: Option<Address>,
    admin: Option<Address>,
    clock: Clock,
    /// Notified when the operator wants the files to be read again.
    asked: Notify,
}

/// One address.
struct Address {
    files: config::Tls,
    tls: Arc<Tls>,
}

impl Address {
    async fn load(files: Option<config::Tls>, protocol: Protocol, clock: Clock) -> Result<Option<Self>, String> {
        let Some(files) = files else { return Ok(None) };
        let loaded = load_aside(files.clone(), protocol, clock).await?;
        if let Some(problem) = loaded.invalid(clock.now()) {
            report_invalid(&files, &problem);
        }
        Ok(Some(Self { files, tls: Tls::new(protocol, loaded) }))
    }

    /// Uses the files as they are now, if they can be used. Connections that are open are not affected.
    async fn reload(&self, clock: Clock) {
        const KEPT: &str = "the files of TLS can't be used: the earlier ones stay in use";
        let now = clock.now();
        match load_aside(self.files.clone(), self.tls.protocol(), clock).await {
            Err(error) => tracing::error!(%error, "{KEPT}"),
            Ok(loaded) => match loaded.invalid(now) {
                Some(problem) if self.tls.current().invalid(now).is_none() => {
                    tracing::error!(error = %format_args!("{} {problem}", self.files.certificate), "{KEPT}");
                }
                problem => {
                    self.tls.replace(loaded);
                    tracing::info!(certificate = %self.files.certificate, "the files of TLS were read again");
                    if let Some(problem) = problem {
                        report_invalid(&self.files, &problem);
                    }
                }
            },
        }
    }
}

impl Certificates {
    /// Reads all files. Also returns their later changes.
    ///
    /// # Errors
    /// A file can't be read, or can't be used. An expired certificate can be.
    pub(super) async fn load(config: &Config, clock: Clock) -> Result<(Arc<Self>, Changes), String> {
        let (server, admin) = addresses(config);
        let paths: BTreeSet<_> = server.iter().chain(&admin).flat_map(paths).collect();
        // Before the first read, so that no change is missed in between.
        let changes = Changes::of(paths).await;
        let server = Address::load(server, Protocol::Http2, clock).await?;
        let admin = Address::load(admin, Protocol::Http1, clock).await?;
        Ok((Arc::new(Self { server, admin, clock, asked: Notify::new() }), changes))
    }

    /// Where connections of the gRPC server come in.
    pub(super) fn server(&self, listener: Box<dyn Listener>) -> Entrance {
        Entrance { listener, secure: self.server.as_ref().map(|address| address.tls.secure()) }
    }

    /// Where connections of the admin address come in.
    pub(super) fn admin(&self, listener: Box<dyn Listener>) -> Entrance {
        Entrance { listener, secure: self.admin.as_ref().map(|address| address.tls.secure()) }
    }

    /// True if the admin address has TLS.
    pub(super) fn has_admin(&self) -> bool {
        self.admin.is_some()
    }

    /// The TLS of each address.
    pub(super) fn all(&self) -> Vec<Arc<Tls>> {
        self.addresses().map(|address| address.tls.clone()).collect()
    }

    fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.server.iter().chain(&self.admin)
    }

    /// Has the files read again, even if they have not changed.
    pub(super) fn ask(&self) {
        self.asked.notify_one();
    }

    /// Reads the files again whenever they change, until `stop`. `applied` is called after each time.
    pub(super) async fn keep_current(
        self: Arc<Self>,
        mut changes: Changes,
        applied: impl Fn(),
        stop: CancellationToken,
    ) {
        loop {
            select! {
                biased;
                () = stop.cancelled() => return,
                () = self.asked.notified() => {}
                () = changes.next() => {}
            }
            for address in self.addresses() {
                address.reload(self.clock).await;
            }
            applied();
        }
    }
}

/// Reads the files of TLS that a configuration names. Returns the problems of certificates of the service that are not
/// valid now: a service would start with them. Blocks.
///
/// # Errors
/// A file can't be read, or can't be used, so that a service would not start.
pub fn check_tls(config: &Config, clock: Clock) -> Result<Vec<String>, String> {
    let (server, admin) = addresses(config);
    let mut problems = Vec::new();
    for (files, protocol) in [(server, Protocol::Http2), (admin, Protocol::Http1)] {
        let Some(files) = files else { continue };
        let invalid = load(&files, protocol, clock)?.invalid(clock.now());
        problems.extend(invalid.map(|problem| format!("{} {problem}", files.certificate)));
    }
    // Both addresses may have the same certificate.
    problems.dedup();
    Ok(problems)
}

/// The TLS of the gRPC server and of the admin address.
fn addresses(config: &Config) -> (Option<config::Tls>, Option<config::Tls>) {
    (config.server_tls(), config.admin.listen.and_then(|_| config.admin_tls()))
}

fn paths(files: &config::Tls) -> impl Iterator<Item = PathBuf> {
    let config::Tls { certificate, key, clients, .. } = files;
    [certificate, key].into_iter().chain(clients.as_ref().map(|(ca, _)| ca)).map(|file| file.path.clone())
}

async fn load_aside(files: config::Tls, protocol: Protocol, clock: Clock) -> Result<Loaded, String> {
    let file = files.certificate.clone();
    // A file system can be slow.
    let loaded = spawn_blocking(move || load(&files, protocol, clock)).await;
    // It ends only because of a defect.
    loaded.unwrap_or_else(|defect| Err(format!("{file} was not read: {defect}")))
}

fn load(files: &config::Tls, protocol: Protocol, clock: Clock) -> Result<Loaded, String> {
    let config::Tls { certificate, key, clients, min_version } = files;
    let pem = |file: &NamedFile, bytes: Result<Vec<u8>, FileError>| match bytes {
        Ok(bytes) => Ok(Pem { name: file.to_string(), path: file.path.clone(), bytes }),
        Err(error) => Err(format!("{file} {error}")),
    };
    let clients = match clients {
        Some((ca, are_required)) => Some(Clients { ca: pem(ca, file::read(&ca.path))?, are_required: *are_required }),
        None => None,
    };
    let material = Material {
        certificate: pem(certificate, file::read(&certificate.path))?,
        key: pem(key, file::read_secret(&key.path))?,
        clients,
        allows_1_2: *min_version == TlsVersion::V1_2,
    };
    Loaded::of(&material, protocol, Arc::new(move || clock.now()))
}

fn report_invalid(files: &config::Tls, problem: &str) {
    tracing::error!(error = %format_args!("{} {problem}", files.certificate), "clients will refuse this certificate");
}
