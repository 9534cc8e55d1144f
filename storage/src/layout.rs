//! Every path and object key of both tiers is built and parsed here, and nowhere else.
//!
//! Keys are relative, with `/`, the same in both tiers:
//!
//! | key | what |
//! |---|---|
//! | `<cluster>/cluster.json` | what was pinned at first contact |
//! | `<cluster>/generations.json` | the histories of the cluster (`generations.rs`) |
//! | `<cluster>@<number>/…` | the same for its second generation and later ones |
//! | `<cluster>/wal/<timeline>/<segment>.zst[.age]` | sealed segment |
//! | `<cluster>/wal/<timeline>/<segment>.partial.zst[.age]` | last, incomplete segment of an ended timeline |
//! | `<cluster>/wal/<timeline>.history[.age]` | history file of a timeline |
//! | `<cluster>/wal/<timeline>/<segment>.open` | tier 1 only: the segment being received |
//! | `<cluster>/wal/<timeline>/<segment>.open.damaged-<n>` | tier 1 only: such a file that lost acknowledged WAL, kept as it was found |
//! | `<cluster>/wal/<timeline>/<segment>[.partial].zst[.age].damaged-<n>` | tier 1 only: a sealed file that rotted, kept as it was found |
//! | `<cluster>/open.key.age` | tier 1 only: the wrapped key of the segments being received |
//! | `<cluster>/base/…`, `<cluster>/backups/…` | base backups: `layout/base.rs` |
//!
//! An external name becomes part of a path only through a type of this file, so it cannot contain `../`.

pub mod base;

pub use base::{BackupName, BackupNameError, BaseFile, BaseKind, BaseObject, LEVELS};

use klio_pg::{SegmentName, TimelineId};
use std::{fmt, str::FromStr};

/// The name for the `number`th damaged journal of a segment.
pub fn damaged_journal(segment: SegmentName, number: u32) -> String {
    format!("{segment}.open.damaged-{number}")
}

/// The name for the `number`th damaged copy of a sealed file that was called `stored`.
pub fn damaged_sealed(stored: &str, number: u32) -> String {
    format!("{stored}.damaged-{number}")
}

/// A cluster's name: 1 to 63 of `a-z 0-9 _ -`, beginning with a letter or digit. Also safe as a queue subject, a metric
/// attribute and a directory name.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(String);

/// The text is not a cluster name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a cluster name of 1 to 63 characters a-z, 0-9, _ or -, beginning with a letter or digit{or}, found {found:?}"
)]
pub struct ClusterNameError {
    found: String,
    /// What else would be good, if the text was meant to name a generation.
    or: &'static str,
}

impl ClusterNameError {
    fn new(found: &str, or: &'static str) -> Self {
        Self { found: found.chars().take(70).collect(), or }
    }
}

const OR_NUMBERED: &str = ", or NAME@N for its generation with the number N";

/// Separates a cluster's name from the number of one of its generations.
const GENERATION_MARK: char = '@';

impl ClusterName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name without a generation number.
    pub fn base(&self) -> Self {
        Self(self.0.split(GENERATION_MARK).next().unwrap_or_default().to_owned())
    }

    /// The generation number, if the name has one: a name that a user gave, which without a number means the current
    /// generation.
    pub fn number(&self) -> Option<u32> {
        self.0.split_once(GENERATION_MARK)?.1.parse().ok()
    }

    /// The number of the generation that is stored under this name: the first one has the plain name.
    pub fn generation(&self) -> u32 {
        self.number().unwrap_or(1)
    }

    /// The directory name of a generation of this cluster: the plain name for the first, `<name>@<number>` for the
    /// others.
    pub fn with_generation(&self, number: u32) -> Self {
        let base = self.base();
        if number <= 1 { base } else { Self(format!("{base}{GENERATION_MARK}{number}")) }
    }

    /// Parses `<name>` or `<name>@<number>`, as used by callers and as directory names.
    ///
    /// # Errors
    /// As for a plain name; a number must be 1 or more, without leading zeros.
    pub fn parse_generation(text: &str) -> Result<Self, ClusterNameError> {
        let Some((base, number)) = text.split_once(GENERATION_MARK) else { return text.parse() };
        let fail = || ClusterNameError::new(text, OR_NUMBERED);
        let base: ClusterName = base.parse().map_err(|_| fail())?;
        let parsed: u32 = number.parse().map_err(|_| fail())?;
        let good = parsed > 0 && parsed.to_string() == number;
        if good { Ok(Self(format!("{base}{GENERATION_MARK}{parsed}"))) } else { Err(fail()) }
    }
}

impl FromStr for ClusterName {
    type Err = ClusterNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let good = (1..=63).contains(&text.len())
            && plain(text.as_bytes()[0])
            && text.bytes().all(|b| plain(b) || b == b'_' || b == b'-');
        if good { Ok(Self(text.to_owned())) } else { Err(ClusterNameError::new(text, "")) }
    }
}

impl TryFrom<String> for ClusterName {
    type Error = ClusterNameError;
    /// Records and jobs name generations as well; names that users choose go through `FromStr`, which refuses them.
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse_generation(&text)
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> String {
        name.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a file is stored in a tier. After a change of settings both forms may exist; their plain content is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    /// Not encrypted.
    Plain,
    /// In a standard age file (`crypt`).
    Age,
}

impl Form {
    /// Both, the encrypted one first.
    pub const BOTH: [Form; 2] = [Form::Age, Form::Plain];

    /// The suffix of the file name.
    pub const fn suffix(self) -> &'static str {
        match self {
            Form::Plain => "",
            Form::Age => ".age",
        }
    }

    pub const fn other(self) -> Self {
        match self {
            Form::Plain => Form::Age,
            Form::Age => Form::Plain,
        }
    }
}

/// The age-wrapped key of a cluster's journals; on tier 1 only.
pub const OPEN_KEY: &str = "open.key.age";

/// Which timelines of a cluster are in conflict, and what was decided; the same name in both tiers.
pub const TIMELINES: &str = "timelines.json";

/// A finished WAL file of a cluster, in either tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalFile {
    /// A complete segment.
    Segment(SegmentName),
    /// The last, incomplete segment of an ended timeline.
    Partial(SegmentName),
    /// A timeline's history file.
    History(TimelineId),
}

impl WalFile {
    pub const fn timeline(self) -> TimelineId {
        match self {
            WalFile::Segment(name) | WalFile::Partial(name) => name.timeline(),
            WalFile::History(timeline) => timeline,
        }
    }

    /// The key of the plain form, below `<cluster>/wal/`.
    pub fn relative(self) -> String {
        match self {
            WalFile::Segment(name) => format!("{}/{name}.zst", name.timeline()),
            WalFile::Partial(name) => format!("{}/{name}.partial.zst", name.timeline()),
            WalFile::History(timeline) => timeline.history_file_name(),
        }
    }

    /// The key of a form, below `<cluster>/wal/`.
    pub fn relative_in(self, form: Form) -> String {
        format!("{}{}", self.relative(), form.suffix())
    }

    /// The key of the plain form, in both tiers.
    pub fn key(self, cluster: &ClusterName) -> String {
        self.key_in(cluster, Form::Plain)
    }

    /// The key of a form, in both tiers.
    pub fn key_in(self, cluster: &ClusterName, form: Form) -> String {
        format!("{cluster}/wal/{}", self.relative_in(form))
    }

    /// Parses a key below `<cluster>/wal/` in either form; `None` for anything that is not a finished WAL file.
    pub fn parse_stored(text: &str) -> Option<(Self, Form)> {
        let (plain, form) = match text.strip_suffix(Form::Age.suffix()) {
            Some(plain) => (plain, Form::Age),
            None => (text, Form::Plain),
        };
        Some((Self::parse_relative(plain)?, form))
    }

    /// Parses a key below `<cluster>/wal/` in its plain form; `None` for anything else.
    pub fn parse_relative(text: &str) -> Option<Self> {
        if let Some((directory, file)) = text.split_once('/') {
            let timeline: TimelineId = directory.parse().ok()?;
            let stem = file.strip_suffix(".zst")?;
            let (stem, partial) =
                stem.strip_suffix(".partial").map_or((stem, false), |stem| (stem, true));
            let name: SegmentName = stem.parse().ok()?;
            let file = if partial { WalFile::Partial(name) } else { WalFile::Segment(name) };
            return (name.timeline() == timeline).then_some(file);
        }
        Some(WalFile::History(text.strip_suffix(".history")?.parse().ok()?))
    }
}

/// Parses what PostgreSQL passes for `%f` in a restore_command, or Klio's own name of a partial segment.
impl FromStr for WalFile {
    type Err = WalFileNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = || WalFileNameError { found: text.chars().take(70).collect() };
        if let Some(stem) = text.strip_suffix(".history") {
            return stem.parse().map(WalFile::History).map_err(|_| fail());
        }
        if let Some(stem) = text.strip_suffix(".partial") {
            return stem.parse().map(WalFile::Partial).map_err(|_| fail());
        }
        text.parse().map(WalFile::Segment).map_err(|_| fail())
    }
}

/// The PostgreSQL name: `000000010000000000000001`, `….partial` or `00000002.history`.
impl fmt::Display for WalFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalFile::Segment(name) => write!(f, "{name}"),
            WalFile::Partial(name) => write!(f, "{name}.partial"),
            WalFile::History(timeline) => write!(f, "{timeline}.history"),
        }
    }
}

/// The text is not the name of a WAL file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a segment (24 hexadecimal digits), a .partial or a .history file name, found {found:?}"
)]
pub struct WalFileNameError {
    found: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys_are_those_of_the_design() {
        let cluster: ClusterName = "pg-1".parse().unwrap();
        let file: WalFile = "0000000200000000000000A1".parse().unwrap();
        assert_eq!(file.key(&cluster), "pg-1/wal/00000002/0000000200000000000000A1.zst");
        let partial: WalFile = "0000000200000000000000A1.partial".parse().unwrap();
        assert_eq!(partial.relative(), "00000002/0000000200000000000000A1.partial.zst");
        let history: WalFile = "00000002.history".parse().unwrap();
        assert_eq!(history.key(&cluster), "pg-1/wal/00000002.history");
        assert_eq!(history.key_in(&cluster, Form::Age), "pg-1/wal/00000002.history.age");
        assert_eq!(WalFile::parse_stored("00000002.history.age.age"), None);
    }

    #[test]
    fn a_name_that_leaves_the_directory_is_refused() {
        for bad in ["", ".", "..", "../x", "a/b", "A", "a.b", "-a", "_a", "a\0", "ä", " a"] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?}");
            assert!(bad.parse::<WalFile>().is_err(), "{bad:?}");
        }
        assert!("a".repeat(64).parse::<ClusterName>().is_err());
        assert!("a".repeat(63).parse::<ClusterName>().is_ok());
    }

    #[test]
    fn the_first_generation_is_number_one_with_and_without_its_number() {
        for (text, number, generation, place) in [
            ("main", None, 1, "main"),
            ("main@1", Some(1), 1, "main"),
            ("main@12", Some(12), 12, "main@12"),
        ] {
            let name = ClusterName::parse_generation(text).unwrap();
            assert_eq!((name.number(), name.generation()), (number, generation), "{text}");
            assert_eq!(name.with_generation(name.generation()).as_str(), place, "{text}");
        }
    }

    /// Regression test: the message did not say that a generation can be named, and how.
    #[test]
    fn a_malformed_generation_is_refused_with_the_form_of_a_good_one() {
        for bad in ["main@x", "main@", "main@0", "main@02", "main@-1", "main@1@2", "@1", "Main@1"] {
            let error = ClusterName::parse_generation(bad).unwrap_err().to_string();
            assert!(error.contains("NAME@N") && error.contains(bad), "{error}");
        }
        let plain = ClusterName::parse_generation("Main").unwrap_err().to_string();
        assert!(!plain.contains("NAME@N"), "{plain}");
    }

    #[test]
    fn a_segment_in_the_directory_of_another_timeline_is_not_one() {
        assert_eq!(WalFile::parse_relative("00000001/000000020000000000000001.zst"), None);
    }

    proptest! {
        #[test]
        fn every_key_parses_back(t in 1u32.., high: u32, low: u32, which in 0..3) {
            let name: SegmentName = format!("{t:08X}{high:08X}{low:08X}").parse().unwrap();
            let file = match which {
                0 => WalFile::Segment(name),
                1 => WalFile::Partial(name),
                _ => WalFile::History(name.timeline()),
            };
            prop_assert_eq!(WalFile::parse_relative(&file.relative()), Some(file));
            for form in Form::BOTH {
                prop_assert_eq!(WalFile::parse_stored(&file.relative_in(form)), Some((file, form)));
            }
            prop_assert_eq!(file.to_string().parse(), Ok(file));
        }
    }
}
