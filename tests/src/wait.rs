//! Waiting for a condition with a deadline: the only way a test may wait.
//!
//! The check is repeated until it holds; after the deadline the test panics with what was awaited and the last answer.

use std::{
    fmt::Debug,
    future::Future,
    time::{Duration, Instant},
};

/// First pause between two checks; it grows to [`SLOWEST`].
const QUICKEST: Duration = Duration::from_millis(5);
/// Two cores serve all tests: a check more often than this would slow down what it waits for.
const SLOWEST: Duration = Duration::from_millis(100);

/// What a check may answer: `bool`, `Option<T>` or `Result<T, E>`.
pub trait Answer {
    /// What is returned once the condition holds.
    type Value;
    /// The value, or what was seen instead.
    ///
    /// # Errors
    /// Not yet.
    fn settled(self) -> Result<Self::Value, String>;
}

impl Answer for bool {
    type Value = ();
    fn settled(self) -> Result<(), String> {
        if self { Ok(()) } else { Err("false".to_owned()) }
    }
}

impl<T> Answer for Option<T> {
    type Value = T;
    fn settled(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing".to_owned())
    }
}

impl<T, E: Debug> Answer for Result<T, E> {
    type Value = T;
    fn settled(self) -> Result<T, String> {
        self.map_err(|e| format!("{e:?}"))
    }
}

/// Repeats `check` until it holds and returns its value.
///
/// # Panics
/// When it does not hold within `deadline` (one check may run past it).
pub async fn eventually<A, F, Fut>(what: &str, deadline: Duration, mut check: F) -> A::Value
where
    A: Answer,
    F: FnMut() -> Fut,
    Fut: Future<Output = A>,
{
    let begin = Instant::now();
    let mut pause = QUICKEST;
    loop {
        match check().await.settled() {
            Ok(value) => return value,
            Err(seen) if begin.elapsed() >= deadline => {
                panic!("waited {:.1?} for: {what}; last seen: {seen}", begin.elapsed())
            }
            Err(_) => tokio::time::sleep(pause).await,
        }
        pause = (pause * 2).min(SLOWEST);
    }
}

/// The same for a check that does not wait itself.
///
/// # Panics
/// As [`eventually`].
pub async fn eventually_now<A, F>(what: &str, deadline: Duration, mut check: F) -> A::Value
where
    A: Answer,
    F: FnMut() -> A,
{
    eventually(what, deadline, || std::future::ready(check())).await
}

/// Checks that a condition holds all the time for `period`: for "nothing happens" tests.
///
/// # Panics
/// As soon as it does not hold.
pub async fn throughout<F, Fut>(what: &str, period: Duration, mut check: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let begin = Instant::now();
    while begin.elapsed() < period {
        assert!(check().await, "after {:.1?} no longer true: {what}", begin.elapsed());
        tokio::time::sleep(SLOWEST).await;
    }
}

#[cfg(test)]
mod tests {
    use super::{eventually, eventually_now};
    use std::time::Duration;

    #[tokio::test]
    async fn the_value_is_returned_once_the_condition_holds() {
        let mut tries = 0;
        let value = eventually_now("third try", Duration::from_secs(10), || {
            tries += 1;
            (tries == 3).then_some("value")
        })
        .await;
        assert_eq!((value, tries), ("value", 3));
    }

    #[tokio::test]
    #[should_panic(expected = "for: the impossible; last seen: \"no\"")]
    async fn a_condition_that_never_holds_ends_with_what_was_seen_last() {
        let never = || async { Err::<(), _>("no") };
        eventually("the impossible", Duration::from_millis(30), never).await;
    }
}
