//! `backup_label` and `tablespace_map`: the output of pg_backup_stop, from which a recovery begins.
//!
//! The format is that of PostgreSQL's `src/backend/access/transam/xlogbackup.c` and `xlog.c`: lines of
//! `KEY: value`. Unknown keys are ignored, because newer versions add some. A backup history file is the
//! same with STOP lines.

use crate::{Lsn, TimelineId};

/// A backup_label or a backup history file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// WAL is needed from here on: the checkpoint's redo position.
    pub start_lsn: Lsn,
    /// LSN of the checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// The timeline of both.
    pub start_timeline: TimelineId,
    /// Whether the backup was taken from a standby.
    pub from_standby: bool,
    /// The label passed to pg_backup_start.
    pub label: String,
    /// In a history file only.
    pub stop_lsn: Option<Lsn>,
    /// In a history file only.
    pub stop_timeline: Option<TimelineId>,
}

/// The text is not a backup_label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read backup_label: expected {expected}, found {found:?}")]
pub struct BackupLabelError {
    expected: &'static str,
    found: String,
}

impl BackupLabel {
    /// The file's name in the data directory.
    pub const FILE: &'static str = "backup_label";

    /// Parses the file.
    ///
    /// # Errors
    /// A line is missing or malformed.
    pub fn parse(text: &str) -> Result<Self, BackupLabelError> {
        let value =
            |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        let wrong = |expected, found: Option<&str>| BackupLabelError {
            expected,
            found: found.unwrap_or_default().chars().take(80).collect(),
        };
        let lsn = |key, expected| {
            let found: Option<&str> = value(key);
            // "0/2000028 (file 000000010000000000000002)"
            let first = found.and_then(|v| v.split_whitespace().next());
            first.and_then(|v| v.parse().ok()).ok_or_else(|| wrong(expected, found))
        };
        let timeline = |key| {
            let number: Option<u32> = value(key).and_then(|v| v.trim().parse().ok());
            number.and_then(TimelineId::new)
        };
        Ok(Self {
            start_lsn: lsn("START WAL LOCATION", "START WAL LOCATION: and an LSN")?,
            checkpoint_lsn: lsn("CHECKPOINT LOCATION", "CHECKPOINT LOCATION: and an LSN")?,
            start_timeline: timeline("START TIMELINE").ok_or_else(|| {
                wrong("START TIMELINE: and a number from 1 up", value("START TIMELINE"))
            })?,
            from_standby: value("BACKUP FROM") == Some("standby"),
            label: value("LABEL").unwrap_or_default().to_owned(),
            stop_lsn: lsn("STOP WAL LOCATION", "").ok(),
            stop_timeline: timeline("STOP TIMELINE"),
        })
    }
}

/// One line of tablespace_map: the target of the link `pg_tblspc/<oid>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceEntry {
    /// The tablespace's OID.
    pub oid: u32,
    /// The link's target.
    pub location: String,
}

/// The file's name in the data directory.
pub const TABLESPACE_MAP_FILE: &str = "tablespace_map";

/// Parses a tablespace_map. In a location, a backslash precedes a line end or a backslash that is part of
/// the location.
///
/// # Errors
/// A line that is not an OID and a location.
pub fn parse_tablespace_map(text: &str) -> Result<Vec<TablespaceEntry>, BackupLabelError> {
    let mut entries = Vec::new();
    for line in unescape(text) {
        let entry = line.split_once(' ').and_then(|(oid, location)| {
            let location = location.to_owned();
            Some(TablespaceEntry { oid: oid.parse().ok()?, location })
        });
        entries.push(entry.ok_or_else(|| BackupLabelError {
            expected: "an OID and a location in tablespace_map",
            found: line.chars().take(80).collect(),
        })?);
    }
    Ok(entries)
}

/// Formats a tablespace_map that [`parse_tablespace_map`] and PostgreSQL can read.
pub fn format_tablespace_map(entries: &[TablespaceEntry]) -> String {
    let mut text = String::new();
    for entry in entries {
        text += &format!("{} ", entry.oid);
        for c in entry.location.chars() {
            if matches!(c, '\n' | '\r' | '\\') {
                text.push('\\');
            }
            text.push(c);
        }
        text.push('\n');
    }
    text
}

/// Splits the text into lines and removes the escaping backslashes.
fn unescape(text: &str) -> Vec<String> {
    let (mut lines, mut line, mut chars) = (Vec::new(), String::new(), text.chars());
    while let Some(c) = chars.next() {
        match c {
            '\\' => line.extend(chars.next()),
            '\n' | '\r' => {
                if !line.is_empty() {
                    lines.push(std::mem::take(&mut line));
                }
            }
            c => line.push(c),
        }
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LABEL: &str = "START WAL LOCATION: 16/B3000028 (file 0000000300000016000000B3)\n\
        CHECKPOINT LOCATION: 16/B3000060\nBACKUP METHOD: streamed\nBACKUP FROM: standby\n\
        START TIME: 2026-11-21 05:00:00 UTC\nLABEL: klio a: b\nSTART TIMELINE: 3\n";

    #[test]
    fn what_postgres_writes_is_read() {
        let label = BackupLabel::parse(LABEL).unwrap();
        assert_eq!(label.start_lsn.to_string(), "16/B3000028");
        assert_eq!(label.checkpoint_lsn.to_string(), "16/B3000060");
        assert_eq!((label.start_timeline.get(), label.from_standby), (3, true));
        assert_eq!((label.label.as_str(), label.stop_lsn), ("klio a: b", None));
        let history = format!("{LABEL}STOP WAL LOCATION: 16/B3000138 (file x)\nSTOP TIMELINE: 4\n");
        let history = BackupLabel::parse(&history).unwrap();
        assert_eq!(history.stop_lsn.unwrap().to_string(), "16/B3000138");
        assert_eq!(history.stop_timeline.unwrap().get(), 4);
    }

    #[test]
    fn a_line_that_is_missing_is_named() {
        for key in ["START WAL LOCATION", "CHECKPOINT LOCATION", "START TIMELINE"] {
            let lines: Vec<&str> = LABEL.lines().filter(|l| !l.starts_with(key)).collect();
            let error = BackupLabel::parse(&lines.join("\n")).unwrap_err();
            assert!(error.to_string().contains(key), "{error}");
        }
        assert!(BackupLabel::parse("").is_err());
    }

    #[test]
    fn a_map_that_is_none_is_refused() {
        assert_eq!(parse_tablespace_map("").unwrap(), []);
        assert!(parse_tablespace_map("16384\n").is_err());
        assert!(parse_tablespace_map("x /a\n").is_err());
    }

    proptest! {
        #[test]
        fn no_text_like_a_label_or_a_map_makes_it_panic(
            any in "\\PC{0,80}",
            near in "((START|STOP|CHECKPOINT|BACKUP|LABEL|TIMELINE|WAL|LOCATION|FROM|TIME|METHOD)[ :/()0-9A-F\n]{0,12}){0,8}",
        ) {
            for text in [&any, &near] {
                let _ = (BackupLabel::parse(text), parse_tablespace_map(text));
            }
        }

        #[test]
        fn a_map_round_trips(oid: u32, location in "/[a \\\\\n\rü]{1,20}") {
            let entries = vec![
                TablespaceEntry { oid, location },
                TablespaceEntry { oid: 1, location: "/x".into() },
            ];
            prop_assert_eq!(parse_tablespace_map(&format_tablespace_map(&entries)).unwrap(), entries);
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = BackupLabel::parse(&text);
            let _ = parse_tablespace_map(&text);
        }
    }
}
