//! `klio help`: the help of a command, the list of settings, or the list of exit statuses.

use super::{args::Cli, exit, say, table};
use crate::config::keys::KEYS;
use clap::CommandFactory;

/// Prints a topic and returns the exit status.
pub(super) fn print(topic: Option<&str>) -> u8 {
    let mut command = Cli::command();
    let text = match topic {
        None => command.render_long_help().to_string(),
        Some("exit-codes") => exit::table(),
        Some("config") => settings(),
        Some(name) => match command.find_subcommand_mut(name) {
            Some(found) => {
                let found = found.clone().bin_name(format!("klio {name}"));
                found.clone().render_long_help().to_string()
            }
            None => {
                say(&format!(
                    "klio help: no command or topic {name:?}\nhint: klio help lists them"
                ));
                return exit::USAGE;
            }
        },
    };
    super::print(&text);
    exit::OK
}

fn settings() -> String {
    let rows: Vec<Vec<String>> = KEYS
        .iter()
        .map(|key| {
            let default = if key.default.is_empty() { "-" } else { key.default };
            vec![key.path.into(), key.variable(), default.into(), key.doc.into()]
        })
        .collect();
    table::render(&["SETTING", "VARIABLE", "DEFAULT", "MEANING"], &rows)
}
