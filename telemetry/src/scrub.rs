//! Removes secrets from spans and log records on their way to an exporter.
//!
//! This is the second line of defence: code that creates a span or a line redacts its arguments itself, but an error
//! of a library may contain an address with credentials. Only texts are checked; names, numbers and ids stay.

use crate::redact::{is_secret_name, redact};
use opentelemetry::{
    Array, InstrumentationScope, Key, KeyValue, SpanId, StringValue, TraceFlags, TraceId, Value,
    logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity},
    trace::Status,
};
use opentelemetry_sdk::{
    logs::{SdkLogRecord, SdkLogger, SdkLoggerProvider},
    trace::SpanData,
};
use std::{borrow::Cow, time::SystemTime};

/// Cleans attributes, events and the status of a finished span.
pub(crate) fn span(span: &mut SpanData) {
    attributes(&mut span.attributes);
    for event in &mut span.events.events {
        attributes(&mut event.attributes);
        // An event's name is the message that was logged.
        if let Some(clean) = changed(&event.name) {
            event.name = clean.into();
        }
    }
    if let Status::Error { description } = &mut span.status
        && let Some(clean) = changed(description)
    {
        *description = clean.into();
    }
}

fn attributes(all: &mut [KeyValue]) {
    for attribute in all {
        if is_secret_name(attribute.key.as_str()) {
            attribute.value = Value::String("***".into());
        }
        match &mut attribute.value {
            Value::String(text) => string(text),
            Value::Array(Array::String(texts)) => texts.iter_mut().for_each(string),
            _ => {}
        }
    }
}

fn string(text: &mut StringValue) {
    if let Some(clean) = changed(text.as_str()) {
        *text = clean.into();
    }
}

fn changed(text: &str) -> Option<String> {
    match redact(text) {
        Cow::Borrowed(_) => None,
        Cow::Owned(clean) => Some(clean),
    }
}

/// A logger provider whose records are redacted when they are created.
#[derive(Debug)]
pub(crate) struct CleanLogs(pub SdkLoggerProvider);

impl LoggerProvider for CleanLogs {
    type Logger = CleanLogger;

    fn logger_with_scope(&self, scope: InstrumentationScope) -> CleanLogger {
        CleanLogger(self.0.logger_with_scope(scope))
    }
}

#[derive(Debug)]
pub(crate) struct CleanLogger(SdkLogger);

impl Logger for CleanLogger {
    type LogRecord = CleanRecord;

    fn create_log_record(&self) -> CleanRecord {
        CleanRecord(self.0.create_log_record())
    }
    fn emit(&self, record: CleanRecord) {
        self.0.emit(record.0);
    }
    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.0.event_enabled(level, target, name)
    }
}

/// A record that redacts the values put into it.
#[derive(Debug)]
pub(crate) struct CleanRecord(SdkLogRecord);

fn clean(value: AnyValue) -> AnyValue {
    match value {
        AnyValue::String(mut text) => {
            string(&mut text);
            AnyValue::String(text)
        }
        other => other,
    }
}

#[deny(clippy::missing_trait_methods)]
impl LogRecord for CleanRecord {
    fn set_event_name(&mut self, name: &'static str) {
        self.0.set_event_name(name);
    }
    fn set_target<T: Into<Cow<'static, str>>>(&mut self, target: T) {
        self.0.set_target(target);
    }
    fn set_timestamp(&mut self, timestamp: SystemTime) {
        self.0.set_timestamp(timestamp);
    }
    fn set_observed_timestamp(&mut self, timestamp: SystemTime) {
        self.0.set_observed_timestamp(timestamp);
    }
    fn set_severity_text(&mut self, text: &'static str) {
        self.0.set_severity_text(text);
    }
    fn set_severity_number(&mut self, number: Severity) {
        self.0.set_severity_number(number);
    }
    fn set_body(&mut self, body: AnyValue) {
        self.0.set_body(clean(body));
    }
    fn add_attributes<I, K, V>(&mut self, attributes: I)
    where
        I: IntoIterator<Item = (K, V)>,
        K: Into<Key>,
        V: Into<AnyValue>,
    {
        for (key, value) in attributes {
            self.add_attribute(key, value);
        }
    }
    fn add_attribute<K: Into<Key>, V: Into<AnyValue>>(&mut self, key: K, value: V) {
        let key = key.into();
        if is_secret_name(key.as_str()) {
            self.0.add_attribute(key, "***");
        } else {
            self.0.add_attribute(key, clean(value.into()));
        }
    }
    fn set_trace_context(&mut self, trace: TraceId, span: SpanId, flags: Option<TraceFlags>) {
        self.0.set_trace_context(trace, span, flags);
    }
}
