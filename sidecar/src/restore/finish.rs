//! The last steps of a restore: write the recovery settings, sync everything, write pg_control, remove the marker (RESTORE2).

use super::{
    EDITS, MARKER,
    delta::remove,
    local,
    neutral::Neutral,
    of_storage,
    place::{Places, tablespace_map},
    pour::dress,
    settings::Settings,
};
use crate::error::{Error, Failure};
use klio_pg::{ControlFile, Edit};
use klio_proto::Code;
use klio_storage::{
    crash_point,
    disk::durable,
    repository::{Entry, Reader, StoredKind},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

/// Marks the directory as incomplete (RESTORE2): writes the marker first, then removes pg_control.
///
/// # Errors
/// An I/O error of the file system.
pub fn begin(places: &Places, backup: &str) -> Result<(), Error> {
    let data = &places.data;
    let mut builder = fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
    builder.create(data).map_err(|error| local("make", data, &error))?;
    let mut text = format!(
        "klio restore of backup {backup} has not finished: this is not a data directory yet.\n\
         Continue with klio restore --delta, or remove the directory.\n"
    );
    for (oid, place) in places.linked() {
        text.push_str(&tablespace_line(oid, place));
        text.push('\n');
    }
    let marker = data.join(MARKER);
    put(&marker, text.as_bytes()).map_err(|error| local("write", &marker, &error))?;
    sync_dir(data)?;
    let control = data.join("global/pg_control");
    remove(&control).map_err(|error| local("remove", &control, &error))
}

/// The marker's line for a tablespace's place, by which the next attempt recognises that the place belongs to it.
pub(super) fn tablespace_line(oid: u32, place: &Path) -> String {
    format!("tablespace {oid}: {place:?}")
}

/// What is written after the backup's files.
#[derive(Debug)]
pub struct Last {
    pub settings: Settings,
    /// Changes to the cluster's own configuration files.
    pub neutral: Neutral,
    /// Changes to the copy's WAL, for `klio wal-tablespaces`.
    pub edits: Vec<Edit>,
    /// Names and contents of history files: those of the timelines up to the one that recovery follows.
    pub histories: Vec<(String, Vec<u8>)>,
}

/// Writes everything except the backup's files.
///
/// # Errors
/// An I/O error of the file system; the marker then stays.
pub fn finish(places: &Places, reader: &Reader, control: &Entry, last: &Last) -> Result<(), Error> {
    let Last { settings, neutral, edits, histories } = last;
    let data = &places.data;
    let write = |path: &Path, bytes: &[u8]| {
        put(path, bytes)
            .and_then(|()| own(path, control))
            .map_err(|error| local("write", path, &error))
    };
    for (path, content) in &neutral.rewritten {
        // If the path is a link, the new file replaces the link; the file behind it does not belong to this directory.
        write(&data.join(path), content)?;
    }
    write(&data.join("postgresql.auto.conf"), &settings.auto_conf(&neutral.auto))?;
    write(&data.join(settings.signal()), b"")?;
    for (name, content) in histories {
        // PostgreSQL asks restore_command first. These files are for when nobody answers it: after a promotion, or
        // for a standby of this copy.
        write(&data.join("pg_wal").join(name), content)?;
    }
    let content = read_control(reader, control)?;
    if !edits.is_empty() {
        let lines: String = edits.iter().map(|edit| format!("{edit}\n")).collect();
        write(&data.join(EDITS), lines.as_bytes())?;
    }
    if places.linked().next().is_some() {
        write(&data.join("tablespace_map"), tablespace_map(places).as_bytes())?;
        link_tablespaces(places, &version_directory(data, &content)?)?;
    }
    crash_point!("restore.configured");
    places.all().try_for_each(sync_all)?;
    crash_point!("restore.synced");
    write_control(data, &content, control)?;
    crash_point!("restore.controlled");
    let marker = data.join(MARKER);
    remove(&marker).map_err(|error| local("remove", &marker, &error))?;
    sync_dir(data)
}

/// Name of the directory in which a tablespace of this cluster has its files, such as `PG_15_202209061`.
fn version_directory(data: &Path, control: &[u8]) -> Result<String, Error> {
    let path = data.join("PG_VERSION");
    let text = fs::read_to_string(&path).map_err(|error| local("read", &path, &error))?;
    let corrupt = |what: String| Error::new(Failure::Code(Code::Corrupt), what);
    let major = text.trim().parse().map_err(|_| {
        corrupt(format!("read {}: expected a major version, found {text:?}", path.display()))
    })?;
    let control = ControlFile::parse(control)
        .map_err(|error| corrupt(format!("the snapshot's pg_control: {error}")))?;
    Ok(control.tablespace_directory(major))
}

/// Creates the links in pg_tblspc. PostgreSQL creates them again from tablespace_map, but with them other tools see
/// all files even before the first start.
///
/// A tablespace that was dropped while the backup began may have no directory in the snapshot. When PostgreSQL
/// replays the drop, it removes the link only if it finds the directory (`destroy_tablespace_directories` in
/// tablespace.c), so the directory must exist.
fn link_tablespaces(places: &Places, version: &str) -> Result<(), Error> {
    let directory = places.data.join("pg_tblspc");
    for (_, place) in places.new_places() {
        // Replay must start with an empty tablespace: in a delta restore, the files here are newer than what replay writes.
        let own = place.join(version);
        remove(&own).map_err(|error| local("remove", &own, &error))?;
    }
    for (oid, place) in places.linked() {
        let own = place.join(version);
        if !own.exists() {
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
            builder
                .create(&own)
                .and_then(|()| give_like(&own, &places.data))
                .map_err(|error| local("make", &own, &error))?;
        }
        let link = directory.join(oid.to_string());
        remove(&link)
            .and_then(|()| std::os::unix::fs::symlink(place, &link))
            .map_err(|error| local("link", &link, &error))?;
    }
    Ok(())
}

fn read_control(reader: &Reader, control: &Entry) -> Result<Vec<u8>, Error> {
    let StoredKind::File { chunks, .. } = &control.kind else {
        let message = "read the snapshot's pg_control: expected a file".to_owned();
        return Err(Error::new(Failure::Code(Code::Corrupt), message));
    };
    let mut content = Vec::new();
    for id in chunks {
        content.extend_from_slice(&reader.chunk(id).map_err(|e| of_storage(&e))?);
    }
    Ok(content)
}

fn write_control(data: &Path, content: &[u8], control: &Entry) -> Result<(), Error> {
    let path = data.join("global/pg_control");
    let temporary = data.join("global/pg_control.klio");
    let write = || {
        put(&temporary, content)?;
        let file = File::open(&temporary)?;
        dress(&file, control)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)
    };
    write().map_err(|error| local("write", &path, &error))?;
    sync_dir(&data.join("global"))
}

/// Writes a small file and syncs it. At every moment the path has the old content or the complete new content, so a
/// marker that is written again is never missing (RESTORE2).
fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = durable::tmp_path(path);
    remove(&temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    written.and_then(|()| fs::rename(&temporary, path)).inspect_err(|_| {
        // In an otherwise empty directory, this file would make the next restore refuse the directory.
        let _ = remove(&temporary);
    })
}

/// If this process is root, gives a new file the owner of pg_control.
fn own(path: &Path, like: &Entry) -> io::Result<()> {
    if fs::metadata(path)?.uid() != like.uid && rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(like.uid), Some(like.gid))?;
    }
    Ok(())
}

/// If this process is root, gives a new directory the owner of the data directory.
fn give_like(directory: &Path, data: &Path) -> io::Result<()> {
    if rustix::process::geteuid().is_root() {
        let like = fs::metadata(data)?;
        std::os::unix::fs::chown(directory, Some(like.uid()), Some(like.gid()))?;
    }
    Ok(())
}

fn sync_dir(directory: &Path) -> Result<(), Error> {
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| local("sync directory", directory, &error))
}

/// Syncs the file system of a place with one call; to sync each of a hundred thousand files would take minutes. The
/// call also reports writes that failed before and were not reported yet (since Linux 5.8).
fn sync_all(place: &Path) -> Result<(), Error> {
    let synced = File::open(place).and_then(|place| Ok(rustix::fs::syncfs(&place)?));
    synced.map_err(|error| local("sync", place, &error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        collections::BTreeMap,
        sync::atomic::{AtomicBool, Ordering::Relaxed},
    };

    /// RESTORE2: the marker exists at every moment while a restore begins again in the same directory.
    #[test]
    fn a_marker_that_is_written_again_is_there_at_every_moment() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        let places =
            Places { data: data.clone(), tablespaces: BTreeMap::new(), made: BTreeMap::new() };
        begin(&places, "one").unwrap();
        let (done, missed) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    let whole =
                        fs::read_to_string(data.join(MARKER)).is_ok_and(|t| t.ends_with('\n'));
                    missed.fetch_or(!whole, Relaxed);
                }
            });
            (0..300).for_each(|_| begin(&places, "two").unwrap());
            done.store(true, Relaxed);
        });
        assert!(!missed.into_inner(), "there was a moment without a marker");
        assert!(fs::read_to_string(data.join(MARKER)).unwrap().contains("backup two"));
        let names: Vec<_> = fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [MARKER], "nothing else is left");
    }

    #[test]
    fn a_tablespace_without_a_directory_gets_one_so_that_replay_can_drop_it() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        let place = scratch.path().join("elsewhere/place");
        let tablespaces = BTreeMap::from([(7, place.clone())]);
        let places = Places { data: data.clone(), tablespaces, made: BTreeMap::new() };
        link_tablespaces(&places, "PG_15_202209061").unwrap();
        assert!(place.join("PG_15_202209061").is_dir());
        assert_eq!(fs::read_link(data.join("pg_tblspc/7")).unwrap(), place);
        // Again, into the same directory.
        link_tablespaces(&places, "PG_15_202209061").unwrap();
    }
}
