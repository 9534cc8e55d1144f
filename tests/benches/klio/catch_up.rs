//! Catch-up: how fast a slot that holds gigabytes is drained, at what cost, and whether the bucket keeps up.

use crate::{
    drain::{self, Lag, Run},
    options::Options,
    stats::Series,
    table,
    workload::Workload,
};
use klio_tests::s3::S3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    Lz4,
    Klio,
    KlioTier2,
}

const WAYS: [Way; 4] = [Way::Plain, Way::Lz4, Way::Klio, Way::KlioTier2];

/// As far may tier 2 be behind tier 1.
const TARGET_SEGMENTS: f64 = 2.0;

/// What each process is called in the table.
const ROLES: [&str; 6] =
    ["walsender", "pg_receivewal", "sidecar", "server", "queue", "bucket and bench"];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "pg_receivewal",
            Self::Lz4 => "pg_receivewal --compress=lz4",
            Self::Klio => "klio, tier 1",
            Self::KlioTier2 => "klio, tier 1 and S3",
        }
    }

    fn is_klio(self) -> bool {
        matches!(self, Self::Klio | Self::KlioTier2)
    }

    async fn run(self, load: &Workload) -> Run {
        match self {
            Self::Plain => drain::receivewal(load, &[]).await,
            Self::Lz4 => drain::receivewal(load, &["--compress=lz4"]).await,
            Self::Klio => drain::klio(load, None).await,
            Self::KlioTier2 => drain::klio(load, Some(&S3::new())).await,
        }
    }
}

/// Runs and prints it.
pub async fn run(load: &Workload, options: &Options) {
    let mut rounds: Vec<Vec<(Way, Run)>> = Vec::new();
    for round in 0..options.rounds() {
        let mut order = WAYS;
        // Each way is first, second, ... equally often.
        order.rotate_left(round % WAYS.len());
        let mut runs = Vec::new();
        for way in order.into_iter().filter(|w| options.with_klio() || !w.is_klio()) {
            let run = way.run(load).await;
            let (speed, cpu) = (load.megabytes() / run.seconds, &run.cpu);
            eprintln!(
                "catch_up round {}: {}: {speed:.0} MB/s, cpu {cpu:.2?}",
                round + 1,
                way.name()
            );
            runs.push((way, run));
        }
        rounds.push(runs);
    }
    print_speed(load, &rounds);
    print_cost(load, &rounds);
    print_lag(&rounds);
}

fn of(rounds: &[Vec<(Way, Run)>], way: Way) -> impl Iterator<Item = &Run> {
    rounds.iter().flatten().filter(move |(w, _)| *w == way).map(|(_, run)| run)
}

fn print_speed(load: &Workload, rounds: &[Vec<(Way, Run)>]) {
    let seconds = |way: Way| of(rounds, way).map(|r| r.seconds).collect::<Vec<f64>>();
    // Each round against pg_receivewal of the same round.
    let ratio = |way: Way, to: Way| -> Series {
        seconds(way).iter().zip(seconds(to)).map(|(own, other)| other / own).collect()
    };
    let rows: Vec<Vec<String>> = WAYS
        .iter()
        .map(|&way| {
            let speed: Series = seconds(way).iter().map(|s| load.megabytes() / s).collect();
            let settled: Series = of(rounds, way).map(|r| r.settled_seconds - r.seconds).collect();
            vec![
                way.name().to_owned(),
                speed.show(0),
                ratio(way, Way::Plain).show(2),
                ratio(way, Way::Lz4).show(2),
                settled.show(2),
            ]
        })
        .collect();
    let title = format!("Catch-up: {:.0} MB of WAL, {} rounds", load.megabytes(), rounds.len());
    let head = ["", "MB/s durable", "to plain", "to lz4", "then until sealed (archived), s"];
    table::print(&title, &head, &rows);
}

fn print_cost(load: &Workload, rounds: &[Vec<(Way, Run)>]) {
    let mut rows = Vec::new();
    for way in WAYS {
        for role in ROLES {
            let cpu: Series = of(rounds, way)
                .filter_map(|r| Some(r.cpu.get(role)? / load.megabytes() * 1e3))
                .collect();
            let peak: Series = of(rounds, way)
                .filter_map(|r| r.peaks.get(role).copied())
                .map(table::mib)
                .collect();
            // The walsender's memory is PostgreSQL's shared memory, the bench's nobody's concern.
            let counts = !["walsender", "bucket and bench"].contains(&role);
            if !cpu.median().is_nan() {
                let peak = if counts { peak.show(1) } else { "-".to_owned() };
                rows.push(vec![way.name().to_owned(), role.to_owned(), cpu.show(2), peak]);
            }
        }
    }
    table::print("Cost of catch-up", &["", "process", "CPU s/GB", "peak RSS, MiB"], &rows);
}

/// A new cluster is not archived before the server has noticed it; what comes after that is counted apart.
fn after_the_start(lags: &[Lag]) -> &[Lag] {
    let behind = lags.iter().position(|l| l.unarchived > TARGET_SEGMENTS).unwrap_or(lags.len());
    let (before, rest) = lags.split_at(behind);
    match rest.iter().position(|l| l.unarchived <= TARGET_SEGMENTS) {
        Some(caught_up) => &rest[caught_up..],
        None if rest.is_empty() => before,
        None => &[],
    }
}

fn print_lag(rounds: &[Vec<(Way, Run)>]) {
    let rows: Vec<Vec<String>> = [Way::Klio, Way::KlioTier2]
        .iter()
        .map(|&way| {
            let each = |of: fn(&Run) -> f64| of_runs(rounds, way, of).show(1);
            let archived = |of: fn(&Run) -> f64| {
                if way == Way::KlioTier2 { each(of) } else { "-".to_owned() }
            };
            vec![
                way.name().to_owned(),
                each(|r| unsealed(&r.lags).median()),
                each(|r| unsealed(&r.lags).max()),
                archived(|r| unarchived(&r.lags).median()),
                archived(|r| unarchived(&r.lags).max()),
                archived(|r| unarchived(after_the_start(&r.lags)).max()),
            ]
        })
        .collect();
    let head = [
        "",
        "unsealed, middle",
        "unsealed, most",
        "unarchived, middle",
        "unarchived, most",
        "unarchived, most once it has kept up",
    ];
    table::print("Behind flushed while draining, in segments", &head, &rows);
}

fn of_runs(rounds: &[Vec<(Way, Run)>], way: Way, value: fn(&Run) -> f64) -> Series {
    of(rounds, way).map(value).collect()
}

fn unsealed(lags: &[Lag]) -> Series {
    lags.iter().map(|l| l.unsealed).collect()
}

fn unarchived(lags: &[Lag]) -> Series {
    lags.iter().map(|l| l.unarchived).collect()
}
