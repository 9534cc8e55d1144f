//! How settings are written: durations, sizes, percentages, and secret text.
//!
//! A number without a unit is refused where a unit matters.

use klio_pg::ByteSize;
use serde::{Deserialize, Deserializer, de::Error as _};
use std::{fmt, time::Duration};

/// Reads `250ms`, `10s`, `5m` or `1h`.
pub(super) fn duration<'de, D: Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(d)?).map_err(D::Error::custom)
}

/// Reads `512KiB`, `4MiB`, `1GiB` or a number of bytes with `B`.
pub(super) fn size<'de, D: Deserializer<'de>>(d: D) -> Result<ByteSize, D::Error> {
    parse_size(&String::deserialize(d)?).map_err(D::Error::custom)
}

/// Reads a percentage from 0 to 100, as a number or as text.
pub(super) fn percent<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        Number(f64),
        Text(String),
    }
    let (number, found) = match Form::deserialize(d)? {
        Form::Number(number) => (Some(number), number.to_string()),
        Form::Text(text) => (text.trim().trim_end_matches('%').parse().ok(), text),
    };
    number.filter(|n| (0.0..=100.0).contains(n)).ok_or_else(|| {
        D::Error::custom(format!("expected a number from 0 to 100, found {found:?}"))
    })
}

/// Reads a duration, for options and files alike.
///
/// # Errors
/// Anything except a whole number with one of the units.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => 0,
    };
    number
        .filter(|_| millis > 0)
        .and_then(|n| n.checked_mul(millis))
        .map(Duration::from_millis)
        .ok_or_else(|| format!("expected a duration such as 250ms, 10s, 5m or 1h, found {text:?}"))
}

fn parse_size(text: &str) -> Result<ByteSize, String> {
    let (number, unit) = split(text);
    let bytes: u64 = match unit {
        "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => 0,
    };
    number
        .filter(|_| bytes > 0)
        .and_then(|n| n.checked_mul(bytes))
        .map(ByteSize::new)
        .ok_or_else(|| format!("expected a size such as 512KiB, 4MiB or 1GiB, found {text:?}"))
}

fn split(text: &str) -> (Option<u64>, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (text[..end].parse().ok(), text[end..].trim())
}

/// Text that may contain a password, and so is never printed.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the code that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "\"\"" } else { "<redacted>" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_units_and_refuses_bare_numbers() {
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(parse_size("4MiB"), Ok(ByteSize::mib(4)));
        assert_eq!(parse_size("7 B"), Ok(ByteSize::new(7)));
        for bad in ["", "10", "s", "-1s", "1.5s", "10 parsecs", "99999999999999999999s"] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "4", "4MB", "MiB", "99999999999999GiB"] {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_secret_does_not_print() {
        let secret = Secret::from("host=x password=hunter2");
        assert!(!format!("{secret:?}").contains("hunter2"));
    }
}
