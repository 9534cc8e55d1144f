//! One CLIENT span for every request to the object store, including retries.
//!
//! This layer is below the retry layer, so each attempt has a span of its own. It records the method, bucket, directory
//! of the key, status, kind of failure and number of the retry; never a query, a header or a body.
//!
//! In S3, completing a multipart upload overwrites an existing object. The request is therefore sent with
//! `If-None-Match: *`, which S3 has supported since November 2024, and again without the header if a store says that it
//! does not support it (OBJECT4).

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

/// Creates clients whose requests have spans.
#[derive(Debug, Clone)]
pub(super) struct TracedConnector {
    pub(super) bucket: String,
    pub(super) dialer: Dialer,
    pub(super) dates: Dates,
    pub(super) replacing: Replacing,
}

/// Identifies one content of an object: its size and entity tag.
type Version = (u64, Option<String>);

/// The keys that an upload may overwrite, each with the version that may be overwritten. Clones share the list.
#[derive(Debug, Clone, Default)]
pub(super) struct Replacing(Arc<Mutex<Vec<(String, Version)>>>);

/// Ends the permission to overwrite when it is dropped.
pub(super) struct Replaced<'a>(&'a Replacing, String);

impl Replacing {
    pub(super) fn begin(&self, key: &str, over: &ObjectMeta) -> Replaced<'_> {
        self.keys().push((key.to_owned(), version(over)));
        Replaced(self, key.to_owned())
    }

    /// Whether the object found now is the one that may be overwritten, or nothing exists and nothing may be
    /// overwritten.
    pub(super) fn gives_way(&self, key: &str, there: Option<&ObjectMeta>) -> bool {
        let keys = self.keys();
        let over = keys.iter().find(|(known, _)| known == key).map(|(_, over)| over);
        there.map(version).as_ref() == over
    }

    fn keys(&self) -> MutexGuard<'_, Vec<(String, Version)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, request: &HttpRequest) -> bool {
        // In a path, a key is unchanged except for the escaped `@` of a generation.
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

/// `POST key?uploadId=...`, which only S3 has.
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
    // 404 and 412 are normal answers to "does it exist?" and "only if absent".
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

/// A path without its last component: a directory, never an object's name.
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
