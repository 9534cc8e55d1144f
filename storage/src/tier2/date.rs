//! The bucket's clock, from the Date header of its HTTP answers.
//!
//! It is only used to raise a doubt: before anything is removed because of its age, the server's clock is
//! compared with it (P6).

use object_store::client::HttpResponse;
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

/// The last time that the bucket reported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeardDate {
    /// The reported time, Unix seconds.
    pub date_unix: f64,
    /// When it was received, by the monotonic clock.
    pub heard: Instant,
}

impl HeardDate {
    /// How many seconds the bucket's clock is ahead of one that says `wall_unix` now.
    pub fn ahead_of(&self, wall_unix: f64, now: Instant) -> f64 {
        self.date_unix + now.saturating_duration_since(self.heard).as_secs_f64() - wall_unix
    }
}

/// Shared by a store and its connections.
#[derive(Debug, Clone, Default)]
pub(super) struct Dates(Arc<Mutex<Option<HeardDate>>>);

impl Dates {
    pub(super) fn last(&self) -> Option<HeardDate> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn hear(&self, response: &HttpResponse) {
        let date = response.headers().get("date").and_then(|date| date.to_str().ok());
        if let Some(date_unix) = date.and_then(read) {
            let heard = HeardDate { date_unix, heard: Instant::now() };
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(heard);
        }
    }
}

/// Parses a Date header to Unix seconds; `None` if it cannot be parsed.
fn read(date: &str) -> Option<f64> {
    Some(jiff::fmt::rfc2822::parse(date).ok()?.timestamp().as_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_date_header_says_how_far_the_clocks_are_apart() {
        assert_eq!(read("Mon, 30 Nov 2026 07:00:00 GMT"), Some(1_796_022_000.0));
        for bad in ["", "yesterday", "Mon, 99 Nov 2026 07:00:00 GMT"] {
            assert_eq!(read(bad), None, "{bad}");
        }
        // A date that was received before this machine's clock was changed still gives the current time.
        let (heard, minute) = (Instant::now(), Duration::from_secs(60));
        let date = HeardDate { date_unix: 1000.0, heard };
        assert_eq!(date.ahead_of(1060.0, heard + minute), 0.0);
        assert_eq!(date.ahead_of(9060.0, heard + minute), -8000.0);
    }
}
