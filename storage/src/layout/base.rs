//! Keys of base backups, the same in both tiers.
//!
//! | key | what |
//! |---|---|
//! | `<cluster>/base/config`, `keys/<id>`, `index/<id>`, `snapshots/<id>` | a restic-format repository |
//! | `<cluster>/base/data/<first two digits>/<id>` | its packs |
//! | `<cluster>/repository.json[.age]` | what opens the repository: password and master key |
//! | `<cluster>/backups/<name>.json` | one record for each base backup |
//!
//! The repository layout is restic's (<https://restic.readthedocs.io/en/stable/100_references.html#repository-layout>).
//! An id is the SHA-256 of the file's bytes, which is how every reader of it can check them.

use super::ClusterName;
use crate::tier2::Sha256Sum;
use std::{fmt, str::FromStr};

/// The kinds of files in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BaseKind {
    /// The one `config`.
    Config,
    /// A password's wrapping of the master key.
    Key,
    /// A pack of chunks.
    Data,
    /// Where chunks lie in packs.
    Index,
    /// A snapshot: the root of a tree of files.
    Snapshot,
}

impl BaseKind {
    /// All of them.
    pub const ALL: [BaseKind; 5] =
        [BaseKind::Config, BaseKind::Key, BaseKind::Data, BaseKind::Index, BaseKind::Snapshot];

    /// The folder below `<cluster>/base/`; the config has none.
    pub const fn folder(self) -> Option<&'static str> {
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
    /// Which kind.
    pub kind: BaseKind,
    /// Its id; all zero for the config, whose name says nothing about its bytes.
    pub id: Sha256Sum,
}

impl BaseFile {
    /// The config.
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

    /// Reads a key below `<cluster>/base/`; `None` for anything that is not a repository file.
    pub fn parse_relative(text: &str) -> Option<Self> {
        if text == "config" {
            return Some(Self::CONFIG);
        }
        let (folder, rest) = text.split_once('/')?;
        let kind = BaseKind::ALL.into_iter().find(|kind| kind.folder() == Some(folder))?;
        let name = match kind {
            BaseKind::Data => rest.split_once('/').filter(|(two, id)| id.get(..2) == Some(*two))?.1,
            _ => rest,
        };
        let file = BaseFile { kind, id: name.parse().ok()? };
        (file.relative() == text).then_some(file)
    }
}

/// Where a cluster's repository begins, for tools that want its address.
pub fn repository_prefix(cluster: &ClusterName) -> String {
    format!("{cluster}/base")
}

/// What opens a cluster's repository.
pub fn repository_secret(cluster: &ClusterName, encrypted: bool) -> String {
    format!("{cluster}/repository.json{}", if encrypted { ".age" } else { "" })
}

/// A base backup's name: 1 to 63 of `A-Z a-z 0-9 . _ -`, beginning with a letter or digit.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct BackupName(String);

/// Not a backup name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a backup name of 1 to 63 characters A-Z, a-z, 0-9, ., _ or -, beginning with a letter or digit, found {found:?}"
)]
pub struct BackupNameError {
    found: String,
}

impl BackupName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The record's key in both tiers.
    pub fn record_key(&self, cluster: &ClusterName) -> String {
        format!("{cluster}/backups/{}.json", self.0)
    }

    /// Reads a file name of `<cluster>/backups/`.
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_pack_in_the_folder_of_another_is_not_one() {
        let id = "ab".repeat(32);
        assert!(BaseFile::parse_relative(&format!("data/ab/{id}")).is_some());
        assert_eq!(BaseFile::parse_relative(&format!("data/ac/{id}")), None);
        assert_eq!(BaseFile::parse_relative(&format!("data/{id}")), None);
        assert_eq!(BaseFile::parse_relative(&format!("keys/{}", id.to_uppercase())), None);
        assert_eq!(BaseFile::parse_relative("keys/../config"), None);
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        for bad in ["", ".", "..", "../x", "a/b", ".a", "-a", "a\0", "ä", " a"] {
            assert!(bad.parse::<BackupName>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn every_key_parses_back(id: [u8; 32], which in 1usize..5) {
            let file = BaseFile { kind: BaseKind::ALL[which], id: Sha256Sum::new(id) };
            prop_assert_eq!(BaseFile::parse_relative(&file.relative()), Some(file));
        }
    }
}
