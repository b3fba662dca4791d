//! Who may use whom (see ARCHITECTURE.md), held by reading the source.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What each top-level module may use of this crate. `serve`, `cli` and `main` tie things together.
const MAY_USE: &[(&str, &[&str])] = &[
    ("memory", &[]),
    ("model", &[]),
    ("proto", &["model"]),
    ("clock", &[]),
    ("parts", &[]),
    ("file", &[]),
    ("ports", &["memory", "model"]),
    ("engine", &["memory", "model", "ports"]),
    ("record", &["model", "ports", "proto"]),
    ("schedule", &["memory", "model", "ports"]),
    ("orchestrator", &["clock", "engine", "memory", "model", "parts", "ports", "record", "schedule"]),
    ("store", &["memory", "model", "ports"]),
    ("dial", &["memory", "model", "ports", "proto"]),
    ("listen", &["memory", "proto"]),
    ("subsystem", &["listen", "memory", "model", "proto"]),
    ("api", &["memory", "model", "orchestrator", "proto", "record"]),
    ("web", &["api", "listen", "memory", "model", "proto", "telemetry"]),
    ("config", &["engine", "file", "model", "ports", "store"]),
    ("telemetry", &["config", "listen", "memory", "model", "orchestrator", "ports"]),
    (
        "serve",
        &[
            "api",
            "clock",
            "config",
            "dial",
            "file",
            "listen",
            "memory",
            "orchestrator",
            "parts",
            "ports",
            "record",
            "store",
            "telemetry",
            "web",
        ],
    ),
    (
        "cli",
        &[
            "api",
            "config",
            "dial",
            "engine",
            "memory",
            "model",
            "ports",
            "proto",
            "serve",
            "store",
            "subsystem",
            "telemetry",
        ],
    ),
    ("main", &["cli"]),
];

/// Which modules may use a library that must not spread.
const MAY_DEPEND: &[(&str, &[&str])] = &[
    ("tonic", &["api", "cli", "listen", "proto", "serve", "subsystem", "web"]),
    ("prost", &["api", "cli", "dial", "proto", "record", "web"]),
    ("axum", &["web"]),
    ("h2", &["dial", "listen"]),
    ("prometheus", &["telemetry"]),
    ("opentelemetry", &["telemetry"]),
    ("opentelemetry_otlp", &["telemetry"]),
    ("opentelemetry_sdk", &["telemetry"]),
    ("rusqlite", &["store"]),
    ("clap", &["cli", "config", "main"]),
];

fn sources(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let (directories, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    // What only tests compile may use what it likes.
    let files = files.into_iter().filter(|path| {
        let stem = path.file_stem().unwrap();
        path.extension().is_some_and(|extension| extension == "rs") && stem != "tests" && stem != "suite"
    });
    files.chain(directories.iter().flat_map(|directory| sources(directory))).collect()
}

/// Code without comments and without the tests at the end of the file.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// The words that follow `prefix`, and inside of braces directly after it those at the first depth.
fn words_after(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            for c in group.chars() {
                match c {
                    '}' if depth == 0 => break,
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        words.insert(first_word(&word));
                        word.clear();
                    }
                    _ if depth == 0 => word.push(c),
                    _ => {}
                }
            }
            words.insert(first_word(&word));
        } else {
            words.insert(first_word(rest));
        }
    }
    words.remove("");
    words
}

fn first_word(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The code of each top-level module.
fn modules() -> BTreeMap<String, String> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules: BTreeMap<String, String> = BTreeMap::new();
    for path in sources(&src) {
        let relative = path.strip_prefix(&src).unwrap();
        let module = relative.components().next().unwrap().as_os_str().to_str().unwrap().trim_end_matches(".rs");
        if module != "lib" {
            modules.entry(module.to_owned()).or_default().push_str(&code(&path));
        }
    }
    modules
}

#[test]
fn modules_use_only_the_layers_below_them() {
    let modules = modules();
    assert!(modules.len() > 10, "nothing was read: {:?}", modules.keys());
    for (module, code) in &modules {
        let (_, allowed) = MAY_USE.iter().find(|(name, _)| name == module).unwrap_or_else(|| {
            panic!("src/{module} is not in the list of layers: put it there and in ARCHITECTURE.md")
        });
        let used = words_after(code, "crate::").into_iter().chain(words_after(code, "orchestrator_core::"));
        for used in used.filter(|used| used != module && modules.contains_key(used)) {
            assert!(allowed.contains(&used.as_str()), "{module} uses {used}, which its layer may not");
        }
    }
}

#[test]
fn libraries_stay_at_the_edges() {
    for (module, code) in &modules() {
        for (library, allowed) in MAY_DEPEND {
            let used = !words_after(code, &format!("{library}::")).is_empty();
            assert!(!used || allowed.contains(&module.as_str()), "{module} uses {library}, which it may not");
        }
    }
}

#[test]
fn the_reader_of_uses_reads() {
    let code = "use crate::{model::{A, B}, ports::C};\nuse crate::record;\nlet x = crate::store::open();";
    assert_eq!(words_after(code, "crate::"), ["model", "ports", "record", "store"].map(String::from).into());
    assert!(words_after("use tonic_health::x; a::tonic::b", "tonic::").is_empty());
}
