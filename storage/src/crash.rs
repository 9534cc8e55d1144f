//! Named points in the programs, between the steps that promises rest on, at which a test kills the process.
//!
//! [`crash_point!`](crate::crash_point) marks them. They exist only in debug builds with the feature `testing`: anywhere else the
//! macro expands to nothing, so no released program has them (P1).
//!
//! A test names one point in [`VARIABLE`] as `NAME[:PASS]=FILE`. When the program comes to that point for the PASS-th
//! time (the first by default), it creates FILE and ends by SIGKILL, so that no destructor runs and no buffer is
//! flushed. If FILE exists already, nothing happens, so the program can be started again with the same environment.

/// One point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashPoint {
    /// What `crash_point!` and [`VARIABLE`] call it.
    pub name: &'static str,
    /// What has just happened there, and what has not happened yet.
    pub state: &'static str,
}

const fn at(name: &'static str, state: &'static str) -> CrashPoint {
    CrashPoint { name, state }
}

/// Every point, in the order in which data passes them.
pub const POINTS: &[CrashPoint] = &[
    at("wal.appended", "WAL is written to the journal and not synced"),
    at("wal.synced", "WAL is synced and not acknowledged"),
    at("wal.acknowledged", "the acknowledgement is handed to the connection"),
    at("stream.acknowledged", "klio stream has the acknowledgement and has not told PostgreSQL"),
    at(
        "journal.written",
        "the journal of the next segment is synced under its temporary name, or that of the spare it is made from",
    ),
    at("journal.created", "the journal of the next segment has its name and no WAL"),
    at("seal.written", "a finished file is synced under its temporary name"),
    at(
        "seal.renamed",
        "a finished file has its name; the journal that a segment is made from is still there",
    ),
    at("seal.recycled", "the journal of a sealed segment is gone, and nothing is queued"),
    at("queue.published", "the queue has confirmed a job"),
    at("upload.begun", "a job was taken from the queue, and nothing is uploaded"),
    at("wal.uploaded", "WAL is in tier 2, and that is not recorded"),
    at("wal.recorded", "the upload of WAL is recorded, and its job is not acknowledged"),
    at("queue.acknowledged", "the acknowledgement of a job is handed to the connection"),
    at("backup.reserved", "a backup has its name and nothing else"),
    at("backup.started", "PostgreSQL is in backup mode, and nothing is copied"),
    at("backup.copied", "all files are copied, and PostgreSQL is still in backup mode"),
    at("backup.stopped", "PostgreSQL has left backup mode, and the snapshot is not written"),
    at("backup.assembled", "the snapshot is written, and the WAL of the backup may be missing"),
    at("backup.covered", "all WAL of the backup has arrived, and it is not committed"),
    at("backup.committed", "the server has committed the backup, and nobody was told"),
    at("file.written", "a file of the repository is synced under its temporary name"),
    at("file.renamed", "a file of the repository has its name, and its sender was not told"),
    at("commit.checked", "a backup was found complete, and its record is not written"),
    at("commit.written", "the record of a backup is written, and its upload is not queued"),
    at("base.uploaded", "an object of a base backup is in tier 2, and its job is not acknowledged"),
    at("expire.tier2", "the record of an expired backup is gone from tier 2 only"),
    at("expire.tier1", "the record of an expired backup is gone from both tiers, its data is not"),
    at("prune.forgotten", "the snapshots of expired backups are gone, their packs are not"),
    at("prune.removed", "the packs that no backup needs are marked or gone"),
    at("evict.proven", "a pack was proven in tier 2 and is still on tier 1"),
    at("evict.removed", "a pack is gone from tier 1"),
    at("wal.evicted", "a WAL file is gone from tier 1"),
    at("wal.expired", "a WAL file is gone from tier 2"),
    at("key.written", "the new identity file is synced under its temporary name"),
    at("key.replaced", "the identity file has the new identity, and nothing is encrypted for it"),
    at("key.rewrapped", "the keys of one cluster are encrypted again, its WAL is not"),
    at("key.wal", "the WAL of one cluster is encrypted again on tier 1, not in tier 2"),
    at(
        "generation.decided",
        "a decision about a history is on tier 1, and its upload is not queued",
    ),
    at("restore.marked", "the target directory has the marker and no pg_control"),
    at("restore.copied", "the files of the backup are written, the recovery settings are not"),
    at("restore.configured", "the recovery settings are written and not synced"),
    at("restore.synced", "everything is synced, and pg_control is missing"),
    at("restore.controlled", "pg_control is written, and the marker is still there"),
    at("restore.done", "the marker is gone, and nobody was told"),
];

/// The environment variable in which a test names a point.
pub const VARIABLE: &str = "KLIO_TEST_CRASH_AT";

/// The position of a point in [`POINTS`].
///
/// # Panics
/// When there is no such point: at compile time, where `crash_point!` calls it.
#[must_use]
pub const fn index(name: &str) -> usize {
    let mut index = 0;
    while index < POINTS.len() {
        if is_same(POINTS[index].name, name) {
            return index;
        }
        index += 1;
    }
    panic!("crash_point! names a point that is not in POINTS")
}

const fn is_same(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut at = 0;
    while at < one.len() && at < other.len() && one[at] == other[at] {
        at += 1;
    }
    at == one.len() && at == other.len()
}

/// Marks a point of [`POINTS`](crate::crash::POINTS); a name that is not there does not compile.
#[cfg(all(feature = "testing", debug_assertions))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::crash::reached(const { $crate::crash::index($name) })
    };
}

/// Nothing: only a debug build with the feature `testing` has crash points.
#[cfg(not(all(feature = "testing", debug_assertions)))]
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {};
}

#[cfg(all(feature = "testing", debug_assertions))]
pub use armed::reached;

#[cfg(all(feature = "testing", debug_assertions))]
mod armed {
    use super::{POINTS, VARIABLE, index};
    use std::{
        ffi::OsStr,
        fs::OpenOptions,
        os::unix::ffi::OsStrExt,
        path::PathBuf,
        sync::{
            OnceLock,
            atomic::{AtomicU64, Ordering},
        },
    };

    /// The point that a test named.
    struct Armed {
        index: usize,
        passes_left: AtomicU64,
        mark: PathBuf,
    }

    impl Armed {
        fn read() -> Option<Self> {
            let value = std::env::var_os(VARIABLE)?;
            let (point, mark) = value.as_bytes().split_at(
                value.as_bytes().iter().position(|byte| *byte == b'=').expect("NAME[:PASS]=FILE"),
            );
            let point = std::str::from_utf8(point).expect("the name of a crash point");
            let (name, pass) = point.split_once(':').unwrap_or((point, "1"));
            Some(Self {
                index: index(name),
                passes_left: AtomicU64::new(pass.parse().expect("a number of passes")),
                mark: PathBuf::from(OsStr::from_bytes(&mark[1..])),
            })
        }
    }

    /// Ends the process if a test wants it to end here.
    pub fn reached(index: usize) {
        static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
        let Some(armed) = ARMED.get_or_init(Armed::read) else { return };
        if armed.index != index || armed.passes_left.fetch_sub(1, Ordering::Relaxed) != 1 {
            return;
        }
        if OpenOptions::new().write(true).create_new(true).open(&armed.mark).is_err() {
            return;
        }
        eprintln!("crash point {}: this process ends here", POINTS[index].name);
        loop {
            // The signal ends all threads; if it could not be sent, the test would wait in vain, which it reports.
            let _ = rustix::process::kill_process(
                rustix::process::getpid(),
                rustix::process::Signal::KILL,
            );
            std::thread::park();
        }
    }
}
