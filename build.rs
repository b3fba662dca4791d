//! Compiles the two proto packages with no system `protoc`, keeps their descriptors for reflection and JSON, and tells
//! the binary its commit.

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message;
use prost_types::{FileDescriptorSet, field_descriptor_proto::Type};

const FILES: [&str; 4] = [
    "dreamnet/subsystem/v1/subsystem.proto",
    "dreamnet/orchestrator/v1/orchestrator.proto",
    "dreamnet/orchestrator/v1/ledger.proto",
    "dreamnet/orchestrator/v1/access.proto",
];

/// Messages that this crate hands on as the bytes that came, and so never decodes on the way: on the wire a message
/// field and a `bytes` field are the same.
const CARRIED_AS_BYTES: [&str; 3] =
    [".google.protobuf.Struct", ".dreamnet.orchestrator.v1.CycleTelemetry", ".dreamnet.orchestrator.v1.AuditEvent"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rustc-env=BUILD_COMMIT={}", commit().unwrap_or_default());
    let mut descriptors = protox::Compiler::new(["proto"])?
        .include_imports(true)
        .include_source_info(true)
        .open_files(FILES)?
        .file_descriptor_set();

    let out = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(out, descriptors.encode_to_vec())?;

    carry_as_bytes(&mut descriptors);
    let mut config = prost_build::Config::new();
    // A request is looked over by the name of its message.
    config.enable_type_names();
    let builder = tonic_prost_build::configure().bytes(".").btree_map(".").codec_path("crate::proto::codec::Codec");
    builder.compile_fds_with_config(descriptors, config)?;
    Ok(())
}

/// The commit of this build: `BUILD_COMMIT` of the environment, or that of the checkout. There is none in an archive of
/// the source, and none without `BUILD_COMMIT` in a development build, which would be compiled anew after each commit.
fn commit() -> Option<String> {
    println!("cargo::rerun-if-env-changed=BUILD_COMMIT");
    if let Ok(commit) = env::var("BUILD_COMMIT") {
        return Some(commit);
    }
    if env::var("PROFILE").is_ok_and(|profile| profile == "debug") {
        return None;
    }
    // The archive may have been unpacked within the checkout of something else.
    if fs::canonicalize(git(&["--show-toplevel"])?).ok()? != fs::canonicalize(".").ok()? {
        return None;
    }
    // It grows by a line with each commit and each checkout. Cargo would run this each time if the file were missing.
    let log = git(&["--git-path", "logs/HEAD"])?;
    if Path::new(&log).exists() {
        println!("cargo::rerun-if-changed={log}");
    }
    git(&["--short=12", "HEAD"])
}

/// What `git rev-parse` answers; `None` without Git or outside of a checkout.
fn git(question: &[&str]) -> Option<String> {
    let answer = Command::new("git").arg("rev-parse").args(question).output().ok()?;
    let text = String::from_utf8(answer.stdout).ok()?;
    answer.status.success().then(|| text.trim().to_owned())
}

fn carry_as_bytes(descriptors: &mut FileDescriptorSet) {
    let messages = descriptors
        .file
        .iter_mut()
        .filter(|file| file.package().starts_with("dreamnet."))
        .flat_map(|file| &mut file.message_type);
    for field in messages.flat_map(|message| &mut message.field) {
        if CARRIED_AS_BYTES.contains(&field.type_name()) {
            field.set_type(Type::Bytes);
            field.type_name = None;
        }
    }
}
