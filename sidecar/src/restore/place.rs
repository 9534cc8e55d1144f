//! Where each file of a snapshot is restored to: `data/` to the target directory, `tablespaces/<oid>/` to the place
//! of that tablespace.

use super::way::Made;
use crate::error::{Error, Failure};
use klio_pg::{TablespaceEntry, format_tablespace_map};
use klio_storage::catalog::{BackupRecord, TablespaceRecord};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

/// All directories that one restore writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    pub data: PathBuf,
    /// The tablespaces that the backup has, by OID.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// The tablespaces that replay creates and the backup does not have, by OID.
    pub made: BTreeMap<u32, PathBuf>,
}

/// Where the user wants tablespaces (`--tablespace-map`).
#[derive(Debug, Clone, Copy, Default)]
pub struct Maps<'a> {
    /// Pairs of OLD and NEW; OLD is the original location or the OID.
    pub named: &'a [(String, PathBuf)],
    /// The directory below which all other tablespaces go, each in a directory of its own.
    pub beside: Option<&'a Path>,
}

/// What is done with a path of the snapshot.
#[derive(Debug, PartialEq, Eq)]
pub enum Meaning {
    /// It is restored to this path.
    At(PathBuf),
    /// It is pg_control, which is written last (RESTORE2).
    Control,
    /// It is not restored: it is only a directory name inside the snapshot, or the restore writes its own version.
    Nothing,
}

impl Places {
    /// Combines the backup's record, the tablespaces that replay creates, and `--tablespace-map OLD=NEW`.
    ///
    /// # Errors
    /// A map that fits no tablespace, a path that is not absolute, or places of which one lies inside another.
    pub fn new(
        data: PathBuf,
        record: &BackupRecord,
        made: &[Made],
        maps: Maps<'_>,
    ) -> Result<Self, Error> {
        let mut used = vec![false; maps.named.len()];
        let mut place = |oid: u32, location: &Path| {
            let number = oid.to_string();
            let fits = |old: &str| old == number || Path::new(old) == location;
            let map = maps.named.iter().position(|(old, _)| fits(old));
            if let Some(index) = map {
                used[index] = true;
                return maps.named[index].1.clone();
            }
            let beside = maps.beside.map(|directory| directory.join(format!("tablespace-{oid}")));
            beside.unwrap_or_else(|| location.to_owned())
        };
        let recorded = record.tablespaces.iter();
        let tablespaces: BTreeMap<u32, PathBuf> =
            recorded.map(|t| (t.oid, place(t.oid, Path::new(&t.location)))).collect();
        // A tablespace that was created while the backup ran is in both lists.
        let made: BTreeMap<u32, PathBuf> = made
            .iter()
            .map(|made| (made.oid, place(made.oid, &made.location)))
            .filter(|(oid, _)| !tablespaces.contains_key(oid))
            .collect();
        if let Some(unused) = used.iter().position(|used| !used) {
            let known: Vec<&str> = record.tablespaces.iter().map(|t| t.location.as_str()).collect();
            let old = &maps.named[unused].0;
            return Err(config(format!(
                "--tablespace-map {old}: backup {} has no such tablespace, and replay creates none; the backup has: {}",
                record.name,
                if known.is_empty() { "none".to_owned() } else { known.join(", ") }
            )));
        }
        let places = Self { data, tablespaces, made };
        for (n, one) in record.tablespaces.iter().enumerate() {
            // A crash in CREATE TABLESPACE leaves its link behind, so two OIDs may have one location. Two locations,
            // however, must never be mapped to one place.
            let same = |other: &&TablespaceRecord| {
                other.location != one.location
                    && places.tablespaces.get(&other.oid) == places.tablespaces.get(&one.oid)
            };
            if let Some(other) = record.tablespaces.iter().skip(n + 1).find(same) {
                let (a, b) = (&one.location, &other.location);
                return Err(config(format!(
                    "--tablespace-map: {a} and {b} would share one directory"
                )));
            }
        }
        places.check_apart()?;
        Ok(places)
    }

    /// Every directory once; the data directory comes first.
    pub fn all(&self) -> impl Iterator<Item = &Path> {
        let tablespaces: BTreeSet<&Path> = self.linked().map(|(_, place)| place).collect();
        std::iter::once(self.data.as_path()).chain(tablespaces)
    }

    /// Every tablespace that needs a link in `pg_tblspc`, with its place.
    pub fn linked(&self) -> impl Iterator<Item = (u32, &Path)> {
        self.tablespaces.iter().chain(&self.made).map(|(oid, place)| (*oid, place.as_path()))
    }

    /// The places of tablespaces that replay creates and to which no file of the backup is restored.
    pub fn new_places(&self) -> impl Iterator<Item = (u32, &Path)> {
        let recorded = |place: &Path| self.tablespaces.values().any(|known| known == place);
        self.made
            .iter()
            .map(|(oid, place)| (*oid, place.as_path()))
            .filter(move |(_, p)| !recorded(p))
    }

    /// Whether a tablespace with a higher OID has the same place. Both have the same files then, so only those of the
    /// highest OID are written.
    fn is_shadowed(&self, oid: u32, place: &Path) -> bool {
        self.tablespaces.range(oid.saturating_add(1)..).any(|(_, other)| other == place)
    }

    fn check_apart(&self) -> Result<(), Error> {
        let all: Vec<&Path> = self.all().collect();
        for (n, place) in all.iter().enumerate() {
            if !place.is_absolute() {
                let message = format!("{}: expected an absolute path", place.display());
                return Err(config(message));
            }
            if let Some(other) =
                all.iter().skip(n + 1).find(|o| o.starts_with(place) || place.starts_with(o))
            {
                let (a, b) = (place.display(), other.display());
                return Err(config(format!(
                    "{a} and {b}: expected separate directories, found one inside the other"
                ))
                .hint("put the tablespace elsewhere with --tablespace-map OLD=NEW"));
            }
        }
        Ok(())
    }

    pub fn meaning(&self, path: &Path) -> Meaning {
        let mut parts = path.components();
        let first = parts.next().map(Component::as_os_str).and_then(|s| s.to_str());
        match first {
            Some("data") => data_file(&self.data, parts.as_path()),
            Some("tablespaces") => {
                let oid = parts.next().and_then(|c| c.as_os_str().to_str()?.parse().ok());
                let place = oid.and_then(|oid: u32| Some((oid, self.tablespaces.get(&oid)?)));
                match place {
                    Some((oid, place)) if !self.is_shadowed(oid, place) => {
                        Meaning::At(join(place, parts.as_path()))
                    }
                    _ => Meaning::Nothing,
                }
            }
            _ => Meaning::Nothing,
        }
    }
}

fn data_file(data: &Path, path: &Path) -> Meaning {
    match path.to_str() {
        Some("global/pg_control") => Meaning::Control,
        // The restore writes these files itself, or they would make the copy a standby or continue an older recovery.
        Some("standby.signal" | "recovery.signal" | "tablespace_map" | "postmaster.pid") => {
            Meaning::Nothing
        }
        _ => Meaning::At(join(data, path)),
    }
}

/// Joins the two without the trailing slash that `Path::join` adds for an empty path.
fn join(place: &Path, path: &Path) -> PathBuf {
    if path.as_os_str().is_empty() { place.to_owned() } else { place.join(path) }
}

fn config(message: String) -> Error {
    Error::new(Failure::Config, message)
}

/// The content of `tablespace_map` in PostgreSQL's format.
pub fn tablespace_map(places: &Places) -> String {
    let entry = |(oid, place): (u32, &Path)| TablespaceEntry {
        oid,
        location: place.to_string_lossy().into_owned(),
    };
    let entries: Vec<_> = places.linked().map(entry).collect();
    format_tablespace_map(&entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(tablespace: &str) -> Places {
        let tablespaces = BTreeMap::from([(7, tablespace.into())]);
        Places { data: "/new".into(), tablespaces, made: BTreeMap::new() }
    }

    #[test]
    fn every_path_of_a_snapshot_has_one_place() {
        let places = places("/ts");
        let at = |path: &str| Meaning::At(path.into());
        for (path, expected) in [
            ("data", at("/new")),
            ("data/base/1/1259", at("/new/base/1/1259")),
            ("data/global/pg_control", Meaning::Control),
            ("data/standby.signal", Meaning::Nothing),
            ("tablespaces", Meaning::Nothing),
            ("tablespaces/7", at("/ts")),
            ("tablespaces/7/PG_15_202209061/5/1", at("/ts/PG_15_202209061/5/1")),
            ("tablespaces/8/x", Meaning::Nothing),
            ("elsewhere", Meaning::Nothing),
        ] {
            assert_eq!(places.meaning(Path::new(path)), expected, "{path}");
        }
    }

    /// A crash in CREATE TABLESPACE leaves an old link beside the new one.
    #[test]
    fn two_tablespaces_in_one_place_are_written_once() {
        let mut places = places("/ts");
        places.tablespaces.insert(9, "/ts".into());
        assert!(places.check_apart().is_ok());
        assert_eq!(places.meaning(Path::new("tablespaces/7/x")), Meaning::Nothing);
        assert_eq!(places.meaning(Path::new("tablespaces/9/x")), Meaning::At("/ts/x".into()));
        assert_eq!(tablespace_map(&places), "7 /ts\n9 /ts\n");
    }

    #[test]
    fn what_replay_makes_has_a_place_of_its_own() {
        let mut places = places("/ts");
        places.made = BTreeMap::from([(8, "/later".into()), (9, "/ts".into())]);
        let all: Vec<&Path> = places.all().collect();
        assert_eq!(all, [Path::new("/new"), Path::new("/later"), Path::new("/ts")]);
        // The tablespace was dropped and created again at the same place, which is already restored to.
        assert_eq!(places.new_places().collect::<Vec<_>>(), [(8, Path::new("/later"))]);
        assert_eq!(places.meaning(Path::new("tablespaces/7/x")), Meaning::At("/ts/x".into()));
        assert_eq!(tablespace_map(&places), "7 /ts\n8 /later\n9 /ts\n");
    }

    #[test]
    fn places_that_lie_in_each_other_are_refused() {
        assert!(places("/new/pg_tblspc/x").check_apart().is_err());
        assert!(places("/").check_apart().is_err());
        assert!(places("relative").check_apart().is_err());
        assert!(places("/newer").check_apart().is_ok());
    }

    #[test]
    fn a_location_with_a_line_end_is_escaped() {
        assert_eq!(tablespace_map(&places("/a\nb")), "7 /a\\\nb\n");
    }
}
