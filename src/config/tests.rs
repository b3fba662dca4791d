use std::{collections::BTreeSet, fs};

use super::{reader::variable_name, *};

const README: &str = include_str!("../../README.md");
const REFERENCE: &str = include_str!("../../examples/orchestrator.toml");

fn read(text: &str) -> Result<Config, ConfigError> {
    Config::from_toml_str("orchestrator.toml", text)
}

fn problems(text: &str) -> Vec<String> {
    read(text).unwrap_err().problems.iter().map(ToString::to_string).collect()
}

/// The only problem of a configuration with these flags and variables.
fn problem(set: &[&str], environment: &[(&str, &str)]) -> String {
    let ConfigError { problems, .. } = load(set, environment).unwrap_err();
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0].to_string()
}

fn load(set: &[&str], environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let overrides = Overrides { set: set.iter().map(ToString::to_string).collect(), ..Overrides::default() };
    Config::load(&overrides, variables(environment))
}

fn variables(environment: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    environment.iter().map(|(name, value)| (name.into(), value.into())).collect()
}

#[test]
fn an_empty_configuration_has_the_defaults() {
    assert_eq!(load(&[], &[]).unwrap(), Config::default());
    assert_eq!(read("").unwrap(), Config::default());
    assert_eq!(read("[server]\n[store.retention.failed]\n").unwrap(), Config::default());
}

#[test]
fn flags_take_precedence_over_the_environment_and_that_over_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "[cycle]\ndeadline = \"1s\"\nmax_queued = 1\n[registry]\nmax_loops = 1\n").unwrap();
    let overrides = Overrides {
        config: Some(file.path().into()),
        set: vec!["cycle.deadline=3s".into(), "server={max_watchers = 3}".into(), "log.format=json".into()],
        listen: Some("[::1]:3".into()),
        log_format: Some("text".into()),
        ..Overrides::default()
    };
    let environment = variables(&[
        ("ORCHESTRATOR_CYCLE_DEADLINE", "2s"),
        ("ORCHESTRATOR_CYCLE_MAX_QUEUED", "2"),
        ("ORCHESTRATOR_SERVER_LISTEN", "127.0.0.1:2"),
        ("ORCHESTRATOR_SERVER_DRAIN_GRACE", "2s"),
        // A value is parsed as the type of the key.
        ("ORCHESTRATOR_ID", "7"),
        ("PATH", "/bin"),
    ]);
    let config = Config::load(&overrides, environment).unwrap();
    assert_eq!(config.cycle.deadline, Duration::from_secs(3));
    assert_eq!(config.cycle.max_queued, 2);
    assert_eq!(config.registry.max_loops, 1);
    assert_eq!(config.server.listen.to_string(), "[::1]:3");
    assert_eq!(config.server.max_watchers, 3);
    assert_eq!(config.server.drain_grace, Duration::from_secs(2));
    assert_eq!(config.orchestrator_id, "7");
    assert_eq!(config.log.format, LogFormat::Text);
    assert_eq!(config.dial, Config::default().dial);
}

#[test]
fn flags_are_read() {
    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        overrides: Overrides,
    }
    let line = "serve --listen 0.0.0.0:1 --insecure-listen-beyond-loopback --store memory: --log-filter debug \
                --log-format json --set cycle.deadline=1s --set cycle.max_queued=1";
    let Command { overrides } = clap::Parser::parse_from(line.split_whitespace());
    let expected = Config {
        server: ServerSettings {
            listen: "0.0.0.0:1".parse().unwrap(),
            insecure_listen_beyond_loopback: true,
            ..Config::default().server
        },
        store: StoreSettings { url: StoreUrl::Memory, ..Config::default().store },
        cycle: CycleSettings { deadline: Duration::from_secs(1), max_queued: 1, ..Config::default().cycle },
        log: LogSettings { filter: "debug".into(), format: LogFormat::Json },
        ..Config::default()
    };
    assert_eq!(Config::load(&Overrides { config: None, ..overrides }, []).unwrap(), expected);
}

#[test]
fn lists_can_come_from_flags_and_variables() {
    let config = load(
        &[r#"subsystems=[{name = "A", endpoint = "unix:/a", retry = {max_attempts = 5}}]"#],
        &[("ORCHESTRATOR_LOOPS", r#"[{name = "l", interval = "1s"}]"#)],
    )
    .unwrap();
    assert_eq!(config.subsystems[0].retry.max_attempts, 5);
    assert_eq!(config.loops[0].interval, Duration::from_secs(1));
}

#[test]
fn every_problem_is_reported_at_once_with_its_line() {
    let found = problems(
        r#"
orchestrator_id = ""
listen = "127.0.0.1:1"

[server]
listn = "127.0.0.1:1"
listen = "localhost:7700"
max_watchers = -1
max_connections = "many"
drain_grace = 30

[store]
url = "postgres://u:secret@h"
retention.failed.max_age = "0s"

[cycle]
deadline = "25h"
max_queued = 1.5
started = 2026-01-01

[log]
filter = "inof"
format = "xml"

[servers]
a = 1
b = 2
"#,
    );
    assert_eq!(
        found,
        [
            "orchestrator.toml:2: orchestrator_id is \"\"; give 1 to 128 letters, digits and signs, without spaces",
            "orchestrator.toml:3: listen is unknown; did you mean server.listen?",
            "orchestrator.toml:6: server.listn is unknown; did you mean server.listen?",
            "orchestrator.toml:7: server.listen is \"localhost:7700\"; give an IP address and a port, such as \
             127.0.0.1:7700 or [::1]:7700",
            "orchestrator.toml:8: server.max_watchers is -1; give a whole number from 0 to 100000",
            "orchestrator.toml:9: server.max_connections is \"many\"; give a whole number from 1 to 1000000",
            "orchestrator.toml:10: server.drain_grace is 30; give a duration with its unit, such as \"5s\", \"1m \
             30s\" or \"48h\", from 0s to 1h",
            "orchestrator.toml:13: store.url is \"postgres://u@h\"; it names no database; give \
             postgres://USER@HOST:PORT/DATABASE",
            "orchestrator.toml:14: store.retention.failed.max_age is \"0s\"; give a duration with its unit, such as \
             \"5s\", \"1m 30s\" or \"48h\", from 1s to 878400h",
            "orchestrator.toml:17: cycle.deadline is \"25h\"; give a duration with its unit, such as \"5s\", \"1m \
             30s\" or \"48h\", from 1ms to 24h",
            "orchestrator.toml:18: cycle.max_queued is 1.5; give a whole number from 0 to 10000",
            "orchestrator.toml:19: cycle.started is unknown; known here are deadline, max_concurrent_calls, \
             max_outputs_bytes, max_queued, max_record_bytes",
            "orchestrator.toml:22: log.filter is \"inof\"; \"inof\" is not a level; give a level (off, error, warn, \
             info, debug, trace), or several such as info,orchestrator_core=debug",
            "orchestrator.toml:23: log.format is \"xml\"; give \"auto\" or \"text\" or \"json\"",
            "orchestrator.toml:25: servers is unknown; did you mean server?",
        ]
    );
}

#[test]
fn problems_of_subsystems_and_loops_name_them_and_their_line() {
    let found = problems(
        r#"
subsystems = 5
[[loops]]
name = "pulse"
overlap_policy = "wait"

[[loops]]
name = "pulse 2"
interval = "5s"
offset = "5s"
"#,
    );
    assert_eq!(
        found,
        [
            "orchestrator.toml:2: subsystems is 5; give a list",
            "orchestrator.toml:3: loop pulse: interval is missing; give the time between ticks, such as 5s",
            "orchestrator.toml:5: loop pulse: overlap_policy is \"wait\"; give \"skip\" or \"buffer_one\" or \
             \"buffer_all\" or \"cancel_other\"",
            "orchestrator.toml:8: loops[1]: name \"pulse 2\" is not a name: a name is 1 to 63 characters, a letter, \
             then letters, digits, '_', '-' or '.'",
            "orchestrator.toml:10: loops[1]: offset is 5s; give less than 5s, the interval, and no less than 0s",
        ]
    );

    let found = problems(
        r#"[[subsystems]]
name = "A"
endpoint = "nowhere"
timeout = 5
after = [
    "B",
    "not ok",
    7,
]

[subsystems.retry]
max_attempts = 11
max_atempts = 2

[subsystems.parameters]
since = 2026-01-01

[[subsystems]]
name = "B"
endpoint = "http://h:1"
phase = "first"
breaker = true

[[subsystems]]
name = "B"
endpoint = "http://h:1"
limits = { max_issues = 5000 }

[[subsystems]]
endpoint = "http://h:1"
timeout = "5 parsecs"
"#,
    );
    assert_eq!(
        found,
        [
            "orchestrator.toml:3: subsystem A: endpoint is \"nowhere\"; give http://host:port, https://host:port or \
             unix:/path",
            "orchestrator.toml:4: subsystem A: timeout is 5; give a duration with its unit, such as \"5s\", \"1m \
                30s\" or \"48h\", from 1ms to 24h",
            "orchestrator.toml:7: subsystem A: after[1] \"not ok\" is not a name: a name is 1 to 63 characters, a \
             letter, then letters, digits, '_', '-' or '.'",
            "orchestrator.toml:8: subsystem A: after[2] is 7; give a quoted string",
            "orchestrator.toml:12: subsystem A: retry.max_attempts is 11; allowed is 1 to 10",
            "orchestrator.toml:13: subsystem A: retry.max_atempts is unknown; did you mean retry.max_attempts?",
            "orchestrator.toml:16: subsystem A: parameters contains 2026-01-01, which JSON can't represent; write it \
             in quotes",
            "orchestrator.toml:21: subsystem B: phase is \"first\"; give a whole number from -1000000 to 1000000",
            "orchestrator.toml:22: subsystem B: breaker is true; it is a table, so write [breaker]",
            "orchestrator.toml:25: subsystem B: name is declared twice, first at orchestrator.toml:18; rename or \
             remove one",
            "orchestrator.toml:27: subsystem B: limits.max_issues is 5000; allowed is 0 to 1024",
            "orchestrator.toml:29: subsystems[3]: name is missing; a name is 1 to 63 characters, a letter, then \
             letters, digits, '_', '-' or '.'",
            "orchestrator.toml:31: subsystems[3]: timeout is \"5 parsecs\"; give a duration with its unit, such as \
                \"5s\", \"1m 30s\" or \"48h\", from 1ms to 24h",
        ]
    );
}

#[test]
fn every_syntax_error_has_its_line() {
    let found = problems("b = 1\na = \nb = 2\n[c\n");
    assert!(found.iter().all(|problem| problem.contains("is not TOML: ")), "{found:#?}");
    let lines: Vec<_> = found.iter().filter_map(|problem| problem.split(':').nth(1)).collect();
    assert_eq!(lines, ["2", "3", "4"], "{found:#?}");
    assert_eq!(
        problems("[cycle]\n[server]\n[cycle]\n"),
        ["orchestrator.toml:3: is not TOML: cycle is defined twice; remove one"]
    );
    assert_eq!(problems("a = 1\n'a' = 2\n"), ["orchestrator.toml:2: is not TOML: 'a' is defined twice; remove one"]);
}

#[test]
fn a_whole_number_that_would_change_is_named() {
    let text = "[[subsystems]]\nname = \"A\"\nendpoint = \"http://h:1\"\n[subsystems.parameters]\nsmall = \
                9007199254740992\n\
                ids = [\n  9007199254740993,\n]\n";
    let [problem] = &problems(text)[..] else { panic!("{:?}", problems(text)) };
    assert!(
        problem.starts_with(
            "orchestrator.toml:7: subsystem A: parameters contains the whole number 9007199254740993, which would \
             change"
        ),
        "{problem}"
    );
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let overrides = Overrides { config: Some("no/such/file.toml".into()), ..Overrides::default() };
    let error = Config::load(&overrides, []).unwrap_err().to_string();
    assert!(error.starts_with("no/such/file.toml: can't be read: "), "{error}");

    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), b"a = \"\xff\"").unwrap();
    let overrides = Overrides { config: Some(file.path().into()), ..Overrides::default() };
    let error = Config::load(&overrides, []).unwrap_err().to_string();
    assert!(error.ends_with(": is not UTF-8"), "{error}");
}

#[test]
fn flags_are_named() {
    let bad = |set: &str| problem(&[set], &[]);
    assert_eq!(
        bad("cycle.deadlin=5s"),
        "flag --set cycle.deadlin: cycle.deadlin is unknown; did you mean cycle.deadline?"
    );
    assert_eq!(
        bad("cycle.max_queued=lots"),
        "flag --set cycle.max_queued: cycle.max_queued is \"lots\"; give a whole number from 0 to 10000"
    );
    assert!(bad("cycle").contains("flag --set cycle: "));
    assert!(bad("cycle.=1").contains("needs KEY=VALUE"));
    assert!(bad("cycle.deadline").contains("needs KEY=VALUE"));
    assert!(bad(&format!("{}a=1", "a.".repeat(100_000))).contains("is not a key: it has too many names"));
    assert!(bad("cycle=1").contains("it is a table, so write [cycle]"));
    assert_eq!(bad("subsystems=[{name = ]"), "flag --set subsystems: subsystems is \"[{name = ]\"; give a list");
    let ConfigError { problems: found, .. } =
        load(&["subsystems=[]", "subsystems.A=1", "log.filter.x=1"], &[]).unwrap_err();
    assert!(found.iter().any(|it| it.problem.contains("which is a list; set the list as a whole")), "{found:?}");
}

#[test]
fn variables_are_named_and_only_settings_are_read() {
    assert_eq!(
        problem(&[], &[("ORCHESTRATOR_CYCLE_DEADLINE", "5")]),
        "environment variable ORCHESTRATOR_CYCLE_DEADLINE: cycle.deadline is \"5\"; give a duration with its unit, \
         such as \"5s\", \"1m 30s\" or \"48h\", from 1ms to 24h"
    );
    assert_eq!(
        problem(&[], &[("ORCHESTRATOR_SERVER_LISTN", "x")]),
        "environment variable ORCHESTRATOR_SERVER_LISTN: sets nothing; did you mean ORCHESTRATOR_SERVER_LISTEN?"
    );
    assert!(problem(&[], &[("ORCHESTRATOR_PORT", "80")]).contains("ORCHESTRATOR_PORT: sets nothing"));
    assert!(problem(&[], &[("ORCHESTRATOR_WHATEVER", "80")]).contains("such as ORCHESTRATOR_SERVER_LISTEN"));
    let others = [
        "ADDRESS",
        "CONFIG",
        "CREDENTIALS",
        "OUTPUT",
        "TIMEOUT",
        "TEST_X",
        "TORTURE_KILLS",
        "SERVICE_HOST",
        "SERVICE_PORT_GRPC",
        "PORT_7700_TCP_ADDR",
    ]
    .map(|name| (format!("ORCHESTRATOR_{name}"), "x"));
    let mut others: Vec<_> = others.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    others.push(("ORCHESTRATOR_PORT", "tcp://10.0.0.1:7700"));
    assert_eq!(load(&[], &others).unwrap(), Config::default());
}

#[test]
#[cfg(unix)]
fn a_variable_that_is_not_text_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let environment = [("ORCHESTRATOR_ID".into(), OsString::from_vec(vec![0xff]))];
    let error = Config::load(&Overrides::default(), environment).unwrap_err().to_string();
    assert_eq!(error, "environment variable ORCHESTRATOR_ID: is not UTF-8");
}

#[test]
fn every_variable_has_one_meaning() {
    let keys = known(Config::from_reader);
    let names: BTreeSet<_> = keys.iter().map(|key| variable_name(key)).collect();
    assert_eq!(names.len(), keys.len());
    for name in names {
        let rest = name.strip_prefix(PREFIX).unwrap();
        assert!(!OTHER_VARIABLES.contains(&rest) && !OTHER_PREFIXES.iter().any(|it| rest.starts_with(it)), "{name}");
    }
}

#[test]
fn other_addresses_than_loopback_need_the_accepted_risk() {
    for (listen, is_allowed) in [
        ("127.8.8.8:1", true),
        ("[::1]:1", true),
        ("[::ffff:127.0.0.1]:1", true),
        ("0.0.0.0:1", false),
        ("[::]:1", false),
        ("10.0.0.1:1", false),
        ("[::ffff:10.0.0.1]:1", false),
    ] {
        let mut overrides = Overrides { listen: Some(listen.into()), ..Overrides::default() };
        match Config::load(&overrides, []) {
            Ok(_) => assert!(is_allowed, "{listen}"),
            Err(error) => {
                assert!(!is_allowed, "{error}");
                assert!(error.to_string().contains("TLS and access.mode = \"enforce\""), "{error}");
            }
        }
        overrides.insecure_listen_beyond_loopback = true;
        assert_eq!(Config::load(&overrides, []).unwrap().server.listen.to_string(), listen);
        // Without TLS, tokens would be sent in clear.
        overrides.set = vec!["access.mode=enforce".into()];
        match Config::load(&overrides, []) {
            Ok(_) => assert!(is_allowed, "{listen}"),
            Err(error) => assert!(!is_allowed && error.to_string().contains("sent in clear"), "{error}"),
        }
    }
}

#[test]
fn one_address_can_not_be_used_twice() {
    let both = |listen: &str, admin: &str| {
        let set = [format!("server.listen={listen}"), format!("admin.listen={admin}")];
        load(&[&set[0], &set[1], "server.insecure_listen_beyond_loopback=true"], &[])
    };
    assert_eq!(
        both("127.0.0.1:7715", "127.0.0.1:7715").unwrap_err().to_string(),
        "flag --set admin.listen: admin.listen is 127.0.0.1:7715, and server.listen is 127.0.0.1:7715; give each a \
         port of its own, or set it to off"
    );
    assert!(problem(&["server.listen=127.0.0.1:7780"], &[]).contains("give each a port of its own"));
    for (listen, admin, is_allowed) in [
        ("0.0.0.0:7715", "127.0.0.1:7715", false),
        ("[::1]:7715", "[::]:7715", false),
        ("[::]:7715", "127.0.0.1:7715", false),
        ("0.0.0.0:7715", "[::1]:7715", true),
        ("127.0.0.1:7715", "127.0.0.2:7715", true),
        // Port 0 gives each listener its own port.
        ("127.0.0.1:0", "127.0.0.1:0", true),
    ] {
        assert_eq!(both(listen, admin).is_ok(), is_allowed, "{listen} and {admin}");
    }
}

#[test]
fn settings_of_tls_that_need_others_are_refused_without_them() {
    for (text, refused) in [
        ("cert_file = 'a'", "server.tls.cert_file needs server.tls.key_file as well"),
        ("key_file = 'a'", "server.tls.key_file needs server.tls.cert_file as well"),
        ("client_ca_file = 'a'", "server.tls.client_ca_file has no effect without TLS; give server.tls.cert_file and"),
        ("min_version = '1.2'", "server.tls.min_version has no effect without TLS"),
        ("cert_file = 'a'\nkey_file = 'a'\nclient_auth = 'required'", "client_auth needs server.tls.client_ca_file"),
        ("min_version = '1.1'", "min_version is \"1.1\"; give \"1.3\" or \"1.2\""),
    ] {
        let found = problems(&format!("[server.tls]\n{text}"));
        assert!(found.len() == 1 && found[0].contains(refused), "{found:?}");
        // The admin address is the same, with keys of its own.
        let found = problems(&format!("[admin.tls]\n{text}"));
        assert!(found.len() == 1 && found[0].contains(&refused.replace("server.", "admin.")), "{found:?}");
    }
}

#[test]
fn the_admin_address_has_the_tls_of_the_server_unless_its_own_differs() {
    const SERVER: &str = "[server.tls]\ncert_file = 's.pem'\nkey_file = 's.key'\nclient_ca_file = 'ca.pem'\n";
    let read = |more: &str| read(&(SERVER.to_owned() + more)).unwrap();
    let config = read("");
    let (server, admin) = (config.server_tls().unwrap(), config.admin_tls().unwrap());
    assert_eq!(server.certificate.to_string(), "server.tls.cert_file s.pem");
    assert_eq!(server.clients.clone().map(|(_, are_required)| are_required), Some(false));
    assert_eq!(admin, Tls { clients: None, ..server.clone() }, "browsers would ask people");
    assert_eq!(admin.min_version, TlsVersion::V1_3);

    let config = read("min_version = '1.2'\n[admin.tls]\nclient_auth = 'required'\ncert_file = 'a'\nkey_file = 'b'");
    let admin = config.admin_tls().unwrap();
    assert_eq!(admin.certificate.to_string(), "admin.tls.cert_file a");
    assert_eq!(admin.key.to_string(), "admin.tls.key_file b");
    assert_eq!(admin.clients, Some((server.clients.unwrap().0, true)));
    assert_eq!(admin.min_version, TlsVersion::V1_2);
    assert_eq!(Config::default().admin_tls(), None);
}

#[test]
fn a_limit_that_a_narrower_one_makes_unreachable_is_refused() {
    let found = problems(
        "[memory]\nmax_bytes = 67108864\n[server]\nmax_request_bytes = 67108864\nmax_receiving_bytes = 1048576\n\
         [cycle]\nmax_record_bytes = 67108864\nmax_outputs_bytes = 68719476736\n",
    );
    assert_eq!(
        found,
        [
            "orchestrator.toml:4: server.max_request_bytes is 67108864; give at most 524288, half of \
             server.max_receiving_bytes, because a request is in memory twice, or raise that limit",
            "orchestrator.toml:7: cycle.max_record_bytes is 67108864; give at most 4194304, 1/32 of memory.max_bytes, \
             the memory for answers on one connection, or raise that limit",
            "orchestrator.toml:8: cycle.max_outputs_bytes is 68719476736; give at most 67108864, memory.max_bytes, or \
             raise that limit",
        ]
    );
    assert!(problem(&["server.max_receiving_bytes=1073741825"], &[]).contains("at most 1073741824, memory.max_bytes"));
    assert!(
        problem(&["server.max_request_bytes=4000000", "memory.max_bytes=67108864"], &[])
            .contains("at most 3145728, half of 3/32 of memory.max_bytes")
    );
    // A process may have less than the default.
    let config = load(&["server.max_request_bytes=33554432"], &[]).unwrap();
    let out_of_reach = |memory| config.out_of_reach(memory).map(|it| (it.key, it.max)).collect::<Vec<_>>();
    assert_eq!(out_of_reach(1 << 30), []);
    assert_eq!(out_of_reach(64 << 20), [("server.max_request_bytes", 3_145_728)]);
    // A default gives way to a written limit, and equal limits are allowed.
    assert!(load(&["server.max_receiving_bytes=1048576"], &[]).is_ok());
    assert!(load(&["memory.max_bytes=67108864"], &[]).is_ok());
    assert!(load(&["server.max_receiving_bytes=1048576", "server.max_request_bytes=524288"], &[]).is_ok());
}

#[test]
fn log_filters() {
    for filter in ["off", "INFO", "info,orchestrator_core=debug", "warn,h2=off", "orchestrator_core[cycle{id=1}]=trace"]
    {
        assert_eq!(log_filter(filter).as_deref(), Ok(filter));
    }
    for filter in ["", " ", "inof", "info,deubg", "a=b=c", "info, warn", "info,h2=loud"] {
        assert!(log_filter(filter).is_err(), "{filter}");
    }
}

#[test]
fn durations() {
    let deadline = |text: &str| read(&format!("[cycle]\ndeadline = {text}")).map(|config| config.cycle.deadline);
    for (text, ms) in
        [("'5s'", 5000), ("'1m 30s'", 90_000), ("'250 ms'", 250), ("'1.5s'", 1500), ("'PT24H'", 86_400_000)]
    {
        assert_eq!(deadline(text).unwrap(), Duration::from_millis(ms), "{text}");
    }
    for text in ["5", "5.0", "'5'", "''", "'-5s'", "'5s ago'", "'1d'", "'0.5ms'", "'24h 1ns'", "true", "['5s']"] {
        assert!(deadline(text).unwrap_err().to_string().contains("with its unit"), "{text}");
    }
}

#[test]
fn retention_has_rules_for_single_states() {
    let retention = read("[store.retention]\nmax_age = \"720h\"\nfailed.max_cycles = 5\n").unwrap().store.retention;
    let day = Duration::from_hours(24);
    assert_eq!(retention.default, RetentionRule { max_cycles: Some(100_000), max_age: Some(30 * day) });
    let failed = RetentionRule { max_cycles: Some(5), max_age: None };
    assert_eq!(retention.by_state, BTreeMap::from([(CycleState::Failed, failed)]));
}

#[test]
fn expected_subsystems_are_names_and_not_too_many() {
    let expected = |names: &str| format!("[registry]\nexpected = [{names}]\n");
    let config = read(&expected(r#""b", "a", "b""#)).unwrap();
    assert_eq!(config.registry.expected.iter().map(Name::as_str).collect::<Vec<_>>(), ["a", "b"]);
    let found = problems(&expected(r#""a b""#));
    assert!(found.len() == 1 && found[0].contains("registry.expected[0] \"a b\" is not a name"), "{found:?}");
    let found = problems(&expected("7"));
    assert!(found.len() == 1 && found[0].contains("registry.expected[0] is 7; give a quoted string"), "{found:?}");
    let found = problems(&expected(&r#""a","#.repeat(20_001)));
    assert!(found.len() == 1 && found[0].contains("has 20001 entries; give at most 20000"), "{found:?}");
}

#[test]
fn declared_subsystems_are_limited_by_the_registry() {
    let found = problems(
        "[registry]\nmax_loops = 1\n[[loops]]\nname = \"a\"\ninterval = \"1s\"\n[[loops]]\nname = \"b\"\ninterval = \
         \"1s\"\n",
    );
    assert_eq!(found, ["orchestrator.toml:3: loops are 2; registry.max_loops allows 1"]);
    // The list is not examined either.
    let found = problems(&("[registry]\nmax_subsystems = 149\n".to_owned() + &"[[subsystems]]\n".repeat(150)));
    assert_eq!(found, ["orchestrator.toml:3: subsystems are 150; registry.max_subsystems allows 149"]);
}

#[test]
fn the_number_of_reported_problems_is_bounded() {
    let wrong: fn(usize) -> String = |n| format!("[x{n}]\n");
    let cases = [
        wrong,
        |n| format!("[[subsystems]]\nname = {n}\nendpoint = \"http://h:1\"\n"),
        |n| format!("[[loops]]\nname = {n}\ninterval = \"1s\"\n"),
    ];
    for wrong in cases {
        let error = read(&(0..150).map(wrong).collect::<String>()).unwrap_err();
        assert_eq!((error.problems.len(), error.left_out), (100, 50), "{error}");
        assert_eq!(error.to_string().lines().count(), 101);
        assert!(error.to_string().ends_with("\nand possibly 50 more: at most 100 are reported"));
    }
    let untoml = read(&"=\n".repeat(150)).unwrap_err();
    assert!(untoml.problems.len() == 100 && untoml.left_out >= 50, "{untoml}");
    let large = read(&"=\n".repeat(1 << 16)).unwrap_err();
    assert_eq!((large.problems.len(), large.left_out), (1, 0), "{large}");
    let items = format!("[[subsystems]]\nname = \"a\"\nendpoint = \"http://h:1\"\nreads = [{}]", "1,".repeat(150));
    assert_eq!(read(&items).unwrap_err().left_out, 50);
    let variables: Vec<_> = (0..150).map(|n| format!("ORCHESTRATOR_X{n}")).collect();
    let variables: Vec<_> = variables.iter().map(|name| (name.as_str(), "1")).collect();
    assert_eq!(load(&[], &variables).unwrap_err().left_out, 50);
    let long = read(&format!("{} = 1\n[store]\nurl = \"{0}\"", "x".repeat(1 << 20))).unwrap_err().to_string();
    assert!(long.len() < 1000, "{long}");
}

/// For each setting a value that is not the default.
const OTHERS: &[(&str, &str)] = &[
    ("orchestrator_id", "other"),
    ("server.listen", "127.0.0.1:1"),
    ("server.listen_unix", "o.sock"),
    ("server.unix_mode", "'0660'"),
    ("server.insecure_listen_beyond_loopback", "true"),
    ("server.max_connections", "1"),
    ("server.max_concurrent_streams", "1"),
    ("server.max_streams", "1"),
    ("server.max_request_bytes", "65536"),
    ("server.max_receiving_bytes", "1048576"),
    ("server.max_watchers", "1"),
    ("server.drain_grace", "1s"),
    ("server.tls.cert_file", "other"),
    ("server.tls.key_file", "other"),
    ("server.tls.client_ca_file", "other"),
    ("server.tls.client_auth", "required"),
    ("server.tls.min_version", "1.2"),
    ("admin.listen", "off"),
    ("admin.tls.cert_file", "other"),
    ("admin.tls.key_file", "other"),
    ("admin.tls.client_ca_file", "other"),
    ("admin.tls.client_auth", "required"),
    ("admin.tls.min_version", "1.2"),
    ("access.mode", "dry_run"),
    ("access.tokens_file", "tokens.toml"),
    ("access.jwt.issuer", "other"),
    ("access.jwt.audience", "other"),
    ("access.jwt.jwks_file", "other"),
    ("access.jwt.name_claim", "email"),
    ("access.jwt.groups_claim", "roles"),
    ("access.jwt.max_lifetime", "1h"),
    ("access.revoked", "['token:a']"),
    ("limits.calls_per_second", "1"),
    ("limits.changes_per_second", "1"),
    ("limits.renewals_per_second", "1"),
    ("limits.concurrent_calls", "1"),
    ("limits.watchers", "1"),
    ("limits.history_reads", "1"),
    ("memory.max_bytes", "67108864"),
    ("store.url", "memory:"),
    ("store.retention", "{max_cycles = 1}"),
    ("cluster.replica", "other"),
    ("cluster.advertise", "https://other:7700"),
    ("cluster.lease_ttl", "1s"),
    ("cluster.peers", "['cert:spiffe://fleet/core']"),
    ("audit.reads", "off"),
    ("audit.retention", "{max_events = 1}"),
    ("ledger.key_files", "['a.key']"),
    ("ledger.origin", "example.org/log"),
    ("cycle.deadline", "1s"),
    ("cycle.max_concurrent_calls", "1"),
    ("cycle.max_queued", "1"),
    ("cycle.max_record_bytes", "65536"),
    ("cycle.max_outputs_bytes", "1048576"),
    ("registry.max_subsystems", "1"),
    ("registry.max_loops", "1"),
    ("registry.expected", "['a']"),
    ("dial.ca_file", "ca.pem"),
    ("dial.cert_file", "b"),
    ("dial.key_file", "b"),
    ("dial.allow", "[\"10.0.0.0/8\"]"),
    ("dial.allow_http", "true"),
    ("dial.unix_dir", "/a"),
    ("dial.connect_timeout", "1s"),
    ("log.filter", "debug"),
    ("log.format", "json"),
    ("tracing.otlp_endpoint", "http://h:4317"),
    ("tracing.sample_ratio", "0.5"),
];

/// Settings that need each other.
const TOGETHER: &[&str] = &[
    "server.tls.cert_file=a",
    "server.tls.key_file=a",
    "server.tls.client_ca_file=a",
    "admin.tls.cert_file=a",
    "admin.tls.key_file=a",
    "dial.cert_file=a",
    "dial.key_file=a",
    "access.jwt.issuer=a",
    "access.jwt.audience=a",
    "access.jwt.jwks_file=a",
];

#[test]
fn every_setting_is_applied_by_a_reload_or_needs_a_restart() {
    let needs_restart: BTreeSet<_> =
        reference().filter(|(_, comment)| comment.ends_with("Restart.")).map(|(key, _)| key).collect();
    for setting in SETTINGS {
        let key = setting.key;
        let (_, other) = OTHERS.iter().find(|(name, _)| *name == key).unwrap_or_else(|| panic!("no other {key}"));
        let others = if [".tls.", ".jwt.", "dial.", "cluster.peers"].iter().any(|part| key.contains(part)) {
            TOGETHER
        } else {
            &[]
        };
        let running = load(others, &[]).unwrap();
        let new = load(&[others, &[&format!("{key}={other}")]].concat(), &[]).unwrap();
        assert_ne!(new, running, "{key} is not set");
        let expected = if needs_restart.contains(key) {
            Reload { config: running.clone(), needs_restart: vec![key], changed: Vec::new() }
        } else {
            Reload { config: new.clone(), needs_restart: Vec::new(), changed: vec![key.to_owned()] }
        };
        assert_eq!(running.reload(new.clone()), expected, "{key}");
        let in_common = setting.of_replicas == OfReplicas::Common;
        assert_eq!(not_in_common(&running, &new), in_common.then_some(key).as_slice(), "{key}");
        let first_cell = |line: &'static str| line.split('|').nth(1).filter(|cell| cell.contains(&format!("`{key}")));
        let in_the_readme = README.lines().find_map(first_cell).unwrap_or_else(|| panic!("{key} is not in the README"));
        assert_eq!(in_the_readme.contains('↻'), needs_restart.contains(key), "{key} in the README");
        assert_eq!(new.reload(new.clone()), Reload { config: new, needs_restart: Vec::new(), changed: Vec::new() });
    }
}

#[test]
fn every_key_is_of_a_setting_or_of_a_list() {
    for key in known(Config::from_reader) {
        let is_of = |setting: &Setting| key == setting.key || key.starts_with(&format!("{}.", setting.key));
        assert!(
            SETTINGS.iter().any(is_of) || ["access.grants", "subsystems", "loops", "serves"].contains(&key.as_str()),
            "{key}"
        );
    }
}

/// The keys by which these configurations of two replicas differ.
fn not_in_common(one: &Config, other: &Config) -> Vec<&'static str> {
    let differ = |((key, one), (_, other)): ((&'static str, String), (_, String))| (one != other).then_some(key);
    one.in_common().zip(other.in_common()).filter_map(differ).collect()
}

#[test]
fn lists_of_replicas_differ_by_their_contents_and_not_by_their_order() {
    let subsystem =
        |name: &str, more: &str| format!("[[subsystems]]\nname = '{name}'\nendpoint = 'http://h:1'\n{more}");
    let an_hour = |name: &str| format!("[[loops]]\nname = '{name}'\ninterval = '1h'\n");
    let of = |lists: &[String]| read(&lists.concat()).unwrap();
    let one = of(&[subsystem("a", ""), subsystem("b", ""), an_hour("l"), an_hour("m")]);
    let same = of(&[an_hour("m"), an_hour("l"), subsystem("b", ""), subsystem("a", "")]);
    assert_eq!(not_in_common(&one, &same), [""; 0]);
    let other = of(&[subsystem("a", "parameters = {k = 1}\n"), subsystem("b", ""), an_hour("l"), an_hour("m")]);
    assert_eq!(not_in_common(&one, &other), ["subsystems"]);
    let other = of(&[subsystem("a", "former_names = ['c']\n"), subsystem("b", ""), an_hour("l")]);
    assert_eq!(not_in_common(&one, &other), ["subsystems", "loops"]);
}

#[test]
fn a_reload_names_new_declarations() {
    let running = read("[[loops]]\nname = \"l\"\ninterval = \"1s\"\n").unwrap();
    let new = "[[subsystems]]\nname = \"A\"\nendpoint = \"http://h:1\"\n[[serves]]\nname = \"eu\"\n";
    let new = read(new).unwrap();
    let Reload { config, needs_restart, changed } = running.reload(new.clone());
    assert_eq!(config, new);
    assert_eq!(needs_restart, [""; 0]);
    assert_eq!(changed, ["subsystem A added", "loop l removed", "served name eu added"]);
}

#[test]
fn other_former_names_are_a_change_of_their_subsystem() {
    let declared = |former_names: &str| {
        let endpoint = "http://127.0.0.1:1";
        read(&format!("[[subsystems]]\nname = 'a'\nendpoint = '{endpoint}'\nformer_names = [{former_names}]\n"))
            .unwrap()
    };
    let (running, new) = (declared("'b'"), declared("'c', 'b'"));
    let former_names = new.former_names.values().flat_map(|names| names.iter().map(Name::as_str));
    assert_eq!(former_names.collect::<Vec<_>>(), ["c", "b"]);
    assert_eq!(running.reload(new).changed, ["subsystem a changed"]);
}

/// Every key that `read` reads.
fn known<T>(read: impl FnOnce(&mut Reader<'_>) -> T) -> BTreeSet<String> {
    let mut problems = Problems::default();
    let mut reader = Reader::new(Table::new(), BTreeMap::new(), &mut problems);
    read(&mut reader);
    reader.known.into_iter().collect()
}

/// The reference with the lines after a `#` without a space uncommented.
fn whole_reference() -> String {
    REFERENCE
        .lines()
        .map(|line| line.strip_prefix('#').filter(|rest| !rest.is_empty() && !rest.starts_with(' ')).unwrap_or(line))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Every key of the reference, with the comment above it.
fn reference() -> impl Iterator<Item = (String, String)> {
    let (mut keys, mut table, mut comment) = (Vec::new(), String::new(), String::new());
    for line in whole_reference().lines() {
        if line.starts_with('#') {
            comment += line;
            continue;
        }
        if line.starts_with('[') {
            table = format!("{}.", line.trim_matches(['[', ']']));
        } else if let Some((key, _)) = line.split_once(" = ") {
            keys.push((format!("{table}{key}"), std::mem::take(&mut comment)));
        }
        comment.clear();
    }
    keys.into_iter()
}

#[test]
fn the_reference_shows_the_defaults() {
    assert_eq!(read(REFERENCE).unwrap(), Config::default());

    let whole = read(&whole_reference()).unwrap();
    let minimal =
        SubsystemSpec { name: "Example".into(), endpoint: "http://127.0.0.1:50051".into(), ..SubsystemSpec::default() };
    assert_eq!(whole.subsystems, [Subsystem::from_spec(&minimal).unwrap()]);
    let minimal = GrantSpec { who: vec!["token:example".into()], role: Some(Role::Registrar), ..GrantSpec::default() };
    assert_eq!(whole.access.grants, [Grant::from_spec(&minimal).unwrap()]);
    let minimal = LoopSpec {
        name: "example".into(),
        interval: Some("5s".parse().unwrap()),
        deadline: Some("60s".parse().unwrap()),
        ..LoopSpec::default()
    };
    assert_eq!(whole.loops, [IntervalLoop::from_spec(&minimal).unwrap()]);
    let minimal = ServedSpec { name: "example".into(), ..ServedSpec::default() };
    assert_eq!(whole.serves, [Served::from_spec(&minimal).unwrap()]);
}

#[test]
fn the_reference_lists_every_key_once_with_a_comment() {
    let mut keys: BTreeSet<_> = known(Config::from_reader);
    let lists = [
        ("access.grants", known(grant_spec)),
        ("subsystems", known(declared_spec)),
        ("loops", known(loop_spec)),
        ("serves", known(served_spec)),
    ];
    for (list, of_entries) in lists {
        keys.remove(list);
        keys.extend(of_entries.into_iter().map(|key| format!("{list}.{key}")));
    }
    let mut listed = BTreeSet::new();
    for (key, comment) in reference() {
        assert!(comment.starts_with("# "), "no comment above {key}");
        assert!(listed.insert(key.clone()), "{key} occurs twice");
    }
    assert_eq!(listed, keys);
}

#[test]
fn an_address_for_other_replicas_is_that_of_a_machine_and_fits_to_the_server() {
    let with = |advertise: &str, further: &[&str]| {
        let set = [format!("cluster.advertise={advertise}")].into_iter().chain(further.iter().map(ToString::to_string));
        Config::load(&Overrides { set: set.collect(), ..Overrides::default() }, [])
    };
    for advertise in ["http://0.0.0.0:7700", "https://[::]:7700"] {
        let refused = with(advertise, &[]).unwrap_err().to_string();
        assert!(refused.contains("cluster.advertise") && refused.contains("no address of a machine"), "{refused}");
    }
    let tls = ["server.tls.cert_file=core.pem", "server.tls.key_file=core.key"];
    for (advertise, further, why) in [
        ("http://127.0.0.1:7700", &[][..], None),
        ("http://localhost:7700", &[], None),
        ("http://[::1]:7700", &[], None),
        ("https://127.0.0.1:7700", &[], Some("server.tls has no certificate")),
        ("https://127.0.0.1:7700", &tls, None),
        ("http://127.0.0.1:7700", &tls, Some("server.tls has a certificate")),
        ("https://10.0.0.3:7700", &tls, Some("server.listen is a loopback address")),
    ] {
        let doubt = with(advertise, further).unwrap().contradicts_advertise();
        assert!(
            doubt.is_some() == why.is_some() && doubt.unwrap_or_default().contains(why.unwrap_or_default()),
            "{advertise}"
        );
    }
}
