//! One trace id follows a segment from PostgreSQL to the bucket, and a collector that is not there changes nothing (P9).

use klio_tests::{
    install_crypto,
    otlp::{Collector, Span},
    ports,
    postgres::Postgres,
    process::Running,
    s3::S3,
    site::{PATIENCE, Site},
    wait::eventually_now,
};
use std::time::{Duration, Instant};

/// Variables of both programs.
fn variables(endpoint: &str) -> [(&'static str, String); 4] {
    [
        ("OTEL_TRACES_EXPORTER", "otlp".into()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.into()),
        // Batches leave soon, so that a test need not wait for the default of five seconds.
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ("RUST_LOG", "info,klio_server=debug".into()),
    ]
}

fn stream(site: &Site, pg: &Postgres, endpoint: &str) -> Running {
    let mut command = site.klio_command(Some(pg), &["stream"]);
    command.envs(variables(endpoint));
    Running::spawn("klio stream", command, &site.scratch("traced-stream.log"))
}

/// Ends a segment and gives back where it ended, once more WAL has followed.
async fn end_segment(pg: &Postgres) -> klio_pg::Lsn {
    let size = pg.segment_size().await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    end.segment_start(size)
}

/// From the upload's request up to the sidecar's span, each the child of the next.
const CHAIN: [(&str, &str); 6] = [
    ("tier2.request", "klio-server"),
    ("offload", "klio-server"),
    ("wal.publish", "klio-server"),
    ("wal.seal", "klio-server"),
    ("wal.receive", "klio-server"),
    ("wal.send", "klio"),
];

fn parent<'a>(spans: &'a [Span], of: &Span) -> Option<&'a Span> {
    spans.iter().find(|s| s.trace == of.trace && s.id == of.parent)
}

/// The chain above a span as far as it goes: the names and programs that [`CHAIN`] lists, others left out.
fn chain(spans: &[Span], upload: &Span) -> Vec<Span> {
    let all = std::iter::successors(Some(upload), |span| parent(spans, span));
    let listed = |s: &&Span| CHAIN.contains(&(s.name.as_str(), s.service.as_str()));
    all.filter(listed).cloned().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_follows_a_segment_from_postgres_to_the_bucket() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let (collector, s3) = (Collector::new().await, S3::new());
    let mut site = Site::new().await.tier2(&s3);
    for (name, value) in variables(&collector.endpoint()) {
        site.set(name, &value);
    }
    site.start().await;
    let _stream = stream(&site, &pg, &collector.endpoint());
    pg.write_wal(2 << 20).await;
    let end = end_segment(&pg).await;
    site.wait_archived(end).await;
    let found = eventually_now("one trace from wal.send to the upload", PATIENCE, || {
        let spans = collector.spans();
        let uploads = spans.iter().filter(|s| {
            let method = s.attributes.get("http.request.method");
            s.name == "tier2.request" && method.is_some_and(|m| m == "PUT" || m == "POST")
        });
        let chains: Vec<_> = uploads.map(|upload| chain(&spans, upload)).collect();
        let whole = chains.iter().find(|c| c.len() == CHAIN.len()).cloned();
        whole.ok_or_else(|| (names(&spans), chains.iter().map(|c| names(c)).collect::<Vec<_>>()))
    })
    .await;
    for (span, (name, service)) in found.iter().zip(CHAIN) {
        assert_eq!((span.name.as_str(), span.service.as_str()), (name, service));
    }
    let [.., seal, receive, send] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(send.parent, "", "the trace begins with the segment, not with the program");
    let segment = &send.attributes["segment"];
    assert_eq!(receive.attributes["segment"], *segment);
    assert!(seal.attributes["file"].contains(segment.as_str()), "{seal:?}");
    let trace = &send.trace;
    // One span a segment, never one a message.
    let spans = collector.spans();
    for name in ["wal.send", "wal.receive", "wal.seal", "wal.publish"] {
        let of = |s: &&Span| s.trace == *trace && s.name == name;
        assert_eq!(spans.iter().filter(of).count(), 1, "{name} in {:?}", names(&spans));
    }
    let log = site.log();
    let line = log.lines().find(|l| l.contains(trace.as_str()) && l.contains("sealed"));
    let line =
        line.unwrap_or_else(|| panic!("no line about sealing with trace id {trace}:\n{log}"));
    assert!(line.contains(segment.as_str()), "{line}");
}

fn names(spans: &[Span]) -> Vec<(String, String)> {
    spans.iter().map(|s| (s.name.clone(), s.trace.clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_collector_changes_nothing_and_is_one_warning() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let s3 = S3::new();
    let mut site = Site::new().await.tier2(&s3);
    // Nobody listens there.
    let endpoint = format!("http://127.0.0.1:{}", ports::free());
    for (name, value) in variables(&endpoint) {
        site.set(name, &value);
    }
    site.start().await;
    let mut sidecar = stream(&site, &pg, &endpoint);
    for _ in 0..3 {
        pg.write_wal(1 << 20).await;
        let end = end_segment(&pg).await;
        site.wait_archived(end).await;
    }
    let warnings = |log: &str| {
        let warning = |l: &&str| l.contains(" WARN ") && l.contains("signal=\"traces\"");
        log.lines().filter(warning).count()
    };
    eventually_now("both to warn", PATIENCE, || {
        warnings(&site.log()) > 0 && warnings(&sidecar.log()) > 0
    })
    .await;
    let status = sidecar.terminate(Duration::from_secs(15)).await;
    assert!(status.success(), "klio stream ended with {status}");
    let begin = Instant::now();
    site.stop().await; // asserts status 0
    // Draining takes a moment; the flush is given five seconds.
    assert!(begin.elapsed() < Duration::from_secs(15), "stopped after {:?}", begin.elapsed());
    assert_eq!(warnings(&site.log()), 1, "{}", site.log());
    assert_eq!(warnings(&sidecar.log()), 1, "{}", sidecar.log());
}
