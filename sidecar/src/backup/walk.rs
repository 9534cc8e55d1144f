//! Lists the data directory as a snapshot shows it: `data/...` and `tablespaces/<oid>/...`.
//!
//! - A directory is read only when its turn comes, so memory grows with the largest directory, not with the cluster.
//! - A file that vanishes between listing and reading was dropped meanwhile; WAL replay drops it again.
//! - Settings and other small files are read whole when they are listed. PostgreSQL replaces such files, and the size
//!   of the old one with bytes of the new one would be inconsistent.
//! - Relations are read later, by several threads. Data appended to them meanwhile is cut off and comes from WAL.
//! - A symlink that is not a tablespace's is stored as a symlink, with a warning that its target is not in the
//!   backup.
//! - A file that cannot be read ends the backup with an error that names it: a backup without the file would look
//!   complete.

use super::{
    exclude::{self, IN_WAL, Verdict},
    pages::{PageCheck, PageReader},
};
use klio_pg::{ControlFile, Fork, RelationFile};
use klio_storage::{
    Error, Kind, Op,
    repository::{EntryKind, Source, SourceEntry},
};
use rustix::fs::Advice;
use std::{
    collections::HashSet,
    ffi::OsString,
    fs::{File, Metadata},
    io::{self, Cursor, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio_util::sync::CancellationToken;

/// Larger files that are not relations are logs and the like, which only grow and need not be read at once.
const SMALL_BYTES: u64 = 64 << 10;
/// Creating a table takes a few milliseconds, on a busy machine about a hundred.
const INIT_FORK_COMES_WITHIN: Duration = Duration::from_millis(500);

/// A tablespace other than pg_default and pg_global.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: u32,
    /// The target of the symlink `pg_tblspc/<oid>`.
    pub location: PathBuf,
}

/// What to back up.
#[derive(Debug, Clone)]
pub struct Tree {
    pub data: PathBuf,
    pub tablespaces: Vec<Tablespace>,
    /// The name of this PostgreSQL version's directory in each tablespace.
    pub directory: String,
    /// Checks pages; `None` if the cluster has no checksums.
    pub check: Option<Arc<PageCheck>>,
    /// Cancelled to end the listing.
    pub stop: CancellationToken,
}

/// A directory whose names are being visited.
struct Open {
    /// Its path on disk.
    path: PathBuf,
    /// Its path in the snapshot.
    shown: PathBuf,
    /// Its path in PostgreSQL's terms, relative to the data directory; used in the record of bad pages.
    named: PathBuf,
    place: Place,
    names: std::vec::IntoIter<OsString>,
    unlogged: HashSet<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The data directory itself.
    Root,
    /// pg_tblspc.
    Links,
    /// `base`, and this PostgreSQL's directory in a tablespace; each entry is a database.
    Databases,
    /// `global`.
    Global,
    /// The directory of a database: contains relations, including temporary and unlogged ones.
    Database,
    /// Anything else.
    Other,
}

/// Iterates over a [`Tree`].
struct Walk {
    tree: Tree,
    /// Tablespaces inside the data directory; they are visited as tablespaces only.
    inside: Vec<PathBuf>,
    open: Vec<Open>,
    /// Entries to return before the remaining names of the innermost directory.
    ready: std::collections::VecDeque<SourceEntry>,
    tablespaces: std::vec::IntoIter<Tablespace>,
    begun: bool,
    /// Only sizes are wanted: no file is opened.
    light: bool,
    shown_tablespaces: bool,
}

impl Tree {
    /// Number of files and bytes, for the progress display. An estimate, because PostgreSQL keeps writing.
    pub fn measure(&self) -> Result<(u64, u64), Error> {
        let mut total = (0, 0);
        let light = Self { check: None, ..self.clone() };
        for entry in Walk::new(light, true) {
            if let EntryKind::File { size, .. } = entry?.kind {
                total.0 += 1;
                total.1 += size;
            }
        }
        Ok(total)
    }
}

impl Source for Tree {
    fn listing_began(&self) -> SystemTime {
        SystemTime::now()
    }

    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        Box::new(Walk::new(self.clone(), false).fuse())
    }
}

/// A list of entries that were read before.
pub struct Listed(std::sync::Mutex<Vec<SourceEntry>>);

impl Listed {
    /// `entries` must be sorted by path.
    pub fn new(entries: Vec<SourceEntry>) -> Self {
        Self(std::sync::Mutex::new(entries))
    }
}

impl Source for Listed {
    fn listing_began(&self) -> SystemTime {
        // The epoch, so that every file looks changed since the last backup: none is ever considered unchanged.
        UNIX_EPOCH
    }

    fn entries(&self) -> Box<dyn Iterator<Item = Result<SourceEntry, Error>> + Send> {
        let entries =
            std::mem::take(&mut *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        Box::new(entries.into_iter().map(Ok))
    }
}

/// `data` and `data/global` with `pg_control`, which is backed up after everything else.
///
/// # Errors
/// pg_control or its directories cannot be read.
pub fn control_file(data: &Path) -> Result<Listed, Error> {
    let path = data.join(ControlFile::PATH);
    let (bytes, meta) = read_control(data)?;
    let entries = vec![
        directory(&stat(data)?, "data".into()),
        directory(&stat(&data.join("global"))?, "data/global".into()),
        in_memory(&meta, Path::new("data").join(ControlFile::PATH), bytes),
    ];
    tracing::debug!(path = %path.display(), "read the control file");
    Ok(Listed::new(entries))
}

/// Files with content from pg_backup_stop; their owner and permissions follow those of the data directory.
///
/// # Errors
/// The data directory cannot be examined.
pub fn label_files(data: &Path, files: Vec<(&str, String)>) -> Result<Listed, Error> {
    let meta = stat(data)?;
    let mode = 0o600 | (meta.mode() & 0o040);
    let files = files.into_iter().map(|(name, content)| {
        let path = Path::new("data").join(name);
        SourceEntry {
            mode,
            mtime: SystemTime::now(),
            ..in_memory(&meta, path, content.into_bytes())
        }
    });
    Ok(Listed::new([directory(&meta, "data".into())].into_iter().chain(files).collect()))
}

/// Reads pg_control; tries again while a concurrent write makes its checksum wrong.
///
/// # Errors
/// It cannot be read, or its checksum stays wrong.
pub fn read_control(data: &Path) -> Result<(Vec<u8>, Metadata), Error> {
    let path = data.join(ControlFile::PATH);
    let read = || -> io::Result<(Vec<u8>, Metadata)> {
        let mut file = File::open(&path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok((bytes, file.metadata()?))
    };
    let mut tries = 0;
    loop {
        let (bytes, meta) = read().map_err(|e| Error::io(Op::Read, &path, e))?;
        match ControlFile::parse(&bytes) {
            Ok(_) => return Ok((bytes, meta)),
            Err(klio_pg::ControlError::Torn { .. }) if tries < 20 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(Error::new(Kind::Corrupt, Op::Read, path.display(), error)),
        }
    }
}

fn stat(path: &Path) -> Result<Metadata, Error> {
    std::fs::metadata(path).map_err(|e| Error::io(Op::Read, path, e))
}

fn unix_time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let base = match u64::try_from(seconds) {
        Ok(seconds) => UNIX_EPOCH + Duration::from_secs(seconds),
        Err(_) => UNIX_EPOCH - Duration::from_secs(seconds.unsigned_abs()),
    };
    base + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(0))
}

fn entry(meta: &Metadata, path: PathBuf, kind: EntryKind) -> SourceEntry {
    SourceEntry {
        path,
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: unix_time(meta.mtime(), meta.mtime_nsec()),
        ctime: unix_time(meta.ctime(), meta.ctime_nsec()),
    }
}

fn directory(meta: &Metadata, path: PathBuf) -> SourceEntry {
    entry(meta, path, EntryKind::Dir)
}

fn in_memory(meta: &Metadata, path: PathBuf, bytes: Vec<u8>) -> SourceEntry {
    let size = bytes.len() as u64;
    let open = Box::new(move || Ok(Box::new(Cursor::new(bytes)) as Box<dyn Read + Send>));
    entry(meta, path, EntryKind::File { size, open })
}

impl Walk {
    fn new(tree: Tree, light: bool) -> Self {
        let resolve = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let root = resolve(&tree.data);
        let inside = tree
            .tablespaces
            .iter()
            .map(|t| resolve(&tree.data.join("pg_tblspc").join(&t.location)))
            .filter_map(|path| path.strip_prefix(&root).ok().map(Path::to_owned))
            .collect();
        let mut tablespaces = tree.tablespaces.clone();
        tablespaces.sort_by_key(|t| t.oid.to_string());
        Self {
            tree,
            inside,
            open: Vec::new(),
            ready: std::collections::VecDeque::new(),
            tablespaces: tablespaces.into_iter(),
            begun: false,
            light,
            shown_tablespaces: false,
        }
    }

    /// Pushes a directory onto the stack, and its own entry before those of its content.
    fn enter(
        &mut self,
        path: PathBuf,
        shown: PathBuf,
        named: PathBuf,
        place: Place,
    ) -> Result<(), Error> {
        let Some(meta) = present(std::fs::metadata(&path), &path)? else { return Ok(()) };
        let Some(listing) = present(std::fs::read_dir(&path), &path)? else { return Ok(()) };
        let mut names = Vec::new();
        for entry in listing {
            let entry = entry.map_err(|e| Error::io(Op::List, &path, e))?;
            names.push(entry.file_name());
        }
        names.sort_unstable();
        let unlogged = match place {
            Place::Database => exclude::unlogged(names.iter().filter_map(|n| n.to_str())),
            _ => HashSet::new(),
        };
        self.ready.push_back(directory(&meta, shown.clone()));
        self.open.push(Open { path, shown, named, place, names: names.into_iter(), unlogged });
        Ok(())
    }

    fn step(&mut self) -> Result<Option<SourceEntry>, Error> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(Some(entry));
            }
            if self.tree.stop.is_cancelled() {
                return Err(Error::new(
                    Kind::Transient,
                    Op::List,
                    self.tree.data.display(),
                    "stopped",
                ));
            }
            if !self.begun {
                self.begun = true;
                let data = self.tree.data.clone();
                self.enter(data, "data".into(), PathBuf::new(), Place::Root)?;
                continue;
            }
            let Some(directory) = self.open.last_mut() else {
                if !self.next_tablespace()? {
                    return Ok(None);
                }
                continue;
            };
            match directory.names.next() {
                None => drop(self.open.pop()),
                Some(name) => self.name(&name)?,
            }
        }
    }

    /// Enters the next tablespace; `false` when there is none.
    fn next_tablespace(&mut self) -> Result<bool, Error> {
        let Some(tablespace) = self.tablespaces.next() else { return Ok(false) };
        if !std::mem::replace(&mut self.shown_tablespaces, true) {
            let meta = stat(&self.tree.data)?;
            self.ready.push_back(directory(&meta, "tablespaces".into()));
        }
        // A relative link is relative to pg_tblspc.
        let link = self.tree.data.join("pg_tblspc");
        let path = link.join(&tablespace.location);
        let shown = Path::new("tablespaces").join(tablespace.oid.to_string());
        let Some(meta) = present(std::fs::metadata(&path), &path)? else { return Ok(true) };
        self.ready.push_back(directory(&meta, shown.clone()));
        let named =
            Path::new("pg_tblspc").join(tablespace.oid.to_string()).join(&self.tree.directory);
        let directory = self.tree.directory.clone();
        self.enter(path.join(&directory), shown.join(&directory), named, Place::Databases)?;
        Ok(true)
    }

    /// Handles one name of the innermost directory.
    fn name(&mut self, name: &OsString) -> Result<(), Error> {
        let Some(parent) = self.open.last() else { return Ok(()) };
        let (path, shown, named) =
            (parent.path.join(name), parent.shown.join(name), parent.named.join(name));
        let place = parent.place;
        // PostgreSQL's own names are ASCII; a file with any other name is not PostgreSQL's and is included.
        let text = name.to_str().unwrap_or_default();
        let relation = match place {
            Place::Global | Place::Database => RelationFile::parse(text),
            _ => None,
        };
        let verdict = match (place, relation) {
            (Place::Root, _) => exclude::at_root(text),
            (_, Some(file)) => exclude::relation(file, &parent.unlogged),
            _ => exclude::anywhere(text),
        };
        let control = place == Place::Global && text == "pg_control";
        if verdict == Verdict::Leave || control {
            return Ok(());
        }
        let Some(meta) = present(std::fs::symlink_metadata(&path), &path)? else { return Ok(()) };
        match verdict {
            Verdict::Hollow => self.hollow(&path, shown),
            Verdict::Wal => self.wal(&path, shown),
            Verdict::Tablespaces => self.enter(path, shown, named, Place::Links),
            _ if meta.is_dir() => self.descend(path, shown, named, place, text),
            _ if meta.is_symlink() => self.link(&meta, &path, shown, place),
            _ if meta.is_file() => self.file(&meta, path, shown, &named, relation),
            _ => {
                warn_special(&meta, &path);
                Ok(())
            }
        }
    }

    /// A directory without its content; it may also be a symlink to a directory.
    fn hollow(&mut self, path: &Path, shown: PathBuf) -> Result<(), Error> {
        if let Some(meta) = present(std::fs::metadata(path), path)? {
            self.ready.push_back(directory(&meta, shown));
        }
        Ok(())
    }

    fn wal(&mut self, path: &Path, shown: PathBuf) -> Result<(), Error> {
        self.hollow(path, shown.clone())?;
        IN_WAL.into_iter().try_for_each(|name| self.hollow(&path.join(name), shown.join(name)))
    }

    fn descend(
        &mut self,
        path: PathBuf,
        shown: PathBuf,
        named: PathBuf,
        place: Place,
        name: &str,
    ) -> Result<(), Error> {
        if self.inside.contains(&named) {
            return self.hollow(&path, shown);
        }
        let place = match (place, name) {
            (Place::Root, "base") => Place::Databases,
            (Place::Root, "global") => Place::Global,
            (Place::Databases, _) => Place::Database,
            // A directory in place of a symlink: allow_in_place_tablespaces.
            (Place::Links, _) => Place::Other,
            (Place::Other, _) if name == self.tree.directory => Place::Databases,
            _ => Place::Other,
        };
        self.enter(path, shown, named, place)
    }

    fn link(
        &mut self,
        meta: &Metadata,
        path: &Path,
        shown: PathBuf,
        place: Place,
    ) -> Result<(), Error> {
        if place == Place::Links {
            // Its content is in `tablespaces/<oid>`, and tablespace_map records its location.
            return Ok(());
        }
        let Some(target) = present(std::fs::read_link(path), path)? else { return Ok(()) };
        tracing::warn!(
            link = %path.display(),
            target = %target.display(),
            "a symlink in the data directory is backed up as a symlink; its target is not in the backup"
        );
        self.ready.push_back(entry(meta, shown, EntryKind::Symlink(target)));
        Ok(())
    }

    fn file(
        &mut self,
        meta: &Metadata,
        path: PathBuf,
        shown: PathBuf,
        named: &Path,
        relation: Option<RelationFile>,
    ) -> Result<(), Error> {
        let entry = match relation {
            None if !self.light && meta.len() <= SMALL_BYTES => {
                let Some(entry) = present(read_small(&path, shown), &path)? else { return Ok(()) };
                entry
            }
            _ => {
                let name = named.display().to_string();
                let check = relation.and_then(|r| Some((r.segment, self.tree.check.clone()?)));
                let init = relation.and_then(|r| init_fork(&path, r));
                let born = meta.created().or_else(|_| meta.modified()).ok();
                let open = Box::new(move || {
                    not_unlogged(init.as_deref(), born)?;
                    open(&path, name, check)
                });
                entry(meta, shown, EntryKind::File { size: meta.len(), open })
            }
        };
        self.ready.push_back(entry);
        Ok(())
    }
}

impl Iterator for Walk {
    type Item = Result<SourceEntry, Error>;
    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

/// Reads a file that PostgreSQL replaces as a whole: content and times come from the same open file.
fn read_small(path: &Path, shown: PathBuf) -> io::Result<SourceEntry> {
    let mut file = File::open(path)?;
    let meta = file.metadata()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(in_memory(&meta, shown, bytes))
}

/// The path that the init fork of this relation has if the relation is unlogged. `None` for the init fork itself.
fn init_fork(path: &Path, relation: RelationFile) -> Option<PathBuf> {
    let other = relation.fork != Fork::Init && !relation.temporary;
    other.then(|| path.with_file_name(format!("{}_init", relation.number)))
}

/// PostgreSQL creates the files of a new unlogged relation before its init fork, so the directory may be listed in
/// between. Such a file in a backup would make recovery fail at its end: "could not create file: File exists". So the
/// init fork is looked for again right before the file is read. A file that was just created is given some time
/// first; if the fork exists by then, the file counts as vanished. The init fork of an index is created only when the
/// index is built (`index_build` in catalog/index.c), which may take longer than is reasonable to wait:
/// docs/restore.md says what to do then.
fn not_unlogged(init: Option<&Path>, born: Option<SystemTime>) -> io::Result<()> {
    let Some(init) = init else { return Ok(()) };
    let age = born.and_then(|born| born.elapsed().ok());
    if let Some(rest) = age.and_then(|age| INIT_FORK_COMES_WITHIN.checked_sub(age)) {
        std::thread::sleep(rest);
    }
    match init.exists() {
        true => Err(io::ErrorKind::NotFound.into()),
        false => Ok(()),
    }
}

fn open(
    path: &Path,
    name: String,
    check: Option<(u32, Arc<PageCheck>)>,
) -> io::Result<Box<dyn Read + Send>> {
    let file = File::open(path)?;
    // Only advice: reading works without it.
    let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
    Ok(match check {
        Some((segment, check)) => Box::new(PageReader::new(file, name, segment, check)),
        None => Box::new(file),
    })
}

/// `None` for a file that vanished.
fn present<T>(result: io::Result<T>, path: &Path) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(Op::Read, path, error)),
    }
}

fn warn_special(meta: &Metadata, path: &Path) {
    let kind = meta.file_type();
    // PostgreSQL's own socket, if unix_socket_directories contains the data directory.
    if !kind.is_socket() {
        tracing::warn!(path = %path.display(), "leaving out an entry that is neither file, directory nor symlink");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::BTreeMap, fs};

    struct Cluster(tempfile::TempDir);

    impl Cluster {
        fn new(files: &[&str]) -> Self {
            let cluster = Self(tempfile::tempdir().unwrap());
            files.iter().for_each(|file| cluster.put(file));
            cluster
        }
        fn put(&self, file: &str) {
            let path = self.0.path().join(file);
            if file.ends_with('/') {
                return fs::create_dir_all(path).unwrap();
            }
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, file).unwrap();
        }
        fn tree(&self, tablespaces: &[(u32, PathBuf)]) -> Tree {
            let tablespace = |(oid, location): &(u32, PathBuf)| Tablespace {
                oid: *oid,
                location: location.clone(),
            };
            Tree {
                data: self.0.path().join("pg"),
                tablespaces: tablespaces.iter().map(tablespace).collect(),
                directory: "PG_15_1".into(),
                check: None,
                stop: CancellationToken::new(),
            }
        }
    }

    /// Path and content; `/` for a directory, `-> target` for a symlink.
    fn listed(tree: &Tree) -> BTreeMap<String, String> {
        let mut previous = PathBuf::new();
        let mut all = BTreeMap::new();
        for entry in tree.entries() {
            let entry = entry.unwrap();
            assert!(entry.path > previous, "{:?} after {previous:?}", entry.path);
            previous.clone_from(&entry.path);
            let content = match entry.kind {
                EntryKind::Dir => "/".to_owned(),
                EntryKind::Symlink(target) => format!("-> {}", target.display()),
                EntryKind::File { size, open } => {
                    let mut text = String::new();
                    open().unwrap().read_to_string(&mut text).unwrap();
                    assert_eq!(text.len() as u64, size);
                    text
                }
            };
            all.insert(previous.display().to_string(), content);
        }
        all
    }

    #[test]
    fn directories_stay_and_what_does_not_belong_is_left_out() {
        let cluster = Cluster::new(&[
            "pg/PG_VERSION",
            "pg/base/5/1259",
            "pg/base/5/1259.1",
            "pg/base/5/16384",
            "pg/base/5/16384_init",
            "pg/base/5/t3_99",
            "pg/base/5/pg_internal.init",
            "pg/base/pgsql_tmp/pgsql_tmp1.0",
            "pg/global/pg_control",
            "pg/global/1262",
            "pg/pg_replslot/klio/state",
            "pg/pg_wal/000000010000000000000001",
            "pg/pg_wal/archive_status/x.done",
            "pg/postmaster.pid",
            "pg/standby.signal",
            "pg/pg_tblspc/",
        ]);
        let listed = listed(&cluster.tree(&[]));
        let names: Vec<&str> = listed.keys().map(String::as_str).collect();
        let expected = [
            "data",
            "data/PG_VERSION",
            "data/base",
            "data/base/5",
            "data/base/5/1259",
            "data/base/5/1259.1",
            "data/base/5/16384_init",
            "data/global",
            "data/global/1262",
            "data/pg_replslot",
            "data/pg_tblspc",
            "data/pg_wal",
            "data/pg_wal/archive_status",
        ];
        assert_eq!(names, expected);
        assert_eq!(listed["data/base/5/1259.1"], "pg/base/5/1259.1");
    }

    #[test]
    fn tablespaces_come_after_the_data_directory_wherever_they_lie() {
        let cluster = Cluster::new(&[
            "pg/base/",
            "pg/inner/PG_15_1/5/20",
            "pg/pg_tblspc/",
            "outer/PG_15_1/5/30",
            "outer/PG_14_1/5/30",
            "outer/PG_15_1/5/t1_31",
        ]);
        let root = cluster.0.path();
        for (oid, target) in [("9", "pg/inner"), ("10", "outer")] {
            std::os::unix::fs::symlink(root.join(target), root.join("pg/pg_tblspc").join(oid))
                .unwrap();
        }
        let tablespaces = [(9, root.join("pg/inner")), (10, root.join("outer"))];
        let listed = listed(&cluster.tree(&tablespaces));
        let names: Vec<&str> = listed.keys().map(String::as_str).collect();
        let expected = [
            "data",
            "data/base",
            "data/inner",
            "data/pg_tblspc",
            "tablespaces",
            "tablespaces/10",
            "tablespaces/10/PG_15_1",
            "tablespaces/10/PG_15_1/5",
            "tablespaces/10/PG_15_1/5/30",
            "tablespaces/9",
            "tablespaces/9/PG_15_1",
            "tablespaces/9/PG_15_1/5",
            "tablespaces/9/PG_15_1/5/20",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn a_tablespace_in_place_of_a_link_is_part_of_the_data_directory() {
        let cluster =
            Cluster::new(&["pg/pg_tblspc/77/PG_15_1/5/40", "pg/pg_tblspc/77/PG_15_1/5/t1_2"]);
        let listed = listed(&cluster.tree(&[]));
        assert!(listed.contains_key("data/pg_tblspc/77/PG_15_1/5/40"), "{listed:?}");
        assert!(!listed.contains_key("data/pg_tblspc/77/PG_15_1/5/t1_2"), "{listed:?}");
    }

    #[test]
    fn a_linked_pg_wal_becomes_an_empty_directory_and_other_links_stay() {
        let cluster = Cluster::new(&["wal/000000010000000000000001", "pg/PG_VERSION", "conf"]);
        let root = cluster.0.path();
        std::os::unix::fs::symlink(root.join("wal"), root.join("pg/pg_wal")).unwrap();
        std::os::unix::fs::symlink("../conf", root.join("pg/postgresql.conf")).unwrap();
        let listed = listed(&cluster.tree(&[]));
        assert_eq!(listed["data/pg_wal"], "/");
        assert_eq!(listed["data/postgresql.conf"], "-> ../conf");
        assert_eq!(listed.len(), 4, "{listed:?}");
    }

    #[test]
    fn what_vanished_is_passed_over_and_what_cannot_be_read_is_not() {
        let cluster = Cluster::new(&["pg/base/5/1259"]);
        let tree = cluster.tree(&[]);
        let mut entries = tree.entries();
        assert_eq!(entries.next().unwrap().unwrap().path, Path::new("data"));
        fs::remove_dir_all(cluster.0.path().join("pg/base")).unwrap();
        assert!(entries.next().is_none());
        let gone = Tree { data: "/nowhere/at/all".into(), ..tree };
        assert!(read_control(&gone.data).is_err());
    }

    #[test]
    fn a_stop_ends_the_listing_with_an_error() {
        let cluster = Cluster::new(&["pg/base/5/1259"]);
        let tree = cluster.tree(&[]);
        tree.stop.cancel();
        assert!(tree.entries().any(|e| e.is_err()));
    }

    #[test]
    fn a_relation_that_turns_out_to_be_unlogged_vanishes() {
        let cluster = Cluster::new(&["pg/PG_VERSION", "pg/base/5/20000", "pg/base/5/20001"]);
        let mut opened = BTreeMap::new();
        for entry in cluster.tree(&[]).entries() {
            let entry = entry.unwrap();
            let path = entry.path.display().to_string();
            if path == "data/base/5/20000" {
                cluster.put("pg/base/5/20000_init");
            }
            if let EntryKind::File { open, .. } = entry.kind {
                opened.insert(path, open().map(drop).map_err(|error| error.kind()));
            }
        }
        assert_eq!(opened["data/base/5/20000"], Err(io::ErrorKind::NotFound));
        assert_eq!(opened["data/base/5/20001"], Ok(()));
    }

    #[test]
    fn a_relation_that_has_just_been_made_gets_time_to_show_that_it_is_unlogged() {
        let cluster = Cluster::new(&["pg/PG_VERSION", "pg/base/5/20000"]);
        let [opened] = cluster
            .tree(&[])
            .entries()
            .map(Result::unwrap)
            .filter(|entry| entry.path.ends_with("20000"))
            .map(|entry| {
                let EntryKind::File { open, .. } = entry.kind else { panic!("a file") };
                std::thread::scope(|scope| {
                    let opening = scope.spawn(open);
                    cluster.put("pg/base/5/20000_init");
                    opening.join().unwrap().map(drop).map_err(|error| error.kind())
                })
            })
            .collect::<Vec<_>>()
            .try_into()
            .unwrap();
        assert_eq!(opened, Err(io::ErrorKind::NotFound));
    }

    #[test]
    fn it_is_measured_without_being_read() {
        let cluster = Cluster::new(&["pg/base/5/1259", "pg/PG_VERSION"]);
        let bytes = "pg/base/5/1259".len() + "pg/PG_VERSION".len();
        assert_eq!(cluster.tree(&[]).measure().unwrap(), (2, bytes as u64));
    }
}
