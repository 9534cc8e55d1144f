//! Names and states of replication slots.
//!
//! A [`SlotName`] contains only what PostgreSQL allows, so it needs no escaping in a command
//! (<https://www.postgresql.org/docs/current/warm-standby.html#STREAMING-REPLICATION-SLOTS-MANIPULATION>).

use klio_pg::{Lsn, TimelineId};
use std::{fmt, str::FromStr};

/// `[a-z0-9_]{1,63}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SlotName(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected a slot name of 1 to 63 lower-case letters, digits and underscores, found {found:?}"
)]
pub struct SlotNameError {
    found: String,
}

impl SlotName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SlotName {
    type Error = SlotNameError;
    fn try_from(text: String) -> Result<Self, SlotNameError> {
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if (1..=63).contains(&text.len()) && text.bytes().all(fits) {
            Ok(Self(text))
        } else {
            Err(SlotNameError { found: text.chars().take(80).collect() })
        }
    }
}

impl FromStr for SlotName {
    type Err = SlotNameError;
    fn from_str(text: &str) -> Result<Self, SlotNameError> {
        text.to_owned().try_into()
    }
}

impl From<SlotName> for String {
    fn from(name: SlotName) -> String {
        name.0
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The answer to READ_REPLICATION_SLOT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotState {
    /// The oldest WAL that the slot retains. `None` when it retains nothing, because it never reserved any or because
    /// the server invalidated it; `pg_replication_slots.wal_status` tells which.
    pub restart_lsn: Option<Lsn>,
    /// The timeline of `restart_lsn`.
    pub restart_timeline: Option<TimelineId>,
}

/// A slot that was just created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreatedSlot {
    /// The oldest WAL that the slot retains.
    pub restart_lsn: Lsn,
    /// The timeline of `restart_lsn`.
    pub restart_timeline: TimelineId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_postgres_allows_is_a_slot_name() {
        for good in ["a", "klio_pg_1", "0", &"x".repeat(63)] {
            assert_eq!(good.parse::<SlotName>().map(|s| s.to_string()), Ok(good.to_owned()));
        }
        for bad in ["", "A", "a-b", "a b", "a\"; DROP", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<SlotName>().is_err(), "{bad:?}");
        }
    }
}
