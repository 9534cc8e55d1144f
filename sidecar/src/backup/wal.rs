//! Waits until the server holds the WAL that a backup needs.
//!
//! WAL in an open segment counts: acknowledged WAL is durable (P1), so PostgreSQL need not switch segments. The
//! timeout restarts with progress: a slow stream is no error, one without progress is. Waiting does not fill a hole
//! below newer WAL. A hole must persist for a while before it counts, because a listing may be made while a segment
//! is being sealed.

use crate::{
    error::{Error, Failure},
    server_link::BaseLink,
};
use klio_pg::{Lsn, TimelineId};
use klio_proto::{Code, v1::HoldingsRequest};
use klio_storage::{
    catalog::{Holdings, Mark, Run, Standing},
    layout::ClusterName,
};
use std::time::Duration;
use tokio::time::Instant;

/// Pauses between two queries.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a hole must persist before it counts.
const HOLE: Duration = Duration::from_secs(5);

/// The WAL that a backup needs.
#[derive(Debug, Clone, Copy)]
pub struct Needed {
    /// The timeline of `to`.
    pub timeline: TimelineId,
    /// First needed byte.
    pub from: Lsn,
    /// One past the last needed byte.
    pub to: Lsn,
    /// The backup is taken from a standby and so begins at the standby's last restart point.
    pub standby: bool,
}

/// The server's holdings, compared with the needed WAL.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Held,
    /// It may still arrive.
    Missing(TimelineId, Run),
    /// The server already holds newer WAL.
    Hole(TimelineId, Run),
}

fn judge(holdings: &Holdings, needed: &Needed) -> Result<Verdict, klio_storage::Error> {
    let missing = holdings.first_missing(needed.timeline, needed.from, needed.to)?;
    let Some((timeline, run)) = missing else { return Ok(Verdict::Held) };
    let later = |runs: &[Run]| runs.iter().any(|held| held.start > run.start);
    let newer = holdings.timeline(timeline).is_some_and(|line| later(&line.runs));
    Ok(if newer { Verdict::Hole(timeline, run) } else { Verdict::Missing(timeline, run) })
}

/// A value that changes with all WAL that arrives: a stream that catches up may be far behind the missing WAL.
fn progress(holdings: &Holdings, (timeline, missing): (TimelineId, Run)) -> (Lsn, Option<Lsn>) {
    let runs = holdings.timeline(timeline).map(|line| line.runs.as_slice()).unwrap_or_default();
    (missing.start, runs.iter().map(|run| run.end).max())
}

/// Waits until the server holds the WAL; gives up when there was no progress for `patience`.
///
/// # Errors
/// `Unavailable` when the WAL does not arrive in time, `Gap` when it never will.
pub async fn wait(
    base: &BaseLink,
    cluster: &ClusterName,
    needed: Needed,
    patience: Duration,
) -> Result<(), Error> {
    let mut pause = PAUSE_MIN;
    let (mut hole_at, mut progress_at) = (None, None);
    let (mut hole_since, mut progress_since) = (Instant::now(), Instant::now());
    loop {
        let holdings = holdings(base, cluster).await?;
        if let Some(refusal) = retired(&holdings, needed.timeline) {
            return Err(refusal);
        }
        let verdict = judge(&holdings, &needed)
            .map_err(|error| Error::new(Failure::Code(Code::Corrupt), error))?;
        let (missing, hole) = match verdict {
            Verdict::Held => return Ok(()),
            Verdict::Missing(timeline, run) => ((timeline, run), false),
            Verdict::Hole(timeline, run) => ((timeline, run), true),
        };
        // WAL after a hole does not fill it.
        let hole_now = hole.then_some(missing.1.start);
        if hole_at != hole_now {
            (hole_at, hole_since) = (hole_now, Instant::now());
        }
        let progress = Some(progress(&holdings, missing));
        if progress_at != progress {
            (progress_at, progress_since) = (progress, Instant::now());
        }
        if hole && hole_since.elapsed() >= HOLE.min(patience) {
            return Err(never(missing, &needed));
        }
        let waited = progress_since.elapsed();
        if waited >= patience {
            return Err(not_yet(missing, waited));
        }
        tokio::time::sleep(pause.min(patience.saturating_sub(waited))).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// The server's holdings; empty when it does not know the cluster.
async fn holdings(base: &BaseLink, cluster: &ClusterName) -> Result<Holdings, Error> {
    const DOING: &str = "ask the server what WAL it holds";
    let request = HoldingsRequest { cluster: cluster.to_string() };
    let answer = base
        .call(DOING, async |mut client| Ok(client.holdings(request.clone()).await?.into_inner()))
        .await;
    match answer {
        Ok(answer) => serde_json::from_slice(&answer.holdings)
            .map_err(|e| Error::new(Failure::Code(Code::Invalid), format!("{DOING}: {e}"))),
        Err(error) if error.failure == Failure::Code(Code::NotFound) => Ok(Holdings::default()),
        Err(error) => Err(error),
    }
}

/// No more WAL is received of a timeline that a person has retired.
fn retired(holdings: &Holdings, timeline: TimelineId) -> Option<Error> {
    let is_it = |mark: &&Mark| mark.timeline == timeline && mark.standing == Standing::Retired;
    let mark = holdings.marks.iter().find(is_it)?;
    let message = format!(
        "back up timeline {}: it was retired in favour of timeline {}, and no more of its WAL is received",
        timeline.get(),
        mark.against.get()
    );
    Some(Error::new(Failure::Code(Code::RetiredTimeline), message).hint(
        "klio timeline list shows who decided; back up the PostgreSQL whose timeline is followed, or decide again with klio timeline follow",
    ))
}

fn not_yet((timeline, run): (TimelineId, Run), waited: Duration) -> Error {
    let message = format!(
        "wait for WAL of the backup: the server lacks {} to {} of timeline {timeline:?}, and nothing arrived for {:.0} s",
        run.start,
        run.end,
        waited.as_secs_f64()
    );
    Error::new(Failure::Code(Code::Unavailable), message).hint(
        "klio stream must run for this cluster and be connected: klio status shows how far the server is; \
         backup.wal_timeout sets how long to wait",
    )
}

fn never((timeline, run): (TimelineId, Run), needed: &Needed) -> Error {
    let message = format!(
        "wait for WAL of the backup: the server lacks {} to {} of timeline {timeline:?} and already holds newer WAL",
        run.start, run.end
    );
    let hint = if needed.standby {
        "a standby's backup begins at its last restart point, which is older than what klio stream began with: \
         run CHECKPOINT on the primary, then on the standby, and take the backup again"
    } else {
        "take the backup again; klio list wal shows the gap"
    };
    Error::new(Failure::Code(Code::Gap), message).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::catalog::TimelineHoldings;

    fn held(runs: &[(u64, u64)]) -> Holdings {
        let runs = runs
            .iter()
            .map(|(start, end)| Run { start: Lsn::new(*start), end: Lsn::new(*end) })
            .collect();
        let timeline = TimelineId::new(1).unwrap();
        let line = TimelineHoldings { timeline, history: None, runs, caught_up: false };
        Holdings { timelines: vec![line], ..Holdings::default() }
    }

    fn verdict(runs: &[(u64, u64)]) -> Verdict {
        let timeline = TimelineId::new(1).unwrap();
        let (from, to) = (Lsn::new(100), Lsn::new(200));
        judge(&held(runs), &Needed { timeline, from, to, standby: false }).unwrap()
    }

    #[test]
    fn a_hole_is_told_from_wal_that_may_still_come() {
        let timeline = TimelineId::new(1).unwrap();
        let run = |start, end| Run { start: Lsn::new(start), end: Lsn::new(end) };
        assert_eq!(verdict(&[(50, 200)]), Verdict::Held);
        assert_eq!(verdict(&[(50, 150)]), Verdict::Missing(timeline, run(150, 200)));
        assert_eq!(verdict(&[]), Verdict::Missing(timeline, run(100, 200)));
        assert_eq!(verdict(&[(150, 300)]), Verdict::Hole(timeline, run(100, 150)));
        assert_eq!(verdict(&[(50, 120), (150, 300)]), Verdict::Hole(timeline, run(120, 150)));
    }

    /// A backup used to wait for a minute and then said that klio stream must run.
    #[test]
    fn a_backup_of_a_retired_timeline_is_refused_at_once() {
        let [one, two] = [1, 2].map(|number| TimelineId::new(number).unwrap());
        let mut holdings = held(&[(50, 150)]);
        for (standing, refused) in
            [(Standing::Undecided, false), (Standing::Followed, false), (Standing::Retired, true)]
        {
            holdings.marks = vec![Mark {
                timeline: one,
                standing,
                against: two,
                reason: "both write".into(),
                marked_unix: 1.0,
                decided_unix: None,
                decided_by: None,
                earlier: Vec::new(),
                unknown: Default::default(),
            }];
            let refusal = retired(&holdings, one);
            assert_eq!(refusal.is_some(), refused);
            assert!(refusal.is_none_or(|e| e.message.contains("retired in favour of timeline 2")));
            assert!(retired(&holdings, two).is_none());
        }
    }

    #[test]
    fn a_stream_that_is_still_before_the_backup_comes_nearer() {
        let missing =
            (TimelineId::new(1).unwrap(), Run { start: Lsn::new(100), end: Lsn::new(200) });
        let at = |runs: &[(u64, u64)]| progress(&held(runs), missing);
        assert_ne!(at(&[(10, 20)]), at(&[(10, 30)]));
        assert_eq!(at(&[(10, 30)]), at(&[(10, 30)]));
        assert_eq!(progress(&Holdings::default(), missing).1, None);
    }
}
