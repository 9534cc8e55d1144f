//! Retention, verification and maintenance, end to end, through the programs and the wire.
//!
//! Backups are small and made by the repository's own code; what is stored lies in two real tiers.

use hyper::Method;
use klio_pg::{Lsn, TimelineId};
use klio_proto::{
    Code,
    v1::{
        FileKind, Open, PutHistoryRequest, RecordDrillRequest, reserve_request::Purpose,
        wal_client::WalClient,
    },
};
use klio_storage::{
    catalog::{BackupRecord, DrillOutcome, MaintenanceOutcome, RetentionPlan, Run, VerifyOutcome},
    disk::RealDisk,
    layout::{BaseFile, BaseKind},
    record,
};
use klio_tests::{
    base_client::{Base, make, segment_size},
    client::{self, Stream},
    crash::Armed,
    damage::flip,
    env, install_crypto,
    process::{Descendant, Running, descendants},
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    wait::eventually,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::de::DeserializeOwned;
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tonic::transport::Channel;

const MIB: u64 = 1 << 20;
const START: Lsn = Lsn::new(16 * MIB);
/// Finished segments behind `START`, and half of one more.
const SEGMENTS: u64 = 9;
const SETTINGS: [(&str, &str); 6] = [
    ("KLIO_RETENTION__MINIMUM_AGE", "0"),
    ("KLIO_MAINTENANCE__ENABLED", "false"),
    ("KLIO_VERIFY__AFTER_BACKUP", "false"),
    ("KLIO_MAINTENANCE__KEEP_MARKED_SECONDS", "0"),
    ("KLIO_RETENTION__TIER2__RECOVERY_WINDOW_DAYS", "0"),
    ("KLIO_CONSUMER__RECONCILE_INTERVAL_SECONDS", "1"),
];

/// A server with a bucket, a cluster with WAL, and three backups in both tiers.
struct Setup {
    site: Site,
    s3: S3,
    base: Base,
    _stream: Option<Stream>,
}

async fn connect(site: &Site) -> (Base, Channel) {
    let channel = client::connect(site, &site.bundle()).await.expect("connect");
    (Base::new(&channel, "main"), channel)
}

impl Setup {
    async fn new(more: &[(&str, &str)]) -> Self {
        install_crypto();
        let s3 = S3::new();
        let mut site = Site::new().await.tier2(&s3);
        for (name, value) in SETTINGS.iter().chain(more) {
            site.set(name, value);
        }
        site.start().await;
        let (base, channel) = connect(&site).await;
        base.open().await.expect("a repository");
        // Half a segment at a time: a server takes no more than its window beyond what it acknowledged.
        let (half, size) = (MIB / 2, segment_size());
        let mut stream = base.stream_wal(&channel, START, half as usize).await;
        for number in 1..=2 * SEGMENTS {
            let (at, end) = (START.advance(number * half), START.advance((number + 1) * half));
            stream.append(at, client::wal(at, half as usize, size, 1)).await;
            stream.flushed(end).await.expect("acknowledged");
        }
        let setup = Self { site, s3, base, _stream: Some(stream) };
        for number in 1..=3 {
            setup.backup(number).await;
        }
        setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
        setup
    }

    /// Backup `b<number>`, at segment twice its number, waits for tier 2.
    async fn backup(&self, number: u64) {
        self.backup_named(&format!("b{number}"), 2 * number).await;
    }

    async fn backup_named(&self, name: &str, segment: u64) {
        let start = START.advance(segment * MIB + 40);
        let directory = self.site.scratch(&format!("made-{name}"));
        let made = make(&self.base, &directory, name, start, start.advance(MIB / 2)).await;
        made.commit(&self.base).await;
        let what = format!("{name} in tier 2");
        eventually(&what, PATIENCE, || async { self.base.entry(name).await.0.tier2 }).await;
    }

    async fn restart(&mut self) {
        self._stream = None;
        self.site.stop().await;
        self.site.start().await;
        self.base = connect(&self.site).await.0;
    }

    async fn names(&self) -> Vec<String> {
        let all = self.base.backups().await.expect("a list");
        let mut names: Vec<String> = all
            .backups
            .iter()
            .map(|e| {
                let record: serde_json::Value = serde_json::from_slice(&e.record).expect("JSON");
                record["name"].as_str().expect("a name").to_owned()
            })
            .collect();
        names.sort();
        names
    }

    /// `klio ARGS --json`: the exit status and the result.
    async fn klio<T: DeserializeOwned>(&self, args: &[&str]) -> (i32, T) {
        let all: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        let outcome = self.site.klio(None, &all).await;
        let value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| {
            panic!(
                "{args:?}: {e}: {:?} {}\n{}\n{}",
                outcome.code,
                outcome.stdout,
                outcome.stderr,
                self.site.log()
            )
        });
        (outcome.code.expect("an exit status"), value)
    }

    async fn apply(&self) -> (i32, MaintenanceOutcome) {
        self.klio(&["retention", "apply"]).await
    }

    async fn verify(&self) -> (i32, VerifyOutcome) {
        self.klio(&["verify", "--wal"]).await
    }

    /// At least two backups are listed, all of them verify, and their WAL has no hole up to the end.
    async fn require_kept(&self, when: &str) {
        let (code, outcome) = self.verify().await;
        assert_eq!(code, 0, "{when}: {outcome:?}\n{}", self.site.log());
        assert!(outcome.backups.len() >= 2, "{when}: {outcome:?}");
        let holdings = self.base.holdings().await.expect("holdings");
        for name in self.names().await {
            let record = self.base.entry(&name).await.1;
            let end = START.advance(SEGMENTS * MIB);
            let missing = holdings.first_missing(record.stop_timeline, record.start_lsn, end);
            assert_eq!(missing.expect("a history"), None, "{when}: {name}");
        }
    }

    /// Everything below a directory, by relative path.
    fn tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
        fn walk(root: &Path, directory: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(root, &path, found);
                } else if let (Ok(name), Ok(bytes)) = (path.strip_prefix(root), fs::read(&path)) {
                    found.insert(name.display().to_string(), bytes);
                }
            }
        }
        let mut found = BTreeMap::new();
        walk(root, root, &mut found);
        found
    }

    fn tier1(&self) -> PathBuf {
        self.site.tier1().join("main")
    }

    fn tier2(&self) -> PathBuf {
        self.s3.bucket_dir().join("klio/main")
    }

    /// Files of a kind in a tier; `part` is a part of their relative paths.
    fn names_in(root: &Path, part: &str) -> Vec<String> {
        Self::tree(root).into_keys().filter(|name| name.contains(part)).collect()
    }

    fn segment(number: u64) -> String {
        format!("0000000100000000{:08X}", START.as_u64() / MIB + number)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_policy_lets_go_leaves_both_tiers_and_what_stays_can_be_restored() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    let (code, plan): (i32, RetentionPlan) = setup.klio(&["retention", "plan"]).await;
    let expired: Vec<String> = plan.expired().iter().map(ToString::to_string).collect();
    assert_eq!((code, expired), (0, vec!["b1".to_owned(), "b2".to_owned()]));
    let text = setup.site.klio(None, &["retention", "plan"]).await.stdout;
    for part in ["b1", "DROP", "last 1", "backup b3 needs it"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(setup.names().await, ["b1", "b2", "b3"], "a plan changes nothing");
    let before = setup.site.status().await.expect("a status");
    let packs = Setup::names_in(&setup.tier2(), "base/data").len();
    for _ in 0..3 {
        let (code, outcome) = setup.apply().await;
        assert_eq!(code, 0, "{outcome:?}\n{}", setup.site.log());
    }
    assert_eq!(setup.names().await, ["b3"]);
    for root in [setup.tier1(), setup.tier2()] {
        assert_eq!(Setup::names_in(&root, "backups/"), ["backups/b3.json"]);
        assert!(Setup::names_in(&root, "base/data").len() < packs, "packs are left: {root:?}");
        let wal = Setup::names_in(&root, ".zst");
        let first = wal.iter().find(|n| !n.contains("partial")).expect("WAL");
        assert!(first.contains(&Setup::segment(6)), "{wal:?}");
    }
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 0, "{outcome:?}");
    for round in 0..2 {
        let holdings = setup.base.holdings().await.expect("holdings");
        assert_eq!(holdings.timelines[0].runs[0].start, START.advance(6 * MIB), "{round}");
        let record = setup.base.entry("b3").await.1;
        let missing =
            holdings.first_missing(record.stop_timeline, record.start_lsn, START.advance(9 * MIB));
        assert_eq!(missing.expect("a history"), None);
        let now = setup.site.status().await.expect("a status");
        for field in ["flushed_lsn", "archived_lsn", "sealed_lsn"] {
            assert_eq!(now[field], before[field], "{field} in round {round}");
        }
        // P7: what was let go is no end of WAL.
        let (code, _) = setup.site.fetch(&Setup::segment(3)).await;
        assert!(code.is_some_and(|code| code > 125), "{code:?}");
        assert_eq!(setup.site.fetch(&Setup::segment(7)).await.0, Some(0));
        if round == 0 {
            setup.restart().await;
            setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tier_1_lets_go_what_tier_2_proves_and_reads_fall_through() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "3")]).await;
    let held = setup.base.holdings().await.expect("holdings").timelines;
    let first = START.advance(2 * MIB);
    let far = Setup::tree(&setup.tier2());
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.evicted.len(), outcome.expired.len()), (0, 2, 0), "{outcome:?}");
    assert!(outcome.freed_tier1_bytes > 0, "{outcome:?}");
    // Before the oldest backup.
    assert_eq!((outcome.wal_removed_tier1, outcome.wal_removed_tier2), (6, 2), "{outcome:?}");
    let now = Setup::tree(&setup.tier2());
    let stays = |name: &str| {
        let gone = [0, 1].iter().any(|n| name.contains(&Setup::segment(*n)));
        !gone && !name.contains("index/")
    };
    for (name, bytes) in far.iter().filter(|(name, _)| stays(name)) {
        assert_eq!(now.get(name), Some(bytes), "{name} of tier 2");
    }
    let near = |part: &str| Setup::names_in(&setup.tier1(), part).len();
    assert!(near("base/data") < Setup::names_in(&setup.tier2(), "base/data").len());
    assert_eq!(Setup::names_in(&setup.tier1(), &Setup::segment(5)), Vec::<String>::new());
    for _ in 0..2 {
        assert_eq!(setup.names().await, ["b1", "b2", "b3"]);
        let listed = setup.base.holdings().await.expect("holdings").timelines;
        let runs = [Run { start: first, end: held[0].runs[0].end }];
        assert_eq!(listed[0].runs, runs, "the beginning of WAL must not jump");
        assert_eq!(setup.site.fetch(&Setup::segment(2)).await.0, Some(0));
        assert!(!setup.base.entry("b1").await.0.tier1);
        assert!(setup.base.entry("b3").await.0.tier1);
        let (code, outcome) = setup.verify().await;
        assert_eq!(code, 0, "{outcome:?}");
        setup.restart().await;
        setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
    }
    // P5, P7: what was in tier 2 only and is gone there is lost, not absent.
    let lost = Setup::names_in(&setup.tier2(), &Setup::segment(2));
    fs::remove_file(setup.tier2().join(&lost[0])).expect("remove");
    let (code, _) = setup.site.fetch(&Setup::segment(2)).await;
    assert!(code.is_some_and(|code| code > 125), "{code:?}");
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 40, "{outcome:?}");
}

/// P4, P7: what only the bucket has is unknown while it does not answer. A backup goes on without it, and nothing is
/// taken for lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_begins_while_the_bucket_is_down_takes_nothing_for_lost() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "9")]).await;
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.evicted.len()), (0, 2), "{outcome:?}");
    let all = setup.base.list(FileKind::Data).await.expect("a list");
    setup.s3.faults().inject(Rule::always(Fault::SlowDown));
    setup.restart().await;
    let near = setup.base.list(FileKind::Data).await.expect("a list");
    assert!(near.len() < all.len(), "{} of {}", near.len(), all.len());
    let evicted = all.iter().find(|file| !near.contains(file)).expect("a pack that went");
    let file = BaseFile { kind: BaseKind::Data, id: evicted.0.parse().expect("an id") };
    let refused = setup.base.get(file, 0, 0).await.expect_err("the bucket is down");
    assert_eq!(Code::of(&refused), Code::Unavailable, "{refused}");
    let start = START.advance(8 * MIB + 40);
    let directory = setup.site.scratch("made-b4");
    let made = make(&setup.base, &directory, "b4", start, start.advance(MIB / 2)).await;
    made.commit(&setup.base).await;
    setup.s3.faults().heal();
    eventually("b4 in tier 2", PATIENCE, || async { setup.base.entry("b4").await.0.tier2 }).await;
    let (code, outcome) = setup.verify().await;
    assert_eq!((code, outcome.backups.len()), (0, 4), "{outcome:?}");
    let listed = setup.base.list(FileKind::Data).await.expect("a list");
    assert!(all.iter().all(|file| listed.contains(file)), "nothing has gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_file_of_either_tier_is_found_and_repaired() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "3")]).await;
    let (code, outcome) = setup.verify().await;
    assert_eq!((code, outcome.ok, outcome.backups.len()), (0, true, 3), "{outcome:?}");
    let kinds = [
        "base/config",
        "base/keys/",
        "base/index/",
        "base/snapshots/",
        "base/data/",
        "backups/b2.json",
        "repository.json",
        "cluster.json",
        ".zst",
    ];
    for (tier, root) in [("tier1", setup.tier1()), ("tier2", setup.tier2())] {
        let before = Setup::tree(&root);
        let mut flipped = Vec::new();
        for kind in kinds {
            let names = Setup::names_in(&root, kind);
            // Of WAL, one behind the backups' beginnings.
            let name = names.iter().find(|n| kind != ".zst" || n.contains(&Setup::segment(4)));
            let name = name.unwrap_or_else(|| panic!("no {kind} in {tier}"));
            flip(&root.join(name));
            flipped.push(name.clone());
        }
        let (code, outcome) = setup.verify().await;
        assert_eq!(code, 41, "{tier}: {outcome:?}\n{}", setup.site.log());
        for name in &flipped {
            let found =
                outcome.repaired.iter().any(|d| d.tier == tier && d.key.ends_with(name.as_str()));
            assert!(found, "{name} of {tier}: {outcome:?}");
        }
        let after = Setup::tree(&root);
        for name in &flipped {
            assert_eq!(after.get(name), before.get(name), "{name} of {tier} is as it was");
        }
        let (code, outcome) = setup.verify().await;
        assert_eq!(code, 0, "{tier} once more: {outcome:?}");
    }
    let metrics = setup.site.metrics().await;
    let sum = |name: &str| metrics.sum(name, &[]);
    assert_eq!(sum("klio_consumer_backup_verification_failure_total"), 2.0);
    assert_eq!(sum("klio_consumer_backup_verification_success_total"), 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_in_both_tiers_is_told_and_nothing_is_made_of_it() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    // The largest holds chunks of files: without a tree nobody could say what may go.
    let size = |name: &String| std::fs::metadata(setup.tier1().join(name)).map_or(0, |m| m.len());
    let packs = Setup::names_in(&setup.tier1(), "base/data/");
    let pack = packs.into_iter().max_by_key(size).expect("a pack");
    for root in [setup.tier1(), setup.tier2()] {
        flip(&root.join(&pack));
    }
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 40, "{outcome:?}");
    for tier in ["tier1", "tier2"] {
        let found =
            outcome.damaged.iter().any(|d| d.tier == tier && d.key.ends_with(pack.as_str()));
        assert!(found, "{tier}: {outcome:?}");
    }
    let damaged: Vec<String> = {
        let all = setup.base.backups().await.expect("a list").backups;
        let read =
            |bytes: &[u8]| serde_json::from_slice::<VerifyOutcome>(bytes).expect("an outcome");
        let bad = all.iter().map(|e| read(&e.verified)).filter(|v| !v.ok);
        bad.flat_map(|v| v.backups).map(|name| name.to_string()).collect()
    };
    assert!(!damaged.is_empty());
    // A damaged backup pushes no good one out, and where none is good, none goes. (A small chunk that all
    // of them hold lies in the pack of any of them.) Packs stay while a backup needs the damaged one.
    let (code, outcome) = setup.apply().await;
    let held = outcome.held_back.iter().any(|reason| reason.contains("1 packs are damaged"));
    assert_eq!(code, if held { 3 } else { 0 }, "{outcome:?}");
    assert_eq!(held, setup.names().await.iter().any(|name| damaged.contains(name)), "{outcome:?}");
    let left = setup.names().await;
    match damaged.len() {
        3 => assert_eq!(left, ["b1", "b2", "b3"]),
        _ => assert!(left.iter().any(|name| !damaged.contains(name)), "{left:?}, {damaged:?}"),
    }
}

/// Without its secret no backup can be opened, though every file of it is good.
#[tokio::test(flavor = "multi_thread")]
async fn a_secret_or_identity_that_is_gone_is_found() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "3")]).await;
    for name in ["repository.json.age", "cluster.json"] {
        let kept = fs::read(setup.tier1().join(name)).expect("read");
        let key = format!("main/{name}");
        for root in [setup.tier1(), setup.tier2()] {
            fs::remove_file(root.join(name)).expect("remove");
            // From the other tier it is written again.
            if root == setup.tier1() {
                let (code, outcome) = setup.verify().await;
                assert_eq!((code, outcome.repaired.len()), (41, 1), "{outcome:?}");
                assert_eq!(fs::read(root.join(name)).expect("read"), kept);
                fs::remove_file(root.join(name)).expect("remove");
            }
        }
        for args in [&["verify"][..], &["verify", "--backup", "b1", "--read-data", "0"]] {
            let (code, outcome): (i32, VerifyOutcome) = setup.klio(args).await;
            assert_eq!((code, outcome.ok), (40, false), "{args:?}: {outcome:?}");
            assert!(outcome.damaged.iter().any(|d| d.key == key), "{name}: {outcome:?}");
        }
        fs::write(setup.tier1().join(name), &kept).expect("write");
        // The consumer may have been faster, whom a repair from the other tier has told.
        let (code, outcome) = setup.verify().await;
        let found = (code, outcome.repaired.len());
        assert!(matches!(found, (41, 1) | (0, 0)), "{outcome:?}");
        assert_eq!(fs::read(setup.tier2().join(name)).expect("read"), kept);
        assert_eq!(setup.verify().await.0, 0, "{name} once more");
    }
}

/// P6: who does not know which copy is the bad one removes none.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_pruned_while_what_is_damaged_cannot_be_read() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    let known = setup.tier1().join("damaged.json");
    fs::write(&known, "{").expect("write");
    let packs = |root: std::path::PathBuf| {
        let names = Setup::tree(&root).into_keys();
        names.filter(|name| name.contains("base/data")).collect::<Vec<_>>()
    };
    let before = [setup.tier1(), setup.tier2()].map(packs);
    for args in [&["retention", "apply"][..], &["verify"]] {
        let outcome = setup.site.klio(None, args).await;
        assert_eq!(outcome.code, Some(21), "{args:?}: {}{}", outcome.stdout, outcome.stderr);
        assert!(outcome.stderr.contains("damaged.json"), "{}", outcome.stderr);
    }
    assert_eq!([setup.tier1(), setup.tier2()].map(packs), before);
    fs::remove_file(&known).expect("remove");
    assert_eq!(setup.apply().await.0, 0);
    assert_eq!(setup.verify().await.0, 0);
}

/// Nothing in a history tells that a digit of it is wrong, but the other tier's.
#[tokio::test(flavor = "multi_thread")]
async fn histories_that_differ_between_the_tiers_are_found_and_neither_is_overwritten() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "3")]).await;
    let name = "wal/00000002.history";
    let text = |lsn: &str| format!("1\t{lsn}\tno recovery target specified\n");
    let (near, far) = (setup.tier1().join(name), setup.tier2().join(name));
    for place in [&near, &far] {
        fs::write(place, text("0/1800000")).expect("write");
    }
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 0, "{outcome:?}");
    fs::write(&far, text("0/1900000")).expect("write");
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 40, "{outcome:?}");
    let found = outcome.damaged.iter().find(|d| d.key.ends_with(name)).expect("the history");
    assert!(found.problem.contains("0/1800000") && found.problem.contains("0/1900000"));
    assert_eq!(fs::read_to_string(&near).expect("read"), text("0/1800000"));
    assert_eq!(fs::read_to_string(&far).expect("read"), text("0/1900000"));
    fs::write(&far, text("0/1800000")).expect("write");
    assert_eq!(setup.verify().await.0, 0);
}

/// A look at one backup tells the others of what it found in what they share, and a later one of another hides nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_found_in_one_backup_is_known_of_every_backup_that_needs_it() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "9")]).await;
    // The same files under another name share every pack.
    let shared = BackupRecord {
        name: "b4".parse().expect("a name"),
        committed_unix: 0.0,
        ..setup.base.entry("b3").await.1
    };
    setup.base.commit_reserved(&shared).await;
    eventually("b4 in tier 2", PATIENCE, || async { setup.base.entry("b4").await.0.tier2 }).await;
    assert_eq!(setup.verify().await.0, 0);
    let size = |name: &String| std::fs::metadata(setup.tier1().join(name)).map_or(0, |m| m.len());
    let packs = Setup::names_in(&setup.tier1(), "base/data/");
    let pack = packs.into_iter().max_by_key(size).expect("a pack");
    let bytes = fs::read(setup.tier1().join(&pack)).expect("read");
    for root in [setup.tier1(), setup.tier2()] {
        flip(&root.join(&pack));
    }
    let mut ok = BTreeMap::new();
    for name in ["b3", "b1", "b2"] {
        let args = ["verify", "--backup", name, "--read-data", "all"];
        ok.insert(name, setup.klio::<VerifyOutcome>(&args).await.1.ok);
    }
    let mut kept = BTreeMap::new();
    for name in ["b1", "b2", "b3", "b4"] {
        let verified = setup.base.entry(name).await.0.verified;
        let verified: VerifyOutcome = serde_json::from_slice(&verified).expect("an outcome");
        kept.insert(name, verified.ok);
    }
    assert!(ok.values().any(|ok| !ok), "{ok:?}");
    assert_eq!(kept["b4"], kept["b3"], "{kept:?}");
    for (name, ok) in ok {
        assert!(!kept[name] || ok, "{name}: {kept:?}");
    }
    // Two tiers, one file: whatever was looked at last.
    let sum = async || setup.site.metrics().await.sum("klio_verify_damaged", &[]);
    assert_eq!(sum().await, 2.0);
    let good = kept.iter().find(|(_, ok)| **ok).map(|(name, _)| *name);
    if let Some(good) = good {
        let args = ["verify", "--backup", good, "--read-data", "all"];
        assert_eq!(setup.klio::<VerifyOutcome>(&args).await.0, 0);
        assert_eq!(sum().await, 2.0);
    }
    // Nobody is told that it is there, and whoever sends it again heals it.
    let id = pack.rsplit('/').next().expect("a name").to_owned();
    let listed = async || setup.base.list(FileKind::Data).await.expect("a list");
    assert!(listed().await.iter().all(|(name, _)| *name != id));
    let file = BaseFile { kind: BaseKind::Data, id: id.parse().expect("an id") };
    let lease = setup.base.reserve_backup("b5").await;
    assert!(!setup.base.put(file, &bytes).await.expect("stored"), "it is not taken for stored");
    drop(lease);
    assert!(fs::read(setup.tier1().join(&pack)).expect("read") == bytes);
    assert!(listed().await.iter().any(|(name, _)| *name == id));
    let (code, outcome): (i32, VerifyOutcome) = setup.klio(&["verify", "--read-data", "0"]).await;
    assert_eq!(code, 41, "{outcome:?}");
    assert_eq!(setup.verify().await.0, 0);
    eventually("the metric", PATIENCE, || async { sum().await == 0.0 }).await;
}

/// A backup that is called damaged without being so would let retention keep the wrong ones.
#[tokio::test(flavor = "multi_thread")]
async fn the_damaged_snapshot_of_one_backup_is_no_other_backups_damage() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "3")]).await;
    let snapshot = {
        let all = setup.base.backups().await.expect("a list").backups;
        let records =
            all.iter().map(|e| serde_json::from_slice::<BackupRecord>(&e.record).expect("JSON"));
        let first = records.into_iter().find(|record| record.name.as_str() == "b1");
        format!("base/snapshots/{}", first.expect("b1").snapshot)
    };
    for root in [setup.tier1(), setup.tier2()] {
        flip(&root.join(&snapshot));
    }
    for (name, expected) in [("b1", 40), ("b2", 0), ("b3", 0)] {
        let args = ["verify", "--backup", name, "--read-data", "all"];
        let (code, outcome): (i32, VerifyOutcome) = setup.klio(&args).await;
        assert_eq!((code, outcome.ok), (expected, expected == 0), "{name}: {outcome:?}");
    }
    // Asked for all, each has its own outcome.
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 40, "{outcome:?}");
    let all = setup.base.backups().await.expect("a list").backups;
    let outcomes = all
        .iter()
        .map(|e| serde_json::from_slice::<VerifyOutcome>(&e.verified).expect("an outcome"));
    let mut good: Vec<String> =
        outcomes.filter(|o| o.ok).flat_map(|o| o.backups).map(|n| n.to_string()).collect();
    good.sort();
    assert_eq!(good, ["b2", "b3"]);
}

/// P6.
#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_record_stops_all_removal_and_raises_an_alarm() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    flip(&setup.tier1().join("backups/b2.json"));
    let trees = || {
        let keep = |(name, _): &(String, Vec<u8>)| {
            !name.contains("maintenance.json") && !name.contains("archive.json")
        };
        [setup.tier1(), setup.tier2()].map(|root| {
            Setup::tree(&root).into_iter().filter(keep).map(|(name, _)| name).collect::<Vec<_>>()
        })
    };
    let before = trees();
    let (code, plan): (i32, RetentionPlan) = setup.klio(&["retention", "plan"]).await;
    assert_eq!(code, 3);
    assert!(plan.is_empty() && plan.alarms[0].contains("b2"), "{:?}", plan.alarms);
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 3);
    assert!(outcome.held_back[0].contains("b2"), "{outcome:?}");
    assert_eq!(trees(), before);
    assert_eq!(setup.site.metrics().await.sum("klio_maintenance_alarm", &[]), 1.0);
    // Verify puts it right from tier 2, and then retention goes on.
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 41, "{outcome:?}");
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.expired.len()), (0, 2), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_only_read_are_told_and_nothing_is_lost() {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    for method in [Method::DELETE, Method::PUT, Method::POST] {
        setup.s3.faults().inject(Rule::always(Fault::Status(403)).on(method));
    }
    let outcome = setup.site.klio(None, &["retention", "apply"]).await;
    assert!(!matches!(outcome.code, Some(0)), "{outcome:?}");
    assert!(outcome.stderr.contains("expire backup"), "{outcome:?}");
    assert_eq!(setup.names().await, ["b1", "b2", "b3"]);
    flip(&setup.tier2().join("backups/b1.json"));
    let (code, found) = setup.verify().await;
    assert_eq!(code, 40, "a repair that is refused is no repair: {found:?}");
    assert!(found.damaged[0].problem.contains("cannot repair"), "{found:?}");
    setup.s3.faults().heal();
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 41, "{outcome:?}");
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.expired.len()), (0, 2), "{outcome:?}");
}

/// P6: what is only in a bucket that is not asked any more is neither lost nor near.
#[tokio::test(flavor = "multi_thread")]
async fn without_the_bucket_that_holds_them_evicted_backups_raise_an_alarm_and_nothing_goes() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "3")]).await;
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.evicted.len()), (0, 2), "{outcome:?}");
    for name in ["URL", "ENDPOINT", "REGION", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"] {
        setup.site.unset(&format!("KLIO_TIER2__{name}"));
    }
    setup.restart().await;
    // With a policy that would name nothing but what is out of reach, the one on tier 1 stays as well.
    let (code, plan): (i32, RetentionPlan) = setup.klio(&["retention", "plan"]).await;
    assert_eq!((code, plan.alarms.len()), (3, 1), "{plan:?}");
    for part in ["b1 and 1 more", "no [tier2]", "hint: put the bucket"] {
        assert!(plan.alarms[0].contains(part), "{part}: {:?}", plan.alarms);
    }
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 3, "{outcome:?}");
    assert_eq!(setup.site.metrics().await.sum("klio_maintenance_alarm", &[]), 1.0);
    for (name, near) in [("b1", false), ("b2", false), ("b3", true)] {
        assert_eq!(setup.base.entry(name).await.0.tier1, near, "{name}");
    }
    let s3 = &setup.s3;
    setup.site.set_tier2(s3);
    setup.restart().await;
    eventually("the bucket to be listed", PATIENCE, || async {
        setup.klio::<RetentionPlan>(&["retention", "plan"]).await.0 == 0
    })
    .await;
    assert_eq!(setup.names().await, ["b1", "b2", "b3"]);
    assert_eq!(setup.verify().await.0, 0);
}

fn age(args: &[&std::ffi::OsStr], to: &Path) {
    let status = std::process::Command::new("age").arg("-o").arg(to).args(args).status();
    assert!(status.expect("age runs").success(), "age {args:?}");
}

/// As when encryption was switched on or off after a segment was archived.
#[tokio::test(flavor = "multi_thread")]
async fn copies_of_one_wal_file_in_different_forms_are_repaired_from_each_other() {
    // A comparison of the tiers would find and repair some of it before the verification does.
    let settings = [
        ("KLIO_RETENTION__TIER2__LAST", "3"),
        ("KLIO_CONSUMER__RECONCILE_INTERVAL_SECONDS", "3600"),
    ];
    let setup = Setup::new(&settings).await;
    let segment = format!("wal/00000001/{}.zst", Setup::segment(4));
    let (plain, near, far) = (
        setup.tier1().join(&segment),
        setup.tier1().join(format!("{segment}.age")),
        setup.tier2().join(format!("{segment}.age")),
    );
    let identity = setup.site.identity().expect("encryption is on");
    age(&["-d".as_ref(), "-i".as_ref(), identity.as_os_str(), near.as_os_str()], &plain);
    fs::remove_file(&near).expect("it was there");
    let content = fs::read(&plain).expect("readable");
    for (damaged, tier) in [(&far, "tier2"), (&plain, "tier1")] {
        flip(damaged);
        let (code, outcome) = setup.verify().await;
        assert_eq!(code, 41, "{tier}: {outcome:?}");
        assert_eq!((outcome.repaired.len(), outcome.repaired[0].tier.as_str()), (1, tier));
        assert_eq!(setup.verify().await.0, 0, "{tier} once more");
        assert_eq!(fs::read(&plain).expect("readable"), content);
        let opened = setup.site.scratch(&format!("opened-{tier}"));
        age(&["-d".as_ref(), "-i".as_ref(), identity.as_os_str(), far.as_os_str()], &opened);
        assert_eq!(fs::read(opened).expect("readable"), content);
    }
}

/// MAINT5: the child is not the server. Its death fails what it was doing, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_the_child_alone_is_told_and_the_next_run_goes_on() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    let server = setup.site.server().pid();
    let is_ours = |child: &Descendant| {
        let line = fs::read(format!("/proc/{}/cmdline", child.pid())).unwrap_or_default();
        String::from_utf8_lossy(&line).split('\0').any(|word| word == "repository")
    };
    for verb in [&["retention", "apply"][..], &["verify"]] {
        // It asks the bucket, and waits there.
        setup.s3.faults().inject(Rule::always(Fault::Hang).path("base"));
        let log = setup.site.scratch(&format!("killed-{}.log", verb[0]));
        let mut running = Running::spawn("klio", setup.site.klio_command(None, verb), &log);
        let child = eventually("the child", PATIENCE, || async {
            descendants(server).into_iter().find(is_ours)
        })
        .await;
        child.kill9();
        let status = running.wait_exit(PATIENCE).await;
        setup.s3.faults().heal();
        assert!(!status.success(), "{verb:?}: {}", running.log());
        assert!(running.log().contains("child"), "the reason is named: {}", running.log());
        assert!(setup.site.server().is_running());
    }
    let failed = [("outcome", "failed")];
    assert!(setup.site.metrics().await.sum("klio_maintenance_runs_total", &failed) >= 1.0);
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 0, "{outcome:?}\n{}", setup.site.log());
    assert_eq!(setup.names().await, ["b3"]);
    let (code, outcome) = setup.verify().await;
    assert_eq!(code, 0, "{outcome:?}");
    setup.backup(4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_running_backup_nothing_is_removed() {
    let wait = ("KLIO_MAINTENANCE__WAIT_FOR_BACKUP_SECONDS", "1");
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1"), wait]).await;
    let (_, reservation) = setup.base.reserve(Purpose::Backup, "b4").await.expect("reserved");
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 3);
    assert!(outcome.held_back[0].contains("b4"), "{outcome:?}");
    assert_eq!(setup.names().await, ["b1", "b2", "b3"]);
    drop(reservation);
    eventually("maintenance after the backup", PATIENCE, || async {
        setup.apply().await.1.expired.len() == 2
    })
    .await;
}

/// P6: a backup that expires while it is restored, or recovered from, leaves its WAL until that is over.
#[tokio::test(flavor = "multi_thread")]
async fn wal_that_a_restore_or_a_recovery_still_needs_stays_and_the_outcome_says_why() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    let first = |setup: &Setup| -> u64 {
        let held = Setup::names_in(&setup.tier2(), ".zst");
        let there = |number: &u64| held.iter().any(|name| name.contains(&Setup::segment(*number)));
        (0..SEGMENTS).find(there).expect("WAL in tier 2")
    };
    // A restore of b1, which begins in segment 2. b1 and b2 expire beside it.
    let (_, restore) = setup.base.reserve(Purpose::Restore, "b1").await.expect("reserved");
    let held = |what: &str, setup: &Setup, (code, outcome): (i32, MaintenanceOutcome)| {
        let told = outcome.held_back.iter().any(|reason| reason.contains(what));
        assert!(code == 3 && told, "{code} {outcome:?}\n{}", setup.site.log());
    };
    eventually("the restore to be known by its backup", PATIENCE, || async {
        held("a restore", &setup, setup.apply().await);
        (first(&setup) == 2).then_some(())
    })
    .await;
    assert_eq!(setup.names().await, ["b3"]);
    assert_eq!(setup.site.fetch(&Setup::segment(2)).await.0, Some(0));
    drop(restore);
    held("a restore", &setup, setup.apply().await);

    // Of a backup that the server does not know: all WAL stays, until it ends.
    setup.restart().await;
    setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
    let (_, restore) = setup.base.reserve(Purpose::Restore, "b1").await.expect("reserved");
    held("a restore", &setup, setup.apply().await);
    assert_eq!(first(&setup), 2);
    // A recovery that is at segment 4.
    assert_eq!(setup.site.fetch(&Setup::segment(4)).await.0, Some(0));
    drop(restore);
    eventually("the restore to be over", PATIENCE, || async {
        held("fetched", &setup, setup.apply().await);
        (first(&setup) == 4).then_some(())
    })
    .await;
    assert_eq!(setup.site.fetch(&Setup::segment(4)).await.0, Some(0));

    // Nobody reads any more.
    setup.restart().await;
    setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.held_back.len(), first(&setup)), (0, 0, 6), "{outcome:?}");
}

/// A server in place of a lost one may never see the old timelines: what nobody needs of them goes all the same.
#[tokio::test(flavor = "multi_thread")]
async fn wal_of_a_timeline_that_only_the_bucket_has_expires_too() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    setup._stream = None;
    setup.site.stop().await;
    fs::remove_dir_all(setup.site.dir().join("data")).expect("lose the disk");
    setup.site.start().await;
    let (base, channel) = connect(&setup.site).await;
    setup.base = base;
    // A standby was promoted meanwhile.
    let (switch, size) = (START.advance(SEGMENTS * MIB), segment_size());
    let history = PutHistoryRequest {
        cluster: "main".into(),
        system_identifier: client::SYSTEM,
        segment_size: size.as_u32(),
        postgres_version: 150_018,
        timeline: 2,
        content: format!("1\t{switch}\tpromoted\n").into(),
    };
    WalClient::new(channel.clone()).put_history(history).await.expect("a history");
    let opening = Open { timeline: 2, ..client::open("main", size, switch) };
    let mut stream = Stream::open(&channel, opening).await.expect("a stream");
    for half in 0..5 {
        let (at, half) = (switch.advance(half * MIB / 2), MIB / 2);
        stream.append(at, client::wal(at, half as usize, size, 2)).await;
        stream.flushed(at.advance(half)).await.expect("acknowledged");
    }
    let (start, two) = (switch.advance(MIB + 40), TimelineId::new(2).expect("a timeline"));
    let directory = setup.site.scratch("made-b4");
    let mut made = make(&setup.base, &directory, "b4", start, start.advance(MIB / 2)).await;
    (made.record.start_timeline, made.record.stop_timeline) = (two, two);
    made.commit(&setup.base).await;
    eventually("b4 in tier 2", PATIENCE, || async { setup.base.entry("b4").await.0.tier2 }).await;

    let held = || Setup::names_in(&setup.tier2(), "wal/00000001/");
    assert_eq!(held().len(), SEGMENTS as usize, "{:?}", held());
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 0, "{outcome:?}\n{}", setup.site.log());
    assert_eq!(setup.names().await, ["b4"]);
    // The last one tells how far the timeline went.
    let left = held();
    assert!(left.len() == 1 && left[0].contains(&Setup::segment(SEGMENTS - 1)), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_backup_brought_to_tier_2_is_read_back_and_drills_are_kept() {
    let setup =
        Setup::new(&[("KLIO_VERIFY__AFTER_BACKUP", "true"), ("KLIO_MAINTENANCE__ENABLED", "true")])
            .await;
    setup.backup(4).await;
    eventually("the new backup to be verified", PATIENCE, || async {
        !setup.base.entry("b4").await.0.verified.is_empty()
    })
    .await;
    let verified = setup.base.entry("b4").await.0.verified;
    let verified: VerifyOutcome = serde_json::from_slice(&verified).expect("an outcome");
    assert!(verified.ok && verified.read_percent == 10.0, "{verified:?}");
    let drill = DrillOutcome {
        backup: "b4".parse().expect("a name"),
        ok: true,
        finished_unix: verified.finished_unix,
        restore_seconds: 2.5,
        recovery_seconds: 1.5,
        check_seconds: 0.5,
        recovered_lsn: None,
        problems: vec![],
        unknown: Default::default(),
    };
    let request = |drill: &DrillOutcome| RecordDrillRequest {
        cluster: "main".into(),
        outcome: serde_json::to_vec(drill).expect("JSON").into(),
    };
    let mut client = setup.base.client.clone();
    client.record_drill(request(&drill)).await.expect("kept");
    // A machine whose clock is a year ahead hides no drill that comes after it.
    let far = DrillOutcome { finished_unix: drill.finished_unix + 31_536_000.0, ..drill.clone() };
    client.record_drill(request(&far)).await.expect("kept");
    let kept = setup.base.entry("b4").await.0.drilled;
    let kept: DrillOutcome = serde_json::from_slice(&kept).expect("an outcome");
    assert!(kept.finished_unix < drill.finished_unix + 3600.0, "{kept:?}");
    assert!(setup.site.log().contains("in the future"), "{}", setup.site.log());
    let failed = DrillOutcome { ok: false, ..drill.clone() };
    client.record_drill(request(&failed)).await.expect("kept");
    let success = async |wanted: f64| {
        let seen = async || setup.site.metrics().await.sum("klio_drill_latest_success", &[]);
        eventually("the metric", PATIENCE, || async { seen().await == wanted }).await;
    };
    success(0.0).await;
    client.record_drill(request(&drill)).await.expect("kept");
    success(1.0).await;
    let unknown = DrillOutcome { backup: "other".parse().expect("a name"), ..drill.clone() };
    assert!(client.record_drill(request(&unknown)).await.is_err());
    let kept = setup.base.entry("b4").await.0.drilled;
    assert_eq!(serde_json::from_slice::<DrillOutcome>(&kept).expect("an outcome"), drill);
    let metrics = setup.site.metrics().await;
    assert_eq!(metrics.sum("klio_drill_latest_success", &[]), 1.0);
    assert!(metrics.sum("klio_consumer_backup_verification_success_total", &[]) >= 1.0);
    assert!(metrics.sum("klio_drill_latest_age_seconds", &[]) < 3600.0);
    assert!(metrics.sum("klio_verify_latest_age_seconds", &[]) < 3600.0);
}

/// The crash points of maintenance, in the order in which the first runs come to them.
pub(crate) const CRASH_POINTS: [&str; 8] = [
    "wal.evicted",
    "wal.expired",
    "expire.tier2",
    "expire.tier1",
    "prune.forgotten",
    "prune.removed",
    "evict.proven",
    "evict.removed",
];

/// At each of its points either the server dies, or its child; then the server is killed, too.
#[tokio::test(flavor = "multi_thread")]
async fn maintenance_that_dies_at_any_point_leaves_every_kept_backup_whole() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "2")]).await;
    for point in CRASH_POINTS {
        let armed = Armed::new(&setup.site, point);
        setup._stream = None;
        setup.site.stop().await;
        setup.site.unset(Armed::VARIABLE);
        setup.site.set(Armed::VARIABLE, &armed.value());
        setup.site.start().await;
        let command = setup.site.klio_command(None, &["retention", "apply"]);
        let log = setup.site.scratch(&format!("{point}.log"));
        let mut running = Running::spawn("klio", command, &log);
        let what = format!("maintenance to come to {point}");
        eventually(&what, PATIENCE, || async { armed.has_died() }).await;
        running.wait_exit(PATIENCE).await;
        setup.site.kill9();
        setup.site.start().await;
        setup.base = connect(&setup.site).await.0;
        setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
        setup.require_kept(point).await;
        setup.backup_named(point, 7).await;
    }
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 0, "{outcome:?}");
    assert_eq!(setup.names().await, ["evict.proven", "evict.removed"]);
    setup.require_kept("the end").await;
}

/// Nothing that is kept is lost, wherever maintenance or verification is cut off.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_during_maintenance_leaves_every_kept_backup_whole() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "2")]).await;
    let seed = env::seed();
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..8_u64 {
        let verb: &[&str] = if round % 4 == 3 { &["verify"] } else { &["retention", "apply"] };
        let command = setup.site.klio_command(None, verb);
        let log = setup.site.scratch(&format!("work-{round}.log"));
        let mut running = klio_tests::process::Running::spawn("klio", command, &log);
        // A debug build needs about 200 ms to begin, and most of a second for all of it.
        tokio::time::sleep(Duration::from_millis(random.random_range(100..1200))).await;
        setup._stream = None;
        setup.site.kill9();
        running.kill9();
        setup.site.start().await;
        setup.base = connect(&setup.site).await.0;
        setup.site.wait_archived(START.advance(SEGMENTS * MIB)).await;
        setup.require_kept(&format!("seed {seed}, round {round}")).await;
        setup.backup_named(&format!("r{round}"), 7).await;
    }
    let (code, outcome) = setup.apply().await;
    assert_eq!(code, 0, "{outcome:?}");
    assert_eq!(setup.names().await.len(), 2);
    assert_eq!(setup.verify().await.0, 0);
}

/// A server in place of a lost one, and a bucket that leaves one record out of its listing.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_a_listing_leaves_out_is_asked_for_before_its_snapshot_goes() {
    let mut setup = Setup::new(&[
        ("KLIO_RETENTION__TIER2__LAST", "9"),
        ("KLIO_CONSUMER__RECONCILE_INTERVAL_SECONDS", "3600"),
    ])
    .await;
    let snapshot = setup.base.entry("b2").await.1.snapshot;
    setup._stream = None;
    setup.site.stop().await;
    fs::remove_dir_all(setup.site.dir().join("data")).expect("lose the disk");
    let (record, aside) = (setup.tier2().join("backups/b2.json"), setup.site.scratch("b2.json"));
    fs::rename(&record, &aside).expect("left out");
    setup.site.start().await;
    setup.base = connect(&setup.site).await.0;
    setup.base.open().await.expect("the repository");
    assert_eq!(setup.names().await, ["b1", "b3"]);
    let kept = || Setup::names_in(&setup.tier2(), &snapshot).len();
    assert_eq!(kept(), 1);
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, kept()), (0, 1), "{outcome:?}: nothing is forgotten in the first days");
    // Days later, and the listing never said otherwise.
    let marks = setup.tier1().join("orphans.json");
    fs::rename(&aside, &record).expect("there all the same");
    let mut body: serde_json::Value =
        record::load(&RealDisk, &marks).expect("marks").expect("marks");
    assert!(body["since_unix"][&snapshot].is_f64(), "{body}");
    body["since_unix"][&snapshot] = 1e9.into();
    record::store(&RealDisk, &marks, &body).expect("written");
    let (code, outcome) = setup.apply().await;
    let told = outcome.held_back.iter().any(|why| why.contains("record of b2"));
    assert!(code == 3 && told && kept() == 1, "{code} {outcome:?}");
    // One that is not there goes.
    fs::remove_file(&record).expect("removed");
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, kept()), (0, 0), "{outcome:?}");
}

/// A record that was committed while the server's clock was wrong is given the right time, or taken away, by a person.
#[tokio::test(flavor = "multi_thread")]
async fn a_person_redates_or_removes_a_record_in_both_tiers() {
    let mut setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "9")]).await;
    let committed = setup.base.entry("b1").await.1.committed_unix;
    let to = |args: &[&'static str]| [&["backup"], args, &["--cluster", "main"]].concat();
    let wrong = to(&["redate", "b1", "--to", "2020-01-01T00:00:00Z"]);
    let beside = setup.site.server_tool(&wrong).await;
    assert!(beside.code == Some(1) && beside.stderr.contains("stopped"), "{beside:?}");
    setup._stream = None;
    setup.site.stop().await;
    let dry = setup.site.server_tool(&[wrong.as_slice(), &["--dry-run"]].concat()).await;
    assert_eq!(dry.code, Some(0), "{dry:?}");
    assert!(dry.stdout.contains("2020-01-01") && dry.stdout.contains("--dry-run"), "{dry:?}");
    let read = |root: PathBuf| -> BackupRecord {
        let read = record::load(&RealDisk, &root.join("backups/b1.json"));
        read.expect("a record").expect("a record")
    };
    for root in [setup.tier1(), setup.tier2()] {
        assert_eq!(read(root).committed_unix, committed);
    }
    assert_eq!(setup.site.server_tool(&wrong).await.code, Some(0));
    for root in [setup.tier1(), setup.tier2()] {
        let record = read(root);
        assert_eq!(record.committed_unix, 1_577_836_800.0);
        assert!(record.redated_unix.is_some_and(|at| at >= committed), "{record:?}");
    }
    let future = to(&["redate", "b1", "--to", "2999-01-01T00:00:00Z"]);
    assert_eq!(setup.site.server_tool(&future).await.code, Some(1));
    let unknown = setup.site.server_tool(&to(&["remove", "b7"])).await;
    assert!(
        unknown.code == Some(1)
            && unknown.stderr.contains("generation 1 of cluster main has no backup b7"),
        "{unknown:?}"
    );
    let removed = setup.site.server_tool(&to(&["remove", "b2"])).await;
    assert_eq!(removed.code, Some(0), "{removed:?}");
    setup.site.start().await;
    setup.base = connect(&setup.site).await.0;
    assert_eq!(setup.names().await, ["b1", "b3"]);
    let plan: RetentionPlan = setup.klio(&["retention", "plan"]).await.1;
    assert_eq!(plan.alarms, [""; 0], "what a person said is believed");
    assert_eq!(setup.verify().await.0, 0);
}

/// The server's clock was 400 days ahead when a backup was committed.
#[tokio::test(flavor = "multi_thread")]
async fn a_record_with_two_times_far_apart_expires_nothing_raises_the_alarm_and_still_lets_tier_1_go()
 {
    let setup = Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1")]).await;
    let start = START.advance(8 * MIB + 40);
    let directory = setup.site.scratch("made-b4");
    let mut made = make(&setup.base, &directory, "b4", start, start.advance(MIB / 2)).await;
    made.record.started_postgres_unix -= 400.0 * 86_400.0;
    made.record.stopped_postgres_unix -= 400.0 * 86_400.0;
    made.commit(&setup.base).await;
    eventually("b4 in tier 2", PATIENCE, || async { setup.base.entry("b4").await.0.tier2 }).await;
    let (code, outcome) = setup.apply().await;
    let told = outcome.held_back.iter().any(|why| why.contains("b4") && why.contains("redate"));
    assert!(code == 3 && told && outcome.expired.is_empty(), "{code} {outcome:?}");
    // What does not rest on a clock goes on: tier 1 runs full for nobody.
    let evicted: Vec<&str> = outcome.evicted.iter().map(|name| name.as_str()).collect();
    assert_eq!(evicted, ["b1", "b2", "b3"], "{outcome:?}");
    assert!(outcome.wal_removed_tier1 > 0 && outcome.wal_removed_tier2 == 0, "{outcome:?}");
    assert_eq!(setup.names().await, ["b1", "b2", "b3", "b4"]);
    let status = setup.site.klio(None, &["status"]).await;
    assert!(status.stdout.contains("--to postgres"), "the way out is shown: {status:?}");
    assert_eq!(setup.site.metrics().await.sum("klio_maintenance_alarm", &[]), 1.0);
}

/// Three tiny backups do not push out the ones before, with the default age; a share below all goes on where the
/// last run ended, and when it has come round it says so.
#[tokio::test(flavor = "multi_thread")]
async fn young_backups_stay_and_a_share_that_is_read_comes_round() {
    let setup =
        Setup::new(&[("KLIO_RETENTION__TIER2__LAST", "1"), ("KLIO_RETENTION__MINIMUM_AGE", "7d")])
            .await;
    let plan: RetentionPlan = setup.klio(&["retention", "plan"]).await.1;
    let reasons = &plan.backups[0].tier2.reasons;
    assert!(reasons.iter().any(|why| why == "younger than 7 d"), "{plan:?}");
    let (code, outcome) = setup.apply().await;
    assert_eq!((code, outcome.expired.len()), (0, 0), "{outcome:?}");
    let mut runs = 0;
    loop {
        runs += 1;
        let args = ["verify", "--read-data", "40"];
        let (code, outcome): (i32, VerifyOutcome) = setup.klio(&args).await;
        assert_eq!(code, 0, "{outcome:?}");
        if outcome.all_read_since_unix.is_some() {
            break;
        }
        assert!(runs < 3, "{runs} runs of 40 % and not all was read");
    }
    assert!(runs > 1);
    let age = setup.site.metrics().await.sum("klio_verify_coverage_age_seconds", &[]);
    assert!((0.0..600.0).contains(&age), "{age}");
}
