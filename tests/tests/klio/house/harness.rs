//! The harness does what the other tests rely on: servers start, faults hit, and nothing is left behind.

#![allow(clippy::unwrap_used, reason = "the lint only spares functions with #[test] on them")]

use futures::{StreamExt, future::join_all};
use hyper::Method;
use klio_tests::{
    guard,
    nats::{Nats, PASSWORD, USER},
    pki::{Authority, Validity},
    ports,
    postgres::{Postgres, Stop, install::MAJORS, pg_waldump},
    process::Running,
    promtool,
    s3::{Fault, Rule, S3, SECRET_KEY},
    scratch::Scratch,
    wait::eventually_now,
};
use object_store::{Error, ObjectStoreExt, PutPayload, path::Path as Key};
use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn every_postgresql_version_starts_and_answers() {
    for major in MAJORS {
        let postgres = Postgres::builder().major(major).start().await;
        assert_eq!(postgres.value("SELECT 1").await, "1");
        let version = postgres.value("SHOW server_version").await;
        assert!(version.starts_with(&major.to_string()), "expected {major}, found {version}");
        let over_tcp = klio_tests::postgres::Session::connect(&postgres.tcp_conninfo()).await;
        assert_eq!(over_tcp.unwrap().rows("SELECT 2").await.unwrap(), [["2"]]);
    }
}

/// Also those that are copies of one template.
#[tokio::test]
async fn each_cluster_has_a_system_identifier_of_its_own() {
    for major in MAJORS {
        let identifier = "SELECT system_identifier FROM pg_control_system()";
        let (one, mut two) = (
            Postgres::builder().major(major).start().await,
            Postgres::builder().major(major).start().await,
        );
        let found = two.value(identifier).await;
        assert_ne!(one.value(identifier).await, found);
        // WAL of the first segment says so, too: recovery takes no other.
        two.execute("CREATE TABLE t (i int)").await;
        two.kill9();
        two.start().await;
        assert_eq!(two.value(identifier).await, found);
    }
}

#[tokio::test]
async fn segment_size_is_as_asked() {
    for mib in [1, 64] {
        let postgres = Postgres::builder().segment_mib(mib).start().await;
        assert_eq!(postgres.value("SHOW wal_segment_size").await, format!("{mib}MB"));
        postgres.switch_wal().await;
        let segments = postgres.finished_segments().await;
        let size = std::fs::metadata(segments.last().unwrap()).unwrap().len();
        assert_eq!(size, u64::from(mib) << 20);
    }
}

#[tokio::test]
async fn postgresql_comes_back_after_every_way_to_end() {
    let mut postgres = Postgres::new().await;
    postgres.execute("CREATE TABLE t (i int)").await;
    for way in 0..3 {
        postgres.execute(&format!("INSERT INTO t VALUES ({way})")).await;
        match way {
            0 => postgres.kill9(),
            1 => postgres.stop(Stop::Immediate).await,
            _ => postgres.stop(Stop::Fast).await,
        }
        postgres.start().await;
        assert_eq!(postgres.value("SELECT max(i) FROM t").await, way.to_string());
    }
}

#[tokio::test]
async fn a_promoted_standby_is_on_timeline_two() {
    for major in [15, 18] {
        let primary = Postgres::builder().major(major).start().await;
        primary.execute("CREATE TABLE t AS SELECT 7 AS i").await;
        let standby = primary.standby().await;
        standby.wait_true("SELECT count(*) = 1 FROM pg_class WHERE relname = 't'").await;
        standby.promote().await;
        standby.execute("INSERT INTO t VALUES (8)").await;
        assert_eq!(standby.timeline().await.get(), 2);
        assert_eq!(primary.timeline().await.get(), 1);
        assert_eq!(standby.system_identifier().await, primary.system_identifier().await);
    }
}

#[tokio::test]
async fn postgresqls_own_tools_work_on_it() {
    let postgres = Postgres::builder().segment_mib(1).start().await;
    let scratch = Scratch::new("tools");
    let mut receiver = postgres.start_receivewal(&scratch.join("wal"), &["--no-loop"]);
    postgres.pgbench(&["-i", "-s", "1", "-q"]).await;
    let report = postgres.pgbench(&["-t", "10"]).await.stdout;
    assert!(report.contains("10/10"), "{report}");

    let before = postgres.insert_lsn().await;
    let after = postgres.write_wal(1 << 20).await;
    assert!(after.as_u64() - before.as_u64() >= 1 << 20, "from {before} to {after}");

    postgres.switch_wal().await;
    let segment = postgres.finished_segments().await.pop().unwrap();
    let copy = scratch.join("wal").join(segment.file_name().unwrap());
    eventually_now("pg_receivewal to finish the segment", SOON, || copy.is_file()).await;
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&segment).unwrap());
    assert!(receiver.is_running());

    let dump = pg_waldump(&[segment.to_str().unwrap()]).await;
    let last = dump.stdout.lines().last().unwrap_or_default();
    assert!(last.contains("SWITCH"), "{last:.200} {}", dump.stderr);
}

#[tokio::test]
async fn s3_keeps_objects_and_refuses_a_wrong_secret() {
    let mut s3 = S3::new();
    let (key, client) = (Key::from("one/wal/x.zst"), s3.client(SECRET_KEY));
    client.put(&key, PutPayload::from_static(b"content")).await.unwrap();
    assert_eq!(s3.keys("one"), ["one/wal/x.zst"]);

    s3.stop();
    assert!(client.get(&key).await.is_err(), "a stopped server answered");
    s3.start();
    let bytes = client.get(&key).await.unwrap().bytes().await.unwrap();
    assert_eq!(bytes.as_ref(), b"content");

    let wrong = s3.client("wrong").get(&key).await.unwrap_err();
    assert!(matches!(wrong, Error::PermissionDenied { .. }), "expected 403, found {wrong:?}");
    assert_eq!(s3.faults().seen().last().unwrap().status.unwrap(), 403);
}

#[tokio::test]
async fn each_s3_fault_hits_what_it_should_until_healed() {
    let s3 = S3::new();
    let (key, client) = (Key::from("a/b"), s3.client(SECRET_KEY));
    let put = || client.put(&key, PutPayload::from_static(b"x"));
    put().await.unwrap();
    for (fault, status) in [
        (Fault::InternalError, Some(500)),
        (Fault::SlowDown, Some(503)),
        (Fault::Status(507), Some(507)),
        (Fault::Reset, None),
    ] {
        s3.faults().inject(Rule::always(fault).on(Method::PUT).path("a/b").times(2));
        for _ in 0..2 {
            let error = put().await.unwrap_err();
            assert_eq!(was_reset(&error), fault == Fault::Reset, "{fault:?}: {error:?}");
            let answered = s3.faults().seen().last().unwrap().status.map(|s| s.as_u16());
            assert_eq!(answered, status, "{fault:?}");
            client.get(&key).await.unwrap();
        }
        put().await.unwrap();
    }
    assert_eq!(s3.faults().count(|seen| seen.fault.is_some()), 8);

    s3.faults().inject(Rule::always(Fault::Lie).on(Method::PUT));
    client.put(&Key::from("lost"), PutPayload::from_static(b"x")).await.unwrap();
    s3.faults().heal();
    assert!(matches!(client.get(&Key::from("lost")).await, Err(Error::NotFound { .. })));
}

/// Whether a TCP reset is at the bottom of the error.
fn was_reset(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| io.kind() == std::io::ErrorKind::ConnectionReset) {
            return true;
        }
        cause = error.source();
    }
    false
}

#[tokio::test]
async fn a_hanging_request_ends_when_healed() {
    let s3 = S3::new();
    let client = s3.client(SECRET_KEY);
    s3.faults().inject(Rule::always(Fault::Hang));
    let begin = Instant::now();
    let (key, after) = (Key::from("k"), Duration::from_millis(300));
    let (answer, ()) = tokio::join!(client.get(&key), async {
        tokio::time::sleep(after).await;
        s3.faults().heal();
    });
    assert!(answer.is_err() && begin.elapsed() >= after, "{answer:?} after {:?}", begin.elapsed());
}

#[tokio::test]
async fn the_s3_program_serves_a_bucket_that_it_creates() {
    let scratch = Scratch::new("s3-program");
    let (root, port) = (scratch.join("root"), ports::free());
    let mut command = Command::new(env!("CARGO_BIN_EXE_klio-test-s3"));
    command.args(["--port", &port.to_string(), "--bucket", "demo", "--secret-key", "s", "--root"]);
    command.arg(&root);
    let mut running = Running::spawn("klio-test-s3", command, &scratch.join("log"));
    let line = running.wait_log("serving", SOON).await;
    assert_eq!(line, format!("serving bucket demo at http://127.0.0.1:{port}"));
    assert!(root.join("demo").is_dir());
    assert!(running.terminate(SOON).await.success());
}

#[tokio::test]
async fn s3_over_tls_is_believed_only_with_its_authority() {
    let authority = Authority::new("test");
    let good = authority.server(&["127.0.0.1"], Validity::Now);
    let s3 = S3::with_tls(&good);
    assert!(s3.endpoint().starts_with("https://"));
    assert!(tls_get(&s3, &authority).await.is_ok());
    assert!(tls_get(&s3, &Authority::new("other")).await.is_err());
    s3.set_certificate(&authority.server(&["127.0.0.1"], Validity::Expired));
    assert!(tls_get(&s3, &authority).await.is_err());
    s3.set_certificate(&authority.server(&["elsewhere.example"], Validity::Now));
    assert!(tls_get(&s3, &authority).await.is_err());
}

/// A TLS handshake that trusts `authority` only.
async fn tls_get(s3: &S3, authority: &Authority) -> std::io::Result<()> {
    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.cert().as_bytes()).unwrap()).unwrap();
    let config =
        rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", s3.settings().port)).await?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    connector.connect(name, stream).await.map(drop)
}

#[tokio::test]
async fn nats_keeps_its_stream_over_a_kill() {
    let mut nats = Nats::new().await;
    {
        let stream = jobs(&nats).await;
        let context = context(&nats).await;
        context.publish("jobs.one", "hello".into()).await.unwrap().await.unwrap();
        assert_eq!(stream.get_info().await.unwrap().state.messages, 1);
    }
    nats.kill9();
    nats.start().await;
    assert_eq!(jobs(&nats).await.get_info().await.unwrap().state.messages, 1);
}

async fn context(nats: &Nats) -> async_nats::jetstream::Context {
    let options =
        async_nats::ConnectOptions::with_user_and_password(USER.to_owned(), PASSWORD.to_owned());
    async_nats::jetstream::new(options.connect(nats.url()).await.unwrap())
}

async fn jobs(nats: &Nats) -> async_nats::jetstream::stream::Stream {
    let config = async_nats::jetstream::stream::Config {
        name: "JOBS".to_owned(),
        subjects: vec!["jobs.>".to_owned()],
        ..Default::default()
    };
    context(nats).await.get_or_create_stream(config).await.unwrap()
}

#[tokio::test]
async fn ports_are_never_handed_out_twice() {
    let tasks = (0..8).map(|_| {
        tokio::task::spawn_blocking(|| (0..50).map(|_| ports::free()).collect::<Vec<u16>>())
    });
    let mut ports: Vec<u16> =
        join_all(tasks).await.into_iter().flat_map(|ports| ports.unwrap()).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 400);
}

#[test]
fn promtool_accepts_a_good_page_and_refuses_a_bad_one() {
    let good = "# HELP klio_wal_written_total WAL files written.\n\
                # TYPE klio_wal_written_total counter\nklio_wal_written_total 3\n";
    assert_eq!(promtool::check_metrics(good), Ok(()));
    assert!(promtool::check_metrics("klio_wal{ 3\n").is_err());
    assert!(promtool::check_metrics(&good.replace("written_total", "written")).is_err());
}

fn sleeper(scratch: &Scratch) -> Running {
    let mut command = Command::new("sh");
    // A child in a session of its own, as a daemon would be.
    command.args(["-c", "setsid sleep 1000 & echo child $!; wait"]);
    Running::spawn("sleeper", command, &scratch.join("log"))
}

fn exists(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

async fn child_of(running: &mut Running) -> u32 {
    let line = running.wait_log("child ", SOON).await;
    line.trim_start_matches("child ").parse().unwrap()
}

#[tokio::test]
async fn dropping_a_program_kills_its_children_also_after_kill9() {
    let scratch = Scratch::new("drop");
    for kill_first in [false, true] {
        let mut running = sleeper(&scratch);
        let (pid, child) = (running.pid(), child_of(&mut running).await);
        if kill_first {
            running.kill9();
            assert!(exists(child), "kill9 is for the program alone");
        }
        drop(running);
        eventually_now("parent and child to be gone", SOON, || !exists(pid) && !exists(child))
            .await;
        std::fs::remove_file(scratch.join("log")).unwrap();
    }
}

/// The name by which the test program knows the test below.
const GUARDED: &str = "house::harness::guarded_program_for_the_test_of_the_guard";

/// The guard must work when no destructor runs, so it is tried on a test program that is killed: this one, started again.
#[tokio::test]
async fn a_killed_test_program_leaves_nothing_behind() {
    let scratch = Scratch::new("guard");
    let marker = scratch.join("pid");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", GUARDED, "--nocapture"])
        .env("KLIO_TEST_GUARD", &marker)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut test = command.spawn().unwrap();
    let pid = eventually_now("the guarded program", SOON, || {
        std::fs::read_to_string(&marker).ok().and_then(|text| text.trim().parse::<u32>().ok())
    })
    .await;
    assert!(exists(pid));
    test.kill().unwrap();
    test.wait().unwrap();
    eventually_now("the guard to kill it", SOON, || !exists(pid)).await;
    let left = std::fs::read_to_string(scratch.join("pid.scratch")).unwrap();
    eventually_now("its scratch directory to go", SOON, || !std::path::Path::new(&left).exists())
        .await;
}

/// Does something only when started by the test above.
#[test]
fn guarded_program_for_the_test_of_the_guard() {
    let Some(marker) = std::env::var_os("KLIO_TEST_GUARD") else { return };
    let scratch = Scratch::new("guarded");
    let mut command = Command::new("sleep");
    command.arg("1000");
    let running = Running::spawn("sleep", command, &scratch.join("log"));
    // One of many: released groups must not disturb the list.
    guard::watch(999_999_999);
    guard::release(999_999_999);
    let marker = std::path::PathBuf::from(marker);
    let place = scratch.path().to_str().unwrap();
    std::fs::write(marker.with_extension("scratch"), place).unwrap();
    std::fs::write(marker, running.pid().to_string()).unwrap();
    std::thread::park_timeout(Duration::from_secs(60));
    drop(running);
}

#[tokio::test]
async fn a_stream_of_lines_is_followed_in_the_log() {
    let scratch = Scratch::new("log");
    let mut command = Command::new("sh");
    command.args(["-c", "echo one; echo two 2; sleep 1000"]);
    let mut running = Running::spawn("lines", command, &scratch.join("log"));
    assert_eq!(running.wait_log("two", SOON).await, "two 2");
    let lines = futures::stream::iter(running.log().lines().map(str::to_owned)).count().await;
    assert_eq!(lines, 2);
    assert!(running.peak_memory_bytes().unwrap() > 0);
    assert!(!running.terminate(SOON).await.success());
}
