//! The rows of docs/metrics.md, and those for the instruments that both programs have.
//!
//! - Docs, dashboards and alerts follow these tables; tests compare them with real metrics pages.
//! - [`prometheus_name`] is the name on a metrics page: it follows the exporter's rules and the corrections of
//!   `prometheus.rs`.
//! - Attributes are closed sets, listed in [`ATTRIBUTES`]; never an LSN, a file, a path or an address.

use std::fmt::Write as _;

/// The kind of an instrument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows while the program runs.
    Counter,
    /// A sum that may grow and shrink; Prometheus calls it a gauge.
    UpDownCounter,
    /// A current value.
    Gauge,
    /// A distribution.
    Histogram,
}

impl Kind {
    /// The name in docs/metrics.md.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::UpDownCounter => "updowncounter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One instrument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The OpenTelemetry name.
    pub name: &'static str,
    pub kind: Kind,
    /// The unit as in UCUM; empty for a plain number.
    pub unit: &'static str,
    pub attributes: &'static [&'static str],
    pub meaning: &'static str,
}

/// A row with the attribute `cluster_name` alone.
pub const fn of_cluster(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    meaning: &'static str,
) -> Row {
    Row { name, kind, unit, attributes: &["cluster_name"], meaning }
}

/// A row without attributes.
pub const fn plain(
    name: &'static str,
    kind: Kind,
    unit: &'static str,
    meaning: &'static str,
) -> Row {
    Row { name, kind, unit, attributes: &[], meaning }
}

impl Row {
    /// The same row with other attributes.
    #[must_use]
    pub const fn with(mut self, attributes: &'static [&'static str]) -> Self {
        self.attributes = attributes;
        self
    }

    /// The name on a metrics page; for a histogram without `_bucket`, `_sum` and `_count`.
    pub fn prometheus_name(&self) -> String {
        prometheus_name(self.name, self.kind, self.unit)
    }
}

/// Dots to underscores, the unit once as suffix, `_total` once on counters. A gauge does not end in `_count`, which
/// belongs to histograms (`promtool check metrics`): `process.thread.count` is `process_threads`.
pub fn prometheus_name(name: &str, kind: Kind, unit: &str) -> String {
    let mut text = name.replace('.', "_");
    let suffix = match unit {
        "By" => "_bytes",
        "s" => "_seconds",
        "1" if kind == Kind::Gauge => "_ratio",
        _ => "",
    };
    if !text.ends_with(suffix) {
        text.push_str(suffix);
    }
    match kind {
        Kind::Counter => text.push_str("_total"),
        Kind::Gauge | Kind::UpDownCounter => {
            if let Some(noun) = text.strip_suffix("_count") {
                text = if noun.ends_with('s') { noun.to_owned() } else { format!("{noun}s") };
            }
        }
        Kind::Histogram => {}
    }
    text
}

/// The rows as a Markdown table.
pub fn markdown<'a>(rows: impl IntoIterator<Item = &'a Row>) -> String {
    let mut out = "| name | type | unit | Prometheus name | attributes | meaning |\n".to_owned();
    out.push_str("|---|---|---|---|---|---|\n");
    for row in rows {
        let Row { name, kind, unit, attributes, meaning } = row;
        let (kind, attributes) = (kind.name(), attributes.join(", "));
        let prometheus = row.prometheus_name();
        let _ =
            writeln!(out, "| {name} | {kind} | {unit} | {prometheus} | {attributes} | {meaning} |");
    }
    out
}

/// The attributes of calls, from OpenTelemetry's RPC conventions.
const CALL: &[&str] = &["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"];
const NETWORK: &[&str] = &["network.interface.name", "network.io.direction"];

/// gRPC calls: the first in klio-server, the second in klio.
pub const RPC: &[Row] = &[
    plain("rpc.server.call.duration", Kind::Histogram, "s", "duration of incoming calls")
        .with(CALL),
    plain("rpc.client.call.duration", Kind::Histogram, "s", "duration of outgoing calls")
        .with(CALL),
];

/// The instruments of the machine, the process and the async runtime, which both programs have.
pub const STANDARD: &[Row] = &[
    plain("system.cpu.time", Kind::Counter, "s", "CPU time of the machine").with(&["cpu.mode"]),
    plain(
        "system.cpu.utilization",
        Kind::Gauge,
        "1",
        "share of the machine's CPU time in use, 0 to 1",
    ),
    plain("system.cpu.logical.count", Kind::UpDownCounter, "{cpu}", "logical CPUs of the machine"),
    plain("system.memory.usage", Kind::UpDownCounter, "By", "memory of the machine by state")
        .with(&["system.memory.state"]),
    plain("system.memory.limit", Kind::UpDownCounter, "By", "memory the machine has"),
    plain(
        "system.memory.utilization",
        Kind::Gauge,
        "1",
        "share of the machine's memory in use, 0 to 1",
    ),
    plain("system.network.io", Kind::Counter, "By", "bytes received and sent by the machine")
        .with(NETWORK),
    plain(
        "system.network.packets",
        Kind::Counter,
        "{packet}",
        "packets received and sent by the machine",
    )
    .with(NETWORK),
    plain("system.network.errors", Kind::Counter, "{error}", "network errors of the machine")
        .with(NETWORK),
    plain("process.cpu.time", Kind::Counter, "s", "CPU time this process used").with(&["cpu.mode"]),
    plain("process.memory.usage", Kind::UpDownCounter, "By", "resident memory of this process"),
    plain("process.memory.virtual", Kind::UpDownCounter, "By", "virtual memory of this process"),
    plain("process.thread.count", Kind::UpDownCounter, "{thread}", "threads of this process"),
    plain(
        "process.unix.file_descriptor.count",
        Kind::UpDownCounter,
        "{file_descriptor}",
        "file descriptors this process has open",
    ),
    plain(
        "process.disk.io",
        Kind::Counter,
        "By",
        "bytes this process made the disks read and write",
    )
    .with(&["disk.io.direction"]),
    plain("process.uptime", Kind::Gauge, "s", "time since telemetry started"),
    plain("process.start_time", Kind::Gauge, "s", "Unix time when telemetry started"),
    plain("klio.runtime.workers", Kind::Gauge, "{thread}", "worker threads of the async runtime"),
    plain("klio.runtime.tasks", Kind::Gauge, "{task}", "tasks that are alive in the async runtime"),
    plain(
        "klio.runtime.queue_depth",
        Kind::Gauge,
        "{task}",
        "tasks waiting in the async runtime's global queue",
    ),
    plain(
        "klio.runtime.busy_time",
        Kind::Counter,
        "s",
        "time each worker of the async runtime spent on tasks",
    )
    .with(&["worker"]),
    plain(
        "klio.runtime.parks",
        Kind::Counter,
        "",
        "times each worker of the async runtime ran out of tasks and slept",
    )
    .with(&["worker"]),
    plain("klio.runtime.polls", Kind::Counter, "{poll}", "polls of Klio's own long tasks"),
    plain(
        "klio.runtime.poll_time",
        Kind::Counter,
        "s",
        "time spent in polls of Klio's own long tasks",
    ),
    plain(
        "klio.runtime.slow_polls",
        Kind::Counter,
        "{poll}",
        "polls of Klio's own long tasks that occupied a worker for more than 10 ms",
    ),
];

/// Each attribute of [`RPC`] and [`STANDARD`], and its values.
pub const ATTRIBUTES: &[(&str, &str)] = &[
    ("rpc.system.name", "grpc"),
    (
        "rpc.method",
        "the methods of klio.v1, of gRPC health checks and reflection; `_OTHER` for any other path",
    ),
    ("rpc.response.status_code", "the names of gRPC's 17 status codes, such as `OK`"),
    ("cpu.mode", "user, nice, system, idle, iowait, interrupt, softirq, steal"),
    ("system.memory.state", "used, free"),
    ("network.interface.name", "the machine's network interfaces"),
    ("network.io.direction", "receive, transmit"),
    ("disk.io.direction", "read, write"),
    ("worker", "numbers of the runtime's worker threads, from 0"),
];

/// Attributes as a Markdown table.
pub fn markdown_of_attributes<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let mut out = "| attribute | values |\n|---|---|\n".to_owned();
    for (name, values) in rows {
        let _ = writeln!(out, "| {name} | {values} |");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prometheus_name_has_each_suffix_once() {
        let table = [
            ("klio.wal.written_size", Kind::Counter, "By", "klio_wal_written_size_bytes_total"),
            ("klio.wal.written", Kind::Counter, "", "klio_wal_written_total"),
            (
                "klio.backup.latest_duration_seconds",
                Kind::Gauge,
                "s",
                "klio_backup_latest_duration_seconds",
            ),
            ("klio.queue.bytes", Kind::Gauge, "By", "klio_queue_bytes"),
            ("process.thread.count", Kind::UpDownCounter, "{thread}", "process_threads"),
            ("system.cpu.utilization", Kind::Gauge, "1", "system_cpu_utilization_ratio"),
            ("rpc.server.call.duration", Kind::Histogram, "s", "rpc_server_call_duration_seconds"),
        ];
        for (name, kind, unit, expected) in table {
            assert_eq!(prometheus_name(name, kind, unit), expected);
        }
    }

    #[test]
    fn every_attribute_has_its_values_written_out() {
        // Both programs list the values of `error.type` themselves.
        for row in RPC.iter().chain(STANDARD) {
            for attribute in row.attributes.iter().filter(|a| **a != "error.type") {
                assert!(ATTRIBUTES.iter().any(|(name, _)| name == attribute), "{attribute}");
            }
        }
    }
}
