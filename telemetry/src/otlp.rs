//! Builds OTLP exporters from [`Otlp`] settings.
//!
//! HTTP uses the blocking client, which works on the SDK's own threads; it is built on a plain thread, as it
//! must not be on an async one. gRPC must be built inside the tokio runtime and always gets TLS roots: the
//! exporter's own default has none and would trust nobody. Certificates are read here, once.

use crate::env::{Otlp, Problem, Protocol};
use opentelemetry_otlp::{
    Compression, ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithExportConfig,
    WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::metrics::Temporality;
use std::{path::Path, path::PathBuf};
use tonic::{
    metadata::MetadataMap,
    transport::{Certificate, ClientTlsConfig, Identity},
};

/// Why an exporter could not be built.
type Built<E> = Result<E, Problem>;

// The four builders share traits, not a type; a macro is the shortest honest way to say it once.
macro_rules! configured {
    ($builder:expr, $otlp:expr) => {{
        let otlp: &Otlp = $otlp;
        let built = match otlp.protocol {
            Protocol::Http => {
                let mut builder = $builder
                    .with_http()
                    .with_endpoint(&otlp.endpoint)
                    .with_timeout(otlp.timeout)
                    .with_http_client(http_client(otlp)?)
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
        built.map_err(|error| problem(otlp, error))
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

fn variable(otlp: &Otlp) -> String {
    format!("OTEL_{}_EXPORTER", otlp.signal.name().to_ascii_uppercase())
}

fn problem(otlp: &Otlp, error: ExporterBuildError) -> Problem {
    let text = error.to_string();
    Problem {
        variable: variable(otlp),
        value: crate::redact::redact(&otlp.endpoint).into_owned(),
        expected: format!("a usable collector ({})", crate::redact::redact(&text)),
    }
}

fn read(file: &(String, PathBuf)) -> Built<Vec<u8>> {
    let (variable, path) = file;
    std::fs::read(path)
        .map_err(|error| bad_file(variable, path, &format!("a readable file ({error})")))
}

fn bad_file(variable: &str, path: &Path, expected: &str) -> Problem {
    Problem {
        variable: variable.into(),
        value: path.display().to_string(),
        expected: expected.into(),
    }
}

/// Certificate and key, both or none (the settings see to that).
fn identity(otlp: &Otlp) -> Built<Option<(Vec<u8>, Vec<u8>)>> {
    match (&otlp.client_certificate, &otlp.client_key) {
        (Some(certificate), Some(key)) => Ok(Some((read(certificate)?, read(key)?))),
        _ => Ok(None),
    }
}

fn http_client(otlp: &Otlp) -> Built<reqwest::blocking::Client> {
    let mut builder = reqwest::blocking::Client::builder().timeout(otlp.timeout);
    if let Some(file) = &otlp.certificate {
        let roots = reqwest::Certificate::from_pem_bundle(&read(file)?)
            .ok()
            .filter(|roots| !roots.is_empty())
            .ok_or_else(|| bad_file(&file.0, &file.1, "PEM certificates"))?;
        builder = builder.tls_certs_only(roots);
    }
    if let (Some((mut pem, key)), Some((name, path))) = (identity(otlp)?, &otlp.client_certificate)
    {
        pem.push(b'\n');
        pem.extend(key);
        let identity = reqwest::Identity::from_pem(&pem)
            .map_err(|_| bad_file(name, path, "a PEM certificate and its key"))?;
        builder = builder.identity(identity);
    }
    let failed = |error: String| Problem {
        variable: variable(otlp),
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

fn grpc_tls(otlp: &Otlp) -> Built<ClientTlsConfig> {
    let mut tls = ClientTlsConfig::new();
    tls = match &otlp.certificate {
        Some(file) => tls.ca_certificate(Certificate::from_pem(read(file)?)),
        None => tls.with_enabled_roots(),
    };
    if let Some((certificate, key)) = identity(otlp)? {
        tls = tls.identity(Identity::from_pem(certificate, key));
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
