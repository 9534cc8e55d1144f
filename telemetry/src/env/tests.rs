//! Tables of the meaning of variables, and of the problems reported for bad ones.

use super::{reader::percent_decode, *};
use std::collections::BTreeMap;

fn parsed(variables: &[(&str, &str)]) -> (Settings, Vec<Problem>) {
    let map: BTreeMap<String, String> =
        variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    parse(&|name| map.get(name).cloned())
}

fn good(variables: &[(&str, &str)]) -> Settings {
    let (settings, problems) = parsed(variables);
    assert_eq!(problems, [], "{variables:?}");
    settings
}

#[test]
fn nothing_set_means_everything_off() {
    let s = good(&[]);
    assert!(!s.traces_exported() && !s.metrics_on() && !s.logs_exported() && !s.strict);
    assert_eq!(s.format, LogFormat::Text);
    assert_eq!(s.filter, None);
    assert_eq!(s.propagators, [Propagator::TraceContext, Propagator::Baggage]);
}

#[test]
fn an_empty_variable_is_unset() {
    let s = good(&[
        ("OTEL_TRACES_EXPORTER", ""),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", " "),
        ("OTEL_PROPAGATORS", ""),
        ("RUST_LOG", ""),
        ("OTEL_SDK_DISABLED", ""),
    ]);
    assert!(!s.traces_exported());
    assert_eq!(s.propagators.len(), 2);
}

#[test]
fn exporters_are_lists() {
    // traces, metrics, logs -> OTLP and console of each, prometheus
    let table = [
        ("otlp", "none", "none", [true, false, false, false, false, false, false]),
        ("console,otlp", "none", "none", [true, true, false, false, false, false, false]),
        (
            "none",
            "otlp, prometheus ,console",
            "none",
            [false, false, true, true, false, false, true],
        ),
        ("NONE", "Prometheus", "OTLP,console", [false, false, false, false, true, true, true]),
    ];
    for (traces, metrics, logs, expected) in table {
        let s = good(&[
            ("OTEL_TRACES_EXPORTER", traces),
            ("OTEL_METRICS_EXPORTER", metrics),
            ("OTEL_LOGS_EXPORTER", logs),
        ]);
        let found = [
            s.traces.otlp.is_some(),
            s.traces.console,
            s.metrics.otlp.is_some(),
            s.metrics.console,
            s.logs.otlp.is_some(),
            s.logs.console,
            s.metrics.prometheus.is_some(),
        ];
        assert_eq!(found, expected, "{traces} | {metrics} | {logs}");
    }
}

#[test]
fn an_endpoint_alone_switches_traces_and_metrics_on_but_not_logs() {
    let s = good(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318")]);
    assert!(s.traces.otlp.is_some() && s.metrics.otlp.is_some() && s.logs.otlp.is_none());
    let s = good(&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c:4318/x")]);
    assert!(s.traces.otlp.is_some() && s.metrics.otlp.is_none());
    let s =
        good(&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"), ("OTEL_TRACES_EXPORTER", "none")]);
    assert!(s.traces.otlp.is_none());
}

#[test]
fn endpoints_follow_the_specification() {
    const GENERAL: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const OWN: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    const PROTOCOL: &str = "OTEL_EXPORTER_OTLP_PROTOCOL";
    const INSECURE: &str = "OTEL_EXPORTER_OTLP_INSECURE";
    let table: &[(&[(&str, &str)], &str)] = &[
        (&[], "http://localhost:4318/v1/traces"),
        (&[(GENERAL, "http://c:1")], "http://c:1/v1/traces"),
        (&[(GENERAL, "http://c:1/base/")], "http://c:1/base/v1/traces"),
        (&[(GENERAL, "http://c:1"), (OWN, "https://d:2/own")], "https://d:2/own"),
        (&[(OWN, "https://d:2")], "https://d:2"),
        (&[(PROTOCOL, "grpc")], "http://localhost:4317"),
        (&[(PROTOCOL, "grpc"), (GENERAL, "http://c:1")], "http://c:1"),
        (&[(PROTOCOL, "grpc"), (GENERAL, "c:1")], "https://c:1"),
        (&[(PROTOCOL, "grpc"), (GENERAL, "c:1"), (INSECURE, "true")], "http://c:1"),
        (&[(PROTOCOL, "grpc"), (GENERAL, "https://c:1"), (INSECURE, "true")], "https://c:1"),
        (
            &[
                (PROTOCOL, "grpc"),
                (GENERAL, "c:1"),
                (INSECURE, "true"),
                ("OTEL_EXPORTER_OTLP_TRACES_INSECURE", "false"),
            ],
            "https://c:1",
        ),
    ];
    for (variables, expected) in table {
        let mut all = vec![("OTEL_TRACES_EXPORTER", "otlp")];
        all.extend_from_slice(variables);
        let otlp = good(&all).traces.otlp.unwrap();
        assert_eq!(otlp.endpoint, *expected, "{variables:?}");
    }
}

#[test]
fn the_signals_own_variable_wins() {
    let s = good(&[
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_LOGS_EXPORTER", "otlp"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=1"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "b=x%20y, c = z"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", "none"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "3000"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "700"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca"),
        ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "/traces-ca"),
        ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/crt"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/key"),
    ]);
    let (traces, logs) = (s.traces.otlp.unwrap(), s.logs.otlp.unwrap());
    assert_eq!((traces.protocol, logs.protocol), (Protocol::Grpc, Protocol::Http));
    assert_eq!(traces.headers, [("b".into(), "x y".into()), ("c".into(), "z".into())]);
    assert_eq!(logs.headers, [("a".into(), "1".into())]);
    assert_eq!((traces.gzip, logs.gzip), (false, true));
    assert_eq!((traces.timeout.as_millis(), logs.timeout.as_millis()), (700, 3000));
    assert_eq!(traces.certificate.unwrap().1.to_str(), Some("/traces-ca"));
    assert_eq!(logs.certificate.unwrap().1.to_str(), Some("/ca"));
    assert_eq!(logs.client_key.unwrap().1.to_str(), Some("/key"));
}

#[test]
fn samplers_are_the_specified_ones() {
    let table = [
        (None, None, "ParentBased(AlwaysOn)"),
        (Some("always_on"), None, "AlwaysOn"),
        (Some("always_off"), None, "AlwaysOff"),
        (Some("traceidratio"), Some("0.25"), "TraceIdRatioBased(0.25)"),
        (Some("traceidratio"), None, "TraceIdRatioBased(1.0)"),
        (Some("parentbased_always_off"), None, "ParentBased(AlwaysOff)"),
        (Some("parentbased_traceidratio"), Some("0"), "ParentBased(TraceIdRatioBased(0.0))"),
    ];
    for (name, argument, expected) in table {
        let mut all = Vec::new();
        all.extend(name.map(|n| ("OTEL_TRACES_SAMPLER", n)));
        all.extend(argument.map(|a| ("OTEL_TRACES_SAMPLER_ARG", a)));
        assert_eq!(format!("{:?}", good(&all).traces.sampler), expected);
    }
}

#[test]
fn the_rest_is_read_as_specified() {
    let s = good(&[
        ("OTEL_METRICS_EXPORTER", "otlp,prometheus"),
        ("OTEL_EXPORTER_PROMETHEUS_HOST", "0.0.0.0"),
        ("OTEL_EXPORTER_PROMETHEUS_PORT", "9999"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "1500"),
        ("OTEL_METRIC_EXPORT_TIMEOUT", "400"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta"),
        ("OTEL_BSP_SCHEDULE_DELAY", "10"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "50"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "20"),
        ("OTEL_PROPAGATORS", "tracecontext"),
        ("OTEL_SERVICE_NAME", "mine"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=b%2Cc,d=%C3%A9"),
        ("OTEL_RESOURCE_DETECTORS", "os, host.id,os.type"),
        ("POD_NAME", "pod-0"),
        ("KLIO_LOG_FORMAT", "json"),
        ("RUST_LOG", "warn,klio_server=debug"),
        ("KLIO_OTEL_STRICT", "TRUE"),
    ]);
    assert_eq!(s.metrics.prometheus, Some(Listen { host: "0.0.0.0".into(), port: 9999 }));
    assert_eq!(s.metrics.interval.as_millis(), 1500);
    assert_eq!(s.metrics.otlp.unwrap().timeout.as_millis(), 400);
    assert_eq!(s.metrics.temporality, Temporality::Delta);
    assert_eq!(s.traces.batch.delay.unwrap().as_millis(), 10);
    assert_eq!((s.traces.batch.queue, s.traces.batch.size), (Some(100), Some(50)));
    assert_eq!(s.logs.batch.delay.unwrap().as_millis(), 20);
    assert_eq!(s.propagators, [Propagator::TraceContext]);
    assert_eq!(s.resource.service_name.as_deref(), Some("mine"));
    assert_eq!(s.resource.attributes, [("a".into(), "b,c".into()), ("d".into(), "é".into())]);
    let detectors = [Detector::OsType, Detector::OsDescription, Detector::HostId];
    assert_eq!(s.resource.detectors, detectors);
    assert_eq!(s.resource.kubernetes, [("k8s.pod.name", "pod-0".into())]);
    assert_eq!(s.format, LogFormat::Json);
    assert_eq!(s.filter.as_deref(), Some("warn,klio_server=debug"));
    assert!(s.strict);
}

#[test]
fn each_bad_value_is_one_problem_and_the_default_is_used() {
    let table = [
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp, console, none"),
        ("OTEL_METRICS_EXPORTER", "statsd", "otlp, prometheus, console, none"),
        ("OTEL_LOGS_EXPORTER", "x", "otlp, console, none"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "not an address", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "c:4318", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://c", "http://collector:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf, grpc"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "lzma", "gzip, none"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "0", "milliseconds"),
        ("OTEL_EXPORTER_OTLP_INSECURE", "yes", "true, false"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/key", "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-1", "milliseconds"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "above 0"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9999", "2048"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "soon", "milliseconds"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "parentbased_always_on"),
        ("OTEL_PROPAGATORS", "b3", "tracecontext, baggage, none"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "x", "lowmemory"),
        ("OTEL_EXPORTER_PROMETHEUS_PORT", "65536", "port number"),
        ("OTEL_RESOURCE_DETECTORS", "gcp", "process.owner"),
        ("OTEL_RESOURCE_ATTRIBUTES", "novalue", "key=value"),
        ("OTEL_SDK_DISABLED", "maybe", "true, false"),
        ("KLIO_OTEL_STRICT", "1", "true, false"),
        ("KLIO_LOG_FORMAT", "xml", "text, json"),
        ("RUST_LOG", "klio=loud", "directives"),
        ("OTEL_LOG_LEVEL", "loud", "debug"),
    ];
    for (variable, value, expected) in table {
        let (_, problems) = parsed(&[(variable, value)]);
        assert_eq!(problems.len(), 1, "{variable}={value}: {problems:?}");
        assert_eq!(problems[0].variable, variable);
        assert!(problems[0].expected.contains(expected), "{}", problems[0]);
    }
}

#[test]
fn all_problems_are_reported_at_once() {
    let (settings, problems) = parsed(&[
        ("OTEL_TRACES_EXPORTER", "otlp,zipkin"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "x"),
        ("KLIO_LOG_FORMAT", "y"),
    ]);
    let variables: Vec<_> = problems.iter().map(|p| p.variable.as_str()).collect();
    let expected = ["KLIO_LOG_FORMAT", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL"];
    assert_eq!(variables, expected);
    assert_eq!(settings.traces.otlp.unwrap().protocol, Protocol::Http);
}

#[test]
fn problems_hold_no_secrets() {
    for (variable, value) in [
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x-key=hunter2%zz"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "x key=hunter2"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://me:hunter2@host"),
    ] {
        let (settings, problems) = parsed(&[("OTEL_TRACES_EXPORTER", "otlp"), (variable, value)]);
        assert_eq!(problems.len(), 1, "{value}");
        assert!(!problems[0].to_string().contains("hunter2"), "{}", problems[0]);
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}

#[test]
fn disabled_turns_all_off_but_the_log_settings() {
    let s = good(&[
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_METRICS_EXPORTER", "prometheus"),
        ("OTEL_LOGS_EXPORTER", "otlp"),
        ("KLIO_LOG_FORMAT", "json"),
    ]);
    assert!(!s.traces_exported() && !s.metrics_on() && !s.logs_exported());
    assert_eq!((s.format, s.propagators), (LogFormat::Json, vec![]));
}

#[test]
fn percent_decoding_is_strict() {
    for (input, expected) in [
        ("plain", Some("plain")),
        ("a%20b", Some("a b")),
        ("%C3%A9", Some("é")),
        ("%", None),
        ("%2", None),
        ("%zz", None),
        ("%+1", None),
        ("%FF", None),
    ] {
        assert_eq!(percent_decode(input).as_deref(), expected, "{input}");
    }
}
