//! The `OTEL_EXPORTER_OTLP_*` variables of one signal.
//!
//! The signal's own variable wins over the general one. Over HTTP `/v1/<signal>` is appended to the general endpoint
//! only. The result is a complete address, so that no other code has to apply these rules.
//!
//! Source: <https://opentelemetry.io/docs/specs/otel/protocol/exporter/>.

use super::reader::Reader;
use std::{path::PathBuf, time::Duration};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Signal::Traces => "traces",
            Signal::Metrics => "metrics",
            Signal::Logs => "logs",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http,
    Grpc,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Protocol::Http => "http/protobuf",
            Protocol::Grpc => "grpc",
        }
    }
}

/// How to reach the collector for one signal.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Otlp {
    pub signal: Signal,
    pub protocol: Protocol,
    /// Complete, with scheme and path. It may contain credentials, so it must be redacted before it is shown.
    pub endpoint: String,
    /// The variable that sets the endpoint, or that would set it; messages about the collector name it.
    pub endpoint_variable: String,
    pub headers: Vec<(String, String)>,
    pub gzip: bool,
    /// The time limit of one request.
    pub timeout: Duration,
    /// The variable and the file.
    pub certificate: Option<(String, PathBuf)>,
    pub client_certificate: Option<(String, PathBuf)>,
    pub client_key: Option<(String, PathBuf)>,
}

impl std::fmt::Debug for Otlp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Otlp")
            .field("signal", &self.signal)
            .field("protocol", &self.protocol)
            .field("endpoint", &crate::redact::redact(&self.endpoint))
            .field("headers", &self.headers.iter().map(|(k, _)| k).collect::<Vec<_>>())
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// Shortens the time limit of requests to `limit`, if that is shorter.
pub(super) fn bound(otlp: &mut Option<Otlp>, limit: Option<Duration>) {
    if let (Some(otlp), Some(limit)) = (otlp, limit) {
        otlp.timeout = otlp.timeout.min(limit);
    }
}

fn own(signal: Signal, suffix: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_{}_{suffix}", signal.name().to_ascii_uppercase())
}

fn general(suffix: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_{suffix}")
}

/// The variable that applies: the signal's own if it is set, else the general one.
fn deciding(r: &Reader<'_>, signal: Signal, suffix: &str) -> String {
    let own = own(signal, suffix);
    if r.text(&own).is_some() { own } else { general(suffix) }
}

/// Whether a variable sets an endpoint for this signal.
pub(super) fn endpoint_given(r: &Reader<'_>, signal: Signal) -> bool {
    r.text(&deciding(r, signal, "ENDPOINT")).is_some()
}

/// `None` when an endpoint is set and invalid, because data meant for one place must not be sent to another.
pub(super) fn parse(r: &mut Reader<'_>, signal: Signal) -> Option<Otlp> {
    let protocol = protocol(r, signal);
    let endpoint = endpoint(r, signal, protocol);
    let headers = deciding(r, signal, "HEADERS");
    let compression = deciding(r, signal, "COMPRESSION");
    let timeout = deciding(r, signal, "TIMEOUT");
    let (client_certificate, client_key) = identity(r, signal);
    let headers = self::headers(r, &headers);
    let gzip = r.choice(&compression, &[("gzip", true), ("none", false)]).unwrap_or(false);
    let timeout = r.millis(&timeout).unwrap_or(Duration::from_secs(10));
    Some(Otlp {
        signal,
        protocol,
        endpoint: endpoint?,
        endpoint_variable: deciding(r, signal, "ENDPOINT"),
        headers,
        gzip,
        timeout,
        certificate: path(r, signal, "CERTIFICATE"),
        client_certificate,
        client_key,
    })
}

fn protocol(r: &mut Reader<'_>, signal: Signal) -> Protocol {
    let variable = deciding(r, signal, "PROTOCOL");
    r.choice(&variable, &[("http/protobuf", Protocol::Http), ("grpc", Protocol::Grpc)])
        .unwrap_or(Protocol::Http)
}

fn headers(r: &mut Reader<'_>, variable: &str) -> Vec<(String, String)> {
    let pairs = r.pairs(variable, "comma-separated name=value pairs, percent-encoded");
    let (good, bad): (Vec<_>, Vec<_>) = pairs.into_iter().partition(|(name, value)| {
        http::HeaderName::from_bytes(name.as_bytes()).is_ok()
            && http::HeaderValue::from_str(value).is_ok()
    });
    for (name, _) in bad {
        r.problem(variable, &format!("{name}=***"), "names and values that HTTP allows in headers");
    }
    good
}

fn path(r: &Reader<'_>, signal: Signal, suffix: &str) -> Option<(String, PathBuf)> {
    let variable = deciding(r, signal, suffix);
    r.text(&variable).map(|file| (variable, PathBuf::from(file)))
}

type File = Option<(String, PathBuf)>;

/// A certificate and its key are needed together.
fn identity(r: &mut Reader<'_>, signal: Signal) -> (File, File) {
    let certificate = path(r, signal, "CLIENT_CERTIFICATE");
    let key = path(r, signal, "CLIENT_KEY");
    match (&certificate, &key) {
        (Some((variable, file)), None) => {
            let other = variable.replace("CLIENT_CERTIFICATE", "CLIENT_KEY");
            r.problem(variable, &file.display().to_string(), format!("{other} beside it"));
            (None, None)
        }
        (None, Some((variable, file))) => {
            let other = variable.replace("CLIENT_KEY", "CLIENT_CERTIFICATE");
            r.problem(variable, &file.display().to_string(), format!("{other} beside it"));
            (None, None)
        }
        _ => (certificate, key),
    }
}

fn endpoint(r: &mut Reader<'_>, signal: Signal, protocol: Protocol) -> Option<String> {
    let variable = deciding(r, signal, "ENDPOINT");
    let insecure = deciding(r, signal, "INSECURE");
    let insecure = r.flag(&insecure);
    let given = r.parsed(&variable, "an address such as http://collector:4318", |text| {
        with_scheme(text, protocol, insecure)
    });
    if given.is_none() && r.text(&variable).is_some() {
        return None;
    }
    Some(match (protocol, given) {
        (Protocol::Grpc, Some(endpoint)) => endpoint,
        (Protocol::Grpc, None) => "http://localhost:4317".into(),
        (Protocol::Http, Some(endpoint)) if variable != general("ENDPOINT") => endpoint,
        (Protocol::Http, given) => {
            let base = given.unwrap_or_else(|| "http://localhost:4318".into());
            format!("{}/v1/{}", base.trim_end_matches('/'), signal.name())
        }
    })
}

/// An absolute http(s) address. gRPC also accepts `host:port`, with TLS unless INSECURE is set.
fn with_scheme(text: &str, protocol: Protocol, insecure: bool) -> Option<String> {
    let full = if text.contains("://") {
        text.to_owned()
    } else if protocol == Protocol::Grpc {
        format!("{}://{text}", if insecure { "http" } else { "https" })
    } else {
        return None;
    };
    let uri: http::Uri = full.parse().ok()?;
    let scheme = uri.scheme_str()?;
    let known = scheme == "http" || scheme == "https";
    (known && uri.host().is_some_and(|h| !h.is_empty())).then_some(full)
}
