//! One trace id follows a segment from PostgreSQL to the bucket; spans are as many as segments, however many messages; and
//! neither a collector that listens nor one that is not there changes anything (P9).

use hyper::Method;
use klio_pg::{Lsn, SegmentSize};
use klio_tests::{
    client::{self, Stream},
    install_crypto,
    otlp::{Collector, Span},
    ports,
    postgres::Postgres,
    process::Running,
    s3::{Fault, Rule, S3},
    site::{PATIENCE, Site},
    traced::{Traced, check_all, is_put, variables},
    wait::eventually_now,
};
use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

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
const CHAIN: [(&str, &str); 7] = [
    ("tier2.request", "klio-server"),
    ("tier2.upload", "klio-server"),
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
    let sidecar = stream(&site, &pg, &collector.endpoint());
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
    let log = sidecar.log();
    assert!(log.lines().any(|l| l.contains(trace.as_str()) && l.contains(segment)), "{log}");
    // Many messages, one span: they are counted in it.
    let messages = |span: &Span| span.attributes["messages"].parse::<u64>().expect("a count");
    assert!(messages(receive) > 1 && messages(receive) == messages(send), "{receive:?} {send:?}");
    assert_eq!(receive.attributes["bytes"], send.attributes["bytes"]);
    check_all(&spans, &[&s3.settings().secret_key]);
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

const SEGMENTS: u64 = 4;
const MESSAGE_BYTES: u64 = 8 << 10;

fn segment_size() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("a size")
}

/// The first byte that is streamed: the start of a segment.
fn first() -> Lsn {
    Lsn::new(16 << 20)
}

/// Streams whole segments in small messages, each durable before the next, and the beginning of one more; waits until the
/// bucket has them.
async fn send_segments(site: &Site, segments: u64) -> u64 {
    let (size, end) = (segment_size(), first().advance((segments << 20) + MESSAGE_BYTES));
    let channel = client::connect(site, &site.bundle()).await.expect("connect");
    let mut stream =
        Stream::open(&channel, client::open("main", size, first())).await.expect("open");
    let (mut at, mut messages) = (first(), 0);
    while at < end {
        stream.append(at, client::wal(at, MESSAGE_BYTES as usize, size, 1)).await;
        at = at.advance(MESSAGE_BYTES);
        stream.flushed(at).await.expect("an acknowledgement");
        messages += 1;
    }
    site.wait_archived(first().advance(segments << 20)).await;
    messages
}

/// Spans per segment or request, never per message.
#[tokio::test(flavor = "multi_thread")]
async fn spans_are_as_many_as_segments_however_many_messages_there_are() {
    let mut traced = Traced::new("text").await;
    let messages = send_segments(&traced.site, SEGMENTS).await;
    assert_eq!(messages, SEGMENTS * 128 + 1);
    traced.site.stop().await; // everything is flushed
    let spans = traced.collector.spans();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for span in &spans {
        *counts.entry(span.name.as_str()).or_default() += 1;
    }
    let count = |name: &str| counts.get(name).copied().unwrap_or(0);
    // The segment that has only begun ends with the stream.
    assert_eq!(count("wal.receive"), SEGMENTS + 1, "{counts:?}");
    assert_eq!([count("wal.stream"), count("wal.seal")], [1, SEGMENTS], "{counts:?}");
    // The comparison of the tiers may queue a segment once more.
    for name in ["wal.publish", "offload", "tier2.upload"] {
        assert!((SEGMENTS..=2 * SEGMENTS).contains(&count(name)), "{name}: {counts:?}");
    }
    let whole =
        spans.iter().filter(|s| s.name == "wal.receive" && s.attributes.contains_key("messages"));
    for span in whole.clone() {
        assert_eq!([&span.attributes["messages"], &span.attributes["bytes"]], ["128", "1048576"]);
    }
    assert_eq!(whole.count() as u64, SEGMENTS);
    // Of whatever kind: far fewer than messages, also with the questions of this test (`klio status`).
    let of_wal = spans.iter().filter(|s| !["catalog.status", "cli.run"].contains(&s.name.as_str()));
    let of_wal = of_wal.count() as u64;
    assert!(of_wal < 25 * SEGMENTS && of_wal < messages / 4, "{of_wal}: {counts:?}");
    check_all(&spans, &[&traced.s3.settings().secret_key]);
}

/// Each attempt is a span that says which repetition it is and how it ended.
#[tokio::test(flavor = "multi_thread")]
async fn failing_requests_to_the_bucket_are_spans_with_retries_and_an_error_type() {
    let traced = Traced::new("text").await;
    traced
        .s3
        .faults()
        .inject(Rule::always(Fault::InternalError).on(Method::PUT).path("main/wal").times(2));
    send_segments(&traced.site, 1).await;
    let retried = |s: &Span| s.name == "tier2.request" && s.attributes["retries"] == "2";
    let good = traced.span("a second repetition", |s| retried(s) && !s.failed).await;
    let failed =
        traced.collector.spans().into_iter().filter(|s| s.name == "tier2.request" && s.failed);
    let failed: Vec<Span> = failed.collect();
    assert_eq!(failed.len(), 2, "{failed:?}");
    for (number, span) in failed.iter().enumerate() {
        let shown = ["retries", "error.type", "http.response.status_code"]
            .map(|k| span.attributes[k].as_str());
        assert_eq!(shown, [number.to_string().as_str(), "http_5xx", "500"]);
        assert_eq!((&span.trace, &span.parent), (&good.trace, &good.parent), "one operation");
    }
    check_all(&traced.collector.spans(), &[&traced.s3.settings().secret_key]);
}

/// Every WAL object of the bucket, byte for byte.
fn wal_objects(s3: &S3) -> BTreeMap<String, Vec<u8>> {
    let keys = s3.keys("klio/main/wal");
    let read = |key: &String| fs::read(s3.bucket_dir().join(key)).expect("an object");
    keys.iter().map(|key| (key.clone(), read(key))).collect()
}

/// Telemetry is observation only: with everything on and with everything off the same bytes are stored.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_the_same_with_and_without_telemetry() {
    install_crypto();
    let mut stored = Vec::new();
    for on in [true, false] {
        let (collector, s3) = (Collector::new().await, S3::new());
        // Unencrypted: ciphertext is never the same twice.
        let mut site = Site::unencrypted().await.tier2(&s3);
        if on {
            for (name, value) in variables(&collector.endpoint()) {
                site.set(name, &value);
            }
            site.set("OTEL_LOGS_EXPORTER", "otlp");
            site.set("OTEL_METRICS_EXPORTER", "prometheus,otlp");
        } else {
            site.set("OTEL_SDK_DISABLED", "true");
        }
        site.start().await;
        send_segments(&site, 2).await;
        site.stop().await;
        assert_eq!(collector.spans().iter().any(|s| is_put(s, "main/wal")), on);
        stored.push(wal_objects(&s3));
    }
    let [with, without] = stored.as_slice() else { panic!("two runs") };
    assert!(with.len() >= 2, "{:?}", with.keys());
    assert_eq!(with.keys().collect::<Vec<_>>(), without.keys().collect::<Vec<_>>());
    for (key, bytes) in with {
        assert!(*bytes == without[key], "{key} differs");
    }
}
