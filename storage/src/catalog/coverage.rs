//! How far the data of a cluster's repository was read by verification: `<cluster>/coverage.json`, tier 1 only, in the
//! format of `crate::record`.
//!
//! Verification reads a share of the packs at a time, in the order of their names, and continues where the last run
//! ended. Once it has reached the last pack, all data was read since that pass began, so all data is read in turn, and
//! it is known how long ago. A pack that arrives from a client meanwhile was opened on arrival. Losing the file only
//! loses this knowledge: the next pass starts over.

use crate::{
    Error,
    disk::{Disk, durable},
    layout::ClusterName,
    record,
    sum::Sha256Sum,
};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The progress of verification.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Coverage {
    /// The server has opened every pack on arrival since the repository was created.
    #[serde(default)]
    pub opened_from_the_start: bool,
    /// The last pack that was read in the current pass.
    #[serde(default)]
    pub last_read: Option<Sha256Sum>,
    /// When the current pass began, Unix seconds.
    #[serde(default)]
    pub pass_began_unix: Option<f64>,
    /// When the last complete pass began, Unix seconds: everything was read since.
    #[serde(default)]
    pub all_read_since_unix: Option<f64>,
}

/// Which packs a run read, in the order of their names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advance {
    /// The run began with the first pack.
    pub began: bool,
    /// The run reached the last pack.
    pub came_round: bool,
    /// The last pack that the run read.
    pub last_read: Option<Sha256Sum>,
}

impl Coverage {
    /// Whether every pack was opened at least once.
    pub const fn all_opened(&self) -> bool {
        self.opened_from_the_start || self.all_read_since_unix.is_some()
    }

    /// The coverage after a run that began at `run_began_unix`.
    #[must_use]
    pub fn after(self, run: &Advance, run_began_unix: f64) -> Self {
        let pass = if run.began { Some(run_began_unix) } else { self.pass_began_unix };
        if run.came_round {
            // A pass whose beginning is unknown proves nothing.
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

/// Reads the file; empty coverage if there is none. `root` is that of tier 1.
///
/// # Errors
/// `Corrupt`, or an I/O error of the disk.
pub fn load(disk: &dyn Disk, root: &Path, cluster: &ClusterName) -> Result<Coverage, Error> {
    record::load(disk, &path(root, cluster)).map(Option::unwrap_or_default)
}

/// Replaces the file, durably.
///
/// # Errors
/// An I/O error of the disk; then the old file is still in place.
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
        // During the next pass the old result stays valid until that pass is complete.
        let known = known.after(&run(true, false, "a"), 40.0);
        assert_eq!((known.pass_began_unix, known.all_read_since_unix), (Some(40.0), Some(10.0)));
        let known = known.after(&run(true, true, "z"), 50.0);
        assert_eq!(known.all_read_since_unix, Some(50.0));
        // A run that had no packs to read changes nothing.
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
