//! Log lines: their format, and the ids inside spans, with and without an exporter.

use super::*;
use std::collections::BTreeSet;

fn work() {
    tracing::info!(answer = 42, "outside");
    let outer = tracing::info_span!("outer", cluster = "pg-1").entered();
    tracing::info!(flag = true, "in outer");
    tracing::info_span!("inner").in_scope(|| tracing::warn!(level = "x", "in inner"));
    drop(outer);
    tracing::info_span!("second").in_scope(|| tracing::info!("in second"));
}

fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_ascii_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length
        && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        && text.bytes().any(|b| b != b'0')
}

#[test]
fn text_lines_inside_spans_carry_ids_with_and_without_debug() {
    for (debug, flags) in [(false, "00"), (true, "01")] {
        let (telemetry, dispatch, lines) = built(debug, &[]);
        tracing::dispatcher::with_default(&dispatch, work);
        let text = lines.text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(
            lines[0].contains(" INFO klio_telemetry::tests::lines: outside answer=42"),
            "{text}"
        );
        assert_eq!(value(lines[0], "trace_id"), None);
        assert!(lines[1].contains("outer{cluster=\"pg-1\"}: in outer flag=true"), "{text}");
        assert!(lines[2].contains(" WARN "), "{text}");
        for line in &lines[1..] {
            assert!(is_hex(value(line, "trace_id").unwrap(), 32), "{line}");
            assert!(is_hex(value(line, "span_id").unwrap(), 16), "{line}");
            assert_eq!(value(line, "trace_flags"), Some(flags), "{line}");
            assert!(!line.contains('\x1b'), "{line}");
        }
        let traces: Vec<_> = lines[1..].iter().map(|l| value(l, "trace_id").unwrap()).collect();
        assert_eq!(traces[0], traces[1]);
        assert_ne!(traces[0], traces[2]);
        let spans: BTreeSet<_> = lines[1..].iter().map(|l| value(l, "span_id").unwrap()).collect();
        assert_eq!(spans.len(), 3);
        assert!(telemetry.health.traces.is_none());
    }
}

#[test]
fn json_lines_are_objects_with_fields_spans_and_ids() {
    for debug in [false, true] {
        let (_telemetry, dispatch, lines) = built(debug, &[("KLIO_LOG_FORMAT", "json")]);
        tracing::dispatcher::with_default(&dispatch, work);
        let text = lines.text();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines[0]["message"], "outside");
        assert_eq!(lines[0]["answer"], 42);
        assert_eq!(lines[0]["level"], "INFO");
        assert!(lines[0].get("trace_id").is_none());
        assert_eq!(lines[1]["flag"], true);
        assert!(is_hex(lines[1]["trace_id"].as_str().unwrap(), 32));
        assert!(is_hex(lines[1]["span_id"].as_str().unwrap(), 16));
        assert_eq!(lines[1]["trace_flags"], if debug { "01" } else { "00" });
        assert_eq!(lines[1]["trace_id"], lines[2]["trace_id"]);
        assert_eq!(lines[2]["level"], "WARN");
        assert_eq!(lines[2]["field.level"], "x");
        assert_eq!(lines[2]["spans"][0]["cluster"], "pg-1");
        assert_eq!(lines[2]["spans"][1]["name"], "inner");
        assert!(lines[2]["timestamp"].as_str().unwrap().ends_with('Z'));
    }
}

#[test]
fn the_current_trace_id_is_the_one_on_the_lines() {
    for debug in [false, true] {
        let (_telemetry, dispatch, lines) = built(debug, &[]);
        tracing::dispatcher::with_default(&dispatch, || {
            assert_eq!(current_trace_id(), None);
            let _outer = tracing::info_span!("outer").entered();
            let _inner = tracing::info_span!("inner").entered();
            let id = current_trace_id().unwrap();
            tracing::info!("here");
            assert_eq!(value(&lines.text(), "trace_id"), Some(id.as_str()));
        });
    }
}

#[test]
fn a_quiet_filter_hides_lines_but_not_their_ids() {
    let (_telemetry, dispatch, lines) = built(false, &[("RUST_LOG", "error")]);
    tracing::dispatcher::with_default(&dispatch, || {
        let _span = tracing::info_span!("outer").entered();
        tracing::info!("hidden");
        tracing::error!("shown");
    });
    let text = lines.text();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(value(&text, "trace_id").is_some(), "{text}");
}

#[test]
fn the_default_level_is_info_and_debug_adds_our_own_lines_only() {
    for (debug, expected) in [(false, vec!["one"]), (true, vec!["one", "two"])] {
        let (_telemetry, dispatch, lines) = built(debug, &[]);
        tracing::dispatcher::with_default(&dispatch, || {
            tracing::info!(target: "hyper", "one");
            tracing::debug!(target: "klio_server::x", "two");
            tracing::debug!(target: "hyper", "three");
            tracing::error!(target: "opentelemetry_sdk", "four");
        });
        let text = lines.text();
        let words: Vec<_> = text.lines().map(|l| l.rsplit(' ').next().unwrap()).collect();
        assert_eq!(words, expected);
    }
}

#[test]
fn the_configuration_file_wins_over_the_environment() {
    let lines = Lines::default();
    let writer = lines.clone();
    let options = Options {
        log_format: Some(LogFormat::Json),
        log_filter: Some("warn".into()),
        ..options(false)
    };
    let printer = logs::Printer { writer: move || writer.clone(), colour: false };
    let get = |name: &str| match name {
        "KLIO_LOG_FORMAT" => Some("text".to_owned()),
        "RUST_LOG" => Some("trace".to_owned()),
        _ => None,
    };
    let (_telemetry, dispatch, problems) = build(&options, &get, printer).unwrap();
    assert_eq!(problems, []);
    tracing::dispatcher::with_default(&dispatch, || {
        tracing::info!("hidden");
        tracing::warn!("shown");
    });
    let line: serde_json::Value = serde_json::from_str(lines.text().trim()).unwrap();
    assert_eq!(line["message"], "shown");
}

#[test]
fn strict_turns_problems_into_an_error_that_lists_them_all() {
    let get = |name: &str| match name {
        "KLIO_OTEL_STRICT" => Some("true".to_owned()),
        "OTEL_TRACES_EXPORTER" | "KLIO_LOG_FORMAT" => Some("nonsense".to_owned()),
        _ => None,
    };
    let printer = logs::Printer { writer: std::io::sink, colour: false };
    let error = build(&options(false), &get, printer).unwrap_err().to_string();
    assert!(error.contains("OTEL_TRACES_EXPORTER: found \"nonsense\""), "{error}");
    assert!(error.contains("KLIO_LOG_FORMAT") && error.contains("hint:"), "{error}");
}

#[test]
fn children_that_log_before_their_root_share_its_trace() {
    let (_telemetry, dispatch, lines) = built(false, &[]);
    tracing::dispatcher::with_default(&dispatch, || {
        let root = tracing::info_span!("root");
        for _ in 0..2 {
            tracing::info_span!(parent: &root, "child").in_scope(|| tracing::info!("child"));
        }
        tracing::info!(parent: &root, "root");
    });
    let text = lines.text();
    let of =
        |key: &str| text.lines().map(|l| value(l, key).unwrap()).collect::<BTreeSet<_>>().len();
    assert_eq!((of("trace_id"), of("span_id")), (1, 3), "{text}");
}
