//! Reads and shows times for `--target-time`.
//!
//! A time that could mean two moments, or that states two different ones, is refused: a restore to the wrong hour
//! looks like a good one. The formats are PostgreSQL's own output, RFC 3339, and RFC 9557 with its time zone in
//! brackets. Without an offset or zone, the time is in this machine's zone. Abbreviations such as CET or EST are
//! refused, because they mean different things to PostgreSQL and to the time zone database.

use jiff::{
    Timestamp,
    civil::{self, DateTime},
    tz::{Offset, TimeZone},
};

/// Reads a time such as `2026-11-21 14:03:00.5+01`, `2026-11-21T13:03:00Z` or `2026-11-21 14:03[Europe/Berlin]`, and
/// returns microseconds since 1970.
///
/// # Errors
/// What is wrong with the text, as text for the user.
pub fn parse_time(text: &str) -> Result<i64, String> {
    parse_in(text, &TimeZone::system())
}

/// A moment in UTC and in this machine's zone, so that the user sees how the time was understood.
pub fn explain_time(unix_micros: i64) -> String {
    explain_in(unix_micros, TimeZone::system())
}

/// A time in UTC in the format that PostgreSQL reads and prints.
pub fn show_time(unix_micros: i64) -> String {
    Timestamp::from_microsecond(unix_micros).map_or_else(
        |_| format!("{unix_micros} microseconds after 1970"),
        |time| time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string(),
    )
}

fn explain_in(unix_micros: i64, zone: TimeZone) -> String {
    let utc = show_time(unix_micros);
    let Ok(time) = Timestamp::from_microsecond(unix_micros) else { return utc };
    let local = time.to_zoned(zone);
    let name = local.time_zone().iana_name().map_or_else(String::new, |name| format!(" {name}"));
    format!("{utc} (here: {}{name})", local.strftime("%Y-%m-%d %H:%M:%S%.6f%:z"))
}

/// The zone that the text names.
enum Zone {
    Offset(Offset),
    Named(TimeZone),
}

fn parse_in(text: &str, system: &TimeZone) -> Result<i64, String> {
    let text = text.trim();
    let wrong = || {
        format!(
            "expected a time such as '2026-11-21 14:03:00+01', 2026-11-21T13:03:00Z or '2026-11-21 14:03[Europe/Berlin]', \
             found {text:?}"
        )
    };
    let (rest, annotation) = annotation(text).ok_or_else(wrong)?;
    let (clock, suffix) = rest.split_at(clock_bytes(rest).ok_or_else(wrong)?);
    let local = local(clock).ok_or_else(wrong)?;
    let suffix = match suffix.trim() {
        "" => None,
        suffix => Some(zone(suffix, &wrong)?),
    };
    let annotation = annotation.map(|inner| zone(inner, &wrong)).transpose()?;
    let moment = match (suffix, annotation) {
        (None, None) => in_zone(local, system, text)?,
        (Some(only), None) | (None, Some(only)) => at(local, &only, text)?,
        (Some(first), Some(second)) => {
            let moment = at(local, &first, text)?;
            agrees(moment, rest, &second).map_err(|problem| format!("{text:?}: {problem}"))?;
            moment
        }
    };
    Ok(moment.as_microsecond())
}

/// Splits off the `[...]` at the end. Only one pair of brackets with a zone in it is accepted.
fn annotation(text: &str) -> Option<(&str, Option<&str>)> {
    let Some(open) = text.find('[') else {
        return (!text.contains(']')).then_some((text, None));
    };
    let inner = text[open + 1..].strip_suffix(']')?;
    let inner = inner.strip_prefix('!').unwrap_or(inner);
    let plain = !inner.is_empty() && !inner.contains(['[', ']', '=']);
    plain.then(|| (text[..open].trim_end(), Some(inner)))
}

/// Length of date and time of day. The date contains signs as an offset does, so it is matched as a whole.
fn clock_bytes(text: &str) -> Option<usize> {
    const DATE: usize = "2026-11-21".len();
    let date = text.get(..DATE)?;
    let behind = &text[DATE..];
    date.parse::<civil::Date>().ok()?;
    let Some(time) = behind.strip_prefix(['T', 't', ' ']) else {
        return behind.is_empty().then_some(DATE);
    };
    let digits = time.bytes().take_while(|b| b.is_ascii_digit() || b":.".contains(b)).count();
    (digits > 0).then_some(DATE + 1 + digits)
}

/// The date and time of day. A leap second is refused, because PostgreSQL cannot represent it.
fn local(clock: &str) -> Option<DateTime> {
    let (_, time) = clock.split_at_checked("2026-11-21T".len()).unwrap_or((clock, ""));
    if time.split(':').nth(2).is_some_and(|seconds| seconds.starts_with("60")) {
        return None;
    }
    clock.trim_end().replacen('t', "T", 1).parse().ok()
}

/// Reads `Z`, `UTC`, `+01`, `+0100`, `+01:00`, `+01:00:00`, `Europe/Berlin`, and Go's `+0000 UTC`.
fn zone(text: &str, wrong: &impl Fn() -> String) -> Result<Zone, String> {
    if ["Z", "UTC", "GMT", "+0000 UTC", "Etc/UTC"].iter().any(|utc| text.eq_ignore_ascii_case(utc))
    {
        return Ok(Zone::Offset(Offset::UTC));
    }
    if text.starts_with(['+', '-']) {
        return offset(text).map(Zone::Offset).ok_or_else(wrong);
    }
    if !text.contains('/') {
        return Err(format!(
            "{}: time zones are named as in Europe/Berlin, or given as an offset, as in +01",
            wrong()
        ));
    }
    TimeZone::get(text).map(Zone::Named).map_err(|_| {
        format!("{}: there is no time zone {text:?} in this machine's database", wrong())
    })
}

fn offset(text: &str) -> Option<Offset> {
    let (sign, digits) = text.split_at(1);
    let parts: Vec<&str> = match digits.len() {
        2 => vec![digits],
        4 if !digits.contains(':') => vec![digits.get(..2)?, digits.get(2..)?],
        5 | 8 => digits.split(':').collect(),
        _ => return None,
    };
    let mut seconds = 0;
    for (part, unit) in parts.iter().zip([3600, 60, 1]) {
        let two = part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
        let number = part.parse::<i32>().ok().filter(|_| two)?;
        // PostgreSQL accepts only offsets below 16 hours.
        let below = if unit == 3600 { 16 } else { 60 };
        seconds += (number < below).then_some(number * unit)?;
    }
    let seconds = if sign == "-" { -seconds } else { seconds };
    Offset::from_seconds(seconds).ok()
}

fn at(local: DateTime, zone: &Zone, text: &str) -> Result<Timestamp, String> {
    match zone {
        Zone::Offset(offset) => {
            offset.to_timestamp(local).map_err(|_| format!("{text:?} is out of range"))
        }
        Zone::Named(zone) => in_zone(local, zone, text),
    }
}

fn in_zone(local: DateTime, zone: &TimeZone, text: &str) -> Result<Timestamp, String> {
    let time = zone.to_ambiguous_zoned(local).unambiguous();
    time.map(|time| time.timestamp()).map_err(|_| {
        let name = zone.iana_name().unwrap_or("this machine's time zone");
        format!("{text:?} happens twice or never in {name}: add the offset, as in +01")
    })
}

/// Checks that the zone in brackets agrees with the first offset. After `Z` it always does: the time is in UTC then,
/// and the zone only says how to display it (RFC 9557, section 2).
fn agrees(moment: Timestamp, said: &str, second: &Zone) -> Result<(), String> {
    if said.ends_with(['Z', 'z']) {
        return Ok(());
    }
    let there = match second {
        Zone::Offset(offset) => *offset,
        Zone::Named(zone) => zone.to_offset(moment),
    };
    let digits = said.len() - clock_bytes(said).unwrap_or(0);
    let first = said[said.len() - digits..].trim();
    let same = match offset(first) {
        Some(first) => first == there,
        None => there == Offset::UTC,
    };
    if same {
        return Ok(());
    }
    Err(format!(
        "{first} contradicts the zone in brackets, which is {there} at that time: give only one of the two"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn berlin() -> TimeZone {
        TimeZone::get("Europe/Berlin").unwrap()
    }

    fn parse(text: &str) -> Result<String, String> {
        parse_in(text, &berlin()).map(show_time)
    }

    #[test]
    fn times_are_read_as_postgres_prints_them_as_rfc_3339_and_as_rfc_9557() {
        for text in [
            "2026-11-21 14:03:00.5+01",
            "2026-11-21 14:03:00.5 +01",
            "2026-11-21 14:03:00.5+01:00",
            "2026-11-21 18:33:00.5+0530",
            "2026-11-21 18:33:00.5 +05:30",
            "2026-11-21 09:33:00.5-03:30",
            "2026-11-21T13:03:00.5Z",
            "2026-11-21t13:03:00.5z",
            "2026-11-21 13:03:00.500000+00",
            "2026-11-21 13:03:00.5 +0000 UTC",
            " 2026-11-21 13:03:00.5 UTC ",
            "2026-11-21 14:03:00.5",
            "2026-11-21T14:03:00.5",
            "2026-11-21 14:03:00.5[Europe/Berlin]",
            "2026-11-21 14:03:00.5 [Europe/Berlin]",
            "2026-11-21 14:03:00.5 Europe/Berlin",
            "2026-11-21T08:03:00.5[America/New_York]",
            "2026-11-21T08:03:00.5-05[America/New_York]",
            "2026-11-21T08:03:00.5-05:00[!America/New_York]",
            "2026-11-21T13:03:00.5Z[America/New_York]",
            "2026-11-21T14:03:00.5[+01:00]",
        ] {
            assert_eq!(parse(text).as_deref(), Ok("2026-11-21 13:03:00.500000+00"), "{text}");
        }
        assert_eq!(parse("2026-11-21").unwrap(), "2026-11-20 23:00:00.000000+00");
        assert_eq!(parse("2026-07-21 14:03").unwrap(), "2026-07-21 12:03:00.000000+00");
    }

    #[test]
    fn what_could_mean_another_moment_is_refused() {
        for bad in [
            "",
            "yesterday",
            "now",
            "14:03",
            "2026-13-01 00:00:00+00",
            "1795266180",
            "@1795266180",
            "21.11.2026 14:03",
            "11/21/2026 14:03",
            "2026-11-21 14:03:60+00",
            "2026-11-21 24:00:00+00",
            "2026-11-21 14:03:00 PM",
            "2026-11-21 14:03:00 BC",
            "2026-11-21 14:03:00 CET",
            "2026-11-21 14:03:00 EST",
            "2026-11-21 14:03:00+1",
            "2026-11-21 14:03:00+99",
            "2026-11-21 14:03:00+01:60",
            "2026-11-21 14:03:00[Europe/Berlin",
            "2026-11-21 14:03:00[]",
            "2026-11-21 14:03:00[Europe/Nowhere]",
            "2026-11-21 14:03:00[Europe/Berlin][u-ca=hebrew]",
            "2026-11-21 14:03:00[u-ca=gregory]",
            // Twice, and never.
            "2026-10-25 02:30:00",
            "2026-10-25 02:30:00[Europe/Berlin]",
            "2026-03-29 02:30:00",
        ] {
            assert!(parse(bad).is_err(), "{bad}: {:?}", parse(bad));
        }
        for bad in [
            "2026-12-01 12:00:00-05:00[Europe/Berlin]",
            "2026-07-01 12:00:00+01[Europe/Berlin]",
            "2026-12-01 12:00:00 UTC[Europe/Berlin]",
            "2026-12-01 12:00:00+01[+02:00]",
        ] {
            assert!(parse(bad).unwrap_err().contains("contradicts"), "{bad}: {:?}", parse(bad));
        }
        let twice = "2026-10-25 02:30:00+01:00[Europe/Berlin]";
        assert_eq!(parse(twice).unwrap(), "2026-10-25 01:30:00.000000+00");
    }

    proptest! {
        /// Everything that an operator types or pastes is either one moment or an error, and what `explain_time`
        /// showed is read as the same moment.
        #[test]
        fn no_text_makes_it_panic(
            any in "\\PC{0,40}",
            near in "[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}[ T][0-9:.]{0,15} ?[-+0-9:Za-zA-Z/\\[\\]=!]{0,20}",
            micros in -62_000_000_000_000_000i64..253_000_000_000_000_000,
        ) {
            for text in [&any, &near] {
                if let Ok(moment) = parse_in(text, &berlin()) {
                    prop_assert_eq!(parse_in(&show_time(moment), &berlin()), Ok(moment), "{}", text);
                }
            }
            prop_assert_eq!(parse_in(&show_time(micros), &berlin()), Ok(micros));
            let _ = (explain_in(micros, berlin()), show_time(micros.wrapping_mul(1000)));
        }
    }

    #[test]
    fn what_was_understood_is_shown_in_utc_and_in_local_time() {
        assert_eq!(
            explain_in(1_795_266_180_500_000, berlin()),
            "2026-11-21 13:03:00.500000+00 (here: 2026-11-21 14:03:00.500000+01:00 Europe/Berlin)"
        );
    }
}
