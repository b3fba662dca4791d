//! TLS of the listening addresses and to subsystems: its files are read at the start, and again when they change.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
};

use jiff::Timestamp;
use tokio::{select, sync::Notify, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    config::{self, Config, TlsVersion},
    dial,
    file::{self, Changes, FileError, NamedFile},
    listen::{Clients, Entrance, Loaded, Material, Protocol, Tls},
    pem::Pem,
    transport::Listener,
};

/// The TLS of all addresses that have it, and to subsystems.
pub(super) struct Certificates {
    server: Option<Address>,
    admin: Option<Address>,
    dial: Dialing,
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
    async fn load(
        files: Option<config::Tls>,
        protocol: Protocol,
        takes_plaintext: bool,
        clock: Clock,
    ) -> Result<Option<Self>, String> {
        let Some(files) = files else { return Ok(None) };
        let loaded = load_aside(files.clone(), protocol, clock).await?;
        report_invalid(
            loaded.invalid(clock.now()).map(|problem| format!("{} {problem}", files.certificate)),
            "clients",
        );
        Ok(Some(Self { files, tls: Tls::new(protocol, loaded, takes_plaintext) }))
    }

    /// Uses the files as they are now, if they can be used. Connections that are open are not affected.
    async fn reload(&self, clock: Clock) {
        let loaded = load_aside(self.files.clone(), self.tls.protocol(), clock).await;
        let (now, certificate) = (clock.now(), &self.files.certificate);
        let is_valid = self.tls.current().invalid(now).is_none();
        let problem = |loaded: &Loaded| loaded.invalid(now).map(|problem| format!("{certificate} {problem}"));
        if let Some((loaded, problem)) = replacement(loaded, is_valid, problem) {
            self.tls.replace(loaded);
            tracing::info!(%certificate, "the files of TLS were read again");
            report_invalid(problem, "clients");
        }
    }
}

/// The connections to subsystems.
struct Dialing {
    files: config::DialTls,
    tls: Arc<dial::Tls>,
}

impl Dialing {
    async fn load(files: config::DialTls, clock: Clock) -> Result<Self, String> {
        let loaded = load_dial_aside(files.clone(), clock).await?;
        report_invalid(loaded.invalid(clock.now()).map(|problem| own_named(&files, &problem)), "subsystems");
        Ok(Self { files, tls: Arc::new(dial::Tls::new(loaded)) })
    }

    /// Uses the files as they are now, if they have changed and can be used. Calls on open connections are not
    /// affected.
    async fn reload(&self, clock: Clock) {
        let loaded = load_dial_aside(self.files.clone(), clock).await;
        let now = clock.now();
        let is_valid = self.tls.current().invalid(now).is_none();
        let problem = |loaded: &dial::Loaded| loaded.invalid(now).map(|problem| own_named(&self.files, &problem));
        if let Some((loaded, problem)) = replacement(loaded, is_valid, problem) {
            if self.tls.replace(loaded) {
                tracing::info!("the files of TLS to subsystems were read again");
            }
            report_invalid(problem, "subsystems");
        }
    }
}

impl Certificates {
    /// Reads all files. Also returns their later changes.
    ///
    /// # Errors
    /// A file can't be read, or can't be used. An expired certificate can be.
    pub(super) async fn load(config: &Config, clock: Clock) -> Result<(Arc<Self>, Changes), String> {
        let ((server, admin), dial) = (addresses(config), config.dial_tls());
        let paths: BTreeSet<_> = server.iter().chain(&admin).flat_map(paths).chain(dial_paths(&dial)).collect();
        // Before the first read, so that no change is missed in between.
        let changes = Changes::of(paths).await;
        let takes_plaintext = config.takes_plaintext();
        let server = Address::load(server, Protocol::Http2, takes_plaintext, clock).await?;
        let admin = Address::load(admin, Protocol::Http1, takes_plaintext, clock).await?;
        let dial = Dialing::load(dial, clock).await?;
        Ok((Arc::new(Self { server, admin, dial, clock, asked: Notify::new() }), changes))
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

    /// The TLS of connections to subsystems.
    pub(super) fn dial(&self) -> Arc<dial::Tls> {
        self.dial.tls.clone()
    }

    /// True if there are no files.
    pub(super) fn is_empty(&self) -> bool {
        self.addresses().next().is_none() && dial_paths(&self.dial.files).next().is_none()
    }

    /// When the first certificate of each file expires.
    pub(super) fn expiries(&self) -> BTreeMap<PathBuf, Timestamp> {
        let mut expiries: BTreeMap<_, _> = self.dial.tls.current().expiries().iter().cloned().collect();
        for address in self.addresses() {
            expiries.extend(address.tls.current().expiries().iter().cloned());
        }
        expiries
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
            self.dial.reload(self.clock).await;
            applied();
        }
    }
}

/// Reads the files of TLS that a configuration names. Returns the problems of certificates of the service that are not
/// valid now, so that others will refuse them: a service would start with them. Blocks.
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
    let dial = config.dial_tls();
    problems.extend(load_dial(&dial, clock)?.invalid(clock.now()).map(|problem| own_named(&dial, &problem)));
    // All may have the same certificate.
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

fn dial_paths(files: &config::DialTls) -> impl Iterator<Item = PathBuf> {
    let (certificate, key) = files.own.as_ref().map(|(certificate, key)| (certificate, key)).unzip();
    [files.authorities.as_ref(), certificate, key].into_iter().flatten().map(|file| file.path.clone())
}

async fn load_aside(files: config::Tls, protocol: Protocol, clock: Clock) -> Result<Loaded, String> {
    aside(move || load(&files, protocol, clock)).await
}

async fn load_dial_aside(files: config::DialTls, clock: Clock) -> Result<dial::Loaded, String> {
    aside(move || load_dial(&files, clock)).await
}

/// Reads files on a blocking thread: a file system can be slow.
async fn aside<T: Send + 'static>(load: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    // It ends only because of a defect.
    spawn_blocking(load).await.unwrap_or_else(|defect| Err(format!("the files of TLS were not read: {defect}")))
}

fn load(files: &config::Tls, protocol: Protocol, clock: Clock) -> Result<Loaded, String> {
    let config::Tls { certificate, key, clients, min_version } = files;
    let clients = match clients {
        Some((ca, are_required)) => Some(Clients { ca: read(ca)?, are_required: *are_required, only: None }),
        None => None,
    };
    let material = Material {
        certificate: read(certificate)?,
        key: read_secret(key)?,
        clients,
        allows_1_2: *min_version == TlsVersion::V1_2,
    };
    Loaded::of(&material, protocol, Arc::new(move || clock.now()))
}

fn load_dial(files: &config::DialTls, clock: Clock) -> Result<dial::Loaded, String> {
    let config::DialTls { authorities, own } = files;
    let authorities = authorities.as_ref().map(read).transpose()?;
    let own = match own {
        Some((certificate, key)) => Some((read(certificate)?, read_secret(key)?)),
        None => None,
    };
    dial::Loaded::of(dial::Material { authorities, without_system: false, own }, clock)
}

fn read(file: &NamedFile) -> Result<Pem, String> {
    pem(file, file::read(&file.path))
}

fn read_secret(file: &NamedFile) -> Result<Pem, String> {
    pem(file, file::read_secret(&file.path))
}

fn pem(file: &NamedFile, bytes: Result<Vec<u8>, FileError>) -> Result<Pem, String> {
    match bytes {
        Ok(bytes) => Ok(Pem { name: file.to_string(), path: file.path.clone(), bytes }),
        Err(error) => Err(format!("{file} {error}")),
    }
}

/// A problem of the certificate for subsystems, with its name.
fn own_named(files: &config::DialTls, problem: &str) -> String {
    files.own.as_ref().map_or_else(String::new, |(certificate, _)| format!("{certificate} {problem}"))
}

/// The configuration that replaces an earlier one after its files were read again, with the problem of its certificate,
/// if it has one. `None` if the earlier one stays in use, which is logged: the files can't be used, or would replace a
/// valid certificate (`is_valid`) with one that is not.
fn replacement<T>(
    loaded: Result<T, String>,
    is_valid: bool,
    problem: impl FnOnce(&T) -> Option<String>,
) -> Option<(T, Option<String>)> {
    let kept = |error: String| tracing::error!(%error, "the files of TLS can't be used: the earlier ones stay in use");
    let loaded = loaded.map_err(kept).ok()?;
    match problem(&loaded) {
        Some(problem) if is_valid => {
            kept(problem);
            None
        }
        problem => Some((loaded, problem)),
    }
}

/// Reports a problem of a certificate that is used nevertheless.
fn report_invalid(problem: Option<String>, others: &str) {
    if let Some(error) = problem {
        tracing::error!(error, "{others} will refuse this certificate");
    }
}
