//! Memory of a server with many connected idle streams, each a real `klio stream` with its own certificate and cluster.
//!
//! All of them follow one PostgreSQL, whose WAL is nearly empty: the server cannot tell. (One busy stream: `catch_up`.)

use crate::{
    meter,
    options::Options,
    stats::Series,
    table::{self, mib},
};
use klio_tests::{postgres::Postgres, process::Running, site::Site, wait::eventually};
use std::time::Duration;

/// Long enough for 200 programs on two cores.
const DEADLINE: Duration = Duration::from_secs(300);
/// What was needed for connecting only is given back by then; two status messages of each stream have passed.
const REST: Duration = Duration::from_secs(25);

/// Runs and prints it.
pub async fn run(options: &Options) {
    let count = options.idle_streams();
    let pg = postgres(count).await;
    let mut site = Site::new().await;
    site.start().await;
    let before = memory(&mut site, "VmRSS");
    let mut streams = Vec::with_capacity(count);
    for number in 0..count {
        streams.push(stream(&site, &pg, number).await);
    }
    let all = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' \
               AND flush_lsn >= pg_current_wal_flush_lsn()";
    eventually("all streams to be idle", DEADLINE, || async {
        let streaming: usize = pg.value(all).await.parse().expect("a number");
        (streaming == count).then_some(()).ok_or(streaming)
    })
    .await;
    eprintln!("memory: {count} streams are idle");
    tokio::time::sleep(if count < 100 { REST / 5 } else { REST }).await;
    let (now, peak) = (memory(&mut site, "VmRSS"), memory(&mut site, "VmHWM"));
    let queue =
        meter::child(site.server(), "nats-server").and_then(|pid| meter::memory(pid, "VmHWM"));
    let sidecars: Series =
        streams.iter().filter_map(|s| meter::memory(s.pid(), "VmHWM")).map(mib).collect();
    drop(streams);
    site.stop().await;
    let row = |what: &str, value: String| vec![what.to_owned(), value];
    table::print(
        &format!("Memory with {count} connected idle streams"),
        &["", "MiB"],
        &[
            row("server, before the first", format!("{:.1}", mib(before))),
            row("server, all connected and idle", format!("{:.1}", mib(now))),
            row("server, peak", format!("{:.1}", mib(peak))),
            row(
                "its nats-server, peak",
                queue.map_or("-".to_owned(), |q| format!("{:.1}", mib(q))),
            ),
            row("each sidecar, peak", sidecars.show(1)),
        ],
    );
}

fn memory(site: &mut Site, what: &str) -> u64 {
    meter::memory(site.server().pid(), what).expect("the server runs")
}

async fn postgres(streams: usize) -> Postgres {
    let slots = (streams + 10).to_string();
    let pg = Postgres::builder()
        .set("max_wal_senders", &slots)
        .set("max_replication_slots", &slots)
        .start()
        .await;
    pg.switch_wal().await;
    // New slots begin at the last checkpoint's redo point: there is next to nothing to catch up with.
    pg.execute("CHECKPOINT").await;
    pg
}

async fn stream(site: &Site, pg: &Postgres, number: usize) -> Running {
    let name = format!("klio@idle{number}");
    let config = site.dir().join("klio-server.toml");
    let outcome = site.klio_server(&["client", &name, "-c", &config.display().to_string()]).await;
    assert_eq!(outcome.code, Some(0), "issue a bundle: {}", outcome.stderr);
    let bundle = site.dir().join(format!("clients/{name}/klio.toml"));
    let mut command = site.klio_command_of(&bundle, Some(pg), &["stream"]);
    command.env("KLIO_POSTGRES__SLOT", format!("idle{number}"));
    Running::spawn("klio stream", command, &site.scratch(&format!("idle{number}.log")))
}
