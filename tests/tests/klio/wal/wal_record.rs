//! The record walker against PostgreSQL's own `pg_waldump`, over a workload with everything a transaction can do.

use klio_pg::{Found, Landmark, Lsn, RecordWalker, SegmentName, WalLevel};
use klio_tests::{
    install_crypto,
    postgres::{
        Postgres, Stop,
        install::{self, MAJORS},
    },
    scratch::Scratch,
    site::PATIENCE,
    wait::eventually_now,
    workload::{self, Kind, Workload},
};
use std::{fs, os::unix::ffi::OsStrExt};

/// What both say, in one form: place, transaction or name, committed or not, time.
type Line = (klio_pg::Lsn, String, bool, String);

fn of_walker(found: &Found) -> Option<Line> {
    let time = klio_sidecar_time(found.landmark.unix_micros().unwrap_or_default());
    match &found.landmark {
        Landmark::Commit { xid, .. } => Some((found.lsn, xid.to_string(), true, time)),
        Landmark::Abort { xid, .. } => Some((found.lsn, xid.to_string(), false, time)),
        Landmark::RestorePoint { name, .. } => Some((found.lsn, name.clone(), true, String::new())),
        _ => None,
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
                        found.extend(of_walker(&f));
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

/// All that the walker finds in what lies in pg_wal.
async fn walk_pg_wal(pg: &Postgres, major: u32, size: klio_pg::SegmentSize) -> Vec<Found> {
    let mut names: Vec<SegmentName> = fs::read_dir(pg.pg_wal())
        .expect("read pg_wal")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    names.sort();
    let start = names[0].start_lsn(size).expect("a segment of this size");
    let mut walker = RecordWalker::new(size, major, start);
    let mut found = Vec::new();
    for name in &names {
        let content = fs::read(pg.pg_wal().join(name.to_string())).expect("read a segment");
        walker.push(&content, &mut |f| found.push(f));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn every_postgresql_tells_in_wal_what_it_was_started_with_and_where_tablespaces_are() {
    install_crypto();
    for major in MAJORS {
        let mut pg = Postgres::builder()
            .major(major)
            .segment_mib(1)
            .set("wal_keep_size", "1GB")
            .set("allow_in_place_tablespaces", "on")
            .start()
            .await;
        let size = pg.segment_size().await;
        let begin: Lsn = pg.flush_lsn().await;
        let place = Scratch::new("tablespace");
        install::give(place.path());
        let location = place.path().to_str().expect("a path in UTF-8").to_owned();
        pg.execute(&format!("create tablespace there location '{location}'")).await;
        pg.execute("create tablespace inside location ''").await;
        pg.execute("drop tablespace there").await;
        let settings = [
            ("wal_level", "minimal"),
            ("max_wal_senders", "0"),
            ("max_connections", "77"),
            ("max_worker_processes", "9"),
            ("max_prepared_transactions", "11"),
            ("max_locks_per_transaction", "99"),
            ("track_commit_timestamp", "on"),
        ];
        for (name, value) in settings {
            pg.set(name, value).await;
        }
        pg.stop(Stop::Fast).await;
        pg.start().await;
        pg.execute("alter system reset all").await;
        pg.stop(Stop::Fast).await;
        pg.start().await;
        pg.stop(Stop::Fast).await;
        let mut found = walk_pg_wal(&pg, major, size).await;
        found.retain(|f| f.lsn >= begin);
        let parameters: Vec<_> = found
            .iter()
            .filter_map(|f| match &f.landmark {
                Landmark::Parameters(parameters) => Some(*parameters),
                _ => None,
            })
            .collect();
        assert_eq!(parameters.len(), 2, "PostgreSQL {major}: {found:?}");
        let minimal = parameters[0];
        assert_eq!(minimal.wal_level, WalLevel::Minimal);
        assert_eq!((minimal.max_connections, minimal.max_wal_senders), (77, 0));
        assert_eq!((minimal.max_worker_processes, minimal.max_prepared_transactions), (9, 11));
        assert_eq!(minimal.max_locks_per_transaction, 99);
        assert!(minimal.track_commit_timestamp);
        let back = parameters[1];
        assert_eq!((back.wal_level, back.max_connections), (WalLevel::Replica, 60));
        assert!(!back.track_commit_timestamp);
        let (mut created, mut dropped) = (Vec::new(), Vec::new());
        for found in &found {
            match &found.landmark {
                Landmark::TablespaceCreated { oid, path } => created.push((*oid, path.clone())),
                Landmark::TablespaceDropped { oid } => dropped.push(*oid),
                _ => {}
            }
        }
        let places: Vec<&[u8]> = created.iter().map(|(_, path)| path.as_slice()).collect();
        assert_eq!(places, [place.path().as_os_str().as_bytes(), b""], "PostgreSQL {major}");
        assert_eq!(dropped, [created[0].0]);
    }
}
