//! Keys of base backups, the same in both tiers.
//!
//! | key | what |
//! |---|---|
//! | `<cluster>/base/config`, `keys/<id>`, `index/<id>`, `snapshots/<id>` | a restic-format repository |
//! | `<cluster>/base/data/<first two digits>/<id>` | its packs |
//! | `<cluster>/timelines.json` | timelines that were written at the same time as another one, and what was decided |
//! | `<cluster>/repository.json[.age]` | the repository's secret: password and master key |
//! | `<cluster>/wal_levels.json` | where WAL was written with `wal_level = minimal` |
//! | `<cluster>/backups/<name>.json` | one record for each base backup |
//!
//! The repository layout is restic's (<https://restic.readthedocs.io/en/stable/100_references.html#repository-layout>).
//! An id is the SHA-256 of the file's bytes, with which every reader can verify them.

use super::ClusterName;
use crate::sum::Sha256Sum;
use std::{fmt, str::FromStr};

/// Name of the file about changes of `wal_level` in a cluster's directory, in either tier.
pub const LEVELS: &str = "wal_levels.json";

/// The kinds of files in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BaseKind {
    /// The repository's only `config`.
    Config,
    /// The master key, wrapped with a password.
    Key,
    /// A pack of chunks.
    Data,
    /// Which chunk is in which pack.
    Index,
    /// A snapshot: the root of a file tree.
    Snapshot,
}

impl BaseKind {
    pub const ALL: [BaseKind; 5] =
        [BaseKind::Config, BaseKind::Key, BaseKind::Data, BaseKind::Index, BaseKind::Snapshot];

    /// The directory below `<cluster>/base/`; the config has none.
    pub const fn directory(self) -> Option<&'static str> {
        match self {
            BaseKind::Config => None,
            BaseKind::Key => Some("keys"),
            BaseKind::Data => Some("data"),
            BaseKind::Index => Some("index"),
            BaseKind::Snapshot => Some("snapshots"),
        }
    }
}

/// The name of a repository file: the SHA-256 of its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseFile {
    pub kind: BaseKind,
    /// The id; all zero for the config, whose name does not depend on its bytes.
    pub id: Sha256Sum,
}

impl BaseFile {
    pub const CONFIG: BaseFile = BaseFile { kind: BaseKind::Config, id: Sha256Sum::new([0; 32]) };

    /// The key below `<cluster>/base/`.
    pub fn relative(self) -> String {
        let id = self.id;
        match self.kind {
            BaseKind::Config => "config".to_owned(),
            BaseKind::Data => {
                let text = id.to_string();
                format!("data/{}/{text}", &text[..2])
            }
            BaseKind::Key => format!("keys/{id}"),
            BaseKind::Index => format!("index/{id}"),
            BaseKind::Snapshot => format!("snapshots/{id}"),
        }
    }

    /// The key in both tiers.
    pub fn key(self, cluster: &ClusterName) -> String {
        format!("{cluster}/base/{}", self.relative())
    }

    /// Parses a key below `<cluster>/base/`; `None` for anything that is not a repository file.
    pub fn parse_relative(text: &str) -> Option<Self> {
        if text == "config" {
            return Some(Self::CONFIG);
        }
        let (directory, rest) = text.split_once('/')?;
        let kind = BaseKind::ALL.into_iter().find(|kind| kind.directory() == Some(directory))?;
        let name = match kind {
            BaseKind::Data => rest.split_once('/').filter(|(two, id)| id.get(..2) == Some(*two))?.1,
            _ => rest,
        };
        let file = BaseFile { kind, id: name.parse().ok()? };
        (file.relative() == text).then_some(file)
    }
}

/// The key prefix of a cluster's repository, for tools that need its address.
pub fn repository_prefix(cluster: &ClusterName) -> String {
    format!("{cluster}/base")
}

/// A base backup's name: 1 to 63 of `A-Z a-z 0-9 . _ -`, beginning with a letter or digit.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct BackupName(String);

/// The text is not a backup name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a backup name of 1 to 63 characters A-Z, a-z, 0-9, ., _ or -, beginning with a letter or digit, found {found:?}"
)]
pub struct BackupNameError {
    found: String,
}

impl BackupName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of the record in both tiers.
    pub fn record_key(&self, cluster: &ClusterName) -> String {
        format!("{cluster}/backups/{}.json", self.0)
    }

    /// Parses a file name in `<cluster>/backups/`.
    pub fn parse_record(file: &str) -> Option<Self> {
        file.strip_suffix(".json")?.parse().ok()
    }
}

impl FromStr for BackupName {
    type Err = BackupNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let good = (1..=63).contains(&text.len())
            && text.as_bytes()[0].is_ascii_alphanumeric()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(BackupNameError { found: text.chars().take(70).collect() })
        }
    }
}

impl TryFrom<String> for BackupName {
    type Error = BackupNameError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<BackupName> for String {
    fn from(name: BackupName) -> String {
        name.0
    }
}

impl fmt::Display for BackupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An object of a cluster in tier 2 other than WAL: one type for jobs, listings and keys.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BaseObject {
    /// `cluster.json`: what was pinned at first contact. The PostgreSQL version in it may change.
    Cluster,
    /// `generations.json`: the histories of the cluster. It changes when a new one is found, and when a person decides.
    Generations,
    /// `timelines.json`: which timelines are in conflict. It changes when a conflict is found, and when a person
    /// decides.
    Timelines,
    /// `repository.json[.age]`; the wrapping may change, the secret inside does not.
    Secret {
        /// Whether it is age-wrapped.
        encrypted: bool,
    },
    /// `wal_levels.json`: where WAL was written that recovery cannot pass. Entries are only added.
    WalLevels,
    /// A file of the repository.
    File(BaseFile),
    /// The record of a backup. In tier 2 its presence means that everything the backup needs is there.
    Record(BackupName),
}

impl BaseObject {
    /// The key below `<cluster>/`.
    pub fn relative(&self) -> String {
        match self {
            BaseObject::Cluster => "cluster.json".to_owned(),
            BaseObject::Generations => "generations.json".to_owned(),
            BaseObject::Timelines => super::TIMELINES.to_owned(),
            BaseObject::WalLevels => LEVELS.to_owned(),
            BaseObject::Secret { encrypted: true } => "repository.json.age".to_owned(),
            BaseObject::Secret { encrypted: false } => "repository.json".to_owned(),
            BaseObject::File(file) => format!("base/{}", file.relative()),
            BaseObject::Record(name) => format!("backups/{name}.json"),
        }
    }

    /// The key in both tiers.
    pub fn key(&self, cluster: &ClusterName) -> String {
        format!("{cluster}/{}", self.relative())
    }

    /// Whether the content under its key never changes.
    pub const fn is_fixed(&self) -> bool {
        matches!(self, BaseObject::File(_) | BaseObject::Record(_))
    }

    /// Parses a key below `<cluster>/`; `None` for anything else, including WAL.
    pub fn parse_relative(text: &str) -> Option<Self> {
        match text {
            "cluster.json" => return Some(BaseObject::Cluster),
            "generations.json" => return Some(BaseObject::Generations),
            super::TIMELINES => return Some(BaseObject::Timelines),
            LEVELS => return Some(BaseObject::WalLevels),
            "repository.json" => return Some(BaseObject::Secret { encrypted: false }),
            "repository.json.age" => return Some(BaseObject::Secret { encrypted: true }),
            _ => {}
        }
        match text.split_once('/')? {
            ("base", rest) => BaseFile::parse_relative(rest).map(BaseObject::File),
            ("backups", rest) => BackupName::parse_record(rest).map(BaseObject::Record),
            _ => None,
        }
    }
}

/// The key below `<cluster>/`, without the cluster's name.
impl fmt::Display for BaseObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.relative())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_pack_in_the_directory_of_another_is_not_one() {
        let id = "ab".repeat(32);
        assert!(BaseFile::parse_relative(&format!("data/ab/{id}")).is_some());
        assert_eq!(BaseFile::parse_relative(&format!("data/ac/{id}")), None);
        assert_eq!(BaseFile::parse_relative(&format!("data/{id}")), None);
        assert_eq!(BaseFile::parse_relative(&format!("keys/{}", id.to_uppercase())), None);
        assert_eq!(BaseFile::parse_relative("keys/../config"), None);
    }

    #[test]
    fn a_name_that_leaves_the_directory_is_refused() {
        for bad in ["", ".", "..", "../x", "a/b", ".a", "-a", "a\0", "ä", " a"] {
            assert!(bad.parse::<BackupName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn objects_are_told_apart_and_nothing_else_is_one() {
        for text in [
            "cluster.json",
            "wal_levels.json",
            "repository.json",
            "repository.json.age",
            "base/config",
            "backups/20261121T051800Z-2.json",
            "backups/a.json.json",
        ] {
            let object = BaseObject::parse_relative(text).unwrap();
            assert_eq!(object.relative(), text);
        }
        for bad in [
            "",
            "wal/00000002.history",
            "backups/.json",
            "backups/a/b.json",
            "base/",
            "base/x",
            "gaps.json",
        ] {
            assert_eq!(BaseObject::parse_relative(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn every_key_parses_back(id: [u8; 32], which in 1usize..5) {
            let file = BaseFile { kind: BaseKind::ALL[which], id: Sha256Sum::new(id) };
            prop_assert_eq!(BaseFile::parse_relative(&file.relative()), Some(file));
            let object = BaseObject::File(file);
            prop_assert_eq!(BaseObject::parse_relative(&object.relative()), Some(object));
        }
    }
}
