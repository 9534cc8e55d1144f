//! Secrets never leave: planted in arguments, addresses, DSNs, headers and settings, they appear neither in what
//! `telemetry::redact` gives back nor in spans, log records, resources or log lines of the real programs.
//!
//! Random with fixed seeds: a failure names its seed and its text.

use klio_telemetry::redact::{redact, redact_arguments};
use klio_tests::{
    install_crypto,
    otlp::{Answer, Protocol, Receiver, Signal},
    ports, programs,
    site::Site,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::process::Command;

/// Pieces of a secret that must not be seen, and the secret that holds them together.
struct Secret {
    cores: Vec<String>,
    text: String,
}

fn core(rng: &mut StdRng) -> String {
    // Told from everything else by its beginning; long enough not to occur by chance.
    let tail: String = (0..8).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
    format!("Zq{tail}")
}

/// One to three pieces with one of `glue` between each.
fn secret(rng: &mut StdRng, glue: &[&str]) -> Secret {
    let count = if glue.is_empty() { 1 } else { rng.random_range(1..=3) };
    let cores: Vec<String> = (0..count).map(|_| core(rng)).collect();
    let mut text = cores[0].clone();
    for core in &cores[1..] {
        text += glue[rng.random_range(0..glue.len())];
        text += core;
    }
    Secret { cores, text }
}

fn pick<'a>(rng: &mut StdRng, all: &[&'a str]) -> &'a str {
    all[rng.random_range(0..all.len())]
}

/// Case is the writer's own.
fn shaken(rng: &mut StdRng, name: &str) -> String {
    match rng.random_range(0..3) {
        0 => name.to_uppercase(),
        1 => name.to_owned(),
        _ => name.chars().map(|c| if rng.random() { c.to_ascii_uppercase() } else { c }).collect(),
    }
}

const PARAMETERS: &[&str] = &[
    "X-Amz-Signature",
    "X-Amz-Credential",
    "X-Amz-Security-Token",
    "X-Goog-Signature",
    "sig",
    "Signature",
    "password",
    "sslpassword",
    "token",
    "access_token",
    "api_key",
    "apikey",
    "secret",
    "client_secret",
];
const HEADERS: &[&str] =
    &["authorization", "proxy-authorization", "x-api-key", "x-auth-token", "cookie", "set-cookie"];
const SETTINGS: &[&str] = &[
    "password",
    "PGPASSWORD",
    "sslpassword",
    "secret_access_key",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "KLIO_TIER2__SECRET_ACCESS_KEY",
    "AccountKey",
    "passphrase",
    "private_key",
];

/// A text with a secret in it.
type Shape = fn(&mut StdRng) -> (String, Secret);

fn uri(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &["%40", "%2F", ":", "@", "!", "$", ",", ";", "+", "/", "?", "#"]);
    let scheme = pick(rng, &["postgres", "postgresql", "https", "s3", "nats", "http"]);
    let path = pick(rng, &["", "/db", "/db?sslmode=require", ":5432/x", "/a@b"]);
    (format!("{scheme}://klio:{}@db.example{path}", s.text), s)
}

fn lone_token(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &["%40", "-", "_", "."]);
    (format!("https://{}@collector.example:4318/v1/traces", s.text), s)
}

fn parameter(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &["%2F", "%3D", "+", "/", ",", ";", "=", ".", "~", "'"]);
    let name = pick(rng, PARAMETERS);
    let name = shaken(rng, name);
    let before = pick(rng, &["", "x=1&", "prefix=a%2Fb&"]);
    let after = pick(rng, &["", "&y=2", "#end"]);
    (format!("https://bucket.example/key?{before}{name}={}{after}", s.text), s)
}

fn keyword_dsn(rng: &mut StdRng) -> (String, Secret) {
    let after = pick(rng, &["", " user=klio dbname=x", " port=5432"]);
    let equals = pick(rng, &["=", " = ", "= "]);
    if rng.random() {
        let s = secret(rng, &[" ", r"\'", r"\\", "''", "\"", "&", ",", "=", " password=", "@"]);
        (format!("host=db password{equals}'{}'{after}", s.text), s)
    } else {
        let s = secret(rng, &[r"\ ", r"\'", r"\\", "\"", "&", ",", ";", "=", "@", "'", "%20"]);
        (format!("host=db password{equals}{}{after}", s.text), s)
    }
}

fn unclosed_dsn(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &[" ", r"\'", "="]);
    (format!("password='{}", s.text), s)
}

fn header(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &["%20", "=", ".", "-", "+", "/", "_", "~"]);
    let name = pick(rng, HEADERS);
    let name = shaken(rng, name);
    let scheme = if name.to_lowercase().contains("authorization") {
        pick(rng, &["Bearer ", "Basic ", "ApiKey ", "", "Token token="])
    } else {
        ""
    };
    let equals = pick(rng, &[": ", ":", "="]);
    (format!("{name}{equals}{scheme}{}", s.text), s)
}

fn otel_headers(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &[",x-b=", "%20", "=", ","]);
    let signal = pick(rng, &["", "TRACES_", "METRICS_", "LOGS_"]);
    (format!("OTEL_EXPORTER_OTLP_{signal}HEADERS=x-honeycomb-team={}", s.text), s)
}

fn setting(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &["/", "+", "=", "-", ".", ",", ";"]);
    let name = pick(rng, SETTINGS);
    let name = shaken(rng, name);
    let equals = pick(rng, &["=", ": ", " = ", "%3D"]);
    (format!("{name}{equals}{}", s.text), s)
}

fn json(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &[" ", r#"\""#, r"\\", "'", ",", ":", "}"]);
    let text = format!("{{\"{}\":\"{}\",\"b\":1}}", pick(rng, SETTINGS), s.text);
    // As it is, and as a string in a string.
    (if rng.random() { text } else { format!("{text:?}") }, s)
}

fn flag(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &["/", "+", "=", ".", ",", "@", ":"]);
    let name = pick(rng, &["--password", "--token", "--api-key", "--client-secret", "-password"]);
    let between = pick(rng, &["=", " "]);
    (format!("{name}{between}{}", s.text), s)
}

fn bearer(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &[".", "-", "_", "~", "+", "/", "="]);
    let scheme = pick(rng, &["Bearer ", "bearer ", "Basic ", "Bearer%20"]);
    (format!("sent {scheme}{}", s.text), s)
}

fn identity(rng: &mut StdRng) -> (String, Secret) {
    let s = secret(rng, &[]);
    if rng.random() {
        (format!("AGE-SECRET-KEY-1{}", s.text), s)
    } else {
        (format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----", s.text), s)
    }
}

const SHAPES: &[Shape] = &[
    uri,
    lone_token,
    parameter,
    keyword_dsn,
    unclosed_dsn,
    header,
    otel_headers,
    setting,
    json,
    flag,
    bearer,
    identity,
];

/// The text as it is, in a sentence, in quotes in a sentence.
fn framed(rng: &mut StdRng, text: &str) -> String {
    match rng.random_range(0..4) {
        0 => text.to_owned(),
        1 => format!("connect to PostgreSQL at 12:30: {text}"),
        2 => format!("read setting: expected a URL, found {text:?}; hint: it is in klio.toml"),
        _ => format!("first line\nerror: {text}\nthird line"),
    }
}

#[test]
fn a_planted_secret_never_comes_out_of_redact() {
    for seed in 0..6000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let shape = SHAPES[rng.random_range(0..SHAPES.len())];
        let (text, secret) = shape(&mut rng);
        let whole = framed(&mut rng, &text);
        let once = redact(&whole);
        for core in &secret.cores {
            assert!(
                !once.contains(core.as_str()),
                "seed {seed}: {core} of\n{whole}\nis in\n{once}"
            );
        }
        assert_eq!(redact(&once), once, "seed {seed}: redacted twice, {whole}");
    }
}

#[test]
fn a_planted_secret_never_comes_out_of_redacted_arguments() {
    for seed in 0..3000 {
        let mut rng = StdRng::seed_from_u64(seed);
        let shape = SHAPES[rng.random_range(0..SHAPES.len())];
        let (text, mut secret) = shape(&mut rng);
        let mut words = vec!["klio".to_owned(), "restore".into(), "--from".into(), text];
        if rng.random() {
            // A flag and its value as two words: the value may be anything.
            let more = self::secret(&mut rng, &[" ", "'", "\"", "&", "=", "--", "\n", "@"]);
            words.extend(["--password".to_owned(), more.text]);
            secret.cores.extend(more.cores);
        }
        let shown = redact_arguments(&words).join(" ");
        for core in &secret.cores {
            assert!(
                !shown.contains(core.as_str()),
                "seed {seed}: {core} of {words:?} is in {shown}"
            );
        }
    }
}

#[test]
fn texts_without_secrets_stay_as_they_are() {
    for text in [
        "sealed segment 000000010000000000000001 in 12.5 ms",
        "s3://bucket/prefix/wal/00000001/000000010000000000000001.zst",
        "connect to https://127.0.0.1:7423: connection refused",
        "host=db user=klio dbname=x sslmode=verify-full",
        "GET https://b.s3.amazonaws.com/klio?list-type=2&prefix=a%2Fb: 503 Slow Down",
        "klio backup --name nightly --json",
        "trace_id=0af7651916cd43dd8448eb211c80319c span_id=b7ad6b7169203331 trace_flags=01",
        "spool: 3 segments, 48 MiB",
    ] {
        assert_eq!(redact(text), text);
    }
}

/// Everything that was sent, as text.
fn everything(receiver: &Receiver) -> String {
    format!("{:?}", receiver.arrivals().iter().map(|a| &a.message).collect::<Vec<_>>())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_of_a_command_reaches_its_spans_records_or_lines() {
    install_crypto();
    let mut rng = StdRng::seed_from_u64(20_261_121);
    let receiver = Receiver::new(Protocol::Http, None, Answer::Accept).await;
    let site = Site::new().await;
    let mut cores = Vec::new();
    let nowhere = ports::free();
    let mut plant = |glue: &[&str]| {
        let s = secret(&mut rng, glue);
        cores.extend(s.cores.clone());
        s.text
    };
    let mut commands: Vec<Command> = Vec::new();
    for round in 0..3 {
        let uri = format!(
            "postgres://klio:{}@127.0.0.1:{nowhere}/x?sslpassword={}",
            plant(&["%40", "!"]),
            plant(&[".", "-"])
        );
        let quoted = format!(
            "host=127.0.0.1 port={nowhere} user=klio password='{}'",
            plant(&[" ", r"\'", "\""])
        );
        let bare = format!(
            "host=127.0.0.1 port={nowhere} user=klio password={}",
            plant(&["&", ",", r"\ "])
        );
        let server = format!("https://klio:{}@127.0.0.1:{nowhere}", plant(&["-", "."]));
        let from = format!("https://bucket.example/k?X-Amz-Signature={}&x=1", plant(&["%2F"]));
        let broken = format!("postgres://klio:{}@[nonsense/x", plant(&["%40"]));
        let (token, identity) = (plant(&["."]), format!("AGE-SECRET-KEY-1{}", plant(&[])));
        let klio: [(&[&str], &str, &str); 9] = [
            (&["slot", "show"], "KLIO_POSTGRES__DSN", &uri),
            (&["slot", "show"], "KLIO_POSTGRES__DSN", &quoted),
            (&["check"], "KLIO_POSTGRES__DSN", &bare),
            (&["slot", "show"], "KLIO_POSTGRES__DSN", &broken),
            (&["status", "--server", &server], "KLIO_TIER2__SECRET_ACCESS_KEY", &token),
            (&["list", "--from", &from], "KLIO_TIER2__ACCESS_KEY_ID", "id"),
            (&["list", "--from", &uri, "--identity", &identity], "X", ""),
            (
                &[
                    "wal-fetch",
                    "000000010000000000000001",
                    "/nowhere/x",
                    "--timeout",
                    "1s",
                    "--from",
                    &from,
                ],
                "X",
                "",
            ),
            (&["status", "--cluster", &quoted], "X", ""),
        ];
        for (words, name, value) in klio {
            let mut command = site.klio_command(None, words);
            command.env(name, value);
            commands.push(command);
        }
        let config = format!("/nowhere/{round}?token={}", plant(&["."]));
        let mut server = programs::command(&programs::klio_server());
        server.args(["run", "-c", &config]);
        commands.push(server);
        let mut server = programs::command(&programs::klio_server());
        server.args(["run", "-c"]).arg(site.dir().join("klio-server.toml"));
        server.env("KLIO_LISTEN", &uri);
        commands.push(server);
        let mut server = programs::command(&programs::klio_server());
        server.args(["run", "-c"]).arg(site.dir().join("klio-server.toml"));
        server.env("KLIO_TIER2__URL", &from).env("KLIO_TIER2__SECRET_ACCESS_KEY", &token);
        commands.push(server);
    }
    let header = plant(&[".", "-"]);
    let mut lines = String::new();
    for mut command in commands {
        command
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint())
            .env("OTEL_LOGS_EXPORTER", "otlp")
            .env("OTEL_EXPORTER_OTLP_HEADERS", format!("authorization=Bearer%20{header}"))
            .env("OTEL_RESOURCE_DETECTORS", "process")
            .env("KLIO_LOG_FORMAT", "json")
            .env("RUST_LOG", "debug");
        let outcome = programs::run(command).await;
        assert_ne!(outcome.code, Some(0), "{outcome:?}");
        // What a person typed is shown to that person; log lines are for everybody.
        lines +=
            &outcome.stderr.lines().filter(|l| l.starts_with('{')).collect::<Vec<_>>().join("\n");
    }
    let sent = everything(&receiver);
    for core in &cores {
        for text in [&sent, &lines] {
            if let Some(at) = text.find(core.as_str()) {
                let from = text[..at].char_indices().rev().nth(300).map_or(0, |(i, _)| i);
                panic!("{core} was sent or logged: {}", &text[from..at + core.len()]);
            }
        }
    }
    // The test looks at something: every command has a root span with arguments, and resources with command lines.
    let roots: Vec<_> =
        receiver.spans().into_iter().filter(|s| s.name.starts_with("cli.")).collect();
    assert!(roots.len() >= 30, "{}", roots.len());
    assert!(roots.iter().all(|s| s.attributes.contains_key("cli.arguments")));
    assert!(roots.iter().any(|s| s.attributes["cli.arguments"].contains("***")));
    assert!(sent.contains("process.command_args"), "{sent}");
    assert!(!receiver.of(Signal::Logs).is_empty());
    assert!(
        receiver
            .arrivals()
            .iter()
            .all(|a| a.header("authorization") == [format!("Bearer {header}")])
    );
}
