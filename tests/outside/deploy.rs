//! What the service is installed with: do the Dockerfile, the package, the unit and the manifests fit it?

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::common::{
    command::{orchestrator, run, run_with},
    service::Home,
};
use jiff::SignedDuration;
use orchestrator_core::{config::Config, serve::AFTER_GRACE};
use tokio::process::Command;
use toml::Table;

const BINARY: &str = "/usr/bin/orchestrator";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What follows the first occurrence of this text, to the end of its line.
fn after<'a>(text: &'a str, what: &str) -> &'a str {
    let rest = text.split_once(what).unwrap_or_else(|| panic!("{what:?} is missing in\n{text}")).1;
    rest.lines().next().unwrap_or_default().trim()
}

fn cargo() -> Table {
    read("Cargo.toml").parse().unwrap()
}

/// The words in a list such as `["a", "b"]`.
fn words(list: &str) -> Vec<String> {
    list.trim_matches(['[', ']']).split(',').map(|word| word.trim().trim_matches('"').to_owned()).collect()
}

/// The ports of the gRPC server and of the admin address.
fn ports() -> [u16; 2] {
    let config = Config::default();
    [config.server.listen.port(), config.admin.listen.unwrap().port()]
}

/// The time that a supervisor has to wait for the end of the service, by default.
fn shutdown() -> Duration {
    Config::default().server.drain_grace + AFTER_GRACE
}

fn duration(text: &str) -> Duration {
    text.parse::<SignedDuration>().unwrap().try_into().unwrap()
}

/// The sources that are compiled into the binary from outside of `src`.
fn included() -> BTreeSet<PathBuf> {
    let mut waiting = vec![root().join("src")];
    let mut found = BTreeSet::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            waiting.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|it| it == "rs") && path.file_name().is_some_and(|it| it != "tests.rs") {
            let text = fs::read_to_string(&path).unwrap();
            for included in text.split("include_str!(\"").skip(1) {
                let other = path.parent().unwrap().join(included.split('"').next().unwrap());
                let other = other.canonicalize().unwrap().strip_prefix(root()).unwrap().to_path_buf();
                found.extend((!other.starts_with("src")).then_some(other));
            }
        }
    }
    found
}

#[test]
fn the_image_is_built_with_the_minimum_version_of_rust_from_all_files_that_it_needs() {
    let dockerfile = read("Dockerfile");
    let minimum = cargo()["package"]["rust-version"].as_str().unwrap().to_owned();
    let (image, toolchain) = (after(&dockerfile, "FROM rust:"), after(&dockerfile, "RUSTUP_TOOLCHAIN="));
    assert!(toolchain.starts_with(&format!("{minimum}.")) && image.starts_with(&format!("{toolchain}-")), "{image}");

    let ignore = read(".dockerignore");
    let context: Vec<_> = ignore.lines().filter_map(|line| line.strip_prefix('!')).collect();
    for path in &context {
        assert!(root().join(path).exists(), "{path} in .dockerignore does not exist");
    }
    let included = included();
    assert!(included.contains(Path::new("examples/dreamnet.toml")), "{included:?}");
    let needed = ["Cargo.lock", "Cargo.toml", "build.rs", "proto", "src", "examples/rust", "benches"];
    for path in included.iter().map(PathBuf::as_path).chain(needed.iter().map(Path::new)) {
        let is_there = context.iter().any(|it| path.starts_with(it));
        assert!(is_there, "{} is not in the context of the build: add it to .dockerignore", path.display());
    }
}

#[tokio::test]
async fn the_image_listens_at_the_default_ports_and_asks_for_its_health() {
    let dockerfile = read("Dockerfile");
    assert_eq!(after(&dockerfile, "EXPOSE "), ports().map(|port| port.to_string()).join(" "));
    let health = words(after(&dockerfile, " CMD "));
    assert_eq!((health[0].as_str(), words(after(&dockerfile, "ENTRYPOINT "))), (BINARY, vec![BINARY.to_owned()]));
    let service = Home::new().in_memory().serve().await;
    let address = service.address().to_string();
    let check: Vec<_> = health[1..].iter().map(String::as_str).chain(["--address", &address]).collect();
    assert_eq!(orchestrator(None, &check).await, (0, "SERVING\n".into()));
    service.kill().await;
    assert_eq!(orchestrator(None, &check).await.0, 4);
}

#[test]
fn compose_mounts_files_that_exist_and_waits_for_the_end_of_the_service() {
    let compose = read("compose.yaml");
    assert!(duration(after(&compose, "stop_grace_period: ")) > shutdown(), "{:?}", shutdown());
    let mounted: Vec<_> =
        compose.lines().filter_map(|line| line.trim().strip_prefix("- ./")?.split(':').next()).collect();
    assert!(!mounted.is_empty());
    for path in mounted {
        assert!(root().join(path).exists(), "{path} in compose.yaml does not exist");
    }
    // Prometheus has the configuration of the examples, and so finds the service at its default address.
    assert!(read("examples/monitoring/prometheus.yml").contains(&Config::default().admin.listen.unwrap().to_string()));
}

/// Where the package puts the files of the checkout, by their place in it.
fn packaged() -> Vec<(String, String)> {
    let cargo = cargo();
    let assets = cargo["package"]["metadata"]["deb"]["assets"].as_array().unwrap();
    let asset = |asset: &toml::Value| [0, 1].map(|at| asset[at].as_str().unwrap().to_owned()).into();
    assets.iter().map(asset).collect()
}

#[tokio::test]
async fn the_package_contains_what_its_unit_starts() {
    let packaged = packaged();
    for (path, _) in &packaged {
        // The recipe makes these.
        let is_made = path.starts_with("target/");
        assert!(is_made || root().join(path.split("/*").next().unwrap()).exists(), "{path} does not exist");
    }
    let unit = read("deploy/systemd/orchestrator.service");
    let start: Vec<_> = after(&unit, "ExecStart=").split(' ').collect();
    let ["/usr/bin/orchestrator", "serve", "--config", config] = start[..] else { panic!("{start:?}") };
    let conf_files = cargo()["package"]["metadata"]["deb"]["conf-files"].clone();
    assert_eq!(conf_files.as_array().unwrap()[0].as_str(), Some(config), "the file that the unit names");
    let (source, directory) = packaged.iter().find(|(path, _)| path == "deploy/debian/orchestrator.toml").unwrap();
    assert_eq!(format!("/{directory}orchestrator.toml"), config);
    let path = root().join(source).display().to_string();
    let (code, text) = orchestrator(None, &["check", "--config", &path]).await;
    assert!(code == 0 && text.contains("sqlite:/var/lib/orchestrator/orchestrator.db"), "{text}");
    for directive in ["StateDirectory=", "RuntimeDirectory=", "User=", "Group="] {
        assert_eq!(after(&unit, directive), "orchestrator", "{directive}");
    }
    assert!(read("deploy/systemd/orchestrator.sysusers").contains("\nu orchestrator "));
}

#[test]
fn the_unit_waits_for_the_end_of_the_service() {
    let unit = read("deploy/systemd/orchestrator.service");
    assert_eq!(after(&unit, "Type="), "notify");
    assert!(duration(after(&unit, "TimeoutStopSec=")) > shutdown(), "{:?}", shutdown());
}

const MANIFESTS: &str = "deploy/kubernetes";
/// The same for three replicas.
const OF_REPLICAS: &str = "deploy/kubernetes/replicas";

/// The configuration in these manifests, with this directory for its socket.
fn configuration(manifests: &str, run: &Path) -> String {
    let manifest = read(&format!("{manifests}/configmap.yaml"));
    let (_, block) = manifest.split_once("  orchestrator.toml: |\n").unwrap();
    let lines: Vec<_> = block.lines().map(|line| line.strip_prefix("    ").unwrap_or(line.trim())).collect();
    lines.join("\n").replace("/run/orchestrator", &run.display().to_string())
}

#[tokio::test]
async fn the_pod_starts_with_the_configuration_of_its_manifest_and_its_probes_succeed() {
    let home = Home::new();
    let pki = home.path("pki").display().to_string();
    let (code, text) = orchestrator(None, &["certs", "init", "--dir", &pki, "--host", "orchestrator"]).await;
    assert_eq!(code, 0, "{text}");
    let manifest = read(&format!("{MANIFESTS}/statefulset.yaml"));
    assert!(manifest.contains("- --secure=/etc/orchestrator/pki\n"));
    let config = configuration(MANIFESTS, &home.path(""));
    assert!(config.contains("0.0.0.0"), "{config}");
    let file = home.path("pod.toml").display().to_string();
    fs::write(&file, &config).unwrap();
    let (code, text) = orchestrator(None, &["check", "--config", &file, "--secure", &pki]).await;
    assert_eq!(code, 0, "{text}");

    let home = home.with_config(&config).with_args(["--secure", &pki]);
    let service = home.serve().await;
    let probes: Vec<_> = manifest.split("httpGet:\n").skip(1).collect();
    assert_eq!(probes.len(), 2);
    for probe in probes {
        assert_eq!((after(probe, "scheme: "), after(probe, "port: ")), ("HTTPS", "admin"));
        // As kubelet does: without a credential, and without verifying the certificate.
        let url = format!("https://{}{}", service.admin(), after(probe, "path: "));
        let curl = ["--silent", "--show-error", "--insecure", &url];
        assert_eq!(run_with("curl", &curl).await, (0, "ok".into()), "{url}");
    }
    let address = format!("unix:{}", home.path("orchestrator.sock").display());
    // `kubectl exec` may do everything.
    let (code, text) = orchestrator(None, &["whoami", "--address", &address]).await;
    assert!(code == 0 && text.contains("\nADMIN "), "{text}");
}

#[test]
fn the_pods_have_the_default_ports_and_the_time_to_shut_down() {
    for manifests in [MANIFESTS, OF_REPLICAS] {
        let manifest = read(&format!("{manifests}/statefulset.yaml"));
        let service = read(&format!("{manifests}/service.yaml"));
        let named = ["grpc", "admin"].into_iter().zip(ports());
        for (name, port) in named {
            let container = format!("- name: {name}\n              containerPort: {port}\n");
            assert!(manifest.contains(&container), "{manifests}: {name} {port}");
            let of_service = format!("- name: {name}\n      port: {port}\n      targetPort: {name}\n");
            assert!(service.contains(&of_service), "{manifests}: {name} {port}");
            let config = configuration(manifests, Path::new("/run"));
            assert!(config.contains(&format!("listen = \"0.0.0.0:{port}\"")), "{config}");
        }
        let seconds: u64 = after(&manifest, "terminationGracePeriodSeconds: ").parse().unwrap();
        assert!(Duration::from_secs(seconds) > shutdown(), "{:?}", shutdown());
        assert_is_of_this_version(&manifest);
        // As docs/operations.md says of the memory that a container needs.
        let limit = after(&configuration(manifests, Path::new("/run")), "max_bytes = ").replace('_', "");
        assert_eq!(after(manifest.split_once("limits:\n").unwrap().1, "memory: "), "1Gi");
        assert!(limit.parse::<f64>().unwrap() * 2.5 < f64::from(1 << 30), "{limit}");
    }
}

/// Asserts that a manifest has the image and the user of this version.
fn assert_is_of_this_version(manifest: &str) {
    let user = "65532";
    assert_eq!(after(manifest, "runAsUser: "), user);
    assert!(read("Dockerfile").contains(&format!("USER {user}:{user}\n")));
    let version = cargo()["package"]["version"].as_str().unwrap().to_owned();
    assert_eq!(after(manifest, "image: orchestrator:"), version);
}

#[tokio::test]
async fn the_jobs_run_commands_over_the_store_of_the_replicas() {
    let home = Home::new();
    let url = after(&configuration(OF_REPLICAS, Path::new("/run")), "url = ").trim_matches('"').to_owned();
    // Exit code 1: the line is right, and its files are not there.
    for (name, user, more, code) in [
        ("accept", "orchestrator", None, 1),
        ("copy", "orchestrator", None, 1),
        ("migrate", "owner", Some("--print"), 0),
    ] {
        let job = read(&format!("{OF_REPLICAS}/jobs/{name}.yaml"));
        assert_is_of_this_version(&job);
        assert!(job.contains(&url.replace("//orchestrator@", &format!("//{user}@"))), "{job}");
        let args = job.split_once("args:\n").unwrap().1.lines().map_while(|line| line.trim().strip_prefix("- "));
        // A place that no machine has.
        let args = args.map(|arg| arg.replace("/var/lib/", &home.path("").display().to_string()));
        let args: Vec<_> = args.chain(more.map(str::to_owned)).collect();
        let (found, said) = orchestrator(None, &args.iter().map(String::as_str).collect::<Vec<_>>()).await;
        assert_eq!(found, code, "{said}");
        assert!(code != 0 || said.contains("TO \"orchestrator\";\n"), "{said}");
    }
}

/// The variables that a manifest or a compose file sets.
fn variables(text: &str) -> BTreeSet<String> {
    let words = text.split(|character: char| !character.is_ascii_uppercase() && character != '_');
    words.filter(|word| word.starts_with("ORCHESTRATOR_")).map(str::to_owned).collect()
}

#[tokio::test]
async fn replicas_are_configured_as_their_manifests_and_their_compose_file_say() {
    let home = Home::new();
    let pki = home.path("pki").display().to_string();
    // Replicas recognize each other by their identity, so that it names no pod.
    let (code, text) = orchestrator(None, &["certs", "init", "--dir", &pki, "--host", "orchestrator"]).await;
    assert_eq!(code, 0, "{text}");

    let manifest = read(&format!("{OF_REPLICAS}/statefulset.yaml"));
    let file = home.path("pod.toml").display().to_string();
    fs::write(&file, configuration(OF_REPLICAS, &home.path(""))).unwrap();
    assert!(variables(&manifest).contains("ORCHESTRATOR_CLUSTER_REPLICA"));
    let advertised = after(&manifest, "- name: ORCHESTRATOR_CLUSTER_ADVERTISE\n              value: ");
    let advertised = advertised.replace("$(ORCHESTRATOR_CLUSTER_REPLICA)", "orchestrator-0");
    assert_eq!(advertised, format!("https://orchestrator-0.orchestrator-replicas:{}", ports()[0]));
    let set = format!("cluster.advertise={advertised:?}");
    let check = ["check", "--config", &file, "--secure", &pki, "--set", &set, "--set", "cluster.replica=\"o\""];
    let (code, text) = orchestrator(None, &check).await;
    // The password and the authority of the database are not read before it is connected to.
    assert!(code == 0 && text.contains("postgres://orchestrator@postgresql/orchestrator"), "{text}");

    let compose = read("deploy/replicas.compose.yaml");
    assert!(duration(after(&compose, "stop_grace_period: ")) > shutdown(), "{:?}", shutdown());
    let mut check = Command::new(env!("CARGO_BIN_EXE_orchestrator"));
    check.arg("check");
    // The settings of all, and those of the first one.
    let first = compose.split("\n  b:\n").next().unwrap();
    let settings = first.lines().filter_map(|line| line.trim().split_once(": "));
    check.envs(
        settings
            .filter(|(name, _)| name.starts_with("ORCHESTRATOR_"))
            .map(|(name, value)| (name, value.trim_matches('\''))),
    );
    let (code, text) = run(check).await;
    assert!(code == 0 && text.contains("127.0.0.1:7701"), "{text}");
}

#[tokio::test]
async fn every_command_has_a_manual_page_with_its_examples() {
    let home = Home::new();
    let dir = home.path("man1");
    let path = dir.display().to_string();
    let (code, text) = orchestrator(None, &["man", &path]).await;
    assert!(code == 1 && text.contains(&path), "{text}");
    fs::create_dir(&dir).unwrap();
    assert_eq!(orchestrator(None, &["man", &path]).await, (0, String::new()));
    let pages: BTreeSet<_> = fs::read_dir(&dir).unwrap().map(|it| it.unwrap().file_name()).collect();
    for page in ["orchestrator.1", "orchestrator-serve.1", "orchestrator-cycles-list.1", "orchestrator-man.1"] {
        assert!(pages.contains(std::ffi::OsStr::new(page)), "{pages:?}");
    }
    let serve = fs::read_to_string(dir.join("orchestrator-serve.1")).unwrap();
    assert!(serve.contains(".TH") && serve.contains("Exit codes:") && serve.contains("Examples:"), "{serve}");
}

#[tokio::test]
async fn the_recipe_of_a_release_refuses_to_sign_without_a_key() {
    let script = root().join("deploy/release").display().to_string();
    let (code, text) = run_with("bash", &[&script]).await;
    assert!(code != 0 && text.contains("give the private key that signs"), "{text}");
}
