//! Builds OTLP exporters from [`Otlp`] settings.
//!
//! HTTP uses the blocking client, which works on the SDK's own threads. It is built on a plain thread, because it must
//! not be built on an async one. gRPC must be built inside the tokio runtime and always gets TLS roots, because the
//! exporter's default has none and would trust nobody. Certificates are read and checked here, once; otherwise a file
//! that is not a certificate would look like a collector that cannot be reached.

use crate::{
    env::{Otlp, Problem, Protocol},
    pem,
    watch::Cause,
};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    Compression, ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithExportConfig,
    WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::metrics::Temporality;
use std::sync::Arc;
use tonic::{
    metadata::MetadataMap,
    transport::{Certificate, ClientTlsConfig, Identity},
};

/// An exporter, and where its transport stores why it failed.
type Built<E> = Result<(E, Arc<Cause>), Problem>;

// The builders share traits but no type, so a macro is the shortest way to write this once.
macro_rules! configured {
    ($builder:expr, $otlp:expr) => {{
        let otlp: &Otlp = $otlp;
        let cause = Arc::new(Cause::default());
        let built = match otlp.protocol {
            Protocol::Http => {
                let mut builder = $builder
                    .with_http()
                    .with_endpoint(&otlp.endpoint)
                    .with_timeout(otlp.timeout)
                    .with_http_client(Client {
                        inner: http_client(otlp)?,
                        cause: Arc::clone(&cause),
                    })
                    .with_headers(otlp.headers.iter().cloned().collect());
                if otlp.gzip {
                    builder = builder.with_compression(Compression::Gzip);
                }
                builder.build()
            }
            Protocol::Grpc => {
                let mut builder = $builder
                    .with_tonic()
                    .with_endpoint(&otlp.endpoint)
                    .with_timeout(otlp.timeout)
                    .with_metadata(metadata(otlp));
                if otlp.gzip {
                    builder = builder.with_compression(Compression::Gzip);
                }
                if otlp.endpoint.starts_with("https:") {
                    builder = builder.with_tls_config(grpc_tls(otlp)?);
                }
                builder.build()
            }
        };
        built.map(|exporter| (exporter, cause)).map_err(|error| problem(otlp, error))
    }};
}

pub(crate) fn spans(otlp: &Otlp) -> Built<SpanExporter> {
    configured!(SpanExporter::builder(), otlp)
}

pub(crate) fn metrics(otlp: &Otlp, temporality: Temporality) -> Built<MetricExporter> {
    configured!(MetricExporter::builder().with_temporality(temporality), otlp)
}

pub(crate) fn logs(otlp: &Otlp) -> Built<LogExporter> {
    configured!(LogExporter::builder(), otlp)
}

fn problem(otlp: &Otlp, error: ExporterBuildError) -> Problem {
    let text = error.to_string();
    Problem {
        variable: otlp.endpoint_variable.clone(),
        value: crate::redact::redact(&otlp.endpoint).into_owned(),
        expected: format!("a usable collector ({})", crate::redact::redact(&text)),
    }
}

/// An HTTP client that stores why a request got no answer, because the exporter hides that.
#[derive(Debug)]
struct Client {
    inner: reqwest::blocking::Client,
    cause: Arc<Cause>,
}

#[async_trait::async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let result = self.inner.send_bytes(request).await;
        self.cause.set(result.as_ref().err().and_then(|error| reason(error.as_ref())));
        result
    }
}

/// The causes below "error sending request for url (...)".
fn reason(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut texts = Vec::new();
    let mut next = error.source();
    while let Some(cause) = next {
        texts.push(cause.to_string());
        next = cause.source();
    }
    (!texts.is_empty()).then(|| texts.join(": "))
}

fn http_client(otlp: &Otlp) -> Result<reqwest::blocking::Client, Problem> {
    let mut builder = reqwest::blocking::Client::builder().timeout(otlp.timeout);
    if let Some(file) = &otlp.certificate {
        let roots = reqwest::Certificate::from_pem_bundle(&pem::authorities(file)?);
        builder = builder.tls_certs_only(roots.map_err(|_| pem::no_authorities(file))?);
    }
    if let Some(identity) = pem::identity(otlp)? {
        let both = [identity.certificate, b"\n".to_vec(), identity.key].concat();
        let both = reqwest::Identity::from_pem(&both).map_err(|_| identity.problem)?;
        builder = builder.identity(both);
    }
    let failed = |error: String| Problem {
        variable: otlp.endpoint_variable.clone(),
        value: crate::redact::redact(&otlp.endpoint).into_owned(),
        expected: format!("an HTTP client that can be built ({error})"),
    };
    std::thread::Builder::new()
        .name("otlp-client".into())
        .spawn(move || builder.build())
        .map_err(|error| failed(error.to_string()))?
        .join()
        .map_err(|_| failed("it panicked".into()))?
        .map_err(|error| failed(error.to_string()))
}

fn grpc_tls(otlp: &Otlp) -> Result<ClientTlsConfig, Problem> {
    let mut tls = ClientTlsConfig::new();
    tls = match &otlp.certificate {
        Some(file) => tls.ca_certificate(Certificate::from_pem(pem::authorities(file)?)),
        None => tls.with_enabled_roots(),
    };
    if let Some(identity) = pem::identity(otlp)? {
        tls = tls.identity(Identity::from_pem(identity.certificate, identity.key));
    }
    Ok(tls)
}

fn metadata(otlp: &Otlp) -> MetadataMap {
    let headers = otlp.headers.iter().filter_map(|(name, value)| {
        let name = http::HeaderName::from_bytes(name.as_bytes()).ok()?;
        Some((name, http::HeaderValue::from_str(value).ok()?))
    });
    MetadataMap::from_headers(headers.collect())
}
