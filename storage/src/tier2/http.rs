//! One CLIENT span for every request that goes to the object store, retries included.
//!
//! Sits below the retry layer, so each attempt is a span of its own. Records method, bucket, folder of
//! the key, status, the kind of a failure and which repetition it is: never a query, a header or a body.

use super::{attempts::Attempts, date::Dates};
use async_trait::async_trait;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpService, ReqwestConnector,
    },
};
use tracing::{Instrument, Span, field::Empty};

/// Makes clients whose requests are spans.
#[derive(Debug, Clone)]
pub(super) struct TracedConnector {
    pub(super) bucket: String,
    pub(super) dates: Dates,
}

impl HttpConnector for TracedConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let inner = ReqwestConnector::default().connect(options)?;
        let (bucket, attempts) = (self.bucket.clone(), Attempts::default());
        let dates = self.dates.clone();
        Ok(HttpClient::new(TracedService { inner, bucket, attempts, dates }))
    }
}

#[derive(Debug)]
struct TracedService {
    inner: HttpClient,
    bucket: String,
    attempts: Attempts,
    dates: Dates,
}

#[async_trait]
impl HttpService for TracedService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let span = request_span(&request, &self.bucket);
        let mut attempt = self.attempts.begin(&request);
        span.record("retries", attempt.retries());
        let result = self.inner.execute(request).instrument(span.clone()).await;
        match &result {
            Ok(response) => {
                self.dates.hear(response);
                let status = response.status().as_u16();
                record_status(&span, status);
                attempt.ended(status >= 500 || status == 429);
            }
            Err(error) => {
                record_failure(&span, error_type(error.kind()));
                attempt.ended(true);
            }
        }
        result
    }
}

fn request_span(request: &HttpRequest, bucket: &str) -> Span {
    tracing::info_span!(
        "tier2.request",
        otel.kind = "client",
        otel.status_code = Empty,
        http.request.method = request.method().as_str(),
        server.address = request.uri().host().unwrap_or_default(),
        bucket,
        key_prefix = folder(request.uri().path()),
        http.response.status_code = Empty,
        retries = Empty,
        error.type = Empty,
    )
}

fn record_status(span: &Span, status: u16) {
    span.record("http.response.status_code", status);
    // 404 and 412 are ordinary answers to "is it there?" and "only if absent".
    if status >= 400 && !matches!(status, 404 | 409 | 412) {
        record_failure(span, if status >= 500 { "http_5xx" } else { "http_4xx" });
    }
}

fn record_failure(span: &Span, kind: &'static str) {
    span.record("otel.status_code", "ERROR");
    span.record("error.type", kind);
}

const fn error_type(kind: HttpErrorKind) -> &'static str {
    match kind {
        HttpErrorKind::Connect => "connect",
        HttpErrorKind::Request | HttpErrorKind::Interrupted => "interrupted",
        HttpErrorKind::Timeout => "timeout",
        HttpErrorKind::Decode => "decode",
        _ => "other",
    }
}

/// A path without its last part: a folder, never an object's name.
fn folder(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder).trim_start_matches('/')
}

#[cfg(test)]
mod tests {
    use super::folder;

    #[test]
    fn a_span_names_the_folder_not_the_object() {
        assert_eq!(folder("/bucket/pg-1/wal/00000001/x.zst"), "bucket/pg-1/wal/00000001");
        assert_eq!(folder("/"), "");
        assert_eq!(folder("x"), "");
    }
}
