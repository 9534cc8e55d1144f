//! Times, sizes and positions as text for people.

use klio_pg::{ByteSize, Lsn};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

/// `16/B374D848`, or `-` for 0, which means "nothing yet".
pub(super) fn lsn(value: u64) -> String {
    if value == 0 { "-".into() } else { Lsn::new(value).to_string() }
}

/// `1.5 GiB`.
pub(super) fn size(bytes: u64) -> String {
    ByteSize::new(bytes).to_string()
}

/// RFC 3339 in UTC, or `-` for 0, which means "never".
pub(super) fn time(unix: f64) -> String {
    if unix <= 0.0 {
        return "-".into();
    }
    OffsetDateTime::from_unix_timestamp(unix as i64)
        .ok()
        .and_then(|t| t.format(&Rfc3339).ok())
        .unwrap_or_else(|| "-".into())
}

/// `3 d 4 h`, `2 h 5 min`, `1 min 3 s` or `0.2 s`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        86400.. => format!("{} d {} h", whole / 86400, whole % 86400 / 3600),
        3600.. => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        60.. => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{:.1} s", seconds.max(0.0)),
    }
}

/// Seconds since 1970, by this machine's clock.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_prints_as_a_dash() {
        assert_eq!((lsn(0).as_str(), time(0.0).as_str()), ("-", "-"));
    }

    #[test]
    fn durations_have_two_units_at_most() {
        assert_eq!(duration(0.25), "0.2 s");
        assert_eq!(duration(63.0), "1 min 3 s");
        assert_eq!(duration(90_000.0), "1 d 1 h");
        assert_eq!(duration(-5.0), "0.0 s");
    }

    #[test]
    fn times_are_utc() {
        assert_eq!(time(946_684_800.4), "2000-01-01T00:00:00Z");
    }
}
