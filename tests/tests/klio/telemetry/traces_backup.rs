//! One trace id follows a base backup from the command or the schedule to the bucket, through server, queue and logs
//! (docs/telemetry.md), and what is stored is the same with and without telemetry.

use klio_proto::v1::{OpenRepositoryRequest, base_client::BaseClient};
use klio_storage::{
    catalog::BackupRecord,
    disk::RealDisk,
    repository::{ChunkId, LocalFiles, Repository, Secret, StoredKind},
};
use klio_tests::{
    client,
    otlp::Span,
    postgres::Postgres,
    programs::{self, Outcome},
    site::{PATIENCE, Site},
    traced::{Traced, check_all, is_put},
    wait::{eventually, eventually_now},
};
use serde_json::Value;
use std::{collections::BTreeMap, fs, sync::Arc};

/// From a pack's request to the bucket up to the backup.
const PACK: [(&str, &str); 7] = [
    ("tier2.request", "klio-server"),
    ("tier2.upload", "klio-server"),
    ("offload", "klio-server"),
    ("base.publish", "klio-server"),
    ("base.put_file", "klio-server"),
    ("backup_run", "klio"),
    ("backup", "klio"),
];

/// From the record's request to the bucket up to the backup.
const RECORD: [(&str, &str); 7] = [
    ("tier2.request", "klio-server"),
    ("tier2.upload", "klio-server"),
    ("offload", "klio-server"),
    ("base.publish", "klio-server"),
    ("base.commit_backup", "klio-server"),
    ("backup_run", "klio"),
    ("backup", "klio"),
];

async fn quiet_postgres() -> Postgres {
    let pg = Postgres::builder().initdb("-k").set("autovacuum", "off").start().await;
    pg.execute("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n").await;
    pg.execute("VACUUM FREEZE").await;
    pg.execute("CHECKPOINT").await;
    pg
}

async fn streaming(traced: &Traced) {
    eventually("a position", PATIENCE, || traced.site.lsn("flushed_lsn")).await;
}

fn record(outcome: &Outcome) -> BackupRecord {
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    let json: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    serde_json::from_value(json["backup"].clone()).expect("a record")
}

/// Of one trace, by name, with their program.
fn named<'a>(spans: &'a [Span], trace: &str, name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|s| s.trace == trace && s.name == name).collect()
}

/// Lines of a log in JSON with this trace id.
fn json_lines(log: &str, trace: &str) -> Vec<Value> {
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["trace_id"] == trace).collect()
}

/// Every file of PostgreSQL's tables as the list of its chunks.
async fn chunks(site: &Site, record: &BackupRecord) -> BTreeMap<String, Vec<ChunkId>> {
    let channel = client::connect(site, &site.bundle()).await.expect("connect");
    let request = OpenRepositoryRequest { cluster: "main".into(), ..Default::default() };
    let answer = BaseClient::new(channel).open_repository(request).await.expect("open repository");
    let secret: Secret = serde_json::from_slice(&answer.into_inner().secret).expect("a secret");
    let files = LocalFiles::new(Arc::new(RealDisk), site.tier1().join("main/base"));
    let id = record.snapshot.parse().expect("a snapshot id");
    let read = move || {
        let reader = Repository::open(Arc::new(files), &secret)?.reader(&id)?;
        let mut all = BTreeMap::new();
        for entry in reader.entries()? {
            let entry = entry?;
            let path = entry.path.display().to_string();
            if let StoredKind::File { chunks, .. } = entry.kind
                && path.starts_with("data/base/")
            {
                all.insert(path, chunks);
            }
        }
        Ok::<_, klio_storage::Error>(all)
    };
    tokio::task::spawn_blocking(read).await.expect("no panic").expect("read the snapshot")
}

/// The server logs JSON here, the command text; the next test has it the other way round.
#[tokio::test(flavor = "multi_thread")]
async fn one_trace_follows_a_backup_from_the_command_to_the_bucket() {
    let pg = quiet_postgres().await;
    let mut traced = Traced::new("json").await;
    let _stream = traced.stream(&pg, "stream.log", &[]);
    streaming(&traced).await;
    let outcome = traced.klio(Some(&pg), &["backup", "--json", "--debug", "--name", "one"]).await;
    let taken = record(&outcome);

    let pack = traced.chain(&PACK, |s| is_put(s, "base/data")).await;
    let trace = pack[0].trace.clone();
    let committed = traced.chain(&RECORD, |s| is_put(s, "main/backups") && s.trace == trace).await;
    let root = traced.span("cli.backup", |s| s.name == "cli.backup" && s.trace == trace).await;
    assert_eq!((root.parent.as_str(), root.service.as_str()), ("", "klio"));
    assert_eq!(root.attributes["process.exit.code"], "0", "{root:?}");
    for ends in [&pack, &committed] {
        let backup = ends.last().expect("a chain");
        assert_eq!(backup.parent, root.id);
        assert_eq!(backup.attributes["backup.name"], "one");
    }
    for (span, kind) in
        [(&pack[0], "CLIENT"), (&pack[2], "CONSUMER"), (&pack[3], "PRODUCER"), (&pack[4], "SERVER")]
    {
        assert_eq!(span.kind, kind, "{span:?}");
    }
    let request = &pack[0].attributes;
    let found = ["bucket", "http.response.status_code", "retries"].map(|key| request[key].as_str());
    assert_eq!(found, [traced.s3.settings().bucket.as_str(), "200", "0"]);

    // The life cycle is its own tracer's; verification and maintenance are children of the backup, and reach the server
    // and the child process that works there.
    let spans = eventually_now("all of the life cycle", PATIENCE, || {
        let spans = traced.collector.spans();
        let wanted = [
            "backup_verify",
            "backup_maintenance",
            "base.verify",
            "base.maintain",
            "base.reserve",
            "base.open_repository",
            "maintenance.child",
            "cli.repository",
        ];
        let missing: Vec<_> =
            wanted.into_iter().filter(|name| named(&spans, &trace, name).is_empty()).collect();
        if missing.is_empty() { Ok(spans) } else { Err(missing) }
    })
    .await;
    let backup = pack.last().expect("a chain");
    for name in ["backup", "backup_run", "backup_verify", "backup_maintenance"] {
        let [span] = named(&spans, &trace, name)[..] else { panic!("one {name}") };
        assert_eq!((span.tracer.as_str(), span.failed), ("klio.backup", false), "{span:?}");
        assert!(name == "backup" || span.parent == backup.id, "{span:?}");
    }
    assert!(spans.iter().all(|s| s.name.starts_with("backup") || s.tracer == "klio"));
    let parent = |span: &Span| spans.iter().find(|s| s.id == span.parent).map(|s| s.name.as_str());
    assert_eq!(parent(named(&spans, &trace, "base.verify")[0]), Some("backup_verify"));
    assert_eq!(parent(named(&spans, &trace, "base.maintain")[0]), Some("backup_maintenance"));
    assert_eq!(parent(named(&spans, &trace, "cli.repository")[0]), Some("maintenance.child"));

    // The same id in the logs of both programs, and in the command's last line.
    let typed = outcome.stderr.lines().filter(|l| l.contains(&format!("trace_id={trace}")));
    assert!(typed.count() > 0, "{}", outcome.stderr);
    assert!(outcome.stderr.contains(&format!("trace {trace}: delivered")), "{}", outcome.stderr);
    let lines = json_lines(&traced.site.log(), &trace);
    let says = |text: &str| lines.iter().any(|line| line["message"].as_str() == Some(text));
    assert!(says("a backup is complete") && says("a backup is in tier 2"), "{lines:#?}");

    // A name that is taken: refused by the server, and every span of it says so.
    let refused = traced.klio(Some(&pg), &["backup", "--name", "one"]).await;
    assert_ne!(refused.code, Some(0));
    let failed = traced.span("a failed cli.backup", |s| s.name == "cli.backup" && s.failed).await;
    let spans = eventually_now("the failed spans", PATIENCE, || {
        let spans = traced.collector.spans();
        let all =
            ["backup", "backup_run"].iter().all(|n| !named(&spans, &failed.trace, n).is_empty());
        all.then_some(spans)
    })
    .await;
    for name in ["backup", "backup_run", "cli.backup"] {
        let [span] = named(&spans, &failed.trace, name)[..] else { panic!("one {name}") };
        assert!(span.failed && span.attributes["error.type"] == "INVALID", "{span:?}");
        assert!(name == "cli.backup" || span.exceptions == ["INVALID"], "{span:?}");
    }
    let trace = failed.trace.clone();
    let refusal = |s: &Span| s.trace == trace && s.name == "base.reserve" && s.failed;
    let refusal = traced.span("the server's refusal", refusal).await;
    assert_eq!(refusal.attributes["error.type"], "INVALID");
    let secret = &traced.s3.settings().secret_key;
    check_all(&spans, &[secret]);

    // Telemetry is observation only: the same files are the same chunks without it. Read before the next backup, after which
    // tier 1 lets the packs of this one go.
    let with = chunks(&traced.site, &taken).await;
    let mut command = traced.site.klio_command(Some(&pg), &["backup", "--json", "--full-read"]);
    command.env("OTEL_SDK_DISABLED", "true");
    let without = chunks(&traced.site, &record(&programs::run(command).await)).await;
    assert!(with.len() > 100, "{} files", with.len());
    for (path, chunks) in &with {
        assert_eq!(Some(chunks), without.get(path), "{path}");
    }
    assert_eq!(with.len(), without.len());

    // The server reads each new backup back from tier 2 by itself. Damage that it finds while the next backup runs makes that one
    // incomplete: the packs that it builds on are known to be bad before it is committed.
    traced.site.stop().await;
    traced.site.set("KLIO_VERIFY__AFTER_BACKUP", "false");
    traced.site.start().await;

    // Damage that verification finds does not unmake a backup (TAKE5), and its span says so.
    damage_largest_pack(&traced);
    let mut command = traced.site.klio_command(Some(&pg), &["backup"]);
    command.env("KLIO_BACKUP__VERIFY_READ_PERCENT", "100");
    traced.trace(&mut command);
    let unverified = programs::run(command).await;
    assert_eq!(unverified.code, Some(7), "{}{}", unverified.stdout, unverified.stderr);
    let failed = |s: &Span| s.name == "backup_verify" && s.failed;
    let verify = traced.span("a failed backup_verify", failed).await;
    assert_eq!(verify.attributes["error.type"], "CORRUPT");
    let backup = traced.span("its backup", |s| s.id == verify.parent).await;
    assert_eq!((backup.name.as_str(), backup.failed), ("backup", false), "it was taken");
}

/// In both tiers, or it would be repaired. The largest holds pieces of files.
fn damage_largest_pack(traced: &Traced) {
    let bucket = traced.s3.bucket_dir().join("klio");
    let size = |key: &String| fs::metadata(traced.s3.bucket_dir().join(key)).map_or(0, |m| m.len());
    let keys = traced.s3.keys("klio/main/base/data");
    let key = keys.into_iter().max_by_key(size).expect("a pack");
    let key = key.strip_prefix("klio/").expect("below the prefix");
    for root in [bucket, traced.site.tier1()] {
        let path = root.join(key);
        let Ok(mut bytes) = fs::read(&path) else { continue };
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(&path, bytes).expect("damage a pack");
    }
}

/// The sidecar logs JSON here, the server text.
#[tokio::test(flavor = "multi_thread")]
async fn a_scheduled_backup_is_a_trace_of_its_own_also_when_it_fails() {
    let pg = quiet_postgres().await;
    let traced = Traced::new("text").await;
    let json = ("KLIO_LOG_FORMAT", "json");
    let schedule = ("KLIO_BACKUP__SCHEDULE", "0 3 1 1 * Europe/Berlin");
    let absent = ("KLIO_POSTGRES__DATA_DIRECTORY", "/nonexistent");
    let mut bad = traced.stream(&pg, "bad.log", &[json, schedule, absent]);
    bad.wait_log("scheduled backup failed", PATIENCE).await;
    let failed = traced.span("a failed backup", |s| s.name == "backup" && s.failed).await;
    assert_eq!(failed.parent, "", "not below cli.stream, which lasts for ever");
    assert_eq!((failed.tracer.as_str(), failed.service.as_str()), ("klio.backup", "klio"));
    let error = failed.attributes["error.type"].clone();
    assert_eq!(failed.exceptions, std::slice::from_ref(&error), "{failed:?}");
    let run =
        traced.span("its backup_run", |s| s.parent == failed.id && s.name == "backup_run").await;
    assert!(run.failed && run.attributes["error.type"] == error, "{run:?}");
    let lines = json_lines(&bad.log(), &failed.trace);
    let says = |line: &Value| line["message"].as_str().is_some_and(|m| m.contains("failed"));
    assert!(lines.iter().any(says), "{lines:#?}");
    bad.terminate(PATIENCE).await;

    let mut good = traced.stream(&pg, "good.log", &[json, schedule]);
    good.wait_log("scheduled backup taken", PATIENCE).await;
    let chain = traced.chain(&RECORD, |s| is_put(s, "main/backups")).await;
    let backup = chain.last().expect("a chain");
    assert_eq!((backup.parent.as_str(), backup.failed), ("", false), "{backup:?}");
    let lines = json_lines(&good.log(), &backup.trace);
    let taken = lines.iter().any(|line| line["message"] == "scheduled backup taken");
    assert!(taken, "{lines:#?}");
    let text = format!("trace_id={}", backup.trace);
    let log = traced.site.log();
    let server = log.lines().filter(|line| line.contains(&text));
    assert!(server.clone().any(|line| line.contains("a backup is complete")), "{log}");
    assert!(server.clone().any(|line| line.contains("a backup is in tier 2")), "{log}");
    check_all(&traced.collector.spans(), &[&traced.s3.settings().secret_key]);
}
