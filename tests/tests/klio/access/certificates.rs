//! Who gets in: certificates out of their time, none, old TLS, administrators, foreign authorities; and a bucket that shows
//! the wrong certificate (P3, P8).

use klio_pg::{Lsn, SegmentSize};
use klio_proto::Code;
use klio_tests::{
    bundle,
    client::{self, Stream, open, wal},
    install_crypto,
    pki::{Authority, Validity},
    postgres::Postgres,
    programs::{self, Outcome},
    s3::S3,
    site::{PATIENCE, Site},
    tls,
    wait::eventually,
};
use rustls::version::{TLS12, TLS13};
use std::path::{Path, PathBuf};

const START: Lsn = Lsn::new(0x0100_0000);
/// The segment that begins at [`START`].
const SEGMENT: &str = "000000010000000000000010";

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("1 MiB")
}

/// A server that accepts clients of its own authority and of the one given back.
async fn site() -> (Site, Authority) {
    install_crypto();
    let mut site = Site::new().await;
    let authority = Authority::new("another authority");
    bundle::trust(&site, &authority.cert());
    site.start().await;
    (site, authority)
}

async fn klio(site: &Site, bundle: &Path, args: &[&str]) -> Outcome {
    programs::run(site.klio_command_of(bundle, None, args)).await
}

/// Asks `klio-server client` for a bundle.
async fn issue(site: &Site, args: &[&str]) -> PathBuf {
    let config = site.dir().join("klio-server.toml").display().to_string();
    let outcome = site.klio_server(&[&["client"], args, &["-c", &config]].concat()).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    site.dir().join("clients").join(args[0]).join("klio.toml")
}

/// One finished segment under this bundle's cluster.
async fn store_segment(site: &Site, bundle: &Path, cluster: &str) {
    let channel = client::connect(site, bundle).await.expect("connect");
    let mut stream = Stream::open(&channel, open(cluster, size(), START)).await.expect("open");
    let end = START.advance(size().bytes() + 8192);
    let mut at = START;
    while at < end {
        let bytes = 65536.min(end.bytes_since(at));
        let length = usize::try_from(bytes).expect("a small number");
        stream.append(at, wal(at, length, size(), 1)).await;
        at = at.advance(bytes);
    }
    stream.flushed(end).await.expect("acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_out_of_its_time_is_refused_and_named() {
    let (site, authority) = site().await;
    let pg = Postgres::builder().segment_mib(1).start().await;
    for (name, validity) in [("expired", Validity::Expired), ("not-yet", Validity::NotYet)] {
        let pair = authority.client("klio@main", None, validity);
        let bad = bundle::write(&site, name, &pair, "main");
        for args in [&["status"][..], &["list", "wal"], &["check"]] {
            let outcome = programs::run(site.klio_command_of(&bad, Some(&pg), args)).await;
            let text = format!("{}{}", outcome.stdout, outcome.stderr);
            let code = if args == ["check"] { 3 } else { 16 };
            assert_eq!(outcome.code, Some(code), "{name} {args:?}: {text}");
            let file = bad.with_file_name("client.crt").display().to_string();
            assert!(text.contains(&file), "{name} {args:?} does not name {file}: {text}");
            assert!(text.contains("hint: "), "{name} {args:?}: {text}");
        }
        // P7: for PostgreSQL this is trouble, never "no such file".
        let target = site.scratch("fetched").display().to_string();
        let outcome = klio(&site, &bad, &["wal-fetch", SEGMENT, &target, "--timeout", "1s"]).await;
        assert!(outcome.code > Some(125), "{outcome:?}");
    }
    // The same authority and name, in its time, is let in: only the time was wrong.
    let good = authority.client("klio@main", None, Validity::Now);
    let good = bundle::write(&site, "good", &good, "main");
    let outcome = klio(&site, &good, &["status"]).await;
    // 3: nothing streams there.
    assert_eq!(outcome.code, Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("nothing has streamed"), "{}", outcome.stderr);
    assert!(!site.tier1().join("main").exists(), "something was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_certificate_and_old_tls_are_refused_in_the_handshake() {
    let (site, authority) = site().await;
    let server_ca =
        std::fs::read_to_string(site.bundle().with_file_name("ca.crt")).expect("ca.crt");
    let pair = authority.client("klio@main", None, Validity::Now);
    tls::greet(site.port(), &server_ca, &TLS13, Some(&pair)).await.expect("let in");
    let refused = |result: std::io::Result<()>, alert: &str| {
        let error = result.expect_err(alert).to_string();
        assert!(error.contains(alert), "expected {alert}, found {error}");
    };
    let nobody = tls::greet(site.port(), &server_ca, &TLS13, None).await;
    refused(nobody, "CertificateRequired");
    let old = tls::greet(site.port(), &server_ca, &TLS12, Some(&pair)).await;
    refused(old, "ProtocolVersion");
    // A stranger's certificate, for comparison: of no authority the server knows.
    let stranger = Authority::new("unknown").client("klio@main", None, Validity::Now);
    let stranger = tls::greet(site.port(), &server_ca, &TLS13, Some(&stranger)).await;
    refused(stranger, "UnknownCA");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_reads_everything_and_writes_nothing() {
    let (site, _) = site().await;
    let pg = Postgres::builder().segment_mib(1).start().await;
    let other = issue(&site, &["app@other"]).await;
    let admin = issue(&site, &["ops", "--admin"]).await;
    store_segment(&site, &site.bundle(), "main").await;
    store_segment(&site, &other, "other").await;
    let clusters = async |bundle: &Path| {
        let outcome = klio(&site, bundle, &["status", "--all", "--json"]).await;
        let value: serde_json::Value =
            serde_json::from_str(&outcome.stdout).unwrap_or_else(|_| panic!("{outcome:?}"));
        let names = value["clusters"].as_array().expect("clusters").clone();
        names.iter().map(|c| c["cluster"].as_str().expect("a name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(clusters(&admin).await, ["main", "other"]);
    assert_eq!(clusters(&other).await, ["other"]);
    assert_eq!(clusters(&site.bundle()).await, ["main"]);
    for cluster in ["main", "other"] {
        let outcome = klio(&site, &admin, &["list", "wal", "--cluster", cluster]).await;
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert!(outcome.stdout.contains("0/1000000"), "{outcome:?}");
        let target = site.scratch(&format!("fetched-{cluster}"));
        let path = target.display().to_string();
        let outcome =
            klio(&site, &admin, &["wal-fetch", SEGMENT, &path, "--cluster", cluster]).await;
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        assert_eq!(std::fs::read(&target).expect("fetched"), wal(START, 1 << 20, size(), 1));
    }
    // Without a cluster there is nothing to guess.
    assert_eq!(klio(&site, &admin, &["list", "wal"]).await.code, Some(4));
    let outcome =
        programs::run(site.klio_command_of(&admin, Some(&pg), &["stream", "--cluster", "main"]))
            .await;
    assert_eq!(outcome.code, Some(15), "{outcome:?}");
    assert!(outcome.stderr.contains("reading only"), "{outcome:?}");
    for args in [&["list", "wal"][..], &["status"], &["wal-fetch", SEGMENT, "/nowhere/file"]] {
        let outcome = klio(&site, &other, &[args, &["--cluster", "main"]].concat()).await;
        let code = if args[0] == "wal-fetch" { 200 } else { 15 };
        assert_eq!(outcome.code, Some(code), "{args:?}: {outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_a_foreign_authority_do_what_the_map_says() {
    install_crypto();
    let mut site = Site::new().await;
    let authority = Authority::new("the company's");
    bundle::trust(&site, &authority.cert());
    bundle::configure(
        &site,
        "[[auth.map]]\ncommon_name = \"db1.example.com\"\ncluster = \"main\"\n\
         [[auth.map]]\ncommon_name = \"ops.example.com\"\nadmin = true\n",
    );
    site.start().await;
    let write = |name: &str, cluster: &str| {
        let pair = authority.client(name, None, Validity::Now);
        bundle::write(&site, name, &pair, cluster)
    };
    let database = write("db1.example.com", "main");
    store_segment(&site, &database, "main").await;
    assert_eq!(klio(&site, &database, &["list", "wal"]).await.code, Some(0));
    let channel = client::connect(&site, &database).await.expect("connect");
    let status = Stream::open(&channel, open("other", size(), START)).await.err().expect("refused");
    assert_eq!(Code::of(&status), Code::Forbidden, "{status:?}");
    let operator = write("ops.example.com", "main");
    assert_eq!(klio(&site, &operator, &["list", "wal"]).await.code, Some(0));
    let channel = client::connect(&site, &operator).await.expect("connect");
    let status = Stream::open(&channel, open("main", size(), START)).await.err().expect("refused");
    assert_eq!(Code::of(&status), Code::Forbidden, "{status:?}");
    // Compared exactly, and nobody else of that authority gets in.
    for name in ["db2.example.com", "DB1.example.com", "x.db1.example.com"] {
        let outcome = klio(&site, &write(name, "main"), &["status"]).await;
        assert_eq!(outcome.code, Some(15), "{outcome:?}");
        assert!(outcome.stderr.contains(name), "{outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let (site, _) = site().await;
    let channel = client::connect(&site, &site.bundle()).await.expect("connect");
    let health = HealthClient::new(channel.clone());
    for service in ["", "klio.v1.Wal", "klio.v1.Catalog", "klio.v1.Base"] {
        eventually(&format!("{service:?} to be serving"), PATIENCE, || async {
            let request = HealthCheckRequest { service: service.into() };
            let answer = health.clone().check(request).await.expect("an answer").into_inner();
            (answer.status() == ServingStatus::Serving).then_some(()).ok_or(answer)
        })
        .await;
    }
    let unknown = HealthCheckRequest { service: "klio.v1.None".into() };
    assert_eq!(
        health.clone().check(unknown).await.expect_err("none").code(),
        tonic::Code::NotFound
    );
    let message = Some(MessageRequest::ListServices(String::new()));
    let request = ServerReflectionRequest { host: String::new(), message_request: message };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect("an answer")
        .into_inner();
    let answer = answers.message().await.expect("no error").expect("one message");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|s| s.name).collect();
    for service in ["klio.v1.Wal", "klio.v1.Catalog"] {
        assert!(names.iter().any(|n| n == service), "{names:?}");
    }
}

/// Ends a segment and gives back where it ended, once more WAL has followed.
async fn end_segment(pg: &Postgres) -> Lsn {
    let size = pg.segment_size().await;
    let end = pg.switch_wal().await;
    pg.write_wal(1).await;
    end.segment_start(size)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_with_the_wrong_certificate_gets_nothing_and_is_caught_up_with() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let (right, wrong) = (Authority::new("right"), Authority::new("wrong"));
    let names = ["localhost", "127.0.0.1"];
    let certificate = right.server(&names, Validity::Now);
    let mut s3 = S3::with_tls(&certificate);
    let mut site = Site::new().await.tier2(&s3);
    let ca = site.scratch("s3-ca.crt");
    std::fs::write(&ca, right.cert()).expect("write");
    site.set("KLIO_TIER2__CA_FILE", &ca.display().to_string());
    site.set("KLIO_TIER2__RETRY_TIMEOUT_SECONDS", "2");
    site.start().await;
    let _stream = site.stream(&pg);
    pg.write_wal(1 << 20).await;
    site.wait_archived(end_segment(&pg).await).await;
    for bad in [wrong.server(&names, Validity::Now), right.server(&names, Validity::Expired)] {
        // Open connections go with the old certificate.
        s3.stop();
        s3.set_certificate(&bad);
        s3.start();
        let before = s3.keys("klio/main/wal/");
        let end = pg.write_wal(1 << 20).await;
        let sealed = end_segment(&pg).await;
        site.wait_flushed(end).await;
        let problem = eventually("the problem in klio status", PATIENCE, || async {
            let outcome = site.klio(None, &["status"]).await;
            let found = outcome.stdout.lines().find(|l| l.contains("problem:")).map(str::to_owned);
            found.filter(|_| outcome.code == Some(3)).ok_or(outcome)
        })
        .await;
        assert!(problem.contains("certificate"), "the cause is not named: {problem}");
        assert_eq!(s3.keys("klio/main/wal/"), before, "sent to a stranger");
        s3.stop();
        s3.set_certificate(&certificate);
        s3.start();
        site.wait_archived(sealed).await;
        eventually("the problem to go", PATIENCE, || async {
            site.klio(None, &["status"]).await.code == Some(0)
        })
        .await;
    }
}
