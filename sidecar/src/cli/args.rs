//! What may be typed.
//!
//! Flags are settings of the file under another name; which is decided in [`Global::flags`] alone.

use crate::{config::parse_duration, restore::Action};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{path::PathBuf, time::Duration};

/// Streams a PostgreSQL's WAL to klio-server, and shows and gives back what is there.
#[derive(Debug, Parser)]
#[command(name = "klio", version, disable_help_subcommand = true, arg_required_else_help = true)]
pub struct Cli {
    /// For every command.
    #[command(flatten)]
    pub global: Global,
    /// The verb.
    #[command(subcommand)]
    pub command: Command,
}

/// For every command.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Configuration file [default: $KLIO_CONFIG, ./klio.toml, ~/.config/klio/klio.toml, /etc/klio/klio.toml]
    #[arg(long, short, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the PostgreSQL cluster on the server
    #[arg(long, global = true, value_name = "NAME")]
    pub cluster: Option<String>,
    /// One of the cluster's histories by its number [default: the current one; klio generation list]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub generation: Option<u32>,
    /// Address of klio-server
    #[arg(long, global = true, value_name = "URL")]
    pub server: Option<String>,
    /// More detail in the log, with trace ids
    #[arg(long, global = true)]
    pub debug: bool,
    /// How log lines look
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Stream WAL from PostgreSQL to the server until stopped
    Stream(StreamArgs),
    /// Take a base backup of the PostgreSQL on this machine
    Backup(BackupArgs),
    /// Tell, item by item, whether PostgreSQL, the server and the clocks are fit
    Check(CheckArgs),
    /// Show how far each cluster is received and archived; ends with 3 when something is wrong
    Status(StatusArgs),
    /// List base backups and what can be recovered, or WAL
    List(ListArgs),
    /// Restore a base backup to a directory, for PostgreSQL to recover to a target
    Restore(Box<RestoreArgs>),
    /// Restore the newest backup to a scratch directory, recover it, check it, and clean up
    Drill(DrillArgs),
    /// Prove what is stored by reading it; repairs a tier from the other one
    Verify(VerifyArgs),
    /// Show or apply what the retention policy lets go
    #[command(subcommand)]
    Retention(RetentionCommand),
    /// Show the histories of the cluster, or decide which one its name stands for
    #[command(subcommand)]
    Generation(GenerationCommand),
    /// Timelines of which more than one is written: look at them, decide which is followed
    #[command(subcommand)]
    Timeline(TimelineCommand),
    /// Fetch a WAL file for PostgreSQL: restore_command = 'klio wal-fetch %f "%p"'
    WalFetch(WalFetchArgs),
    /// What wal-fetch starts to read WAL ahead
    #[command(hide = true)]
    WalAgent(WalAgentArgs),
    /// Look at or drop the replication slot
    #[command(subcommand)]
    Slot(SlotCommand),
    /// Print the generated parts of docs/ as Markdown
    #[command(hide = true)]
    Reference {
        /// Which table
        table: Table,
    },
    /// Explain a command, or: config, exit-codes
    Help {
        /// A command, `config` or `exit-codes`
        topic: Option<String>,
    },
}

/// A generated reference.
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
    /// libpq connection string
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Replication slot
    #[arg(long, value_name = "NAME")]
    pub slot: Option<String>,
    /// When PostgreSQL has removed WAL: record the gap and go on, or stop
    #[arg(long, value_name = "POLICY", value_parser = ["record", "stop"])]
    pub on_gap: Option<String>,
    /// Address:port for /livez, /readyz and /metrics
    #[arg(long, value_name = "ADDRESS")]
    pub admin: Option<String>,
}

/// `klio backup`
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// The backup's name [default: made of the server's clock]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// A word about it, for listings
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
    /// Keep it whatever the retention policy says
    #[arg(long)]
    pub keep: bool,
    /// How PostgreSQL writes the checkpoint it begins with: fast is at once
    #[arg(long, value_name = "HOW", value_parser = ["fast", "spread"])]
    pub checkpoint: Option<String>,
    /// Read every file, also those that have not changed since the newest backup
    #[arg(long)]
    pub full_read: bool,
    /// libpq connection string
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// The result as JSON
    #[arg(long)]
    pub json: bool,
    /// Nothing but errors
    #[arg(long, short)]
    pub quiet: bool,
}

/// `klio check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// libpq connection string
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Replication slot
    #[arg(long, value_name = "NAME")]
    pub slot: Option<String>,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `klio status`
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Every cluster the certificate allows, not only the configured one
    #[arg(long)]
    pub all: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// `klio list`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ListArgs {
    /// What; without: backups
    #[command(subcommand)]
    pub what: Option<ListCommand>,
    /// As for `klio list backups`.
    #[command(flatten)]
    pub backups: ListBackupsArgs,
}

/// What to list.
#[derive(Debug, Subcommand)]
pub enum ListCommand {
    /// Base backups, and what can be recovered, with every hole
    Backups(ListBackupsArgs),
    /// WAL by timeline and tier, and gaps
    Wal {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// `klio list backups`
#[derive(Debug, Args)]
pub struct ListBackupsArgs {
    /// As JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `klio restore`
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The data directory to be: empty or absent, or with --delta an older state of it
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    #[command(flatten)]
    pub target: TargetArgs,
    /// Which timeline to follow: a number, latest or current (that of the backup) [default: latest]
    #[arg(long, value_name = "TIMELINE")]
    pub target_timeline: Option<String>,
    /// End before the time, position or transaction, not behind it
    #[arg(long)]
    pub exclusive: bool,
    /// What PostgreSQL does at the target [default: pause; with --latest: promote]
    #[arg(long, value_name = "ACTION", value_parser = parse_action)]
    pub target_action: Option<Action>,
    /// Which backup [default: the newest that ended before the target]
    #[arg(long, value_name = "NAME")]
    pub backup: Option<String>,
    /// Put a tablespace elsewhere; OLD is its location or OID. Can be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub tablespace_map: Vec<String>,
    /// Use what is in the directory: rewrite what differs, remove what is not in the backup
    #[arg(long)]
    pub delta: bool,
    /// A copy to look at: no archiving, subscriptions, preloaded libraries, synchronous standbys or TCP, also once promoted
    #[arg(long)]
    pub harmless: bool,
    /// A standby: standby.signal, no end, always the newest timeline. Without a --target flag
    #[arg(long)]
    pub standby: bool,
    /// Which primary a standby streams from (primary_conninfo) [default: none, it follows what is archived]
    #[arg(long, value_name = "DSN")]
    pub primary_conninfo: Option<String>,
    /// The primary's physical replication slot for this standby (primary_slot_name)
    #[arg(long, value_name = "NAME")]
    pub primary_slot_name: Option<String>,
    /// Show the plan and touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Plan and result as JSON
    #[arg(long)]
    pub json: bool,
    /// Nothing but errors and notes
    #[arg(long, short)]
    pub quiet: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

fn parse_action(text: &str) -> Result<Action, String> {
    match text {
        "pause" => Ok(Action::Pause),
        "promote" => Ok(Action::Promote),
        "shutdown" => Ok(Action::Shutdown),
        _ => Err("expected pause, promote or shutdown".into()),
    }
}

/// Where recovery ends. Without any: the latest state.
#[derive(Debug, Clone, Default, Args)]
#[group(multiple = false)]
pub struct TargetArgs {
    /// The last WAL that is held (default)
    #[arg(long)]
    pub latest: bool,
    /// A time in PostgreSQL's clock, such as '2026-11-21 14:03:00+01'
    #[arg(long, value_name = "TIME")]
    pub target_time: Option<String>,
    /// A position in WAL
    #[arg(long, value_name = "LSN")]
    pub target_lsn: Option<String>,
    /// A restore point (pg_create_restore_point)
    #[arg(long, value_name = "NAME")]
    pub target_name: Option<String>,
    /// The end of a transaction; as xmin shows it, or as pg_current_xact_id() does, with the epoch
    #[arg(long, value_name = "XID")]
    pub target_xid: Option<u64>,
    /// As soon as the backup is consistent
    #[arg(long)]
    pub target_immediate: bool,
}

/// `klio drill`
#[derive(Debug, Args)]
pub struct DrillArgs {
    /// Which backup [default: the newest]
    #[arg(long, value_name = "NAME")]
    pub backup: Option<String>,
    /// SQL to run at the end; it must not fail
    #[arg(long, value_name = "SQL")]
    pub query: Option<String>,
    /// Database of the query
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    pub database: String,
    /// Below which directory to restore [default: drill.dir, else the system's temporary directory]
    #[arg(long = "in", value_name = "DIR")]
    pub in_dir: Option<PathBuf>,
    /// How long all of it may take; a drill that takes longer has failed
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    pub timeout: Duration,
    /// The result as JSON
    #[arg(long)]
    pub json: bool,
    /// Nothing but errors
    #[arg(long, short)]
    pub quiet: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `klio verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Only this backup [default: every one]
    #[arg(long, value_name = "NAME")]
    pub backup: Option<String>,
    /// Share of the packs that is read back: all, or a percentage; everything else always is
    #[arg(long, value_name = "PERCENT", default_value = "all")]
    pub read_data: String,
    /// Also read back that share of the WAL behind the backups
    #[arg(long)]
    pub wal: bool,
    /// The outcome as JSON
    #[arg(long)]
    pub json: bool,
}

/// `klio retention`
#[derive(Debug, Subcommand)]
pub enum RetentionCommand {
    /// What would go now, what stays, and why; changes nothing
    Plan {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Let go what the plan says
    Apply {
        /// The outcome as JSON
        #[arg(long)]
        json: bool,
    },
}

/// `klio timeline`
#[derive(Debug, Subcommand)]
pub enum TimelineCommand {
    /// Every timeline of the cluster: whether somebody streams it, what was found, who decided what
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Decide for a timeline: the other side of its conflict is retired (needs an operator's or administrator's bundle)
    Follow(DecideTimelineArgs),
    /// Decide against a timeline: its stream is ended, nothing more of it is received (needs an operator's or
    /// administrator's bundle)
    Retire(DecideTimelineArgs),
}

/// `klio timeline follow` and `retire`
#[derive(Debug, Args)]
pub struct DecideTimelineArgs {
    /// Its number, as klio timeline list shows it
    pub timeline: u32,
    /// Say what would change, change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// `klio wal-fetch`
#[derive(Debug, Args)]
pub struct WalFetchArgs {
    /// Segment, history file or partial segment (%f)
    pub name: String,
    /// Where to put it (%p)
    pub path: PathBuf,
    /// How long to try when the server does not answer
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    pub timeout: Duration,
    /// What is left of a standby's patience
    #[arg(long, hide = true, value_parser = parse_duration)]
    pub answer_within: Option<Duration>,
    /// Neither start nor ask a read-ahead agent
    #[arg(long)]
    pub no_agent: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// `klio wal-agent`
#[derive(Debug, Args)]
pub struct WalAgentArgs {
    /// Folder for WAL that waits
    #[arg(long, value_name = "FOLDER")]
    pub spool: PathBuf,
    /// Data directory that is being recovered
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// Of the settings of whoever started it
    #[arg(long, value_name = "HEX")]
    pub fingerprint: String,
    /// Serve, instead of starting a child that does and waiting for it
    #[arg(long)]
    pub serve: bool,
    #[command(flatten)]
    pub source: SourceArgs,
}

/// Where a restore reads from.
#[derive(Debug, Clone, Default, Args)]
pub struct SourceArgs {
    /// Read the bucket itself instead of the server: s3://bucket/prefix, gs://, az:// or file:///
    #[arg(long, value_name = "URL")]
    pub from: Option<String>,
    /// age identity file, where the bucket is encrypted
    #[arg(long, value_name = "FILE")]
    pub identity: Option<String>,
}

impl SourceArgs {
    /// As settings.
    pub fn flags(&self, into: &mut Flags) {
        into.extend(self.from.clone().map(|v| ("restore.from", v)));
        into.extend(self.identity.clone().map(|v| ("restore.identity", v)));
    }
}

/// `klio generation`
#[derive(Debug, Subcommand)]
pub enum GenerationCommand {
    /// Every history of the cluster, what is held of it, and who decided about it
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Let the cluster's name stand for another history; for administrators
    Follow(DecideArgs),
    /// Take no more WAL of a history, for good; for administrators
    Retire(DecideArgs),
}

/// A decision about a history.
#[derive(Debug, Args)]
pub struct DecideArgs {
    /// Its number
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub number: u32,
    /// Only say what would happen
    #[arg(long)]
    pub dry_run: bool,
    /// As JSON
    #[arg(long)]
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

/// Which slot.
#[derive(Debug, Args)]
pub struct SlotArgs {
    /// libpq connection string
    #[arg(long, value_name = "DSN")]
    pub dsn: Option<String>,
    /// Replication slot
    #[arg(long, value_name = "NAME")]
    pub slot: Option<String>,
}

/// A setting and its value from the command line.
pub type Flags = Vec<(&'static str, String)>;

impl Command {
    /// For the root span; from a closed set.
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
    /// The flags as settings, over file and environment.
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
