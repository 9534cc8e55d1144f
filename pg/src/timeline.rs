//! Timelines and their history files.
//!
//! A history file lists the ancestors of a timeline, one per line: the parent timeline, the LSN
//! where it was left, and a reason; `#` begins a comment (PostgreSQL source,
//! `src/backend/access/transam/timeline.c`). Entries ascend by timeline, and their LSNs never
//! decrease.

use crate::Lsn;
use std::{fmt, str::FromStr};

/// A timeline number, 1 or more. Displayed as eight hexadecimal digits, as in file names.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "u32", into = "u32")]
pub struct TimelineId(u32);

impl TimelineId {
    /// `None` for 0, which is not a timeline.
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 { None } else { Some(Self(number)) }
    }
    pub const fn get(self) -> u32 {
        self.0
    }
    /// The file name, such as `0000000A.history`.
    pub fn history_file_name(self) -> String {
        format!("{self}.history")
    }
}

/// Not a timeline number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a timeline number from 1 up, found {found:?}")]
pub struct ParseTimelineError {
    found: String,
}

impl TryFrom<u32> for TimelineId {
    type Error = ParseTimelineError;
    fn try_from(number: u32) -> Result<Self, Self::Error> {
        Self::new(number).ok_or_else(|| ParseTimelineError { found: number.to_string() })
    }
}

impl From<TimelineId> for u32 {
    fn from(timeline: TimelineId) -> u32 {
        timeline.0
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}", self.0)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Parses the eight hexadecimal digits of a file or directory name.
impl FromStr for TimelineId {
    type Err = ParseTimelineError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = text.len() == 8
            && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        plain
            .then(|| u32::from_str_radix(text, 16).ok().and_then(Self::new))
            .flatten()
            .ok_or_else(|| ParseTimelineError { found: text.chars().take(40).collect() })
    }
}

/// One line of a history file: `timeline` was left at `end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    pub timeline: TimelineId,
    /// One past the last byte of the ancestor that belongs to the history.
    pub end: Lsn,
}

/// The ancestors of a timeline, oldest first. Timeline 1 has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    timeline: TimelineId,
    entries: Vec<HistoryEntry>,
}

/// A history file that PostgreSQL itself would refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read history of timeline {timeline:?}, line {line}: {problem}")]
pub struct HistoryError {
    timeline: TimelineId,
    line: usize,
    problem: &'static str,
}

impl TimelineHistory {
    /// The history of a timeline without ancestors.
    pub const fn root(timeline: TimelineId) -> Self {
        Self { timeline, entries: Vec::new() }
    }

    /// Parses the content of a history file.
    ///
    /// # Errors
    /// A line that is not "timeline LSN reason", or timelines or LSNs that do not ascend.
    pub fn parse(timeline: TimelineId, content: &[u8]) -> Result<Self, HistoryError> {
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for (index, raw) in content.split(|b| *b == b'\n').enumerate() {
            let fail = |problem| HistoryError { timeline, line: index + 1, problem };
            // The reason at the end may consist of any bytes; timeline and LSN are ASCII.
            let text = String::from_utf8_lossy(raw);
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut words = text.split_whitespace();
            let parent = words
                .next()
                .and_then(|w| w.parse().ok())
                .and_then(TimelineId::new)
                .ok_or_else(|| fail("expected a timeline number first"))?;
            let end = words
                .next()
                .and_then(|w| w.parse::<Lsn>().ok())
                .ok_or_else(|| fail("expected an LSN after the timeline"))?;
            if parent >= timeline {
                return Err(fail("an ancestor must have a smaller number than its descendant"));
            }
            if entries.last().is_some_and(|last| parent <= last.timeline || end < last.end) {
                return Err(fail("timelines and LSNs must ascend"));
            }
            entries.push(HistoryEntry { timeline: parent, end });
        }
        Ok(Self { timeline, entries })
    }

    pub const fn timeline(&self) -> TimelineId {
        self.timeline
    }
    /// The ancestors, oldest first.
    pub fn entries(&self) -> &[HistoryEntry] {
        &self.entries
    }
    /// Where this timeline left its parent; `None` without ancestors.
    pub fn switch_point(&self) -> Option<Lsn> {
        self.entries.last().map(|e| e.end)
    }
    /// Where `ancestor` was left on the path to this timeline; `None` when it is not an ancestor.
    pub fn end_of(&self, ancestor: TimelineId) -> Option<Lsn> {
        self.entries.iter().find(|e| e.timeline == ancestor).map(|e| e.end)
    }
    /// The timeline, an ancestor or this one, to which `lsn` belongs.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        self.entries.iter().find(|e| lsn < e.end).map_or(self.timeline, |e| e.timeline)
    }
    /// The timeline that follows `timeline` on this path, which is not always the next number.
    pub fn next_after(&self, timeline: TimelineId) -> Option<TimelineId> {
        let path = self.entries.iter().map(|e| e.timeline).chain([self.timeline]);
        path.skip_while(|t| *t != timeline).nth(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tli(n: u32) -> TimelineId {
        TimelineId::new(n).unwrap()
    }

    #[test]
    fn reads_what_postgres_writes() {
        let text =
            b"1\t0/5000000\tno recovery target specified\n\n3\t0/7000028\tbefore 2000-01-01\n";
        let history = TimelineHistory::parse(tli(5), text).unwrap();
        assert_eq!(history.switch_point(), Some(Lsn::new(0x0700_0028)));
        assert_eq!(history.end_of(tli(1)), Some(Lsn::new(0x0500_0000)));
        assert_eq!(history.end_of(tli(2)), None);
        assert_eq!(history.timeline_at(Lsn::new(0x04FF_FFFF)), tli(1));
        assert_eq!(history.timeline_at(Lsn::new(0x0500_0000)), tli(3));
        assert_eq!(history.timeline_at(Lsn::new(0x0700_0028)), tli(5));
    }

    /// WAL-G's wal-receive assumed that the next timeline has the next number.
    #[test]
    fn next_timeline_comes_from_history_not_plus_one() {
        let history =
            TimelineHistory::parse(tli(5), b"1\t0/5000000\tx\n3\t0/7000028\ty\n").unwrap();
        assert_eq!(history.next_after(tli(1)), Some(tli(3)));
        assert_eq!(history.next_after(tli(3)), Some(tli(5)));
        assert_eq!(history.next_after(tli(5)), None);
        assert_eq!(history.next_after(tli(2)), None);
    }

    #[test]
    fn refuses_a_history_that_goes_back() {
        for bad in [
            &b"2\t0/5000000\tx\n1\t0/6000000\ty\n"[..],
            b"1\t0/6\tx\n2\t0/5\ty\n",
            b"5\t0/1\tx\n",
            b"x\n",
            b"1\n",
        ] {
            assert!(TimelineHistory::parse(tli(5), bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = TimelineHistory::parse(tli(9), &bytes);
        }
    }
}
