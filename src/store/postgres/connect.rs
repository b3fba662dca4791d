//! Connections to the server that takes writes.

use std::{
    collections::BTreeMap,
    future::poll_fn,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::time::{Instant, timeout};
use tokio_postgres::{
    AsyncMessage, Client, Config, Error, Row, RowStream, Statement, Transaction,
    config::Host,
    error::{DbError, Severity, SqlState},
    types::{ToSql, Type},
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore, crypto};
use tokio_util::task::AbortOnDropHandle;

use super::{
    error::explain,
    figures::Figures,
    parameter::Parameter,
    url::{CONNECT, OwnCertificate, PostgresUrl, Verification},
};
use crate::{clock::Clock, file, model::Epoch, pem::Pem, ports::StoreError};

/// The name of sessions that only read, or that write outside of a term.
pub(super) const APPLICATION: &str = "orchestrator";

/// The name of the sessions that write in the term of this epoch.
pub(super) fn application_of(epoch: Epoch) -> String {
    format!("{APPLICATION}/{epoch}")
}

/// Most statements that stay prepared in a session: commits have few forms, and reads fewer.
const PREPARED: usize = 64;

/// Connects to the servers of one URL.
pub(super) struct Connector {
    url: PostgresUrl,
    figures: Arc<Figures>,
    tls: MakeRustlsConnect,
}

/// A connection. Once it is dropped, the server rolls back what it has begun.
pub(super) struct Connection {
    client: Client,
    /// By their texts. `None` behind a pooler, which executes each transaction in any session.
    prepared: Option<Mutex<BTreeMap<String, Statement>>>,
    figures: Arc<Figures>,
    /// What the server has warned of since this was last taken.
    warning: Arc<Mutex<Option<String>>>,
    /// Moves the bytes.
    _task: AbortOnDropHandle<()>,
}

impl AsRef<Connection> for Connection {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Connection {
    /// For statements in one transaction, without parameters: those with parameters would be prepared by name, which a
    /// pooler does not allow.
    pub(super) async fn transaction(&mut self) -> Result<Transaction<'_>, Error> {
        self.client.transaction().await
    }

    /// True once it has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Executes statements without parameters.
    pub(super) async fn batch_execute(&self, statements: &str) -> Result<(), Error> {
        self.client.batch_execute(statements).await
    }

    /// The rows of a statement: in one round trip, once it was prepared, and behind a pooler.
    pub(super) async fn query(&self, text: &str, parameters: &[&dyn Parameter]) -> Result<Vec<Row>, Error> {
        let values = parameters.iter().map(|parameter| *parameter as &(dyn ToSql + Sync));
        let kinds = parameters.iter().map(|parameter| parameter.kind());
        let Some(prepared) = &self.prepared else {
            return self.client.query_typed(text, &values.zip(kinds).collect::<Vec<_>>()).await;
        };
        let known = locked(prepared).get(text).cloned();
        let statement = if let Some(statement) = known {
            statement
        } else {
            let statement = self.client.prepare_typed(text, &kinds.collect::<Vec<_>>()).await?;
            let mut prepared = locked(prepared);
            if prepared.len() >= PREPARED {
                prepared.clear();
            }
            prepared.insert(text.to_owned(), statement.clone());
            statement
        };
        let queried = self.client.query(&statement, &values.collect::<Vec<_>>()).await;
        // The tables were changed since it was prepared.
        if queried.as_ref().is_err_and(|error| error.code() == Some(&SqlState::FEATURE_NOT_SUPPORTED)) {
            locked(prepared).remove(text);
        }
        queried
    }

    /// Begins a transaction that reads as of one moment, and that may write if `writes` is true.
    pub(super) async fn begin(&self, writes: bool) -> Result<(), Error> {
        let access = if writes { "READ WRITE" } else { "READ ONLY" };
        let sent = Instant::now();
        self.client.batch_execute(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ {access}")).await?;
        self.figures.went_and_came(sent.elapsed());
        Ok(())
    }

    /// The rows of a query, one by one.
    pub(super) async fn stream(&self, text: &str) -> Result<RowStream, Error> {
        self.client.query_typed_raw(text, Vec::<(bool, Type)>::new()).await
    }

    /// What the server has warned of since this was last asked: statements that have returned are among that.
    pub(super) fn take_warning(&self) -> Option<String> {
        self.warning.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

fn locked(prepared: &Mutex<BTreeMap<String, Statement>>) -> MutexGuard<'_, BTreeMap<String, Statement>> {
    prepared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connector {
    /// Reads the certificates of authorities, on a blocking thread. Those of servers must be valid by this clock.
    ///
    /// # Errors
    /// A file can't be used.
    pub(super) async fn new(url: PostgresUrl, clock: Clock) -> Result<Self, StoreError> {
        let store = url.to_string();
        let (verification, own) = (url.verification().clone(), url.own_certificate().cloned());
        let made = tokio::task::spawn_blocking(move || tls(&verification, own.as_ref(), clock)).await;
        let made = made.unwrap_or_else(|error| Err(error.to_string()));
        let tls = made.map_err(|problem| StoreError::Unavailable { store, problem })?;
        Ok(Self { url, figures: Arc::default(), tls: MakeRustlsConnect::new(tls) })
    }

    /// What is counted of its connections.
    pub(super) fn figures(&self) -> &Figures {
        &self.figures
    }

    /// The URL.
    pub(super) fn url(&self) -> &PostgresUrl {
        &self.url
    }

    /// Connects to the first of the hosts that takes writes. Their names are resolved each time, since a failover may
    /// change where they lead. The server shows the session under the name `application`.
    ///
    /// # Errors
    /// None of them does; the message says why of each.
    pub(super) async fn connect(&self, application: &str) -> Result<Connection, StoreError> {
        let store = self.url.to_string();
        let password = self.password().await?;
        let mut problems = Vec::new();
        for (host, mut config) in self.url.of_hosts() {
            config.application_name(application);
            if let Some(password) = &password {
                config.password(password);
            }
            match timeout(CONNECT, self.connect_to(&config)).await {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(StoreError::Unavailable { problem, .. })) => {
                    problems.push(format!("{}: {problem}", shown(host)));
                }
                // What the server refuses, so would another one.
                Ok(Err(error)) => return Err(error),
                Err(_) => problems.push(format!("{}: no answer within {CONNECT:?}", shown(host))),
            }
        }
        Err(StoreError::Unavailable { store, problem: format!("can't connect to {}", problems.join("; and to ")) })
    }

    async fn connect_to(&self, config: &Config) -> Result<Connection, StoreError> {
        let connected = config.connect(self.tls.clone()).await;
        let (client, mut connection) = connected.map_err(|error| explain(&self.url.to_string(), &error))?;
        let warning = Arc::new(Mutex::new(None));
        let (warned, store) = (warning.clone(), self.url.to_string());
        let task = tokio::spawn(async move {
            // Before the answer to the statement that it is about.
            while let Some(message) = poll_fn(|context| connection.poll_message(context)).await {
                match message {
                    Ok(AsyncMessage::Notice(notice)) => {
                        if let Some(problem) = warning_of(&notice) {
                            *warned.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
                        }
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!(store, %error, "a connection has ended");
                        return;
                    }
                }
            }
        });
        let prepared = (!self.url.is_pooled()).then(Mutex::default);
        Ok(Connection { client, prepared, figures: self.figures.clone(), warning, _task: AbortOnDropHandle::new(task) })
    }

    /// The password in its file, if the URL names one. Read each time, so that it can be changed.
    async fn password(&self) -> Result<Option<Vec<u8>>, StoreError> {
        let Some(path) = self.url.password_file().cloned() else { return Ok(None) };
        let (store, shown) = (self.url.to_string(), path.display().to_string());
        let read = tokio::task::spawn_blocking(move || file::read_secret(&path)).await;
        let read = read.map_err(|error| error.to_string());
        let read = read.and_then(|read| read.map_err(|error| format!("password_file {shown} {error}")));
        let password = read.map_err(|problem| StoreError::Unavailable { store, problem })?;
        Ok(Some(password.trim_ascii_end().to_vec()))
    }
}

/// What a notice warns of; `None` if it only informs.
fn warning_of(notice: &DbError) -> Option<String> {
    let is_warning = matches!(notice.parsed_severity(), Some(Severity::Warning)) || notice.severity() == "WARNING";
    is_warning.then(|| notice.message().to_owned())
}

/// The host, for people.
fn shown(host: &Host) -> String {
    match host {
        Host::Tcp(name) => name.clone(),
        #[cfg(unix)]
        Host::Unix(path) => path.display().to_string(),
    }
}

/// The TLS of connections to servers that are verified in this way, with an own certificate, if any.
fn tls(verification: &Verification, own: Option<&OwnCertificate>, clock: Clock) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match verification {
        // It is not used.
        Verification::Disabled => {}
        Verification::Full(Some(path)) => add_file(&mut roots, path)?,
        Verification::Full(None) => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                let remedy = "name the file of its authority in store.url: sslrootcert=PATH";
                return Err(format!(
                    "the system trusts no certificate, so that of the server can't be checked; {remedy}"
                ));
            }
        }
    }
    let config = ClientConfig::builder_with_details(crypto::aws_lc_rs::default_provider().into(), Arc::new(clock))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    let config = config.with_root_certificates(roots);
    let Some(OwnCertificate { certificate, key }) = own else { return Ok(config.with_no_client_auth()) };
    let (certificate, name) = (read_file("sslcert", certificate)?, format!("sslkey {}", key.display()));
    let secret = file::read_secret(key).map_err(|error| format!("{name} {error}"))?;
    let key = Pem { name, path: key.clone(), bytes: secret };
    let own = config.with_client_auth_cert(certificate.certificates()?, key.private_key()?);
    own.map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => key.belongs_elsewhere(&certificate),
        error => certificate.refused(&error),
    })
}

/// Reads a file that this parameter names.
fn read_file(parameter: &str, path: &Path) -> Result<Pem, String> {
    let name = format!("{parameter} {}", path.display());
    let bytes = file::read(path).map_err(|error| format!("{name} {error}"))?;
    Ok(Pem { name, path: path.to_owned(), bytes })
}

/// Adds the certificates in a file.
fn add_file(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let pem = read_file("sslrootcert", path)?;
    for certificate in pem.certificates()? {
        roots.add(certificate).map_err(|error| pem.refused(&error))?;
    }
    Ok(())
}
