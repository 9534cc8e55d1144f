//! Merges the layers of the configuration: default, file, environment, options.
//!
//! Pure: it gets the file's text, and the environment and the options as pairs. Every layer becomes part of one TOML
//! table, so that unknown names are refused by the same rule everywhere.

use super::keys::{KEYS, Kind};
use toml::{Table, Value};

/// Variables that begin with `KLIO_` but are not settings of the file.
const OTHER_VARIABLES: &[&str] = &["KLIO_CONFIG", "KLIO_LOG_FORMAT", "KLIO_OTEL_STRICT"];

/// Merges all layers into one table, or returns every problem that was found.
pub(super) fn merge(
    file: Option<&str>,
    environment: &[(String, String)],
    flags: &[(&str, String)],
) -> Result<Table, Vec<String>> {
    let mut problems = Vec::new();
    let mut table = file.map_or_else(Table::new, |text| {
        text.parse::<Table>().unwrap_or_else(|error| {
            problems.push(format!("not valid TOML: {}", error.to_string().trim_end()));
            Table::new()
        })
    });
    for (name, value) in environment {
        if !name.starts_with("KLIO_") || OTHER_VARIABLES.contains(&name.as_str()) {
            continue;
        }
        match KEYS.iter().find(|key| key.variable() == *name) {
            Some(key) => put(&mut table, key.path, key.kind, value, name, &mut problems),
            // Variables without a double underscore may belong to another program (KLIO_DEMO_...). A misspelt setting
            // of klio has one.
            None if name.contains("__") && !of_the_server(name) => {
                problems.push(format!("environment: {name} is not a setting of klio"));
            }
            None => {}
        }
    }
    for (path, value) in flags {
        let kind = KEYS.iter().find(|key| key.path == *path).map_or(Kind::Text, |key| key.kind);
        put(&mut table, path, kind, value, path, &mut problems);
    }
    if problems.is_empty() { Ok(table) } else { Err(problems) }
}

/// Whether a variable is a setting of klio-server: one shell may have the settings of both programs.
fn of_the_server(name: &str) -> bool {
    const SECTIONS: [&str; 12] = [
        "KLIO_TLS__",
        "KLIO_AUTH__",
        "KLIO_WAL__",
        "KLIO_BASE__",
        "KLIO_QUEUE__",
        "KLIO_TIER2__",
        "KLIO_CONSUMER__",
        "KLIO_DATA_",
        "KLIO_ENCRYPTION__",
        "KLIO_RETENTION__",
        "KLIO_MAINTENANCE__",
        "KLIO_VERIFY__",
    ];
    SECTIONS.iter().any(|section| name.starts_with(section))
}

fn put(
    table: &mut Table,
    path: &str,
    kind: Kind,
    text: &str,
    place: &str,
    problems: &mut Vec<String>,
) {
    let value = match (kind, text) {
        (Kind::Text, text) => Value::String(text.to_owned()),
        (Kind::Flag, "true") => Value::Boolean(true),
        (Kind::Flag, "false") => Value::Boolean(false),
        (Kind::Flag, other) => {
            problems.push(format!("{place}: expected true or false, found {other:?}"));
            return;
        }
    };
    let (section, name) = path.split_once('.').map_or((None, path), |(s, n)| (Some(s), n));
    let target = match section {
        None => table,
        Some(section) => {
            let entry = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
            match entry {
                Value::Table(inner) => inner,
                _ => {
                    problems.push(format!("{section}: expected a section, found a value"));
                    return;
                }
            }
        }
    };
    target.insert(name.to_owned(), value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect()
    }

    #[test]
    fn a_flag_wins_over_the_environment_and_that_over_the_file() {
        let file = "cluster = \"file\"\n[postgres]\nslot = \"file\"\ndsn = \"file\"\n";
        let environment = env(&[("KLIO_CLUSTER", "env"), ("KLIO_POSTGRES__SLOT", "env")]);
        let table = merge(Some(file), &environment, &[("cluster", "flag".into())]).unwrap();
        assert_eq!(table["cluster"].as_str(), Some("flag"));
        assert_eq!(table["postgres"]["slot"].as_str(), Some("env"));
        assert_eq!(table["postgres"]["dsn"].as_str(), Some("file"));
    }

    #[test]
    fn a_misspelt_variable_is_refused_and_a_stranger_s_is_not() {
        let problems = merge(None, &env(&[("KLIO_POSTGRES__SOLT", "x")]), &[]).unwrap_err();
        assert!(problems[0].contains("KLIO_POSTGRES__SOLT"), "{problems:?}");
        let strangers = [
            ("KLIO_CONFIG", "x"),
            ("KLIO_DEMO", "1"),
            ("KLIO_RETENTION__LAST", "3"),
            ("KLIO_BASE__PACK_SIZE", "4194304"),
        ];
        assert!(merge(None, &env(&strangers), &[]).is_ok());
    }

    #[test]
    fn a_number_as_text_stays_text() {
        let table = merge(None, &env(&[("KLIO_CLUSTER", "123")]), &[]).unwrap();
        assert_eq!(table["cluster"].as_str(), Some("123"));
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let environment = env(&[("KLIO_SERVER__UNSAFE_PLAINTEXT", "yes"), ("KLIO_A__B", "x")]);
        assert_eq!(merge(Some("= nonsense"), &environment, &[]).unwrap_err().len(), 3);
    }
}
