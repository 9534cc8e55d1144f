//! One CLIENT span for every request that goes to the object store, retries included.
//!
//! Sits below the retry layer, so each attempt is a span of its own. Records method, bucket, directory of
//! the key, status, the kind of a failure and which repetition it is: never a query, a header or a body.
//!
//! S3's completion of a multipart upload writes over what is there: it is sent with `If-None-Match: *`, which S3 takes since
//! November 2024, and once more without where a store says that it does not know it (OBJECT4).

use super::{attempts::Attempts, date::Dates, dial::Dialer, link::Link};
use async_trait::async_trait;
use http::{HeaderValue, Method, StatusCode, header::IF_NONE_MATCH};
use object_store::{
    ClientConfigKey, ClientOptions, ObjectMeta,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    },
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::{Instrument, Span, field::Empty};

/// Makes clients whose requests are spans.
#[derive(Debug, Clone)]
pub(super) struct TracedConnector {
    pub(super) bucket: String,
    pub(super) dialer: Dialer,
    pub(super) dates: Dates,
    pub(super) replacing: Replacing,
}

/// What tells one content of an object from another.
type Version = (u64, Option<String>);

/// The keys of which an upload may write over what is there, which is this. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Replacing(Arc<Mutex<Vec<(String, Version)>>>);

/// Dropping it ends it.
pub(super) struct Replaced<'a>(&'a Replacing, String);

impl Replacing {
    pub(super) fn begin(&self, key: &str, over: &ObjectMeta) -> Replaced<'_> {
        self.keys().push((key.to_owned(), version(over)));
        Replaced(self, key.to_owned())
    }

    /// Whether what is there now may be written over, or nothing is, as it has to be.
    pub(super) fn gives_way(&self, key: &str, there: Option<&ObjectMeta>) -> bool {
        let keys = self.keys();
        let over = keys.iter().find(|(known, _)| known == key).map(|(_, over)| over);
        there.map(version).as_ref() == over
    }

    fn keys(&self) -> MutexGuard<'_, Vec<(String, Version)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, request: &HttpRequest) -> bool {
        // All of a key but a generation's mark is as it is in a path.
        let path = request.uri().path().replace("%40", "@");
        self.keys().iter().any(|(key, _)| path.ends_with(&format!("/{key}")))
    }
}

impl Drop for Replaced<'_> {
    fn drop(&mut self) {
        let mut keys = self.0.keys();
        if let Some(at) = keys.iter().position(|(key, _)| *key == self.1) {
            keys.swap_remove(at);
        }
    }
}

fn version(meta: &ObjectMeta) -> Version {
    (meta.size, meta.e_tag.clone())
}

impl HttpConnector for TracedConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let allowed = options.get_config_value(&ClientConfigKey::AllowHttp);
        let inner = self.dialer.client(allowed.as_deref() == Some("true"))?;
        let (bucket, attempts) = (self.bucket.clone(), Attempts::default());
        let (dates, link) = (self.dates.clone(), Link::new(self.dialer.patience));
        let replacing = self.replacing.clone();
        Ok(HttpClient::new(TracedService { inner, bucket, attempts, dates, link, replacing }))
    }
}

#[derive(Debug)]
struct TracedService {
    inner: HttpClient,
    bucket: String,
    attempts: Attempts,
    link: Link,
    dates: Dates,
    replacing: Replacing,
}

#[async_trait]
impl HttpService for TracedService {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let span = request_span(&request, &self.bucket);
        let mut attempt = self.attempts.begin(&request);
        span.record("retries", attempt.retries());
        let result = self.send(request).instrument(span.clone()).await;
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

impl TracedService {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if !completes_upload(&request) || self.replacing.has(&request) {
            return self.link.execute(&self.inner, request).await;
        }
        let (parts, body) = request.into_parts();
        let (mut conditional, body_again) = (parts.clone(), body.clone());
        conditional.headers.insert(IF_NONE_MATCH, HeaderValue::from_static("*"));
        let conditional = HttpRequest::from_parts(conditional, body);
        let answer = self.link.execute(&self.inner, conditional).await?;
        if answer.status() != StatusCode::NOT_IMPLEMENTED {
            return Ok(answer);
        }
        self.link.execute(&self.inner, HttpRequest::from_parts(parts, body_again)).await
    }
}

/// `POST key?uploadId=...`, of S3 alone.
fn completes_upload(request: &HttpRequest) -> bool {
    let query = request.uri().query().unwrap_or_default();
    let names_upload = query.split('&').any(|pair| pair.starts_with("uploadId="));
    request.method() == Method::POST && names_upload
}

fn request_span(request: &HttpRequest, bucket: &str) -> Span {
    tracing::info_span!(
        "tier2.request",
        otel.kind = "client",
        otel.status_code = Empty,
        http.request.method = request.method().as_str(),
        server.address = request.uri().host().unwrap_or_default(),
        bucket,
        key_prefix = directory(request.uri().path()),
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

/// A path without its last part: a directory, never an object's name.
fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(directory, _)| directory).trim_start_matches('/')
}

#[cfg(test)]
mod tests {
    use super::directory;

    #[test]
    fn a_span_names_the_directory_not_the_object() {
        assert_eq!(directory("/bucket/pg-1/wal/00000001/x.zst"), "bucket/pg-1/wal/00000001");
        assert_eq!(directory("/"), "");
        assert_eq!(directory("x"), "");
    }
}
