//! Section 3 of the telemetry contract with both real programs: the `[telemetry]` section, the closing line, collectors of
//! every temper, strictness, the way out. P9: telemetry never changes what a program does, how long it takes beyond the
//! flush timeout, or its exit status.

use klio_tests::{
    install_crypto,
    otlp::{Answer, Collector, LogRecord, Protocol, Receiver, Signal, Span, Tls},
    ports,
    process::Running,
    programs::{self, Outcome},
    site::{PATIENCE, Site},
    wait::eventually_now,
};
use rustix::process::Signal as Kill;
use std::{
    fs::OpenOptions,
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

/// Exit status of `klio status` against a server to which nothing has streamed.
const NOTHING_YET: i32 = 3;
/// What `klio` and `klio-server` give their flush.
const FLUSH: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(5)];
/// What a loaded machine of two cores may add to that in a debug build.
const SLACK: Duration = Duration::from_secs(15);

fn append(file: &Path, text: &str) {
    let mut file = OpenOptions::new().append(true).open(file).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn status(site: &Site, variables: &[(&str, String)]) -> Command {
    let mut command = site.klio_command(None, &["status"]);
    command.envs(variables.iter().map(|(name, value)| (*name, value.as_str())));
    command
}

fn warnings(log: &str) -> Vec<&str> {
    let warning = |l: &&str| l.contains(" WARN ") || l.contains("\"level\":\"WARN\"");
    log.lines().filter(warning).collect()
}

/// Of the last line: trace id and state.
fn closing(outcome: &Outcome) -> Option<(String, String)> {
    let line = outcome.stderr.lines().rfind(|l| l.starts_with("trace "))?;
    let (trace, state) = line.strip_prefix("trace ")?.split_once(": ")?;
    Some((trace.to_owned(), state.to_owned()))
}

fn root<'a>(spans: &'a [Span], name: &str) -> Option<&'a Span> {
    spans.iter().find(|s| s.name == name)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_file_of_both_programs_wins_over_variables_and_klio_variables_over_it() {
    install_crypto();
    let (file, other) = (Collector::new().await, Collector::new().await);
    let mut site = Site::new().await;
    let section = |name: &str| {
        let (at, own) = (file.endpoint(), "info,klio_server=debug,klio_sidecar=debug");
        format!(
            "\n[telemetry]\nenabled = true\nservice_name = \"{name}\"\nexport_logs = true\nlog_format = \"json\"\n\
             trace_endpoint = \"{at}/v1/traces\"\nlogs_endpoint = \"{at}/v1/logs\"\nlog_level = \"{own}\"\n"
        )
    };
    append(&site.dir().join("klio-server.toml"), &section("server-of-file"));
    append(&site.bundle(), &section("klio-of-file"));
    let variables = [
        ("OTEL_SERVICE_NAME", "of-environment".to_owned()),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", format!("{}/v1/traces", other.endpoint())),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", format!("{}/v1/logs", other.endpoint())),
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ("OTEL_BLRP_SCHEDULE_DELAY", "100".into()),
        ("KLIO_LOG_FORMAT", "text".into()),
        ("RUST_LOG", "error".into()),
    ];
    for (name, value) in &variables {
        site.set(name, value);
    }
    site.start().await;
    let outcome = programs::run(status(&site, &variables)).await;
    let (trace, state) = closing(&outcome).expect("a closing line");
    assert_eq!(state, "delivered", "{outcome:?}");
    let services = |spans: &[Span]| {
        let mut all: Vec<_> =
            spans.iter().filter(|s| s.trace == trace).map(|s| s.service.clone()).collect();
        all.sort();
        all.dedup();
        all
    };
    eventually_now("the spans of both programs in one trace", PATIENCE, || {
        let found = services(&file.spans());
        (found == ["klio-of-file", "server-of-file"]).then_some(()).ok_or(found)
    })
    .await;
    let log = site.log();
    assert!(log.lines().all(|l| l.starts_with('{')), "{log}");
    assert!(log.contains("\"level\":\"DEBUG\""), "log_level of the file is debug: {log}");
    assert!(other.spans().is_empty() && other.logs().is_empty());

    let mut over = variables.to_vec();
    over.extend([
        ("KLIO_TELEMETRY__SERVICE_NAME", "over".to_owned()),
        ("KLIO_TELEMETRY__TRACE_ENDPOINT", format!("{}/v1/traces", other.endpoint())),
        ("KLIO_TELEMETRY__LOG_FORMAT", "text".into()),
        ("KLIO_TELEMETRY__LOG_LEVEL", "klio_sidecar=trace".into()),
        ("KLIO_TELEMETRY__EXPORT_LOGS", "false".into()),
    ]);
    let outcome = programs::run(status(&site, &over)).await;
    let (trace, _) = closing(&outcome).expect("a closing line");
    let spans = other.spans();
    let span = root(&spans, "cli.status").expect("the root span");
    assert_eq!((span.service.as_str(), span.trace.as_str()), ("over", trace.as_str()));
    assert!(!outcome.stderr.contains("\"level\""), "{}", outcome.stderr);

    over.push(("KLIO_TELEMETRY__ENABLED", "false".into()));
    let before = (file.spans().len(), other.spans().len());
    let quiet = programs::run(status(&site, &over)).await;
    assert_eq!((quiet.code, closing(&quiet)), (outcome.code, None));
    let klio = |spans: Vec<Span>| spans.iter().filter(|s| s.name == "cli.status").count();
    assert_eq!(klio(file.spans()) + klio(other.spans()), 2, "{before:?}: nothing more was sent");

    site.stop().await;
    // Logs over OTLP, with the ids of the spans they were written in (which arrive when they end).
    let (spans, records) = (file.spans(), file.logs());
    let correlated = |r: &LogRecord| {
        r.service == "server-of-file" && spans.iter().any(|s| s.trace == r.trace && s.id == r.span)
    };
    assert!(records.iter().any(correlated), "{records:#?}");

    // Off for the server as well; a format that is none is a warning and no more.
    site.set("KLIO_TELEMETRY__ENABLED", "false");
    site.set("KLIO_TELEMETRY__LOG_FORMAT", "xml");
    let (spans, so_far) = (file.spans().len(), site.log().len());
    site.start().await;
    programs::run(status(&site, &over)).await;
    site.stop().await;
    assert_eq!(file.spans().len(), spans);
    let log = site.log().split_off(so_far);
    let found = warnings(&log);
    assert!(
        found.len() == 1
            && found[0].contains("variable=\"telemetry.log_format\" value=\"xml\"")
            && found[0].contains("text, json"),
        "{found:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_ends_with_its_trace_id_and_whether_its_spans_arrived() {
    install_crypto();
    let collector = Collector::new().await;
    let mut site = Site::new().await;
    site.start().await;
    site.wait_ready(200).await;
    let plain = programs::run(status(&site, &[])).await;
    assert_eq!(closing(&plain), None, "nothing configured, nothing said");
    let to = |endpoint: String| vec![("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)];

    let good =
        programs::run(status(&site, &to(format!("{}/v1/traces", collector.endpoint())))).await;
    let (trace, state) = closing(&good).expect("a closing line");
    let spans = collector.spans();
    assert_eq!(
        (root(&spans, "cli.status").unwrap().trace.as_str(), state.as_str()),
        (trace.as_str(), "delivered")
    );
    assert_eq!(good.stderr.lines().last(), Some(format!("trace {trace}: delivered").as_str()));

    let dead = format!("http://127.0.0.1:{}/v1/traces", ports::free());
    let lost = programs::run(status(&site, &to(dead))).await;
    let (trace, state) = closing(&lost).expect("a closing line");
    assert_eq!(trace.len(), 32);
    assert_ne!(state, "delivered");

    // Metrics say nothing about spans.
    let metrics =
        [("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", format!("{}/v1/metrics", collector.endpoint()))];
    let metrics = programs::run(status(&site, &metrics)).await;
    assert_eq!(closing(&metrics), None, "{}", metrics.stderr);

    // --debug: ids in the lines of both programs, the same ones, and nobody to send them to.
    let mut command = site.klio_command(None, &["status", "--debug"]);
    command.env("RUST_LOG", "klio_sidecar=trace");
    let debug = programs::run(command).await;
    assert_eq!(closing(&debug), None, "{}", debug.stderr);
    for outcome in [&good, &lost, &metrics, &debug] {
        assert_eq!((outcome.code, &outcome.stdout), (plain.code, &plain.stdout));
    }
}

/// Telemetry that goes nowhere: what each signal's collector does.
struct Sad {
    receivers: Vec<Receiver>,
    variables: Vec<(&'static str, String)>,
    _directory: tempfile::TempDir,
}

/// Signal, and the variables that say where and how it is sent.
const SIGNALS: [[&str; 3]; 3] = [
    ["traces", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"],
    ["metrics", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL"],
    ["logs", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL"],
];

impl Sad {
    /// `None`: nobody listens there; `true`: TLS by an authority that the program is not told of.
    async fn new(each: [(Protocol, Option<Answer>, bool); 3]) -> Self {
        let (tls, wrong) = (Tls::new(false), Tls::new(false));
        let directory = tempfile::tempdir().unwrap();
        let authority = directory.path().join("wrong.pem");
        std::fs::write(&authority, &wrong.authority).unwrap();
        let mut variables = vec![
            ("OTEL_TRACES_EXPORTER", "otlp".to_owned()),
            ("OTEL_METRICS_EXPORTER", "otlp".into()),
            ("OTEL_LOGS_EXPORTER", "otlp".into()),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", authority.display().to_string()),
            ("OTEL_BSP_SCHEDULE_DELAY", "50".into()),
            ("OTEL_BLRP_SCHEDULE_DELAY", "50".into()),
            ("OTEL_METRIC_EXPORT_INTERVAL", "50".into()),
            ("RUST_LOG", "info,klio_server=debug,klio_sidecar=debug".into()),
        ];
        let mut receivers = Vec::new();
        for ([_, place, how], (protocol, answer, secure)) in SIGNALS.into_iter().zip(each) {
            let endpoint = match answer {
                None => format!("http://127.0.0.1:{}", ports::free()),
                Some(answer) => {
                    let receiver = Receiver::new(protocol, secure.then_some(&tls), answer).await;
                    let endpoint = receiver.endpoint();
                    receivers.push(receiver);
                    endpoint
                }
            };
            let spoken = match protocol {
                Protocol::Http => "http/protobuf",
                Protocol::Grpc => "grpc",
            };
            variables.push((place, endpoint));
            variables.push((how, spoken.into()));
        }
        Self { receivers, variables, _directory: directory }
    }

    /// One warning a signal at most, each about the right variable; traces always have one.
    fn check(&self, log: &str, all: bool) {
        let found = warnings(log);
        for [signal, place, _] in SIGNALS {
            let field = format!("signal=\"{signal}\"");
            let lines: Vec<_> = found.iter().filter(|l| l.contains(&field)).collect();
            assert!(lines.len() <= 1, "{signal}: {lines:#?}");
            assert!(
                lines.len() == 1 || !(all || signal == "traces"),
                "{signal}: no warning in {log}"
            );
            for line in lines {
                assert!(line.contains(&format!("variable=\"{place}\"")), "{line}");
                assert!(line.contains("value=http"), "{line}");
                assert!(line.contains("expected=a collector that accepts OTLP over"), "{line}");
            }
        }
    }
}

fn sad_ones() -> [[(Protocol, Option<Answer>, bool); 3]; 5] {
    use Protocol::{Grpc, Http};
    [
        [
            (Http, Some(Answer::Hang), false),
            (Grpc, Some(Answer::Status(8)), false),
            (Http, Some(Answer::Accept), true),
        ],
        [
            (Grpc, Some(Answer::Garbage), false),
            (Http, Some(Answer::Status(503)), false),
            (Grpc, Some(Answer::Status(14)), false),
        ],
        [
            (Grpc, Some(Answer::Accept), true),
            (Http, Some(Answer::Die), false),
            (Http, Some(Answer::Garbage), false),
        ],
        [
            (Http, Some(Answer::Status(400)), false),
            (Grpc, Some(Answer::Hang), false),
            (Grpc, None, false),
        ],
        [
            (Grpc, Some(Answer::Die), false),
            (Http, None, false),
            (Http, Some(Answer::Status(500)), false),
        ],
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn no_collector_changes_what_klio_does_or_its_exit_status() {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    site.wait_ready(200).await;
    let plain = programs::run(status(&site, &[])).await;
    assert_eq!(plain.code, Some(NOTHING_YET), "{plain:?}");
    let fail = |site: &Site, variables: &[(&str, String)]| {
        let mut command = status(site, variables);
        command.env("KLIO_SERVER__ADDRESS", format!("https://127.0.0.1:{}", ports::free()));
        command
    };
    let failed = programs::run(fail(&site, &[])).await;
    assert!(failed.code.is_some_and(|code| code != 0), "{failed:?}");
    for each in sad_ones() {
        let sad = Sad::new(each).await;
        for (command, as_before) in
            [(status(&site, &sad.variables), &plain), (fail(&site, &sad.variables), &failed)]
        {
            let begin = Instant::now();
            let outcome = programs::run(command).await;
            let took = begin.elapsed();
            assert_eq!(
                (outcome.code, &outcome.stdout),
                (as_before.code, &as_before.stdout),
                "{each:?}"
            );
            assert!(took < FLUSH[0] + SLACK, "{each:?}: {took:?}");
            let (_, state) = closing(&outcome).expect("a closing line");
            assert_ne!(state, "delivered", "{each:?}");
            sad.check(&outcome.stderr, false);
        }
        let secure = |r: &&Receiver| r.endpoint().starts_with("https");
        assert!(sad.receivers.iter().filter(secure).all(|r| r.arrivals().is_empty()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_collector_changes_what_the_server_does_or_its_exit_status() {
    install_crypto();
    let mut site = Site::new().await;
    for each in sad_ones() {
        let sad = Sad::new(each).await;
        for (name, value) in &sad.variables {
            site.unset(name);
            site.set(name, value);
        }
        let so_far = site.log().len();
        site.start().await;
        let outcome = programs::run(status(&site, &[])).await;
        assert_eq!(outcome.code, Some(NOTHING_YET), "{each:?}: {outcome:?}");
        let begin = Instant::now();
        site.stop().await; // asserts status 0
        let took = begin.elapsed();
        assert!(took < FLUSH[1] + SLACK, "{each:?}: {took:?}");
        sad.check(&site.log().split_off(so_far), true);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_dies_in_the_middle_and_comes_back_is_said_once_each() {
    install_crypto();
    let mut site = Site::new().await;
    let first = Receiver::new(Protocol::Http, None, Answer::Accept).await;
    site.set(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        &format!("http://127.0.0.1:{}/v1/traces", first.port()),
    );
    site.set("OTEL_BSP_SCHEDULE_DELAY", "50");
    site.start().await;
    assert_eq!(programs::run(status(&site, &[])).await.code, Some(NOTHING_YET));
    eventually_now("spans at the first collector", PATIENCE, || !first.spans().is_empty()).await;
    let port = first.port();
    drop(first);
    for _ in 0..3 {
        assert_eq!(programs::run(status(&site, &[])).await.code, Some(NOTHING_YET));
    }
    eventually_now("a warning", PATIENCE, || !warnings(&site.log()).is_empty()).await;
    let second = Receiver::on(port, Protocol::Http, None, Answer::Accept).await;
    eventually_now("delivery again", PATIENCE, || {
        // Each question makes a span of the server's.
        let _ = status(&site, &[]).output();
        site.log().contains("telemetry is delivered again")
    })
    .await;
    assert!(!second.of(Signal::Traces).is_empty());
    site.stop().await;
    let log = site.log();
    assert_eq!(warnings(&log).len(), 1, "{log}");
    assert_eq!(log.matches("delivered again").count(), 1, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn strictness_and_a_taken_port_for_both_programs() {
    install_crypto();
    let mut site = Site::new().await;
    let strict = [
        ("KLIO_OTEL_STRICT", "true".to_owned()),
        ("OTEL_TRACES_EXPORTER", "zipkin".into()),
        ("OTEL_PROPAGATORS", "b3".into()),
    ];
    let outcome = programs::run(status(&site, &strict)).await;
    assert_eq!(outcome.code, Some(4), "{outcome:?}");
    for part in
        ["OTEL_TRACES_EXPORTER: found \"zipkin\"", "OTEL_PROPAGATORS: found \"b3\"", "hint:"]
    {
        assert!(outcome.stderr.contains(part), "{part}: {}", outcome.stderr);
    }
    let run = |variables: &[(&str, String)]| {
        let mut command = programs::command(&programs::klio_server());
        command.args(["run", "-c"]).arg(site.dir().join("klio-server.toml"));
        command.envs(variables.iter().map(|(n, v)| (*n, v.as_str())));
        command
    };
    let outcome = programs::run(run(&strict)).await;
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("OTEL_PROPAGATORS: found \"b3\""), "{}", outcome.stderr);

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let prometheus = [
        ("OTEL_METRICS_EXPORTER", "prometheus".to_owned()),
        ("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1".into()),
        ("OTEL_EXPORTER_PROMETHEUS_PORT", port),
        ("KLIO_OTEL_STRICT", "true".into()),
    ];
    let outcome = programs::run(run(&prometheus)).await;
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("OTEL_EXPORTER_PROMETHEUS_PORT"), "{}", outcome.stderr);
    // Without it: a warning, and the server receives.
    for (name, value) in &prometheus[..3] {
        site.set(name, value);
    }
    site.start().await;
    assert_eq!(programs::run(status(&site, &[])).await.code, Some(NOTHING_YET));
    let log = site.log();
    let found = warnings(&log);
    assert!(found.len() == 1 && found[0].contains("OTEL_EXPORTER_PROMETHEUS_PORT"), "{found:?}");
    site.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_are_flushed_on_every_way_out() {
    install_crypto();
    let collector = Collector::new().await;
    let to = [
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", format!("{}/v1/traces", collector.endpoint())),
        // Long enough that only the way out sends anything.
        ("OTEL_BSP_SCHEDULE_DELAY", "600000".into()),
    ];
    let mut site = Site::new().await;
    for (name, value) in &to {
        site.set(name, value);
    }

    // An error.
    let mut command = status(&site, &to);
    command.env("KLIO_SERVER__ADDRESS", format!("https://127.0.0.1:{}", ports::free()));
    let outcome = programs::run(command).await;
    let (trace, state) = closing(&outcome).expect("a closing line");
    let spans = collector.spans();
    let span = spans.iter().find(|s| s.trace == trace && s.name == "cli.status").unwrap();
    assert!(
        state == "delivered" && span.failed && span.attributes.contains_key("error.type"),
        "{span:?}"
    );

    // A signal, while it waits for a server that never answers.
    let hanging = Receiver::new(Protocol::Http, None, Answer::Hang).await;
    for (kill, verb) in [(Kill::TERM, "status"), (Kill::INT, "list")] {
        let mut command = site.klio_command(None, &[verb]);
        command.envs(to.iter().map(|(n, v)| (*n, v.as_str())));
        command.env("KLIO_SERVER__ADDRESS", format!("https://127.0.0.1:{}", hanging.port()));
        command.env("KLIO_SERVER__CONNECT_TIMEOUT", "60s");
        command.env("RUST_LOG", "trace");
        let mut klio = Running::spawn("klio", command, &site.scratch(verb));
        // It has a handler once it has a runtime and a connection.
        eventually_now("klio to catch signals", PATIENCE, || caught(klio.pid())).await;
        klio.signal(kill);
        let ended = klio.wait_exit(PATIENCE).await;
        assert_eq!(ended.code(), Some(9), "{}", klio.log());
        let spans = collector.spans();
        assert!(spans.iter().any(|s| s.name == format!("cli.{verb}") && s.failed), "{spans:?}");
        assert!(klio.log().lines().any(|l| l.starts_with("trace ") && l.ends_with(": delivered")));
    }

    // The server: SIGTERM, SIGINT, and a start that fails.
    for kill in [Kill::TERM, Kill::INT] {
        let runs = || collector.spans().iter().filter(|s| s.name == "cli.run").count();
        let before = runs();
        site.start().await;
        site.server().signal(kill);
        let ended = site.server().wait_exit(PATIENCE).await;
        assert!(ended.success(), "{}", site.log());
        assert_eq!(runs(), before + 1);
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    site.set("KLIO_LISTEN", &taken.local_addr().unwrap().to_string());
    site.launch();
    let ended = site.server().wait_exit(PATIENCE).await;
    assert!(!ended.success());
    let spans = collector.spans();
    assert!(spans.iter().any(|s| s.name == "cli.run" && s.failed), "{spans:?}");
}

/// Whether a process has a handler for SIGTERM and SIGINT.
fn caught(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).unwrap_or_default();
    let both = (1 << (15 - 1)) | (1 << (2 - 1));
    mask & both == both
}
