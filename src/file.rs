//! The files that people name: how they are read, created and replaced, and how a change of one is noticed.

mod changes;

use std::{
    fmt::{self, Display},
    fs::{self, File, FileType},
    io::{self, Read, Write},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, fchown},
    path::{self, Path, PathBuf},
    process,
};

use rustix::fs::OFlags;

pub use self::changes::Changes;

/// Most bytes of a file: enough for the declarations of 20,000 subsystems of 800 bytes, the default limit of the
/// registry. Without parameters, a declaration takes some 200 bytes.
pub const MAX_BYTES: u64 = 16 << 20;

/// A file that a setting names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedFile {
    /// The key of the setting, such as `server.tls.cert_file`.
    pub key: &'static str,
    /// Relative to the working directory.
    pub path: PathBuf,
}

impl Display for NamedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.key, self.path.display())
    }
}

/// Why a file is not read. Reads well behind its name.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The system says why.
    #[error("can't be read: {0}")]
    Unreadable(#[from] io::Error),
    /// It is something whose content does not lie there, and may come slowly, never, or without end.
    #[error("is {0}; give a regular file")]
    NotRegular(&'static str),
    /// It is too large.
    #[error("is larger than {} MiB", MAX_BYTES >> 20)]
    TooLarge,
    /// It is a secret that others may read or change. With its mode.
    #[error("has mode {0:04o}, so that other users of this machine could use it; run chmod 600 on it")]
    Exposed(u32),
}

/// Reads a regular file of at most [`MAX_BYTES`], without the mark (BOM) that some editors put before UTF-8. Blocks,
/// for as long as its disk takes; anything but a regular file is refused without waiting for it.
///
/// # Errors
/// It can't be read, is not a regular file, or is too large.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    content(&open(path)?)
}

/// Reads a secret, as [`read`] does.
///
/// # Errors
/// As those of [`read`], and users other than its owner have access to it. A group may read a file of root:
/// that is how Kubernetes gives secrets to a process.
pub fn read_secret(path: &Path) -> Result<Vec<u8>, FileError> {
    /// The bits of the mode for the group of the file, and for all others.
    const GROUP: u32 = 0o070;
    const OTHERS: u32 = 0o007;
    /// What the group of a file of root may not do either: change it.
    const CHANGE: u32 = 0o030;
    const ROOT: u32 = 0;
    let file = open(path)?;
    let metadata = file.metadata()?;
    let forbidden = if metadata.uid() == ROOT { OTHERS | CHANGE } else { GROUP | OTHERS };
    match metadata.mode() & 0o7777 {
        mode if mode & forbidden != 0 => Err(FileError::Exposed(mode)),
        _ => content(&file),
    }
}

/// Creates a file that only its owner can read and change. Waits until it is on the disk.
///
/// # Errors
/// It exists, or it can't be written.
pub fn create_private(path: &Path, text: &str) -> io::Result<()> {
    write_new(path, text)?.sync_all()?;
    sync_directory(path)
}

/// Replaces a file as a whole, and waits until it is on the disk: a reader finds the earlier text or this one, also
/// after a loss of power. A link to a file stays, and that file is replaced. It keeps its mode, and its owner where the
/// system allows that; a new one is private.
///
/// # Errors
/// It can't be written.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    // Other processes may replace it at the same time.
    let mut new = target.clone().into_os_string();
    new.push(format!(".{}.new", process::id()));
    let new = PathBuf::from(new);
    let write = || {
        let file = write_new(&new, text)?;
        if let Ok(old) = fs::metadata(&target) {
            let made = file.metadata()?;
            if (old.uid(), old.gid()) != (made.uid(), made.gid()) {
                match fchown(&file, Some(old.uid()), Some(old.gid())) {
                    // Only root can give files away: it then belongs to the user of this process.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    changed => changed?,
                }
            }
            file.set_permissions(old.permissions())?;
        }
        file.sync_all()?;
        fs::rename(&new, &target)
    };
    // An earlier process with this id may have been killed before it renamed its file.
    drop(fs::remove_file(&new));
    write().inspect_err(|_| drop(fs::remove_file(&new)))?;
    sync_directory(&target)
}

fn write_new(path: &Path, text: &str) -> io::Result<File> {
    // Also for reading: the simulated disk of the tests reads what is to survive the loss of power.
    let mut file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file)
}

/// Makes the entry of this file in its directory survive the loss of power. Waits until it is on the disk.
///
/// # Errors
/// Its directory can't be opened or synced.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    let path = path::absolute(path)?;
    File::open(path.parent().unwrap_or(&path))?.sync_all()
}

fn open(path: &Path) -> Result<File, FileError> {
    check(fs::metadata(path)?.file_type())?;
    // If a pipe has replaced the file in between, opening it would wait for its other end.
    let no_wait = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(no_wait).open(path)?;
    check(file.metadata()?.file_type())?;
    Ok(file)
}

fn content(file: &File) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::TooLarge);
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        bytes.drain(..3);
    }
    Ok(bytes)
}

fn check(kind: FileType) -> Result<(), FileError> {
    irregular(kind).map_or(Ok(()), |found| Err(FileError::NotRegular(found)))
}

/// The kind of a file that is not a regular file, such as `a directory`. Follow links first.
#[must_use]
pub fn irregular(kind: FileType) -> Option<&'static str> {
    match kind {
        kind if kind.is_file() => None,
        kind if kind.is_dir() => Some("a directory"),
        kind if kind.is_fifo() => Some("a pipe"),
        kind if kind.is_socket() => Some("a socket"),
        _ => Some("a device"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "secret").unwrap();
        let of_root = fs::metadata(&path).unwrap().uid() == 0;
        for (mode, is_read) in
            [(0o600, true), (0o400, true), (0o440, of_root), (0o660, false), (0o604, false), (0o644, false)]
        {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            match read_secret(&path) {
                Ok(read) => assert!(is_read && read == b"secret", "{mode:o}"),
                Err(error) => {
                    assert!(!is_read, "{error}");
                    assert!(error.to_string().starts_with(&format!("has mode {mode:04o}, ")), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_replaced_file_keeps_its_mode_and_its_link_and_a_killed_process_does_not_prevent_it() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        replace(&at("file"), "1").unwrap();
        assert_eq!(mode(&at("file")), 0o600);
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink(at("file"), at("link")).unwrap();
        fs::write(at(&format!("file.{}.new", process::id())), "half of another t").unwrap();
        replace(&at("link"), "2").unwrap();
        assert_eq!((fs::read_to_string(at("file")).unwrap().as_str(), mode(&at("file"))), ("2", 0o640));
        assert!(at("link").is_symlink());
        // Nothing is left beside it, also if it can't be replaced.
        fs::create_dir_all(at("directory/in it")).unwrap();
        assert!(replace(&at("directory"), "3").is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let said = |path: &Path| read(path).unwrap_err().to_string();
        fs::write(at("text"), "\u{feff}a\r\n").unwrap();
        assert_eq!(read(&at("text")).unwrap(), b"a\r\n");
        assert!(said(&at("nothing")).starts_with("can't be read: "));
        assert_eq!(said(directory.path()), "is a directory; give a regular file");
        assert_eq!(said(Path::new("/dev/zero")), "is a device; give a regular file");
        let _listener = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        assert_eq!(said(&at("socket")), "is a socket; give a regular file");
        let large = File::create(at("large")).unwrap();
        large.set_len(MAX_BYTES).unwrap();
        assert_eq!(read(&at("large")).unwrap().len() as u64, MAX_BYTES);
        large.set_len(MAX_BYTES + 1).unwrap();
        assert_eq!(said(&at("large")), "is larger than 16 MiB");
    }
}
