use std::{ops::RangeInclusive, time::Duration};

use jiff::SignedDuration;

use super::{
    Right,
    pattern::{Glob, Pattern},
    rights::EndpointGlob,
};
use crate::model::{Identity, IdentityKind, Subsystem, Violations};

/// The purpose of a grant. `api/rules.rs` lists the roles that may call each RPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Scrapes metrics, and reads the status without records.
    Monitor,
    /// Reads everything but outputs and snapshots of subsystems.
    Viewer,
    /// Reads everything, runs cycles, and starts and stops loops.
    Operator,
    /// Registers subsystems.
    Registrar,
    /// Reads as a viewer, and the history of calls.
    Auditor,
    /// May do everything.
    Admin,
}

impl Role {
    /// All roles.
    pub const ALL: [Self; 6] =
        [Self::Monitor, Self::Viewer, Self::Operator, Self::Registrar, Self::Auditor, Self::Admin];

    /// As it is written in a grant.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Monitor => "monitor",
            Self::Viewer => "viewer",
            Self::Operator => "operator",
            Self::Registrar => "registrar",
            Self::Auditor => "auditor",
            Self::Admin => "admin",
        }
    }

    /// The keys of a grant that limit this role.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Monitor | Self::Admin => &[],
            Self::Viewer | Self::Auditor => &["subsystems"],
            Self::Operator => &["subsystems", "loops"],
            Self::Registrar => &["subsystems", "reads", "phases", "endpoints", "max_timeout"],
        }
    }
}

/// A grant as it is written: see `examples/orchestrator.toml`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GrantSpec {
    /// Patterns of identities.
    pub who: Vec<String>,
    /// The role.
    pub role: Option<Role>,
    /// Patterns of subsystems.
    pub subsystems: Vec<String>,
    /// Patterns of loops that an operator may start and stop.
    pub loops: Vec<String>,
    /// Patterns of subsystems that a registration may name in `requires`, `after` and `reads`.
    pub reads: Vec<String>,
    /// The lowest and the highest phase of a registration.
    pub phases: Vec<i32>,
    /// Patterns of endpoints of a registration.
    pub endpoints: Vec<String>,
    /// The longest timeout of a registration.
    pub max_timeout: Option<SignedDuration>,
}

/// Gives a role to identities, for some targets. Grants add up.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    who: Vec<Who>,
    role: Role,
    subsystems: Vec<Pattern>,
    loops: Vec<Pattern>,
    reads: Vec<Pattern>,
    phases: RangeInclusive<i32>,
    endpoints: Vec<EndpointPattern>,
    max_timeout: Duration,
}

/// A pattern of identities of one kind.
#[derive(Clone, Debug, PartialEq)]
struct Who {
    kind: IdentityKind,
    name: Glob,
    stars: usize,
}

impl Who {
    fn parse(text: &str) -> Result<Self, String> {
        let (kind, name) = IdentityKind::split(text).map_err(|error| error.to_string())?;
        let pattern = Pattern::parse(name, 0)?;
        let stars = pattern.stars();
        let name = pattern.glob(&[]).ok_or("is not a pattern")?;
        Ok(Self { kind, name, stars })
    }
}

/// A pattern of endpoints. The parts of an endpoint are compared one by one, so that `*` stands for no part of a scheme
/// or a port.
#[derive(Clone, Debug, PartialEq)]
enum EndpointPattern {
    Tcp { is_tls: bool, host: Pattern, port: Option<u16> },
    Unix(Pattern),
}

impl EndpointPattern {
    fn parse(text: &str, captures: usize) -> Result<Self, String> {
        const FORMS: &str = "give http://host:port, https://host:port or unix:/path; * is allowed in the host \
                             and the path, and as port";
        if let Some(path) = text.strip_prefix("unix:") {
            let pattern = Pattern::parse(path, captures)?;
            return if path.starts_with('/') { Ok(Self::Unix(pattern)) } else { Err(FORMS.into()) };
        }
        let parts = [("http://", false), ("https://", true)];
        let found = parts.into_iter().find_map(|(scheme, is_tls)| Some((text.strip_prefix(scheme)?, is_tls)));
        let (authority, is_tls) = found.ok_or(FORMS)?;
        let (host, port) = authority.rsplit_once(':').ok_or(FORMS)?;
        let port = match port {
            "*" => None,
            port => Some(port.parse().ok().filter(|port| *port != 0).ok_or(FORMS)?),
        };
        if host.contains('/') {
            return Err(FORMS.into());
        }
        Ok(Self::Tcp { is_tls, host: Pattern::parse(host, captures)?, port })
    }

    fn glob(&self, captured: &[String]) -> Option<EndpointGlob> {
        Some(match self {
            Self::Tcp { is_tls, host, port } => {
                EndpointGlob::Tcp { is_tls: *is_tls, host: host.glob(captured)?.in_lower_case(), port: *port }
            }
            Self::Unix(path) => EndpointGlob::Unix(path.glob(captured)?),
        })
    }
}

impl Grant {
    /// Most grants of a policy.
    pub const MAX: usize = 1000;
    /// Most entries of each list of a grant.
    pub const MAX_ENTRIES: usize = 100;
    /// The default of `max_timeout`.
    pub const MAX_TIMEOUT: Duration = Subsystem::DEFAULT_TIMEOUT;

    /// Validates a grant.
    ///
    /// # Errors
    /// All invalid keys together.
    pub fn from_spec(spec: &GrantSpec) -> Result<Self, Violations> {
        let mut bad = Violations::default();
        if spec.who.is_empty() {
            bad.add("who", "is missing; give identities such as [\"token:NAME\"] or [\"cert:spiffe://trust/*\"]");
        }
        let role = spec.role.unwrap_or_else(|| {
            bad.add("role", format!("is missing; give {}", Role::ALL.map(Role::word).join(", ")));
            Role::Monitor
        });
        let is_written = [
            ("subsystems", !spec.subsystems.is_empty()),
            ("loops", !spec.loops.is_empty()),
            ("reads", !spec.reads.is_empty()),
            ("phases", !spec.phases.is_empty()),
            ("endpoints", !spec.endpoints.is_empty()),
            ("max_timeout", spec.max_timeout.is_some()),
        ];
        for (key, _) in is_written.into_iter().filter(|(key, is_written)| *is_written && !role.keys().contains(key)) {
            if spec.role.is_some() {
                bad.add(key, format!("does not limit the role {}; leave it out", role.word()));
            }
        }
        let who = parsed(&mut bad, "who", &spec.who, Who::parse);
        // Each identity must have the captures that a pattern uses.
        let captures = who.iter().map(|who| who.stars).min().unwrap_or_default();
        let mut patterns = |key, texts: &[String]| parsed(&mut bad, key, texts, |text| Pattern::parse(text, captures));
        let subsystems = patterns("subsystems", &spec.subsystems);
        let loops = patterns("loops", &spec.loops);
        let reads = patterns("reads", &spec.reads);
        let endpoints = parsed(&mut bad, "endpoints", &spec.endpoints, |text| EndpointPattern::parse(text, captures));
        let phases = match spec.phases[..] {
            // An empty range.
            #[expect(clippy::reversed_empty_ranges, reason = "no phase is inside")]
            [] => 1..=0,
            [lowest, highest] if lowest <= highest => lowest..=highest,
            _ => {
                bad.add("phases", "is not the lowest and the highest phase; give two numbers, such as [0, 60]");
                0..=0
            }
        };
        let max_timeout = bad.duration("max_timeout", spec.max_timeout, Self::MAX_TIMEOUT, Subsystem::TIMEOUTS);
        bad.into_result(Self { who, role, subsystems, loops, reads, phases, endpoints, max_timeout })
    }

    /// The rights that it gives to an identity and to its groups. Of several patterns in `who` that match one of these
    /// names, the first one counts.
    pub(super) fn rights_of<'a>(&'a self, identity: &'a Identity, groups: &'a [String]) -> impl Iterator<Item = Right> {
        let groups = groups.iter().map(|group| (IdentityKind::Group, group.into()));
        identity.parts().into_iter().chain(groups).filter_map(|(kind, name)| self.right_of(kind, &name))
    }

    fn right_of(&self, kind: IdentityKind, name: &str) -> Option<Right> {
        let captured = self.who.iter().filter(|who| who.kind == kind).find_map(|who| who.name.captures(name))?;
        let globs = |patterns: &[Pattern]| patterns.iter().filter_map(|pattern| pattern.glob(&captured)).collect();
        Some(Right {
            role: self.role,
            subsystems: globs(&self.subsystems),
            loops: globs(&self.loops),
            reads: globs(&self.reads),
            phases: self.phases.clone(),
            endpoints: self.endpoints.iter().filter_map(|pattern| pattern.glob(&captured)).collect(),
            max_timeout: self.max_timeout,
        })
    }
}

/// The parsed entries of a list. Refused ones are left out.
fn parsed<T>(bad: &mut Violations, key: &str, texts: &[String], parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
    if texts.len() > Grant::MAX_ENTRIES {
        bad.add(key, format!("has {} entries; the limit is {}", texts.len(), Grant::MAX_ENTRIES));
        return Vec::new();
    }
    let mut all = Vec::new();
    for (number, text) in texts.iter().enumerate() {
        match parse(text) {
            Ok(parsed) => all.push(parsed),
            Err(problem) => bad.add(format!("{key}[{number}]"), problem),
        }
    }
    all
}
