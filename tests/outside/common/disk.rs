//! A disk that can hang, and that loses unsynced data in a power failure. The service loads a library in C
//! (`tests/disk/disk.c`) before the system's own.

use std::{collections::BTreeMap, fs, process::Command};

use rusqlite::Connection;

use super::service::Home;

/// A home whose services write to such a disk, which keeps a [`journal`].
pub fn with_journal() -> Home {
    let home = home();
    let journal = format!("DISK_JOURNAL={}", home.path("journal").display());
    home.with_wrapper(["env".to_owned(), journal])
}

/// The synced content of each file after each sync on the disk of a home.
pub struct Journal {
    bytes: Vec<u8>,
    at: usize,
    files: BTreeMap<String, Vec<u8>>,
}

/// The writes that were synced so far.
pub fn journal(home: &Home) -> Journal {
    Journal { bytes: fs::read(home.path("journal")).unwrap(), at: 0, files: BTreeMap::new() }
}

impl Journal {
    /// The name of the file that is synced next, and all files after that; `None` at the end.
    pub fn next_sync(&mut self) -> Option<(String, &BTreeMap<String, Vec<u8>>)> {
        if self.at == self.bytes.len() {
            return None;
        }
        let line = self.line();
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap().to_owned();
        let (name, size, blocks): (_, usize, usize) = (word(), word().parse().unwrap(), word().parse().unwrap());
        let mut file = self.files.remove(&name).unwrap_or_default();
        file.resize(size, 0);
        for _ in 0..blocks {
            let block = self.line();
            let (offset, length) = block.split_once(' ').unwrap();
            let (offset, length): (usize, usize) = (offset.parse().unwrap(), length.parse().unwrap());
            file[offset..offset + length].copy_from_slice(&self.bytes[self.at..self.at + length]);
            self.at += length;
        }
        self.files.insert(name.clone(), file);
        Some((name, &self.files))
    }

    fn line(&mut self) -> String {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|byte| *byte == b'\n').unwrap();
        self.at += length + 1;
        String::from_utf8(rest[..length].to_vec()).unwrap()
    }
}

/// A home whose services write to such a disk.
pub fn home() -> Home {
    let home = Home::new();
    let library = home.path("disk.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/disk/disk.c");
    let mut compiler = Command::new("cc");
    let compiled = compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).arg("-ldl").output();
    let compiled = compiled.unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let variable = |name: &str, path: &str| format!("{name}={}", home.path(path).display());
    let variables = [
        variable("LD_PRELOAD", "disk.so"),
        variable("DISK_HANGS", "hangs"),
        format!("DISK_SYNCED_IN={}", home.path("").canonicalize().unwrap().display()),
    ];
    home.with_wrapper(["env".to_owned()].into_iter().chain(variables))
}

/// From now on, no sync on the disk of this home returns, until [`comes_back`].
pub fn hangs(home: &Home) {
    fs::write(home.path("hangs"), "").unwrap();
}

/// Syncs on the disk of this home return again.
pub fn comes_back(home: &Home) {
    fs::remove_file(home.path("hangs")).unwrap();
}

/// Leaves the database of this home as a power failure does at worst, after its service was killed: without any
/// unsynced data. The machine has restarted since.
pub fn loses_power(home: &Home) {
    for name in ["o.db", "o.db-wal"] {
        // The copy overwrites the file, so that it stays the same file.
        match fs::read(home.path(&format!("{name}.synced"))) {
            Ok(bytes) => fs::write(home.path(name), bytes).unwrap(),
            Err(_never_synced) => fs::write(home.path(name), "").unwrap(),
        }
    }
    // SQLite makes it from the log.
    let _ = fs::remove_file(home.path("o.db-shm"));
    let database = Connection::open(home.path("o.db")).unwrap();
    database.execute("UPDATE meta SET boot_id = 'before'", []).unwrap();
}
