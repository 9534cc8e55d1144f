//! Base backups and their restore against pgBackRest: full, second after a small change, restore, delta restore.
//!
//! Both have streamed or archived the WAL from before the first backup on, both wait until the WAL of the backup is safe, both leave
//! the database consistent. Each round begins with empty repositories; who goes first changes from round to round.

use crate::{
    dataset,
    measured::{self, Measured},
    options::{Options, Part},
    peer::Peer,
    restore,
    stats::Series,
    table,
    workload::{megabytes, settle_disk},
};
use klio_tests::{postgres::Postgres, process::Running, site::Site, wait::eventually};
use std::{collections::BTreeMap, time::Duration};

/// What is measured, in the order of the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// First backup.
    Full,
    /// After a small change.
    Second,
    /// Into an empty directory.
    Restore,
    /// Onto a slightly changed directory that the page cache has.
    Delta,
    /// And onto one that it has not.
    DeltaCold,
}

impl Step {
    const ALL: [Self; 5] = [Self::Full, Self::Second, Self::Restore, Self::Delta, Self::DeltaCold];

    const fn name(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Second => "second",
            Self::Restore => "restore",
            Self::Delta => "delta",
            Self::DeltaCold => "delta, cold",
        }
    }
}

/// Who.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    /// Klio.
    Klio,
    /// pgBackRest.
    Peer,
}

/// All values, one a round.
#[derive(Debug, Default)]
pub struct Results {
    seconds: BTreeMap<(Step, Tool), Series>,
    cpu: BTreeMap<(Step, Tool), Series>,
    peak: BTreeMap<(Step, Tool), Series>,
    server_cpu: BTreeMap<Step, Series>,
    bytes: BTreeMap<(Step, Tool), Series>,
    ratio: BTreeMap<Step, Series>,
    bytes_ratio: BTreeMap<Step, Series>,
}

impl Results {
    fn add(&mut self, step: Step, tool: Tool, run: Measured) {
        let key = (step, tool);
        self.seconds.entry(key).or_default().push(run.seconds);
        self.cpu.entry(key).or_default().push(run.cpu_seconds);
        self.peak.entry(key).or_default().push(table::mib(run.peak_bytes));
        eprintln!("  {step:?} {tool:?}: {run:.2?}");
    }
}

/// Both tools with empty repositories, connected to the cluster.
pub struct Pair {
    /// Klio's server.
    pub site: Site,
    /// pgBackRest.
    pub peer: Peer,
    _stream: Running,
}

impl Pair {
    async fn new(pg: &Postgres) -> Self {
        let mut site = Site::new().await;
        site.start().await;
        drop_slot(pg).await;
        let stream = site.stream(pg);
        pg.wait_true("select count(*) = 1 from pg_stat_replication where state = 'streaming'")
            .await;
        let peer = Peer::new(pg, "").await;
        Self { site, peer, _stream: stream }
    }

    async fn backup(&mut self, pg: &Postgres, tool: Tool, step: Step, results: &mut Results) {
        settle_disk().await;
        let kind = if step == Step::Full { "full" } else { "incr" };
        let before = self.stored(tool);
        let run = match tool {
            Tool::Peer => self.peer.backup(kind).await,
            Tool::Klio => {
                let server = self.site.server().cpu_seconds().unwrap_or_default();
                let command = self.site.klio_command(Some(pg), &["backup", "--checkpoint", "fast"]);
                let log = self.site.scratch("backup.log");
                let run = measured::run("klio backup", command, &log).await;
                let used = self.site.server().cpu_seconds().unwrap_or_default() - server;
                results.server_cpu.entry(step).or_default().push(used);
                run
            }
        };
        results.add(step, tool, run);
        let added = megabytes(self.stored(tool) - before);
        results.bytes.entry((step, tool)).or_default().push(added);
    }

    fn stored(&self, tool: Tool) -> u64 {
        match tool {
            Tool::Klio => measured::stored_bytes(&self.site.tier1().join("main/base")),
            Tool::Peer => self.peer.stored_bytes(),
        }
    }
}

async fn drop_slot(pg: &Postgres) {
    eventually("the old slot to be free", Duration::from_secs(60), || async {
        let sql = "select pg_drop_replication_slot(slot_name) from pg_replication_slots";
        pg.session().await.rows(sql).await
    })
    .await;
}

/// Runs and prints it.
pub async fn run(options: &Options) {
    let pg = dataset::new(options).await;
    let size = megabytes(measured::stored_bytes(&pg.data_dir().join("base")));
    eprintln!("{size:.0} MB");
    let mut results = Results::default();
    for round in 0..options.rounds() {
        eprintln!("backup round {}", round + 1);
        let mut tools = [Tool::Klio, Tool::Peer];
        if round % 2 == 1 {
            tools.reverse();
        }
        let mut pair = Pair::new(&pg).await;
        for tool in tools {
            pair.backup(&pg, tool, Step::Full, &mut results).await;
        }
        dataset::change(&pg, options).await;
        for tool in tools {
            pair.backup(&pg, tool, Step::Second, &mut results).await;
        }
        if options.wants(Part::Restore) {
            for tool in tools {
                for (step, run) in restore::all(&pair, tool).await {
                    results.add(step, tool, run);
                }
            }
        }
        pg.set("archive_command", "/bin/true").await;
        ratios(&mut results);
    }
    print(&results, size, options);
}

/// The ratios of the round that has just ended.
fn ratios(results: &mut Results) {
    for step in Step::ALL {
        let last = |values: &BTreeMap<(Step, Tool), Series>, tool| {
            values.get(&(step, tool)).and_then(Series::last)
        };
        let of = |values| Some(last(values, Tool::Klio)? / last(values, Tool::Peer)?);
        if let Some(ratio) = of(&results.seconds) {
            results.ratio.entry(step).or_default().push(ratio);
        }
        if let Some(ratio) = of(&results.bytes) {
            results.bytes_ratio.entry(step).or_default().push(ratio);
        }
    }
}

fn print(results: &Results, size: f64, options: &Options) {
    let show = |series: Option<&Series>, digits| {
        series.map_or_else(|| "-".to_owned(), |series| series.show(digits))
    };
    let mut rows = Vec::new();
    for step in Step::ALL {
        for tool in [Tool::Peer, Tool::Klio] {
            let key = (step, tool);
            let klio = tool == Tool::Klio;
            rows.push(vec![
                step.name().to_owned(),
                if klio { "klio" } else { "pgbackrest" }.to_owned(),
                show(results.seconds.get(&key), 2),
                show(results.ratio.get(&step).filter(|_| klio), 2),
                show(results.bytes.get(&key), 0),
                show(results.bytes_ratio.get(&step).filter(|_| klio), 2),
                show(results.cpu.get(&key), 1),
                show(results.server_cpu.get(&step).filter(|_| klio), 1),
                show(results.peak.get(&key), 0),
            ]);
        }
    }
    let title = format!("Base backups: {size:.0} MB, {} rounds", options.rounds());
    table::print(
        &title,
        &["", "", "wall, s", "ratio", "MB stored", "ratio", "CPU, s", "server CPU, s", "peak MiB"],
        &rows,
    );
}
