//! The command line.
//!
//! Options that are settings under another name are turned into settings in [`Cli::flags`] only.

use crate::{config::parse_duration, restore::Action};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{path::PathBuf, time::Duration};

/// Stream PostgreSQL WAL and base backups to klio-server; list, verify and restore what it holds
#[derive(Debug, Parser)]
#[command(name = "klio", version, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Headings of `--help`. Options without a heading belong to the command itself.
const TARGET: &str = "Target";
const STANDBY: &str = "Standby";
const SOURCE: &str = "Source";
const OUTPUT: &str = "Output";
const GLOBAL: &str = "Global options";

/// Options of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = GLOBAL)]
pub struct Global {
    /// Configuration file [default: $KLIO_CONFIG, ./klio.toml, ~/.config/klio/klio.toml, /etc/klio/klio.toml]
    #[arg(long, short, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name under which klio-server stores this PostgreSQL cluster
    #[arg(long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// Generation (history) of the cluster, by its number in `klio generation list` [default: the current one]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub generation: Option<u32>,
    /// URL of klio-server, such as https://backup.example:7423
    #[arg(long, global = true, value_name = "URL")]
    pub server: Option<String>,
    /// Log debug messages, with trace ids
    #[arg(long, global = true)]
    pub debug: bool,
    /// Format of log lines
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// Format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Plain text
    Text,
    /// One JSON object per line
    Json,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Stream WAL from PostgreSQL to the server until stopped
    Stream(StreamArgs),
    /// Take a base backup of the PostgreSQL on this machine
    Backup(BackupArgs),
    /// Check PostgreSQL, the server and the clocks, item by item
    Check(CheckArgs),
    /// Show how far WAL is received and archived; exits with 3 if there is a problem
    Status(StatusArgs),
    /// List base backups and the times that can be restored, or WAL
    List(ListArgs),
    /// Restore a base backup to a directory and set PostgreSQL up to recover it to a target
    Restore(Box<RestoreArgs>),
    /// Restore the newest backup to a scratch directory, recover and check it, and clean up
    Drill(DrillArgs),
    /// Verify what is stored and repair one tier from the other
    Verify(VerifyArgs),
    /// Show or delete what the retention policy no longer keeps
    #[command(subcommand)]
    Retention(RetentionCommand),
    /// List the histories of the cluster, or decide which one is current
    #[command(subcommand)]
    Generation(GenerationCommand),
    /// List the timelines of the cluster, or decide which one is followed when two are written
    #[command(subcommand)]
    Timeline(TimelineCommand),
    /// Fetch a WAL file for PostgreSQL: restore_command = 'klio wal-fetch %f "%p"'
    WalFetch(WalFetchArgs),
    /// Read-ahead agent, started by wal-fetch
    #[command(hide = true)]
    WalAgent(WalAgentArgs),
    /// Show or drop the replication slot
    #[command(subcommand)]
    Slot(SlotCommand),
    /// Print the generated parts of docs/ as Markdown
    #[command(hide = true)]
    Reference {
        /// Which table
        table: Table,
    },
    /// Explain a command, the configuration (config) or the exit statuses (exit-codes)
    Help {
        /// Command, `config` or `exit-codes`
        topic: Option<String>,
    },
}

/// A generated part of docs/.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Table {
    /// Instruments of klio.
    Metrics,
    /// Attributes of the instruments of klio.
    MetricAttributes,
    /// Settings of klio.
    Configuration,
    /// Exit statuses of klio.
    ExitCodes,
}

/// `klio stream`
#[derive(Debug, Args)]
pub struct StreamArgs {
    /// libpq connection string for PostgreSQL
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Name of the replication slot
    #[arg(long, value_name = "NAME")]
    pub slot: Option<String>,
    /// When PostgreSQL has removed WAL that is still needed: record the gap and go on, or stop
    #[arg(long, value_name = "POLICY", value_parser = ["record", "stop"])]
    pub on_gap: Option<String>,
    /// Address and port for /livez, /readyz and /metrics
    #[arg(long, value_name = "ADDRESS")]
    pub admin: Option<String>,
}

/// `klio backup`
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Backup name [default: from the server's clock]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Free text shown in listings
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
    /// Keep this backup regardless of the retention policy
    #[arg(long)]
    pub keep: bool,
    /// Checkpoint at the start: fast (at once) or spread over time
    #[arg(long, value_name = "HOW", value_parser = ["fast", "spread"])]
    pub checkpoint: Option<String>,
    /// Read every file, including those unchanged since the newest backup
    #[arg(long)]
    pub full_read: bool,
    /// libpq connection string for PostgreSQL
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
    /// Print errors only
    #[arg(long, short, help_heading = OUTPUT)]
    pub quiet: bool,
}

/// `klio check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// libpq connection string for PostgreSQL
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Name of the replication slot
    #[arg(long, value_name = "NAME")]
    pub slot: Option<String>,
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
}

/// `klio status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Show every cluster that the certificate allows, not only the configured one
    #[arg(long)]
    pub all: bool,
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
}

/// `klio list`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ListArgs {
    /// What to list [default: backups]
    #[command(subcommand)]
    pub what: Option<ListCommand>,
    #[command(flatten)]
    pub backups: ListBackupsArgs,
}

#[derive(Debug, Subcommand)]
pub enum ListCommand {
    /// Base backups, the times that can be restored, and every hole in WAL
    Backups(ListBackupsArgs),
    /// WAL by timeline and tier, and recorded gaps
    Wal {
        /// Print JSON
        #[arg(long, help_heading = OUTPUT)]
        json: bool,
    },
}

/// `klio list backups`
#[derive(Debug, Args)]
pub struct ListBackupsArgs {
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `klio restore`
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// Target data directory: must be empty or not exist; with --delta, an older copy
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Put a tablespace elsewhere; OLD is its location or OID (can be repeated)
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace_map: Vec<String>,
    /// Reuse what is in the directory: rewrite what differs and remove what is not in the backup
    #[arg(long)]
    pub delta: bool,
    /// Make a copy to look at only: no archiving, subscriptions, preloaded libraries, synchronous standbys or TCP, even
    /// after promotion
    #[arg(long)]
    pub harmless: bool,
    /// Show the plan and change nothing
    #[arg(long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub target: TargetArgs,
    /// Timeline to follow: a number, latest, or current (the backup's) [default: latest]
    #[arg(long, value_name = "TIMELINE", help_heading = TARGET)]
    pub target_timeline: Option<String>,
    /// Stop just before the time, position or transaction instead of just after it
    #[arg(long, help_heading = TARGET)]
    pub exclusive: bool,
    /// What PostgreSQL does at the target [default: pause; with --latest: promote]
    #[arg(long, value_name = "ACTION", value_parser = parse_action, help_heading = TARGET)]
    pub target_action: Option<Action>,
    /// Set up a standby: standby.signal, no target, always the newest timeline (not with another target option)
    #[arg(long, help_heading = STANDBY)]
    pub standby: bool,
    /// Primary that the standby streams from (primary_conninfo) [default: none, it follows the archive]
    #[arg(long, value_name = "DSN", help_heading = STANDBY)]
    pub primary_conninfo: Option<String>,
    /// Physical replication slot on the primary for this standby (primary_slot_name)
    #[arg(long, value_name = "NAME", help_heading = STANDBY)]
    pub primary_slot_name: Option<String>,
    /// Backup to restore [default: the newest one that ended before the target]
    #[arg(long, value_name = "NAME", help_heading = SOURCE)]
    pub backup: Option<String>,
    #[command(flatten)]
    pub source: SourceArgs,
    /// Print the plan and the result as JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
    /// Print errors and notes only
    #[arg(long, short, help_heading = OUTPUT)]
    pub quiet: bool,
}

fn parse_action(text: &str) -> Result<Action, String> {
    match text {
        "pause" => Ok(Action::Pause),
        "promote" => Ok(Action::Promote),
        "shutdown" => Ok(Action::Shutdown),
        _ => Err("expected pause, promote or shutdown".into()),
    }
}

/// Where recovery ends; without any of these, at the latest state.
#[derive(Debug, Clone, Default, Args)]
#[group(multiple = false)]
#[command(next_help_heading = TARGET)]
pub struct TargetArgs {
    /// Recover to the end of the stored WAL (the default)
    #[arg(long)]
    pub latest: bool,
    /// Recover to this time by the original PostgreSQL's clock, such as '2026-11-21 14:03:00+01'
    #[arg(long, value_name = "TIME")]
    pub target_time: Option<String>,
    /// Recover to a position in WAL
    #[arg(long, value_name = "LSN")]
    pub target_lsn: Option<String>,
    /// Recover to a restore point (pg_create_restore_point)
    #[arg(long, value_name = "NAME")]
    pub target_name: Option<String>,
    /// Recover to the end of a transaction; XID as shown by xmin or by pg_current_xact_id() (with its epoch)
    #[arg(long, value_name = "XID")]
    pub target_xid: Option<u64>,
    /// Recover only until the backup is consistent
    #[arg(long)]
    pub target_immediate: bool,
}

/// `klio drill`
#[derive(Debug, Args)]
pub struct DrillArgs {
    /// Backup to restore [default: the newest]
    #[arg(long, value_name = "NAME")]
    pub backup: Option<String>,
    /// SQL to run at the end; the drill fails if it does
    #[arg(long, value_name = "SQL")]
    pub query: Option<String>,
    /// Database for the query
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    pub database: String,
    /// Directory in which the scratch directory is created [default: drill.dir, or the system's temporary directory]
    #[arg(long = "in", value_name = "DIR")]
    pub in_dir: Option<PathBuf>,
    /// Time limit; a drill that takes longer has failed
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
    /// Print errors only
    #[arg(long, short, help_heading = OUTPUT)]
    pub quiet: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `klio verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Backup to verify [default: all]
    #[arg(long, value_name = "NAME")]
    pub backup: Option<String>,
    /// Packs to verify: all, or a percentage of them; indexes and snapshots are always verified
    #[arg(long, value_name = "PERCENT", default_value = "all")]
    pub read_data: String,
    /// Verify the same share of the WAL that follows the backups
    #[arg(long)]
    pub wal: bool,
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
}

/// `klio retention`
#[derive(Debug, Subcommand)]
pub enum RetentionCommand {
    /// Show what would be deleted, what stays, and why (changes nothing)
    Plan {
        /// Print JSON
        #[arg(long, help_heading = OUTPUT)]
        json: bool,
    },
    /// Delete what the plan lists
    Apply {
        /// Print JSON
        #[arg(long, help_heading = OUTPUT)]
        json: bool,
    },
}

/// `klio timeline`
#[derive(Debug, Subcommand)]
pub enum TimelineCommand {
    /// List every timeline, whether it is streaming, its conflicts and who decided them
    List {
        /// Print JSON
        #[arg(long, help_heading = OUTPUT)]
        json: bool,
    },
    /// Follow a timeline and retire the other side of its conflict (operators and administrators)
    Follow(DecideTimelineArgs),
    /// Retire a timeline: end its stream and receive no more of it (operators and administrators)
    Retire(DecideTimelineArgs),
}

/// `klio timeline follow` and `retire`
#[derive(Debug, Args)]
pub struct DecideTimelineArgs {
    /// Timeline number, as `klio timeline list` shows it
    pub timeline: u32,
    /// Show what would change and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `klio wal-fetch`
#[derive(Debug, Args)]
pub struct WalFetchArgs {
    /// Name of the segment, history file or partial segment (%f)
    pub name: String,
    /// Path to write it to (%p)
    pub path: PathBuf,
    /// How long to keep trying when the server does not answer
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Time that is left until a standby needs an answer
    #[arg(long, hide = true, value_parser = parse_duration)]
    pub answer_within: Option<Duration>,
    /// Do not use the read-ahead agent
    #[arg(long)]
    pub no_agent: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `klio wal-agent`
#[derive(Debug, Args)]
pub struct WalAgentArgs {
    /// Directory for WAL that was read ahead
    #[arg(long, value_name = "DIRECTORY")]
    pub spool: PathBuf,
    /// Data directory that is being recovered
    #[arg(long, value_name = "DIRECTORY")]
    pub data_dir: Option<PathBuf>,
    /// Fingerprint of the settings of the caller
    #[arg(long, value_name = "HEX")]
    pub fingerprint: String,
    /// Serve, instead of starting a child process that serves and waiting for it
    #[arg(long)]
    pub serve: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// Where a restore reads from.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = SOURCE)]
pub struct SourceArgs {
    /// Read from the bucket instead of the server: s3://bucket/prefix, gs://, az:// or file:///
    #[arg(long, value_name = "URL")]
    pub from: Option<String>,
    /// File with the age identity, if the bucket is encrypted
    #[arg(long, value_name = "FILE")]
    pub identity: Option<String>,
}

impl SourceArgs {
    /// Adds these options as settings.
    pub fn flags(&self, into: &mut Flags) {
        into.extend(self.from.clone().map(|v| ("restore.from", v)));
        into.extend(self.identity.clone().map(|v| ("restore.identity", v)));
    }
}

/// `klio generation`
#[derive(Debug, Subcommand)]
pub enum GenerationCommand {
    /// List every history, its WAL and backups, and who decided about it
    List {
        /// Print JSON
        #[arg(long, help_heading = OUTPUT)]
        json: bool,
    },
    /// Make another history the current one (operators and administrators)
    Follow(DecideArgs),
    /// Retire a history: receive no more WAL of it (operators and administrators)
    Retire(DecideArgs),
}

/// Arguments of `klio generation follow` and `retire`.
#[derive(Debug, Args)]
pub struct DecideArgs {
    /// Number of the history
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub number: u32,
    /// Show what would change and change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print JSON
    #[arg(long, help_heading = OUTPUT)]
    pub json: bool,
}

/// `klio slot`
#[derive(Debug, Subcommand)]
pub enum SlotCommand {
    /// Show the slot's state and how much WAL it keeps
    Show(SlotArgs),
    /// Drop the slot, so that PostgreSQL no longer keeps WAL for Klio
    Drop(SlotArgs),
}

/// Arguments of `klio slot show` and `drop`.
#[derive(Debug, Args)]
pub struct SlotArgs {
    /// libpq connection string for PostgreSQL
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Name of the replication slot
    #[arg(long, value_name = "NAME")]
    pub slot: Option<String>,
}

/// Settings and their values from the command line.
pub type Flags = Vec<(&'static str, String)>;

impl Command {
    /// The name for the root span, from a fixed set.
    pub const fn name(&self) -> &'static str {
        match self {
            Command::Stream(_) => "stream",
            Command::Backup(_) => "backup",
            Command::Check(_) => "check",
            Command::Status(_) => "status",
            Command::List(_) => "list",
            Command::Restore(_) => "restore",
            Command::Drill(_) => "drill",
            Command::Verify(_) => "verify",
            Command::Retention(_) => "retention",
            Command::Generation(_) => "generation",
            Command::Timeline(_) => "timeline",
            Command::WalFetch(_) => "wal-fetch",
            Command::WalAgent(_) => "wal-agent",
            Command::Slot(_) => "slot",
            Command::Reference { .. } => "reference",
            Command::Help { .. } => "help",
        }
    }

    fn flags(&self, into: &mut Flags) {
        let mut postgres = |dsn: &Option<String>, slot: &Option<String>| {
            into.extend(dsn.clone().map(|v| ("postgres.dsn", v)));
            into.extend(slot.clone().map(|v| ("postgres.slot", v)));
        };
        match self {
            Command::Stream(args) => {
                postgres(&args.dsn, &args.slot);
                into.extend(args.on_gap.clone().map(|v| ("stream.on_gap", v)));
                into.extend(args.admin.clone().map(|v| ("admin.listen", v)));
            }
            Command::Backup(args) => {
                postgres(&args.dsn, &None);
                into.extend(args.checkpoint.clone().map(|v| ("backup.checkpoint", v)));
            }
            Command::Check(args) => postgres(&args.dsn, &args.slot),
            Command::Slot(SlotCommand::Show(args) | SlotCommand::Drop(args)) => {
                postgres(&args.dsn, &args.slot);
            }
            Command::WalFetch(args) => args.source.flags(into),
            Command::Restore(args) => args.source.flags(into),
            Command::Drill(args) => args.source.flags(into),
            Command::List(ListArgs { what: Some(ListCommand::Backups(args)), .. })
            | Command::List(ListArgs { what: None, backups: args }) => args.source.flags(into),
            Command::WalAgent(args) => args.source.flags(into),
            _ => {}
        }
    }
}

impl Cli {
    /// The options as settings; they override the file and the environment.
    pub fn flags(&self) -> Flags {
        let mut flags = Flags::new();
        let global = &self.global;
        flags.extend(global.cluster.clone().map(|v| ("cluster", v)));
        flags.extend(global.generation.map(|n| ("generation", n.to_string())));
        flags.extend(global.server.clone().map(|v| ("server.address", v)));
        flags.extend(global.log_format.map(|format| {
            let text = if format == LogFormat::Json { "json" } else { "text" };
            ("telemetry.log_format", text.to_owned())
        }));
        self.command.flags(&mut flags);
        flags
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_become_settings() {
        let cli = Cli::try_parse_from(["klio", "stream", "--slot", "s", "--cluster", "c"]).unwrap();
        assert_eq!(cli.flags(), vec![("cluster", "c".into()), ("postgres.slot", "s".into())]);
    }
}
