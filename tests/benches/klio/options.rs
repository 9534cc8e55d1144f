//! What may be asked for on the command line, and how much of everything is run.

/// Printed after a wrong command line.
pub const USAGE: &str = "usage: cargo bench -p klio-tests -- [catch_up] [sync_commit] [wal_fetch] [memory] [backup] [restore] [files] [replay] [telemetry] [--quick] [--rounds N] [--tables N] [--peer]\n\
                         --peer: pg_receivewal only, what this machine does; KLIO_BENCH_QUICK=1 is --quick; KLIO_BIN_DIR names other release programs";

/// A part that can be run alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Draining a slot.
    CatchUp,
    /// Commit latency with a synchronous standby.
    SyncCommit,
    /// `restore_command`.
    WalFetch,
    /// Many idle streams.
    Memory,
    /// Base backups against pgBackRest.
    Backup,
    /// Restores of these.
    Restore,
    /// Memory of backup and restore with many files.
    Files,
    /// Replaying WAL through a restore_command.
    Replay,
    /// What telemetry costs.
    Telemetry,
}

const PARTS: [(&str, Part); 9] = [
    ("catch_up", Part::CatchUp),
    ("sync_commit", Part::SyncCommit),
    ("wal_fetch", Part::WalFetch),
    ("memory", Part::Memory),
    ("backup", Part::Backup),
    ("restore", Part::Restore),
    ("files", Part::Files),
    ("replay", Part::Replay),
    ("telemetry", Part::Telemetry),
];

/// The command line.
#[derive(Debug)]
pub struct Options {
    parts: Vec<Part>,
    quick: bool,
    rounds: Option<usize>,
    tables: Option<u32>,
    peer: bool,
}

impl Options {
    /// Reads it; every part without any named.
    pub fn read(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            parts: Vec::new(),
            quick: std::env::var_os("KLIO_BENCH_QUICK").is_some_and(|v| v == "1"),
            rounds: None,
            tables: None,
            peer: false,
        };
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                // cargo bench adds it.
                "--bench" => {}
                "--peer" => options.peer = true,
                "--quick" => options.quick = true,
                "--tables" => {
                    let value = args.next().and_then(|v| v.parse().ok()).filter(|n| *n >= 10);
                    options.tables =
                        Some(value.ok_or("option --tables: expected a number from 10")?);
                }
                "--rounds" => {
                    let value = args.next().and_then(|v| v.parse().ok()).filter(|n| *n > 0);
                    options.rounds =
                        Some(value.ok_or("option --rounds: expected a number from 1")?);
                }
                name => {
                    let part = PARTS.iter().find(|(n, _)| *n == name);
                    options.parts.push(part.ok_or(format!("unknown argument {name}"))?.1);
                }
            }
        }
        Ok(options)
    }

    /// Whether this part is to be run.
    pub fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// Whether this part was asked for by name.
    pub fn names(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// Whether Klio's programs are run too, and not only those it is compared with.
    pub fn with_klio(&self) -> bool {
        !self.peer
    }

    /// Interleaved rounds.
    pub fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 1 } else { 5 })
    }

    /// `pgbench -s` for the WAL to drain: 170 makes 2.2 GB.
    pub fn scale(&self) -> u32 {
        if self.quick { 10 } else { 170 }
    }

    /// `pgbench -s` of the cluster that is backed up: 120 and the text table make 3.2 GB.
    pub fn base_scale(&self) -> u32 {
        if self.quick { 4 } else { 120 }
    }

    /// Tables of the clusters with few and with many files.
    pub fn tables(&self) -> [u32; 2] {
        let most = self.tables.unwrap_or(if self.quick { 500 } else { 10_000 });
        [most / 10, most]
    }

    /// Seconds of one pgbench run.
    pub fn commit_seconds(&self) -> u32 {
        if self.quick { 2 } else { 8 }
    }

    /// Segments fetched one after the other.
    pub fn segments(&self) -> usize {
        if self.quick { 4 } else { 64 }
    }

    /// Connected idle streams.
    pub fn idle_streams(&self) -> usize {
        if self.quick { 10 } else { 200 }
    }
}
