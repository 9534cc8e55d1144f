//! Sent telemetry arrives, and nobody waits for a collector (P9).

use super::{
    collector::{Collector, dead, hanging},
    *,
};
use opentelemetry_proto::tonic::{
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, TracesData},
};
use std::time::Instant;
use std::{fs, path::Path};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
        server::WebPkiClientVerifier,
    },
};

const LONG: Duration = Duration::from_secs(30);

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let value = attributes.iter().find(|a| a.key == key)?.value.clone()?.value?;
    match value {
        Value::StringValue(text) => Some(text),
        other => Some(format!("{other:?}")),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Every span, with the name of its tracer.
fn spans(collector: &Collector) -> Vec<(String, Span)> {
    let mut all = Vec::new();
    for request in collector.traces() {
        let data = TracesData { resource_spans: request.resource_spans };
        for resource in data.resource_spans {
            for scope in resource.scope_spans {
                let name = scope.scope.unwrap().name;
                all.extend(scope.spans.into_iter().map(|s| (name.clone(), s)));
            }
        }
    }
    all
}

fn span<'a>(all: &'a [(String, Span)], name: &str) -> &'a (String, Span) {
    all.iter().find(|(_, s)| s.name == name).unwrap_or_else(|| panic!("no span {name} in {all:?}"))
}

/// Does some work in spans; returns the trace id.
fn work(dispatch: &Dispatch) -> String {
    tracing::dispatcher::with_default(dispatch, || {
        let outer = tracing::info_span!("outer", bytes = 7).entered();
        let id = current_trace_id().unwrap();
        tracing::info_span!("inner").in_scope(|| tracing::error!("it failed"));
        tracing::info_span!(target: "h2::client", "noise").in_scope(|| {});
        drop(outer);
        id
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spans_arrive_over_http_with_headers_and_resource() {
    let collector = Collector::http(None).await;
    let endpoint = format!("http://127.0.0.1:{}", collector.port);
    let (telemetry, dispatch, _) = built(
        false,
        &[
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a%20b"),
            ("OTEL_METRICS_EXPORTER", "none"),
            ("OTEL_RESOURCE_ATTRIBUTES", "site=Z%C3%BCrich"),
            ("POD_NAME", "pod-0"),
        ],
    );
    let trace = work(&dispatch);
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);

    let all = spans(&collector);
    let names: Vec<_> = all.iter().map(|(_, s)| s.name.as_str()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    let (scope, outer) = span(&all, "outer");
    let (_, inner) = span(&all, "inner");
    assert_eq!(scope, "klio");
    assert_eq!(hex(&outer.trace_id), trace);
    assert_eq!(inner.trace_id, outer.trace_id);
    assert_eq!(inner.parent_span_id, outer.span_id);
    assert_eq!(inner.status.as_ref().unwrap().code, 2, "an error event makes status ERROR");
    assert_eq!(text(&outer.attributes, "bytes").as_deref(), Some("IntValue(7)"));

    let requests = collector.requests();
    assert!(requests.iter().all(|r| r.header("x-tenant") == Some("a b")));
    let resource = collector.traces()[0].resource_spans[0].resource.clone().unwrap().attributes;
    for (key, value) in [
        ("service.name", "klio-test"),
        ("service.version", "1.2.3"),
        ("site", "Zürich"),
        ("k8s.pod.name", "pod-0"),
        ("telemetry.sdk.language", "rust"),
    ] {
        assert_eq!(text(&resource, key).as_deref(), Some(value), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backup_spans_come_from_their_own_tracer() {
    let collector = Collector::http(None).await;
    let endpoint = format!("http://127.0.0.1:{}/v1/traces", collector.port);
    let (telemetry, dispatch, _) =
        built(false, &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint)]);
    tracing::dispatcher::with_default(&dispatch, || {
        let _backup = tracing::info_span!("backup", "backup.name" = "b1").entered();
        tracing::info_span!("backup_run").in_scope(|| {});
        tracing::info_span!("upload").in_scope(|| {});
    });
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    let all = spans(&collector);
    for (name, tracer) in
        [("backup", "klio.backup"), ("backup_run", "klio.backup"), ("upload", "klio")]
    {
        let (scope, span) = span(&all, name);
        assert_eq!(scope, tracer, "{name}");
        assert_eq!(span.trace_id, all[0].1.trace_id);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signals_endpoint_is_used_as_it_is_and_bodies_are_compressed() {
    let collector = Collector::http(None).await;
    let endpoint = format!("http://127.0.0.1:{}/own/path", collector.port);
    let (telemetry, dispatch, _) = built(
        false,
        &[
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ],
    );
    work(&dispatch);
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    let request = &collector.requests()[0];
    assert_eq!(request.path, "/own/path");
    assert_eq!(request.header("content-encoding"), Some("gzip"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_recording_reaches_every_metrics_reader() {
    let collector = Collector::http(None).await;
    let endpoint = format!("http://127.0.0.1:{}", collector.port);
    let (telemetry, _, _) = built(
        false,
        &[
            ("OTEL_METRICS_EXPORTER", "otlp,prometheus"),
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ],
    );
    let counter = telemetry.meter().u64_counter("klio.wal.written").build();
    counter.add(3, &[opentelemetry::KeyValue::new("cluster_name", "pg-1")]);
    let page = telemetry.prometheus().unwrap().render();
    assert!(page.contains("klio_wal_written_total{cluster_name=\"pg-1\"} 3"), "{page}");
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    let sent = format!("{:?}", collector.metrics());
    assert!(sent.contains("\"klio.wal.written\"") && sent.contains("AsInt(3)"), "{sent}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exported_log_records_carry_the_trace_id() {
    let collector = Collector::http(None).await;
    let endpoint = format!("http://127.0.0.1:{}", collector.port);
    let (telemetry, dispatch, _) = built(
        false,
        &[
            ("OTEL_LOGS_EXPORTER", "otlp"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", &format!("{endpoint}/v1/logs")),
        ],
    );
    let trace = work(&dispatch);
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    let records = &collector.logs()[0].resource_logs[0].scope_logs[0].log_records;
    assert_eq!(records.len(), 1);
    assert_eq!(hex(&records[0].trace_id), trace);
    assert_eq!(records[0].severity_text, "ERROR");
}

struct Authority {
    directory: tempfile::TempDir,
    server_pem: String,
    server_key: rcgen::KeyPair,
    ca_pem: String,
}

impl Authority {
    fn path(&self, name: &str) -> String {
        Path::join(self.directory.path(), name).to_str().unwrap().to_owned()
    }
}

/// A CA, a server certificate for localhost, and ca.pem, client.pem, client.key in a directory.
fn authority() -> Authority {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let signed = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &issuer).unwrap().pem(), key)
    };
    let (server_pem, server_key) = signed("localhost");
    let (client_pem, client_key) = signed("client");
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("ca.pem"), &ca_pem).unwrap();
    fs::write(directory.path().join("client.pem"), client_pem).unwrap();
    fs::write(directory.path().join("client.key"), client_key.serialize_pem()).unwrap();
    Authority { directory, server_pem, server_key, ca_pem }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn grpc_with_a_private_authority_and_a_client_certificate_delivers() {
    let a = authority();
    let tls = tonic::transport::ServerTlsConfig::new()
        .identity(tonic::transport::Identity::from_pem(&a.server_pem, a.server_key.serialize_pem()))
        .client_ca_root(tonic::transport::Certificate::from_pem(&a.ca_pem));
    let collector = Collector::grpc(Some(tls)).await;
    let (telemetry, dispatch, _) = built(
        false,
        &[
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("localhost:{}", collector.port)),
            ("OTEL_METRICS_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", &a.path("ca.pem")),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", &a.path("client.pem")),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", &a.path("client.key")),
        ],
    );
    let trace = work(&dispatch);
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    let all = spans(&collector);
    assert_eq!(hex(&span(&all, "outer").1.trace_id), trace);
    assert_eq!(collector.requests()[0].header("x-tenant"), Some("a"));
}

fn https(a: &Authority) -> TlsAcceptor {
    let certificate = |pem: &str| der(pem);
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&a.ca_pem)).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(a.server_key.serialize_der()));
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate(&a.server_pem)], key)
        .unwrap();
    TlsAcceptor::from(Arc::new(config))
}

fn der(pem: &str) -> tokio_rustls::rustls::pki_types::CertificateDer<'static> {
    use tokio_rustls::rustls::pki_types::pem::PemObject;
    tokio_rustls::rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn https_with_a_private_authority_and_a_client_certificate_delivers() {
    let a = authority();
    let collector = Collector::http(Some(https(&a))).await;
    let endpoint = format!("https://localhost:{}", collector.port);
    let (ca, certificate, key) = (a.path("ca.pem"), a.path("client.pem"), a.path("client.key"));
    let mut variables = vec![
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_METRICS_EXPORTER", "none"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", ca.as_str()),
        ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", certificate.as_str()),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", key.as_str()),
    ];
    let (telemetry, dispatch, _) = built(false, &variables);
    work(&dispatch);
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    assert_eq!(spans(&collector).len(), 2);

    variables.truncate(3);
    let (telemetry, dispatch, _) = built(false, &variables);
    work(&dispatch);
    let untrusted = telemetry.close(LONG).await.overall();
    assert_eq!(untrusted, Delivery::Pending, "without the authority nothing is trusted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_certificate_is_a_problem_and_the_rest_works() {
    let (telemetry, dispatch, problems, lines) = tried(
        false,
        &[
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:1"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/does/not/exist.pem"),
        ],
    );
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert_eq!(problems[0].variable, "OTEL_EXPORTER_OTLP_CERTIFICATE");
    assert_eq!(problems[0].value, "/does/not/exist.pem");
    work(&dispatch);
    assert!(lines.text().contains("it failed"));
    assert!(telemetry.prometheus().is_some());
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Nothing);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_or_hanging_collector_delays_the_end_by_no_more_than_the_timeout() {
    let (hang, _tasks) = hanging().await;
    for (port, protocol) in [
        (dead().await, "http/protobuf"),
        (dead().await, "grpc"),
        (hang, "http/protobuf"),
        (hang, "grpc"),
    ] {
        let (telemetry, dispatch, _) = built(
            false,
            &[
                ("OTEL_TRACES_EXPORTER", "otlp"),
                ("OTEL_METRICS_EXPORTER", "otlp"),
                ("OTEL_LOGS_EXPORTER", "otlp"),
                ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
                ("OTEL_EXPORTER_OTLP_ENDPOINT", &format!("http://127.0.0.1:{port}")),
            ],
        );
        work(&dispatch);
        let begin = Instant::now();
        let bound = Duration::from_millis(700);
        let delivery = telemetry.close(bound).await.overall();
        let took = begin.elapsed();
        assert_eq!(delivery, Delivery::Pending, "{protocol}");
        // Room for a busy machine, far below the exporters' own ten seconds.
        assert!(took < bound + Duration::from_secs(2), "{protocol}: {took:?}");
    }
}

#[test]
fn a_failing_collector_is_reported_once_and_its_return_once() {
    use opentelemetry_sdk::{error::OTelSdkError, trace::SpanExporter};
    #[derive(Debug)]
    struct Flaky(Mutex<Vec<bool>>);
    impl SpanExporter for Flaky {
        async fn export(
            &self,
            _: Vec<opentelemetry_sdk::trace::SpanData>,
        ) -> opentelemetry_sdk::error::OTelSdkResult {
            match self.0.lock().unwrap().remove(0) {
                true => Ok(()),
                false => Err(OTelSdkError::InternalFailure("http://u:hunter2@c refused".into())),
            }
        }
    }
    let (_, dispatch, lines) = built(false, &[]);
    let variables = [("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://u:hunter2@c:4318")];
    let (settings, _) = env::parse(&|name| {
        variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
    });
    let health = Health::new(&settings.traces.otlp.unwrap(), Arc::default());
    let outcomes = vec![false, false, false, true, true, false];
    let exporter = watch::Watched::new(Flaky(Mutex::new(outcomes)), Arc::clone(&health));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    tracing::dispatcher::with_default(&dispatch, || {
        for _ in 0..6 {
            drop(runtime.block_on(exporter.export(Vec::new())));
        }
    });
    let text = lines.text();
    assert_eq!(text.matches("cannot deliver telemetry").count(), 2, "{text}");
    assert_eq!(text.matches("delivered again").count(), 1, "{text}");
    assert!(!text.contains("hunter2"), "{text}");
    assert_eq!(health.last(), Last::Failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unsampled_trace_is_not_sent_but_its_lines_have_ids() {
    let collector = Collector::http(None).await;
    let endpoint = format!("http://127.0.0.1:{}/v1/traces", collector.port);
    let (telemetry, dispatch, lines) = built(
        false,
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint), ("OTEL_TRACES_SAMPLER", "always_off")],
    );
    let trace = work(&dispatch);
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Nothing);
    assert!(collector.requests().is_empty());
    let text = lines.text();
    assert!(text.contains(&format!("trace_id={trace} ")), "{text}");
    assert!(text.contains("trace_flags=00"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_drops_spans_with_one_warning_and_delays_nobody() {
    let (port, _tasks) = hanging().await;
    let (telemetry, dispatch, lines) = built(
        false,
        &[
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &format!("http://127.0.0.1:{port}/v1/traces")),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "4"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
        ],
    );
    let begin = Instant::now();
    tracing::dispatcher::with_default(&dispatch, || {
        (0..1000).for_each(|_| tracing::info_span!("many").in_scope(|| {}));
    });
    let took = begin.elapsed();
    // A single export would hang for ten seconds.
    assert!(took < Duration::from_secs(5), "{took:?}");
    let text = lines.text();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("SpanDroppingStarted"), "{text}");
    assert_eq!(telemetry.close(Duration::from_millis(100)).await.overall(), Delivery::Pending);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_collector_gets_everything_if_there_is_time() {
    let collector = Collector::slow(Duration::from_millis(300)).await;
    let endpoint = format!("http://127.0.0.1:{}/v1/traces", collector.port);
    let (telemetry, dispatch, _) = built(
        false,
        &[
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", &endpoint),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "1000"),
            // One request a span: six seconds, more than the SDK gives a shutdown by default.
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
        ],
    );
    let all = 20;
    tracing::dispatcher::with_default(&dispatch, || {
        (0..all).for_each(|_| tracing::info_span!("many").in_scope(|| {}));
    });
    assert_eq!(telemetry.close(LONG).await.overall(), Delivery::Delivered);
    assert_eq!(spans(&collector).len(), all);
}
