//! One SERVER span for each call of klio.v1, below the caller's span if it sent a trace context.
//!
//! - Span names come from the table [`name`], so a caller cannot create one. Health checks and reflection have no
//!   span.
//! - The span is current in the handler and whenever the answer's body is polled, and it ends with the body: a stream
//!   is one span, however many messages it carries.
//! - `error.type` is a name of `Code` (a closed set). "Not found" is an answer, not a failure.

use http::{HeaderMap, Request, Response};
use hyper::body::{Body, Frame, SizeHint};
use klio_proto::{Code, code::CODE_KEY};
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower::{Layer, Service};
use tracing::{Instrument, Span, field::Empty};

macro_rules! methods {
    ($($method:literal => $name:literal)*) => {
        /// The span's name for a method, `package.Service/Method`.
        #[cfg(test)]
        fn name(method: &str) -> Option<&'static str> {
            match method { $($method => Some($name),)* _ => None }
        }

        fn open(method: &str) -> Option<Span> {
            Some(match method {
                $($method => tracing::info_span!(
                    parent: None,
                    $name,
                    otel.kind = "server",
                    otel.status_code = Empty,
                    error.type = Empty,
                    bytes = Empty,
                    tier = Empty,
                ),)*
                _ => return None,
            })
        }
    };
}

methods! {
    "klio.v1.Wal/Position" => "wal.position"
    "klio.v1.Wal/PutHistory" => "wal.put_history"
    "klio.v1.Wal/Compare" => "wal.compare"
    "klio.v1.Wal/BeginGeneration" => "wal.begin_generation"
    "klio.v1.Wal/Refill" => "wal.refill"
    "klio.v1.Wal/Receive" => "wal.stream"
    "klio.v1.Wal/Fetch" => "wal.fetch"
    "klio.v1.Base/OpenRepository" => "base.open_repository"
    "klio.v1.Base/PutFile" => "base.put_file"
    "klio.v1.Base/GetFile" => "base.get_file"
    "klio.v1.Base/ListFiles" => "base.list_files"
    "klio.v1.Base/Reserve" => "base.reserve"
    "klio.v1.Base/CommitBackup" => "base.commit_backup"
    "klio.v1.Base/ListBackups" => "base.list_backups"
    "klio.v1.Base/Holdings" => "base.holdings"
    "klio.v1.Base/Verify" => "base.verify"
    "klio.v1.Base/Maintain" => "base.maintain"
    "klio.v1.Base/PlanRetention" => "base.plan_retention"
    "klio.v1.Base/RecordDrill" => "base.record_drill"
    "klio.v1.Catalog/ListGenerations" => "catalog.list_generations"
    "klio.v1.Catalog/DecideGeneration" => "catalog.decide_generation"
    "klio.v1.Catalog/Status" => "catalog.status"
    "klio.v1.Catalog/ListWal" => "catalog.list_wal"
    "klio.v1.Catalog/Check" => "catalog.check"
    "klio.v1.Catalog/Timelines" => "catalog.timelines"
    "klio.v1.Catalog/DecideTimeline" => "catalog.decide_timeline"
}

/// Wraps a service so that its calls have spans.
#[derive(Debug, Clone, Copy)]
pub struct TraceLayer;

impl<S> Layer<S> for TraceLayer {
    type Service = Traced<S>;
    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner }
    }
}

/// A service whose calls have spans.
#[derive(Debug, Clone)]
pub struct Traced<S> {
    inner: S,
}

impl<S, I, O> Service<Request<I>> for Traced<S>
where
    S: Service<Request<I>, Response = Response<O>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    O: 'static,
{
    type Response = Response<TracedBody<O>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<I>) -> Self::Future {
        let method = request.uri().path().trim_start_matches('/');
        let span = open(method).unwrap_or_else(Span::none);
        klio_telemetry::propagate::adopt(&span, &|key| {
            request.headers().get(key).and_then(|value| value.to_str().ok()).map(str::to_owned)
        });
        let answer = span.in_scope(|| self.inner.call(request)).instrument(span.clone());
        Box::pin(async move {
            let answer = answer.await?;
            record(&span, answer.headers());
            Ok(answer.map(|body| TracedBody { body: Box::pin(body), span }))
        })
    }
}

/// Takes the status from headers or trailers, if they contain it.
fn record(span: &Span, headers: &HeaderMap) {
    let text = |key: &str| headers.get(key).and_then(|value| value.to_str().ok());
    let Some(number) = text("grpc-status").filter(|number| *number != "0") else { return };
    let code = text(CODE_KEY).and_then(|name| Code::ALL.iter().find(|code| code.name() == name));
    let code = code.copied().unwrap_or_else(|| {
        let code = tonic::Code::from_bytes(number.as_bytes());
        Code::of(&tonic::Status::new(code, ""))
    });
    span.record("error.type", code.name());
    if code != Code::NotFound {
        span.record("otel.status_code", "ERROR");
    }
}

/// The body of an answer; the span ends with it.
#[derive(Debug)]
pub struct TracedBody<B> {
    body: Pin<Box<B>>,
    span: Span,
}

impl<B: Body> Body for TracedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = &mut *self;
        let _current = this.span.enter();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            record(&this.span, trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl<B: Default> Default for TracedBody<B> {
    fn default() -> Self {
        Self { body: Box::pin(B::default()), span: Span::none() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTOS: [&str; 3] = [
        include_str!("../../../proto/proto/klio/v1/wal.proto"),
        include_str!("../../../proto/proto/klio/v1/base.proto"),
        include_str!("../../../proto/proto/klio/v1/catalog.proto"),
    ];

    /// This fails for a new method without a span.
    #[test]
    fn every_method_of_the_interface_has_a_span() {
        let mut methods = Vec::new();
        for proto in PROTOS {
            let mut service = "";
            for line in proto.lines().map(str::trim) {
                let word = |text: &'static str| {
                    text.split(|c: char| !c.is_ascii_alphanumeric()).next().unwrap_or_default()
                };
                if let Some(rest) = line.strip_prefix("service ") {
                    service = word(rest);
                } else if let Some(rest) = line.strip_prefix("rpc ") {
                    methods.push(format!("klio.v1.{service}/{}", word(rest)));
                }
            }
        }
        assert!(methods.len() > 15, "{methods:?}");
        for method in methods {
            assert!(name(&method).is_some(), "{method} has no span: add it to the table");
        }
        assert_eq!(name("grpc.health.v1.Health/Check"), None);
    }
}
