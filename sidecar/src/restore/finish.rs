//! The last steps: recovery settings, then everything on disk, then pg_control, then the marker goes (RESTORE2).

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
    disk::durable,
    repository::{Entry, Reader, StoredKind},
};
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

/// Makes the directory not whole (RESTORE2): the marker first, then no pg_control.
///
/// # Errors
/// As the file system fails.
pub fn begin(places: &Places, backup: &str) -> Result<(), Error> {
    let data = &places.data;
    let mut builder = fs::DirBuilder::new();
    std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
    builder.create(data).map_err(|error| local("make", data, &error))?;
    let mut text = format!(
        "klio restore of backup {backup} has not finished: this is no data directory yet.\n\
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

/// How the marker says where a tablespace is restored to, so that the next attempt knows it for its own.
pub(super) fn tablespace_line(oid: u32, place: &Path) -> String {
    format!("tablespace {oid}: {place:?}")
}

/// What is written beside the backup's files.
#[derive(Debug)]
pub struct Last {
    /// How it recovers.
    pub settings: Settings,
    /// What its own files must not say.
    pub neutral: Neutral,
    /// Of its copy of WAL.
    pub edits: Vec<Edit>,
    /// History files by their names: of timelines up to the one that is recovered to.
    pub histories: Vec<(String, Vec<u8>)>,
}

/// All but the files themselves.
///
/// # Errors
/// As the file system fails; the marker stays then.
pub fn finish(places: &Places, reader: &Reader, control: &Entry, last: &Last) -> Result<(), Error> {
    let Last { settings, neutral, edits, histories } = last;
    let data = &places.data;
    let write = |path: &Path, bytes: &[u8]| {
        put(path, bytes)
            .and_then(|()| own(path, control))
            .map_err(|error| local("write", path, &error))
    };
    for (path, content) in &neutral.rewritten {
        // In place of a link, if it is one: what is behind it is not ours.
        write(&data.join(path), content)?;
    }
    write(&data.join("postgresql.auto.conf"), &settings.auto_conf(&neutral.auto))?;
    write(&data.join(settings.signal()), b"")?;
    for (name, content) in histories {
        // PostgreSQL asks restore_command first; these are for a promotion, or a standby of this one, when nobody answers it.
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
    places.all().try_for_each(sync_all)?;
    write_control(data, &content, control)?;
    let marker = data.join(MARKER);
    remove(&marker).map_err(|error| local("remove", &marker, &error))?;
    sync_dir(data)
}

/// `PG_15_202209061`, in which a tablespace of this cluster has its files.
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

/// PostgreSQL makes them again from tablespace_map; with them, tools see all files before.
///
/// A tablespace that was dropped while the backup began may have no directory in the snapshot. Replaying the drop, PostgreSQL removes
/// the link only where it finds the directory (`destroy_tablespace_directories` in tablespace.c), so there must be one.
fn link_tablespaces(places: &Places, version: &str) -> Result<(), Error> {
    let directory = places.data.join("pg_tblspc");
    for (_, place) in places.new_places() {
        // Replay begins with nothing there: what a delta restore finds is newer than what it writes.
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
        let message = "the snapshot's pg_control is no file".to_owned();
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

/// A small file with this content, on disk: at every moment what was there before, or this, and whole (RESTORE2: a marker
/// that is written again never misses).
fn put(path: &Path, content: &[u8]) -> io::Result<()> {
    let temporary = durable::tmp_path(path);
    remove(&temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    written.and_then(|()| fs::rename(&temporary, path)).inspect_err(|_| {
        // Alone in an empty directory it would keep the next restore out.
        let _ = remove(&temporary);
    })
}

/// As root: what is new belongs to whom pg_control belongs to.
fn own(path: &Path, like: &Entry) -> io::Result<()> {
    if fs::metadata(path)?.uid() != like.uid && rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(path, Some(like.uid), Some(like.gid))?;
    }
    Ok(())
}

/// As root: a new directory belongs to whom the data directory belongs to.
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

/// Everything on the file system of a place: one call, where a sync of each of a hundred thousand files
/// takes minutes. It fails when a write has failed of which nobody was told yet (Linux 5.8).
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

    /// RESTORE2: whoever looks at a directory whose restore begins again finds the marker, always.
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
        // Again, onto what is there.
        link_tablespaces(&places, "PG_15_202209061").unwrap();
    }
}
