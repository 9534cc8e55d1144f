//! One trace id follows what is read back: from `klio wal-fetch`, `klio restore` and `klio drill` through the server to the
//! bucket, or to the bucket itself (docs/telemetry.md).

use klio_tests::{
    otlp::Span,
    postgres::{Postgres, install},
    process::Running,
    programs::{self, Outcome},
    proof::{Restorer, Source},
    scratch::Scratch,
    site::PATIENCE,
    traced::{Traced, check_all},
    wait::{eventually, eventually_now},
};
use std::fs;

struct Rig {
    scratch: Scratch,
    traced: Traced,
    pg: Postgres,
    _stream: Running,
}

fn is_get(span: &Span, directory: &str) -> bool {
    let attribute = |key: &str| span.attributes.get(key).map_or("", String::as_str);
    span.name == "tier2.request"
        && attribute("http.request.method") == "GET"
        && attribute("key_prefix").contains(directory)
        && attribute("http.response.status_code").starts_with('2')
}

impl Rig {
    async fn new() -> Self {
        let traced = Traced::new("text").await;
        let pg = Postgres::builder().segment_mib(1).initdb("-k").start().await;
        let stream = traced.stream(&pg, "stream.log", &[]);
        eventually("a position", PATIENCE, || traced.site.lsn("flushed_lsn")).await;
        let scratch = Scratch::new("traces");
        install::give(scratch.path());
        Self { scratch, traced, pg, _stream: stream }
    }

    async fn klio(&self, source: Source, args: &[&str]) -> Outcome {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let hands = Restorer::new(&self.traced.site, &self.traced.s3, source, &self.scratch);
        let mut command = hands.command(&args);
        self.traced.trace(&mut command);
        programs::run(command).await
    }

    /// The name of a segment that both tiers have.
    async fn archived_segment(&self) -> String {
        let lsn = self.pg.write_wal(1 << 20).await;
        let size = self.pg.segment_size().await;
        let name =
            self.pg.value(&format!("select pg_walfile_name('{}')", lsn.segment_start(size))).await;
        let end = self.pg.switch_wal().await;
        self.pg.write_wal(1).await;
        self.traced.site.wait_archived(end.segment_start(size)).await;
        name
    }

    /// What a command logged last: its trace id.
    fn trace_of(outcome: &Outcome) -> String {
        let line = outcome.stderr.lines().rev().find(|line| line.ends_with(": delivered"));
        let trace = line.and_then(|line| line.strip_prefix("trace ")?.split(':').next());
        trace.unwrap_or_else(|| panic!("no trace id in {}", outcome.stderr)).to_owned()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_follows_what_is_read_back_from_either_tier() {
    let rig = Rig::new().await;
    let traced = &rig.traced;
    let name = rig.archived_segment().await;
    // Only the bucket has it from now on.
    let wal = traced.site.wal_dir(1);
    for entry in fs::read_dir(&wal).expect("tier 1").flatten() {
        if entry.file_name().to_string_lossy().starts_with(&name) {
            fs::remove_file(entry.path()).expect("remove a segment");
        }
    }
    let target = rig.scratch.join("fetched").display().to_string();

    // Through the server.
    let fetched = rig.klio(Source::Server, &["wal-fetch", &name, &target]).await;
    assert_eq!(fetched.code, Some(0), "{}", fetched.stderr);
    let trace = Rig::trace_of(&fetched);
    let way = [
        ("tier2.request", "klio-server"),
        ("wal.fetch", "klio-server"),
        ("wal.fetch", "klio"),
        ("cli.wal-fetch", "klio"),
    ];
    let chain = traced.chain(&way, |s| s.trace == trace && is_get(s, "main/wal")).await;
    assert_eq!((chain[1].kind.as_str(), chain[1].attributes["tier"].as_str()), ("SERVER", "tier2"));
    assert_eq!(chain[2].attributes["bytes"], (1 << 20).to_string(), "{:?}", chain[2]);
    assert_eq!(chain[3].parent, "");

    // From the bucket itself.
    let fetched = rig.klio(Source::Bucket, &["wal-fetch", &name, &target]).await;
    assert_eq!(fetched.code, Some(0), "{}", fetched.stderr);
    let trace = Rig::trace_of(&fetched);
    let way = [("tier2.request", "klio"), ("wal.fetch", "klio"), ("cli.wal-fetch", "klio")];
    let chain = traced.chain(&way, |s| s.trace == trace && is_get(s, "main/wal")).await;
    assert_eq!((chain[0].kind.as_str(), chain[2].parent.as_str()), ("CLIENT", ""));

    // The end of the archive is an answer, not a failure.
    let absent =
        rig.klio(Source::Server, &["wal-fetch", "0000000100000FFF00000001", &target]).await;
    assert_eq!(absent.code, Some(1), "{}", absent.stderr);
    let trace = Rig::trace_of(&absent);
    for service in ["klio", "klio-server"] {
        let fits = |s: &Span| s.trace == trace && s.name == "wal.fetch" && s.service == service;
        let span = traced.span("an absence", fits).await;
        assert!(!span.failed && span.attributes["error.type"] == "NOT_FOUND", "{span:?}");
    }
    check_all(&traced.collector.spans(), &[&traced.s3.settings().secret_key]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_and_a_drill_are_one_trace_each_with_the_programs_they_run() {
    let rig = Rig::new().await;
    let traced = &rig.traced;
    let backup = traced.klio(Some(&rig.pg), &["backup", "--name", "b"]).await;
    assert_eq!(backup.code, Some(0), "{}{}", backup.stdout, backup.stderr);
    rig.archived_segment().await;
    traced.span("the record in tier 2", |s| klio_tests::traced::is_put(s, "main/backups")).await;

    let way = [("base.get_file", "klio-server"), ("restore", "klio"), ("cli.restore", "klio")];
    let to = rig.scratch.join("restored").display().to_string();
    let restored = rig.klio(Source::Server, &["restore", "--to", &to]).await;
    assert_eq!(restored.code, Some(0), "{}{}", restored.stdout, restored.stderr);
    let trace = Rig::trace_of(&restored);
    let chain = traced.chain(&way, |s| s.trace == trace && s.name == "base.get_file").await;
    let span = &chain[1].attributes;
    assert!(span["bytes"].parse::<u64>().expect("a number") > 1 << 20, "{span:?}");

    let way = [("tier2.request", "klio"), ("restore", "klio"), ("cli.restore", "klio")];
    let to = rig.scratch.join("from-bucket").display().to_string();
    let restored = rig.klio(Source::Bucket, &["restore", "--to", &to]).await;
    assert_eq!(restored.code, Some(0), "{}{}", restored.stdout, restored.stderr);
    let trace = Rig::trace_of(&restored);
    traced.chain(&way, |s| s.trace == trace && is_get(s, "base/data")).await;

    // PostgreSQL, and wal-fetch which it runs, belong to the drill's trace.
    let inside = rig.scratch.path().display().to_string();
    let drill = rig.klio(Source::Server, &["drill", "--in", &inside]).await;
    assert_eq!(drill.code, Some(0), "{}{}", drill.stdout, drill.stderr);
    let trace = Rig::trace_of(&drill);
    let of_drill = eventually_now("spans of the drill", PATIENCE, || {
        let spans = traced.collector.spans();
        let of_drill: Vec<Span> = spans.into_iter().filter(|s| s.trace == trace).collect();
        let wanted = [
            "cli.drill",
            "restore",
            "postgres",
            "pg_amcheck",
            "pg_checksums",
            "cli.wal-fetch",
            "base.record_drill",
        ];
        let missing: Vec<_> =
            wanted.into_iter().filter(|name| !of_drill.iter().any(|s| s.name == *name)).collect();
        if missing.is_empty() { Ok(of_drill) } else { Err(missing) }
    })
    .await;
    for span in of_drill.iter().filter(|s| s.attributes.contains_key("process.executable.name")) {
        assert_eq!(span.kind, "CLIENT", "{span:?}");
        assert_eq!(span.attributes["process.executable.name"], span.name);
    }
    let server =
        of_drill.iter().filter(|s| s.name == "postgres").max_by_key(|s| s.attributes.len());
    let server = server.expect("a server");
    let children = of_drill.iter().filter(|s| s.name == "cli.wal-fetch");
    assert!(children.clone().count() > 0);
    assert!(
        children.clone().all(|s| of_drill.iter().any(|p| p.id == s.parent && p.name == "postgres")),
        "{server:?}"
    );
    // wal-fetch asks the resident agent: what it fetches for somebody continues the asking trace, and what it had read
    // ahead in a trace of its own is linked to when it is handed over.
    let trace = of_drill[0].trace.clone();
    let way = [
        ("wal.fetch", "klio-server"),
        ("wal.fetch", "klio"),
        ("cli.wal-fetch", "klio"),
        ("postgres", "klio"),
        ("cli.drill", "klio"),
    ];
    let on_server = |s: &Span| s.name == "wal.fetch" && s.service == "klio-server";
    traced.chain(&way, |s| s.trace == trace && on_server(s)).await;
    let way = [("wal.hand_over", "klio"), ("cli.wal-fetch", "klio"), ("cli.drill", "klio")];
    let chain = traced.chain(&way, |s| s.trace == trace && s.name == "wal.hand_over").await;
    let [ahead] = chain[0].links.as_slice() else { panic!("one link: {:?}", chain[0]) };
    assert_ne!(*ahead, trace);
    traced.span("the reading ahead", |s| s.trace == *ahead && on_server(s)).await;
    check_all(&traced.collector.spans(), &[&traced.s3.settings().secret_key]);
}
