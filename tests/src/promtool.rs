//! Prometheus's own judgement of a metrics page.

use crate::env;
use std::{
    io::Write,
    process::{Command, Stdio},
};

/// Runs `promtool check metrics` on the text of a metrics page. `Ok` means: valid, and no lint finding.
///
/// # Errors
/// What promtool says against it.
///
/// # Panics
/// When promtool is not installed.
pub fn check_metrics(page: &str) -> Result<(), String> {
    let mut child = Command::new(env::tool("promtool"))
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start promtool");
    let mut input = child.stdin.take().expect("promtool's input is a pipe");
    let page = page.to_owned();
    // A thread, because promtool may fill its output while we still write.
    let writer = std::thread::spawn(move || input.write_all(page.as_bytes()));
    let output = child.wait_with_output().expect("wait for promtool");
    let _ = writer.join();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    if output.status.success() && said.is_empty() { Ok(()) } else { Err(said) }
}
