//! The table.

use super::{
    Row,
    see::See::{self, *},
};
use klio_tests::otlp::Signal::{Logs, Metrics, Traces};

const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http}");
const GRPC: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
const TRACES_ONLY: (&str, &str) = ("OTEL_METRICS_EXPORTER", "none");
const LOGS_TOO: (&str, &str) = ("OTEL_LOGS_EXPORTER", "otlp");
const PARENT: (&str, &str) =
    ("TEST_PARENT", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
const UNSAMPLED: (&str, &str) =
    ("TEST_PARENT", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00");
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT_SPAN: &str = "b7ad6b7169203331";
/// A bound that is small beside the ten seconds a request may take.
const SOON: (&str, &str) = ("TEST_FLUSH", "1500");

const fn row(
    what: &'static str,
    variables: &'static [(&'static str, &'static str)],
    sees: &'static [See],
) -> Row {
    Row { what, variables, sees }
}

pub const ROWS: &[Row] = &[
    // Nothing, all off, and what an endpoint alone means.
    row(
        "nothing set: nothing is collected, no thread is started",
        &[],
        &[
            Says("child: threads=0"),
            Says("traces=Nothing metrics=Nothing logs=Nothing"),
            PrintsNothing,
            Says(" trace_id="),
            SaysNot("\u{1b}["),
            SaysNot("child: carrier"),
        ],
    ),
    row(
        "empty variables are unset ones",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
            ("OTEL_TRACES_EXPORTER", ""),
            ("OTEL_RESOURCE_DETECTORS", ""),
            ("OTEL_EXPORTER_OTLP_HEADERS", ""),
            ("KLIO_LOG_FORMAT", ""),
        ],
        &[Says("child: threads=0"), PrintsNothing],
    ),
    row(
        "an endpoint alone: traces and metrics, no logs, http/protobuf, nothing compressed",
        &[ENDPOINT],
        &[
            Got("http", Traces, "/v1/traces"),
            Got("http", Metrics, "/v1/metrics"),
            Nothing(Logs),
            Header(Traces, "content-type", "application/x-protobuf"),
            NoHeader(Traces, "content-encoding"),
            Spans("work", 1, 1),
            Says("traces=Delivered metrics=Delivered logs=Nothing"),
        ],
    ),
    row(
        "OTEL_SDK_DISABLED turns all off",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_TRACES_EXPORTER", "otlp,console"),
            ("OTEL_METRICS_EXPORTER", "otlp,prometheus,console"),
            ("OTEL_SDK_DISABLED", "true"),
        ],
        &[Silent("http"), PrintsNothing, Says("child: threads=0"), SaysNot("child: page=")],
    ),
    row(
        "OTEL_SDK_DISABLED is false by any other word",
        &[ENDPOINT, ("OTEL_SDK_DISABLED", "1")],
        &[Got("http", Traces, "/v1/traces"), Warning("OTEL_SDK_DISABLED", "1", "true, false")],
    ),
    // Exporters.
    row(
        "none is none, also with an endpoint",
        &[
            ENDPOINT,
            ("OTEL_TRACES_EXPORTER", "none"),
            ("OTEL_METRICS_EXPORTER", "none"),
            ("OTEL_LOGS_EXPORTER", "none"),
        ],
        &[Silent("http"), PrintsNothing],
    ),
    row(
        "all three over http",
        &[ENDPOINT, LOGS_TOO, ("OTEL_TRACES_EXPORTER", "otlp"), ("OTEL_METRICS_EXPORTER", "otlp")],
        &[
            Got("http", Traces, "/v1/traces"),
            Got("http", Metrics, "/v1/metrics"),
            Got("http", Logs, "/v1/logs"),
            Says("traces=Delivered metrics=Delivered logs=Delivered"),
        ],
    ),
    row(
        "all three over grpc, in a runtime of one thread as klio's",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc}"),
            GRPC,
            LOGS_TOO,
            ("TEST_ONE_THREAD", "1"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_METRICS_EXPORTER", "otlp"),
        ],
        &[
            Got("grpc", Traces, ""),
            Got("grpc", Metrics, ""),
            Got("grpc", Logs, ""),
            Says("traces=Delivered metrics=Delivered logs=Delivered"),
        ],
    ),
    row(
        "console is standard output",
        &[
            ("OTEL_TRACES_EXPORTER", "console"),
            ("OTEL_METRICS_EXPORTER", "console"),
            ("OTEL_LOGS_EXPORTER", "console"),
        ],
        &[Prints("work"), Prints("klio.test.things"), Prints("inside")],
    ),
    row(
        "lists: otlp and console side by side",
        &[
            ENDPOINT,
            ("OTEL_TRACES_EXPORTER", "otlp,console"),
            ("OTEL_METRICS_EXPORTER", " console , otlp "),
            ("OTEL_LOGS_EXPORTER", "console,otlp"),
        ],
        &[
            Prints("work"),
            Prints("klio.test.things"),
            Prints("inside"),
            Got("http", Traces, "/v1/traces"),
            Got("http", Metrics, "/v1/metrics"),
            Got("http", Logs, "/v1/logs"),
        ],
    ),
    row(
        "prometheus and otlp at once from one set of instruments",
        &[
            ENDPOINT,
            ("OTEL_METRICS_EXPORTER", "prometheus,otlp"),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", "{free}"),
        ],
        &[
            Says("klio_test_things_total{cluster_name=\"pg-1\"} 3"),
            Got("http", Metrics, "/v1/metrics"),
            Temporality("ccc"),
        ],
    ),
    row(
        "prometheus is at localhost:9464",
        &[("OTEL_METRICS_EXPORTER", "prometheus"), ("TEST_NO_BIND", "1")],
        &[Says("child: page=localhost:9464"), PrintsNothing],
    ),
    row(
        "prometheus is where its variables say",
        &[
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1"),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", "{free}"),
        ],
        &[Says("child: page=127.0.0.1:"), SaysNot(":9464")],
    ),
    row(
        "a port that is none",
        &[
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", "http"),
            ("TEST_NO_BIND", "1"),
        ],
        &[
            Says("child: page=localhost:9464"),
            Warning("OTEL_EXPORTER_PROMETHEUS_PORT", "http", "a port number"),
        ],
    ),
    row(
        "a port that is taken",
        &[
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1"),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", "{taken}"),
        ],
        &[Says("inside"), Warning("OTEL_EXPORTER_PROMETHEUS_PORT", "", "a port that is free")],
    ),
    row(
        "unknown exporters",
        &[
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_METRICS_EXPORTER", "statsd"),
            ("OTEL_LOGS_EXPORTER", "console,syslog"),
        ],
        &[
            Prints("inside"),
            Warning("OTEL_TRACES_EXPORTER", "zipkin", "otlp, console, none"),
            Warning("OTEL_METRICS_EXPORTER", "statsd", "otlp, prometheus, console, none"),
            Warning("OTEL_LOGS_EXPORTER", "syslog", "otlp, console, none"),
        ],
    ),
    // Endpoints.
    row(
        "/v1/<signal> is appended to the general endpoint, whatever its path",
        &[("OTEL_EXPORTER_OTLP_ENDPOINT", "{http}/base/"), LOGS_TOO],
        &[
            Got("http", Traces, "/base/v1/traces"),
            Got("http", Metrics, "/base/v1/metrics"),
            Got("http", Logs, "/base/v1/logs"),
        ],
    ),
    row(
        "a signal's own endpoint wins and is used as it is",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!b}"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http}/own"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "{http}/x/metrics"),
        ],
        &[Got("http", Traces, "/own"), Got("http", Metrics, "/x/metrics"), Silent("http!b")],
    ),
    row(
        "a signal's own endpoint without a path is the root",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http}")],
        &[Got("http", Traces, "/"), Nothing(Metrics)],
    ),
    row(
        "the endpoint of logs, which it does not switch on",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!b}"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "{http}/my/logs"),
            LOGS_TOO,
        ],
        &[Got("http", Logs, "/my/logs"), Got("http!b", Traces, "/v1/traces")],
    ),
    row(
        "the endpoint of logs alone switches nothing on",
        &[("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "{http}/v1/logs")],
        &[Silent("http"), Says("child: threads=0")],
    ),
    row(
        "an endpoint that is none sends nothing anywhere",
        &[("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere at all"), LOGS_TOO],
        &[
            Says("traces=Nothing metrics=Nothing logs=Nothing"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "nowhere at all", "http://collector:4318"),
        ],
    ),
    row(
        "http wants a scheme",
        &[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")],
        &[Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "http://collector:4318")],
    ),
    // Protocol.
    row(
        "a signal's own protocol wins",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc}"),
        ],
        &[
            Got("grpc", Traces, ""),
            Got("http", Metrics, "/v1/metrics"),
            Got("http", Logs, "/v1/logs"),
        ],
    ),
    row(
        "the protocol of metrics and of logs, over a general one",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc}"),
            GRPC,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "{http}/v1/metrics"),
            ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "{http}/v1/logs"),
        ],
        &[
            Got("grpc", Traces, ""),
            Got("http", Metrics, "/v1/metrics"),
            Got("http", Logs, "/v1/logs"),
        ],
    ),
    row(
        "an unknown protocol means http/protobuf",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
        &[
            Got("http", Traces, "/v1/traces"),
            Warning("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf, grpc"),
        ],
    ),
    // Headers.
    row(
        "headers, percent-encoded, over http: each once",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a%20b, authorization=Bearer%20s3cr3t"),
        ],
        &[
            Header(Traces, "x-tenant", "a b"),
            Header(Metrics, "x-tenant", "a b"),
            Header(Logs, "authorization", "Bearer s3cr3t"),
            SaysNot("s3cr3t"),
        ],
    ),
    row(
        "headers over grpc: each once",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc}"),
            GRPC,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=a%20b"),
        ],
        &[
            Header(Traces, "x-tenant", "a b"),
            Header(Metrics, "x-tenant", "a b"),
            Header(Logs, "x-tenant", "a b"),
        ],
    ),
    row(
        "a signal's own headers take the place of the general ones, over http",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=general"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-own=1"),
            ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "x-tenant=m"),
            ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", ""),
        ],
        &[
            Header(Traces, "x-own", "1"),
            NoHeader(Traces, "x-tenant"),
            Header(Metrics, "x-tenant", "m"),
            Header(Logs, "x-tenant", "general"),
        ],
    ),
    row(
        "a signal's own headers over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc}"),
            GRPC,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=general"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-own=1"),
            ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "x-tenant=l"),
        ],
        &[
            Header(Traces, "x-own", "1"),
            NoHeader(Traces, "x-tenant"),
            Header(Metrics, "x-tenant", "general"),
            Header(Logs, "x-tenant", "l"),
        ],
    ),
    row(
        "headers that are none are left out, and not shown",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2,x-good=1")],
        &[
            Header(Traces, "x-good", "1"),
            Warning("OTEL_EXPORTER_OTLP_HEADERS", "***", "name=value"),
            SaysNot("hunter2"),
        ],
    ),
    // Compression.
    row(
        "gzip over http",
        &[ENDPOINT, LOGS_TOO, ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")],
        &[
            Header(Traces, "content-encoding", "gzip"),
            Header(Metrics, "content-encoding", "gzip"),
            Header(Logs, "content-encoding", "gzip"),
            Spans("work", 1, 1),
        ],
    ),
    row(
        "gzip over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc}"),
            GRPC,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ],
        &[
            Header(Traces, "grpc-encoding", "gzip"),
            Header(Metrics, "grpc-encoding", "gzip"),
            Header(Logs, "grpc-encoding", "gzip"),
            Spans("work", 1, 1),
        ],
    ),
    row(
        "a signal's own compression wins: none over gzip",
        &[
            ENDPOINT,
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "none"),
        ],
        &[NoHeader(Traces, "content-encoding"), Header(Metrics, "content-encoding", "gzip")],
    ),
    row(
        "a signal's own compression wins: gzip over none",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "none"),
            ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_LOGS_COMPRESSION", "gzip"),
        ],
        &[
            NoHeader(Traces, "content-encoding"),
            Header(Metrics, "content-encoding", "gzip"),
            Header(Logs, "content-encoding", "gzip"),
        ],
    ),
    row(
        "an unknown compression is none",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_COMPRESSION", "lzma")],
        &[
            NoHeader(Traces, "content-encoding"),
            Warning("OTEL_EXPORTER_OTLP_COMPRESSION", "lzma", "gzip, none"),
        ],
    ),
    // Timeouts: a flush of eight seconds ends soon only if the request's own bound is heeded.
    row(
        "the bound on a request, over http",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!hang}"),
            TRACES_ONLY,
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "200"),
            ("TEST_FLUSH", "8000"),
        ],
        &[
            Says("quick=true"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:", "OTLP over http/protobuf"),
        ],
    ),
    row(
        "the bound on a request, over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc!hang}"),
            GRPC,
            TRACES_ONLY,
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "200"),
            ("TEST_FLUSH", "8000"),
        ],
        &[
            Says("quick=true"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:", "OTLP over grpc"),
        ],
    ),
    row(
        "a signal's own bound wins",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!hang}"),
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "60000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "200"),
            ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "200"),
            ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "200"),
            ("TEST_FLUSH", "8000"),
        ],
        &[
            Says("quick=true"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "signal=\"traces\""),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "signal=\"metrics\""),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "signal=\"logs\""),
        ],
    ),
    row(
        "a bound that is none",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s")],
        &[
            Got("http", Traces, "/v1/traces"),
            Warning("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "milliseconds"),
        ],
    ),
    row(
        "the processors' own bounds on an export",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!hang}"),
            LOGS_TOO,
            ("OTEL_BSP_EXPORT_TIMEOUT", "200"),
            ("OTEL_BLRP_EXPORT_TIMEOUT", "200"),
            ("OTEL_METRIC_EXPORT_TIMEOUT", "200"),
            ("TEST_FLUSH", "8000"),
        ],
        &[
            Says("quick=true"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "signal=\"traces\""),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "signal=\"metrics\""),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://", "signal=\"logs\""),
        ],
    ),
    // TLS.
    row(
        "an address without scheme means TLS over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs@host}"),
            GRPC,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{ca.pem}"),
        ],
        &[Got("grpcs", Traces, ""), Got("grpcs", Metrics, ""), Got("grpcs", Logs, "")],
    ),
    row(
        "an address without scheme and INSECURE",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc@host}"),
            GRPC,
            ("OTEL_EXPORTER_OTLP_INSECURE", "true"),
        ],
        &[Got("grpc", Traces, ""), Got("grpc", Metrics, "")],
    ),
    row(
        "INSECURE says nothing about an address with scheme",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs}"),
            GRPC,
            ("OTEL_EXPORTER_OTLP_INSECURE", "true"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{ca.pem}"),
        ],
        &[Got("grpcs", Traces, "")],
    ),
    row(
        "a signal's own INSECURE wins",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc@host}"),
            GRPC,
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_INSECURE", "false"),
            ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "true"),
            ("OTEL_EXPORTER_OTLP_METRICS_INSECURE", "true"),
            ("OTEL_EXPORTER_OTLP_LOGS_INSECURE", "true"),
        ],
        &[Got("grpc", Traces, ""), Got("grpc", Metrics, ""), Got("grpc", Logs, "")],
    ),
    row(
        "a private authority over https",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https}"),
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{ca.pem}"),
        ],
        &[
            Got("https", Traces, "/v1/traces"),
            Got("https", Metrics, "/v1/metrics"),
            Got("https", Logs, "/v1/logs"),
        ],
    ),
    row(
        "a client certificate over https",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https-mutual}"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "{client.pem}"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "{client.key}"),
        ],
        &[Got("https-mutual", Traces, "/v1/traces"), Got("https-mutual", Metrics, "/v1/metrics")],
    ),
    row(
        "a client certificate over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs-mutual}"),
            GRPC,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "{client.pem}"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "{client.key}"),
        ],
        &[Got("grpcs-mutual", Traces, ""), Got("grpcs-mutual", Metrics, "")],
    ),
    row(
        "no client certificate where one is wanted, over https",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https-mutual}"),
            TRACES_ONLY,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
        ],
        &[
            Silent("https-mutual"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:", "OTLP over http/protobuf"),
        ],
    ),
    row(
        "no client certificate where one is wanted, over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs-mutual}"),
            GRPC,
            TRACES_ONLY,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
        ],
        &[
            Silent("grpcs-mutual"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:", "OTLP over grpc"),
        ],
    ),
    row(
        "a signal's own authority wins, over https",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https}"),
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
            ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "{ca.pem}"),
            ("OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE", "{ca.pem}"),
            ("OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", "{ca.pem}"),
        ],
        &[
            Got("https", Traces, "/v1/traces"),
            Got("https", Metrics, "/v1/metrics"),
            Got("https", Logs, "/v1/logs"),
        ],
    ),
    row(
        "a signal's own client certificate wins",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https-mutual}"),
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "{client.pem}"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "{client.key}"),
            ("OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE", "{client.pem}"),
            ("OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY", "{client.key}"),
            ("OTEL_EXPORTER_OTLP_LOGS_CLIENT_CERTIFICATE", "{client.pem}"),
            ("OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY", "{client.key}"),
        ],
        &[
            Got("https-mutual", Traces, "/v1/traces"),
            Got("https-mutual", Metrics, "/v1/metrics"),
            Got("https-mutual", Logs, "/v1/logs"),
        ],
    ),
    row(
        "the wrong authority over https",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https}"),
            TRACES_ONLY,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
        ],
        &[
            Silent("https"),
            Says("invalid peer certificate"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:", "OTLP over http/protobuf"),
        ],
    ),
    row(
        "the wrong authority over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs}"),
            GRPC,
            TRACES_ONLY,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
        ],
        &[
            Silent("grpcs"),
            Says("invalid peer certificate"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "https://localhost:", "OTLP over grpc"),
        ],
    ),
    row(
        "a file of authorities that is not there: one warning for all signals",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https}"),
            LOGS_TOO,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{absent.pem}"),
        ],
        &[
            Silent("https"),
            Warning("OTEL_EXPORTER_OTLP_CERTIFICATE", "{directory}/absent.pem", "a readable file"),
        ],
    ),
    row(
        "a file without a certificate, for grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs}"),
            GRPC,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{junk.pem}"),
        ],
        &[Warning(
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
            "junk.pem",
            "certificates of authorities in PEM",
        )],
    ),
    row(
        "a broken certificate, for http",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{https}"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{broken.pem}"),
        ],
        &[Warning(
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
            "broken.pem",
            "certificates of authorities in PEM",
        )],
    ),
    row(
        "a key that belongs to another certificate",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpcs-mutual}"),
            GRPC,
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{mutual-ca.pem}"),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "{client.pem}"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "{other.key}"),
        ],
        &[Warning(
            "OTEL_EXPORTER_OTLP_CLIENT_KEY",
            "other.key",
            "the private key of {directory}/client.pem",
        )],
    ),
    row(
        "a client certificate without its key",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "{client.pem}")],
        &[
            Got("http", Traces, "/v1/traces"),
            Warning(
                "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
                "client.pem",
                "OTEL_EXPORTER_OTLP_CLIENT_KEY beside it",
            ),
        ],
    ),
    // Resource.
    row(
        "service name and version by default",
        &[ENDPOINT, LOGS_TOO],
        &[
            Resource("service.name", "klio"),
            Resource("service.version", "1.2.3"),
            Resource("telemetry.sdk.language", "rust"),
            NoResource("host.name"),
            NoResource("process.pid"),
            NoResource("k8s.pod.name"),
        ],
    ),
    row(
        "OTEL_SERVICE_NAME over OTEL_RESOURCE_ATTRIBUTES",
        &[
            ENDPOINT,
            ("OTEL_SERVICE_NAME", "mine"),
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=weak,site=Z%C3%BCrich%2C%20west"),
        ],
        &[Resource("service.name", "mine"), Resource("site", "Zürich, west")],
    ),
    row(
        "service.name of OTEL_RESOURCE_ATTRIBUTES over the default",
        &[ENDPOINT, ("OTEL_RESOURCE_ATTRIBUTES", "service.name=theirs")],
        &[Resource("service.name", "theirs")],
    ),
    row(
        "OTEL_RESOURCE_ATTRIBUTES with a fault is left out as a whole",
        &[ENDPOINT, ("OTEL_RESOURCE_ATTRIBUTES", "site=x,novalue")],
        &[NoResource("site"), Warning("OTEL_RESOURCE_ATTRIBUTES", "", "key=value pairs")],
    ),
    row(
        "container, pod and namespace",
        &[ENDPOINT, ("CONTAINER_NAME", "sidecar"), ("POD_NAME", "pg-1"), ("NAMESPACE_NAME", "db")],
        &[
            Resource("k8s.container.name", "sidecar"),
            Resource("k8s.pod.name", "pg-1"),
            Resource("k8s.namespace.name", "db"),
        ],
    ),
    row(
        "the pod alone",
        &[ENDPOINT, ("POD_NAME", "pg-1")],
        &[
            Resource("k8s.pod.name", "pg-1"),
            NoResource("k8s.container.name"),
            NoResource("k8s.namespace.name"),
        ],
    ),
    row(
        "the namespace alone",
        &[ENDPOINT, ("NAMESPACE_NAME", "db")],
        &[Resource("k8s.namespace.name", "db"), NoResource("k8s.pod.name")],
    ),
    row(
        "the container alone",
        &[ENDPOINT, ("CONTAINER_NAME", "c")],
        &[Resource("k8s.container.name", "c"), NoResource("k8s.pod.name")],
    ),
    row(
        "never over what is given",
        &[ENDPOINT, ("POD_NAME", "weak"), ("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=given")],
        &[Resource("k8s.pod.name", "given")],
    ),
    row(
        "every detector by its name",
        &[
            ENDPOINT,
            (
                "OTEL_RESOURCE_DETECTORS",
                "telemetry.sdk,host,host.id,os.type,os.description,process.pid,process.executable.name,\
                 process.executable.path,process.command_args,process.owner,process.runtime.name,\
                 process.runtime.version,process.runtime.description,container",
            ),
        ],
        &[
            Resource("telemetry.sdk.name", "opentelemetry"),
            Resource("host.name", "*"),
            Resource("os.type", "linux"),
            Resource("os.description", "*"),
            Resource("process.pid", "*"),
            Resource("process.executable.name", "*"),
            Resource("process.executable.path", "*"),
            Resource("process.command_args", "*"),
            Resource("process.owner", "*"),
            Resource("process.runtime.name", "rust"),
            Resource("process.runtime.version", "*"),
            Resource("process.runtime.description", "*"),
        ],
    ),
    row(
        "one detector finds its fact only",
        &[ENDPOINT, ("OTEL_RESOURCE_DETECTORS", "process.owner")],
        &[
            Resource("process.owner", "*"),
            NoResource("process.pid"),
            NoResource("process.command_args"),
            NoResource("os.type"),
            NoResource("host.name"),
        ],
    ),
    row(
        "groups of detectors",
        &[ENDPOINT, ("OTEL_RESOURCE_DETECTORS", "os,process")],
        &[
            Resource("os.type", "linux"),
            Resource("os.description", "*"),
            Resource("process.pid", "*"),
            Resource("process.runtime.description", "*"),
            NoResource("host.name"),
        ],
    ),
    row(
        "an unknown detector is a warning, the others do their work",
        &[ENDPOINT, ("OTEL_RESOURCE_DETECTORS", "os.type,gcp")],
        &[Resource("os.type", "linux"), Warning("OTEL_RESOURCE_DETECTORS", "gcp", "process.owner")],
    ),
    row(
        "what is given wins over what is detected",
        &[
            ENDPOINT,
            ("OTEL_RESOURCE_DETECTORS", "os"),
            ("OTEL_RESOURCE_ATTRIBUTES", "os.type=minix"),
        ],
        &[Resource("os.type", "minix")],
    ),
    // Samplers.
    row(
        "by default every trace that does not say otherwise",
        &[ENDPOINT, UNSAMPLED, ("TEST_SPANS", "5")],
        &[Spans("work", 0, 0), Spans("many", 5, 5)],
    ),
    row(
        "always_on",
        &[ENDPOINT, UNSAMPLED, ("OTEL_TRACES_SAMPLER", "always_on")],
        &[Spans("work", 1, 1), Spans("inner", 1, 1), Continues(TRACE, PARENT_SPAN)],
    ),
    row(
        "always_off",
        &[ENDPOINT, PARENT, ("OTEL_TRACES_SAMPLER", "always_off"), ("TEST_SPANS", "5")],
        &[Nothing(Traces), Got("http", Metrics, "/v1/metrics"), Says("traces=Nothing")],
    ),
    row(
        "traceidratio",
        &[
            ENDPOINT,
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.5"),
            ("TEST_SPANS", "400"),
        ],
        // Six standard deviations.
        &[Spans("many", 140, 260)],
    ),
    row(
        "traceidratio without an argument is everything",
        &[ENDPOINT, ("OTEL_TRACES_SAMPLER", "traceidratio"), ("TEST_SPANS", "50")],
        &[Spans("many", 50, 50)],
    ),
    row(
        "an argument that is none",
        &[
            ENDPOINT,
            ("OTEL_TRACES_SAMPLER", "traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "50%"),
            ("TEST_SPANS", "50"),
        ],
        &[Spans("many", 50, 50), Warning("OTEL_TRACES_SAMPLER_ARG", "50%", "from 0 to 1")],
    ),
    row(
        "parentbased_always_on",
        &[ENDPOINT, PARENT, ("OTEL_TRACES_SAMPLER", "parentbased_always_on")],
        &[Spans("work", 1, 1), Continues(TRACE, PARENT_SPAN)],
    ),
    row(
        "parentbased_always_off",
        &[ENDPOINT, PARENT, ("OTEL_TRACES_SAMPLER", "parentbased_always_off"), ("TEST_SPANS", "5")],
        &[Spans("work", 1, 1), Spans("inner", 1, 1), Spans("many", 0, 0)],
    ),
    row(
        "parentbased_traceidratio",
        &[
            ENDPOINT,
            PARENT,
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0"),
            ("TEST_SPANS", "5"),
        ],
        &[Spans("work", 1, 1), Spans("many", 0, 0)],
    ),
    row(
        "an unknown sampler is the default one",
        &[ENDPOINT, ("OTEL_TRACES_SAMPLER", "jaeger_remote")],
        &[
            Spans("work", 1, 1),
            Warning("OTEL_TRACES_SAMPLER", "jaeger_remote", "parentbased_traceidratio"),
        ],
    ),
    // Propagators.
    row(
        "by default both",
        &[ENDPOINT, PARENT, ("TEST_BAGGAGE", "tenant=a")],
        &[
            Continues(TRACE, PARENT_SPAN),
            Says("child: carrier traceparent=00-0af7651916cd43dd8448eb211c80319c-"),
            Says("child: carrier baggage=tenant=a"),
        ],
    ),
    row(
        "tracecontext alone",
        &[ENDPOINT, PARENT, ("TEST_BAGGAGE", "tenant=a"), ("OTEL_PROPAGATORS", "tracecontext")],
        &[
            Continues(TRACE, PARENT_SPAN),
            Says("child: carrier traceparent=00-0af7651916cd43dd8448eb211c80319c-"),
            SaysNot("child: carrier baggage"),
        ],
    ),
    row(
        "baggage alone",
        &[ENDPOINT, PARENT, ("TEST_BAGGAGE", "tenant=a"), ("OTEL_PROPAGATORS", "baggage")],
        &[
            SaysNot(TRACE),
            SaysNot("child: carrier traceparent"),
            Says("child: carrier baggage=tenant=a"),
        ],
    ),
    row(
        "none",
        &[ENDPOINT, PARENT, ("OTEL_PROPAGATORS", "none")],
        &[SaysNot("child: carrier"), SaysNot(TRACE), Spans("work", 1, 1)],
    ),
    row(
        "an unknown propagator alone leaves the default",
        &[ENDPOINT, PARENT, ("OTEL_PROPAGATORS", "b3")],
        &[
            Continues(TRACE, PARENT_SPAN),
            Warning("OTEL_PROPAGATORS", "b3", "tracecontext, baggage, none"),
        ],
    ),
    // Batches and intervals.
    row(
        "OTEL_BSP_SCHEDULE_DELAY and OTEL_BLRP_SCHEDULE_DELAY, short: batches leave on the way",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_BSP_SCHEDULE_DELAY", "20"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "20"),
            ("TEST_SPANS", "6"),
            ("TEST_PACE", "150"),
        ],
        &[Requests(Traces, 2, 20), Requests(Logs, 2, 20), Spans("many", 6, 6)],
    ),
    row(
        "OTEL_BSP_SCHEDULE_DELAY and OTEL_BLRP_SCHEDULE_DELAY, long: all leave at the end",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_BSP_SCHEDULE_DELAY", "600000"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "600000"),
            ("TEST_SPANS", "6"),
            ("TEST_PACE", "50"),
        ],
        &[Requests(Traces, 1, 1), Requests(Logs, 1, 1), Spans("many", 6, 6)],
    ),
    row(
        "batches of one",
        &[
            ENDPOINT,
            LOGS_TOO,
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
            ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "1"),
            ("TEST_SPANS", "3"),
        ],
        // Two spans and two lines, and three of each.
        &[Requests(Traces, 5, 5), Requests(Logs, 5, 5)],
    ),
    row(
        "small queues: what does not fit is dropped, and nobody waits",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!slow}"),
            TRACES_ONLY,
            LOGS_TOO,
            ("OTEL_BSP_MAX_QUEUE_SIZE", "2"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2"),
            ("OTEL_BLRP_MAX_QUEUE_SIZE", "2"),
            ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "2"),
            ("TEST_SPANS", "300"),
        ],
        &[Spans("many", 1, 40), Says("SpanDroppingStarted"), Says("LogDroppingStarted")],
    ),
    row(
        "a batch larger than its queue",
        &[ENDPOINT, ("OTEL_BSP_MAX_QUEUE_SIZE", "10"), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "20")],
        &[
            Spans("work", 1, 1),
            Warning("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "20", "at most the queue size, 10"),
        ],
    ),
    row(
        "OTEL_METRIC_EXPORT_INTERVAL",
        &[ENDPOINT, ("OTEL_METRIC_EXPORT_INTERVAL", "100"), ("TEST_WAIT", "1000")],
        &[Requests(Metrics, 3, 12)],
    ),
    row(
        "a minute by default: once, at the end",
        &[ENDPOINT, ("TEST_WAIT", "300")],
        &[Requests(Metrics, 1, 1)],
    ),
    row("cumulative by default", &[ENDPOINT], &[Temporality("ccc")]),
    row(
        "cumulative",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "cumulative")],
        &[Temporality("ccc")],
    ),
    row(
        "delta",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "Delta")],
        &[Temporality("ddc")],
    ),
    row(
        "lowmemory, over grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc}"),
            GRPC,
            ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "lowmemory"),
        ],
        &[Temporality("ddc")],
    ),
    row(
        "an unknown temporality is cumulative",
        &[ENDPOINT, ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "whatever")],
        &[
            Temporality("ccc"),
            Warning(
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
                "whatever",
                "cumulative, delta, lowmemory",
            ),
        ],
    ),
    row(
        "what was queued before a panic is flushed after it, with the span that it ended",
        &[ENDPOINT, ("TEST_PANIC", "1"), ("OTEL_BSP_SCHEDULE_DELAY", "600000")],
        &[Spans("work", 1, 1), Spans("doomed", 1, 1), Says("traces=Delivered")],
    ),
    // Logs.
    row(
        "text by default, ids inside spans only",
        &[],
        &[Says(": inside trace_id="), Says(": outside\n"), SaysNot("deep")],
    ),
    row(
        "json",
        &[("KLIO_LOG_FORMAT", "json")],
        &[Says("\"message\":\"inside\""), Says("\"trace_flags\":\"00\""), SaysNot(" INFO ")],
    ),
    row(
        "an unknown format means text",
        &[("KLIO_LOG_FORMAT", "xml")],
        &[Says(": inside trace_id="), Warning("KLIO_LOG_FORMAT", "xml", "text, json")],
    ),
    row("RUST_LOG hides", &[("RUST_LOG", "error")], &[SaysNot("inside"), SaysNot("outside")]),
    row("RUST_LOG shows", &[("RUST_LOG", "warn,klio_test=debug")], &[Says("deep")]),
    row(
        "RUST_LOG with a fault",
        &[("RUST_LOG", "klio=loud")],
        &[Says("inside"), Warning("RUST_LOG", "klio=loud", "directives")],
    ),
    row(
        "--debug: ids as exported ones, and nothing is sent",
        &[("TEST_DEBUG", "1")],
        &[
            Says("trace_flags=01"),
            Says("child: threads=0"),
            Says("child: carrier traceparent=00-"),
            PrintsNothing,
        ],
    ),
    // The configuration file.
    row(
        "the file's endpoint over the signal's over the general one",
        &[
            (
                "TEST_FILE",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT={http}/file;OTEL_TRACES_EXPORTER=otlp",
            ),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!b}/signal"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!b}"),
            ("OTEL_TRACES_EXPORTER", "none"),
        ],
        &[Got("http", Traces, "/file"), Got("http!b", Metrics, "/v1/metrics")],
    ),
    row(
        "a fault of the file is named as it is there",
        &[(
            "TEST_FILE",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=nowhere;KLIO_LOG_FORMAT=xml;RUST_LOG=klio=loud",
        )],
        &[
            Warning("telemetry.trace_endpoint", "nowhere", "http://collector:4318"),
            Warning("telemetry.log_format", "xml", "text, json"),
            Warning("telemetry.log_level", "klio=loud", "directives"),
        ],
    ),
    // Strict.
    row(
        "KLIO_OTEL_STRICT with all in order",
        &[ENDPOINT, ("KLIO_OTEL_STRICT", "true")],
        &[Got("http", Traces, "/v1/traces")],
    ),
    row(
        "KLIO_OTEL_STRICT: everything that is wrong, at once, and no start",
        &[
            ENDPOINT,
            ("KLIO_OTEL_STRICT", "true"),
            ("OTEL_TRACES_EXPORTER", "otlp,zipkin"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "{junk.pem}"),
        ],
        &[
            Silent("http"),
            Says("child: refused: telemetry is misconfigured: OTEL_TRACES_EXPORTER"),
            Says("OTEL_EXPORTER_OTLP_CERTIFICATE: found"),
            SaysNot("inside"),
        ],
    ),
    row(
        "KLIO_OTEL_STRICT and a port that is taken",
        &[
            ("KLIO_OTEL_STRICT", "true"),
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_EXPORTER_PROMETHEUS_HOST", "127.0.0.1"),
            ("OTEL_EXPORTER_PROMETHEUS_PORT", "{taken}"),
        ],
        &[Says("child: refused: telemetry is misconfigured: OTEL_EXPORTER_PROMETHEUS_PORT")],
    ),
    row(
        "KLIO_OTEL_STRICT does not ask whether the collector is there",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:{free}"),
            TRACES_ONLY,
            ("KLIO_OTEL_STRICT", "true"),
            SOON,
        ],
        &[
            Says("inside"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:", "OTLP over http/protobuf"),
        ],
    ),
    // Collectors of every temper. Many exports fail, one warning comes; the end is not late (see `faults`).
    row(
        "absent, http",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:hunter2@127.0.0.1:{free}"),
            LOGS_TOO,
            SOON,
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "10"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "10"),
            ("TEST_SPANS", "5"),
            ("TEST_PACE", "100"),
        ],
        &[
            SaysNot("hunter2"),
            Says("traces=Pending metrics=Pending logs=Pending"),
            Warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "http://user:***@127.0.0.1:",
                "signal=\"traces\"",
            ),
            Warning(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                "http://user:***@127.0.0.1:",
                "signal=\"metrics\"",
            ),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:***@127.0.0.1:", "signal=\"logs\""),
        ],
    ),
    row(
        "absent, grpc",
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:{free}"),
            GRPC,
            LOGS_TOO,
            SOON,
            ("OTEL_BSP_SCHEDULE_DELAY", "10"),
            ("OTEL_BLRP_SCHEDULE_DELAY", "10"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "10"),
            ("TEST_SPANS", "5"),
            ("TEST_PACE", "100"),
        ],
        &[
            Says("traces=Pending metrics=Pending logs=Pending"),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:", "signal=\"traces\""),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:", "signal=\"metrics\""),
            Warning("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:", "signal=\"logs\""),
        ],
    ),
    bad(
        "hangs, http",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!hang}"), SOON],
        PENDING_HTTP,
    ),
    bad(
        "hangs, grpc",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!hang}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "garbage, http",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!garbage}"), SOON],
        PENDING_HTTP,
    ),
    bad(
        "garbage, grpc",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!garbage}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "dies in the middle, http",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!die}"), SOON],
        PENDING_HTTP,
    ),
    bad(
        "dies in the middle, grpc",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!die}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "no collector but a web page",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!page}"), SOON],
        PENDING_HTTP,
    ),
    bad(
        "a web server asked for grpc",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "a grpc collector asked over http",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc}"), SOON],
        PENDING_HTTP,
    ),
    bad("400", &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!400}"), SOON], PENDING_HTTP),
    bad("401", &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!401}"), SOON], PENDING_HTTP),
    bad("404", &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!404}"), SOON], PENDING_HTTP),
    bad("429", &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!429}"), SOON], PENDING_HTTP),
    bad("500", &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!500}"), SOON], PENDING_HTTP),
    bad("503", &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!503}"), SOON], PENDING_HTTP),
    bad(
        "INVALID_ARGUMENT",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!3}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "RESOURCE_EXHAUSTED",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!8}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "UNIMPLEMENTED",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!12}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "UNAVAILABLE",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!14}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    bad(
        "UNAUTHENTICATED",
        &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!16}"), GRPC, SOON],
        PENDING_GRPC,
    ),
    row(
        "rejects a part, http: said once",
        &[
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{http!reject}"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
            ("TEST_SPANS", "5"),
        ],
        &[
            Says("rejected=3"),
            Warning(
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "http://localhost:",
                "a collector that accepts all of it",
            ),
        ],
    ),
    row(
        "rejects a part, grpc: said once",
        &[
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "{grpc!reject}"),
            GRPC,
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1"),
            ("TEST_SPANS", "5"),
        ],
        &[
            Says("rejected=3"),
            Warning(
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "http://localhost:",
                "a collector that accepts all of it",
            ),
        ],
    ),
    row(
        "slow, http: all arrives if there is time",
        &[("OTEL_EXPORTER_OTLP_ENDPOINT", "{http!slow}"), LOGS_TOO, ("TEST_SPANS", "5")],
        &[Spans("many", 5, 5), Says("traces=Delivered metrics=Delivered logs=Delivered")],
    ),
    row(
        "slow, grpc: all arrives if there is time",
        &[("OTEL_EXPORTER_OTLP_ENDPOINT", "{grpc!slow}"), GRPC, LOGS_TOO, ("TEST_SPANS", "5")],
        &[Spans("many", 5, 5), Says("traces=Delivered metrics=Delivered logs=Delivered")],
    ),
];

/// A collector that takes no spans.
const fn bad(
    what: &'static str,
    variables: &'static [(&'static str, &'static str)],
    sees: &'static [See],
) -> Row {
    Row { what, variables, sees }
}

const PENDING_HTTP: &[See] = &[
    Says("traces=Pending"),
    Says("inside"),
    Warning("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:", "OTLP over http/protobuf"),
];
const PENDING_GRPC: &[See] = &[
    Says("traces=Pending"),
    Says("inside"),
    Warning("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://localhost:", "OTLP over grpc"),
];
