//! What telemetry costs on the way of WAL: a slot's backlog through `klio stream` and `klio-server`, with more and more of it on.
//!
//! The base is a build that has none at all, not even log lines (feature `bare` of klio-telemetry). It runs twice a round: the
//! second run against the first shows what this machine alone does to a ratio. CPU time is that of both of Klio's programs: the
//! sidecar's from its start, the server's from when it is ready, until both have flushed and ended; the collector runs in this process and is not
//! counted. Nothing is asked of the programs while they are measured: what is sealed is seen on the disk.

use crate::{
    meter::{self, Meter},
    options::{Options, Part},
    stats::Series,
    table,
    workload::Workload,
};
use klio_tests::{
    env,
    http::{self, Metrics},
    otlp::Collector,
    ports,
    process::Running,
    programs,
    site::{PATIENCE, Site},
    wait::eventually,
};
use rustix::process::Signal;
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

/// Between two looks at a run; PostgreSQL answers them on the same two cores.
const SAMPLE: Duration = Duration::from_millis(20);
/// No run takes this long.
const DEADLINE: Duration = Duration::from_secs(300);
/// As often as a Prometheus that is in a hurry.
const SCRAPE: Duration = Duration::from_secs(1);

/// Where they come from.
const HINT: &str = "find klio and klio-server without telemetry in target/bare/release (KLIO_BARE_BIN_DIR); hint: cargo build \
                    --release -p klio-server -p klio-sidecar --features klio-telemetry/bare --target-dir target/bare";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Bare,
    Again,
    Off,
    Prometheus,
    Traces,
}

const WAYS: [Way; 5] = [Way::Bare, Way::Again, Way::Off, Way::Prometheus, Way::Traces];

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Bare => "built without",
            Self::Again => "built without, again",
            Self::Off => "nothing set",
            Self::Prometheus => "prometheus, scraped each second",
            Self::Traces => "otlp traces, all sampled",
        }
    }

    fn is_bare(self) -> bool {
        matches!(self, Self::Bare | Self::Again)
    }

    /// The contract: at most this much more.
    fn target(self) -> &'static str {
        match self {
            Self::Bare | Self::Again => "-",
            Self::Off => "1",
            Self::Prometheus => "2",
            Self::Traces => "5",
        }
    }
}

/// What a run took.
#[derive(Debug, Clone, Copy)]
struct Cost {
    seconds: f64,
    server: f64,
    sidecar: f64,
}

impl Cost {
    fn cpu(self) -> f64 {
        self.server + self.sidecar
    }
}

/// Runs and prints it.
pub async fn run(load: &Workload, options: &Options) {
    let Some(bare) = bare_programs() else {
        assert!(!options.names(Part::Telemetry), "{HINT}");
        return eprintln!("telemetry: left out: {HINT}");
    };
    let mut rounds: Vec<Vec<(Way, Cost)>> = Vec::new();
    for round in 0..options.rounds() {
        let mut order = WAYS;
        order.rotate_left(round % WAYS.len());
        // Every other time backwards, so that no way always follows the same one.
        if round / WAYS.len() % 2 == 1 {
            order.reverse();
        }
        let mut runs = Vec::new();
        for way in order {
            let cost = Drain::run(load, way, &bare).await;
            eprintln!("telemetry round {}: {}: {cost:.2?}", round + 1, way.name());
            runs.push((way, cost));
        }
        rounds.push(runs);
    }
    print(load, &rounds);
}

/// Release programs of the same sources without telemetry: `make bench` builds them.
fn bare_programs() -> Option<PathBuf> {
    let set = std::env::var_os("KLIO_BARE_BIN_DIR").filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = set.unwrap_or_else(|| env::repository().join("target/bare/release"));
    ["klio", "klio-server"].iter().all(|name| dir.join(name).is_file()).then_some(dir)
}

/// One run.
struct Drain<'a> {
    load: &'a Workload,
    way: Way,
    dir: PathBuf,
    /// Of the server's and the sidecar's metrics.
    pages: [u16; 2],
    collector: Option<Collector>,
    site: Site,
}

impl<'a> Drain<'a> {
    async fn run(load: &'a Workload, way: Way, bare: &Path) -> Cost {
        let usual =
            programs::klio_server().parent().expect("a program lies in a directory").to_owned();
        let dir = if way.is_bare() { bare.to_owned() } else { usual };
        let pages = [ports::free(), ports::free()];
        let collector = if way == Way::Traces { Some(Collector::new().await) } else { None };
        let site = Site::new().await;
        Self { load, way, dir, pages, collector, site }.measure().await
    }

    /// What a user would set for one of the programs.
    fn variables(&self, page: u16) -> Vec<(&'static str, String)> {
        match (self.way, &self.collector) {
            (Way::Prometheus, _) => vec![
                ("OTEL_METRICS_EXPORTER", "prometheus".into()),
                ("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1".into()),
                ("OTEL_EXPORTER_PROMETHEUS_PORT", page.to_string()),
            ],
            (_, Some(collector)) => vec![
                ("OTEL_TRACES_EXPORTER", "otlp".into()),
                ("OTEL_TRACES_SAMPLER", "always_on".into()),
                ("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint()),
            ],
            _ => Vec::new(),
        }
    }

    async fn measure(mut self) -> Cost {
        for (name, value) in self.variables(self.pages[0]) {
            self.site.set(name, &value);
        }
        self.site.start_as(&self.dir.join("klio-server")).await;
        let slot = self.load.slot().await;
        let mut scraper = JoinSet::new();
        if self.way == Way::Prometheus {
            scraper.spawn(scrape(self.pages));
        }
        let mut meter = Meter::default();
        meter.watch("server", self.site.server().pid());
        let begun = Instant::now();
        let mut sidecar = self.sidecar(&slot);
        meter.watch_new("sidecar", sidecar.pid());
        self.wait_durable(&slot, &mut sidecar, begun).await;
        let seconds = begun.elapsed().as_secs_f64();
        while self.sealed() < self.load.segments() {
            assert!(begun.elapsed() < DEADLINE, "not sealed:\n{}", self.site.log());
            tokio::time::sleep(SAMPLE).await;
        }
        self.check_pages().await;
        drop(scraper);
        end("klio stream", &mut sidecar, &mut meter).await;
        end("klio-server", self.site.server(), &mut meter).await;
        self.check(&sidecar);
        self.load.drop_slot(&slot).await;
        let cpu = meter.cpu();
        Cost { seconds, server: cpu["server"], sidecar: cpu["sidecar"] }
    }

    /// `klio stream` of the build that is measured.
    fn sidecar(&self, slot: &str) -> Running {
        let usual = self.site.klio_command(Some(&self.load.pg), &["stream"]);
        let mut command = programs::command(&self.dir.join("klio"));
        command.args(usual.get_args());
        command.envs(usual.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("KLIO_POSTGRES__SLOT", slot).envs(self.variables(self.pages[1]));
        Running::spawn("klio stream", command, &self.site.scratch("stream.log"))
    }

    /// Until PostgreSQL was told that all is flushed (P1).
    async fn wait_durable(&mut self, slot: &str, sidecar: &mut Running, begun: Instant) {
        let session = self.load.pg.session().await;
        let sql = format!(
            "SELECT restart_lsn >= '{}' FROM pg_replication_slots WHERE slot_name = '{slot}'",
            self.load.end
        );
        loop {
            let rows = session.rows(&sql).await.expect("ask for the slot");
            if rows.first().and_then(|r| r.first()).is_some_and(|v| v == "t") {
                return;
            }
            let runs = sidecar.is_running() && self.site.server().is_running();
            assert!(
                runs && begun.elapsed() < DEADLINE,
                "{}: {}\n{}",
                self.way.name(),
                sidecar.log(),
                self.site.log()
            );
            tokio::time::sleep(SAMPLE).await;
        }
    }

    /// Segments that are sealed on tier 1.
    fn sealed(&self) -> u64 {
        let files = fs::read_dir(self.site.wal_dir(1)).into_iter().flatten().flatten();
        let sealed = files.filter(|file| {
            let name = file.file_name().into_string().unwrap_or_default();
            name.split_once('.').is_some_and(|(stem, rest)| {
                stem.len() == 24 && (rest == "zst" || rest == "zst.age")
            })
        });
        sealed.count() as u64
    }

    /// The pages that were scraped tell of this run.
    async fn check_pages(&self) {
        if self.way != Way::Prometheus {
            return;
        }
        for (port, name) in
            self.pages.iter().zip(["klio_wal_flushed_lsn", "klio_stream_flushed_lsn"])
        {
            #[expect(clippy::cast_precision_loss, reason = "a position of some gigabytes")]
            let end = self.load.end.as_u64() as f64;
            // A page may be half a second old.
            eventually(name, PATIENCE, async || {
                let found = Metrics::scrape(*port).await.map_err(|_| 0.0)?.sum(name, &[]);
                if found >= end { Ok(()) } else { Err(found) }
            })
            .await;
        }
    }

    /// Each way was what its name says.
    fn check(&self, sidecar: &Running) {
        let said = [self.site.log(), sidecar.log()];
        // `tracing` itself complains that there is nothing to filter.
        assert!(
            said.iter().all(|log| log.contains("max_level_off") == self.way.is_bare()),
            "{}: found a program of the other build:\n{said:?}",
            self.way.name()
        );
        let Some(collector) = &self.collector else { return };
        let spans = collector.spans();
        for name in ["wal.send", "wal.receive", "wal.seal"] {
            let found = spans.iter().filter(|span| span.name == name).count() as u64;
            assert!(found >= self.load.segments(), "{name}: {found} spans were delivered");
        }
    }
}

/// SIGTERM; what it uses until its end, the last flush included, counts. Only then it is reaped.
async fn end(name: &str, running: &mut Running, meter: &mut Meter) {
    running.signal(Signal::TERM);
    let begun = Instant::now();
    while meter::read(running.pid()).is_some_and(|reading| !reading.ended) {
        assert!(begun.elapsed() < DEADLINE, "{name} does not end:\n{}", running.log());
        tokio::time::sleep(SAMPLE).await;
    }
    meter.sample();
    let status = running.wait_exit(DEADLINE).await;
    assert!(status.success(), "{name} ended with {status}:\n{}", running.log());
}

async fn scrape(pages: [u16; 2]) {
    let mut tick = tokio::time::interval(SCRAPE);
    loop {
        tick.tick().await;
        for port in pages {
            // The sidecar's is not there at once.
            let _ = http::get(port, "/metrics").await;
        }
    }
}

fn print(load: &Workload, rounds: &[Vec<(Way, Cost)>]) {
    let gigabytes = load.megabytes() / 1e3;
    let of = |way: Way, value: fn(Cost) -> f64| -> Vec<f64> {
        rounds.iter().flatten().filter(|(w, _)| *w == way).map(|(_, cost)| value(*cost)).collect()
    };
    // Per cent more than the first run of the same round without telemetry.
    let more = |way: Way, value: fn(Cost) -> f64| -> Series {
        let pairs = of(way, value).into_iter().zip(of(Way::Bare, value));
        pairs.map(|(own, base)| (own / base - 1.0) * 100.0).collect()
    };
    let per_gigabyte = |way: Way, value: fn(Cost) -> f64| -> String {
        of(way, value).into_iter().map(|v| v / gigabytes).collect::<Series>().show(2)
    };
    let cost: Vec<Vec<String>> = WAYS
        .iter()
        .map(|&way| {
            let speed: Series =
                of(way, |c| c.seconds).iter().map(|s| load.megabytes() / s).collect();
            vec![
                way.name().to_owned(),
                speed.show(0),
                per_gigabyte(way, |c| c.server),
                per_gigabyte(way, |c| c.sidecar),
            ]
        })
        .collect();
    let title = format!("Telemetry: {:.0} MB of WAL, {} rounds", load.megabytes(), rounds.len());
    let head = ["", "MB/s durable", "server CPU s/GB", "sidecar CPU s/GB"];
    table::print(&title, &head, &cost);
    let ratios: Vec<Vec<String>> = WAYS
        .iter()
        .filter(|way| **way != Way::Bare)
        .map(|&way| {
            let (time, cpu) = (more(way, |c| c.seconds), more(way, Cost::cpu));
            let target = way.target().to_owned();
            vec![
                way.name().to_owned(),
                target,
                time.show(1),
                time.show_mean(1),
                cpu.show(1),
                cpu.show_mean(1),
            ]
        })
        .collect();
    let head =
        ["against built without", "target, %", "time, % more", "mean", "CPU, % more", "mean"];
    table::print("Telemetry: what it adds", &head, &ratios);
}
