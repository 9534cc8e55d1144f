//! Trouble outside Klio: the bucket, the queue, the disk, strangers. WAL keeps being received and acknowledged, it catches
//! up by itself, and what is refused is refused by name.

use klio_tests::{
    install_crypto,
    pki::{Authority, Validity},
    postgres::Postgres,
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    wait::{eventually, eventually_now},
};
use std::path::PathBuf;

async fn small() -> Postgres {
    Postgres::builder().segment_mib(1).set("wal_keep_size", "1GB").start().await
}

/// Ends a segment and gives back where it ended, once more WAL has followed.
async fn end_segment(pg: &Postgres) -> klio_pg::Lsn {
    let size = pg.segment_size().await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    end.segment_start(size)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_in_trouble_holds_nothing_up_and_is_caught_up_with() {
    install_crypto();
    let pg = small().await;
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.set("KLIO_TIER2__REQUEST_TIMEOUT_SECONDS", "2");
    site.set("KLIO_TIER2__RETRY_TIMEOUT_SECONDS", "2");
    site.start().await;
    let _stream = site.stream(&pg);
    pg.write_wal(1 << 20).await;
    let mut archived = end_segment(&pg).await;
    site.wait_archived(archived).await;
    for fault in [Fault::InternalError, Fault::SlowDown, Fault::Hang, Fault::Reset] {
        s3.faults().inject(Rule::always(fault));
        let end = pg.write_wal(2 << 20).await;
        let sealed = end_segment(&pg).await;
        // Received and acknowledged as if nothing were wrong.
        site.wait_flushed(end).await;
        eventually("an attempt to meet the fault", PATIENCE, || async {
            s3.faults().count(|_| true) > 0 && site.lsn("archived_lsn").await < Some(sealed)
        })
        .await;
        let lag = eventually("the metrics to tell", PATIENCE, || async {
            site.metrics()
                .await
                .value("klio_wal_archive_lag_size_bytes", &[("cluster_name", "main")])
                .filter(|v| *v > 0.0)
        })
        .await;
        assert!(lag >= 1048576.0, "{fault:?}: lag {lag}");
        s3.faults().heal();
        site.wait_archived(sealed).await;
        archived = archived.max(sealed);
    }
    // Nothing truncated was left behind under any key (Klio, Go: an upload that fails half way was published).
    for key in s3.keys("klio/main/wal/") {
        if let Some(plain) = key.strip_suffix(".age") {
            // Panics where one of the programs finds damage.
            let size = site.decode(&s3.bucket_dir().join(plain)).len();
            assert!(size > 0, "{key} is empty");
        }
    }
}

/// S3 keeps, and bills, the parts of an upload that nobody ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_stopped_in_the_middle_of_an_upload_leaves_nothing_half_done() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(64).set("wal_keep_size", "1GB").start().await;
    let s3 = S3::new();
    let half_done = || -> Vec<String> {
        let files = std::fs::read_dir(&s3.settings().root).expect("the store's directory");
        let names = files.flatten().map(|file| file.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(".upload")).collect()
    };
    s3.faults().inject(Rule::always(Fault::Hang).path("partNumber=2&"));
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let stream = site.stream(&pg);
    // More than one part, compressed.
    pg.write_wal(48 << 20).await;
    let sealed = end_segment(&pg).await;
    eventually("the first part to be there", PATIENCE, || async {
        half_done().iter().any(|name| name.ends_with(".part-1"))
    })
    .await;
    drop(stream);
    site.stop().await;
    assert_eq!(half_done(), Vec::<String>::new());
    s3.faults().heal();
    site.start().await;
    let _stream = site.stream(&pg);
    site.wait_archived(sealed).await;
    assert_eq!(half_done(), Vec::<String>::new());
}

/// P4: the queue is a hint.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_and_a_bucket_added_later_lose_nothing() {
    install_crypto();
    let pg = small().await;
    let s3 = S3::new();
    let mut site = Site::new().await;
    site.start().await;
    let _stream = site.stream(&pg);
    pg.write_wal(4 << 20).await;
    let first = end_segment(&pg).await;
    site.wait_flushed(first).await;
    site.stop().await;
    // Tier 2 comes only now, after a "day" of WAL.
    site.set_tier2(&s3);
    site.start().await;
    site.wait_archived(first).await;
    // Now the queue's directory vanishes while jobs are in it.
    s3.faults().inject(Rule::always(Fault::InternalError));
    pg.write_wal(4 << 20).await;
    let second = end_segment(&pg).await;
    site.wait_flushed(second).await;
    site.stop().await;
    let queue = queue_dir(&site);
    std::fs::remove_dir_all(&queue).unwrap_or_else(|e| panic!("remove {}: {e}", queue.display()));
    s3.faults().heal();
    site.start().await;
    site.wait_archived(second).await;
}

fn queue_dir(site: &Site) -> PathBuf {
    let data = site.dir().join("data");
    let entries = std::fs::read_dir(&data).expect("the data directory");
    let mut others = entries
        .filter_map(Result::ok)
        .map(|e| e.path())
        .filter(|p| p.is_dir() && !p.ends_with("tier1"));
    others.next().expect("the queue's directory beside tier1")
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_named_as_promised_and_true_after_a_restart() {
    install_crypto();
    let pg = small().await;
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    site.start().await;
    let _stream = site.stream(&pg);
    pg.write_wal(3 << 20).await;
    let end = end_segment(&pg).await;
    site.wait_archived(end).await;
    let label = [("cluster_name", "main")];
    let names = [
        "klio_wal_written_size_bytes_total",
        "klio_wal_written_total",
        "klio_wal_latest_written_time_seconds",
        "klio_consumer_written_size_bytes_total",
        "klio_consumer_written_total",
        "klio_consumer_latest_written_time_seconds",
    ];
    let before = site.metrics().await;
    for name in names {
        assert!(
            before.value(name, &label).is_some_and(|v| v > 0.0),
            "{name}: {:?}",
            before.names()
        );
    }
    for name in ["klio_queue_messages", "klio_queue_bytes"] {
        assert!(before.value(name, &[]).is_some(), "{name}: {:?}", before.names());
    }
    klio_tests::promtool::check_metrics(&site.metrics_page().await)
        .expect("promtool check metrics");
    drop(_stream);
    let last_times =
        ["klio_wal_latest_written_time_seconds", "klio_consumer_latest_written_time_seconds"];
    let before = site.metrics().await;
    site.stop().await;
    site.start().await;
    let after = site.metrics().await;
    for name in last_times {
        let (was, is) =
            (before.value(name, &label).expect(name), after.value(name, &label).expect(name));
        // File times have their own rounding; "now" or zero would be far off.
        assert!((was - is).abs() < 2.0, "{name}: {was} before the restart, {is} after");
    }
    assert_eq!(site.probe("/livez").await.0, 200);
    eventually("/readyz", PATIENCE, || async { site.probe("/readyz").await.0 == 200 }).await;
}

/// P8, and every other stranger: refused, by name, with nothing written.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_that_do_not_fit_are_refused() {
    install_crypto();
    let pg = small().await;
    let mut site = Site::new().await;
    site.start().await;
    let ca = Authority::new("foreign");
    let own = {
        let read =
            |name: &str| std::fs::read_to_string(site.dir().join(name)).expect("init wrote it");
        (read("ca.crt"), read("ca.key"))
    };
    let bundle = |name: &str, pair: klio_tests::pki::Pair, cluster: &str| {
        let dir = site.scratch(name);
        std::fs::create_dir_all(&dir).expect("make a directory");
        let _ = pair.write(&dir, "client");
        std::fs::write(dir.join("ca.crt"), &own.0).expect("write");
        let text = format!(
            "cluster = \"{cluster}\"\n[server]\naddress = \"https://localhost:{}\"\n",
            site.port()
        );
        std::fs::write(dir.join("klio.toml"), text).expect("write");
        dir.join("klio.toml")
    };
    let foreign = bundle("foreign", ca.client("klio@main", None, Validity::Now), "main");
    let outcome =
        klio_tests::programs::run(site.klio_command_of(&foreign, Some(&pg), &["status"])).await;
    assert_ne!(outcome.code, Some(0), "another authority's certificate");
    // A certificate for another cluster, issued by the right authority.
    let other = site
        .klio_server(&[
            "client",
            "app@other",
            "-c",
            &site.dir().join("klio-server.toml").display().to_string(),
        ])
        .await;
    assert_eq!(other.code, Some(0), "{}", other.stderr);
    let other = site.dir().join("clients/app@other/klio.toml");
    let mut command = site.klio_command_of(&other, Some(&pg), &["stream"]);
    command.env("KLIO_CLUSTER", "main");
    let outcome = klio_tests::programs::run(command).await;
    assert_eq!(outcome.code, Some(15), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("other") && outcome.stderr.contains("main"),
        "{}",
        outcome.stderr
    );
    assert!(!site.tier1().join("main").exists(), "something was written");
}

/// The PostgreSQL behind a name is pinned: another one is refused, and so is another segment size.
#[tokio::test(flavor = "multi_thread")]
async fn another_postgres_under_the_same_name_is_refused() {
    install_crypto();
    let (first, second) = (small().await, Postgres::new().await);
    let mut site = Site::new().await;
    // The default takes it as a generation of its own: tests/tests/klio/wal/history.rs.
    site.set("KLIO_WAL__ON_DIVERGENCE", "refuse");
    site.start().await;
    let mut stream = site.stream(&first);
    let end = first.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
    let mut stranger = site.stream(&second);
    let status = stranger.wait_exit(PATIENCE).await;
    assert_eq!(status.code(), Some(17), "{}", stranger.log());
    let (own, other) = (first.system_identifier().await, second.system_identifier().await);
    assert!(
        stranger.log().contains(&own.to_string()) && stranger.log().contains(&other.to_string()),
        "{}",
        stranger.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_writer_is_refused_while_the_first_lives_and_takes_over_when_it_is_gone() {
    install_crypto();
    let pg = small().await;
    let mut site = Site::new().await;
    site.start().await;
    let mut first = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    let mut command = site.klio_command(Some(&pg), &["stream"]);
    command.env("KLIO_POSTGRES__SLOT", "second");
    let mut second =
        klio_tests::process::Running::spawn("second klio", command, &site.scratch("second.log"));
    second.wait_log("WRITER_CONFLICT", PATIENCE).await;
    assert!(first.is_running());
    first.kill9();
    let end = pg.write_wal(2 << 20).await;
    site.wait_flushed(end).await;
    assert!(second.is_running(), "{}", second.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn renewed_certificates_need_no_restart_and_a_removed_authority_ends_the_stream() {
    install_crypto();
    let pg = small().await;
    let mut site = Site::new().await;
    site.start().await;
    let stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    // The authority is replaced under the running server: the stream's certificate is no longer good.
    let ca = Authority::new("new");
    let server = ca.server(&["localhost", "127.0.0.1"], Validity::Now);
    std::fs::write(site.dir().join("server.crt"), &server.cert).expect("write");
    std::fs::write(site.dir().join("server.key"), &server.key).expect("write");
    std::fs::write(site.dir().join("ca.crt"), ca.cert()).expect("write");
    eventually("the stream to be ended", PATIENCE, || async {
        site.log().contains("UNAUTHENTICATED")
    })
    .await;
    // A renewed bundle is used without a restart of the sidecar (Klio, Go: needed one).
    let dir = site.bundle().parent().expect("a directory").to_owned();
    let _ = ca.client("klio@main", None, Validity::Now).write(&dir, "client");
    std::fs::write(dir.join("ca.crt"), ca.cert()).expect("write");
    // The first sidecar may have ended with its exit code for a certificate that is refused; a new one works.
    drop(stream);
    let _stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
}

/// The certificates are not valid yet, as its clock has it, and the running stream is ended for it.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_when_the_server_s_clock_was_wrong_for_a_while() {
    install_crypto();
    let pg = small().await;
    let mut site = Site::new().await;
    site.own_clock();
    site.start().await;
    let mut stream = site.stream(&pg);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    site.turn_clock(-40 * 86_400);
    eventually_now("the stream to be refused", PATIENCE, || {
        assert!(stream.is_running(), "{}", stream.log());
        stream.log().contains("UNAUTHENTICATED")
    })
    .await;
    assert!(stream.log().contains("compare the clocks"), "{}", stream.log());
    site.turn_clock(0);
    let end = pg.write_wal(1 << 20).await;
    site.wait_flushed(end).await;
    stream.terminate(PATIENCE).await;
}
