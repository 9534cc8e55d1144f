//! A collector on loopback: OTLP over HTTP, keeping every span it is sent.

use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Bytes, body::Incoming};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value},
};
use prost::Message;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{net::TcpListener, task::JoinSet};

/// A span as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// `service.name` of the program.
    pub service: String,
    /// Name.
    pub name: String,
    /// Trace id, 32 hexadecimal digits.
    pub trace: String,
    /// Span id, 16 hexadecimal digits.
    pub id: String,
    /// Span id of the parent; empty for a root.
    pub parent: String,
    /// Attributes; numbers and truth values as text.
    pub attributes: BTreeMap<String, String>,
}

type Spans = Arc<Mutex<Vec<Span>>>;

/// The collector; it stops when dropped.
pub struct Collector {
    port: u16,
    spans: Spans,
    _tasks: JoinSet<()>,
}

impl Collector {
    /// Starts one on a port of the system's choice.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen on loopback");
        let port = listener.local_addr().expect("an address").port();
        let spans = Spans::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, spans.clone()));
        Self { port, spans, _tasks: tasks }
    }

    /// For `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Every span so far, in the order of arrival.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn accept(listener: TcpListener, spans: Spans) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let spans = spans.clone();
        connections.spawn(async move {
            let service = hyper::service::service_fn(|request| receive(request, spans.clone()));
            let serving = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            // The peer hanging up between requests is the normal end.
            let _ = serving.await;
        });
    }
}

async fn receive(
    request: Request<Incoming>,
    spans: Spans,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let path = request.uri().path().to_owned();
    let body = request.into_body().collect().await?.to_bytes();
    if path == "/v1/traces"
        && let Ok(decoded) = ExportTraceServiceRequest::decode(body)
    {
        spans.lock().unwrap_or_else(PoisonError::into_inner).extend(all(decoded));
    }
    Ok(Response::new(Full::default()))
}

fn all(request: ExportTraceServiceRequest) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource in request.resource_spans {
        let attributes = resource.resource.map(|r| texts(&r.attributes)).unwrap_or_default();
        let service = attributes.get("service.name").cloned().unwrap_or_default();
        for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            spans.push(Span {
                service: service.clone(),
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                attributes: texts(&span.attributes),
            });
        }
    }
    spans
}

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref()?.value.as_ref()? {
        any_value::Value::StringValue(text) => Some(text.clone()),
        any_value::Value::IntValue(number) => Some(number.to_string()),
        any_value::Value::BoolValue(truth) => Some(truth.to_string()),
        other => Some(format!("{other:?}")),
    };
    attributes.iter().filter_map(|a| Some((a.key.clone(), text(a)?))).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
