//! Finds the data directory, and makes sure that it is the one of the PostgreSQL we are connected to.
//!
//! A backup of another cluster's files under this cluster's name would be found out at the restore.

use super::{
    session::Facts,
    walk::{self, Tablespace},
};
use crate::error::{Error, Failure};
use klio_pg::ControlFile;
use std::path::{Path, PathBuf};

/// A data directory that can be read.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where it is.
    pub data: PathBuf,
    /// Its pg_control.
    pub control: ControlFile,
}

/// Looks at it. `setting` is `postgres.data_directory`, empty when PostgreSQL is to be asked.
///
/// # Errors
/// `Config` when nobody knows where it is; `Local` when it cannot be read or is another cluster's.
pub fn find(setting: &Path, facts: &Facts) -> Result<Place, Error> {
    let asked = facts.data_directory.as_deref();
    let data = match (setting.as_os_str().is_empty(), asked) {
        (false, _) => setting.to_owned(),
        (true, Some(asked)) => asked.to_owned(),
        (true, None) => {
            let message = "find the data directory: PostgreSQL does not tell this role where it is";
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
            "klio backup reads the files, so it must run where PostgreSQL runs; postgres.data_directory \
             names another path to them, in a container for example"
        }
        Kind::Denied => {
            "run klio as the user who owns the data directory, or let initdb --allow-group-access and a group do it"
        }
        _ => "",
    };
    let place = data.display();
    Error::new(Failure::Local, format!("read data directory {place}: {error}")).hint(hint)
}

/// Where the links of pg_tblspc point. A tablespace in place of a link is part of the data directory.
///
/// # Errors
/// `Local` when a tablespace cannot be read, or when its location is no text: a record could not name it.
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
            // No link but a directory, or dropped since it was listed.
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
        "stop PostgreSQL, rename the directory, and let the link in pg_tblspc lead to its new name; nothing was sent",
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
