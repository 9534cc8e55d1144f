//! What a row expects, and whether it came true.

use klio_tests::otlp::{Arrival, Message, Receiver, Signal};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use std::collections::{BTreeMap, BTreeSet};

/// One expectation.
#[derive(Debug, Clone, Copy)]
pub enum See {
    /// The receiver got this signal, all of it at this path; over gRPC the path is not looked at.
    Got(&'static str, Signal, &'static str),
    /// No receiver got any of it.
    Nothing(Signal),
    /// This receiver got nothing at all.
    Silent(&'static str),
    /// Every request with the signal has the header once, with this value.
    Header(Signal, &'static str, &'static str),
    /// No request with the signal has the header.
    NoHeader(Signal, &'static str),
    /// Every resource has the attribute with this value; `*`: with any.
    Resource(&'static str, &'static str),
    /// No resource has it.
    NoResource(&'static str),
    /// One warning with this variable, value and expectation (parts of them). Others must not be there.
    Warning(&'static str, &'static str, &'static str),
    /// Part of standard error.
    Says(&'static str),
    /// Not a part of standard error.
    SaysNot(&'static str),
    /// Part of standard output.
    Prints(&'static str),
    /// Standard output is what libtest makes it, no more.
    PrintsNothing,
    /// So many spans of this name arrived.
    Spans(&'static str, usize, usize),
    /// So many requests with this signal, at least and at most.
    Requests(Signal, usize, usize),
    /// Aggregation temporality of counter, histogram and up-down counter: `c` or `d` each.
    Temporality(&'static str),
    /// Spans have this trace id and, the outermost, this parent.
    Continues(&'static str, &'static str),
}

/// What happened in a row.
pub struct Seen {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub receivers: BTreeMap<String, Receiver>,
    pub directory: String,
}

impl Seen {
    fn of(&self, signal: Signal) -> Vec<Arrival> {
        self.receivers.values().flat_map(|r| r.of(signal)).collect()
    }

    /// Every warning, as its line.
    fn warnings(&self) -> Vec<&str> {
        let warning = |line: &&str| {
            (line.contains(" WARN ") || line.contains("\"level\":\"WARN\""))
                // Comes from the SDK, once; a row that wants it looks for its text.
                && !line.contains("DroppingStarted")
        };
        self.stderr.lines().filter(warning).collect()
    }
}

/// Everything that is not as expected.
pub fn faults(sees: &[See], seen: &Seen) -> Vec<String> {
    let mut faults: Vec<String> = sees.iter().filter_map(|see| fault(*see, seen)).collect();
    if seen.code != Some(0) {
        faults.push(format!("exit status {:?}", seen.code));
    }
    if seen.stderr.contains("child: late=true") {
        faults.push("the end came later than the flush timeout".into());
    }
    let expected = sees.iter().filter(|see| matches!(see, See::Warning(..))).count();
    let found = seen.warnings();
    if found.len() != expected {
        faults.push(format!("{} warnings, expected {expected}: {found:#?}", found.len()));
    }
    faults
}

fn fault(see: See, seen: &Seen) -> Option<String> {
    match see {
        See::Got(receiver, signal, path) => got(seen, receiver, signal, path),
        See::Nothing(signal) => {
            let some = seen.of(signal);
            (!some.is_empty())
                .then(|| format!("expected no {signal:?}, found {} requests", some.len()))
        }
        See::Silent(receiver) => {
            let all = seen.receivers[receiver].arrivals();
            (!all.is_empty()).then(|| format!("{receiver} got {} requests", all.len()))
        }
        See::Header(signal, name, value) => header(seen, signal, name, &[value]),
        See::NoHeader(signal, name) => header(seen, signal, name, &[]),
        See::Resource(key, value) => resource(seen, key, Some(value)),
        See::NoResource(key) => resource(seen, key, None),
        See::Warning(variable, value, expected) => warning(seen, variable, value, expected),
        See::Says(text) => {
            (!seen.stderr.contains(text)).then(|| format!("expected on stderr: {text}"))
        }
        See::SaysNot(text) => {
            seen.stderr.contains(text).then(|| format!("not expected on stderr: {text}"))
        }
        See::Prints(text) => (!seen.stdout.contains(text))
            .then(|| format!("expected on stdout: {text}; found {}", seen.stdout)),
        See::PrintsNothing => {
            let more = seen
                .stdout
                .lines()
                .find(|l| !l.is_empty() && !l.starts_with("running ") && !l.starts_with("test "));
            more.map(|line| format!("not expected on stdout: {line}"))
        }
        See::Spans(name, least, most) => {
            let count: usize = seen
                .receivers
                .values()
                .map(|r| r.spans().iter().filter(|s| s.name == name).count())
                .sum();
            between(count, least, most, &format!("spans {name}"))
        }
        See::Requests(signal, least, most) => {
            between(seen.of(signal).len(), least, most, &format!("requests with {signal:?}"))
        }
        See::Temporality(wanted) => temporality(seen, wanted),
        See::Continues(trace, parent) => continues(seen, trace, parent),
    }
}

fn between(count: usize, least: usize, most: usize, what: &str) -> Option<String> {
    (count < least || count > most)
        .then(|| format!("expected {least} to {most} {what}, found {count}"))
}

fn got(seen: &Seen, receiver: &str, signal: Signal, path: &str) -> Option<String> {
    let grpc = receiver.starts_with("grpc");
    let all = seen.receivers.get(receiver).map(|r| r.of(signal)).unwrap_or_default();
    let good =
        |a: &Arrival| !matches!(a.message, Message::Undecodable(_)) && (grpc || a.path == path);
    let paths: Vec<_> = all.iter().map(|a| a.path.as_str()).collect();
    (all.is_empty() || !all.iter().all(good))
        .then(|| format!("expected {signal:?} at {receiver}{path}, found requests at {paths:?}"))
}

fn header(seen: &Seen, signal: Signal, name: &str, values: &[&str]) -> Option<String> {
    let all = seen.of(signal);
    let wrong = all.iter().find(|a| a.header(name) != values);
    match wrong {
        Some(arrival) => {
            Some(format!("expected {name}: {values:?}, found {:?}", arrival.header(name)))
        }
        None => all.is_empty().then(|| format!("no {signal:?} to look for {name} in")),
    }
}

fn resource(seen: &Seen, key: &str, value: Option<&str>) -> Option<String> {
    let arrivals = seen.receivers.values().flat_map(Receiver::arrivals);
    let all: Vec<_> = arrivals.flat_map(|a| a.resources()).collect();
    let fits = |found: Option<&String>| match (found, value) {
        (None, None) => true,
        (Some(found), Some("*")) => !found.is_empty(),
        (Some(found), Some(value)) => found == value,
        _ => false,
    };
    let wrong = all.iter().find(|r| !fits(r.get(key)));
    match wrong {
        Some(r) => Some(format!("resource {key}: expected {value:?}, found {:?}", r.get(key))),
        None => all.is_empty().then(|| format!("no resource to look for {key} in")),
    }
}

fn warning(seen: &Seen, variable: &str, value: &str, expected: &str) -> Option<String> {
    let value = value.replace("{directory}", &seen.directory);
    let expected = expected.replace("{directory}", &seen.directory);
    let fits = |line: &&&str| {
        let has = |part: &str| line.contains(part);
        // Text and JSON lines.
        (has(&format!("variable=\"{variable}\"")) || has(&format!("\"variable\":\"{variable}\"")))
            && has(&value)
            && has(&expected)
    };
    let count = seen.warnings().iter().filter(fits).count();
    (count != 1)
        .then(|| format!("expected 1 warning about {variable}, {value}, {expected}; found {count}"))
}

fn temporality(seen: &Seen, wanted: &str) -> Option<String> {
    let mut found = BTreeMap::new();
    for arrival in seen.of(Signal::Metrics) {
        let Message::Metrics(message) = arrival.message else { continue };
        let scopes = message.resource_metrics.iter().flat_map(|r| &r.scope_metrics);
        for metric in scopes.flat_map(|s| &s.metrics) {
            let kind = match &metric.data {
                Some(Data::Sum(sum)) => sum.aggregation_temporality,
                Some(Data::Histogram(histogram)) => histogram.aggregation_temporality,
                _ => continue,
            };
            // 1: delta, 2: cumulative.
            found.insert(metric.name.clone(), if kind == 1 { 'd' } else { 'c' });
        }
    }
    let names = ["klio.test.things", "klio.test.sizes", "klio.test.level"];
    let text: String = names.iter().map(|n| found.get(*n).copied().unwrap_or('?')).collect();
    (text != wanted).then(|| format!("temporality: expected {wanted}, found {text}"))
}

fn continues(seen: &Seen, trace: &str, parent: &str) -> Option<String> {
    let spans: Vec<_> = seen.receivers.values().flat_map(Receiver::spans).collect();
    let traces: BTreeSet<_> = spans.iter().map(|s| s.trace.as_str()).collect();
    let outer = spans.iter().find(|s| s.name == "work");
    let fits = traces.contains(trace) && outer.is_some_and(|s| s.parent == parent);
    (!fits).then(|| format!("expected trace {trace} below {parent}, found {spans:?}"))
}
