//! Formats each event as one line.
//!
//! Text: `time LEVEL target: span{fields}: message field=value trace_id=… span_id=… trace_flags=…`.
//! JSON: one object with `timestamp`, `level`, `target`, `message` and the event's fields; spans, outermost first,
//! under `spans`. A field whose name is taken is renamed to `field.<name>`.
//! Secrets are removed from fields and messages, whoever wrote them there. Characters that move a cursor or begin a
//! new line are shown as escapes, because many logged texts come from others.
//! The ids are there exactly if the event happened inside a span.

use crate::{
    LogFormat, ids,
    redact::{is_secret_name, redact},
    visible,
};
use serde_json::{Map, Value};
use std::{
    borrow::Cow,
    fmt::{self, Write},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::{LookupSpan, SpanRef},
};

/// Formats events as described above.
pub(crate) struct Line {
    format: LogFormat,
    ids: ids::Source,
    colour: bool,
}

impl Line {
    /// `colour` applies to the level only. Fields are never coloured, because [`redact`] would not recognise them.
    pub(crate) fn new(format: LogFormat, ids: ids::Source, colour: bool) -> Self {
        Self { format, ids, colour }
    }
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let span = match event.parent() {
            Some(id) => ctx.span(id),
            None if event.is_root() => None,
            None => ctx.lookup_current(),
        };
        // Must happen before the fields of any span are borrowed, because generating ids writes to the same place.
        let ids = span.as_ref().map(|span| self.ids.ids(span));
        match self.format {
            LogFormat::Text => {
                write!(writer, "{} ", now())?;
                level(&mut writer, event.metadata().level(), self.colour)?;
                text(ctx, &mut writer, event, span.as_ref(), ids)
            }
            LogFormat::Json => json::<S, N>(&mut writer, event, span.as_ref(), ids),
        }
    }
}

fn now() -> String {
    OffsetDateTime::now_utc().format(&Rfc3339).unwrap_or_default()
}

fn text<S, N>(
    ctx: &FmtContext<'_, S, N>,
    writer: &mut Writer<'_>,
    event: &Event<'_>,
    span: Option<&SpanRef<'_, S>>,
    ids: Option<ids::Ids>,
) -> fmt::Result
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let metadata = event.metadata();
    write!(writer, " {}: ", metadata.target())?;
    for span in span.into_iter().flat_map(|s| s.scope().from_root()) {
        writer.write_str(span.name())?;
        let extensions = span.extensions();
        match extensions.get::<FormattedFields<N>>().filter(|f| !f.is_empty()) {
            Some(fields) => write!(writer, "{{{}}}: ", visible::line(&redact(&fields.fields)))?,
            None => writer.write_str(": ")?,
        }
    }
    let mut fields = String::new();
    ctx.format_fields(Writer::new(&mut fields), event)?;
    writer.write_str(&visible::line(&redact(&fields)))?;
    if let Some(ids) = ids {
        write!(
            writer,
            " trace_id={} span_id={} trace_flags={:02x}",
            ids.trace, ids.span, ids.flags
        )?;
    }
    writeln!(writer)
}

fn level(writer: &mut Writer<'_>, level: &Level, colour: bool) -> fmt::Result {
    if !colour {
        return write!(writer, "{:>5}", level.as_str());
    }
    let colour = match *level {
        Level::ERROR => 31,
        Level::WARN => 33,
        Level::INFO => 32,
        Level::DEBUG => 34,
        Level::TRACE => 35,
    };
    write!(writer, "\x1b[{colour}m{:>5}\x1b[0m", level.as_str())
}

fn json<S, N>(
    writer: &mut Writer<'_>,
    event: &Event<'_>,
    span: Option<&SpanRef<'_, S>>,
    ids: Option<ids::Ids>,
) -> fmt::Result
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let metadata = event.metadata();
    let mut line = Map::new();
    line.insert("timestamp".into(), now().into());
    line.insert("level".into(), metadata.level().as_str().into());
    line.insert("target".into(), metadata.target().into());
    let mut fields = Fields::default();
    event.record(&mut fields);
    line.insert("message".into(), fields.message.into());
    if let Some(ids) = ids {
        line.insert("trace_id".into(), ids.trace.to_string().into());
        line.insert("span_id".into(), ids.span.to_string().into());
        line.insert("trace_flags".into(), format!("{:02x}", ids.flags).into());
    }
    let spans: Vec<Value> = span
        .into_iter()
        .flat_map(|s| s.scope().from_root())
        .map(|s| described::<S, N>(&s))
        .collect();
    if !spans.is_empty() {
        line.insert("spans".into(), spans.into());
    }
    for (name, value) in fields.others {
        let taken = line.contains_key(&name);
        line.insert(if taken { format!("field.{name}") } else { name }, value);
    }
    writeln!(writer, "{}", visible::line(&Value::Object(line).to_string()))
}

fn described<S, N>(span: &SpanRef<'_, S>) -> Value
where
    S: for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    let extensions = span.extensions();
    let fields = extensions.get::<FormattedFields<N>>();
    let mut object: Map<String, Value> =
        fields.and_then(|f| serde_json::from_str(&f.fields).ok()).unwrap_or_default();
    object.iter_mut().for_each(|(name, value)| clean(name, value));
    object.insert("name".into(), span.name().into());
    Value::Object(object)
}

/// The same as in text, where name and value stand together.
fn clean(name: &str, value: &mut Value) {
    let Value::String(text) = value else { return };
    if is_secret_name(name) {
        *text = "***".to_owned();
    } else if let Cow::Owned(changed) = redact(text) {
        *text = changed;
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, mut value: Value) {
        clean(field.name(), &mut value);
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => self.others.push((name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        let mut text = value.to_string();
        let mut source = value.source();
        while let Some(cause) = source {
            // Writing to a String cannot fail.
            let _ = write!(text, ": {cause}");
            source = cause.source();
        }
        self.put(field, text.into());
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
}
