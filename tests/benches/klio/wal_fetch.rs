//! `klio wal-fetch` as PostgreSQL runs it during recovery: one program a segment, one segment after the other.
//!
//! Beside it what an archive on a local disk would use: `cp` of plain segments, and `zstd -d` of the very files of tier 1.

use crate::{
    drain,
    options::Options,
    stats::Series,
    table,
    workload::{Workload, megabytes, settle_disk},
};
use klio_pg::{SegmentName, TimelineId};
use klio_tests::{programs, site::Site};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

#[derive(Debug, Clone, Copy)]
enum Way {
    Cp,
    Zstd,
    Klio,
}

const WAYS: [Way; 3] = [Way::Cp, Way::Zstd, Way::Klio];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Cp => "cp, plain files",
            Self::Zstd => "age -d | zstd -d, files of tier 1",
            Self::Klio => "klio wal-fetch",
        }
    }

    fn command(self, load: &Workload, site: &Site, name: &str, target: &Path) -> Command {
        match self {
            Self::Cp => {
                let mut command = Command::new("cp");
                command.arg(load.pg.pg_wal().join(name)).arg(target);
                command
            }
            Self::Zstd => {
                let mut command = Command::new("sh");
                command.args(["-c", "age -d -i \"$1\" \"$2\" | zstd -dq -o \"$3\"", "decode"]);
                command.arg(site.identity().expect("encryption is on"));
                command.arg(site.wal_dir(1).join(format!("{name}.zst.age"))).arg(target);
                command
            }
            Self::Klio => {
                site.klio_command(None, &["wal-fetch", name, &target.display().to_string()])
            }
        }
    }
}

/// Runs and prints it.
pub async fn run(load: &Workload, options: &Options) {
    let mut site = drain::klio_server(load).await;
    let names = names(load, options.segments());
    let target = site.scratch("RECOVERYXLOG");
    let mut seconds: [Series; 3] = Default::default();
    for round in 0..options.rounds() {
        for turn in 0..WAYS.len() {
            let number = (round + turn) % WAYS.len();
            let way = WAYS[number];
            settle_disk().await;
            let taken = fetch_all(way, load, &site, &names, &target).await;
            eprintln!("wal_fetch round {}: {}: {taken:.2} s", round + 1, way.name());
            seconds[number].push(taken);
        }
    }
    compare(load, &site, &names, &target).await;
    site.stop().await;
    print(load, &seconds, names.len(), options);
}

fn names(load: &Workload, count: usize) -> Vec<String> {
    let count = u64::try_from(count).expect("a small number");
    assert!(load.segments() >= count, "fetch {count} segments: there are {}", load.segments());
    let timeline = TimelineId::new(1).expect("the first timeline");
    let mut name = SegmentName::containing(timeline, load.start, load.segment);
    let mut names = Vec::new();
    for _ in 0..count {
        names.push(name.to_string());
        name = name.next(load.segment).expect("a next segment");
    }
    names
}

/// PostgreSQL deletes the file after replaying it, before it asks for the next.
async fn fetch_all(
    way: Way,
    load: &Workload,
    site: &Site,
    names: &[String],
    target: &PathBuf,
) -> f64 {
    let mut seconds = 0.0;
    for name in names {
        let command = way.command(load, site, name, target);
        let begun = Instant::now();
        let outcome = programs::run(command).await;
        seconds += begun.elapsed().as_secs_f64();
        assert_eq!(outcome.code, Some(0), "{}: {name}: {}", way.name(), outcome.stderr);
        fs::remove_file(target).expect("what was fetched is there");
    }
    seconds
}

/// A fast answer must be the right one.
async fn compare(load: &Workload, site: &Site, names: &[String], target: &PathBuf) {
    for name in names {
        let outcome = programs::run(Way::Klio.command(load, site, name, target)).await;
        assert_eq!(outcome.code, Some(0), "{name}: {}", outcome.stderr);
        let (fetched, original) = (fs::read(target), fs::read(load.pg.pg_wal().join(name)));
        assert!(fetched.expect("fetched") == original.expect("in pg_wal"), "{name} differs");
        fs::remove_file(target).expect("what was fetched is there");
    }
}

fn print(load: &Workload, seconds: &[Series; 3], count: usize, options: &Options) {
    #[expect(clippy::cast_precision_loss, reason = "64")]
    let count_number = count as f64;
    let megabytes = count_number * megabytes(load.segment.bytes());
    let rows: Vec<Vec<String>> = WAYS
        .iter()
        .zip(seconds)
        .map(|(way, seconds)| {
            let show = |of: f64, digits| seconds.map(|s| of / s).show(digits);
            let each = seconds.map(|s| s / count_number * 1e3);
            vec![way.name().to_owned(), show(count_number, 1), show(megabytes, 0), each.show(1)]
        })
        .collect();
    let title = format!("wal-fetch: {count} segments, {} rounds", options.rounds());
    table::print(&title, &["", "segments/s", "MB/s", "ms each"], &rows);
}
