//! `klio check`: prints one line per item, with a hint for each problem. Ends with 3 if an item failed.

use super::{check_postgres, check_server, exit, print};
use crate::{config::Config, error::Error};
use serde_json::json;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Item {
    pub mark: Mark,
    pub name: &'static str,
    pub text: String,
    /// Empty if there is nothing to do.
    pub hint: String,
}

#[derive(Debug, Default)]
pub(super) struct Report(pub Vec<Item>);

impl Report {
    pub fn add(&mut self, mark: Mark, name: &'static str, text: impl Into<String>, hint: &str) {
        let hint = if mark == Mark::Ok { String::new() } else { hint.to_owned() };
        self.0.push(Item { mark, name, text: text.into(), hint });
    }

    pub fn fail(&mut self, name: &'static str, error: &Error) {
        self.add(Mark::Fail, name, error.message.clone(), &error.hint);
    }
}

pub(super) async fn run(config: &Config, as_json: bool) -> Result<u8, Error> {
    let mut report = Report::default();
    let identity = check_postgres::run(config, &mut report).await?;
    check_server::run(config, identity, &mut report).await?;
    print(&if as_json { to_json(&report) } else { to_text(&report) });
    let failed = report.0.iter().any(|item| item.mark == Mark::Fail);
    Ok(if failed { exit::PROBLEM } else { exit::OK })
}

fn to_text(report: &Report) -> String {
    let width = report.0.iter().map(|item| item.name.len()).max().unwrap_or(0);
    let mut out = String::new();
    for item in &report.0 {
        let mark = word(item.mark);
        out += &format!("{mark:<4}  {:<width$}  {}\n", item.name, item.text.replace('\n', " "));
        if !item.hint.is_empty() {
            out += &format!("{:6}{:width$}  hint: {}\n", "", "", item.hint);
        }
    }
    let count = |mark| report.0.iter().filter(|item| item.mark == mark).count();
    out += &format!(
        "\n{} ok, {} warnings, {} failed\n",
        count(Mark::Ok),
        count(Mark::Warn),
        count(Mark::Fail)
    );
    out
}

const fn word(mark: Mark) -> &'static str {
    match mark {
        Mark::Ok => "OK",
        Mark::Warn => "WARN",
        Mark::Fail => "FAIL",
    }
}

fn to_json(report: &Report) -> String {
    let items: Vec<_> = report
        .0
        .iter()
        .map(|i| json!({ "state": word(i.mark), "item": i.name, "text": i.text, "hint": i.hint }))
        .collect();
    format!("{:#}\n", json!({ "items": items }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_has_its_hint_below() {
        let mut report = Report::default();
        report.add(Mark::Ok, "wal_level", "replica", "never shown");
        report.add(Mark::Fail, "server", "nobody there", "start it");
        let text = to_text(&report);
        assert!(text.contains("OK    wal_level  replica\n"), "{text}");
        assert!(text.contains("hint: start it") && !text.contains("never shown"), "{text}");
        assert!(text.ends_with("1 ok, 0 warnings, 1 failed\n"), "{text}");
    }
}
