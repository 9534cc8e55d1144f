//! gRPC calls as `rpc.server.call.duration` and `rpc.client.call.duration`.
//!
//! Names and attributes follow OpenTelemetry's RPC conventions after v1.37
//! (<https://opentelemetry.io/docs/specs/semconv/rpc/rpc-metrics/>). Each call is measured once, when its last byte,
//! its error or its dropping ends it, so a stream counts once, however many messages it carries. Only methods of the
//! services given to [`RpcMeter::new`] appear by name. Any other path is `_OTHER`, as the conventions require, and so
//! is a method that one of our services does not have, so that callers cannot create series.

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use opentelemetry::{
    KeyValue,
    metrics::{Histogram, Meter},
};
use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};
use tower::{Layer, Service};

/// From short requests to streams that last for days, in seconds.
const BOUNDARIES: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// The names of gRPC's status codes, by number.
const STATUS: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];
const CANCELLED: usize = 1;
const UNKNOWN: usize = 2;
/// The status of tonic for a method that the service does not have.
const UNIMPLEMENTED: usize = 12;
const OTHER: &str = "_OTHER";

/// The end of the calls that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The end that is called.
    Server,
    /// The end that calls.
    Client,
}

/// Measures calls. Cheap to clone.
#[derive(Clone)]
pub struct RpcMeter(Arc<Inner>);

struct Inner {
    duration: Histogram<f64>,
    side: Side,
    /// `package.Service` of everything that is served.
    services: Vec<String>,
}

impl std::fmt::Debug for RpcMeter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RpcMeter").field("side", &self.0.side).finish_non_exhaustive()
    }
}

impl RpcMeter {
    /// Creates an instrument on this meter, for the methods of these services (`package.Service`).
    pub fn new(meter: &Meter, side: Side, services: &[&str]) -> Self {
        let (name, text) = match side {
            Side::Server => ("rpc.server.call.duration", "duration of incoming calls"),
            Side::Client => ("rpc.client.call.duration", "duration of outgoing calls"),
        };
        let duration = meter
            .f64_histogram(name)
            .with_unit("s")
            .with_description(text)
            .with_boundaries(BOUNDARIES.to_vec())
            .build();
        let services = services.iter().map(|service| (*service).to_owned()).collect();
        Self(Arc::new(Inner { duration, side, services }))
    }

    /// The layer for a tonic server, or around a channel.
    pub fn layer(&self) -> RpcLayer {
        RpcLayer(self.clone())
    }

    fn method(&self, path: &str) -> String {
        let method = path.trim_start_matches('/');
        let known = method
            .split_once('/')
            .is_some_and(|(service, _)| self.0.services.iter().any(|known| known == service));
        if known { method.to_owned() } else { OTHER.to_owned() }
    }
}

/// Wraps a service so that its calls are measured.
#[derive(Debug, Clone)]
pub struct RpcLayer(RpcMeter);

impl<S> Layer<S> for RpcLayer {
    type Service = Metered<S>;
    fn layer(&self, inner: S) -> Metered<S> {
        Metered { inner, meter: Some(self.0.clone()) }
    }
}

/// A service whose calls are measured; without a meter it only passes them on.
#[derive(Debug, Clone)]
pub struct Metered<S> {
    inner: S,
    meter: Option<RpcMeter>,
}

impl<S> Metered<S> {
    /// Measures only if there is a meter.
    pub fn new(inner: S, meter: Option<RpcMeter>) -> Self {
        Self { inner, meter }
    }
}

/// A call that has not been measured yet. If it is dropped before it ended, it counts as cancelled.
#[derive(Debug)]
struct Call {
    meter: RpcMeter,
    method: String,
    begun: Instant,
    status: usize,
}

impl Call {
    /// Takes the status from headers or trailers, if they contain it.
    fn read(&mut self, headers: &HeaderMap) {
        let text = headers.get("grpc-status").and_then(|value| value.to_str().ok());
        if let Some(text) = text {
            let number = text.parse().unwrap_or(UNKNOWN);
            self.status = if number < STATUS.len() { number } else { UNKNOWN };
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let status = STATUS[self.status];
        if self.status == UNIMPLEMENTED && self.meter.0.side == Side::Server {
            self.method = OTHER.to_owned();
        }
        let mut attributes = vec![
            KeyValue::new("rpc.system.name", "grpc"),
            KeyValue::new("rpc.method", std::mem::take(&mut self.method)),
            KeyValue::new("rpc.response.status_code", status),
        ];
        if self.status != 0 {
            attributes.push(KeyValue::new("error.type", status));
        }
        self.meter.0.duration.record(self.begun.elapsed().as_secs_f64(), &attributes);
    }
}

impl<S, I, O> Service<Request<I>> for Metered<S>
where
    S: Service<Request<I>, Response = Response<O>>,
    S::Future: Send + 'static,
    S::Error: 'static,
    O: 'static,
{
    type Response = Response<MeteredBody<O>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<I>) -> Self::Future {
        let call = self.meter.clone().map(|meter| Call {
            method: meter.method(request.uri().path()),
            meter,
            begun: Instant::now(),
            status: CANCELLED,
        });
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut call = call;
            let answer = answer.await.inspect_err(|_| {
                if let Some(call) = &mut call {
                    call.status = UNKNOWN;
                }
            })?;
            if let Some(call) = &mut call {
                call.read(answer.headers());
            }
            Ok(answer.map(|body| MeteredBody { body: Box::pin(body), call }))
        })
    }
}

/// The body of an answer; the call ends with it.
#[derive(Debug)]
pub struct MeteredBody<B> {
    body: Pin<Box<B>>,
    call: Option<Call>,
}

impl<B: Body> Body for MeteredBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(self.body.as_mut().poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(trailers), Some(call)) = (frame.trailers_ref(), &mut self.call) {
                    call.read(trailers);
                    self.call = None;
                }
            }
            Some(Err(_)) => {
                if let Some(call) = &mut self.call {
                    call.status = UNKNOWN;
                }
                self.call = None;
            }
            None => self.call = None,
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

impl<B: Default> Default for MeteredBody<B> {
    fn default() -> Self {
        Self { body: Box::pin(B::default()), call: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::metrics::MeterProvider;
    use opentelemetry_sdk::metrics::SdkMeterProvider;

    struct Frames(Vec<Frame<&'static [u8]>>);

    impl Body for Frames {
        type Data = &'static [u8];
        type Error = std::io::Error;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
            Poll::Ready(if self.0.is_empty() { None } else { Some(Ok(self.0.remove(0))) })
        }
    }

    fn trailers(status: &'static str) -> Frame<&'static [u8]> {
        let mut map = HeaderMap::new();
        map.insert("grpc-status", http::HeaderValue::from_static(status));
        Frame::trailers(map)
    }

    /// Makes one call and returns what was measured: method, status, count.
    async fn measured(
        path: &str,
        frames: Vec<Frame<&'static [u8]>>,
        read: bool,
    ) -> (String, String) {
        let registry = prometheus::Registry::new();
        let exporter = opentelemetry_prometheus::exporter().with_registry(registry.clone());
        let provider = SdkMeterProvider::builder().with_reader(exporter.build().unwrap()).build();
        let meter = RpcMeter::new(&provider.meter("klio"), Side::Server, &["klio.v1.Wal"]);
        let frames = std::sync::Mutex::new(Some(frames));
        let service = tower::service_fn(move |_: Request<()>| {
            let frames = frames.lock().unwrap().take().unwrap();
            std::future::ready(Ok::<_, std::io::Error>(Response::new(Frames(frames))))
        });
        let mut service = meter.layer().layer(service);
        let answer = service.call(Request::get(path).body(()).unwrap()).await.unwrap();
        let mut body = Box::pin(answer.into_body());
        while read && std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await.is_some() {}
        drop(body);
        let families = registry.gather();
        let name = "rpc_server_call_duration_seconds";
        let family = families.iter().find(|family| family.name() == name).unwrap();
        let [metric] = family.get_metric() else { panic!("expected one series") };
        assert_eq!(metric.get_histogram().get_sample_count(), 1);
        let of = |key: &str| {
            let found = metric.get_label().iter().find(|label| label.name() == key);
            found.map(|label| label.value().to_owned()).unwrap_or_default()
        };
        (of("rpc_method"), of("rpc_response_status_code"))
    }

    #[tokio::test]
    async fn a_call_is_measured_once_with_the_status_of_its_trailers() {
        let frames = vec![Frame::data(&b"x"[..]), Frame::data(&b"y"[..]), trailers("5")];
        let (method, status) = measured("/klio.v1.Wal/Fetch", frames, true).await;
        assert_eq!((method.as_str(), status.as_str()), ("klio.v1.Wal/Fetch", "NOT_FOUND"));
    }

    #[tokio::test]
    async fn a_stream_that_is_dropped_was_cancelled() {
        let frames = vec![Frame::data(&b"x"[..]), trailers("0")];
        let (_, status) = measured("/klio.v1.Wal/Receive", frames, false).await;
        assert_eq!(status, "CANCELLED");
    }

    #[tokio::test]
    async fn a_path_of_no_service_of_ours_makes_no_series_of_its_own() {
        let (method, _) = measured("/random/4711", vec![trailers("12")], true).await;
        assert_eq!(method, "_OTHER");
    }

    #[tokio::test]
    async fn a_method_that_a_service_does_not_have_makes_no_series_of_its_own() {
        let (method, status) = measured("/klio.v1.Wal/Made4711", vec![trailers("12")], true).await;
        assert_eq!((method.as_str(), status.as_str()), ("_OTHER", "UNIMPLEMENTED"));
    }
}
