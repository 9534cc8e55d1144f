//! `klio-server reference`: prints the generated parts of docs/, so that they cannot become outdated.
//!
//! `make docs` writes them, and a test compares them. The tables are those that the code uses.

use super::exit;
use crate::{
    config::SETTINGS,
    metrics::{self, CATALOGUE},
};
use klio_proto::Code;
use klio_telemetry::catalogue;
use std::fmt::Write as _;

/// The tables that can be printed.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Table {
    /// Instruments of klio-server.
    Metrics,
    /// Instruments that both programs have.
    StandardMetrics,
    /// Attributes of the instruments of klio-server, and of those that both programs have.
    MetricAttributes,
    /// Settings of klio-server.
    Configuration,
    /// Error codes of both programs.
    Errors,
    /// Exit statuses of klio-server.
    ExitCodes,
}

/// Arguments of `reference`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Table to print
    pub table: Table,
}

/// Prints a table as Markdown.
pub fn run(args: &Args) {
    print!("{}", text(args.table));
}

fn text(table: Table) -> String {
    let mut out = String::new();
    match table {
        Table::Metrics => {
            out.push_str(&catalogue::markdown(CATALOGUE.iter()));
        }
        Table::StandardMetrics => {
            out.push_str(&catalogue::markdown(catalogue::RPC.iter().chain(catalogue::STANDARD)));
        }
        Table::MetricAttributes => {
            let standard = catalogue::ATTRIBUTES.iter().map(|(name, text)| (*name, (*text).into()));
            let all = metrics::attributes().into_iter().chain(standard);
            out.push_str(&catalogue::markdown_of_attributes(all));
        }
        Table::Configuration => {
            out.push_str("| setting | variable | default | meaning |\n|---|---|---|---|\n");
            for (path, default, meaning) in SETTINGS {
                let variable = format!("KLIO_{}", path.replace('.', "__").to_uppercase());
                let _ = writeln!(out, "| `{path}` | `{variable}` | {default} | {meaning} |");
            }
        }
        Table::ExitCodes => {
            out.push_str("| exit status | meaning |\n|---|---|\n");
            for (status, meaning) in exit::STATUSES {
                let _ = writeln!(out, "| {status} | {meaning} |");
            }
        }
        Table::Errors => {
            out.push_str(
                "| code | exit status | tried again | meaning | hint |\n|---|---|---|---|---|\n",
            );
            for code in Code::ALL {
                let again = if code.retryable() { "yes" } else { "no" };
                let (name, exit) = (code.name(), code.exit());
                let (meaning, hint) = (code.meaning().trim(), code.hint());
                let _ = writeln!(out, "| {name} | {exit} | {again} | {meaning} | {hint} |");
            }
        }
    }
    out
}
