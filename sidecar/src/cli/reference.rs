//! `klio reference`: prints the generated parts of docs/, so that these cannot differ from the code.
//!
//! `make docs` writes them, and a test compares them. The tables are those that the code itself uses.

use super::{args::Table, exit, print};
use crate::{backup, config::keys::KEYS, error::Failure, streamer};
use klio_telemetry::catalogue;

/// Prints a table as Markdown.
pub(super) fn run(table: Table) -> u8 {
    print(&text(table));
    exit::OK
}

fn text(table: Table) -> String {
    match table {
        Table::Metrics => catalogue::markdown(streamer::CATALOGUE.iter().chain(backup::CATALOGUE)),
        Table::MetricAttributes => {
            let causes: Vec<_> = Failure::all().map(Failure::name).collect();
            catalogue::markdown_of_attributes([
                ("cluster_name", "the PostgreSQL cluster".to_owned()),
                (
                    "error.type of klio.stream.reconnects and klio.backup.failures",
                    causes.join(", "),
                ),
            ])
        }
        Table::Configuration => {
            let rows = KEYS.iter().map(|key| {
                let (path, variable) = (key.path, key.variable());
                format!("| `{path}` | `{variable}` | {} | {} |\n", key.default, key.doc)
            });
            with_header("| setting | variable | default | meaning |\n|---|---|---|---|\n", rows)
        }
        Table::ExitCodes => {
            let rows =
                exit::rows().into_iter().map(|(status, text)| format!("| {status} | {text} |\n"));
            with_header("| exit status | meaning |\n|---|---|\n", rows)
        }
    }
}

fn with_header(header: &str, rows: impl Iterator<Item = String>) -> String {
    [header.to_owned()].into_iter().chain(rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_has_rows_of_its_header_s_width() {
        for table in [Table::Metrics, Table::Configuration, Table::ExitCodes] {
            let text = text(table);
            let bars = |line: &str| line.matches('|').count();
            let width = text.lines().next().map(bars);
            assert!(text.lines().count() > 8, "{text}");
            assert!(text.lines().all(|line| Some(bars(line)) == width), "{text}");
        }
    }
}
