use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Component, Path, PathBuf},
};

use super::{
    Mode,
    pattern::{Glob, Pattern},
};
use crate::model::Endpoint;

/// Where the service may connect, at the request of those who register subsystems.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Whether its own rules are enforced, besides those that are written.
    pub mode: Mode,
    /// Hosts that are allowed. Empty: all.
    pub allow: Vec<Allowed>,
    /// True if connections without TLS may leave this machine, also if the mode is [`Mode::Enforce`].
    pub allow_http: bool,
    /// The directory of the sockets that are allowed. `None`: all, or none if the mode is [`Mode::Enforce`].
    pub unix_dir: Option<PathBuf>,
}

/// Hosts that are allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Addresses with these first bits.
    Network(Network),
    /// Names that match a pattern, in lower case.
    Name(HostPattern),
}

/// A range of addresses. RFC 4632, section 3.1; RFC 4291, section 2.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    /// Number of its first bits that count.
    prefix: u32,
}

/// A pattern of host names, in which `*` stands for one or more characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern(Glob);

impl Allowed {
    /// Most entries of a list.
    pub const MAX: usize = 1000;

    /// Parses a range such as `10.0.0.0/8`, an address, or a pattern such as `*.example.org`.
    ///
    /// # Errors
    /// The text has another form; the message reads well after it.
    pub fn parse(text: &str) -> Result<Self, String> {
        const FORMS: &str = "give a range of addresses such as 10.0.0.0/8 or fd00::/8, an address, or a pattern of \
                             host names such as *.example.org";
        if let Some(network) = Network::parse(text)? {
            return Ok(Self::Network(network));
        }
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'*');
        let pattern = Pattern::parse(text, 0).ok().filter(|_| text.bytes().all(is_host));
        let glob = pattern.and_then(|pattern| pattern.glob(&[]));
        let glob = glob.ok_or_else(|| format!("is {text:?}; {FORMS}"))?;
        Ok(Self::Name(HostPattern(glob.in_lower_case())))
    }
}

impl Network {
    /// Parses an address, with the number of bits that count or without. `None` if the text has another form.
    fn parse(text: &str) -> Result<Option<Self>, String> {
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let Ok(address) = address.parse::<IpAddr>() else { return Ok(None) };
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match bits {
            None => Some(width),
            Some(bits) => bits.parse().ok().filter(|prefix| *prefix <= width),
        };
        let prefix = prefix.ok_or_else(|| format!("is {text:?}; a prefix of {address} has 0 to {width} bits"))?;
        let network = Self { address, prefix };
        let begin = masked(address, prefix);
        if begin != address {
            return Err(format!("is {text:?}, which has more bits than its prefix; give {begin}/{prefix}"));
        }
        if canonical(address) != address && prefix == width {
            return Err(format!("is {text:?}; give {}, the address that it stands for", canonical(address)));
        }
        Ok(Some(network))
    }

    fn contains(self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.prefix) == self.address
    }
}

/// The address with only its first bits.
fn masked(address: IpAddr, prefix: u32) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            Ipv4Addr::from_bits(v4.to_bits() & u32::MAX.checked_shl(32 - prefix).unwrap_or_default()).into()
        }
        IpAddr::V6(v6) => {
            Ipv6Addr::from_bits(v6.to_bits() & u128::MAX.checked_shl(128 - prefix).unwrap_or_default()).into()
        }
    }
}

/// The address that packets reach in the end: that of IPv4 for one that is mapped to IPv6 (RFC 4291, section 2.5.5) or
/// that a gateway translates (NAT64, RFC 6052, section 2.1).
fn canonical(address: IpAddr) -> IpAddr {
    const NAT64: [u16; 6] = [0x64, 0xff9b, 0, 0, 0, 0];
    match address.to_canonical() {
        IpAddr::V6(v6) if v6.segments()[..6] == NAT64 => {
            let [.., a, b, c, d] = v6.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        address => address,
    }
}

/// Link-local addresses, where clouds have their metadata, and the unspecified one, which reaches this machine.
fn is_of_the_machine(address: IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    is_link_local || address.is_unspecified()
}

impl Reach {
    /// Checks an endpoint as far as it is known without looking up its name.
    ///
    /// # Errors
    /// It may not be dialed; the message reads well after the name of a field.
    pub fn check(&self, endpoint: &Endpoint) -> Result<(), String> {
        let of = |why: String| format!("is {endpoint}, {why}");
        match endpoint {
            Endpoint::Unix(path) => self.check_path(path).map_err(of),
            Endpoint::Http(uri) | Endpoint::Https(uri) => {
                let host = host(uri);
                let is_tls = matches!(endpoint, Endpoint::Https(_));
                match host.trim_matches(['[', ']']).parse() {
                    Ok(address) => self.check_address(is_tls, host, address).map_err(of),
                    Err(_) if self.may_reach(host) => Ok(()),
                    Err(_) => Err(of(not_allowed(&host))),
                }
            }
        }
    }

    /// Checks an address of a host, which is that of an `https` endpoint or of another one.
    ///
    /// # Errors
    /// No connection may be made to it; the message reads well after the address and a comma.
    pub fn check_address(&self, is_tls: bool, host: &str, address: IpAddr) -> Result<(), String> {
        let address = canonical(address);
        if self.mode == Mode::Enforce {
            if is_of_the_machine(address) {
                return Err(format!(
                    "where {address} is link-local or unspecified, which access.mode = \"enforce\" refuses"
                ));
            }
            if !is_tls && !self.allow_http && !address.is_loopback() {
                return Err(
                    "which has no TLS and is not on this machine: access.mode = \"enforce\" needs https://, or \
                            dial.allow_http = true"
                        .into(),
                );
            }
        }
        let is_allowed =
            self.allow.is_empty() || self.names_match(host) || self.networks().any(|network| network.contains(address));
        if is_allowed { Ok(()) } else { Err(not_allowed(&address)) }
    }

    fn check_path(&self, path: &str) -> Result<(), String> {
        let Some(directory) = &self.unix_dir else {
            return match self.mode {
                Mode::Enforce => {
                    Err("which access.mode = \"enforce\" refuses without dial.unix_dir, the directory of \
                                      the sockets of subsystems"
                        .into())
                }
                Mode::Off | Mode::DryRun => Ok(()),
            };
        };
        let path = Path::new(path);
        let leaves = path.components().any(|it| it == Component::ParentDir);
        if path.starts_with(directory) && path != directory && !leaves {
            Ok(())
        } else {
            Err(format!("which is not in dial.unix_dir, {}", directory.display()))
        }
    }

    /// True if a host may have an address that is allowed.
    fn may_reach(&self, host: &str) -> bool {
        self.allow.is_empty() || self.names_match(host) || self.networks().next().is_some()
    }

    /// True if a pattern allows this host. Addresses are no names: only ranges allow them.
    fn names_match(&self, host: &str) -> bool {
        let name = host.to_ascii_lowercase();
        let is_name = name.trim_matches(['[', ']']).parse::<IpAddr>().is_err();
        let matches = |allowed: &Allowed| matches!(allowed, Allowed::Name(HostPattern(glob)) if glob.matches(&name));
        is_name && self.allow.iter().any(matches)
    }

    fn networks(&self) -> impl Iterator<Item = &Network> {
        self.allow
            .iter()
            .filter_map(|allowed| if let Allowed::Network(network) = allowed { Some(network) } else { None })
    }
}

fn not_allowed(what: &dyn fmt::Display) -> String {
    format!("where {what} is not in dial.allow")
}

/// The host in an endpoint of TCP.
fn host(uri: &str) -> &str {
    let authority = uri.split_once("://").map_or(uri, |(_, authority)| authority);
    authority.rsplit_once(':').map_or(authority, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reach(mode: Mode, allow: &[&str]) -> Reach {
        Reach { mode, allow: allow.iter().map(|it| Allowed::parse(it).unwrap()).collect(), ..Reach::default() }
    }

    fn is_allowed(reach: &Reach, endpoint: &str) -> bool {
        reach.check(&Endpoint::parse(endpoint).unwrap()).is_ok()
    }

    #[test]
    fn link_local_addresses_are_refused_in_every_form() {
        let (enforced, off) = (reach(Mode::Enforce, &[]), reach(Mode::Off, &[]));
        for host in [
            "169.254.169.254",
            "169.254.0.1",
            "[::ffff:169.254.169.254]",
            "[::ffff:a9fe:a9fe]",
            "[64:ff9b::169.254.169.254]",
            "[fe80::1]",
            "[febf::1]",
            "0.0.0.0",
            "[::]",
            "[::ffff:0.0.0.0]",
        ] {
            let endpoint = format!("https://{host}:1");
            assert!(!is_allowed(&enforced, &endpoint), "{host}");
            assert!(!is_allowed(&reach(Mode::Enforce, &["0.0.0.0/0", "::/0"]), &endpoint), "{host}");
            assert!(is_allowed(&off, &endpoint), "{host}");
        }
        for host in ["169.253.255.255", "169.255.0.0", "[fec0::1]", "[64:ff9b:1::a9fe:a9fe]", "[::1]", "a.example"] {
            assert!(is_allowed(&enforced, &format!("https://{host}:1")), "{host}");
        }
        // The address of a name, as it is looked up.
        let address = "169.254.169.254".parse().unwrap();
        assert!(enforced.check_address(true, "a.example", address).is_err());
    }

    #[test]
    fn a_host_is_allowed_by_its_name_or_by_each_of_its_addresses() {
        let some = reach(Mode::Off, &["10.0.0.0/8", "fd00::/8", "127.0.0.1", "*.Example.org"]);
        for endpoint in [
            "http://10.1.2.3:1",
            "http://[::ffff:10.1.2.3]:1",
            "http://[fd12::1]:1",
            "http://127.0.0.1:1",
            "http://a.EXAMPLE.org:1",
            // Its addresses decide.
            "http://elsewhere:1",
        ] {
            assert!(is_allowed(&some, endpoint), "{endpoint}");
        }
        for endpoint in ["http://11.0.0.1:1", "http://127.0.0.2:1", "http://[fe00::1]:1", "http://[::1]:1"] {
            assert!(!is_allowed(&some, endpoint), "{endpoint}");
        }
        for (address, allowed) in [("10.9.9.9", true), ("11.0.0.1", false)] {
            assert_eq!(some.check_address(false, "elsewhere", address.parse().unwrap()).is_ok(), allowed);
            assert!(some.check_address(false, "a.example.org", address.parse().unwrap()).is_ok());
        }
        // A pattern of names allows no address.
        let names = reach(Mode::Off, &["*.*.*.*", "*"]);
        assert!(!is_allowed(&names, "http://1.2.3.4:1") && is_allowed(&names, "http://a:1"));
        assert!(!is_allowed(&reach(Mode::Off, &["a"]), "http://b:1"));
    }

    #[test]
    fn enforced_access_needs_tls_beyond_this_machine() {
        let enforced = reach(Mode::Enforce, &[]);
        assert!(is_allowed(&enforced, "http://127.0.0.9:1") && is_allowed(&enforced, "http://[::1]:1"));
        assert!(!is_allowed(&enforced, "http://10.0.0.1:1"));
        assert!(enforced.check_address(false, "a", "10.0.0.1".parse().unwrap()).is_err());
        let allowed = Reach { allow_http: true, ..enforced };
        assert!(is_allowed(&allowed, "http://10.0.0.1:1"));
    }

    #[test]
    fn sockets_lie_in_their_directory() {
        let within =
            |mode, directory: Option<&str>| Reach { mode, unix_dir: directory.map(PathBuf::from), ..Reach::default() };
        assert!(is_allowed(&within(Mode::Off, None), "unix:/a/b"));
        assert!(!is_allowed(&within(Mode::Enforce, None), "unix:/a/b"));
        let in_a = within(Mode::Enforce, Some("/a"));
        assert!(is_allowed(&in_a, "unix:/a/b") && is_allowed(&in_a, "unix:/a/c/b"));
        for outside in ["unix:/a", "unix:/ab", "unix:/b/a", "unix:/a/../b", "unix:/a/c/../b"] {
            assert!(!is_allowed(&in_a, outside), "{outside}");
        }
    }

    #[test]
    fn a_range_is_written_with_its_first_address() {
        for wrong in
            ["", "10.0.0.0/33", "10.0.0.0/x", "10.0.0.1/8", "fd00::1/8", "::ffff:10.0.0.1", "a b", "http://a", "a:1"]
        {
            assert!(Allowed::parse(wrong).is_err(), "{wrong}");
        }
        for right in ["0.0.0.0/0", "10.0.0.0/8", "::/0", "::1/128", "a", "a_b.example", "*"] {
            assert!(Allowed::parse(right).is_ok(), "{right}");
        }
    }
}
