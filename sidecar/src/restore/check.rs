//! Checks whether the target directories are fit for a restore. Only reads (RESTORE1).

use super::{MARKER, local, place::Places};
use crate::{
    backup::LOST_AND_FOUND,
    error::{Error, Failure},
};
use klio_pg::ByteSize;
use klio_storage::{catalog::BackupRecord, disk::durable};
use rustix::fs::Access;
use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// The free space that one file system needs and has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Room {
    /// A directory of the restore on this file system.
    pub place: PathBuf,
    /// Bytes that the restore needs in addition to what the directories use now.
    pub needed: u64,
    /// Bytes that this user can still write.
    pub free: u64,
}

/// Hint for missing permissions.
const OWNER: &str = "run klio as the user who runs PostgreSQL, or create the directory and make that user its owner";

fn no(message: String, hint: &str) -> Error {
    Error::new(Failure::Local, message).hint(hint)
}

/// Checks all places (RESTORE1, RESTORE3). With `delta` they may hold an older state of the same cluster.
///
/// # Errors
/// The first check that failed.
pub fn places(places: &Places, record: &BackupRecord, delta: bool) -> Result<(), Error> {
    directory(&places.data, record, delta)?;
    if delta {
        own_tablespaces(places)?;
    } else {
        places.tablespaces.values().try_for_each(|place| empty(place))?;
        places.new_places().try_for_each(|(_, place)| new_place(place))?;
    }
    places.all().try_for_each(|place| {
        in_no_other(place, &places.data)?;
        writable(place)
    })
}

/// Checks the data directory. This is the part of [`places`] that does not need the WAL on the way to the target,
/// which may take long to read.
///
/// # Errors
/// The first check that failed.
pub fn directory(data: &Path, record: &BackupRecord, delta: bool) -> Result<(), Error> {
    in_no_other(data, data)?;
    not_running(data)?;
    if delta {
        same_cluster(data, record)?
    } else {
        empty(data)?
    }
    writable(data)
}

/// Refuses a place inside another data directory or its tablespaces: the copy would become part of that PostgreSQL
/// and of its backups, and a later `--delta` would clean it away. `own` is the directory that is restored to.
fn in_no_other(place: &Path, own: &Path) -> Result<(), Error> {
    let directory = existing(place);
    let real = |path: &Path| fs::canonicalize(path).map_err(|error| local("look at", path, &error));
    let real_directory = real(directory)?;
    let own = fs::canonicalize(own).ok();
    let above = real_directory.ancestors().skip(usize::from(directory == place));
    let of = |above: &&Path| Some(*above) != own.as_deref() && is_postgresql(above);
    match above.into_iter().find(of) {
        None => Ok(()),
        Some(other) => Err(no(
            format!(
                "restore to {}: expected a directory of its own, found it inside {}, which is PostgreSQL's",
                place.display(),
                other.display()
            ),
            "choose a directory outside of any data directory and tablespace",
        )),
    }
}

/// Whether this is a data directory, the directory of an unfinished restore, or the directory of a PostgreSQL version
/// in a tablespace (`PG_15_202209061`).
fn is_postgresql(directory: &Path) -> bool {
    let name = directory.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let version = name.strip_prefix("PG_").and_then(|rest| rest.split_once('_'));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    version.is_some_and(|(major, catalog)| number(major) && number(catalog))
        || directory.join("global/pg_control").exists()
        || directory.join(MARKER).exists()
}

/// RESTORE3: refuses a directory with a postmaster.pid. The file of a crashed PostgreSQL cannot be told from that of
/// one that runs in another container.
fn not_running(data: &Path) -> Result<(), Error> {
    let file = data.join("postmaster.pid");
    match fs::read_to_string(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(()),
        Err(error) => Err(local("read", &file, &error).hint(OWNER)),
        Ok(text) => {
            let pid = text.lines().next().unwrap_or_default().trim().to_owned();
            let place = data.display();
            Err(no(
                format!(
                    "restore to {place}: postmaster.pid exists, so PostgreSQL (process {pid}) may run in it"
                ),
                "stop it with pg_ctl; if it crashed and certainly does not run any more, remove postmaster.pid",
            ))
        }
    }
}

/// Whether a directory has content. The temporary marker file of a restore that was killed before its first step was
/// complete does not count.
fn occupied(place: &Path) -> Result<bool, Error> {
    let begun = durable::tmp_path(Path::new(MARKER));
    match fs::read_dir(place) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.map_err(|error| local("look into", place, &error))?;
                let name = entry.file_name();
                // Every mount point of an ext4 file system has it; it is nobody's data.
                if Path::new(&name) != begun && name != LOST_AND_FOUND {
                    return Ok(true);
                }
            }
            Ok(false)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(place) {
            Ok(to) => Err(no(
                format!(
                    "restore to {}: expected a directory, found a link to {}, which does not exist",
                    place.display(),
                    to.display()
                ),
                "create the directory that it leads to, or remove the link",
            )),
            Err(_) => Ok(false),
        },
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            let place = place.display();
            Err(no(format!("restore to {place}: expected a directory, found a file"), ""))
        }
        Err(error) => Err(local("look into", place, &error)),
    }
}

fn empty(place: &Path) -> Result<(), Error> {
    match occupied(place)? {
        false => Ok(()),
        true if place.join(MARKER).exists() => Err(no(
            format!("restore to {}: an unfinished restore is there", place.display()),
            "continue it with --delta, or remove the directory",
        )),
        true => Err(no(
            format!(
                "restore to {}: expected an empty or absent directory, found files in it",
                place.display()
            ),
            "restore elsewhere, for a tablespace with --tablespace-map OLD=NEW, or over an older state of the same cluster with --delta",
        )),
    }
}

/// Checks the place of a tablespace that replay creates. Files there belong to another PostgreSQL, most likely to the
/// original, which may still run.
fn new_place(place: &Path) -> Result<(), Error> {
    empty(place).map_err(|error| {
        let message = format!(
            "replay will create a tablespace at {}, because the original got it after the backup: {}",
            place.display(),
            error.message
        );
        Error { message, ..error }
    })
}

/// `--delta` removes what is not in the backup, so the directory has to be a data directory of this cluster or what
/// an unfinished restore left.
fn same_cluster(data: &Path, record: &BackupRecord) -> Result<(), Error> {
    if data.join(MARKER).exists() || !occupied(data)? {
        return Ok(());
    }
    let place = data.display();
    let bytes = fs::read(data.join("global/pg_control")).unwrap_or_default();
    let Ok(control) = klio_pg::ControlFile::parse(&bytes) else {
        return Err(no(
            format!(
                "restore to {place}: --delta expects a data directory of PostgreSQL, found no global/pg_control in it"
            ),
            "check that this is the right directory: --delta removes what is not in the backup",
        ));
    };
    let found = control.system_identifier.to_string();
    if found != record.system_identifier {
        return Err(no(
            format!(
                "restore to {place}: --delta expects the cluster with system identifier {}, found {found}",
                record.system_identifier
            ),
            "choose another directory: this one belongs to another PostgreSQL",
        ));
    }
    Ok(())
}

/// A restore with `--delta` removes from a tablespace what is not in the backup. So each tablespace must be empty or
/// belong to this data directory: a link in its pg_tblspc leads there, or the marker of the unfinished restore lists
/// it. The recorded location may otherwise be that of the original, which may still run on this machine.
fn own_tablespaces(places: &Places) -> Result<(), Error> {
    let unfinished = fs::read_to_string(places.data.join(MARKER)).unwrap_or_default();
    let links = fs::read_dir(places.data.join("pg_tblspc")).into_iter().flatten().flatten();
    // Compared by location, because a tablespace that was dropped and created again at the same place has another OID.
    let own: Vec<PathBuf> = links.filter_map(|link| fs::canonicalize(link.path()).ok()).collect();
    for (oid, place) in
        places.tablespaces.iter().map(|(o, p)| (*o, p.as_path())).chain(places.new_places())
    {
        let linked = fs::canonicalize(place).is_ok_and(|place| own.contains(&place));
        let said = super::finish::tablespace_line(oid, place);
        if linked || unfinished.lines().any(|line| line == said) {
            continue;
        }
        empty(place).map_err(|error| {
            error.hint(
                "no link in pg_tblspc of the target directory leads there, so it may be another PostgreSQL's: \
                 --tablespace-map OLD=NEW puts the tablespace elsewhere",
            )
        })?;
    }
    Ok(())
}

/// The nearest ancestor that exists.
fn existing(place: &Path) -> &Path {
    place.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn writable(place: &Path) -> Result<(), Error> {
    let directory = existing(place);
    let meta = fs::metadata(directory).map_err(|error| local("look at", directory, &error))?;
    if !meta.is_dir() {
        return Err(no(format!("{}: expected a directory", directory.display()), OWNER));
    }
    rustix::fs::access(directory, Access::WRITE_OK | Access::EXEC_OK)
        .map_err(|error| no(format!("write to {}: {error}", directory.display()), OWNER))
}

/// Checks the free space; `needed` has the additional bytes of each place.
///
/// # Errors
/// The file system that is too small.
pub fn room(needed: &[(PathBuf, u64)]) -> Result<Vec<Room>, Error> {
    let mut by_device: Vec<(u64, Room)> = Vec::new();
    for (place, bytes) in needed {
        let directory = existing(place);
        let look = |error: io::Error| local("look at", directory, &error);
        let device = fs::metadata(directory).map_err(look)?.dev();
        if let Some((_, room)) = by_device.iter_mut().find(|(known, _)| *known == device) {
            room.needed += bytes;
            continue;
        }
        let stat = rustix::fs::statvfs(directory).map_err(|error| look(error.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        by_device.push((device, Room { place: place.clone(), needed: *bytes, free }));
    }
    let all: Vec<Room> = by_device.into_iter().map(|(_, room)| room).collect();
    match all.iter().find(|room| room.needed > room.free) {
        None => Ok(all),
        Some(small) => {
            let size = |bytes| ByteSize::new(bytes).to_string();
            let (needed, free) = (size(small.needed), size(small.free));
            let place = small.place.display();
            Err(no(
                format!("restore to {place}: expected {needed} of free space, found {free}"),
                "recovery needs room for WAL besides that; a tablespace can go elsewhere with --tablespace-map OLD=NEW",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn a_file_in_the_way_is_called_one() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        fs::write(&file, "").unwrap();
        for place in [file.clone(), file.join("below")] {
            let error = empty(&place).unwrap_err();
            assert!(error.message.contains("expected a directory, found a file"), "{error}");
        }
        assert!(empty(&scratch.path().join("none")).is_ok());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_called_one() {
        let scratch = tempfile::tempdir().unwrap();
        let link = scratch.path().join("link");
        std::os::unix::fs::symlink(scratch.path().join("none"), &link).unwrap();
        let error = empty(&link).unwrap_err();
        assert!(error.message.contains("found a link to") && !error.hint.is_empty(), "{error}");
    }

    /// The copy would be part of the other PostgreSQL, and of its backups.
    #[test]
    fn a_restore_never_goes_into_another_data_directory_or_its_tablespaces() {
        let scratch = tempfile::tempdir().unwrap();
        let live = scratch.path().join("live");
        fs::create_dir_all(live.join("global")).unwrap();
        fs::write(live.join("global/pg_control"), "").unwrap();
        fs::create_dir_all(live.join("empty")).unwrap();
        let space = scratch.path().join("space/PG_15_202209061");
        fs::create_dir_all(&space).unwrap();
        let link = scratch.path().join("link");
        std::os::unix::fs::symlink(&live, &link).unwrap();
        for inside in [
            live.join("new"),
            live.join("new/below"),
            live.join("empty"),
            link.join("new"),
            space.join("new"),
        ] {
            let error = in_no_other(&inside, &inside).unwrap_err();
            assert!(error.message.contains("PostgreSQL's"), "{error}");
        }
        // Allowed: `--delta` onto the directory, a place inside the directory itself, and a place beside it.
        for (place, own) in [
            (live.clone(), live.clone()),
            (link.clone(), link),
            (live.join("pg_tblspc/1"), live.clone()),
            (scratch.path().join("new"), scratch.path().join("new")),
        ] {
            assert!(in_no_other(&place, &own).is_ok(), "{}", place.display());
        }
    }

    #[test]
    fn a_new_mount_point_is_empty() {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join(LOST_AND_FOUND)).unwrap();
        assert!(empty(scratch.path()).is_ok());
        fs::write(scratch.path().join("file"), "").unwrap();
        assert!(empty(scratch.path()).is_err());
    }

    /// A restore that was killed before the marker got its final name has not done anything yet.
    #[test]
    fn a_marker_that_never_got_its_name_is_in_nobodys_way() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        let places =
            Places { data: data.clone(), tablespaces: BTreeMap::new(), made: BTreeMap::new() };
        fs::create_dir(&data).unwrap();
        fs::write(durable::tmp_path(&data.join(MARKER)), "klio rest").unwrap();
        assert!(empty(&data).is_ok());
        super::super::finish::begin(&places, "b").unwrap();
        let names: Vec<_> = fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, [MARKER]);
        assert!(empty(&data).is_err());
    }

    /// A delta restore on the machine of the running original must not clean the original's tablespaces.
    #[test]
    fn with_delta_a_tablespace_is_empty_or_of_the_directory_itself() {
        let scratch = tempfile::tempdir().unwrap();
        let (data, place) = (scratch.path().join("new"), scratch.path().join("live"));
        fs::create_dir_all(place.join("PG_15_202209061/5")).unwrap();
        fs::write(place.join("PG_15_202209061/5/16384"), "rows").unwrap();
        let tablespaces = BTreeMap::from([(7, place.clone())]);
        let places = Places { data: data.clone(), tablespaces, made: BTreeMap::new() };
        assert!(own_tablespaces(&places).is_err());
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        assert!(own_tablespaces(&places).is_err());
        // An unfinished restore may continue in the tablespaces that its marker lists.
        super::super::finish::begin(&places, "b").unwrap();
        assert!(own_tablespaces(&places).is_ok());
        fs::remove_file(data.join(MARKER)).unwrap();
        assert!(own_tablespaces(&places).is_err());
        std::os::unix::fs::symlink(&place, data.join("pg_tblspc/7")).unwrap();
        assert!(own_tablespaces(&places).is_ok());
        // The tablespace was dropped and created again at the same place; the randomised restore test found this case.
        fs::rename(data.join("pg_tblspc/7"), data.join("pg_tblspc/9")).unwrap();
        assert!(own_tablespaces(&places).is_ok());
        let elsewhere = BTreeMap::from([(7, scratch.path().join("none yet"))]);
        let none = BTreeMap::new();
        let elsewhere = Places { data: data.clone(), tablespaces: elsewhere, made: none.clone() };
        assert!(own_tablespaces(&elsewhere).is_ok());
        // A tablespace that replay creates must not lie in a directory that belongs to another PostgreSQL.
        let live = scratch.path().join("other");
        fs::create_dir_all(live.join("PG_15_202209061")).unwrap();
        let made = BTreeMap::from([(11, live)]);
        assert!(own_tablespaces(&Places { data, tablespaces: none, made }).is_err());
    }
}
