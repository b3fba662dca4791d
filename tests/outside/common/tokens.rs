//! Files that only their owner can read, and static tokens in them.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt, path::Path};

use orchestrator_core::{
    access::{Token, TokenId},
    config::tokens_text,
    model::Name,
};

/// Writes a file that only its owner can read.
pub fn write_private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Writes a file with a new token for each name. Returns their ids and their texts.
pub fn write_tokens(path: &Path, names: &[&str]) -> BTreeMap<String, (TokenId, String)> {
    let created = names.iter().map(|name| Token::create(Name::parse(name).unwrap(), None).unwrap());
    let (tokens, texts): (Vec<_>, Vec<_>) = created.unzip();
    write_private(path, &tokens_text(&tokens));
    tokens.into_iter().zip(texts).map(|(token, text)| (token.name.to_string(), (token.id, text))).collect()
}
