//! Tests of the whole crate against real collectors on loopback, without process-wide state: every test has its own
//! variables and its own dispatcher. Tests of process-wide state are in tests/process.rs.

mod collector;
mod export;
mod lines;
mod page;
mod propagation;

use super::*;
use std::sync::Mutex;

/// Records log lines.
#[derive(Clone, Default)]
pub(super) struct Lines(Arc<Mutex<Vec<u8>>>);

impl Lines {
    pub(super) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub(super) fn options(debug: bool) -> Options {
    Options {
        service: "klio-test",
        version: "1.2.3",
        debug,
        log_format: None,
        log_filter: None,
        overrides: BTreeMap::new(),
    }
}

/// Telemetry from only these variables, which must be valid, with its dispatcher and lines.
pub(super) fn built(debug: bool, variables: &[(&str, &str)]) -> (Telemetry, Dispatch, Lines) {
    let (telemetry, dispatch, problems, lines) = tried(debug, variables);
    assert_eq!(problems, [], "{variables:?}");
    (telemetry, dispatch, lines)
}

pub(super) fn tried(
    debug: bool,
    variables: &[(&str, &str)],
) -> (Telemetry, Dispatch, Vec<Problem>, Lines) {
    let lines = Lines::default();
    let writer = lines.clone();
    let get = |name: &str| {
        variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
    };
    let printer = logs::Printer { writer: move || writer.clone(), colour: false };
    let (telemetry, dispatch, problems) = build(&options(debug), &get, printer).unwrap();
    (telemetry, dispatch, problems, lines)
}
