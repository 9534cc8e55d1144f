//! Synchronous commit: what a commit costs when Klio, or `pg_receivewal --synchronous`, has to confirm it.
//!
//! One PostgreSQL for all rounds; the receivers keep their slots, and each is caught up and the only synchronous standby
//! before the clock runs. Every page has had its full-page image, and no checkpoint comes, so that all runs write alike.

use crate::{
    meter::{self, Meter},
    options::Options,
    stats::Series,
    table,
    workload::settle_disk,
};
use klio_tests::{postgres::Postgres, process::Running, scratch::Scratch, site::Site};
use std::{collections::BTreeMap, fs, path::PathBuf};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Alone,
    Receivewal,
    Klio,
}

const WAYS: [Way; 3] = [Way::Alone, Way::Receivewal, Way::Klio];
const CLIENTS: [u32; 2] = [1, 16];

/// Processes of which the CPU time is counted.
const ROLES: [&str; 4] = ["walsender", "receiver", "server", "queue"];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Alone => "no standby",
            Self::Receivewal => "pg_receivewal --synchronous",
            Self::Klio => "klio",
        }
    }

    /// `application_name`, as it comes.
    fn standby(self) -> &'static str {
        match self {
            Self::Alone => "",
            Self::Receivewal => "pg_receivewal",
            Self::Klio => "klio",
        }
    }
}

/// One pgbench run.
#[derive(Debug, Clone)]
struct Run {
    tps: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// CPU time by role, in microseconds a transaction.
    cpu_us: BTreeMap<&'static str, f64>,
}

struct Stage {
    pg: Postgres,
    site: Option<Site>,
    scratch: Scratch,
    seconds: u32,
    runs: u32,
}

/// Runs and prints it.
pub async fn run(options: &Options) {
    let mut stage = Stage::new(options).await;
    let mut rounds: BTreeMap<(Way, u32), Vec<Run>> = BTreeMap::new();
    for round in 0..options.rounds() {
        let mut order = WAYS;
        order.rotate_left(round % WAYS.len());
        for way in order.into_iter().filter(|w| options.with_klio() || *w != Way::Klio) {
            let receiver = stage.begin(way).await;
            for clients in CLIENTS {
                let run = stage.pgbench(clients, receiver.as_ref()).await;
                eprintln!(
                    "sync_commit round {}: {}, {clients} clients: {run:.2?}",
                    round + 1,
                    way.name()
                );
                rounds.entry((way, clients)).or_default().push(run);
            }
            stage.end(receiver).await;
        }
    }
    print(&rounds, options);
}

impl Stage {
    async fn new(options: &Options) -> Self {
        let pg = Postgres::builder()
            .durable()
            .set("shared_buffers", "512MB")
            .set("max_wal_size", "64GB")
            .set("checkpoint_timeout", "1d")
            .set("autovacuum", "off")
            .start()
            .await;
        pg.pgbench(&["-i", "-q", "-s", "10"]).await;
        pg.execute("SELECT pg_create_physical_replication_slot('pg_receivewal')").await;
        pg.execute("CHECKPOINT").await;
        // The full-page images of all pages, now rather than in the first run.
        pg.execute("UPDATE pgbench_accounts SET abalance = abalance + 1").await;
        pg.execute("VACUUM pgbench_accounts").await;
        let scratch = Scratch::new("sync");
        let logs = scratch.join("logs");
        fs::create_dir_all(&logs).expect("make the directory of pgbench's logs");
        klio_tests::postgres::install::give(&logs);
        let site = if options.with_klio() {
            let mut site = Site::new().await;
            site.start().await;
            Some(site)
        } else {
            None
        };
        Self { pg, site, scratch, seconds: options.commit_seconds(), runs: 0 }
    }

    async fn begin(&self, way: Way) -> Option<Running> {
        let receiver = match way {
            Way::Alone => None,
            Way::Receivewal => {
                let args = ["--synchronous", "--slot", "pg_receivewal", "--no-loop"];
                Some(self.pg.start_receivewal(&self.scratch.join("wal"), &args))
            }
            Way::Klio => self.site.as_ref().map(|site| site.stream(&self.pg)),
        };
        if receiver.is_some() {
            self.pg.set("synchronous_standby_names", way.standby()).await;
            self.pg
                .wait_true(
                    "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync' \
                     AND state = 'streaming' AND flush_lsn >= pg_current_wal_flush_lsn()",
                )
                .await;
        }
        settle_disk().await;
        receiver
    }

    async fn end(&self, receiver: Option<Running>) {
        self.pg.set("synchronous_standby_names", "").await;
        // pg_receivewal ends orderly on SIGINT only.
        if let Some(mut receiver) = receiver {
            receiver.signal(rustix::process::Signal::INT);
            receiver.wait_exit(klio_tests::site::PATIENCE).await;
        }
        self.pg.wait_true("SELECT count(*) = 0 FROM pg_stat_replication").await;
    }

    /// The processes between a commit and its confirmation.
    async fn meter(&mut self, receiver: Option<&Running>) -> Meter {
        let mut meter = Meter::default();
        let Some(receiver) = receiver else { return meter };
        meter.watch("receiver", receiver.pid());
        let walsender = self.pg.value("SELECT pid FROM pg_stat_replication").await;
        meter.watch("walsender", walsender.parse().expect("a process id"));
        if let Some(site) = &mut self.site {
            meter.watch("server", site.server().pid());
            let queue = meter::child(site.server(), "nats-server");
            queue.into_iter().for_each(|pid| meter.watch("queue", pid));
        }
        meter
    }

    async fn pgbench(&mut self, clients: u32, receiver: Option<&Running>) -> Run {
        self.runs += 1;
        let mut meter = self.meter(receiver).await;
        let prefix = self.scratch.join("logs").join(format!("run{}", self.runs));
        let (clients, seconds) = (clients.to_string(), self.seconds.to_string());
        let prefix_text = prefix.display().to_string();
        let prefix_option = format!("--log-prefix={prefix_text}");
        let args =
            ["-n", "-N", "-M", "prepared", "-c", &clients, "-T", &seconds, "--log", &prefix_option];
        let report = self.pg.pgbench(&args).await.stdout;
        meter.sample();
        let latency = latencies(&prefix);
        let transactions = latency.len();
        let cpu_us = meter.cpu().into_iter().map(|(role, s)| (role, s * 1e6 / transactions));
        Run {
            tps: tps(&report),
            p50_ms: latency.median(),
            p99_ms: latency.quantile(0.99),
            cpu_us: cpu_us.collect(),
        }
    }
}

/// `tps = 1234.5 (without initial connection time)`.
fn tps(report: &str) -> f64 {
    let line = report.lines().find_map(|l| l.strip_prefix("tps = "));
    let number = line.and_then(|l| l.split(' ').next()?.parse().ok());
    number.unwrap_or_else(|| {
        panic!("read pgbench's report: expected a line tps = N, found:\n{report}")
    })
}

/// Milliseconds of each transaction: the third field, in microseconds, of each line of `PREFIX.PID`.
fn latencies(prefix: &std::path::Path) -> Series {
    let dir = prefix.parent().expect("a directory");
    let name = format!("{}.", prefix.file_name().and_then(|n| n.to_str()).expect("a name"));
    let files = fs::read_dir(dir).expect("read pgbench's logs").flatten();
    let logs: Vec<PathBuf> = files
        .filter(|f| f.file_name().to_str().is_some_and(|n| n.starts_with(&name)))
        .map(|f| f.path())
        .collect();
    let texts = logs.iter().map(|log| fs::read_to_string(log).expect("read pgbench's log"));
    let all: Vec<String> = texts.collect();
    let lines = all.iter().flat_map(|text| text.lines());
    let micros = lines.filter_map(|l| l.split(' ').nth(2)?.parse::<f64>().ok());
    micros.map(|us| us / 1e3).collect()
}

fn print(rounds: &BTreeMap<(Way, u32), Vec<Run>>, options: &Options) {
    let of = |way: Way, clients: u32, pick: fn(&Run) -> f64| -> Vec<f64> {
        rounds.get(&(way, clients)).into_iter().flatten().map(pick).collect()
    };
    let mut rows = Vec::new();
    for clients in CLIENTS {
        for way in WAYS {
            // Each round against pg_receivewal of the same round.
            let ratio = |pick: fn(&Run) -> f64| -> Series {
                let (own, other) = (of(way, clients, pick), of(Way::Receivewal, clients, pick));
                own.iter().zip(other).map(|(own, other)| own / other).collect()
            };
            let series =
                |pick: fn(&Run) -> f64| -> Series { of(way, clients, pick).into_iter().collect() };
            rows.push(vec![
                clients.to_string(),
                way.name().to_owned(),
                series(|r| r.tps).show(0),
                ratio(|r| r.tps).show(2),
                series(|r| r.p50_ms).show(2),
                series(|r| r.p99_ms).show(2),
                ratio(|r| r.p99_ms).show(2),
            ]);
        }
    }
    let title = format!(
        "Synchronous commit: {} rounds of {} s",
        options.rounds(),
        options.commit_seconds()
    );
    let head = ["clients", "standby", "TPS", "ratio", "p50, ms", "p99, ms", "p99 ratio"];
    table::print(&title, &head, &rows);
    print_cost(rounds);
}

fn print_cost(rounds: &BTreeMap<(Way, u32), Vec<Run>>) {
    let mut rows = Vec::new();
    for ((way, clients), runs) in rounds.iter().filter(|((way, _), _)| *way != Way::Alone) {
        // Klio's server runs on while the others are measured, and has nothing to do.
        let roles = if *way == Way::Klio { &ROLES[..] } else { &ROLES[..2] };
        let cpu = |role: &str| -> String {
            let series: Series = runs.iter().filter_map(|r| r.cpu_us.get(role).copied()).collect();
            series.show(0)
        };
        let mut row = vec![clients.to_string(), way.name().to_owned()];
        row.extend(roles.iter().map(|role| cpu(role)));
        row.resize(2 + ROLES.len(), "-".to_owned());
        rows.push(row);
    }
    let head = ["clients", "standby", "walsender", "receiver or sidecar", "server", "queue"];
    table::print("CPU time of a synchronous commit, in microseconds", &head, &rows);
}
