//! `klio status`: how far each cluster is, as a table or JSON. Ends with 3 when there is a problem or gap.

use super::{args::StatusArgs, connect, exit, generation, print, say, table, text};
use crate::{config::Config, error::Error};
use klio_proto::v1::{ClusterStatus, GapRecord, Lag, StatusRequest, StatusResponse, Unproven};
use klio_telemetry::visible::line;
use serde_json::{Value, json};

/// Runs it.
pub(super) async fn run(config: &Config, args: &StatusArgs) -> Result<u8, Error> {
    let cluster = if args.all { String::new() } else { config.cluster()?.to_string() };
    let answer = connect(config)
        .await?
        .catalog()
        .status(StatusRequest { cluster })
        .await
        .map_err(|status| Error::from_status("ask for the status", &status))?
        .into_inner();
    let out = if args.json { format!("{:#}\n", to_json(&answer)) } else { to_table(&answer) };
    if answer.clusters.is_empty() {
        say(
            "nothing has streamed to this server yet: is klio stream running, and is the cluster's name right?",
        );
    }
    print(&out);
    let bad = answer.clusters.iter().any(|c| !c.problems.is_empty() || !c.gaps.is_empty());
    Ok(if bad { exit::PROBLEM } else { exit::OK })
}

fn lag(lag: Option<&Lag>) -> String {
    lag.map_or_else(
        || "-".into(),
        |lag| format!("{}, {}", text::size(lag.bytes), text::duration(lag.seconds)),
    )
}

fn to_table(answer: &StatusResponse) -> String {
    let rows: Vec<Vec<String>> = answer.clusters.iter().map(row).collect();
    let header = [
        "CLUSTER",
        "STREAM",
        "TIMELINE",
        "RECEIVED",
        "FLUSHED",
        "SEALED",
        "ARCHIVED",
        "FLUSH LAG",
        "ARCHIVE LAG",
    ];
    let mut out = table::render(&header, &rows);
    if let Some(queue) = &answer.queue {
        let state = if queue.connected { "up" } else { "down" };
        out += &format!(
            "\nqueue: {state}, {} messages, {}\n",
            queue.messages,
            text::size(queue.bytes)
        );
    }
    for cluster in &answer.clusters {
        for problem in &cluster.problems {
            out += &format!("{}: problem: {}\n", line(&cluster.cluster), line(problem));
        }
        for gap in &cluster.gaps {
            out += &format!("{}: {}\n", line(&cluster.cluster), gap_text(gap));
        }
        for place in &cluster.unproven {
            out += &format!("{}: {}\n", cluster.cluster, unproven_text(place));
        }
    }
    out
}

fn row(c: &ClusterStatus) -> Vec<String> {
    let archive = if c.tier2_configured { lag(c.archive_lag.as_ref()) } else { "no tier 2".into() };
    vec![
        c.cluster.clone(),
        if c.connected { "connected" } else { "not connected" }.into(),
        c.timeline.to_string(),
        text::lsn(c.received_lsn),
        text::lsn(c.flushed_lsn),
        text::lsn(c.sealed_lsn),
        text::lsn(c.archived_lsn),
        lag(c.flush_lag.as_ref()),
        archive,
    ]
}

/// One gap for people.
pub(super) fn gap_text(gap: &GapRecord) -> String {
    format!(
        "gap on timeline {} from {} to {} ({}), recorded {}: {}",
        gap.timeline,
        text::lsn(gap.from_lsn),
        text::lsn(gap.to_lsn),
        text::size(gap.to_lsn.saturating_sub(gap.from_lsn)),
        text::time(gap.recorded_time),
        line(&gap.reason)
    )
}

/// A place that was not proven, for people.
fn unproven_text(place: &Unproven) -> String {
    format!(
        "note: continuity is not proven at {} on timeline {}, {}: {}; a base backup taken since then does not need the WAL before it",
        text::lsn(place.at_lsn),
        place.timeline,
        text::time(place.recorded_time),
        place.reason
    )
}

/// One gap for programs.
pub(super) fn gap_json(gap: &GapRecord) -> Value {
    json!({
        "timeline": gap.timeline,
        "from_lsn": text::lsn(gap.from_lsn),
        "to_lsn": text::lsn(gap.to_lsn),
        "bytes": gap.to_lsn.saturating_sub(gap.from_lsn),
        "reason": line(&gap.reason),
        "recorded_time": text::time(gap.recorded_time),
    })
}

fn unproven_json(place: &Unproven) -> Value {
    json!({
        "timeline": place.timeline,
        "at_lsn": text::lsn(place.at_lsn),
        "reason": place.reason,
        "recorded_time": text::time(place.recorded_time),
    })
}

fn to_json(answer: &StatusResponse) -> Value {
    let lag = |lag: Option<&Lag>| lag.map(|l| json!({ "bytes": l.bytes, "seconds": l.seconds }));
    let known = |value: u64| (value > 0).then(|| text::lsn(value));
    let clusters: Vec<Value> = answer
        .clusters
        .iter()
        .map(|c| {
            json!({
                "cluster": c.cluster,
                "system_identifier": c.system_identifier.to_string(),
                "segment_size": c.segment_size,
                "postgres_version": c.postgres_version,
                "connected": c.connected,
                "timeline": c.timeline,
                "received_lsn": known(c.received_lsn),
                "flushed_lsn": known(c.flushed_lsn),
                "sealed_lsn": known(c.sealed_lsn),
                "archived_lsn": known(c.archived_lsn),
                "wal_end_lsn": known(c.wal_end_lsn),
                "flush_lag": lag(c.flush_lag.as_ref()),
                "archive_lag": lag(c.archive_lag.as_ref()),
                "latest_written_time": (c.latest_written_time > 0.0).then_some(c.latest_written_time),
                "latest_archived_time": (c.latest_archived_time > 0.0).then_some(c.latest_archived_time),
                "tier2_configured": c.tier2_configured,
                "gaps": c.gaps.iter().map(gap_json).collect::<Vec<_>>(),
                "problems": c.problems.iter().map(|problem| line(problem)).collect::<Vec<_>>(),
                "generations": c.generations.iter().map(generation::to_json).collect::<Vec<_>>(),
                "continuity_not_proven": c.unproven.iter().map(unproven_json).collect::<Vec<_>>(),
            })
        })
        .collect();
    let queue = answer
        .queue
        .as_ref()
        .map(|q| json!({ "connected": q.connected, "messages": q.messages, "bytes": q.bytes }));
    json!({ "clusters": clusters, "queue": queue })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> StatusResponse {
        StatusResponse {
            clusters: vec![ClusterStatus {
                cluster: "pg-1".into(),
                connected: true,
                timeline: 2,
                flushed_lsn: 0x0300_0060,
                gaps: vec![GapRecord {
                    timeline: 1,
                    from_lsn: 1 << 20,
                    to_lsn: 2 << 20,
                    reason: "x".into(),
                    recorded_time: 0.0,
                }],
                problems: vec!["disk full".into()],
                ..ClusterStatus::default()
            }],
            queue: None,
        }
    }

    #[test]
    fn the_table_names_gaps_and_problems() {
        let text = to_table(&answer());
        for part in ["pg-1", "connected", "0/3000060", "disk full", "gap on timeline 1"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn json_says_null_for_what_is_not_known() {
        let value = to_json(&answer());
        assert_eq!(value["clusters"][0]["flushed_lsn"], "0/3000060");
        assert_eq!(value["clusters"][0]["archived_lsn"], Value::Null);
        assert_eq!(value["clusters"][0]["gaps"][0]["bytes"], 1 << 20);
    }
}
