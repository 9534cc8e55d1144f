//! Records of a cluster that cannot be read: kept aside under another name before anything is written in their place.
//!
//! - Nothing that was noted is forgotten because a file cannot be read today: a damaged disk, a newer Klio's format. The bytes
//!   stay as `<file>.unreadable`, `<file>.unreadable.2`, ...
//! - While such a file is there, what it said is not known. That is a problem of the cluster, over restarts, for which
//!   retention removes nothing (P6); a person who has looked takes the file away.
//! - One that can be read again, by a newer program or from a disk that was mended, is joined to what there is and goes.

use super::cluster::{Cluster, State};
use crate::{Error, Kind, Op, disk::durable, record};
use serde::{Serialize, de::DeserializeOwned};
use std::{io, path::PathBuf};

/// More of one file are not kept apart: somebody has to look first.
const KEPT_MAX: u32 = 16;

fn aside(cluster: &Cluster, file: &str, number: u32) -> PathBuf {
    let number = if number == 1 { String::new() } else { format!(".{number}") };
    cluster.directory().join(format!("{file}.unreadable{number}"))
}

/// Reads a list and what was kept aside of it, `join`ed; puts aside what cannot be read. Call at start.
///
/// # Errors
/// As the disk fails to keep it aside.
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
        tracing::info!(cluster = %cluster.name, place = %place.display(), "what was kept aside can be read again, and is joined to the record");
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
        let detail = format!("expected at most {KEPT_MAX} files {file}.unreadable, found as many");
        return Err(Error::new(Kind::Conflict, Op::Recover, path.display(), detail)
            .hint("look why the disk damages it, then take the files away"));
    };
    tracing::error!(cluster = %cluster.name, %error, kept = %free.display(), "a record cannot be read: it is kept aside, and what it said is not known");
    durable::rename(disk, &path, &free)
}

fn sentence(file: &str, error: &Error) -> String {
    format!(
        "{error}; what {file} said before is not known, and retention removes nothing; hint: klio verify --wal reads the WAL again; look whether a copy of the file is in tier 2 or in a backup of this disk and put it in its place, or take the file away when nothing of it is missed"
    )
}

/// Both lists, each entry once.
pub(super) fn union<T: Clone + PartialEq>(one: &[T], other: &[T]) -> Vec<T> {
    let mut all = one.to_vec();
    all.extend(other.iter().filter(|entry| !one.contains(entry)).cloned());
    all
}
