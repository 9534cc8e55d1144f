//! Faults of an object store, to switch on and off.
//!
//! Rules are tried in the order they were added; the first that fits a request decides. [`Faults::heal`] removes all and lets
//! hanging requests fail at once.

use hyper::{Method, StatusCode};
use std::{
    sync::Mutex,
    time::{Duration, Instant},
};
use tokio::sync::watch;

/// How many requests are remembered one by one; the number of all is always right.
const REMEMBERED: usize = 100_000;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Status 500, `InternalError`.
    InternalError,
    /// Status 503, `SlowDown`.
    SlowDown,
    /// Any other status, with an S3 error body.
    Status(u16),
    /// No answer until healed (or the client gives up).
    Hang,
    /// The connection is reset (a TCP RST) instead of an answer.
    Reset,
    /// The request is carried out after this time.
    Delay(Duration),
    /// Status 200 without doing anything: a store that loses what it acknowledged.
    Lie,
}

/// A fault and the requests it meets.
#[derive(Debug, Clone)]
pub struct Rule {
    fault: Fault,
    method: Option<Method>,
    path: Option<String>,
    left: Option<u64>,
}

impl Rule {
    /// Meets every request until healed.
    #[must_use]
    pub fn always(fault: Fault) -> Self {
        Self { fault, method: None, path: None, left: None }
    }

    /// Only requests with this method.
    #[must_use]
    pub fn on(mut self, method: Method) -> Self {
        self.method = Some(method);
        self
    }

    /// Only requests whose path (`/bucket/key`, percent-encoded) and query contain this.
    #[must_use]
    pub fn path(mut self, part: &str) -> Self {
        self.path = Some(part.to_owned());
        self
    }

    /// Only this many times.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.left = Some(times);
        self
    }

    fn meets(&self, method: &Method, path: &str) -> bool {
        self.left != Some(0)
            && self.method.as_ref().is_none_or(|m| m == method)
            && self.path.as_ref().is_none_or(|p| path.contains(p))
    }
}

/// A request as it was seen, with how it was answered.
#[derive(Debug, Clone)]
pub struct Seen {
    /// When it came.
    pub at: Instant,
    /// Its method.
    pub method: Method,
    /// `/bucket/key?query`, percent-encoded.
    pub path: String,
    /// The fault that met it.
    pub fault: Option<Fault>,
    /// The answer; `None` while none was given.
    pub status: Option<StatusCode>,
}

/// The switchboard of a server, and its record of requests.
#[derive(Debug)]
pub struct Faults {
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<Seen>>,
    healed: watch::Sender<u64>,
}

impl Default for Faults {
    fn default() -> Self {
        let (rules, seen) = (Mutex::default(), Mutex::default());
        Self { rules, seen, healed: watch::Sender::new(0) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Faults {
    /// Adds a rule.
    pub fn inject(&self, rule: Rule) {
        lock(&self.rules).push(rule);
    }

    /// Removes all rules.
    pub fn heal(&self) {
        lock(&self.rules).clear();
        self.healed.send_modify(|n| *n += 1);
    }

    /// All requests so far (the first hundred thousand).
    #[must_use]
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.seen).clone()
    }

    /// How many requests fit.
    #[must_use]
    pub fn count(&self, fits: impl Fn(&Seen) -> bool) -> usize {
        lock(&self.seen).iter().filter(|s| fits(s)).count()
    }

    /// Returns when the rules are next removed. Cancel-safe.
    pub(super) async fn until_healed(&self) {
        let mut healed = self.healed.subscribe();
        healed.mark_unchanged();
        // An error means that the server is gone, which heals as well.
        let _ = healed.changed().await;
    }

    /// Notes a request and returns its number and its fault.
    pub(super) fn meet(&self, method: &Method, path: &str) -> (usize, Option<Fault>) {
        let fault = {
            let mut rules = lock(&self.rules);
            rules.iter_mut().find(|r| r.meets(method, path)).map(|rule| {
                rule.left = rule.left.map(|n| n - 1);
                rule.fault
            })
        };
        let mut seen = lock(&self.seen);
        if seen.len() < REMEMBERED {
            let (method, path) = (method.clone(), path.to_owned());
            seen.push(Seen { at: Instant::now(), method, path, fault, status: None });
            return (seen.len() - 1, fault);
        }
        (usize::MAX, fault)
    }

    pub(super) fn answered(&self, number: usize, status: StatusCode) {
        if let Some(seen) = lock(&self.seen).get_mut(number) {
            seen.status = Some(status);
        }
    }
}
