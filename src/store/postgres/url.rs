//! The URL of a store in a PostgreSQL database.

use std::{fmt, net::IpAddr, path::PathBuf, str::FromStr, time::Duration};

use percent_encoding::percent_decode_str;
use tokio_postgres::{
    Config,
    config::{ChannelBinding, Host, SslMode},
};

/// The schema of the tables, unless the URL names another one.
const SCHEMA: &str = "orchestrator";
/// Most bytes of the name of a schema: PostgreSQL would cut a longer one off.
const MAX_SCHEMA: usize = 63;
/// The parameters that the library reads. All others are read here, or set by this software.
const OF_LIBRARY: [&str; 4] = ["dbname", "host", "port", "user"];

/// Longest time for one host to accept a connection, whatever it waits for: a host that has stopped must not keep the
/// others from being tried.
pub(super) const CONNECT: Duration = Duration::from_secs(2);
/// A connection whose other end does not answer is closed after this time without an answer, and two further attempts
/// at this interval, or when what was sent is not acknowledged for this time.
const IDLE: Duration = Duration::from_secs(5);
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
const PROBES: u32 = 2;
const UNACKNOWLEDGED: Duration = Duration::from_secs(5);

/// How a server is reached, in which database and schema the store is, and for which user.
#[derive(Clone, PartialEq, Eq)]
pub struct PostgresUrl {
    /// As it was given, without the password.
    shown: String,
    /// Without its hosts.
    config: Box<Config>,
    hosts: Vec<(Host, u16)>,
    verification: Verification,
    own_certificate: Option<OwnCertificate>,
    password_file: Option<PathBuf>,
    schema: String,
    is_pooled: bool,
}

/// The certificate by which this process proves to be a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OwnCertificate {
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
}

/// How the server proves that it is the one that is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verification {
    /// It does not: the connection is not encrypted.
    Disabled,
    /// By a certificate with its name, of an authority in this file, or one that the system trusts.
    Full(Option<PathBuf>),
}

impl PostgresUrl {
    /// True if this is to be the URL of such a store, valid or not.
    pub(in super::super) fn is_meant(url: &str) -> bool {
        ["postgres:", "postgresql:"].iter().any(|scheme| url.starts_with(scheme))
    }

    /// Parses a URL.
    ///
    /// # Errors
    /// It is not the URL of such a store; the message says what to give, and does not contain the password.
    pub fn parse(url: &str) -> Result<Self, String> {
        let form = "give postgres://USER@HOST:PORT/DATABASE";
        let rest = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://")).ok_or(form)?;
        let (user, rest) = rest.split_once('@').map_or((None, rest), |(user, rest)| (Some(user), rest));
        let (user, has_password) =
            user.map_or(("", false), |user| user.split_once(':').map_or((user, false), |(user, _)| (user, true)));
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut own = Own::default();
        let mut of_library = Vec::new();
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (key, value) = parameter.split_once('=').ok_or_else(|| format!("{parameter:?} has no value"))?;
            if OF_LIBRARY.contains(&key) {
                of_library.push(parameter);
            } else {
                own.read(key, &decoded(value)?)?;
            }
        }
        let credentials = url.split_once('@').map_or("", |(before, _)| before.split_once("//").map_or("", |it| it.1));
        let credentials = if credentials.is_empty() { String::new() } else { format!("{credentials}@") };
        let parsed = Config::from_str(&format!("postgres://{credentials}{place}?{}", of_library.join("&")));
        let config = parsed.map_err(|error| format!("{}; {form}", causes(&error)))?;
        let at = if user.is_empty() { String::new() } else { format!("{user}@") };
        let question = if query.is_empty() { "" } else { "?" };
        Self::of(format!("postgres://{at}{place}{question}{query}"), &config, own, has_password)
    }

    fn of(shown: String, parsed: &Config, own: Own, has_password: bool) -> Result<Self, String> {
        let hosts = hosts(parsed)?;
        let is_local = hosts.iter().all(|(host, _)| is_local(host));
        let verification = match own.sslmode.as_deref() {
            None if is_local && own.sslrootcert.is_none() => Verification::Disabled,
            Some("disable") if own.sslrootcert.is_some() => {
                return Err("sslmode=disable does not use sslrootcert; leave one of them out".into());
            }
            Some("disable") => Verification::Disabled,
            None | Some("verify-full") => Verification::Full(own.sslrootcert),
            Some(other) => {
                return Err(format!(
                    "sslmode={other} does not make sure which server answers; give sslmode=verify-full, or disable"
                ));
            }
        };
        let own_certificate = match (own.sslcert, own.sslkey) {
            (None, None) => None,
            (Some(_), Some(_)) if verification == Verification::Disabled => {
                return Err("sslcert is not used without TLS; give sslmode=verify-full, or leave it out".into());
            }
            (Some(certificate), Some(key)) => Some(OwnCertificate { certificate, key }),
            _ => return Err("sslcert and sslkey belong together; give both, or leave both out".into()),
        };
        if has_password && own.password_file.is_some() {
            return Err("it has a password and password_file; leave one of them out".into());
        }
        let mut config = Config::new();
        config
            .connect_timeout(CONNECT)
            .keepalives_idle(IDLE)
            .keepalives_interval(PROBE_INTERVAL)
            .keepalives_retries(PROBES)
            .tcp_user_timeout(UNACKNOWLEDGED)
            .channel_binding(ChannelBinding::Prefer);
        parsed.get_user().map(|user| config.user(user));
        parsed.get_password().map(|password| config.password(password));
        config.dbname(parsed.get_dbname().ok_or("it names no database; give postgres://USER@HOST:PORT/DATABASE")?);
        Ok(Self {
            shown,
            config: Box::new(config),
            hosts,
            verification,
            own_certificate,
            password_file: own.password_file,
            schema: own.schema.unwrap_or_else(|| SCHEMA.into()),
            is_pooled: own.pooled,
        })
    }

    /// The settings of a connection to each host, in the order in which they are tried.
    pub(super) fn of_hosts(&self) -> impl Iterator<Item = (&Host, Config)> {
        self.hosts.iter().map(|(host, port)| {
            let mut config = (*self.config).clone();
            match host {
                Host::Tcp(name) => config.host(name),
                #[cfg(unix)]
                Host::Unix(path) => config.host_path(path),
            };
            let is_plain = self.verification == Verification::Disabled || !matches!(host, Host::Tcp(_));
            config.port(*port).ssl_mode(if is_plain { SslMode::Disable } else { SslMode::Require });
            (host, config)
        })
    }

    /// How servers are verified.
    pub(super) fn verification(&self) -> &Verification {
        &self.verification
    }

    /// The own certificate, if it has one.
    pub(super) fn own_certificate(&self) -> Option<&OwnCertificate> {
        self.own_certificate.as_ref()
    }

    /// The file with the password, if it has one.
    pub(super) fn password_file(&self) -> Option<&PathBuf> {
        self.password_file.as_ref()
    }

    /// True if a pooler is in between, which may execute each transaction in another session.
    pub(super) fn is_pooled(&self) -> bool {
        self.is_pooled
    }

    /// The schema of the tables: a word that needs no quotes.
    pub(super) fn schema(&self) -> &str {
        &self.schema
    }
}

/// Without the password.
impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Without the password.
impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PostgresUrl({})", self.shown)
    }
}

/// The parameters that the library does not read.
#[derive(Default)]
struct Own {
    sslmode: Option<String>,
    sslrootcert: Option<PathBuf>,
    sslcert: Option<PathBuf>,
    sslkey: Option<PathBuf>,
    password_file: Option<PathBuf>,
    schema: Option<String>,
    pooled: bool,
}

impl Own {
    fn read(&mut self, key: &str, value: &str) -> Result<(), String> {
        match key {
            "sslmode" => self.sslmode = Some(value.into()),
            "sslrootcert" => self.sslrootcert = Some(value.into()),
            "sslcert" => self.sslcert = Some(value.into()),
            "sslkey" => self.sslkey = Some(value.into()),
            "password_file" => self.password_file = Some(value.into()),
            "schema" if is_word(value) => self.schema = Some(value.into()),
            "schema" => {
                return Err(format!(
                    "schema={value} needs quotes in SQL; give a lower-case letter or _, and then such characters and \
                     digits, at most {MAX_SCHEMA}"
                ));
            }
            "pooled" => {
                let wrong = |_| format!("pooled={value} is neither true nor false");
                self.pooled = value.parse().map_err(wrong)?;
            }
            "password" => return Err("a password belongs before the @, or into a file: password_file=PATH".into()),
            _ => {
                return Err(format!(
                    "{key} is not a parameter; give dbname, host, password_file, pooled, port, schema, \
                     sslcert, sslkey, sslmode, sslrootcert or user"
                ));
            }
        }
        Ok(())
    }
}

/// True if this is a name that SQL takes as it is.
fn is_word(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    name.len() <= MAX_SCHEMA
        && !name.starts_with("pg_")
        && name.bytes().next().is_some_and(is_letter)
        && name.bytes().all(|byte| is_letter(byte) || byte.is_ascii_digit())
}

fn decoded(value: &str) -> Result<String, String> {
    let decoded = percent_decode_str(value).decode_utf8();
    Ok(decoded.map_err(|_| format!("{value:?} is not UTF-8 once it is decoded"))?.into_owned())
}

/// The hosts, each with its port.
fn hosts(parsed: &Config) -> Result<Vec<(Host, u16)>, String> {
    const PORT: u16 = 5432;
    let (hosts, ports) = (parsed.get_hosts(), parsed.get_ports());
    if hosts.is_empty() {
        return Err("it names no host; give postgres://USER@HOST:PORT/DATABASE, or host=/DIRECTORY of a socket".into());
    }
    if ports.len() > 1 && ports.len() != hosts.len() {
        return Err(format!(
            "it has {} hosts and {} ports; give each host its port, or all the same",
            hosts.len(),
            ports.len()
        ));
    }
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(PORT);
    Ok(hosts.iter().enumerate().map(|(index, host)| (host.clone(), port(index))).collect())
}

/// True if the server is on this machine.
fn is_local(host: &Host) -> bool {
    match host {
        Host::Tcp(name) => name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()),
        #[cfg(unix)]
        Host::Unix(_) => true,
    }
}

/// An error with its causes.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut said = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !said.contains(&more) {
            said = format!("{said}: {more}");
        }
        cause = error.source();
    }
    said
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verification(url: &str) -> Verification {
        PostgresUrl::parse(url).unwrap().verification
    }

    #[test]
    fn a_url_is_shown_without_its_password() {
        for (url, shown) in [
            ("postgres://u:se%40cret@h/d", "postgres://u@h/d"),
            (
                "postgresql://u:secret@h:1,i:2/d?schema=s&sslmode=disable",
                "postgres://u@h:1,i:2/d?schema=s&sslmode=disable",
            ),
            ("postgres:///d?host=/tmp", "postgres:///d?host=/tmp"),
        ] {
            let parsed = PostgresUrl::parse(url).unwrap();
            assert_eq!(parsed.to_string(), shown);
            assert!(!format!("{parsed:?}").contains("cret"));
        }
        let password =
            PostgresUrl::parse("postgres://u:se%40cret@h/d").unwrap().config.get_password().map(<[u8]>::to_vec);
        assert_eq!(password.as_deref(), Some(&b"se@cret"[..]));
    }

    #[test]
    fn each_host_has_its_port_and_its_way_to_be_verified() {
        let url = PostgresUrl::parse("postgres://u@one:1,two:2/d").unwrap();
        let of_hosts: Vec<_> = url.of_hosts().map(|(_, config)| config).collect();
        let ports: Vec<_> = of_hosts.iter().map(|config| config.get_ports().to_vec()).collect();
        assert_eq!(ports, [[1], [2]]);
        assert!(of_hosts.iter().all(|config| config.get_hosts().len() == 1));
        assert!(of_hosts.iter().all(|config| config.get_ssl_mode() == SslMode::Require));

        assert_eq!(verification("postgres://u@10.0.0.1/d"), Verification::Full(None));
        assert_eq!(verification("postgres://u@localhost,10.0.0.1/d"), Verification::Full(None));
        assert_eq!(verification("postgres://u@10.0.0.1/d?sslmode=disable"), Verification::Disabled);
        for local in ["localhost", "127.0.0.1", "%2Fvar%2Frun%2Fpostgresql"] {
            assert_eq!(verification(&format!("postgres://u@{local}/d")), Verification::Disabled, "{local}");
        }
        let file = Verification::Full(Some("/a b.pem".into()));
        assert_eq!(verification("postgres://u@h/d?sslmode=verify-full&sslrootcert=%2Fa%20b.pem"), file);
        assert_eq!(verification("postgres://u@localhost/d?sslrootcert=%2Fa%20b.pem"), file);
        let socket = PostgresUrl::parse("postgres://u@h,%2Ftmp/d").unwrap();
        let last = socket.of_hosts().last().unwrap().1;
        assert_eq!((last.get_ssl_mode(), last.get_ports()), (SslMode::Disable, &[5432][..]));
    }

    #[test]
    fn what_is_wrong_with_a_url_is_said_without_its_password() {
        for (url, said) in [
            ("postgres:h/d", "give postgres://"),
            ("postgres://u:secret@h", "names no database"),
            ("postgres:///d", "names no host"),
            ("postgres://u:secret@h:x/d", "give postgres://"),
            ("postgres://u:secret@h,i/d?port=1,2,3", "2 hosts and 5 ports"),
            ("postgres://u:secret@h/d?sslmode=require", "give sslmode=verify-full"),
            ("postgres://u:secret@h/d?sslmode=disable&sslrootcert=/a", "leave one of them out"),
            ("postgres://u:secret@h/d?sslcert=/a", "belong together"),
            ("postgres://u:secret@h/d?sslmode=disable&sslcert=/a&sslkey=/b", "not used without TLS"),
            ("postgres://u:secret@h/d?schema=Big", "needs quotes"),
            ("postgres://u:secret@h/d?schema=pg_x", "needs quotes"),
            ("postgres://u:secret@h/d?schema=", "needs quotes"),
            ("postgres://u:secret@h/d?connect_timeout=3", "connect_timeout is not a parameter"),
            ("postgres://u@h/d?password=secret", "before the @"),
            ("postgres://u:secret@h/d?password_file=/a", "leave one of them out"),
            ("postgres://u:secret@h/d?schema", "has no value"),
            ("postgres://u:secret@h/d?pooled=yes", "neither true nor false"),
        ] {
            let error = PostgresUrl::parse(url).unwrap_err();
            assert!(error.contains(said) && !error.contains("secret"), "{url}: {error}");
        }
    }
}
