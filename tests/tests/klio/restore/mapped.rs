//! A restored copy whose tablespaces lie elsewhere takes the original's place: under its name, as one history (P11).

use super::rig::{Rig, rows};
use klio_pg::{Found, Landmark, Lsn, PAGE_BYTES, RecordWalker};
use klio_tests::{
    postgres::{Stop, install},
    proof::Source,
    site::PATIENCE,
    wait::eventually,
};
use serde_json::Value;
use std::{fs, path::PathBuf};

async fn into_production(major: u32) {
    let rig = Rig::new(major, false).await;
    rig.backup("only").await;
    let live = rig.dir("live");
    fs::create_dir(&live).expect("make");
    install::give(&live);
    rig.pg.execute(&format!("create tablespace later location '{}'", live.display())).await;
    takes_its_place(rig, vec![live]).await;
}

/// A copy with the tablespace `later` of these places elsewhere becomes production.
async fn takes_its_place(mut rig: Rig, places: Vec<PathBuf>) {
    rig.pg
        .execute("create table far tablespace later as select generate_series(1, 1000) as id")
        .await;
    rig.row(1).await;
    rig.flushed().await;
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;

    let elsewhere = rig.dir("elsewhere").display().to_string();
    let maps = places.iter().enumerate();
    let maps: Vec<_> = maps.map(|(n, live)| format!("{}={elsewhere}{n}", live.display())).collect();
    let map = maps.iter().flat_map(|map| ["--tablespace-map", map]);
    let args: Vec<_> = ["--latest"].into_iter().chain(map).collect();
    rig.pg = rig.restored(Source::Server, &args).await;
    rig.stream = Some(rig.site.stream(&rig.pg));
    let row = rig.row(2).await;
    eventually("the new timeline", PATIENCE, || async {
        let flushed = rig.site.lsn("flushed_lsn").await?;
        let status = rig.site.status().await?;
        (status["timeline"] == 2 && flushed >= row.lsn).then_some(())
    })
    .await;
    let outcome = rig.klio(Source::Server, &["generation", "list", "--json"]).await;
    let all: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert!(!outcome.stdout.contains("undecided"), "{all:#}");

    // And it is restored again, through the segment that begins with the changed record.
    places.iter().for_each(|live| fs::remove_dir_all(live).expect("remove"));
    let again = rig.restored(Source::Server, &["--latest"]).await;
    assert_eq!(rows(&again).await, 2);
    assert_eq!(again.value("select count(*) from far").await, "1000");
    // The records of those before, if any, lie in segments that nobody has changed.
    let back = places.last().filter(|live| live.exists());
    assert_eq!(back, None, "it went back to the original's place");
}

/// Where the record of `later` lies.
async fn record_of(rig: &Rig, from: Lsn) -> Found {
    let size = rig.pg.segment_size().await;
    let begin = Lsn::new(from.as_u64() - from.as_u64() % PAGE_BYTES);
    let mut walker = RecordWalker::new(size, rig.pg.major(), begin);
    let mut made = None;
    for lsn in [from, from.advance(size.bytes())] {
        let segment = rig.pg.segment_of(lsn).await;
        // The next segment is there when something lies in it.
        let Ok(content) = fs::read(rig.pg.pg_wal().join(segment.to_string())) else { break };
        let skip = walker.position().offset_in(size) as usize;
        walker.push(&content[skip..], &mut |found| {
            let is_one = matches!(found.landmark, Landmark::TablespaceCreated { .. });
            if is_one && found.lsn >= from && made.is_none() {
                made = Some(found);
            }
        });
    }
    made.expect("a record of CREATE TABLESPACE")
}

async fn insert_lsn(rig: &Rig) -> Lsn {
    rig.pg.value("select pg_current_wal_insert_lsn()").await.parse().expect("an LSN")
}

/// Writes WAL up to this place, which lies on the last page of its segment, far enough behind its beginning.
async fn write_up_to(rig: &Rig, place: Lsn) {
    const MESSAGE_HEADERS: u64 = 58;
    let emit = async |bytes: u64| {
        let sql = format!("select pg_logical_emit_message(false, 'klio', repeat('x', {bytes}))");
        rig.pg.execute(&sql).await;
    };
    let left = place.bytes_since(insert_lsn(rig).await);
    emit((left - 4500) * (PAGE_BYTES - 24) / PAGE_BYTES).await;
    let left = place.bytes_since(insert_lsn(rig).await);
    emit(left - MESSAGE_HEADERS).await;
}

/// Everything that is changed of the record lies in a segment in which it does not begin.
#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_s_record_across_two_segments_is_no_other_history() {
    let rig = Rig::new(15, false).await;
    rig.backup("only").await;
    let size = rig.pg.segment_size().await;
    let mut places = Vec::new();
    let mut before_record = 800;
    // What PostgreSQL writes before the record is known from the time before, and is the same most times.
    for attempt in 0..20 {
        let live = rig.dir(&format!("live{attempt:02}"));
        fs::create_dir(&live).expect("make");
        install::give(&live);
        rig.pg.execute("drop tablespace if exists later").await;
        let border = insert_lsn(&rig).await.segment_start(size).advance(2 * size.bytes());
        write_up_to(&rig, Lsn::new(border.as_u64() - 16 - before_record)).await;
        let from = insert_lsn(&rig).await;
        rig.pg.execute(&format!("create tablespace later location '{}'", live.display())).await;
        places.push(live);
        let record = record_of(&rig, from).await;
        if record.lsn < border && record.lsn.advance(20) >= border {
            takes_its_place(rig, places).await;
            return;
        }
        eprintln!("the record was at {} and not behind {border}", record.lsn);
        before_record = record.lsn.bytes_since(from);
    }
    panic!("no record of CREATE TABLESPACE came to lie across two segments");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_its_tablespaces_elsewhere_goes_on_under_the_same_name_on_15() {
    into_production(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_with_its_tablespaces_elsewhere_goes_on_under_the_same_name_on_17() {
    into_production(17).await;
}
