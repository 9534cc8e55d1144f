//! Finds the data directory and checks that it belongs to the PostgreSQL that we are connected to.
//!
//! Without the check, a backup of another cluster's files under this cluster's name would be noticed only at the
//! restore.

use super::{
    session::Facts,
    walk::{self, Tablespace},
};
use crate::error::{Error, Failure};
use klio_pg::ControlFile;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone)]
pub struct Place {
    pub data: PathBuf,
    /// The content of its pg_control.
    pub control: ControlFile,
}

/// Finds and checks it. `setting` is `postgres.data_directory`; if empty, PostgreSQL's own answer is used.
///
/// # Errors
/// `Config` when its path is unknown or it belongs to another cluster; `Local` when it cannot be read.
pub fn find(setting: &Path, facts: &Facts) -> Result<Place, Error> {
    let asked = facts.data_directory.as_deref();
    let data = match (setting.as_os_str().is_empty(), asked) {
        (false, _) => setting.to_owned(),
        (true, Some(asked)) => asked.to_owned(),
        (true, None) => {
            let message =
                "find the data directory: PostgreSQL does not show data_directory to this role";
            return Err(Error::new(Failure::Config, message)
                .hint("GRANT pg_read_all_settings TO the role, or set postgres.data_directory"));
        }
    };
    let (bytes, _) = walk::read_control(&data).map_err(|error| unreadable(&data, &error))?;
    let control = ControlFile::parse(&bytes)
        .map_err(|error| Error::new(Failure::Local, format!("{}: {error}", data.display())))?;
    if control.system_identifier != facts.system_identifier {
        let message = format!(
            "read data directory {}: expected the cluster with system identifier {}, found {}",
            data.display(),
            facts.system_identifier,
            control.system_identifier
        );
        return Err(Error::new(Failure::Config, message).hint(
            "postgres.dsn and postgres.data_directory must name the same PostgreSQL, on this machine",
        ));
    }
    Ok(Place { data, control })
}

fn unreadable(data: &Path, error: &klio_storage::Error) -> Error {
    use klio_storage::Kind;
    let hint = match error.kind {
        Kind::NotFound => {
            "klio backup reads the files, so it must run where PostgreSQL runs; set postgres.data_directory \
             if they have another path here, for example in a container"
        }
        Kind::Denied => {
            "run klio as the owner of the data directory, or initialize it with initdb --allow-group-access and add klio's user to the group"
        }
        _ => "",
    };
    let place = data.display();
    Error::new(Failure::Local, format!("read data directory {place}: {error}")).hint(hint)
}

/// The targets of the symlinks in pg_tblspc. A directory in place of a symlink is part of the data directory and is
/// skipped.
///
/// # Errors
/// `Local` when a tablespace cannot be read or its location is not UTF-8, which a record could not store.
pub fn tablespaces(place: &Place, oids: &[u32]) -> Result<Vec<Tablespace>, Error> {
    let mut found = Vec::new();
    for oid in oids {
        let link = place.data.join("pg_tblspc").join(oid.to_string());
        match std::fs::read_link(&link) {
            Ok(location) => {
                if location.to_str().is_none() {
                    return Err(no_text(*oid, &location));
                }
                let target = place.data.join("pg_tblspc").join(&location);
                std::fs::read_dir(&target).map_err(|e| tablespace(*oid, &target, &e))?;
                found.push(Tablespace { oid: *oid, location });
            }
            // A directory instead of a symlink, or dropped since it was listed.
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::InvalidInput | std::io::ErrorKind::NotFound
                ) => {}
            Err(error) => return Err(tablespace(*oid, &link, &error)),
        }
    }
    Ok(found)
}

fn no_text(oid: u32, location: &Path) -> Error {
    let message = format!(
        "back up tablespace {oid}: expected a location in UTF-8, found {}",
        location.as_os_str().as_encoded_bytes().escape_ascii()
    );
    Error::new(Failure::Local, message).hint(
        "stop PostgreSQL, rename the directory, and point the link in pg_tblspc to the new name; nothing was sent",
    )
}

fn tablespace(oid: u32, path: &Path, error: &std::io::Error) -> Error {
    let message = format!("read tablespace {oid} at {}: {error}", path.display());
    Error::new(Failure::Local, message)
        .hint("klio must be able to read every tablespace, under the same path as PostgreSQL")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};

    #[test]
    fn a_location_that_is_no_text_is_refused_by_its_bytes() {
        let error = no_text(7, Path::new(OsStr::from_bytes(b"/ts caf\xe9")));
        assert!(error.message.contains(r"/ts caf\xe9"), "{error}");
    }
}
