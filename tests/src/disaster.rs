//! The commands of docs/disaster.md, taken out of the page as they stand: the restore without any program of Klio.
//!
//! Shell blocks behind a comment `<!-- run: WORDS -->` are run, in order. Those with `settings` get other values for what they export.

use crate::env;
use std::fs;

/// The shell commands of the page for these ways (`bucket` or `files`, and `start` to start PostgreSQL too), with settings replaced.
///
/// # Panics
/// When the page is not there, is not as expected, or lacks a setting.
#[must_use]
pub fn commands(ways: &[&str], settings: &[(&str, String)]) -> String {
    let page = fs::read_to_string(env::repository().join("docs/disaster.md")).expect("the page");
    let mut script = String::new();
    let mut missing: Vec<&str> = settings.iter().map(|(name, _)| *name).collect();
    for block in page.split("<!-- run: ").skip(1) {
        let (tags, rest) = block.split_once(" -->").expect("the end of a comment");
        let words: Vec<&str> = tags.split_whitespace().collect();
        let code = rest.trim_start().strip_prefix("```sh\n").expect("a block of shell commands");
        let code = code.split_once("```").expect("the end of the block").0;
        let optional = ["bucket", "files", "start"];
        if words.iter().any(|word| optional.contains(word) && !ways.contains(word)) {
            continue;
        }
        if words.contains(&"settings") {
            code.lines().for_each(|line| script += &setting(line, settings, &mut missing));
        } else {
            script += code;
        }
    }
    assert!(missing.is_empty(), "the page has no settings {missing:?}");
    script
}

/// `export NAME=value # comment`, with another value if there is one.
fn setting(line: &str, settings: &[(&str, String)], missing: &mut Vec<&str>) -> String {
    let name = line.strip_prefix("export ").and_then(|rest| rest.split('=').next());
    let Some((name, value)) = settings.iter().find(|(n, _)| Some(*n) == name) else {
        return format!("{line}\n");
    };
    missing.retain(|other| other != name);
    format!("export {name}=\"{value}\"\n")
}
