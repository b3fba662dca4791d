//! `orchestrator certs`: a small authority for a fleet, and the certificates that it signs.

use std::{
    fs::{self, DirBuilder},
    io,
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Subcommand;
use jiff::{SignedDuration, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, UnixTime, pem::PemObject};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert, aws_lc_rs::ECDSA_P256_SHA256};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, pem::parse_x509_pem, prelude::FromDer};

use super::{
    Exit, Failure, HOST,
    output::{expiry, instant, length, note, print},
    table::{Page, Table, left, long, text},
};
use crate::{
    config::secure::{AUTHORITY, CERTIFICATE, KEY, SERVICE},
    file::{self, create_private},
    model::{Identity, Name, nearest},
};

/// Create an authority for a fleet, and issue and renew certificates that it signs
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The directory contains the certificate of the authority (ca.pem), its private key (ca/ca.key), and a directory for \
each certificate: cert.pem, key.pem and ca.pem. `orchestrator serve --secure DIR` uses it; the other commands take one \
of its directories as their --credentials. The service never reads the key of the authority: keep it elsewhere, and \
put it back to issue further certificates.

Examples:
  orchestrator certs init --host localhost
  orchestrator certs issue subsystem prices
  orchestrator certs issue viewer wall --valid-for 30d
  orchestrator certs list
  orchestrator certs renew
  orchestrator whoami --address https://localhost:7700 --credentials pki/admin")]
pub(super) struct Certs {
    #[command(subcommand)]
    command: Command,
    /// The directory of the authority
    #[arg(long, value_name = "DIR", default_value = "pki", global = true)]
    dir: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create an authority, and the certificates of the service (core) and of an administrator (admin)
    Init {
        /// A name or an address by which callers reach the service; may be repeated. localhost includes 127.0.0.1 and
        /// ::1
        #[arg(long, value_name = "HOST", default_value = "localhost", value_parser = parse_host)]
        host: Vec<Host>,
        /// The name of the fleet: identities are spiffe://FLEET/ROLE/NAME
        #[arg(long, value_name = "NAME", default_value = "fleet", value_parser = parse_fleet)]
        fleet: String,
    },
    /// Issue a certificate
    Issue {
        /// What its owner may do
        #[arg(value_parser = ROLES)]
        role: String,
        /// The name of its owner, and of its directory
        #[arg(value_parser = parse_name)]
        name: Name,
        /// For a subsystem that listens with TLS, its name or address; may be repeated. localhost includes 127.0.0.1
        /// and ::1. Without it, the certificate is only for calls
        #[arg(long, value_name = "HOST", value_parser = parse_host)]
        host: Vec<Host>,
        /// How long it is valid, such as 8h, 90d or 52w
        #[arg(long, value_name = "DURATION", default_value = "365d", value_parser = parse_validity)]
        valid_for: SignedDuration,
    },
    /// Issue the certificates anew that expire soon, for the same owners, with new keys
    Renew {
        /// Only these, whenever they expire; without names, all that expire soon
        #[arg(value_parser = parse_name)]
        names: Vec<Name>,
        /// Those that expire within this time, such as 30d
        #[arg(long, value_name = "DURATION", default_value = "60d", value_parser = parse_validity)]
        within: SignedDuration,
    },
    /// List the certificates, and when they expire
    #[command(visible_alias = "ls")]
    List,
}

/// What the owner of a certificate may do, by the grants of `serve --secure`.
const ROLES: [&str; 6] = [SUBSYSTEM, "monitor", "viewer", "operator", "auditor", "admin"];
const SUBSYSTEM: &str = "subsystem";

/// The name or the address of a server.
type Host = String;

/// The private key of the authority.
const AUTHORITY_KEY: [&str; 2] = ["ca", "ca.key"];
const YEAR: SignedDuration = SignedDuration::from_hours(24 * 365);

fn parse_host(text: &str) -> Result<Host, String> {
    let is_name = !text.is_empty()
        && text.len() <= 253
        && text.bytes().all(|it| it.is_ascii_alphanumeric() || b"-.*".contains(&it));
    if is_name || text.parse::<IpAddr>().is_ok() {
        Ok(text.to_owned())
    } else {
        Err("give a DNS name or an IP address, without a port".into())
    }
}

fn parse_fleet(text: &str) -> Result<String, String> {
    let fits = (1..=63).contains(&text.len())
        && text.bytes().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || b"-._".contains(&it));
    if fits { Ok(text.to_owned()) } else { Err("give at most 63 small letters, digits, dots, - and _".into()) }
}

fn parse_name(text: &str) -> Result<Name, String> {
    let name = Name::parse(text).map_err(|error| error.to_string())?;
    if text == AUTHORITY_KEY[0] { Err("is the directory of the authority; give another name".into()) } else { Ok(name) }
}

fn parse_validity(text: &str) -> Result<SignedDuration, String> {
    let length = length(text).filter(|it| *it <= YEAR * 10);
    length.ok_or_else(|| "give a duration of at most 10 years, such as 8h, 90d or 52w".to_owned())
}

impl Certs {
    /// Runs the subcommand.
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let dir = &self.dir;
        match self.command {
            Command::Init { host, fleet } => init(dir, &fleet, &host)?,
            Command::Issue { role, name, host, valid_for } => {
                if role != SUBSYSTEM && !host.is_empty() {
                    return Err(Failure::new(Exit::Usage, "--host is only for a subsystem: others don't listen"));
                }
                let authority = Authority::read(dir)?;
                let owner = Owner {
                    identity: format!("spiffe://{}/{role}/{name}", authority.fleet),
                    hosts: with_loopback(&host),
                };
                let to = dir.join(name.as_str());
                if to.exists() {
                    let message = format!("{} exists; renew it, or give another name", to.display());
                    return Err(Failure::new(Exit::Refused, message));
                }
                issue(&authority, &to, &owner, valid_for)?;
            }
            Command::Renew { names, within } => renew(dir, &names, within)?,
            Command::List => print(&list(dir)?)?,
        }
        Ok(Exit::Done)
    }
}

fn init(dir: &Path, fleet: &str, hosts: &[Host]) -> Result<(), Failure> {
    let authority = Authority::create(dir, fleet)?;
    let service = Owner { identity: format!("spiffe://{fleet}/{SERVICE}"), hosts: with_loopback(hosts) };
    issue(&authority, &dir.join(SERVICE), &service, YEAR)?;
    let admin = Owner { identity: format!("spiffe://{fleet}/admin/admin"), hosts: Vec::new() };
    issue(&authority, &dir.join("admin"), &admin, YEAR)?;
    let [directory, key] = AUTHORITY_KEY;
    note(&format!(
        "the private key of the authority is in {}: whoever has it can be anybody",
        dir.join(directory).join(key).display()
    ));
    Ok(())
}

/// With `localhost`, its addresses: a caller may give any of them.
fn with_loopback(hosts: &[Host]) -> Vec<Host> {
    let mut all = Vec::new();
    for host in hosts {
        all.push(host.clone());
        if host == "localhost" {
            all.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
        }
    }
    all
}

/// The owner of a certificate.
struct Owner {
    /// Its URI.
    identity: String,
    /// Its names and addresses as a server.
    hosts: Vec<Host>,
}

/// The authority of a fleet.
struct Authority {
    fleet: String,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Creates one in a directory that has none.
    fn create(dir: &Path, fleet: &str) -> Result<Self, Failure> {
        let [directory, key_file] = AUTHORITY_KEY;
        private_directory(dir)?;
        let path = dir.join(AUTHORITY);
        if path.exists() {
            let message = format!("{} exists; give another directory with --dir", path.display());
            return Err(Failure::new(Exit::Refused, message));
        }
        private_directory(&dir.join(directory))?;
        let params = Self::params(fleet)?;
        let key = key_pair()?;
        let certificate = params.self_signed(&key).map_err(|error| unmade(&error))?.pem();
        let key_path = dir.join(directory).join(key_file);
        create_private(&key_path, &key.serialize_pem()).map_err(|error| unwritten(&key_path, &error))?;
        write(&path, &certificate)?;
        Ok(Self { fleet: fleet.to_owned(), certificate, issuer: Issuer::new(params, key) })
    }

    /// What its own certificate says.
    fn params(fleet: &str) -> Result<CertificateParams, Failure> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("authority of {fleet}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names.push(uri(&format!("spiffe://{fleet}"))?);
        set_validity(&mut params, YEAR * 10);
        Ok(params)
    }

    /// Reads that of a directory.
    fn read(dir: &Path) -> Result<Self, Failure> {
        let [directory, key_file] = AUTHORITY_KEY;
        let (path, key_path) = (dir.join(AUTHORITY), dir.join(directory).join(key_file));
        let unusable = |path: &Path, problem: &dyn std::fmt::Display| {
            let message = format!("{} {problem}; `orchestrator certs init` creates an authority", path.display());
            Failure::new(Exit::Usage, message)
        };
        let pem = file::read(&path).map_err(|error| unusable(&path, &error))?;
        let certificate = String::from_utf8(pem).map_err(|_| unusable(&path, &"is not PEM"))?;
        let key = file::read_secret(&key_path).map_err(|error| unusable(&key_path, &error))?;
        let key = KeyPair::from_pem(&String::from_utf8_lossy(&key));
        let key = key.map_err(|error| unusable(&key_path, &format!("is not a private key: {error}")))?;
        let issued = Issued::of(certificate.as_bytes()).map_err(|problem| unusable(&path, &problem))?;
        let fleet = issued.owner.identity.strip_prefix("spiffe://").unwrap_or_default().to_owned();
        if parse_fleet(&fleet).is_err() {
            return Err(unusable(&path, &"is not an authority that `orchestrator certs` has created"));
        }
        if issued.public_key != key.subject_public_key_info() {
            return Err(unusable(&key_path, &format!("is not the key of {}", path.display())));
        }
        let issuer = Issuer::new(Self::params(&fleet)?, key);
        Ok(Self { fleet, certificate, issuer })
    }
}

impl Authority {
    /// Checks that it has signed a certificate, valid or expired: anybody who can write the file could otherwise have
    /// the names in it signed.
    fn check(&self, directory: &Path, issued: &Issued) -> Result<(), Failure> {
        let verified = || {
            let authority = CertificateDer::from_pem_slice(self.certificate.as_bytes()).ok()?;
            let anchor = anchor_from_trusted_cert(&authority).ok()?;
            let certificate = CertificateDer::from(&issued.der[..]);
            let at = UnixTime::since_unix_epoch(Duration::from_secs(issued.expires_at.as_second().try_into().ok()?));
            let parsed = EndEntityCert::try_from(&certificate).ok()?;
            let (algorithms, usage) = (&[ECDSA_P256_SHA256], KeyUsage::client_auth());
            parsed.verify_for_usage(algorithms, &[anchor], &[], at, usage, None, None).ok().map(drop)
        };
        verified().ok_or_else(|| {
            let path = directory.join(CERTIFICATE);
            Failure::new(Exit::Refused, format!("{} is not from this authority: it is not renewed", path.display()))
        })
    }
}

/// Issues a certificate into a directory: it replaces the one that is there.
fn issue(authority: &Authority, to: &Path, owner: &Owner, valid_for: SignedDuration) -> Result<(), Failure> {
    let mut params = CertificateParams::new(owner.hosts.clone()).map_err(|error| unmade(&error))?;
    params.subject_alt_names.push(uri(&owner.identity)?);
    params.distinguished_name.push(DnType::CommonName, owner.identity.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if !owner.hosts.is_empty() {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, valid_for);
    let key = key_pair()?;
    let certificate = params.signed_by(&key, &authority.issuer).map_err(|error| unmade(&error))?.pem();
    private_directory(to)?;
    // The service reads both again when one has changed, and keeps the earlier pair while they don't belong together.
    for (name, text) in [(KEY, &key.serialize_pem()), (CERTIFICATE, &certificate), (AUTHORITY, &authority.certificate)]
    {
        write(&to.join(name), text)?;
    }
    let until = HOST.clock.now().saturating_add(valid_for).unwrap_or(Timestamp::MAX);
    note(&format!("{}: cert:{} until {}", to.display(), owner.identity, instant(until)));
    Ok(())
}

fn renew(dir: &Path, names: &[Name], within: SignedDuration) -> Result<(), Failure> {
    let authority = Authority::read(dir)?;
    let end = HOST.clock.now().saturating_add(within).unwrap_or(Timestamp::MAX);
    let all = all(dir)?;
    if let Some(unknown) = names.iter().find(|name| !all.iter().any(|(known, _)| known == name.as_str())) {
        let meant = nearest(unknown.as_str(), all.iter().map(|(known, _)| known.as_str()));
        let did_you_mean = meant.map_or_else(String::new, |meant| format!(" Did you mean {meant}?"));
        let message = format!(
            "{} has no certificate for {unknown}.{did_you_mean} To list all: orchestrator certs list",
            dir.display()
        );
        return Err(Failure::new(Exit::Refused, message));
    }
    let is_wanted = |name: &str, issued: &Issued| match names {
        [] => issued.expires_at <= end,
        names => names.iter().any(|wanted| wanted.as_str() == name),
    };
    let wanted: Vec<_> = all.into_iter().filter(|(name, issued)| is_wanted(name, issued)).collect();
    if wanted.is_empty() {
        note("no certificate expires soon");
    }
    for (name, issued) in wanted {
        authority.check(&dir.join(&name), &issued)?;
        issue(&authority, &dir.join(name), &issued.owner, issued.valid_for)?;
    }
    Ok(())
}

fn list(dir: &Path) -> Result<String, Failure> {
    let mut table = Table::new([left("NAME"), left("IDENTITY"), long("HOSTS").whole(), left("EXPIRES")]);
    for (name, Issued { owner, expires_at, .. }) in all(dir)? {
        let hosts = if owner.hosts.is_empty() { "-".to_owned() } else { owner.hosts.join(" ") };
        table.row([text(name), text(format!("cert:{}", owner.identity)), text(hosts), text(expiry(expires_at))]);
    }
    Ok(table.or("no certificates", Page::of_stdout(false)))
}

/// A certificate that was issued.
struct Issued {
    owner: Owner,
    expires_at: Timestamp,
    valid_for: SignedDuration,
    public_key: Vec<u8>,
    der: Vec<u8>,
}

impl Issued {
    /// Reads one.
    ///
    /// # Errors
    /// It is not a certificate with an identity.
    fn of(pem: &[u8]) -> Result<Self, String> {
        let (_, pem) = parse_x509_pem(pem).map_err(|_| "is not a certificate in PEM".to_owned())?;
        let (_, parsed) = X509Certificate::from_der(&pem.contents).map_err(|_| "is not a certificate".to_owned())?;
        let names = parsed.subject_alternative_name().ok().flatten();
        let names = names.map(|names| &names.value.general_names[..]).unwrap_or_default();
        let identity = names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        let hosts = names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => <[u8; 4]>::try_from(*bytes)
                .map(IpAddr::from)
                .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                .ok()
                .map(|address| address.to_string()),
            _ => None,
        });
        let validity = parsed.validity();
        let [from, until] = [validity.not_before, validity.not_after]
            .map(|at| Timestamp::from_second(at.timestamp()).unwrap_or(Timestamp::MAX));
        Ok(Self {
            owner: Owner { identity: identity.ok_or("has no URI that identifies its owner")?, hosts: hosts.collect() },
            expires_at: until,
            valid_for: until.duration_since(from) - BEFORE,
            public_key: parsed.public_key().raw.to_vec(),
            der: pem.contents.clone(),
        })
    }
}

/// The certificates in a directory, by name.
fn all(dir: &Path) -> Result<Vec<(String, Issued)>, Failure> {
    let unreadable = |error: io::Error| {
        let message = format!("{} can't be read: {error}; `orchestrator certs init` creates it", dir.display());
        Failure::new(Exit::Usage, message)
    };
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let path = entry.path().join(CERTIFICATE);
        let (Ok(name), true) = (entry.file_name().into_string(), path.exists()) else { continue };
        let pem = file::read(&path).map_err(|error| error.to_string());
        let issued = pem.and_then(|pem| Issued::of(&pem));
        let issued = issued.map_err(|problem| Failure::new(Exit::Usage, format!("{} {problem}", path.display())))?;
        all.push((name, issued));
    }
    all.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(all)
}

/// Certificates are valid from some time before they are made, for machines whose clock is behind.
const BEFORE: SignedDuration = SignedDuration::from_hours(1);

fn set_validity(params: &mut CertificateParams, length: SignedDuration) {
    let now = HOST.clock.now();
    let at = |at: Timestamp| date_time_ymd(1970, 1, 1) + Duration::from_secs(at.as_second().unsigned_abs());
    params.not_before = at(now.saturating_sub(BEFORE).unwrap_or(now));
    params.not_after = at(now.saturating_add(length).unwrap_or(now));
}

fn key_pair() -> Result<KeyPair, Failure> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| unmade(&error))
}

fn uri(text: &str) -> Result<SanType, Failure> {
    // The service refuses longer ones.
    if text.len() > Identity::MAX_LEN {
        let message = format!("the identity {text} is longer than {} characters", Identity::MAX_LEN);
        return Err(Failure::new(Exit::Usage, message));
    }
    Ok(SanType::URI(text.try_into().map_err(|error| unmade(&error))?))
}

/// Creates a directory that only its owner can use. One that is there stays as it is.
fn private_directory(path: &Path) -> Result<(), Failure> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| unwritten(path, &error))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    file::replace(path, text).map_err(|error| unwritten(path, &error))
}

fn unmade(error: &rcgen::Error) -> Failure {
    Failure::new(Exit::Refused, format!("the certificate can't be made: {error}"))
}

fn unwritten(path: &Path, error: &io::Error) -> Failure {
    Failure::new(Exit::Refused, format!("{} can't be written: {error}", path.display()))
}
