//! Hours, days, weeks, months and years of the calendar, in UTC.

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Period {
    Hour,
    Day,
    Week,
    Month,
    Year,
}

impl Period {
    /// The name of the rule.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Period::Hour => "hourly",
            Period::Day => "daily",
            Period::Week => "weekly",
            Period::Month => "monthly",
            Period::Year => "yearly",
        }
    }

    /// The name of the period that contains a time. Later periods compare greater for the years 0
    /// to 9999.
    pub(super) fn of(self, unix: f64) -> Option<String> {
        let at = civil(unix)?;
        Some(match self {
            Period::Hour => at.strftime("%Y-%m-%d %H:00").to_string(),
            Period::Day => at.strftime("%Y-%m-%d").to_string(),
            Period::Week => {
                let week = at.date().iso_week_date();
                format!("{:04}-W{:02}", week.year(), week.week())
            }
            Period::Month => at.strftime("%Y-%m").to_string(),
            Period::Year => at.strftime("%Y").to_string(),
        })
    }
}

/// Formats a time as `2026-11-21 07:57 UTC`.
pub(super) fn moment(unix: f64) -> String {
    civil(unix)
        .map_or_else(|| format!("{unix}"), |at| at.strftime("%Y-%m-%d %H:%M UTC").to_string())
}

fn civil(unix: f64) -> Option<DateTime> {
    // Whole seconds: `as` saturates, and jiff refuses values that are not a valid time.
    let at = Timestamp::from_second(unix.floor() as i64).ok()?;
    Some(at.to_zoned(TimeZone::UTC).datetime())
}
