//! HTTP on the admin port: alive, really ready, and metrics only when asked for.

use klio_tests::{
    env, http, install_crypto, ports,
    postgres::Postgres,
    process::{Running, descendants},
    programs,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::{fs, os::unix::fs::PermissionsExt};

#[tokio::test(flavor = "multi_thread")]
async fn probes_need_no_telemetry_and_metrics_are_there_only_when_asked_for() {
    install_crypto();
    let pg = Postgres::builder().segment_mib(1).start().await;
    let mut site = Site::new().await;
    site.start_as(&programs::klio_server()).await;
    for (path, expected) in [("/livez", 200), ("/healthz", 200), ("/metrics", 404)] {
        assert_eq!(site.probe(path).await.0, expected, "{path} of klio-server");
    }
    site.wait_ready(200).await;

    let admin = ports::free();
    let mut command = site.klio_command(Some(&pg), &["stream"]);
    command.env("KLIO_ADMIN__LISTEN", format!("127.0.0.1:{admin}"));
    let _stream = Running::spawn("klio stream", command, &site.scratch("admin-stream.log"));
    let answers = async |path: &str| http::get(admin, path).await.map(|(code, _)| code).ok();
    eventually("klio stream to be ready", PATIENCE, async || answers("/readyz").await == Some(200))
        .await;
    for (path, expected) in [("/livez", 200), ("/healthz", 200), ("/metrics", 404)] {
        assert_eq!(answers(path).await, Some(expected), "{path} of klio stream");
    }
    // Ready means that WAL flows.
    site.stop().await;
    eventually("klio stream to be alive and not ready", PATIENCE, async || {
        answers("/readyz").await == Some(503) && answers("/livez").await == Some(200)
    })
    .await;

    // The same server with the reader: the page is on the admin port, too.
    site.start().await;
    let (code, page) = site.probe("/metrics").await;
    assert!(code == 200 && page.contains("klio_queue_connected"), "{code}: {page:.300}");
    site.wait_ready(200).await;
    site.stop().await;
}

/// Full tier 1 is in full.rs.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_its_queue_is_alive_and_not_ready() {
    install_crypto();
    let mut site = Site::new().await;
    // A nats-server that can be kept from starting again.
    let (wrapper, allowed) = (site.scratch("nats"), site.scratch("allowed"));
    let nats = env::tool("nats-server");
    let script =
        format!("#!/bin/sh\n[ -e {} ] && exec {} \"$@\"\n", allowed.display(), nats.display());
    fs::write(&wrapper, script).expect("write the wrapper");
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).expect("make it a program");
    fs::write(&allowed, "").expect("allow");
    site.set("KLIO_QUEUE__EXECUTABLE", &wrapper.display().to_string());
    site.start().await;
    site.wait_ready(200).await;
    fs::remove_file(&allowed).expect("forbid");
    descendants(site.server().pid()).iter().for_each(|child| child.kill9());
    site.wait_ready(503).await;
    assert_eq!(site.probe("/livez").await.0, 200);
    let (_, text) = site.probe("/readyz").await;
    assert!(text.contains("queue"), "{text}");
    fs::write(&allowed, "").expect("allow");
    site.wait_ready(200).await;
    site.stop().await;
}
