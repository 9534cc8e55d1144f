//! A disk that lies under the real programs: what was acknowledged and is damaged is shown, kept, and asked for again.

use klio_pg::SegmentName;
use klio_tests::{
    install_crypto,
    postgres::Postgres,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A plain journal's frames: magic, then the codec of a closing one.
const CLOSING: &[u8] = b"KWF3\x02\0\0\0";
/// Where the first frame's WAL begins.
const FIRST_WAL: u64 = 4096 + 44;

fn journals(site: &Site, ending: &str) -> Vec<PathBuf> {
    let directory = fs::read_dir(site.wal_dir(1)).expect("the timeline's directory");
    let names = directory.map(|entry| entry.expect("an entry").path());
    let mut found: Vec<PathBuf> =
        names.filter(|path| path.to_string_lossy().contains(ending)).collect();
    found.sort();
    found
}

fn flip(path: &Path, byte: u64) {
    let mut content = fs::read(path).expect("the journal");
    content[byte as usize] ^= 4;
    fs::write(path, content).expect("written");
}

async fn damaged(site: &Site) -> Option<f64> {
    site.metrics().await.value("klio_wal_damaged_journals", &[("cluster_name", "main")])
}

/// One bit in the first frame, in the header, and in the last batch before the stream rested.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_bit_in_the_journal_is_shown_and_its_wal_is_asked_for_again() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(16).set("wal_keep_size", "1GB").start().await;
    let mut site = Site::unencrypted().await;
    site.start().await;
    for (round, byte) in [FIRST_WAL + 8, 20].into_iter().enumerate() {
        let stream = site.stream(&pg);
        let end = pg.write_wal(50_000).await;
        site.wait_flushed(end).await;
        let journal = eventually("the stream to rest", PATIENCE, || async {
            let last = journals(&site, ".open")
                .into_iter()
                .rfind(|p| !p.to_string_lossy().contains("damaged"));
            let content = last.as_ref().and_then(|path| fs::read(path).ok()).unwrap_or_default();
            let closed = content.windows(CLOSING.len()).any(|window| window == CLOSING);
            last.filter(|_| closed)
        })
        .await;
        let held = site.lsn("flushed_lsn").await.expect("a position");
        site.kill9();
        drop(stream);
        flip(&journal, byte);
        site.start().await;
        assert_eq!(damaged(&site).await, Some(1.0), "round {round}");
        let back = site.lsn("flushed_lsn").await.expect("a position");
        assert!(back < held, "the position went back visibly: {back}, {held}");
        let status = site.status().await.expect("a status").to_string();
        assert!(status.contains("damaged on tier 1"), "{status}");
        assert!(site.log().contains("acknowledged WAL is damaged"));
        let name = journal.file_name().expect("a name").to_string_lossy().into_owned();
        assert!(name.trim_end_matches(".open").parse::<SegmentName>().is_ok());
        let kept = journals(&site, ".damaged-");
        assert_eq!(kept.len(), round + 1, "{kept:?}");
        let _stream = site.stream(&pg);
        site.wait_flushed(end).await;
        eventually("nothing to be missing", PATIENCE, || async {
            (damaged(&site).await == Some(0.0)).then_some(())
        })
        .await;
        assert_eq!(journals(&site, ".damaged-").len(), round + 1, "kept");
    }
}

/// It was reported, and stayed lost although PostgreSQL still had it.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_rots_in_the_middle_comes_again_from_postgresql_while_the_stream_goes_on() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await;
    let mut site = Site::unencrypted().await;
    site.start().await;
    let stream = site.stream(&pg);
    let end = pg.write_wal(50_000).await;
    site.wait_flushed(end).await;
    let journal = journals(&site, ".open").pop().expect("a journal");
    // The server has it open: it finds out when it seals it.
    flip(&journal, FIRST_WAL + 8);
    let end = pg.write_wal(3 << 20).await;
    site.wait_flushed(end).await;
    eventually("the damage to be seen", PATIENCE, || async {
        (damaged(&site).await == Some(1.0)).then_some(())
    })
    .await;
    let status = site.status().await.expect("a status").to_string();
    assert!(status.contains("klio stream asks PostgreSQL for it"), "{status}");
    drop(stream);
    site.kill9();
    site.start().await;
    let held = site.lsn("flushed_lsn").await.expect("a position");
    assert!(held >= end, "what was acknowledged does not go back");
    let _stream = site.stream(&pg);
    eventually("the segment to be whole again", PATIENCE, || async {
        (damaged(&site).await == Some(0.0)).then_some(())
    })
    .await;
    assert_eq!(journals(&site, ".damaged-").len(), 1, "kept");
    let name = journal.file_name().expect("a name").to_string_lossy().replace(".open", "");
    eventually("the segment to be sealed", PATIENCE, || async {
        journals(&site, &format!("{name}.zst")).pop()
    })
    .await;
    let status = site.status().await.expect("a status").to_string();
    assert!(!status.contains(&name), "{status}");
    let end = pg.write_wal(50_000).await;
    site.wait_flushed(end).await;
}
