//! The record walker against PostgreSQL's own `pg_waldump`, over a workload with everything a transaction can do.

use klio_pg::{Found, Landmark, RecordWalker, SegmentName};
use klio_tests::{
    install_crypto,
    postgres::{Postgres, Stop, install},
    scratch::Scratch,
    site::PATIENCE,
    wait::eventually_now,
    workload::{self, Kind, Workload},
};
use std::fs;

/// What both say, in one form: place, transaction or name, committed or not, time.
type Line = (klio_pg::Lsn, String, bool, String);

fn of_walker(found: &Found) -> Line {
    let time = klio_sidecar_time(found.landmark.unix_micros());
    match &found.landmark {
        Landmark::Commit { xid, .. } => (found.lsn, xid.to_string(), true, time),
        Landmark::Abort { xid, .. } => (found.lsn, xid.to_string(), false, time),
        Landmark::RestorePoint { name, .. } => (found.lsn, name.clone(), true, String::new()),
    }
}

/// `2026-11-21 05:27:12.123456`, as pg_waldump prints it in UTC: seconds of the day are enough to compare.
fn klio_sidecar_time(unix_micros: i64) -> String {
    let (seconds, micros) = (unix_micros / 1_000_000, unix_micros % 1_000_000);
    let day = seconds % 86_400;
    format!("{:02}:{:02}:{:02}.{micros:06}", day / 3600, day % 3600 / 60, day % 60)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_walker_finds_what_pg_waldump_finds() {
    install_crypto();
    let mut pg = Postgres::builder()
        .segment_mib(1)
        .set("max_prepared_transactions", "20")
        .set("wal_keep_size", "8GB")
        .start()
        .await;
    let scratch = Scratch::new("walker");
    install::give(scratch.path());
    let places = scratch.join("places");
    let base = workload::setup(&pg, &places).await;
    let mut load = Workload::start(&pg, base, &places, 3, 0, false).await;
    eventually_now("transactions", PATIENCE, || load.count() > 800).await;
    load.stop().await;
    let size = pg.segment_size().await;
    pg.stop(Stop::Fast).await;
    let oracle = load.finish(&pg).await;
    let expected: Vec<Line> = oracle
        .records
        .iter()
        .filter_map(|record| match &record.kind {
            Kind::End { xid, committed, time } => {
                let time = time.split_whitespace().last().unwrap_or_default().to_owned();
                Some((record.start, xid.to_string(), *committed, time))
            }
            Kind::RestorePoint(name) => Some((record.start, name.clone(), true, String::new())),
            _ => None,
        })
        .collect();
    assert!(expected.len() > 800, "pg_waldump shows {} records", expected.len());
    let first = expected[0].0;
    let mut names: Vec<SegmentName> = fs::read_dir(pg.pg_wal())
        .expect("read pg_wal")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|name: &SegmentName| name.start_lsn(size) >= Some(first.segment_start(size)))
        .collect();
    names.sort();
    let start = names[0].start_lsn(size).expect("a segment of this size");
    for cut in [777, 1 << 20] {
        let mut walker = RecordWalker::new(size, 15, start);
        let mut found = Vec::new();
        for name in &names {
            let content = fs::read(pg.pg_wal().join(name.to_string())).expect("read a segment");
            content.chunks(cut).for_each(|piece| {
                walker.push(piece, &mut |f| {
                    if f.lsn >= first {
                        found.push(of_walker(&f));
                    }
                });
            });
        }
        assert!(walker.ended().is_some(), "the end of WAL was not noticed");
        let differs = expected.iter().zip(&found).find(|(a, b)| a != b);
        assert_eq!(differs, None);
        assert_eq!(found.len(), expected.len());
    }
}
