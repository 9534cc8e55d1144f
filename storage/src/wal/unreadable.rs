//! Records of a cluster that cannot be read: they are set aside under another name before a new file is written in
//! their place.
//!
//! - Nothing that was recorded is forgotten because a file cannot be read today, be it due to a damaged disk or the
//!   format of a newer Klio. The bytes stay as `<file>.unreadable`, `<file>.unreadable.2`, ...
//! - While such a file exists, its content is unknown. That is a problem of the cluster, also after restarts, during
//!   which retention removes nothing (P6). A person who has looked into it removes the file.
//! - A file that becomes readable again, with a newer program or after the disk was repaired, is merged into the
//!   current record and removed.

use super::cluster::{Cluster, State};
use crate::{Error, Kind, Op, disk::durable, record};
use serde::{Serialize, de::DeserializeOwned};
use std::{io, path::PathBuf};

/// No more copies of one file are kept: somebody has to look into it first.
const KEPT_MAX: u32 = 16;

fn aside(cluster: &Cluster, file: &str, number: u32) -> PathBuf {
    let number = if number == 1 { String::new() } else { format!(".{number}") };
    cluster.directory().join(format!("{file}.unreadable{number}"))
}

/// Reads a list, merges it with its set-aside copies using `join`, and sets it aside if it cannot be read. Call it at
/// start.
///
/// # Errors
/// An I/O error while the file is set aside.
pub(super) fn load<T: Serialize + DeserializeOwned + Clone + PartialEq>(
    cluster: &Cluster,
    state: &mut State,
    file: &str,
    join: impl Fn(&[T], &[T]) -> Vec<T>,
) -> Result<Vec<T>, Error> {
    let (disk, path) = (cluster.disk(), cluster.directory().join(file));
    let there: Vec<T> = match record::load(disk, &path) {
        Ok(there) => there.unwrap_or_default(),
        Err(error) => {
            keep(cluster, file, &error)?;
            Vec::new()
        }
    };
    let (mut all, mut readable) = (there.clone(), Vec::new());
    for number in 1..=KEPT_MAX {
        let place = aside(cluster, file, number);
        match record::load::<Vec<T>>(disk, &place) {
            Ok(None) => {}
            Ok(Some(more)) => {
                all = join(&all, &more);
                readable.push(place);
            }
            Err(error) => drop(state.problems.insert(error.place.clone(), sentence(file, &error))),
        }
    }
    if all != there {
        record::store(disk, &path, &all)?;
    }
    for place in readable {
        tracing::info!(cluster = %cluster.name, place = %place.display(), "a record that was set aside is readable again; merging it into the current one");
        durable::remove_if_there(disk, &place)?;
    }
    Ok(all)
}

fn keep(cluster: &Cluster, file: &str, error: &Error) -> Result<(), Error> {
    let (disk, path) = (cluster.disk(), cluster.directory().join(file));
    let free = (1..=KEPT_MAX)
        .map(|number| aside(cluster, file, number))
        .find(|place| matches!(disk.stat(place), Err(e) if e.kind() == io::ErrorKind::NotFound));
    let Some(free) = free else {
        let detail = format!(
            "expected fewer than {KEPT_MAX} files named {file}.unreadable, found {KEPT_MAX}"
        );
        return Err(Error::new(Kind::Conflict, Op::Recover, path.display(), detail)
            .hint("find out why the disk damages this file, then remove the .unreadable files"));
    };
    tracing::error!(cluster = %cluster.name, %error, kept = %free.display(), "cannot read a record; setting it aside, its content is unknown");
    durable::rename(disk, &path, &free)
}

fn sentence(file: &str, error: &Error) -> String {
    format!(
        "{error}; the earlier content of {file} is unknown, and retention removes nothing; hint: klio verify --wal reads the WAL again; put a copy of the file from tier 2 or a backup of this disk in its place, or remove the unreadable file if its content is not needed"
    )
}

/// Merges both lists without duplicates.
pub(super) fn union<T: Clone + PartialEq>(one: &[T], other: &[T]) -> Vec<T> {
    let mut all = one.to_vec();
    all.extend(other.iter().filter(|entry| !one.contains(entry)).cloned());
    all
}
