//! Waits until the server holds the WAL that a backup needs.
//!
//! The open segment counts: what the server acknowledged is durable (P1), so no segment has to be switched.
//! Patience is measured in progress, not in time: a slow link is no error, a link that stands still is.
//! A hole in what is held already will not be filled by waiting; it is looked at twice over, because a
//! listing can be made while a segment is being sealed.

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

/// Between two looks.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a hole must stay one.
const HOLE: Duration = Duration::from_secs(5);

/// WAL that has to be there.
#[derive(Debug, Clone, Copy)]
pub struct Needed {
    /// The timeline of `to`.
    pub timeline: TimelineId,
    /// First byte.
    pub from: Lsn,
    /// One past the last.
    pub to: Lsn,
    /// Taken from a standby: it begins where that one's last restart point is.
    pub standby: bool,
}

/// What holdings say about it.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Held,
    /// It may still come.
    Missing(TimelineId, Run),
    /// Newer WAL is held already.
    Hole(TimelineId, Run),
}

fn judge(holdings: &Holdings, needed: &Needed) -> Result<Verdict, klio_storage::Error> {
    let missing = holdings.first_missing(needed.timeline, needed.from, needed.to)?;
    let Some((timeline, run)) = missing else { return Ok(Verdict::Held) };
    let later = |runs: &[Run]| runs.iter().any(|held| held.start > run.start);
    let newer = holdings.timeline(timeline).is_some_and(|line| later(&line.runs));
    Ok(if newer { Verdict::Hole(timeline, run) } else { Verdict::Missing(timeline, run) })
}

/// Changes with whatever comes: a stream that catches up may be far before what is missing.
fn progress(holdings: &Holdings, (timeline, missing): (TimelineId, Run)) -> (Lsn, Option<Lsn>) {
    let runs = holdings.timeline(timeline).map(|line| line.runs.as_slice()).unwrap_or_default();
    (missing.start, runs.iter().map(|run| run.end).max())
}

/// Waits for it; gives up when nothing more came for `patience`.
///
/// # Errors
/// `Unavailable` when it does not come, `Gap` when it never will.
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
        // What comes behind a hole is no progress for it.
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

/// What the server holds; nothing when it does not know the cluster.
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

/// Nothing more is received of a timeline against which a person decided.
fn retired(holdings: &Holdings, timeline: TimelineId) -> Option<Error> {
    let is_it = |mark: &&Mark| mark.timeline == timeline && mark.standing == Standing::Retired;
    let mark = holdings.marks.iter().find(is_it)?;
    let message = format!(
        "back up timeline {}: it was retired in favour of timeline {}, and no more of its WAL is received",
        timeline.get(),
        mark.against.get()
    );
    Some(Error::new(Failure::Code(Code::RetiredTimeline), message).hint(
        "klio timeline list says who decided; back up the PostgreSQL that is followed, or decide again with klio timeline follow",
    ))
}

fn not_yet((timeline, run): (TimelineId, Run), waited: Duration) -> Error {
    let message = format!(
        "wait for WAL of the backup: the server lacks {} to {} of timeline {timeline:?}, and nothing came for {:.0} s",
        run.start,
        run.end,
        waited.as_secs_f64()
    );
    Error::new(Failure::Code(Code::Unavailable), message).hint(
        "klio stream must run for this cluster and be connected: klio status shows how far the server is; \
         backup.wal_timeout says how long to wait",
    )
}

fn never((timeline, run): (TimelineId, Run), needed: &Needed) -> Error {
    let message = format!(
        "wait for WAL of the backup: the server lacks {} to {} of timeline {timeline:?} and already has what follows",
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

    /// It waited for a minute, and then said that klio stream must run.
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
