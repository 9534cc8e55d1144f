//! The small JSON files of a cluster: `cluster.json`, `gaps.json` and `timelines.json`.
//!
//! In the format of `crate::record`. Any JSON tool can read them. They are replaced as a whole, durably, and never
//! modified in place.

use super::types::{Gap, Pinned};
use crate::{
    Error, Kind, Op,
    disk::Disk,
    record::{self, Unknown},
    timelines::{Mark, Timelines},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::path::Path;

/// `cluster.json`. The system identifier is a string, because many JSON readers round large numbers.
#[derive(Serialize, Deserialize)]
struct PinnedRecord {
    system_identifier: String,
    segment_size: u32,
    postgres_version: u32,
    #[serde(flatten)]
    unknown: Unknown,
}

const HINT: &str =
    "restore the file from tier 2 or a copy; nothing is written for this cluster until then";

fn corrupt(path: &Path, detail: impl std::fmt::Display) -> Error {
    Error::new(Kind::Corrupt, Op::Read, path.display(), detail).hint(HINT)
}

fn load<T: DeserializeOwned>(disk: &dyn Disk, path: &Path) -> Result<Option<T>, Error> {
    record::load(disk, path).map_err(|e| if e.kind == Kind::Corrupt { e.hint(HINT) } else { e })
}

impl PinnedRecord {
    fn pinned(self, path: &Path) -> Result<Pinned, Error> {
        let system_identifier = self.system_identifier.parse().map_err(|e| corrupt(path, e))?;
        let segment_size = self.segment_size.try_into().map_err(|e| corrupt(path, e))?;
        Ok(Pinned { system_identifier, segment_size, postgres_version: self.postgres_version })
    }
}

impl Pinned {
    /// Parses the bytes of a `cluster.json` from either tier. `place` is for the error.
    ///
    /// # Errors
    /// `Corrupt`.
    pub fn decode(bytes: &[u8], place: &str) -> Result<Self, Error> {
        record::decode::<PinnedRecord>(bytes, place)?.pinned(Path::new(place))
    }
}

/// Reads `cluster.json`; `None` when there is none.
pub(super) fn load_pinned(disk: &dyn Disk, path: &Path) -> Result<Option<Pinned>, Error> {
    load::<PinnedRecord>(disk, path)?.map(|body| body.pinned(path)).transpose()
}

/// Writes `cluster.json`, preserving fields that a newer version wrote.
pub(crate) fn store_pinned(disk: &dyn Disk, path: &Path, pinned: &Pinned) -> Result<(), Error> {
    let before = load::<PinnedRecord>(disk, path)?;
    let body = PinnedRecord {
        system_identifier: pinned.system_identifier.to_string(),
        segment_size: pinned.segment_size.as_u32(),
        postgres_version: pinned.postgres_version,
        unknown: before.map(|before| before.unknown).unwrap_or_default(),
    };
    record::store(disk, path, &body)
}

/// Reads `gaps.json`; empty when there is none.
pub(super) fn load_gaps(disk: &dyn Disk, path: &Path) -> Result<Vec<Gap>, Error> {
    Ok(load(disk, path)?.unwrap_or_default())
}

/// Writes `gaps.json`.
pub(super) fn store_gaps(disk: &dyn Disk, path: &Path, gaps: &Vec<Gap>) -> Result<(), Error> {
    record::store(disk, path, gaps)
}

/// Reads `timelines.json`; empty when there is none.
pub(super) fn load_timelines(disk: &dyn Disk, path: &Path) -> Result<Timelines, Error> {
    Ok(Timelines::new(load::<Vec<Mark>>(disk, path)?.unwrap_or_default()))
}

/// Writes `timelines.json`.
pub(super) fn store_timelines(
    disk: &dyn Disk,
    path: &Path,
    marks: &Timelines,
) -> Result<(), Error> {
    record::store(disk, path, &marks.marks())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::{SimDisk, durable, read_small},
        record::LIMIT_BYTES,
    };
    use klio_pg::{Lsn, SegmentSize, TimelineId};

    fn pinned() -> Pinned {
        Pinned {
            system_identifier: u64::MAX - 3,
            segment_size: SegmentSize::new(16 << 20).unwrap(),
            postgres_version: 170_002,
        }
    }

    #[test]
    fn what_was_pinned_round_trips() {
        let disk = SimDisk::new(1);
        let path = Path::new("/cluster.json");
        assert_eq!(load_pinned(&disk, path).unwrap(), None);
        store_pinned(&disk, path, &pinned()).unwrap();
        assert_eq!(load_pinned(&disk, path).unwrap(), Some(pinned()));
    }

    #[test]
    fn gaps_round_trip() {
        let disk = SimDisk::new(1);
        let path = Path::new("/gaps.json");
        let gaps = vec![Gap {
            timeline: TimelineId::new(2).unwrap(),
            from: Lsn::new(77),
            to: Lsn::new(1 << 20),
            reason: "slot \"x\" was\nlost".into(),
            recorded_unix: 1_700_000_000.123_456_7,
            unknown: Unknown::default(),
        }];
        store_gaps(&disk, path, &gaps).unwrap();
        assert_eq!(load_gaps(&disk, path).unwrap(), gaps);
    }

    /// The gap test found this: without float_roundtrip some times change by one bit when read, and the record
    /// looks corrupt.
    #[test]
    fn every_time_of_a_gap_round_trips() {
        let disk = SimDisk::new(1);
        let path = Path::new("/gaps.json");
        for n in 0..500_u32 {
            let gaps = vec![Gap {
                timeline: TimelineId::new(1).unwrap(),
                from: Lsn::new(77),
                to: Lsn::new(1 << 20),
                reason: String::new(),
                recorded_unix: 1_795_236_165.952_355 + f64::from(n) * 0.001_234_567_89,
                unknown: Unknown::default(),
            }];
            store_gaps(&disk, path, &gaps).unwrap();
            assert_eq!(load_gaps(&disk, path).unwrap(), gaps);
        }
    }

    #[test]
    fn a_change_and_a_cut_are_found() {
        let disk = SimDisk::new(1);
        let path = Path::new("/cluster.json");
        store_pinned(&disk, path, &pinned()).unwrap();
        let good = read_small(&disk, path, LIMIT_BYTES).unwrap();
        let text = String::from_utf8(good.clone()).unwrap();
        for (bad, says) in [
            (text.replace("170002", "170003"), "checksum"),
            (text[..text.len() / 2].to_owned(), "EOF"),
            (String::new(), "EOF"),
        ] {
            durable::overwrite(&disk, path, bad.as_bytes()).unwrap();
            let error = load_pinned(&disk, path).unwrap_err();
            assert_eq!(error.kind, Kind::Corrupt);
            assert!(error.to_string().contains(says), "{error}");
        }
    }
}
