//! OpenTelemetry for Klio, configured by the standard environment variables.
//!
//! - If nothing is configured there is no provider, no thread and no exporter, only log lines on stderr.
//! - Telemetry only observes: a bad value or a dead collector causes one warning, and the program goes on (P9). Only
//!   with `KLIO_OTEL_STRICT=true` is a wrong setting an error, at start.
//! - Shutdown takes no longer than the time given to [`Telemetry::shutdown`], whatever the collector does.
//! - Secrets never appear in a log line, an attribute or a message of this crate.

pub mod catalogue;
mod env;
mod finish;
mod host;
mod ids;
mod logs;
mod metrics;
mod otlp;
mod pem;
mod process;
mod prometheus;
pub mod propagate;
pub mod redact;
mod rejected;
mod resource;
pub mod rpc;
mod runtime;
mod scrub;
#[cfg(test)]
mod tests;
mod traces;
pub mod visible;
mod watch;

pub use env::Problem;
pub use ids::current_trace_id;
pub use prometheus::Prometheus;
pub use runtime::Polls;

use env::Settings;
use opentelemetry::{
    global,
    metrics::{Meter, MeterProvider, NoopMeterProvider},
};
use opentelemetry_sdk::{
    logs::SdkLoggerProvider, metrics::SdkMeterProvider, trace::SdkTracerProvider,
};
use std::{collections::BTreeMap, io::IsTerminal, sync::Arc, time::Duration};
use tracing::Dispatch;
use tracing_subscriber::fmt::MakeWriter;
use watch::{Health, Last};

/// Whether this build has no telemetry at all: feature `bare`, which only the cost benchmark uses. Spans and log lines
/// are compiled out then, and code that updates an instrument for every message checks this constant.
pub const BARE: bool = cfg!(feature = "bare");

/// The program's settings for telemetry.
#[derive(Debug, Clone)]
pub struct Options {
    /// The default service name: `klio-server` or `klio`.
    pub service: &'static str,
    /// The version of the program.
    pub version: &'static str,
    /// `--debug`: log lines have trace ids as exported ones would be, and Klio's own debug lines are shown.
    pub debug: bool,
    /// From the configuration file; wins over KLIO_LOG_FORMAT.
    pub log_format: Option<LogFormat>,
    /// From the configuration file, directives in the form of RUST_LOG; wins over that variable.
    pub log_filter: Option<String>,
    /// Values of variables from the configuration file, by name; they win over the environment.
    pub overrides: BTreeMap<String, String>,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// Why telemetry did not start; only with `KLIO_OTEL_STRICT=true`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All problems at once.
    #[error("telemetry is misconfigured: {}\nhint: correct these, or leave KLIO_OTEL_STRICT unset to go on without", listed(.0))]
    Misconfigured(Vec<Problem>),
}

fn listed(problems: &[Problem]) -> String {
    problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// Whether telemetry was delivered at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// There was nothing to deliver, or no collector.
    Nothing,
    /// The collector has everything.
    Delivered,
    /// Something was still queued, or was refused, when the time was up.
    Pending,
}

impl Delivery {
    /// The last line of a command whose spans are exported: its trace id, and whether the spans arrived.
    pub fn closing_line(self, trace: Option<String>) -> Option<String> {
        let state = match self {
            Self::Nothing => return None,
            Self::Delivered => "delivered",
            Self::Pending => "not all delivered in time",
        };
        trace.map(|trace| format!("trace {trace}: {state}"))
    }
}

/// Whether each signal was delivered at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deliveries {
    pub traces: Delivery,
    pub metrics: Delivery,
    pub logs: Delivery,
}

impl Deliveries {
    /// The worst of the three.
    pub fn overall(&self) -> Delivery {
        let all = [self.traces, self.metrics, self.logs];
        let worst = [Delivery::Pending, Delivery::Delivered].into_iter().find(|d| all.contains(d));
        worst.unwrap_or(Delivery::Nothing)
    }
}

fn delivery(health: Option<&Health>, end: finish::End) -> Delivery {
    let Some(health) = health else { return Delivery::Nothing };
    health.ended(end);
    match health.last() {
        Last::Failed => Delivery::Pending,
        Last::Delivered => Delivery::Delivered,
        Last::Never => Delivery::Nothing,
    }
}

/// The running telemetry. Dropping it loses what is queued, so [`Telemetry::shutdown`] must be called on every way
/// out.
#[derive(Debug)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
    meter: Meter,
    prometheus: Option<Prometheus>,
    polls: Polls,
    health: Watches,
    strict: bool,
}

/// The state of each signal's exporter; `None` without an OTLP exporter.
#[derive(Debug, Default)]
struct Watches {
    traces: Option<Arc<Health>>,
    metrics: Option<Arc<Health>>,
    logs: Option<Arc<Health>>,
}

/// Starts everything that the environment configures, and installs the process's tracing subscriber, which logs to
/// stderr. It must be called once, inside a tokio runtime that is driven until [`Telemetry::shutdown`] has returned.
/// (OTLP over gRPC uses the runtime; exports run on their own threads, so one runtime thread is enough.)
///
/// # Errors
///
/// Only with `KLIO_OTEL_STRICT=true`, if any setting is wrong.
pub fn start(options: Options) -> Result<Telemetry, Error> {
    let get = env::process(&options.overrides);
    let colour = std::io::stderr().is_terminal() && get("NO_COLOR").is_none_or(|v| v.is_empty());
    let printer = logs::Printer { writer: std::io::stderr, colour };
    let (telemetry, dispatch, problems) = build(&options, &get, printer)?;
    if tracing::dispatcher::set_global_default(dispatch).is_err() {
        tracing::warn!("a tracing subscriber is already installed; keeping it");
    }
    telemetry.install();
    problems.iter().for_each(warn);
    Ok(telemetry)
}

/// Builds everything that is not global to the process.
fn build<W>(
    options: &Options,
    get: env::Lookup<'_>,
    printer: logs::Printer<W>,
) -> Result<(Telemetry, Dispatch, Vec<Problem>), Error>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let (mut settings, mut problems) = env::parse(get);
    apply(options, &mut settings, &mut problems);
    for otlp in settings.otlp_mut() {
        otlp.take_if(|otlp| match pem::check(otlp) {
            Ok(()) => false,
            Err(problem) => {
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
                true
            }
        });
    }
    name_the_file(options, &mut settings, &mut problems);
    if settings.strict && !problems.is_empty() {
        return Err(Error::Misconfigured(problems));
    }
    if settings.any_otlp() {
        // Without a crypto provider every HTTP client panics. A provider that is already installed stays.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
    propagate::install(&settings.propagators);
    let resource = || resource::build(&settings.resource, options.service, options.version);
    let mut health = Watches::default();
    let traces =
        (settings.traces_exported() || settings.logs_exported() || options.debug).then(|| {
            let (provider, watch) = traces::build(&settings.traces, resource(), &mut problems);
            health.traces = watch;
            provider
        });
    let metrics =
        settings.metrics_on().then(|| metrics::build(&settings.metrics, resource(), &mut problems));
    let logs = settings.logs_exported().then(|| {
        let (provider, watch) = logs::build(&settings.logs, resource(), &mut problems);
        health.logs = watch;
        provider
    });
    if settings.strict && !problems.is_empty() {
        return Err(Error::Misconfigured(problems));
    }
    let logs = logs.flatten();
    let router = traces.as_ref().map(traces::Router::new);
    let dispatch = logs::subscriber(&settings, options.debug, printer, router, logs.as_ref());
    let (metrics, prometheus) = match metrics {
        Some(built) => {
            health.metrics = built.health;
            (Some(built.provider), built.prometheus)
        }
        None => (None, None),
    };
    let meter = match &metrics {
        Some(provider) => provider.meter("klio"),
        None => NoopMeterProvider::new().meter("klio"),
    };
    let polls = if metrics.is_some() { Polls::timing() } else { Polls::default() };
    if metrics.is_some() {
        host::observe(&meter);
        process::observe(&meter);
        runtime::observe(&meter, &polls);
    }
    let strict = settings.strict;
    let telemetry = Telemetry { traces, metrics, logs, meter, prometheus, polls, health, strict };
    Ok((telemetry, dispatch, problems))
}

/// Settings of the configuration file win over the environment.
fn apply(options: &Options, settings: &mut Settings, problems: &mut Vec<Problem>) {
    if let Some(format) = options.log_format {
        settings.format = format;
    }
    if let Some(filter) = &options.log_filter {
        match tracing_subscriber::EnvFilter::builder().parse(filter) {
            Ok(_) => settings.filter = Some(filter.clone()),
            Err(_) => problems.push(Problem {
                variable: "telemetry.log_level".into(),
                value: redact::redact(filter).into_owned(),
                expected: "directives such as info or klio_server=debug".into(),
            }),
        }
    }
}

/// Renames the variable in problems whose value came from the configuration file to the name it has there.
fn name_the_file(options: &Options, settings: &mut Settings, problems: &mut [Problem]) {
    const NAMES: [(&str, &str); 5] = [
        ("OTEL_SERVICE_NAME", "telemetry.service_name"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "telemetry.trace_endpoint"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "telemetry.logs_endpoint"),
        ("KLIO_LOG_FORMAT", "telemetry.log_format"),
        ("RUST_LOG", "telemetry.log_level"),
    ];
    let rename = |variable: &mut String| {
        let given = options.overrides.contains_key(variable.as_str());
        if let Some((_, name)) = NAMES.iter().find(|(n, _)| given && n == variable) {
            *variable = (*name).to_owned();
        }
    };
    problems.iter_mut().for_each(|p| rename(&mut p.variable));
    settings.otlp_mut().into_iter().flatten().for_each(|o| rename(&mut o.endpoint_variable));
}

fn warn(problem: &Problem) {
    tracing::warn!(
        variable = problem.variable,
        value = problem.value,
        expected = problem.expected,
        "telemetry setting ignored"
    );
}

impl Telemetry {
    /// Reports a setting that only the program could find wrong, such as a port in use: one warning.
    ///
    /// # Errors
    ///
    /// Only with `KLIO_OTEL_STRICT=true`.
    pub fn misconfigured(&self, problem: Problem) -> Result<(), Error> {
        if self.strict {
            return Err(Error::Misconfigured(vec![problem]));
        }
        warn(&problem);
        Ok(())
    }

    /// The meter for the instruments of the whole program; it does nothing when metrics are off.
    pub fn meter(&self) -> Meter {
        self.meter.clone()
    }

    /// The metrics page, if OTEL_METRICS_EXPORTER names prometheus.
    pub fn prometheus(&self) -> Option<&Prometheus> {
        self.prometheus.as_ref()
    }

    /// The timer for polls of long tasks; it does nothing when metrics are off.
    pub fn polls(&self) -> Polls {
        self.polls.clone()
    }

    /// Installs the providers globally, for libraries that use the global ones.
    fn install(&self) {
        if let Some(provider) = &self.traces {
            global::set_tracer_provider(provider.clone());
        }
        if let Some(provider) = &self.metrics {
            global::set_meter_provider(provider.clone());
        }
    }

    /// Flushes and stops everything, in at most `timeout`. What cannot be delivered by then is lost; threads that are
    /// still working are left behind and end with the process. Returns whether the spans were delivered.
    pub async fn shutdown(self, timeout: Duration) -> Delivery {
        self.close(timeout).await.traces
    }

    /// The same as [`Telemetry::shutdown`], but returns the result of each signal.
    pub async fn close(self, timeout: Duration) -> Deliveries {
        let Self { traces, metrics, logs, health, .. } = self;
        let ends = finish::all(traces, metrics, logs, timeout).await;
        Deliveries {
            traces: delivery(health.traces.as_deref(), ends.traces),
            metrics: delivery(health.metrics.as_deref(), ends.metrics),
            logs: delivery(health.logs.as_deref(), ends.logs),
        }
    }
}
