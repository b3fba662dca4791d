//! Checks the dependencies between modules (see ARCHITECTURE.md) by reading the source.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{collections::BTreeSet, fs, path::Path, process::Command, sync::LazyLock};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The modules of this crate that each top-level module may use. `serve`, `cli` and `main` connect all parts.
const MAY_USE: &[(&str, &[&str])] = &[
    ("ledger", &[]),
    ("memory", &[]),
    ("model", &[]),
    ("proto", &["model"]),
    ("access", &["model"]),
    ("clock", &[]),
    ("random", &[]),
    ("host", &["clock", "random"]),
    ("fault", &[]),
    ("tasks", &[]),
    ("file", &[]),
    ("pem", &[]),
    ("turn", &[]),
    ("offload", &[]),
    ("ports", &["ledger", "memory", "model"]),
    ("engine", &["ledger", "memory", "model", "ports", "random"]),
    ("record", &["ledger", "model", "ports", "proto"]),
    ("schedule", &["memory", "model", "ports", "random"]),
    (
        "orchestrator",
        &[
            "clock", "engine", "fault", "host", "ledger", "memory", "model", "offload", "ports", "record", "schedule",
            "tasks",
        ],
    ),
    ("store", &["clock", "fault", "file", "ledger", "model", "pem", "ports"]),
    ("cluster", &["clock", "fault", "host", "model", "ports", "random"]),
    ("transport", &[]),
    ("dial", &["access", "clock", "memory", "model", "offload", "pem", "ports", "proto", "transport", "turn"]),
    ("listen", &["memory", "pem", "proto", "transport", "turn"]),
    ("subsystem", &["file", "listen", "memory", "model", "offload", "pem", "proto", "tasks", "transport"]),
    // Answers show plans and breakers, records and snapshots, and loops.
    (
        "api",
        &[
            "access",
            "clock",
            "cluster",
            "engine",
            "ledger",
            "listen",
            "memory",
            "model",
            "offload",
            "orchestrator",
            "ports",
            "proto",
            "record",
            "schedule",
            "tasks",
            // Callers of replicas come from somewhere else, and followers connect to the leader.
            "transport",
        ],
    ),
    ("web", &["api", "cluster", "listen", "memory", "model", "offload", "proto", "tasks", "telemetry", "transport"]),
    ("config", &["access", "engine", "file", "memory", "model", "ports", "store"]),
    // Metrics count the work of all of these.
    (
        "telemetry",
        &["api", "cluster", "config", "dial", "engine", "listen", "memory", "model", "orchestrator", "ports", "random"],
    ),
    (
        "serve",
        &[
            "access",
            "api",
            "clock",
            "cluster",
            "config",
            "dial",
            "file",
            "host",
            "ledger",
            "listen",
            "memory",
            "model",
            "offload",
            "orchestrator",
            "pem",
            "ports",
            "record",
            "store",
            "tasks",
            "telemetry",
            "transport",
            "web",
        ],
    ),
    (
        "cli",
        &[
            "access",
            "api",
            "config",
            "dial",
            "engine",
            "file",
            "host",
            "ledger",
            "memory",
            "model",
            "pem",
            "ports",
            "proto",
            "record",
            "serve",
            "store",
            "subsystem",
            "tasks",
            "telemetry",
            "transport",
        ],
    ),
    ("main", &["cli"]),
];

/// Allowed re-exports of other modules, for users of the library.
const MAY_HAND_ON: &[(&str, &str)] = &[("subsystem", "model")];

/// The modules, or parts of them, that may use a library that must not spread.
const MAY_DEPEND: &[(&str, &[&str])] = &[
    // gRPC: types only at the edges, details only where errors are made and read.
    ("tonic", &["api", "cli", "listen", "proto", "serve", "subsystem", "web/json"]),
    ("tonic_health", &["cli", "listen", "serve", "subsystem"]),
    ("tonic_reflection", &["listen", "serve", "subsystem"]),
    ("tonic_types", &["api/error", "cli/remote", "listen", "proto/codec", "web/json"]),
    ("prost", &["api", "cli", "dial", "proto", "record", "web/json"]),
    ("prost_reflect", &["proto"]),
    ("prost_types", &["api", "cli", "proto"]),
    // HTTP and TLS.
    ("axum", &["web"]),
    ("h2", &["dial", "listen/server"]),
    ("hyper", &["listen", "web"]),
    // `cli/remote` and `api/forward` give a connection to the gRPC client.
    ("hyper_util", &["api/forward", "cli/remote", "listen", "web"]),
    ("rustls_native_certs", &["dial/tls", "store/postgres/tls"]),
    ("tokio_rustls", &["dial", "listen/tls", "store/postgres/tls"]),
    ("webpki", &["access", "cli/certs", "dial/tls", "listen/tls", "pem"]),
    // Libraries that one place uses.
    // Also the name of the provider in rustls.
    ("aws_lc_rs", &["access", "dial", "ledger", "listen"]),
    ("base64", &["ledger"]),
    ("flate2", &["proto/gzip"]),
    ("clap_mangen", &["cli/man"]),
    ("jsonwebtoken", &["access/jwt"]),
    ("opentelemetry", &["telemetry/otlp"]),
    ("opentelemetry_otlp", &["telemetry/otlp"]),
    ("opentelemetry_sdk", &["telemetry/otlp"]),
    ("prometheus", &["telemetry/metrics"]),
    ("fastrand", &["cli/demo/fleet", "random"]),
    ("rcgen", &["cli/certs"]),
    ("percent_encoding", &["store/postgres/url"]),
    ("rusqlite", &["store/sqlite"]),
    ("sd_notify", &["serve/manager"]),
    ("tokio_postgres", &["store/postgres"]),
    ("tokio_postgres_rustls", &["store/postgres/connect"]),
    ("toml", &["config/reader"]),
    ("x509_parser", &["cli/certs"]),
    ("tracing_subscriber", &["config", "telemetry"]),
    // The command line.
    ("clap", &["cli", "config"]),
    ("crossterm", &["cli/top"]),
    ("ratatui", &["cli/top"]),
    // Files, sockets and threads: `model`, `engine`, `orchestrator`, `record` and `schedule` use none.
    ("std::fs", &["cli", "file", "memory", "store", "subsystem", "transport/sockets"]),
    ("std::thread", &["transport/resolve", "store/postgres", "store/sqlite", "telemetry/writer"]),
    ("tokio::fs", &["transport/sockets"]),
    ("socket2", &["transport/sockets"]),
    ("tokio::net", &["transport/sockets"]),
    // `config`, `model`, `ports`, `proto` and `record` wait for nothing.
    (
        "tokio",
        &[
            "api",
            "cli",
            "clock",
            "cluster",
            "dial",
            "engine",
            "file",
            "listen",
            "memory",
            "offload",
            "orchestrator",
            "schedule",
            "serve",
            "store",
            "subsystem",
            "tasks",
            "telemetry",
            "transport",
            "turn",
            "web",
        ],
    ),
];

/// A module, by its path from the root of the crate, with the names in its file and in its inline modules.
struct Module {
    /// Such as `["store", "sqlite"]`.
    path: Vec<String>,
    /// Every path of the code, from the root of this crate (`crate`) or of a library, such as `["crate", "model",
    /// "Name"]`.
    names: BTreeSet<Vec<String>>,
    /// The paths that it re-exports by `pub use`.
    hands_on: BTreeSet<Vec<String>>,
    /// True if a `select!` polls its branches in a random order.
    selects_at_random: bool,
}

impl Module {
    /// The top-level module of this one.
    fn top(&self) -> &str {
        &self.path[0]
    }

    fn is_in(&self, place: &str) -> bool {
        let mut path = self.path.iter();
        place.split('/').all(|step| path.next().is_some_and(|it| it == step))
    }

    /// The other top-level modules among `names`.
    fn others<'a>(&self, names: &'a BTreeSet<Vec<String>>) -> BTreeSet<&'a str> {
        names
            .iter()
            .filter(|path| path[0] == "crate" || path[0] == "orchestrator_core")
            .filter_map(|path| path.get(1).map(String::as_str))
            .filter(|other| *other != self.top() && MAY_USE.iter().any(|(name, _)| name == other))
            .collect()
    }
}

/// Reads the tokens of one file, except for code that only tests compile: that may use anything.
#[derive(Default)]
struct Reader {
    names: BTreeSet<Vec<String>>,
    hands_on: BTreeSet<Vec<String>>,
    /// The modules whose code is in other files.
    files: Vec<Vec<String>>,
    /// True if a `select!` polls its branches in a random order.
    selects_at_random: bool,
}

impl Reader {
    fn read(&mut self, code: TokenStream, module: &[String]) {
        let tokens: Vec<_> = code.into_iter().collect();
        let mut at = 0;
        while at < tokens.len() {
            let word = |at: usize| tokens.get(at).map(ToString::to_string).unwrap_or_default();
            match &tokens[at] {
                TokenTree::Punct(_) if word(at) == "#" && word(at + 1) == "[cfg (test)]" => {
                    at += 2;
                    // The item ends with its braces, or with a semicolon.
                    let ends = |token: &TokenTree| match token {
                        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
                        token => token.to_string() == ";",
                    };
                    at += tokens[at..].iter().position(ends).map_or(tokens.len(), |end| end + 1);
                }
                TokenTree::Ident(_) if word(at) == "mod" && word(at + 2) == ";" => {
                    self.files.push([module, &[word(at + 1)]].concat());
                    at += 3;
                }
                TokenTree::Ident(_) if word(at) == "mod" => {
                    let inner = [module, &[word(at + 1)]].concat();
                    if let Some(TokenTree::Group(group)) = tokens.get(at + 2) {
                        self.read(group.stream(), &inner);
                    }
                    at += 3;
                }
                // This is not the `use<…>` of a type.
                TokenTree::Ident(_) if word(at) == "use" && word(at + 1) != "<" => {
                    let end = (at..tokens.len()).find(|end| word(*end) == ";").unwrap_or(tokens.len());
                    let mut used = BTreeSet::new();
                    leaves(&tokens[at + 1..end], &[], &mut used);
                    let used: BTreeSet<_> = used.into_iter().filter_map(|path| absolute(path, module)).collect();
                    let before = [word(at.wrapping_sub(2)), word(at.wrapping_sub(1))];
                    let is_handed_on = before[1] == "pub" || before == ["pub", "(crate)"];
                    if is_handed_on {
                        self.hands_on.extend(used.iter().cloned());
                    }
                    self.names.extend(used);
                    at = end;
                }
                TokenTree::Ident(_) => {
                    let mut path = vec![word(at)];
                    while word(at + 1) == ":"
                        && word(at + 2) == ":"
                        && matches!(tokens.get(at + 3), Some(TokenTree::Ident(_)))
                    {
                        path.push(word(at + 3));
                        at += 3;
                    }
                    if path.len() > 1 {
                        self.names.extend(absolute(path, module));
                    }
                    at += 1;
                }
                TokenTree::Group(group) => {
                    if [word(at.wrapping_sub(2)), word(at.wrapping_sub(1))] == ["select", "!"] {
                        let first = group.stream().into_iter().next();
                        self.selects_at_random |= first.is_none_or(|first| first.to_string() != "biased");
                    }
                    self.read(group.stream(), module);
                    at += 1;
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => at += 1,
            }
        }
    }
}

/// Every path of a `use`, with its braces expanded.
fn leaves(tokens: &[TokenTree], before: &[String], all: &mut BTreeSet<Vec<String>>) {
    let mut path = before.to_vec();
    for token in tokens {
        match token {
            TokenTree::Group(group) => {
                let inner: Vec<_> = group.stream().into_iter().collect();
                for part in inner.split(|token| token.to_string() == ",").filter(|part| !part.is_empty()) {
                    leaves(part, &path, all);
                }
                return;
            }
            TokenTree::Ident(word) if word == "as" => break,
            TokenTree::Ident(word) => path.push(word.to_string()),
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
    all.insert(path);
}

/// The path from the root of a path in `module`. `None` if `self` or `super` leads out of the crate.
fn absolute(path: Vec<String>, module: &[String]) -> Option<Vec<String>> {
    let mut base = module;
    let mut rest = &path[..];
    while let [first, more @ ..] = rest {
        match first.as_str() {
            "self" => {}
            "super" => base = base.split_last()?.1,
            _ => break,
        }
        rest = more;
    }
    if rest.len() == path.len() {
        return Some(path);
    }
    Some([&["crate".to_owned()], base, rest].concat())
}

/// The modules of the crate, from `lib.rs` and `main.rs`. Read once.
static MODULES: LazyLock<Vec<Module>> = LazyLock::new(modules);

fn modules() -> Vec<Module> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules = Vec::new();
    let mut waiting = vec![vec!["main".to_owned()]];
    let mut root = Reader::default();
    root.read(tokens(&src.join("lib.rs")), &[]);
    waiting.extend(root.files);
    while let Some(path) = waiting.pop() {
        let place = src.join(path.join("/"));
        let file = [place.with_extension("rs"), place.join("mod.rs")].into_iter().find(|file| file.exists());
        let mut reader = Reader::default();
        reader.read(tokens(&file.unwrap_or_else(|| panic!("{} has no file", path.join("::")))), &path);
        waiting.extend(reader.files);
        modules.push(Module {
            path,
            names: reader.names,
            hands_on: reader.hands_on,
            selects_at_random: reader.selects_at_random,
        });
    }
    modules
}

fn tokens(file: &Path) -> TokenStream {
    fs::read_to_string(file).unwrap().parse().unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

#[test]
fn modules_use_only_the_layers_below_them() {
    for module in &*MODULES {
        let (_, allowed) = MAY_USE.iter().find(|(name, _)| *name == module.top()).unwrap_or_else(|| {
            panic!("src/{} is not in the list of layers: put it there and in ARCHITECTURE.md", module.top())
        });
        for used in module.others(&module.names) {
            assert!(allowed.contains(&used), "{} uses {used}, which its layer may not", module.path.join("::"));
        }
    }
}

#[test]
fn modules_re_export_only_their_own_items() {
    for module in &*MODULES {
        for handed_on in module.others(&module.hands_on) {
            let allowed = MAY_HAND_ON.contains(&(module.top(), handed_on));
            assert!(allowed, "{} re-exports parts of {handed_on}: use them by their own path", module.path.join("::"));
        }
    }
}

#[test]
fn libraries_stay_at_the_edges() {
    for module in &*MODULES {
        for (library, allowed) in MAY_DEPEND {
            let is_used =
                module.names.iter().any(|path| format!("{}::", path.join("::")).starts_with(&format!("{library}::")));
            let may = allowed.iter().any(|place| module.is_in(place));
            assert!(!is_used || may, "{} uses {library}, which it may not", module.path.join("::"));
        }
    }
}

/// tokio's randomness has no seed that a simulation could set. The commands of the command line are never simulated.
#[test]
fn the_branches_of_a_select_are_polled_in_their_order() {
    for module in MODULES.iter().filter(|module| module.top() != "cli") {
        assert!(!module.selects_at_random, "{}: write `biased;` into each `select!`", module.path.join("::"));
    }
}

/// The modules that `lib.rs` also compiles without the feature `service`, for subsystems in Rust.
fn without_the_service() -> BTreeSet<String> {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let lines: Vec<_> = lib.lines().collect();
    let is_always_there = |pair: &&[&str]| pair[0] != r#"#[cfg(feature = "service")]"#;
    let module = |line: &str| Some(line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';')?.to_owned());
    lines.windows(2).filter(is_always_there).filter_map(|pair| module(pair[1])).collect()
}

#[test]
fn modules_for_subsystems_use_nothing_of_the_service() {
    let modules = without_the_service();
    assert!(modules.contains("subsystem") && !modules.contains("serve"), "{modules:?}");
    for (module, allowed) in MAY_USE.iter().filter(|(module, _)| modules.contains(*module)) {
        let missing: Vec<_> = allowed.iter().filter(|used| !modules.contains(**used)).collect();
        assert!(missing.is_empty(), "{module} may use {missing:?}, which exist only with the feature `service`");
    }
}

#[test]
fn a_subsystem_in_rust_compiles_no_database_no_web_server_no_terminal_and_without_tls_no_c() {
    let unneeded = ["axum", "crossterm", "opentelemetry", "ratatui", "rusqlite", "terminal_size", "tokio-postgres"];
    let with_tls = (&["--package", "peak"][..], &[][..]);
    let without_tls = (&["--package", "orchestrator-core", "--no-default-features"][..], &["cc", "rustls"][..]);
    for (package, also_unneeded) in [with_tls, without_tls] {
        let mut tree = Command::new(env!("CARGO"));
        tree.current_dir(env!("CARGO_MANIFEST_DIR")).args(["tree", "--locked", "--offline"]).args(package);
        let output = tree.args(["--edges", "normal,build", "--prefix", "none", "--format", "{p}"]).output().unwrap();
        let [tree, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
        let compiled: BTreeSet<_> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
        assert!(compiled.contains("orchestrator-core") && compiled.contains("tonic"), "{tree}{errors}");
        for unneeded in unneeded.iter().chain(also_unneeded) {
            assert!(!compiled.contains(unneeded), "a subsystem in Rust compiles {unneeded}");
        }
    }
}

#[test]
fn the_map_in_lib_rs_names_every_module_after_the_modules_it_uses() {
    let lib = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let entries =
        lib.lines().filter_map(|line| line.strip_prefix("//! - ")).map(|line| line.split(": ").next().unwrap());
    let names = entries.flat_map(|names| names.split('`').skip(1).step_by(2));
    let map: Vec<_> = names.map(|name| name.trim_start_matches("mod@")).collect();
    let layers: BTreeSet<_> = MAY_USE.iter().map(|(module, _)| *module).filter(|module| *module != "main").collect();
    assert!(map.len() == layers.len() && map.iter().copied().collect::<BTreeSet<_>>() == layers, "{map:?}");
    for (module, used) in MAY_USE.iter().filter(|(module, _)| *module != "main") {
        let place = |name: &str| map.iter().position(|it| *it == name).unwrap();
        for used in *used {
            assert!(place(used) < place(module), "{module} uses {used}, which comes after it in the map");
        }
    }
}

#[test]
fn every_list_names_existing_modules() {
    let named = MAY_USE.iter().map(|(name, _)| name).chain(MAY_USE.iter().flat_map(|(_, used)| *used));
    for place in named.chain(MAY_DEPEND.iter().flat_map(|(_, places)| *places)) {
        assert!(MODULES.iter().any(|module| module.is_in(place)), "src/{place} is in a list, but is not a module");
    }
}

/// The names in a module of this text and path.
fn named(text: &str, path: &[&str]) -> Vec<String> {
    let mut reader = Reader::default();
    reader.read(text.parse().unwrap(), &path.iter().map(ToString::to_string).collect::<Vec<_>>());
    reader.names.into_iter().map(|path| path.join("::")).collect()
}

#[test]
fn the_reader_finds_every_path_and_nothing_else() {
    assert_eq!(
        named("use crate::{model::{A, b::C}, ports::D as E};\nlet x = crate::store::open(tonic::Code::Ok);", &["a"]),
        ["crate::model::A", "crate::model::b::C", "crate::ports::D", "crate::store::open", "tonic::Code::Ok"]
    );
    // Comments and texts are not code; macros and attributes are.
    assert_eq!(
        named(
            "/// crate::a\nfn f() { /* crate::b */ g!(\"crate::c\", crate::d::e); }\n#[clap::args] struct S;",
            &["a"]
        ),
        ["clap::args", "crate::d::e"]
    );
    // These are different ways to write one path.
    assert_eq!(
        named("use super::super::api::x; mod inner { use super::{y, super::z}; fn f() { self::g(); } }", &["a", "b"]),
        ["crate::a::b::inner::g", "crate::a::b::y", "crate::a::z", "crate::api::x"]
    );
}

#[test]
fn the_reader_skips_code_that_only_tests_compile() {
    let text = "#[cfg(test)]\nmod suite;\n\
                #[cfg(test)]\n#[allow(unused)]\npub(super) fn f(a: A) -> B<C, D> { crate::a::b() }\n\
                fn g() {\n#[cfg(test)]\nself.limit(crate::c::d());\ncrate::e::f();\n}\n\
                #[cfg(test)]\nmod tests { use crate::g::h; }\n\
                use crate::i::j;";
    assert_eq!(named(text, &["a"]), ["crate::e::f", "crate::i::j"]);
}

/// The first characters of prose in files of these kinds: of a comment, or of any line of Markdown. Tables and code
/// between ``` are exempt.
const PROSE: &[(&str, &[&str])] = &[
    ("cpp", &["//"]),
    ("go", &["//"]),
    ("java", &["//", "/*", "*"]),
    ("js", &["//", "/*", "*"]),
    ("md", &[""]),
    ("proto", &["//"]),
    ("py", &["#"]),
    ("rb", &["#"]),
    ("rs", &["//"]),
    ("toml", &["#"]),
    ("ts", &["//", "/*", "*"]),
];

/// Directories of installed packages and of generated code.
const NOT_OURS: &[&str] = &["build", "dist", "gen", "node_modules", "target", "venv"];

#[test]
fn prose_has_at_most_120_columns() {
    let mut waiting = vec![Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()];
    let mut too_long = Vec::new();
    while let Some(path) = waiting.pop() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let extension = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            let is_ours = waiting.is_empty() && too_long.is_empty() || !name.starts_with('.');
            if is_ours && !NOT_OURS.contains(&name.as_str()) {
                waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        } else if let Some((_, begin)) = PROSE.iter().find(|(of, _)| *of == extension && !name.contains("pb")) {
            let mut is_output = false;
            for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
                let text = line.trim_start();
                is_output ^= text.trim_start_matches(['/', '!', ' ']).starts_with("```");
                let is_prose = begin.iter().any(|it| text.starts_with(it)) && !is_output && !text.starts_with('|');
                if is_prose && line.chars().count() > 120 {
                    too_long.push(format!("{}:{}", path.display(), number + 1));
                }
            }
        }
    }
    assert!(too_long.is_empty(), "longer than 120 columns:\n{}", too_long.join("\n"));
}
