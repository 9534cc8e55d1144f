//! How far the data of a cluster's repository was read: `<cluster>/coverage.json`, tier 1 only, in the shape of `crate::record`.
//!
//! Verification reads a share of the packs at a time, in the order of their names, and goes on where the last run ended. When it
//! has come round, all data was read since that pass began: so everything is read in turn, and how long ago is known. A
//! pack that a client sends meanwhile was opened when it came. Losing the file costs knowledge: the next pass begins anew.

use crate::{
    Error,
    disk::{Disk, durable},
    layout::ClusterName,
    record,
    tier2::Sha256Sum,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// How far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// The repository was made by a server that opens what clients send.
    #[serde(default)]
    pub opened_from_the_start: bool,
    /// The pack that was read last in the running pass.
    #[serde(default)]
    pub last_read: Option<Sha256Sum>,
    /// When the running pass began, Unix seconds.
    #[serde(default)]
    pub pass_began_unix: Option<f64>,
    /// When the last pass that came round began: everything was read since.
    #[serde(default)]
    pub all_read_since_unix: Option<f64>,
}

/// What a run read of the packs, in the order of their names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advance {
    /// It began with the first pack.
    pub began: bool,
    /// It came to the last pack.
    pub came_round: bool,
    /// The pack that it read last.
    pub last_read: Option<Sha256Sum>,
}

impl Coverage {
    /// Whether every pack was opened at least once.
    pub const fn all_opened(&self) -> bool {
        self.opened_from_the_start || self.all_read_since_unix.is_some()
    }

    /// After a run that began at a moment.
    #[must_use]
    pub fn after(self, run: &Advance, run_began_unix: f64) -> Self {
        let pass = if run.began { Some(run_began_unix) } else { self.pass_began_unix };
        if run.came_round {
            // A pass whose beginning nobody knows proves nothing.
            let all_read_since_unix = pass.or(self.all_read_since_unix);
            return Self { last_read: None, pass_began_unix: None, all_read_since_unix, ..self };
        }
        let last_read = run.last_read.or(self.last_read);
        Self { last_read, pass_began_unix: pass, ..self }
    }
}

fn path(root: &Path, cluster: &ClusterName) -> PathBuf {
    root.join(cluster.as_str()).join("coverage.json")
}

/// What is known; nothing where there is no file. `root` is tier 1's.
///
/// # Errors
/// `Corrupt`, or as the disk fails.
pub fn load(disk: &dyn Disk, root: &Path, cluster: &ClusterName) -> Result<Coverage, Error> {
    record::load(disk, &path(root, cluster)).map(Option::unwrap_or_default)
}

/// Replaces it, durably.
///
/// # Errors
/// As the disk fails; then the old one is still there.
pub fn store(
    disk: &dyn Disk,
    root: &Path,
    cluster: &ClusterName,
    coverage: &Coverage,
) -> Result<(), Error> {
    durable::create_dir(disk, &root.join(cluster.as_str()))?;
    record::store(disk, &path(root, cluster), coverage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::SimDisk;

    fn run(began: bool, came_round: bool, last: &str) -> Advance {
        Advance { began, came_round, last_read: Some(Sha256Sum::of(last.as_bytes())) }
    }

    #[test]
    fn all_is_read_since_the_pass_began_that_came_round() {
        let known = Coverage::default().after(&run(true, false, "a"), 10.0);
        assert_eq!((known.pass_began_unix, known.all_read_since_unix), (Some(10.0), None));
        assert!(!known.all_opened() && known.last_read == Some(Sha256Sum::of(b"a")));
        let known = known.after(&run(false, false, "b"), 20.0);
        assert_eq!((known.pass_began_unix, known.all_opened()), (Some(10.0), false));
        let known = known.after(&run(false, true, "c"), 30.0);
        assert_eq!((known.all_read_since_unix, known.last_read), (Some(10.0), None));
        assert!(known.all_opened());
        // The next pass: what was proven stays proven until it has come round, too.
        let known = known.after(&run(true, false, "a"), 40.0);
        assert_eq!((known.pass_began_unix, known.all_read_since_unix), (Some(40.0), Some(10.0)));
        let known = known.after(&run(true, true, "z"), 50.0);
        assert_eq!(known.all_read_since_unix, Some(50.0));
        // A run that had nothing to read of the packs moves nothing.
        assert_eq!(known.after(&Advance::default(), 60.0), known);
    }

    #[test]
    fn the_rest_of_a_pass_of_which_nobody_knows_the_beginning_proves_nothing() {
        let known = Coverage::default().after(&run(false, true, "z"), 10.0);
        assert_eq!(known, Coverage::default());
    }

    #[test]
    fn it_is_kept_and_fields_of_other_versions_do_no_harm() {
        let (disk, root) = (SimDisk::new(1), Path::new("/tier1"));
        disk.create_dir(root).unwrap();
        let cluster: ClusterName = "pg".parse().unwrap();
        assert_eq!(load(&disk, root, &cluster).unwrap(), Coverage::default());
        let known = Coverage { opened_from_the_start: true, ..Coverage::default() };
        store(&disk, root, &cluster, &known).unwrap();
        assert_eq!(load(&disk, root, &cluster).unwrap(), known);
        let older: Coverage = serde_json::from_str("{\"more\":1}").unwrap();
        assert_eq!(older, Coverage::default());
    }
}
