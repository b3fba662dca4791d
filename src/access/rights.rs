use std::{collections::BTreeMap, fmt, ops::RangeInclusive, time::Duration};

use super::{Role, pattern::Glob};
use crate::model::{Endpoint, Limits, Name};

/// The rights of an identity: the sum of those of its grants. None without a grant.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rights(pub(super) Vec<Right>);

/// The right that one grant gives to an identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Right {
    pub(super) role: Role,
    pub(super) subsystems: Vec<Glob>,
    pub(super) loops: Vec<Glob>,
    pub(super) reads: Vec<Glob>,
    pub(super) phases: RangeInclusive<i32>,
    pub(super) endpoints: Vec<EndpointGlob>,
    pub(super) max_timeout: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum EndpointGlob {
    Tcp { is_tls: bool, host: Glob, port: Option<u16> },
    Unix(Glob),
}

/// The things that a request concerns, as it names them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Targets<'a> {
    /// True if it concerns all subsystems.
    pub all_subsystems: bool,
    /// It concerns these subsystems.
    pub subsystems: Vec<&'a str>,
    /// It starts, stops, pauses or resumes this loop.
    pub r#loop: Option<&'a str>,
    /// True if it pauses or resumes all loops.
    pub all_loops: bool,
    /// True if it asks for outputs, or for snapshots, for which subsystems are called.
    pub details: bool,
    /// True if it asks for an audit event.
    pub audit: bool,
    /// It makes these registrations.
    pub registrations: Vec<Registering<'a>>,
}

/// A registration that a caller asks for, as far as a grant limits it.
#[derive(Clone, Debug, PartialEq)]
pub struct Registering<'a> {
    /// The subsystem.
    pub name: &'a str,
    /// Where it is to be dialed.
    pub endpoint: &'a str,
    /// Its phase.
    pub phase: i32,
    /// The names in `requires`, `after` and `reads`.
    pub inputs: Vec<&'a str>,
    /// Its timeout.
    pub timeout: Duration,
    /// True if a cycle in which it fails is FAILED.
    pub critical: bool,
    /// True if the record of each cycle contains its output.
    pub record_output: bool,
    /// The limits on its answers.
    pub limits: Limits,
    /// The server that must answer, if it says so.
    pub peer: &'a str,
}

impl<'a> Targets<'a> {
    /// The same, where a former name of a subsystem means the present one: among the inputs of registrations, and among
    /// the subsystems of a request.
    #[must_use]
    pub fn by_present_names(mut self, renamed: &'a BTreeMap<Name, Name>) -> Self {
        let inputs = self.registrations.iter_mut().flat_map(|registration| &mut registration.inputs);
        for name in inputs.chain(&mut self.subsystems) {
            *name = renamed.get(*name).map_or(*name, Name::as_str);
        }
        self
    }
}

impl Targets<'_> {
    /// A request over all subsystems.
    pub const ALL: Targets<'static> = Targets {
        all_subsystems: true,
        subsystems: Vec::new(),
        r#loop: None,
        all_loops: false,
        details: false,
        audit: false,
        registrations: Vec::new(),
    };
}

impl Rights {
    /// The rights, each from one grant.
    pub fn iter(&self) -> impl Iterator<Item = &Right> {
        self.0.iter()
    }

    /// True if they are those of an administrator.
    #[must_use]
    pub fn are_unlimited(&self) -> bool {
        self.iter().any(Right::is_unlimited)
    }

    /// True if they are those of an operator of this subsystem.
    #[must_use]
    pub fn operate(&self, subsystem: &str) -> bool {
        self.operate_on(|right| any(&right.subsystems, subsystem))
    }

    /// True if they are those of an operator of this loop.
    #[must_use]
    pub fn operate_loop(&self, name: &str) -> bool {
        self.operate_on(|right| any(&right.loops, name))
    }

    fn operate_on(&self, covers: impl Fn(&Right) -> bool) -> bool {
        self.iter().any(|right| right.is_unlimited() || (right.role == Role::Operator && covers(right)))
    }

    /// Checks that rights of these roles cover all targets.
    ///
    /// # Errors
    /// A target that none of them covers, for messages; empty if there is no such right.
    pub fn cover(&self, roles: &[Role], targets: &Targets<'_>) -> Result<(), String> {
        let rights: Vec<_> = self.iter().filter(|right| roles.contains(&right.role)).collect();
        let covered =
            |target: &dyn Fn(&Right) -> bool| rights.iter().any(|right| right.is_unlimited() || target(right));
        if rights.is_empty() {
            return Err(String::new());
        }
        if targets.all_subsystems && !covered(&|right| right.subsystems.iter().any(Glob::is_any)) {
            return Err("all subsystems".into());
        }
        let uncovered = |name: &&&str| !covered(&|right| any(&right.subsystems, name));
        if let Some(name) = targets.subsystems.iter().find(uncovered) {
            return Err(format!("subsystem {name}"));
        }
        if let Some(name) = targets.r#loop.filter(|name| !covered(&|right| any(&right.loops, name))) {
            return Err(format!("loop {name}"));
        }
        if targets.all_loops && !covered(&|right| right.loops.iter().any(Glob::is_any)) {
            return Err("all loops".into());
        }
        // By the right of an operator of exactly these subsystems, whatever other rights cover them.
        let operated =
            |target: &dyn Fn(&Right) -> bool| covered(&|right| right.role == Role::Operator && target(right));
        let are_operated = operated(&|_| true)
            && (!targets.all_subsystems || operated(&|right| right.subsystems.iter().any(Glob::is_any)))
            && targets.subsystems.iter().all(|name| operated(&|right| any(&right.subsystems, name)));
        if targets.details && !are_operated {
            return Err("outputs and snapshots".into());
        }
        if targets.audit && !covered(&|right| right.role == Role::Auditor) {
            return Err("the audit".into());
        }
        for registration in &targets.registrations {
            // The parts of a registration belong together, so one grant must cover all of them.
            let mut missing = rights.iter().map(|right| right.lacks(registration));
            let first = missing.next().flatten();
            if let Some(target) = first.filter(|_| missing.all(|missing| missing.is_some())) {
                return Err(target);
            }
        }
        Ok(())
    }
}

fn any(globs: &[Glob], name: &str) -> bool {
    // A grant for everything is also one for malformed names, which are refused as such.
    globs.iter().any(|glob| glob.is_any() || glob.matches(name))
}

impl Right {
    /// The role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// That of an administrator.
    pub(super) const ADMIN: Self = Self {
        role: Role::Admin,
        subsystems: Vec::new(),
        loops: Vec::new(),
        reads: Vec::new(),
        phases: 0..=0,
        endpoints: Vec::new(),
        max_timeout: Duration::ZERO,
    };

    /// Patterns of the subsystems that it is for.
    pub fn subsystems(&self) -> impl Iterator<Item = String> {
        self.subsystems.iter().map(ToString::to_string)
    }

    /// Patterns of the loops that it is for.
    pub fn loops(&self) -> impl Iterator<Item = String> {
        self.loops.iter().map(ToString::to_string)
    }

    /// Patterns of the subsystems that a registration may name.
    pub fn reads(&self) -> impl Iterator<Item = String> {
        self.reads.iter().map(ToString::to_string)
    }

    /// Patterns of the endpoints of a registration.
    pub fn endpoints(&self) -> impl Iterator<Item = String> {
        self.endpoints.iter().map(ToString::to_string)
    }

    /// The lowest and the highest phase of a registration, if any is allowed.
    #[must_use]
    pub fn phases(&self) -> Option<RangeInclusive<i32>> {
        Some(self.phases.clone()).filter(|phases| !phases.is_empty())
    }

    /// The longest timeout of a registration.
    #[must_use]
    pub fn max_timeout(&self) -> Duration {
        self.max_timeout
    }

    fn is_unlimited(&self) -> bool {
        self.role == Role::Admin
    }

    /// The part of a registration that it does not cover.
    fn lacks(&self, registration: &Registering<'_>) -> Option<String> {
        let Registering { name, endpoint, phase, inputs, timeout, critical, record_output, limits, peer } =
            registration;
        if self.is_unlimited() {
            return None;
        }
        let of = |what: String| Some(format!("{what} of subsystem {name}"));
        let input = inputs.iter().find(|input| !any(&self.reads, input));
        let exceeds = |limit: fn(&Limits) -> u32| limit(limits) > limit(&Limits::DEFAULT);
        let exceeds_limits = exceeds(|it| it.max_message_bytes)
            || exceeds(|it| it.max_output_bytes)
            || exceeds(|it| it.max_metrics)
            || exceeds(|it| it.max_issues);
        match () {
            () if !any(&self.subsystems, name) => Some(format!("subsystem {name}")),
            () if !self.endpoints.iter().any(|glob| glob.matches(endpoint)) => of(format!("endpoint {endpoint}")),
            () if input.is_some() => of(format!("input {}", input.unwrap_or(&""))),
            () if !self.phases.contains(phase) => of(format!("phase {phase}")),
            () if *critical => of("critical".into()),
            () if *record_output => of("record_output".into()),
            () if *timeout > self.max_timeout => of("timeout".into()),
            () if exceeds_limits => of("limits".into()),
            () if !peer.is_empty() => of(format!("tls.peer {peer}")),
            () => None,
        }
    }
}

impl fmt::Display for EndpointGlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { is_tls, host, port } => {
                let scheme = if *is_tls { "https" } else { "http" };
                let port = port.map_or_else(|| "*".to_owned(), |port| port.to_string());
                write!(f, "{scheme}://{host}:{port}")
            }
            Self::Unix(path) => write!(f, "unix:{path}"),
        }
    }
}

impl EndpointGlob {
    fn matches(&self, text: &str) -> bool {
        let tcp = |of_tls: bool, uri: &str| {
            let Self::Tcp { is_tls, host, port } = self else { return false };
            let authority = uri.split_once("://").map_or("", |(_, authority)| authority);
            let Some((of_host, of_port)) = authority.rsplit_once(':') else { return false };
            let is_port = port.is_none_or(|port| of_port.parse() == Ok(port));
            *is_tls == of_tls && is_port && host.matches(&of_host.to_ascii_lowercase())
        };
        match Endpoint::parse(text) {
            Ok(Endpoint::Http(uri)) => tcp(false, &uri),
            Ok(Endpoint::Https(uri)) => tcp(true, &uri),
            Ok(Endpoint::Unix(path)) => {
                let Self::Unix(glob) = self else { return false };
                // `..` would lead out of the directories of the pattern.
                !path.split('/').any(|step| step == "..") && glob.matches(&path)
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        access::{Grant, GrantSpec, Mode, Policy, Revoked},
        model::{Identity, Violations},
    };

    const EVERY: &[Role] = &Role::ALL;

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    /// The rights of an identity by grants for `who`.
    fn rights(who: &str, identity: &str, grants: &[GrantSpec]) -> Rights {
        let grant = |spec: &GrantSpec| Grant::from_spec(&GrantSpec { who: texts(&[who]), ..spec.clone() }).unwrap();
        let policy = Policy::new(Mode::Enforce, grants.iter().map(grant).collect(), Vec::new(), Revoked::default(), 1);
        policy.rights(&Identity::parse(identity).unwrap(), &[])
    }

    fn of(role: Role, subsystems: &[&str]) -> GrantSpec {
        GrantSpec { role: Some(role), subsystems: texts(subsystems), ..GrantSpec::default() }
    }

    fn named<'a>(names: &[&'a str]) -> Targets<'a> {
        Targets { subsystems: names.to_vec(), ..Targets::default() }
    }

    fn registering(name: &str) -> Registering<'_> {
        Registering {
            name,
            endpoint: "https://a.dreamnet:1",
            phase: 0,
            inputs: Vec::new(),
            timeout: Duration::from_secs(10),
            critical: false,
            record_output: false,
            limits: Limits::DEFAULT,
            peer: "",
        }
    }

    #[test]
    fn grants_add_up_and_what_is_omitted_is_not_granted() {
        let operator = |subsystems: &[&str]| of(Role::Operator, subsystems);
        let rights = |grants: &[GrantSpec]| rights("token:a", "token:a", grants);
        let both = rights(&[operator(&["a", "b*"]), operator(&["c"])]);
        assert_eq!(both.cover(EVERY, &named(&["a", "bb", "c"])), Ok(()));
        assert_eq!(both.cover(EVERY, &named(&["a", "d"])), Err("subsystem d".into()));
        assert_eq!(both.cover(EVERY, &Targets::ALL), Err("all subsystems".into()));
        assert_eq!(both.cover(&[Role::Viewer], &Targets::default()), Err(String::new()));
        assert_eq!(rights(&[operator(&["*"])]).cover(EVERY, &Targets::ALL), Ok(()));
        let all = Targets { all_loops: true, ..Targets::default() };
        let loops = |loops: &[&str]| GrantSpec { loops: texts(loops), ..of(Role::Operator, &["*"]) };
        let cover_all = |spec| rights(&[spec]).cover(EVERY, &all);
        assert_eq!(cover_all(loops(&["l*", "m"])), Err("all loops".into()));
        assert_eq!(cover_all(loops(&["*"])), Ok(()));
        let starts = Targets { r#loop: Some("l"), ..Targets::default() };
        assert_eq!(rights(&[operator(&["*"])]).cover(EVERY, &starts), Err("loop l".into()));
        let details = Targets { details: true, ..named(&["a"]) };
        assert_eq!(both.cover(EVERY, &details), Ok(()));
        assert_eq!(rights(&[of(Role::Viewer, &["*"])]).cover(EVERY, &details), Err("outputs and snapshots".into()));
        // A viewer of all is an operator of one.
        let mixed = rights(&[of(Role::Viewer, &["*"]), operator(&["b"])]);
        assert_eq!(mixed.cover(EVERY, &Targets { details: true, ..named(&["b"]) }), Ok(()));
        for details in [details, Targets { details: true, ..Targets::ALL }] {
            assert_eq!(mixed.cover(EVERY, &details), Err("outputs and snapshots".into()));
        }
        let admin = Targets { details: true, registrations: vec![registering("x")], r#loop: Some("l"), ..Targets::ALL };
        assert_eq!(rights(&[of(Role::Admin, &[])]).cover(EVERY, &admin), Ok(()));
        assert_eq!(rights(&[]).cover(EVERY, &Targets::default()), Err(String::new()));
        assert_eq!(super::Rights::default(), self::rights("token:b", "token:a", &[of(Role::Admin, &[])]));
    }

    #[test]
    fn a_registration_must_be_covered_in_all_its_parts_by_one_grant() {
        let grant = GrantSpec {
            reads: texts(&["x", "shared-*"]),
            phases: vec![0, 60],
            endpoints: texts(&["https://*.dreamnet:*", "unix:/run/fleet/*"]),
            ..of(Role::Registrar, &["{1}", "{1}-*"])
        };
        let elsewhere = GrantSpec { endpoints: texts(&["http://[::1]:80"]), ..of(Role::Registrar, &["other"]) };
        let rights = rights("cert:spiffe://dreamnet/*", "cert:spiffe://dreamnet/a", &[grant, elsewhere]);
        let cover = |change: &dyn Fn(&mut Registering<'_>)| {
            let mut registration = registering("a");
            change(&mut registration);
            rights.cover(EVERY, &Targets { registrations: vec![registration], ..Targets::default() })
        };
        assert_eq!(cover(&|_| {}), Ok(()));
        assert_eq!(cover(&|it| it.name = "a-1"), Ok(()));
        assert_eq!(cover(&|it| it.inputs = vec!["x", "shared-y"]), Ok(()));
        for endpoint in ["https://B.DREAMNET:65535", "unix:/run/fleet/a", "unix:///run/fleet/a"] {
            assert_eq!(cover(&|it| it.endpoint = endpoint), Ok(()), "{endpoint}");
        }
        assert_eq!(cover(&|it| (it.name, it.phase) = ("b", 99)), Err("subsystem b".into()));
        for endpoint in [
            "http://a.dreamnet:1",
            "https://dreamnet:1",
            "https://a.dreamnet.example:1",
            "https://a@b.dreamnet:1",
            "https://a/.dreamnet:1",
            "unix:/run/fleet/../x",
            "unix:/run/fleet/..",
            "unix:/run/x",
            "http://[::1]:80",
            "nonsense",
        ] {
            let expected = format!("endpoint {endpoint} of subsystem a");
            assert_eq!(cover(&|it| it.endpoint = endpoint), Err(expected), "{endpoint}");
        }
        let of_a = |what: &str| Err(format!("{what} of subsystem a"));
        assert_eq!(cover(&|it| it.inputs = vec!["x", "y"]), of_a("input y"));
        assert_eq!(cover(&|it| it.phase = 61), of_a("phase 61"));
        assert_eq!(cover(&|it| it.critical = true), of_a("critical"));
        assert_eq!(cover(&|it| it.record_output = true), of_a("record_output"));
        assert_eq!(cover(&|it| it.timeout = Duration::from_millis(10_001)), of_a("timeout"));
        assert_eq!(cover(&|it| it.limits.max_issues += 1), of_a("limits"));
        assert_eq!(cover(&|it| it.limits.max_output_bytes = 0), Ok(()));
    }

    #[test]
    fn a_grant_names_every_invalid_key() {
        let bad = |spec: &GrantSpec| {
            let Violations(bad) = Grant::from_spec(spec).unwrap_err();
            bad.into_iter().map(|it| it.field).collect::<Vec<_>>()
        };
        assert_eq!(bad(&GrantSpec::default()), ["who", "role"]);
        let who = texts(&["token:*", "wall", "cert:**"]);
        let monitor = GrantSpec { who, loops: texts(&["*"]), ..of(Role::Monitor, &["*"]) };
        assert_eq!(bad(&monitor), ["subsystems", "loops", "who[1]", "who[2]"]);
        let registrar = GrantSpec {
            who: texts(&["token:*", "token:a"]),
            phases: vec![1, 0],
            endpoints: texts(&["https://h", "ftp://h:1", "https://h:0", "https://*/x:1", "unix:a", "http://{1}:1"]),
            max_timeout: Some("0s".parse().unwrap()),
            ..of(Role::Registrar, &["{1}"])
        };
        let endpoints = (0..6).map(|number| format!("endpoints[{number}]"));
        let expected = ["subsystems[0]".to_owned()].into_iter().chain(endpoints);
        let expected = expected.chain(["phases".to_owned(), "max_timeout".to_owned()]);
        assert_eq!(bad(&registrar), expected.collect::<Vec<_>>());
        let long = GrantSpec { subsystems: vec!["a".into(); 101], who: texts(&["uid:0"]), ..of(Role::Viewer, &[]) };
        assert_eq!(bad(&long), ["subsystems"]);
    }

    proptest! {
        /// Such as a certificate with the name `*`, or with `{1}`.
        #[test]
        fn the_name_of_an_identity_widens_nothing(owner in "[a-c*{}1/]{1,6}", name in "[a-c*{}1]{1,3}") {
            let of_name = of(Role::Operator, &["{1}"]);
            let rights = rights("cert:spiffe://d/*", &format!("cert:spiffe://d/{owner}"), &[of_name]);
            let is_covered = rights.cover(EVERY, &named(&[&name])).is_ok();
            let is_name = crate::model::Name::parse(&owner).is_ok();
            prop_assert_eq!(is_covered, is_name && owner == name);
            prop_assert!(rights.cover(EVERY, &Targets::ALL).is_err());
        }
    }
}
