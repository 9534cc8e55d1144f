//! Every held byte counts, and every missing one is a hole with its reason: after the loss of tier 1, with a tier 1 that
//! was set back, in front of a recorded gap; from a server, a new server, and the bucket alone (P2, P7).

use klio_pg::Lsn;
use klio_tests::{
    install_crypto,
    postgres::Postgres,
    process::Running,
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{fs, path::Path, process::Command};

/// A PostgreSQL that keeps little WAL by itself, a server with a bucket, and a backup of before it all.
struct Rig {
    s3: S3,
    site: Site,
    pg: Postgres,
    stream: Option<Running>,
}

impl Rig {
    async fn new() -> Self {
        install_crypto();
        let s3 = S3::new();
        let builder = Postgres::builder().segment_mib(1);
        let small = builder.set("min_wal_size", "2MB").set("max_wal_size", "4MB");
        let pg = small.set("wal_keep_size", "64MB").start().await;
        let mut site = Site::new().await.tier2(&s3);
        site.set("KLIO_TIER2__RETRY_TIMEOUT_SECONDS", "1");
        site.start().await;
        let stream = Some(site.stream(&pg));
        let rig = Self { s3, site, pg, stream };
        rig.backup("first").await;
        rig
    }

    async fn backup(&self, name: &str) {
        let taken = self.site.klio(Some(&self.pg), &["backup", "--name", name]).await;
        assert_eq!(taken.code, Some(0), "{}{}", taken.stdout, taken.stderr);
        let key = format!("klio/main/backups/{name}.json");
        eventually(&key, PATIENCE, || async {
            self.s3.keys("klio/main/backups").contains(&key).then_some(())
        })
        .await;
    }

    /// Some segments, all in the bucket; gives where they end.
    async fn archive(&self) -> Lsn {
        let size = self.pg.segment_size().await;
        self.pg.write_wal(2 * size.bytes()).await;
        let switched = self.pg.switch_wal().await.segment_start(size);
        self.pg.write_wal(1).await;
        self.site.wait_archived(switched).await;
        switched
    }

    /// Segments that are acknowledged, and reach tier 1 only.
    async fn acknowledge(&self) -> Lsn {
        self.s3.faults().inject(Rule::always(Fault::InternalError));
        let end = self.pg.write_wal(3 << 20).await;
        self.site.wait_flushed(end).await;
        // The slot lets go what was acknowledged.
        let confirmed = format!("select restart_lsn >= '{end}' from pg_replication_slots");
        self.pg.wait_true(&confirmed).await;
        end
    }

    async fn stop(&mut self) {
        if let Some(mut stream) = self.stream.take() {
            stream.terminate(PATIENCE).await;
        }
        self.site.stop().await;
    }

    /// The disk of the server is lost; the bucket answers again.
    async fn lose_tier1(&mut self) {
        self.stop().await;
        fs::remove_dir_all(self.site.dir().join("data")).expect("lose the disk");
        self.s3.faults().heal();
    }

    async fn go_on(&mut self) {
        self.site.start().await;
        self.stream = Some(self.site.stream(&self.pg));
        let end = self.pg.write_wal(1).await;
        self.site.wait_flushed(end).await;
    }

    /// PostgreSQL removes WAL that no slot keeps.
    async fn forget(&self) {
        self.pg.set("wal_keep_size", "0").await;
        for _ in 0..4 {
            self.pg.write_wal(2 << 20).await;
            self.pg.switch_wal().await;
            self.pg.execute("checkpoint").await;
        }
    }

    /// A restore of the first backup, as far as its plan goes.
    async fn plan(&self, target: &[&str]) -> (Option<i32>, String) {
        let to = self.site.scratch("planned").display().to_string();
        let args = ["restore", "--dry-run", "--backup", "first", "--to", &to];
        let planned = self.site.klio(None, &[&args[..], target].concat()).await;
        (planned.code, format!("{}{}", planned.stdout, planned.stderr))
    }

    /// The same from the bucket, with nothing but the key.
    async fn plan_from_bucket(&self, target: &[&str]) -> (Option<i32>, String) {
        let to = self.site.scratch("planned").display().to_string();
        let planned = self
            .bucket_command(&["restore", "--dry-run", "--backup", "first", "--to", &to], target);
        let planned = klio_tests::programs::run(planned).await;
        (planned.code, format!("{}{}", planned.stdout, planned.stderr))
    }

    fn bucket_command(&self, args: &[&str], more: &[&str]) -> Command {
        let settings = self.s3.settings();
        let mut command = self.site.klio_command(None, &[args, more].concat());
        command
            .args(["--from", &format!("s3://{}/klio", settings.bucket), "--cluster", "main"])
            .arg("--identity")
            .arg(self.site.identity().expect("an identity"))
            .env("KLIO_TIER2__ENDPOINT", self.s3.endpoint())
            .env("KLIO_TIER2__REGION", klio_tests::s3::REGION)
            .env("KLIO_TIER2__ACCESS_KEY_ID", &settings.access_key)
            .env("KLIO_TIER2__SECRET_ACCESS_KEY", &settings.secret_key);
        command
    }

    async fn gaps(&self) -> Vec<(Lsn, Lsn, String)> {
        let status = self.site.status().await.expect("a status");
        let gaps = status["gaps"].as_array().cloned().unwrap_or_default();
        let text = |gap: &serde_json::Value, field: &str| -> String {
            gap[field].as_str().unwrap_or_default().to_owned()
        };
        let lsn = |gap: &serde_json::Value, field: &str| text(gap, field).parse().expect("an LSN");
        gaps.iter().map(|g| (lsn(g, "from_lsn"), lsn(g, "to_lsn"), text(g, "reason"))).collect()
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().expect("run cp");
    assert!(copied.success());
}

/// What was acknowledged and did not reach the bucket comes again from PostgreSQL, which has more than the slot keeps.
#[tokio::test(flavor = "multi_thread")]
async fn after_the_loss_of_tier_1_the_stream_goes_on_at_the_end_of_the_bucket() {
    let mut rig = Rig::new().await;
    rig.archive().await;
    let acknowledged = rig.acknowledge().await;
    rig.stop().await;
    fs::remove_dir_all(rig.site.dir().join("data")).expect("lose the disk");

    // While nobody knows where it ends nothing is taken: the slot keeps the WAL.
    rig.site.start().await;
    let mut waiting = rig.site.stream(&rig.pg);
    waiting.wait_log("has to be asked", PATIENCE).await;
    rig.pg.write_wal(1 << 20).await;
    assert!(!rig.site.wal_dir(1).exists(), "{}", waiting.log());
    rig.s3.faults().heal();
    rig.stream = Some(waiting);
    let end = rig.pg.write_wal(1).await;
    rig.site.wait_flushed(end).await;
    assert_eq!(rig.gaps().await, []);
    for target in [vec!["--latest"], vec!["--target-lsn", &acknowledged.to_string()]] {
        let (code, told) = rig.plan(&target).await;
        assert_eq!(code, Some(0), "{target:?}: {told}");
    }
    rig.archive().await;
    rig.backup("second").await;
    let (code, told) = rig.plan_from_bucket(&["--latest"]).await;
    assert_eq!(code, Some(0), "{told}");
    let verified = rig.site.klio(None, &["verify", "--wal"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    // And after a restart.
    rig.stop().await;
    rig.go_on().await;
    let (code, told) = rig.plan(&["--latest"]).await;
    assert_eq!(code, Some(0), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_and_nobody_has_any_more_is_a_gap_lost_with_tier_1() {
    let mut rig = Rig::new().await;
    let archived = rig.archive().await;
    let lost = rig.acknowledge().await;
    rig.lose_tier1().await;
    rig.forget().await;
    rig.go_on().await;
    let gaps = rig.gaps().await;
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    let (from, to, reason) = &gaps[0];
    assert!(
        *from >= archived && *from < lost && lost.segment_start(rig.pg.segment_size().await) <= *to,
        "{gaps:?}"
    );
    assert!(reason.contains("lost with the tier 1 before this one"), "{reason}");
    let missing = rig.pg.segment_of(*from).await.to_string();
    for round in 0..2 {
        let (code, told) = rig.plan(&["--latest"]).await;
        assert!(code != Some(0) && told.contains("lost with the tier 1"), "{round}: {told}");
        let (code, told) = rig.plan(&["--target-lsn", &from.to_string()]).await;
        assert_eq!(code, Some(0), "{round}: {told}");
        // P7: no end of the archive, however it is asked for.
        let (code, _) = rig.site.fetch(&missing).await;
        assert!(code.is_some_and(|code| code > 125), "{round}: {code:?}");
        rig.archive().await;
        let to = rig.site.scratch("from-bucket").display().to_string();
        let fetched = rig.bucket_command(&["wal-fetch", &missing, &to], &[]);
        let fetched = klio_tests::programs::run(fetched).await;
        assert!(fetched.code.is_some_and(|code| code > 125), "{round}: {}", fetched.stderr);
        rig.stop().await;
        rig.go_on().await;
    }
    // Behind it all is well with a new backup.
    rig.backup("second").await;
    let to = rig.site.scratch("again").display().to_string();
    let args = ["restore", "--dry-run", "--latest", "--to", &to];
    let planned = rig.site.klio(None, &args).await;
    assert_eq!(planned.code, Some(0), "{}{}", planned.stdout, planned.stderr);
}

/// The backup server's disk goes back to an earlier snapshot, its bucket does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_tier_1_that_was_set_back_goes_on_behind_what_the_bucket_has() {
    let mut rig = Rig::new().await;
    rig.archive().await;
    rig.stop().await;
    let (data, kept) = (rig.site.dir().join("data"), rig.site.scratch("kept"));
    copy(&data, &kept);
    rig.go_on().await;
    rig.archive().await;
    rig.archive().await;
    let end = rig.pg.flush_lsn().await;
    rig.site.wait_flushed(end).await;
    let confirmed = format!("select restart_lsn >= '{end}' from pg_replication_slots");
    rig.pg.wait_true(&confirmed).await;
    rig.stop().await;
    fs::remove_dir_all(&data).expect("lose the disk");
    copy(&kept, &data);
    // Before any stream comes, as when the primary is lost, too: what tier 1 has the beginning of the bucket has as a whole.
    rig.site.start().await;
    let (code, told) = rig.plan(&["--latest"]).await;
    assert_eq!(code, Some(0), "{told}");
    rig.site.stop().await;
    // PostgreSQL has removed what the old disk lacks, and the bucket has it.
    rig.forget().await;
    rig.go_on().await;
    assert_eq!(rig.gaps().await, []);
    for target in [vec!["--latest"], vec!["--target-lsn", &end.to_string()]] {
        let (code, told) = rig.plan(&target).await;
        assert_eq!(code, Some(0), "{target:?}: {told}");
    }
    rig.archive().await;
    rig.backup("second").await;
    let verified = rig.site.klio(None, &["verify", "--wal"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    let (code, told) = rig.plan_from_bucket(&["--latest"]).await;
    assert_eq!(code, Some(0), "{told}");
}

/// The bytes of an unfinished segment in front of a gap lie in a partial segment, which no listing tells the end of.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_acknowledged_before_a_gap_counts_to_its_last_byte_wherever_it_lies() {
    let mut rig = Rig::new().await;
    rig.archive().await;
    let end = rig.pg.write_wal(100 << 10).await;
    rig.site.wait_flushed(end).await;
    if let Some(mut stream) = rig.stream.take() {
        stream.terminate(PATIENCE).await;
    }
    rig.pg.execute("select pg_drop_replication_slot('klio')").await;
    rig.forget().await;
    rig.stream = Some(rig.site.stream(&rig.pg));
    let after = rig.pg.write_wal(1).await;
    rig.site.wait_flushed(after).await;
    let gaps = rig.gaps().await;
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    let held = gaps[0].0;
    assert!(held >= end, "{held} before {end}");
    let target = held.to_string();
    let beyond = held.advance(8).to_string();
    let check = async |rig: &Rig, when: &str| {
        let (code, told) = rig.plan(&["--target-lsn", &target]).await;
        assert_eq!(code, Some(0), "{when}: {told}");
        let (code, told) = rig.plan(&["--target-lsn", &beyond]).await;
        assert_ne!(code, Some(0), "{when}: {told}");
    };
    check(&rig, "after the gap").await;
    rig.archive().await;
    rig.backup("second").await;
    let applied = rig.site.klio(None, &["retention", "apply"]).await;
    assert_eq!(applied.code, Some(0), "{}{}", applied.stdout, applied.stderr);
    check(&rig, "after the next backup").await;
    let (code, told) = rig.plan_from_bucket(&["--target-lsn", &target]).await;
    assert_eq!(code, Some(0), "{told}");
    rig.stop().await;
    rig.go_on().await;
    check(&rig, "after a restart").await;
    rig.lose_tier1().await;
    rig.go_on().await;
    check(&rig, "on a new server").await;
}

/// The night shift loads with wal_level = minimal: every byte comes, and no recovery passes the place.
#[tokio::test(flavor = "multi_thread")]
async fn wal_of_wal_level_minimal_is_a_hole_with_that_reason_wherever_it_lies() {
    let mut rig = Rig::new().await;
    rig.archive().await;
    if let Some(mut stream) = rig.stream.take() {
        stream.terminate(PATIENCE).await;
    }
    let before = rig.pg.flush_lsn().await;
    rig.pg.execute("select pg_drop_replication_slot('klio')").await;
    for (name, value) in [("wal_level", "minimal"), ("max_wal_senders", "0")] {
        rig.pg.set(name, value).await;
    }
    rig.pg.restart().await;
    rig.pg.execute("create table bulk as select generate_series(1, 1000) as id").await;
    for name in ["wal_level", "max_wal_senders"] {
        rig.pg.execute(&format!("alter system reset {name}")).await;
    }
    rig.pg.restart().await;
    rig.stream = Some(rig.site.stream(&rig.pg));
    rig.archive().await;
    const WHY: &str = "wal_level = minimal";
    let gaps = rig.gaps().await;
    assert!(gaps.len() == 1 && gaps[0].2.contains(WHY), "{gaps:?}");
    assert!(gaps[0].0 >= before && gaps[0].1 > gaps[0].0, "{gaps:?}, {before}");
    let metrics = rig.site.metrics().await;
    assert_eq!(metrics.value("klio_wal_gaps", &[("cluster_name", "main")]), Some(1.0));
    let reached = gaps[0].0.to_string();
    let check = async |rig: &Rig, when: &str| {
        let (code, told) = rig.plan(&["--latest"]).await;
        assert!(code != Some(0) && told.contains(WHY), "{when}: {told}");
        let (code, told) = rig.plan(&["--target-lsn", &reached]).await;
        assert_eq!(code, Some(0), "{when}: {told}");
    };
    check(&rig, "at once").await;
    eventually("the note in the bucket", PATIENCE, || async {
        rig.s3.keys("klio/main").contains(&"klio/main/wal_levels.json".to_owned()).then_some(())
    })
    .await;
    let (code, told) = rig.plan_from_bucket(&["--latest"]).await;
    assert!(code != Some(0) && told.contains(WHY), "{told}");
    rig.backup("second").await;
    let to = rig.site.scratch("again").display().to_string();
    let planned = rig.site.klio(None, &["restore", "--dry-run", "--latest", "--to", &to]).await;
    assert_eq!(planned.code, Some(0), "{}{}", planned.stdout, planned.stderr);
    rig.stop().await;
    rig.go_on().await;
    check(&rig, "after a restart").await;
    // As an earlier build left it: it received the WAL and noted nothing. Reading all of it finds the stretch.
    rig.archive().await;
    rig.stop().await;
    let noted = rig.site.tier1().join("main/wal_levels.json");
    for place in [noted, rig.s3.bucket_dir().join("klio/main/wal_levels.json")] {
        fs::remove_file(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
    }
    rig.go_on().await;
    assert_eq!(rig.gaps().await, [], "nobody knows");
    let verified = rig.site.klio(None, &["verify", "--wal", "--read-data", "all"]).await;
    assert!(verified.code.is_some(), "{verified:?}");
    let found = rig.gaps().await;
    assert!(found.len() == 1 && found[0].2.contains(WHY), "{found:?}");
    assert_eq!((found[0].0, found[0].1), (gaps[0].0, gaps[0].1), "where it was");
    check(&rig, "after verify").await;
    rig.lose_tier1().await;
    rig.go_on().await;
    check(&rig, "on a new server").await;
    assert_eq!(rig.gaps().await.len(), 1);
}
