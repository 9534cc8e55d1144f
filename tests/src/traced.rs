//! A whole Klio whose spans go to one collector, and questions about the traces that arrive.

use crate::{
    otlp::{Collector, Span},
    postgres::Postgres,
    process::Running,
    programs::{self, Outcome},
    s3::S3,
    site::{PATIENCE, Site},
    wait::eventually_now,
};
use std::process::Command;

/// Variables of both programs.
#[must_use]
pub fn variables(endpoint: &str) -> [(&'static str, String); 4] {
    [
        ("OTEL_TRACES_EXPORTER", "otlp".into()),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.into()),
        // Batches leave soon, so that a test need not wait for the default of five seconds.
        ("OTEL_BSP_SCHEDULE_DELAY", "100".into()),
        ("RUST_LOG", "info,klio=debug".into()),
    ]
}

/// Server, bucket and collector.
pub struct Traced {
    /// What arrives.
    pub collector: Collector,
    /// The bucket.
    pub s3: S3,
    /// The server.
    pub site: Site,
}

impl Traced {
    /// A server that runs and exports, with a bucket.
    pub async fn new(log_format: &str) -> Self {
        crate::install_crypto();
        let (collector, s3) = (Collector::new().await, S3::new());
        let mut site = Site::new().await.tier2(&s3);
        for (name, value) in variables(&collector.endpoint()) {
            site.set(name, &value);
        }
        site.set("KLIO_LOG_FORMAT", log_format);
        site.start().await;
        Self { collector, s3, site }
    }

    /// Adds the variables of telemetry to a command.
    pub fn trace(&self, command: &mut Command) {
        command.envs(variables(&self.collector.endpoint()));
    }

    /// Runs a `klio` command that exports, to its end.
    pub async fn klio(&self, pg: Option<&Postgres>, args: &[&str]) -> Outcome {
        let mut command = self.site.klio_command(pg, args);
        self.trace(&mut command);
        programs::run(command).await
    }

    /// Starts `klio stream`, which exports, with further variables.
    #[must_use]
    pub fn stream(&self, pg: &Postgres, log: &str, more: &[(&str, &str)]) -> Running {
        let mut command = self.site.klio_command(Some(pg), &["stream"]);
        self.trace(&mut command);
        command.envs(more.iter().copied());
        Running::spawn("klio stream", command, &self.site.scratch(log))
    }

    /// Waits until a span arrives that fits.
    ///
    /// # Panics
    /// When none does in time; shows the names of all that came.
    pub async fn span(&self, what: &str, fits: impl Fn(&Span) -> bool) -> Span {
        eventually_now(&format!("a span: {what}"), PATIENCE, || {
            let spans = self.collector.spans();
            spans.iter().find(|s| fits(s)).cloned().ok_or_else(|| names(&spans))
        })
        .await
    }

    /// Waits until a span arrives that fits and whose ancestors, as far as they are in `names`, are these: each a name
    /// and a service, from the nearest to the root. Gives the span and those ancestors.
    ///
    /// # Panics
    /// When none does in time.
    pub async fn chain(&self, names: &[(&str, &str)], fits: impl Fn(&Span) -> bool) -> Vec<Span> {
        eventually_now(&format!("a chain {names:?}"), PATIENCE, || {
            let spans = self.collector.spans();
            let ends = spans.iter().filter(|s| fits(s));
            let chains: Vec<Vec<Span>> = ends.map(|end| above(&spans, end, names)).collect();
            let whole = chains.iter().find(|c| {
                let found = c.iter().map(|s| (s.name.as_str(), s.service.as_str()));
                found.eq(names.iter().copied())
            });
            whole.cloned().ok_or_else(|| {
                let seen: Vec<_> = chains.iter().map(|c| self::names(c)).collect();
                (self::names(&spans), seen)
            })
        })
        .await
    }
}

/// A span and its ancestors, those that `names` lists.
fn above(spans: &[Span], end: &Span, names: &[(&str, &str)]) -> Vec<Span> {
    let parent = |of: &Span| spans.iter().find(|s| s.trace == of.trace && s.id == of.parent);
    let all = std::iter::successors(Some(end), |span| parent(span));
    let listed = |s: &&Span| names.contains(&(s.name.as_str(), s.service.as_str()));
    all.filter(listed).cloned().collect()
}

/// Names and programs, for a message.
#[must_use]
pub fn names(spans: &[Span]) -> Vec<String> {
    let mut names: Vec<String> =
        spans.iter().map(|s| format!("{}/{} {}", s.service, s.name, &s.trace[..6])).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Whether this is a request that wrote an object below a directory.
#[must_use]
pub fn is_put(span: &Span, directory: &str) -> bool {
    let is =
        |key: &str, fits: &dyn Fn(&str) -> bool| span.attributes.get(key).is_some_and(|v| fits(v));
    span.name == "tier2.request"
        && is("http.request.method", &|method| method == "PUT")
        && is("key_prefix", &|prefix| prefix.contains(directory))
}

/// Every word that `error.type` may hold, of both programs.
#[must_use]
pub fn error_types() -> Vec<&'static str> {
    let codes = klio_proto::Code::ALL.iter().map(|code| code.name());
    let kinds = klio_storage::Kind::ALL.iter().map(|kind| kind.name());
    let others = [
        // Of the sidecar, beside codes.
        "LINK",
        "CERTIFICATE",
        "POSTGRES",
        "POSTGRES_REFUSED",
        "WAL_REMOVED",
        "CONFIG",
        "LOCAL",
        "STOPPED",
        "UNREACHABLE",
        // Of commands of klio-server.
        "KEY",
        "FAILED",
        // Of jobs, beside kinds.
        "waiting",
        "queue",
        "queue_full",
        // Of requests to the bucket.
        "connect",
        "interrupted",
        "timeout",
        "decode",
        "other",
        "http_4xx",
        "http_5xx",
        // Of programs.
        "program_failed",
        "program_missing",
    ];
    codes.chain(kinds).chain(others).collect()
}

/// Checks what holds for every span, whatever it is of: `error.type` is of the closed set, a span that failed has one,
/// and nothing secret is in an attribute.
///
/// # Panics
/// When it does not hold.
pub fn check_all(spans: &[Span], secrets: &[&str]) {
    let known = error_types();
    for span in spans {
        let error = span.attributes.get("error.type").map(String::as_str);
        assert!(error.is_none_or(|error| known.contains(&error)), "{error:?} in {span:?}");
        for (key, value) in &span.attributes {
            let secret = secrets.iter().find(|secret| value.contains(**secret));
            assert!(secret.is_none(), "a secret in {key} of {span:?}");
            // Sizes, counts, durations and names: no attribute holds data.
            assert!(value.len() <= 1024, "{} bytes in {key} of {}", value.len(), span.name);
        }
    }
}
