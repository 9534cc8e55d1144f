//! Counts how often in a row the same request, identified by method and URI, has failed before.
//!
//! The retry layer above sends copies and does not report it. The memory is bounded: if many requests fail, the
//! oldest are forgotten and count from 0 again. While nothing fails, this costs one lookup in an empty list.

use object_store::client::HttpRequest;
use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Far more than there are concurrent uploads.
const FAILING_MAX: usize = 256;

/// A request that failed.
#[derive(Debug)]
struct Failing {
    what: String,
    times: u64,
}

/// The failing requests of one client.
#[derive(Debug, Default)]
pub(super) struct Attempts(Mutex<VecDeque<Failing>>);

/// One attempt to send a request.
#[derive(Debug)]
pub(super) struct Attempt<'a> {
    of: &'a Attempts,
    what: String,
    retries: u64,
}

impl Attempts {
    /// Called when a request is about to be sent.
    pub(super) fn begin(&self, request: &HttpRequest) -> Attempt<'_> {
        self.sending(format!("{} {}", request.method(), request.uri()))
    }

    fn sending(&self, what: String) -> Attempt<'_> {
        let retries = self.lock().iter().find(|f| f.what == what).map_or(0, |f| f.times);
        Attempt { of: self, what, retries }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Failing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt<'_> {
    /// 0 for the first attempt.
    pub(super) const fn retries(&self) -> u64 {
        self.retries
    }

    /// Called when the attempt ended; `again` says whether the request may be sent again.
    pub(super) fn ended(&mut self, again: bool) {
        let mut failing = self.of.lock();
        failing.retain(|f| f.what != self.what);
        if again {
            failing.truncate(FAILING_MAX - 1);
            failing.push_front(Failing { what: self.what.clone(), times: self.retries + 1 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(attempts: &Attempts, what: &str, fails: bool) -> u64 {
        let mut attempt = attempts.sending(what.to_owned());
        attempt.ended(fails);
        attempt.retries()
    }

    #[test]
    fn repetitions_are_counted_until_an_answer_comes() {
        let attempts = Attempts::default();
        assert_eq!(
            [true, true, false, true].map(|fails| send(&attempts, "PUT /a", fails)),
            [0, 1, 2, 0]
        );
        assert_eq!(send(&attempts, "GET /a", true), 0, "another request");
    }

    #[test]
    fn what_fails_for_ever_does_not_fill_memory() {
        let attempts = Attempts::default();
        for number in 0..1000 {
            send(&attempts, &format!("PUT /{number}"), true);
        }
        assert_eq!(attempts.lock().len(), FAILING_MAX);
        assert_eq!(send(&attempts, "PUT /999", false), 1);
        assert_eq!(send(&attempts, "PUT /0", false), 0);
    }
}
