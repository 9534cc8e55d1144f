//! `klio status`: how far each cluster is, as a table or JSON. Ends with 3 if there is a problem or gap.
//!
//! A cluster to which nobody streams has a problem. Nobody knows how far behind it is, so its lag is never shown as 0: the
//! bytes are unknown, and the time is the time since everything was last known to be here.

use super::{
    args::StatusArgs, connect, exit, generation, print, say, table, text, timeline::record_json,
};
use crate::{config::Config, error::Error};
use klio_proto::v1::{ClusterStatus, GapRecord, Lag, StatusRequest, StatusResponse, Unproven};
use klio_storage::layout::ClusterName;
use klio_telemetry::visible::line;
use serde_json::{Value, json};

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
            "nothing has streamed to this server yet: check that klio stream is running and that the cluster's name is right",
        );
    }
    print(&out);
    Ok(if is_bad(&answer) { exit::PROBLEM } else { exit::OK })
}

/// Whether somebody has to act. A server without any cluster protects nothing, so that counts as well.
fn is_bad(answer: &StatusResponse) -> bool {
    let bad = |c: &ClusterStatus| !problems(c).is_empty() || !c.gaps.is_empty();
    answer.clusters.is_empty() || answer.clusters.iter().any(bad)
}

/// The problems that the server reports, and a missing stream, which it does not report as a problem.
fn problems(c: &ClusterStatus) -> Vec<String> {
    let mut problems = c.problems.clone();
    if !c.connected {
        problems.push(unstreamed(c));
    }
    problems
}

/// The problem of a cluster without a stream. If the stream goes into another generation, it must not be reported as
/// missing, because PostgreSQL is fine then.
fn unstreamed(c: &ClusterStatus) -> String {
    if let Some(apart) = c.generations.iter().find(|g| g.connected && g.state != "current") {
        return format!(
            "nothing streams into the current generation: klio stream streams into generation {} ({})",
            apart.number, apart.state
        );
    }
    let since = durable_as_of(c).map_or_else(
        || "and how much PostgreSQL has written meanwhile is unknown".to_owned(),
        |time| format!("and what PostgreSQL wrote after {} is not here", text::time(time)),
    );
    format!("nothing streams, {since}: start klio stream beside PostgreSQL, or look at its log")
}

fn durable_as_of(c: &ClusterStatus) -> Option<f64> {
    (c.durable_as_of_time > 0.0).then_some(c.durable_as_of_time)
}

/// How far tier 1 is behind PostgreSQL in bytes and seconds, where known. Older servers sent 0 if there was no stream.
fn flush_lag(c: &ClusterStatus, now: f64) -> (Option<u64>, Option<f64>) {
    match (&c.flush_lag, c.connected) {
        (Some(lag), true) => (Some(lag.bytes), Some(lag.seconds)),
        _ => (None, durable_as_of(c).map(|time| (now - time).max(0.0))),
    }
}

fn lag(bytes: Option<u64>, seconds: Option<f64>) -> String {
    match (bytes, seconds) {
        (Some(bytes), Some(seconds)) => {
            format!("{}, {}", text::size(bytes), text::duration(seconds))
        }
        (None, Some(seconds)) => format!("unknown for {}", text::duration(seconds)),
        _ => "unknown".into(),
    }
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
        for problem in problems(cluster) {
            out += &format!("{}: problem: {}\n", line(&cluster.cluster), line(&problem));
        }
        for other in &cluster.other_timelines {
            let stream = if other.connected { "connected" } else { "not connected" };
            out += &format!(
                "{}: also timeline {}, {}: {stream}, flushed {}\n",
                cluster.cluster,
                other.timeline,
                super::timeline::standing(other),
                text::lsn(other.flushed_lsn)
            );
        }
        if cluster.all_read_since_time > 0.0 {
            let within = (text::now() - cluster.all_read_since_time).max(0.0);
            let within = text::duration(within);
            out += &format!("{}: all backup data read within {within}\n", line(&cluster.cluster));
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
    let (bytes, seconds) = flush_lag(c, text::now());
    let archive = match (&c.archive_lag, c.tier2_configured) {
        (_, false) => "no tier 2".into(),
        (None, true) => lag(None, None),
        (Some(known), true) => lag(Some(known.bytes), Some(known.seconds)),
    };
    vec![
        c.cluster.clone(),
        if c.connected { "connected" } else { "not connected" }.into(),
        c.timeline.to_string(),
        text::lsn(c.received_lsn),
        text::lsn(c.flushed_lsn),
        text::lsn(c.sealed_lsn),
        text::lsn(c.archived_lsn),
        lag(bytes, seconds),
        archive,
    ]
}

/// A gap as text.
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

/// A position at which continuity was not proven, as text.
fn unproven_text(place: &Unproven) -> String {
    format!(
        "note: continuity is not proven at {} on timeline {}, {}: {}; a base backup taken since then does not need the WAL before it",
        text::lsn(place.at_lsn),
        place.timeline,
        text::time(place.recorded_time),
        place.reason
    )
}

/// A gap as JSON.
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
            let (bytes, seconds) = flush_lag(c, text::now());
            json!({
                "cluster": c.cluster,
                "generation": ClusterName::parse_generation(&c.cluster).ok().map(|name| name.generation()),
                "system_identifier": c.system_identifier.to_string(),
                "segment_size": c.segment_size,
                "postgres_version": c.postgres_version,
                "all_read_since_time":
                    (c.all_read_since_time > 0.0).then(|| text::time(c.all_read_since_time)),
                "connected": c.connected,
                "timeline": c.timeline,
                "received_lsn": known(c.received_lsn),
                "flushed_lsn": known(c.flushed_lsn),
                "sealed_lsn": known(c.sealed_lsn),
                "archived_lsn": known(c.archived_lsn),
                "wal_end_lsn": known(c.wal_end_lsn),
                "flush_lag": { "bytes": bytes, "seconds": seconds },
                "durable_as_of_time": durable_as_of(c),
                "archive_lag": lag(c.archive_lag.as_ref()),
                "latest_written_time": (c.latest_written_time > 0.0).then_some(c.latest_written_time),
                "latest_archived_time": (c.latest_archived_time > 0.0).then_some(c.latest_archived_time),
                "tier2_configured": c.tier2_configured,
                "gaps": c.gaps.iter().map(gap_json).collect::<Vec<_>>(),
                "problems": problems(c).iter().map(|problem| line(problem)).collect::<Vec<_>>(),
                "generations": c.generations.iter().map(generation::to_json).collect::<Vec<_>>(),
                "continuity_not_proven": c.unproven.iter().map(unproven_json).collect::<Vec<_>>(),
                "other_timelines": c.other_timelines.iter().map(record_json).collect::<Vec<_>>(),
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

    #[test]
    fn a_stream_into_another_generation_is_no_stream_that_stands_still() {
        let generation = |number, state: &str, connected| klio_proto::v1::Generation {
            number,
            state: state.into(),
            connected,
            ..Default::default()
        };
        let mut cluster = ClusterStatus {
            generations: vec![generation(1, "current", false), generation(2, "undecided", true)],
            ..ClusterStatus::default()
        };
        let text = problems(&cluster).join(" ");
        assert!(text.contains("into generation 2 (undecided)"), "{text}");
        assert!(!text.contains("start klio stream"), "{text}");
        cluster.generations[1].connected = false;
        assert!(problems(&cluster)[0].contains("start klio stream"));
    }

    /// Does not depend on the lag that the server reports for a stream that ended: an older server says 0.
    #[test]
    fn a_cluster_that_nobody_streams_is_a_problem_with_an_unknown_lag() {
        let mut cluster = ClusterStatus {
            cluster: "pg-1".into(),
            connected: true,
            flush_lag: Some(Lag { bytes: 0, seconds: 0.0 }),
            ..ClusterStatus::default()
        };
        let answer = |cluster: &ClusterStatus| StatusResponse {
            clusters: vec![cluster.clone()],
            queue: None,
        };
        assert!(!is_bad(&answer(&cluster)));
        assert_eq!(to_json(&answer(&cluster))["clusters"][0]["flush_lag"]["bytes"], 0);
        cluster.connected = false;
        assert!(is_bad(&answer(&cluster)));
        let value = to_json(&answer(&cluster))["clusters"][0].clone();
        assert_eq!(value["flush_lag"], json!({ "bytes": null, "seconds": null }));
        assert!(value["problems"][0].as_str().unwrap().contains("nothing streams"), "{value}");
        let table = to_table(&answer(&cluster));
        assert!(table.contains("unknown") && !table.contains("0 B"), "{table}");
        cluster.durable_as_of_time = text::now() - 90.0;
        let value = to_json(&answer(&cluster))["clusters"][0].clone();
        assert!(value["flush_lag"]["seconds"].as_f64() >= Some(90.0), "{value}");
        assert!(to_table(&answer(&cluster)).contains("unknown for 1"), "{value}");
        assert!(is_bad(&StatusResponse::default()), "a server that has nothing");
    }
}
