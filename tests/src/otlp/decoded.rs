//! What a receiver got, decoded.

use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::ExportLogsServiceRequest, metrics::v1::ExportMetricsServiceRequest,
        trace::v1::ExportTraceServiceRequest,
    },
    common::v1::{AnyValue, KeyValue, any_value},
    resource::v1::Resource,
    trace::v1::{span::Event, status::StatusCode},
};
use std::collections::BTreeMap;

/// The three kinds of telemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Signal {
    /// Spans.
    Traces,
    /// Metrics.
    Metrics,
    /// Log records.
    Logs,
}

/// One request as it came in.
#[derive(Debug, Clone)]
pub struct Arrival {
    /// What it carries, by its content over gRPC and by the end of its path over HTTP.
    pub signal: Option<Signal>,
    /// Path of the request; over gRPC the method's.
    pub path: String,
    /// Headers or metadata; names in lower case, as often as they came.
    pub headers: Vec<(String, String)>,
    /// The decoded body.
    pub message: Message,
}

impl Arrival {
    /// Every value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect()
    }

    /// Attributes of the resources that sent it.
    #[must_use]
    pub fn resources(&self) -> Vec<BTreeMap<String, String>> {
        let all: Vec<Option<&Resource>> = match &self.message {
            Message::Traces(m) => m.resource_spans.iter().map(|r| r.resource.as_ref()).collect(),
            Message::Metrics(m) => m.resource_metrics.iter().map(|r| r.resource.as_ref()).collect(),
            Message::Logs(m) => m.resource_logs.iter().map(|r| r.resource.as_ref()).collect(),
            Message::Undecodable(_) => Vec::new(),
        };
        all.into_iter().flatten().map(|r| texts(&r.attributes)).collect()
    }
}

/// The body of a request.
#[derive(Debug, Clone)]
pub enum Message {
    /// Spans.
    Traces(ExportTraceServiceRequest),
    /// Metrics.
    Metrics(ExportMetricsServiceRequest),
    /// Log records.
    Logs(ExportLogsServiceRequest),
    /// Not what was expected at that path; its length.
    Undecodable(usize),
}

/// A span as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// `service.name` of the program.
    pub service: String,
    /// Name of the tracer.
    pub tracer: String,
    /// Name.
    pub name: String,
    /// Trace id, 32 hexadecimal digits.
    pub trace: String,
    /// Span id, 16 hexadecimal digits.
    pub id: String,
    /// Span id of the parent; empty for a root.
    pub parent: String,
    /// `INTERNAL`, `SERVER`, `CLIENT`, `PRODUCER` or `CONSUMER`.
    pub kind: String,
    /// Trace ids that it links to.
    pub links: Vec<String>,
    /// What was recorded as `exception.type`.
    pub exceptions: Vec<String>,
    /// Whether its status is ERROR.
    pub failed: bool,
    /// Attributes; numbers and truth values as text.
    pub attributes: BTreeMap<String, String>,
}

/// A log record as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// `service.name` of the program.
    pub service: String,
    /// The message.
    pub body: String,
    /// `INFO` and the like.
    pub severity: String,
    /// Trace id, 32 hexadecimal digits; empty outside spans.
    pub trace: String,
    /// Span id, 16 hexadecimal digits; empty outside spans.
    pub span: String,
    /// Attributes as text.
    pub attributes: BTreeMap<String, String>,
}

/// Every span of a request.
pub(super) fn spans(request: &ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource in &request.resource_spans {
        let service = service(resource.resource.as_ref());
        for scope in &resource.scope_spans {
            let tracer = scope.scope.as_ref().map(|s| s.name.clone()).unwrap_or_default();
            spans.extend(scope.spans.iter().map(|span| Span {
                service: service.clone(),
                tracer: tracer.clone(),
                name: span.name.clone(),
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                kind: span.kind().as_str_name().trim_start_matches("SPAN_KIND_").to_owned(),
                links: span.links.iter().map(|link| hex(&link.trace_id)).collect(),
                exceptions: exceptions(&span.events),
                failed: span.status.as_ref().is_some_and(|s| s.code == StatusCode::Error as i32),
                attributes: texts(&span.attributes),
            }));
        }
    }
    spans
}

fn exceptions(events: &[Event]) -> Vec<String> {
    let exceptions = events.iter().filter(|event| event.name == "exception");
    exceptions.filter_map(|event| texts(&event.attributes).remove("exception.type")).collect()
}

/// Every record of a request.
pub(super) fn logs(request: &ExportLogsServiceRequest) -> Vec<LogRecord> {
    let mut records = Vec::new();
    for resource in &request.resource_logs {
        let service = service(resource.resource.as_ref());
        for record in resource.scope_logs.iter().flat_map(|scope| &scope.log_records) {
            records.push(LogRecord {
                service: service.clone(),
                body: record.body.as_ref().and_then(text).unwrap_or_default(),
                severity: record.severity_text.clone(),
                trace: hex(&record.trace_id),
                span: hex(&record.span_id),
                attributes: texts(&record.attributes),
            });
        }
    }
    records
}

fn service(resource: Option<&Resource>) -> String {
    let attributes = resource.map(|r| texts(&r.attributes)).unwrap_or_default();
    attributes.get("service.name").cloned().unwrap_or_default()
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let pairs = attributes.iter();
    pairs.filter_map(|a| Some((a.key.clone(), text(a.value.as_ref()?)?))).collect()
}

fn text(value: &AnyValue) -> Option<String> {
    match value.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        any_value::Value::IntValue(number) => Some(number.to_string()),
        any_value::Value::BoolValue(truth) => Some(truth.to_string()),
        any_value::Value::ArrayValue(array) => {
            let parts: Vec<String> = array.values.iter().filter_map(text).collect();
            Some(parts.join(" "))
        }
        other => Some(format!("{other:?}")),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
