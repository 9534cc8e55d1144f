//! The text of `/metrics`. Serving it is up to the programs.
//!
//! Names follow the OpenTelemetry-to-Prometheus rules, with each suffix once, and pass `promtool check metrics`. The
//! exporter repeats a unit that the name already ends with, leaves `_count` on gauges, and leaves HELP empty;
//! [`Prometheus::render`] corrects that.

use crate::env::Problem;
use opentelemetry_prometheus::PrometheusExporter;
use opentelemetry_sdk::error::OTelSdkError;
use prometheus::{Registry, TextEncoder, proto::MetricFamily, proto::MetricType};

/// The metrics page, and the address from OTEL_EXPORTER_PROMETHEUS_HOST and _PORT. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Prometheus {
    /// Host name or address to listen on; `localhost` by default.
    pub host: String,
    /// TCP port; 9464 by default.
    pub port: u16,
    registry: Registry,
}

impl Prometheus {
    /// The page and the reader that fills it.
    pub(crate) fn new(host: &str, port: u16) -> Result<(Self, PrometheusExporter), OTelSdkError> {
        let registry = Registry::new();
        // There is one meter only, so a scope label on every row would have no information.
        let reader = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()?;
        Ok((Self { host: host.into(), port, registry }, reader))
    }

    /// The problem to report when the address cannot be used.
    pub fn unusable(&self, error: &dyn std::fmt::Display) -> Problem {
        Problem {
            variable: "OTEL_EXPORTER_PROMETHEUS_PORT".into(),
            value: format!("{}:{}", self.host, self.port),
            expected: format!("an address and a port of this machine that are free ({error})"),
        }
    }

    /// The content type of the HTTP response.
    pub const CONTENT_TYPE: &'static str = prometheus::TEXT_FORMAT;

    /// Collects and renders the current values. Runs the callbacks of observable instruments on the calling thread.
    pub fn render(&self) -> String {
        let mut families = self.registry.gather();
        families.iter_mut().for_each(mend);
        families.sort_by(|a, b| a.name().cmp(b.name()));
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&families, &mut text) {
            tracing::warn!(%error, "cannot render some metrics");
        }
        text
    }
}

fn mend(family: &mut MetricFamily) {
    let name = mended_name(family.name(), family.get_field_type());
    if family.help().is_empty() {
        family.set_help(name.replace('_', " "));
    }
    family.set_name(name);
}

fn mended_name(name: &str, kind: MetricType) -> String {
    let (stem, total) = match name.strip_suffix("_total") {
        Some(stem) if kind == MetricType::COUNTER => (stem, "_total"),
        _ => (name, ""),
    };
    let mut stem = stem.strip_suffix("_total").unwrap_or(stem).to_owned();
    for unit in ["_seconds", "_bytes", "_ratio"] {
        let twice = [unit, unit].concat();
        while stem.ends_with(&twice) {
            stem.truncate(stem.len() - unit.len());
        }
    }
    // `_count` is reserved for histograms: process.thread.count becomes process_threads.
    if kind == MetricType::GAUGE
        && let Some(noun) = stem.strip_suffix("_count")
    {
        stem = if noun.ends_with('s') { noun.to_owned() } else { format!("{noun}s") };
    }
    format!("{stem}{total}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_suffix_appears_once() {
        let table = [
            (
                "klio_backup_latest_duration_seconds_seconds",
                MetricType::GAUGE,
                "klio_backup_latest_duration_seconds",
            ),
            (
                "klio_wal_written_size_bytes_total",
                MetricType::COUNTER,
                "klio_wal_written_size_bytes_total",
            ),
            ("a_bytes_bytes_total", MetricType::COUNTER, "a_bytes_total"),
            ("a_total_total", MetricType::COUNTER, "a_total"),
            ("process_thread_count", MetricType::GAUGE, "process_threads"),
            ("a_seconds", MetricType::HISTOGRAM, "a_seconds"),
            ("a_count", MetricType::HISTOGRAM, "a_count"),
        ];
        for (input, kind, expected) in table {
            assert_eq!(mended_name(input, kind), expected);
        }
    }
}
