//! The commands of README.md, taken out of the page as they stand.

use crate::env;
use std::fs;

/// Those of the section with this heading that begin with one of these programs, in order.
///
/// # Panics
/// When the page has no such section.
#[must_use]
pub fn commands(heading: &str, programs: &[&str]) -> Vec<String> {
    let text = fs::read_to_string(env::repository().join("README.md")).expect("README.md");
    let (_, text) =
        text.split_once(heading).unwrap_or_else(|| panic!("README.md has no {heading}"));
    let section = text.split("\n## ").next().unwrap_or(text);
    let lines = section.lines().filter_map(|line| line.strip_prefix("       "));
    let ours = lines.filter(|line| programs.iter().any(|program| line.starts_with(program)));
    ours.map(|line| line.split("  #").next().unwrap_or(line).trim().to_owned()).collect()
}
