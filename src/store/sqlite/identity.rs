//! The identity of a database file. A copy contains the identity of the original file, and is recognized by that: by
//! its epoch it would take over the fleet from the original.
//!
//! A file is identified by its path and by its device and inode. Either can change without a copy: a rename changes the
//! path; a restored backup, or a file system that assigns inodes at each mount, changes the inode. So a database is a
//! copy if both have changed.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use rusqlite::{Connection, OptionalExtension, named_params};

use super::place::{DatabaseFileError, FileId, file_id, log_of};
use crate::store::copying::NotServed;

/// The identity of a database file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) path: PathBuf,
    file: FileId,
}

impl Identity {
    /// The schema version that contains it.
    pub(super) const SINCE: i64 = 3;

    /// The file at this path now, which is absolute and without links.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: file_id(path)? })
    }

    /// Why a database is not served, if it says so in the place of the path: a path is absolute, and no URL is.
    pub(super) fn not_served(connection: &Connection) -> rusqlite::Result<Option<NotServed>> {
        let path: Option<Vec<u8>> = connection.query_row("SELECT path FROM meta", [], |row| row.get(0))?;
        let text = path.filter(|path| !path.starts_with(b"/")).map(|text| String::from_utf8_lossy(&text).into_owned());
        Ok(text.map(|text| NotServed::parse(&text)))
    }

    /// Notes why a database is not served. Earlier versions of this software take it for a copy of the store at that
    /// URL, and refuse it as well.
    pub(super) fn put_not_served(connection: &Connection, not_served: &NotServed) -> rusqlite::Result<()> {
        connection.execute("UPDATE meta SET path = ?1, device = 0, inode = 0", [not_served.text().as_bytes()])?;
        Ok(())
    }

    /// The file of the database when it was last used, if noted in it.
    pub(super) fn noted(connection: &Connection) -> rusqlite::Result<Option<Self>> {
        let noted = connection.query_row("SELECT path, device, inode FROM meta", [], |row| {
            let (path, device, inode): (Option<Vec<u8>>, Option<i64>, Option<i64>) =
                (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok((path, device.zip(inode)))
        });
        let Some((Some(path), Some((device, inode)))) = noted.optional()? else { return Ok(None) };
        Ok(Some(Self { path: OsStr::from_bytes(&path).into(), file: (device.cast_unsigned(), inode.cast_unsigned()) }))
    }

    /// Notes this identity in the database.
    pub(super) fn note(&self, connection: &Connection) -> rusqlite::Result<()> {
        let note = "UPDATE meta SET path = :path, device = :device, inode = :inode";
        connection.execute(
            note,
            named_params! {
                ":path": self.path.as_os_str().as_bytes(),
                ":device": self.file.0.cast_signed(),
                ":inode": self.file.1.cast_signed(),
            },
        )?;
        Ok(())
    }

    /// Checks that this file is the one that was `noted` in the database.
    ///
    /// # Errors
    /// It is a copy, or it can be reached by another name, where its log may be.
    pub(super) fn check(&self, noted: Option<&Self>) -> Result<(), DatabaseFileError> {
        let Self { path, file } = self;
        let database = path.display().to_string();
        let links = fs::metadata(path).map_or(1, |file| file.nlink());
        let is_known = noted == Some(self);
        let Some(noted) = noted else {
            return if links > 1 {
                Err(DatabaseFileError::Linked { database, other: "other names".into() })
            } else {
                Ok(())
            };
        };
        if noted.path == *path {
            if links > 1 && !is_known {
                return Err(DatabaseFileError::Linked { database, other: "other names".into() });
            }
            if !is_known {
                tracing::info!(
                    store = database,
                    "the file of this database is another one than when it was last used, such as a backup that was \
                     put back; it is taken for the same database"
                );
            }
            return Ok(());
        }
        let earlier = noted.path.display().to_string();
        if noted.file != *file {
            return Err(DatabaseFileError::Copy { copy: database, original: earlier });
        }
        if file_id(&noted.path).is_ok_and(|there| there == *file) || links > 1 {
            return Err(DatabaseFileError::Linked { database, other: earlier });
        }
        let log = log_of(&noted.path);
        if fs::metadata(&log).is_ok_and(|log| log.len() > 0) {
            return Err(DatabaseFileError::LogLeftBehind { database, log: log.display().to_string() });
        }
        tracing::info!(store = database, earlier, "the database was renamed");
        Ok(())
    }
}
