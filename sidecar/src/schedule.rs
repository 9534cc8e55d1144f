//! When backups are due: five cron fields and a time zone, UTC if there is none: `0 2 * * * Europe/Berlin`.
//!
//! A local time that occurs twice counts once; one that daylight saving time skips counts, too.

use cronexpr::Crontab;
use jiff::{Timestamp, tz::TimeZone};

/// The setting `backup.schedule`.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// Evaluated on local time as if it were UTC; this type handles the time zone.
    fields: Crontab,
    zone: TimeZone,
}

impl Schedule {
    /// Parses the setting.
    ///
    /// # Errors
    /// A message that says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            format!(
                "expected five cron fields and a time zone, such as 0 2 * * * Europe/Berlin, found {text:?}: {why}"
            )
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        let (fields, zone) = match words.as_slice() {
            [_, _, _, _, _] => (words.as_slice(), "UTC"),
            [fields @ .., zone] if fields.len() == 5 => (fields, *zone),
            _ => return Err(wrong(&format!("{} words", words.len()))),
        };
        let zone = TimeZone::get(zone).map_err(|_| wrong("no such time zone"))?;
        let fields =
            cronexpr::parse_crontab(&format!("{} UTC", fields.join(" "))).map_err(|e| {
                // The crate's error message draws an arrow below the text, over several lines.
                wrong(&e.to_string().split_whitespace().collect::<Vec<_>>().join(" "))
            })?;
        Ok(Self { fields, zone })
    }

    /// The first run after `after`; `None` if there is none within four years.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        let mut shown = self.zone.to_datetime(after);
        loop {
            let from = shown.to_zoned(TimeZone::UTC).ok()?.timestamp();
            shown = self.fields.find_next(from).ok()?.datetime();
            // jiff's "compatible": a time that occurs twice means its first occurrence; a time that daylight saving
            // time skips is moved forward by the skipped time.
            let next = self.zone.to_ambiguous_zoned(shown).compatible().ok()?.timestamp();
            if next > after {
                return Some(next);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn next(schedule: &str, after: &str) -> String {
        Schedule::parse(schedule).unwrap().next(at(after)).unwrap().to_string()
    }

    #[test]
    fn a_day_has_one_backup_whatever_the_clocks_do() {
        let daily = "30 2 * * * Europe/Berlin";
        assert_eq!(next(daily, "2026-11-20T12:00:00Z"), "2026-11-21T01:30:00Z");
        // 2027-03-28: clocks go from 2:00 to 3:00, and 2:30 does not exist.
        assert_eq!(next(daily, "2027-03-27T02:00:00Z"), "2027-03-28T01:30:00Z");
        assert_eq!(next(daily, "2027-03-28T01:30:00Z"), "2027-03-29T00:30:00Z");
        assert_eq!(next(daily, "2027-03-28T00:59:00Z"), "2027-03-28T01:30:00Z");
        // 2027-10-31: 2:30 local time occurs at 0:30 and again at 1:30 UTC.
        assert_eq!(next(daily, "2027-10-30T12:00:00Z"), "2027-10-31T00:30:00Z");
        assert_eq!(next(daily, "2027-10-31T00:30:00Z"), "2027-11-01T01:30:00Z");
        assert_eq!(next(daily, "2027-10-31T01:10:00Z"), "2027-11-01T01:30:00Z");
        let often = "*/30 * * * * Europe/Berlin";
        assert_eq!(next(often, "2027-03-28T00:30:00Z"), "2027-03-28T01:00:00Z");
    }

    #[test]
    fn without_a_zone_it_is_utc() {
        assert_eq!(next("0 2 * * *", "2026-11-20T12:00:00Z"), "2026-11-21T02:00:00Z");
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_an_example() {
        for bad in ["daily", "* * *", "61 * * * *", "0 2 * * * Mars/Olympus", "0 0 0 2 * * *"] {
            let problem = Schedule::parse(bad).unwrap_err();
            assert!(problem.contains("0 2 * * * Europe/Berlin"), "{problem}");
            assert!(!problem.contains('\n'), "{problem}");
        }
    }
}
