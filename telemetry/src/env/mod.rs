//! Parses environment variables to typed [`Settings`].
//!
//! Pure: reads the world only through the given lookup. It never fails: a bad value becomes a [`Problem`] and the
//! default is used. All problems are returned at once, and the caller decides whether they are fatal. An empty
//! variable counts as unset, as OpenTelemetry requires. Secrets never appear in a problem.
//!
//! Source: <https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>.

mod otlp;
mod reader;
#[cfg(test)]
mod tests;

pub(crate) use otlp::{Otlp, Protocol, Signal};
pub(crate) use reader::Lookup;
pub use reader::Problem;

use crate::{LogFormat, resource::Detector};
use opentelemetry_sdk::{metrics::Temporality, trace::Sampler};
use reader::Reader;
use std::time::Duration;

/// All settings of the variables, with defaults filled in.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub strict: bool,
    pub resource: ResourceSettings,
    pub traces: TraceSettings,
    pub metrics: MetricSettings,
    pub logs: LogSettings,
    pub propagators: Vec<Propagator>,
    pub format: LogFormat,
    /// Directives as in `RUST_LOG`; `None` means the default.
    pub filter: Option<String>,
    /// Level of the OpenTelemetry libraries' own diagnostics.
    pub sdk_level: &'static str,
}

/// The description of this process for a collector.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ResourceSettings {
    pub service_name: Option<String>,
    pub attributes: Vec<(String, String)>,
    pub detectors: Vec<Detector>,
    /// From CONTAINER_NAME, POD_NAME and NAMESPACE_NAME; `attributes` win over these.
    pub kubernetes: Vec<(&'static str, String)>,
}

#[derive(Debug, Clone)]
pub(crate) struct TraceSettings {
    pub otlp: Option<Otlp>,
    pub console: bool,
    pub sampler: Sampler,
    pub batch: Batch,
}

#[derive(Debug, Clone)]
pub(crate) struct MetricSettings {
    pub otlp: Option<Otlp>,
    pub console: bool,
    pub prometheus: Option<Listen>,
    pub interval: Duration,
    pub temporality: Temporality,
}

#[derive(Debug, Clone)]
pub(crate) struct LogSettings {
    pub otlp: Option<Otlp>,
    pub console: bool,
    pub batch: Batch,
}

/// The address at which the program serves `/metrics`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listen {
    pub host: String,
    pub port: u16,
}

/// The limits of a batch processor; `None` leaves the SDK's default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Batch {
    pub delay: Option<Duration>,
    pub queue: Option<usize>,
    pub size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagator {
    TraceContext,
    Baggage,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exporter {
    Otlp,
    Prometheus,
    Console,
}

impl Settings {
    pub(crate) fn traces_exported(&self) -> bool {
        self.traces.otlp.is_some() || self.traces.console
    }
    pub(crate) fn metrics_on(&self) -> bool {
        self.metrics.otlp.is_some() || self.metrics.console || self.metrics.prometheus.is_some()
    }
    pub(crate) fn logs_exported(&self) -> bool {
        self.logs.otlp.is_some() || self.logs.console
    }
    /// The destination of each signal, if it has one.
    pub(crate) fn otlp_mut(&mut self) -> [&mut Option<Otlp>; 3] {
        [&mut self.traces.otlp, &mut self.metrics.otlp, &mut self.logs.otlp]
    }
    pub(crate) fn any_otlp(&self) -> bool {
        self.traces.otlp.is_some() || self.metrics.otlp.is_some() || self.logs.otlp.is_some()
    }
}

/// Reads all variables. Returns the settings and all problems found, each once.
pub(crate) fn parse(get: Lookup<'_>) -> (Settings, Vec<Problem>) {
    let mut r = Reader::new(get);
    let strict = r.flag("KLIO_OTEL_STRICT");
    let format = log_format(&mut r);
    let filter = r.parsed("RUST_LOG", "directives such as info or klio_server=debug", |s| {
        tracing_subscriber::EnvFilter::builder().parse(s).ok().map(|_| s.to_owned())
    });
    let sdk_level = sdk_level(&mut r);
    let settings = if r.flag("OTEL_SDK_DISABLED") {
        Settings {
            strict,
            resource: ResourceSettings::default(),
            traces: TraceSettings {
                otlp: None,
                console: false,
                sampler: Sampler::AlwaysOn,
                batch: Batch::default(),
            },
            metrics: MetricSettings {
                otlp: None,
                console: false,
                prometheus: None,
                interval: Duration::from_secs(60),
                temporality: Temporality::Cumulative,
            },
            logs: LogSettings { otlp: None, console: false, batch: Batch::default() },
            propagators: Vec::new(),
            format,
            filter,
            sdk_level,
        }
    } else {
        Settings {
            strict,
            resource: resource(&mut r),
            traces: traces(&mut r),
            metrics: metrics(&mut r),
            logs: logs(&mut r),
            propagators: propagators(&mut r),
            format,
            filter,
            sdk_level,
        }
    };
    (settings, r.into_problems())
}

fn log_format(r: &mut Reader<'_>) -> LogFormat {
    r.choice("KLIO_LOG_FORMAT", &[("text", LogFormat::Text), ("json", LogFormat::Json)])
        .unwrap_or(LogFormat::Text)
}

/// The libraries' diagnostics are off by default, because we report an unreachable collector ourselves, once.
fn sdk_level(r: &mut Reader<'_>) -> &'static str {
    const LEVELS: [(&str, &str); 7] = [
        ("none", "off"),
        ("off", "off"),
        ("error", "error"),
        ("warn", "warn"),
        ("info", "info"),
        ("debug", "debug"),
        ("trace", "trace"),
    ];
    r.choice("OTEL_LOG_LEVEL", &LEVELS).unwrap_or("off")
}

fn resource(r: &mut Reader<'_>) -> ResourceSettings {
    const KUBERNETES: [(&str, &str); 3] = [
        ("CONTAINER_NAME", "k8s.container.name"),
        ("POD_NAME", "k8s.pod.name"),
        ("NAMESPACE_NAME", "k8s.namespace.name"),
    ];
    let mut detectors: Vec<Detector> = Vec::new();
    for name in r.list("OTEL_RESOURCE_DETECTORS") {
        match Detector::named(&name) {
            Some(found) => found.iter().for_each(|d| {
                if !detectors.contains(d) {
                    detectors.push(*d);
                }
            }),
            None => r.problem("OTEL_RESOURCE_DETECTORS", &name, Detector::expected()),
        }
    }
    ResourceSettings {
        service_name: r.text("OTEL_SERVICE_NAME"),
        attributes: attributes(r),
        detectors,
        kubernetes: KUBERNETES
            .iter()
            .filter_map(|(variable, key)| r.text(variable).map(|value| (*key, value)))
            .collect(),
    }
}

/// All or nothing: a partial description of a process would be taken for the complete one. The specification requires
/// this, too.
fn attributes(r: &mut Reader<'_>) -> Vec<(String, String)> {
    const VARIABLE: &str = "OTEL_RESOURCE_ATTRIBUTES";
    let all = r.list(VARIABLE).len();
    let pairs = r.pairs(VARIABLE, "comma-separated key=value pairs, percent-encoded");
    if pairs.len() == all { pairs } else { Vec::new() }
}

/// The exporters that `variable` names. If it is unset: OTLP if an endpoint for the signal is set (which can only mean
/// OTLP), otherwise none.
fn exporters(
    r: &mut Reader<'_>,
    variable: &str,
    known: &[(&str, Option<Exporter>)],
    endpoint: Option<Signal>,
) -> Vec<Exporter> {
    if r.text(variable).is_none() {
        let implied = endpoint.is_some_and(|signal| otlp::endpoint_given(r, signal));
        return if implied { vec![Exporter::Otlp] } else { Vec::new() };
    }
    let mut found = Vec::new();
    for name in r.list(variable) {
        match known.iter().find(|(n, _)| n.eq_ignore_ascii_case(&name)) {
            Some((_, Some(exporter))) if !found.contains(exporter) => found.push(*exporter),
            Some(_) => {}
            None => {
                let names: Vec<_> = known.iter().map(|(n, _)| *n).collect();
                r.problem(
                    variable,
                    &name,
                    format!("a comma-separated list of {}", names.join(", ")),
                );
            }
        }
    }
    found
}

const PUSH: [(&str, Option<Exporter>); 3] =
    [("otlp", Some(Exporter::Otlp)), ("console", Some(Exporter::Console)), ("none", None)];

fn traces(r: &mut Reader<'_>) -> TraceSettings {
    let on = exporters(r, "OTEL_TRACES_EXPORTER", &PUSH, Some(Signal::Traces));
    let mut otlp = otlp::parse(r, Signal::Traces);
    let (batch, timeout) = batch(r, "OTEL_BSP");
    otlp::bound(&mut otlp, timeout);
    TraceSettings {
        otlp: otlp.filter(|_| on.contains(&Exporter::Otlp)),
        console: on.contains(&Exporter::Console),
        sampler: sampler(r),
        batch,
    }
}

fn metrics(r: &mut Reader<'_>) -> MetricSettings {
    const KNOWN: [(&str, Option<Exporter>); 4] = [
        ("otlp", Some(Exporter::Otlp)),
        ("prometheus", Some(Exporter::Prometheus)),
        ("console", Some(Exporter::Console)),
        ("none", None),
    ];
    const TEMPORALITY: [(&str, Temporality); 3] = [
        ("cumulative", Temporality::Cumulative),
        ("delta", Temporality::Delta),
        ("lowmemory", Temporality::LowMemory),
    ];
    let on = exporters(r, "OTEL_METRICS_EXPORTER", &KNOWN, Some(Signal::Metrics));
    let mut otlp = otlp::parse(r, Signal::Metrics);
    // The SDK's thread reader ignores this variable, so it is used as the limit of a request, which has the same
    // effect.
    otlp::bound(&mut otlp, r.millis("OTEL_METRIC_EXPORT_TIMEOUT"));
    let listen = Listen {
        host: r.text("OTEL_EXPORTER_PROMETHEUS_HOST").unwrap_or_else(|| "localhost".into()),
        port: r
            .parsed("OTEL_EXPORTER_PROMETHEUS_PORT", "a port number from 0 to 65535", |s| {
                s.parse().ok()
            })
            .unwrap_or(9464),
    };
    MetricSettings {
        otlp: otlp.filter(|_| on.contains(&Exporter::Otlp)),
        console: on.contains(&Exporter::Console),
        prometheus: on.contains(&Exporter::Prometheus).then_some(listen),
        interval: r.millis("OTEL_METRIC_EXPORT_INTERVAL").unwrap_or(Duration::from_secs(60)),
        temporality: r
            .choice("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", &TEMPORALITY)
            .unwrap_or(Temporality::Cumulative),
    }
}

fn logs(r: &mut Reader<'_>) -> LogSettings {
    // Unlike for the other signals, an endpoint alone does not switch logs on: they are off by default.
    let on = exporters(r, "OTEL_LOGS_EXPORTER", &PUSH, None);
    let mut otlp = otlp::parse(r, Signal::Logs);
    let (batch, timeout) = batch(r, "OTEL_BLRP");
    otlp::bound(&mut otlp, timeout);
    LogSettings {
        otlp: otlp.filter(|_| on.contains(&Exporter::Otlp)),
        console: on.contains(&Exporter::Console),
        batch,
    }
}

/// The variables of a batch processor, and the time limit of one export.
fn batch(r: &mut Reader<'_>, prefix: &str) -> (Batch, Option<Duration>) {
    let batch = Batch {
        delay: r.millis(&format!("{prefix}_SCHEDULE_DELAY")),
        queue: r.positive(&format!("{prefix}_MAX_QUEUE_SIZE")),
        size: r.positive(&format!("{prefix}_MAX_EXPORT_BATCH_SIZE")),
    };
    // The specification's default queue size, for when only the batch size is set.
    let queue = batch.queue.unwrap_or(2048);
    if let Some(size) = batch.size.filter(|size| *size > queue) {
        r.problem(
            &format!("{prefix}_MAX_EXPORT_BATCH_SIZE"),
            &size.to_string(),
            format!("at most the queue size, {queue}"),
        );
    }
    (batch, r.millis(&format!("{prefix}_EXPORT_TIMEOUT")))
}

fn sampler(r: &mut Reader<'_>) -> Sampler {
    const NAMES: [&str; 6] = [
        "always_on",
        "always_off",
        "traceidratio",
        "parentbased_always_on",
        "parentbased_always_off",
        "parentbased_traceidratio",
    ];
    let name = r.parsed("OTEL_TRACES_SAMPLER", &NAMES.join(", "), |s| {
        NAMES.iter().find(|n| n.eq_ignore_ascii_case(s)).copied()
    });
    let name = name.unwrap_or("parentbased_always_on");
    let root = match name.trim_start_matches("parentbased_") {
        "always_off" => Sampler::AlwaysOff,
        "traceidratio" => {
            let ratio = r.parsed("OTEL_TRACES_SAMPLER_ARG", "a number from 0 to 1", |s| {
                s.parse::<f64>().ok().filter(|x| (0.0..=1.0).contains(x))
            });
            Sampler::TraceIdRatioBased(ratio.unwrap_or(1.0))
        }
        _ => Sampler::AlwaysOn,
    };
    if name.starts_with("parentbased_") { Sampler::ParentBased(Box::new(root)) } else { root }
}

fn propagators(r: &mut Reader<'_>) -> Vec<Propagator> {
    const VARIABLE: &str = "OTEL_PROPAGATORS";
    const DEFAULT: [Propagator; 2] = [Propagator::TraceContext, Propagator::Baggage];
    let (mut found, mut none) = (Vec::new(), false);
    for name in r.list(VARIABLE) {
        match name.to_ascii_lowercase().as_str() {
            "tracecontext" => found.push(Propagator::TraceContext),
            "baggage" => found.push(Propagator::Baggage),
            "none" => none = true,
            _ => {
                r.problem(VARIABLE, &name, "a comma-separated list of tracecontext, baggage, none")
            }
        }
    }
    // If no known name was given, the default applies, as if the variable were unset.
    if found.is_empty() && !none { DEFAULT.to_vec() } else { found }
}

/// The process's environment, below `overrides`. Bytes that are not UTF-8 become replacement characters, so that they
/// are reported and not skipped.
pub(crate) fn process(
    overrides: &std::collections::BTreeMap<String, String>,
) -> impl Fn(&str) -> Option<String> + '_ {
    |name| {
        let own = overrides.get(name).cloned();
        own.or_else(|| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }
}
