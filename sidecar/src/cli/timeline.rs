//! `klio timeline list`, `follow` and `retire`: lists a cluster's timelines, and sends a person's decision about one.

use super::{
    args::{DecideTimelineArgs, TimelineCommand},
    connect, exit, print, table, text,
};
use crate::{config::Config, error::Error, server_link::which};
use klio_proto::v1::{
    DecideTimelineRequest, DecideTimelineResponse, TimelineDecision, TimelineRecord,
    TimelinesRequest,
};
use serde_json::{Value, json};

pub(super) async fn run(config: &Config, command: &TimelineCommand) -> Result<u8, Error> {
    match command {
        TimelineCommand::List { json } => list(config, *json).await,
        TimelineCommand::Follow(args) => decide(config, args, TimelineDecision::Follow).await,
        TimelineCommand::Retire(args) => decide(config, args, TimelineDecision::Retire).await,
    }
}

async fn list(config: &Config, json: bool) -> Result<u8, Error> {
    let connection = connect(config).await?;
    let which = which(&connection, &config.cluster()?).await?;
    let request = TimelinesRequest { cluster: which.name.to_string() };
    let answer = connection.catalog().timelines(request).await;
    let answer = answer.map_err(|status| Error::from_status("list timelines", &status))?;
    let timelines = answer.into_inner().timelines;
    if json {
        let all: Vec<Value> = timelines.iter().map(record_json).collect();
        print(&format!("{:#}\n", which.tag(json!({ "timelines": all }))));
    } else {
        print(&(which.line() + &to_text(&timelines)));
    }
    let undecided = timelines.iter().any(|t| t.standing == "undecided");
    Ok(if undecided { exit::PROBLEM } else { exit::OK })
}

async fn decide(
    config: &Config,
    args: &DecideTimelineArgs,
    how: TimelineDecision,
) -> Result<u8, Error> {
    let connection = connect(config).await?;
    let which = which(&connection, &config.cluster()?).await?;
    let request = DecideTimelineRequest {
        cluster: which.name.to_string(),
        timeline: args.timeline,
        decision: how.into(),
        dry_run: args.dry_run,
    };
    let answer = connection.catalog().decide_timeline(request).await;
    let answer = answer.map_err(|status| Error::from_status("decide about a timeline", &status))?;
    print(&(which.line() + &outcome(&answer.into_inner(), args.dry_run)));
    Ok(exit::OK)
}

fn outcome(answer: &DecideTimelineResponse, dry_run: bool) -> String {
    let mut out = String::new();
    if dry_run {
        out += "nothing was changed; this would happen:\n";
    }
    answer.changes.iter().for_each(|change| out += &format!("{change}\n"));
    out + "\n" + &to_text(&answer.timelines)
}

fn to_text(timelines: &[TimelineRecord]) -> String {
    if timelines.is_empty() {
        return "no timelines\n".into();
    }
    let position = |lsn: u64| if lsn == 0 { "-".into() } else { text::lsn(lsn) };
    let row = |t: &TimelineRecord| {
        let parent = match t.parent {
            0 => "-".to_owned(),
            parent => format!("{parent} at {}", text::lsn(t.switch_lsn)),
        };
        vec![
            t.timeline.to_string(),
            standing(t).to_owned(),
            if t.connected { "connected" } else { "-" }.to_owned(),
            parent,
            position(t.start_lsn),
            position(t.flushed_lsn),
        ]
    };
    let rows: Vec<Vec<String>> = timelines.iter().map(row).collect();
    let header = ["TIMELINE", "STANDING", "STREAM", "FROM", "START", "FLUSHED"];
    let mut out = table::render(&header, &rows);
    for t in timelines.iter().filter(|t| !t.reason.is_empty()) {
        out += &format!("timeline {}: {} ({})", t.timeline, t.reason, text::time(t.marked_time));
        if t.decided_time > 0.0 {
            out += &format!("; decided by {} ({})", t.decided_by, text::time(t.decided_time));
        }
        out += "\n";
    }
    out
}

/// The standing in one word. A timeline without a decision that is not followed has ended.
pub(super) fn standing(t: &TimelineRecord) -> &str {
    if t.standing.is_empty() { "ended" } else { &t.standing }
}

pub(super) fn record_json(t: &TimelineRecord) -> Value {
    let known = |lsn: u64| (lsn > 0).then(|| text::lsn(lsn));
    let at = |unix: f64| (unix > 0.0).then_some(unix);
    let text_of = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "timeline": t.timeline,
        "standing": text_of(&t.standing),
        "connected": t.connected,
        "start_lsn": known(t.start_lsn),
        "flushed_lsn": known(t.flushed_lsn),
        "parent": (t.parent > 0).then_some(t.parent),
        "switch_lsn": known(t.switch_lsn),
        "reason": text_of(&t.reason),
        "marked_time": at(t.marked_time),
        "decided_time": at(t.decided_time),
        "decided_by": text_of(&t.decided_by),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timelines() -> Vec<TimelineRecord> {
        let followed = TimelineRecord {
            timeline: 1,
            standing: "followed".into(),
            connected: true,
            flushed_lsn: 0x0500_0000,
            ..TimelineRecord::default()
        };
        let undecided = TimelineRecord {
            timeline: 2,
            standing: "undecided".into(),
            parent: 1,
            switch_lsn: 0x0300_0060,
            reason: "both write".into(),
            marked_time: 1.0,
            ..TimelineRecord::default()
        };
        vec![followed, undecided]
    }

    #[test]
    fn the_table_says_who_is_followed_and_why_the_other_is_not() {
        let out = to_text(&timelines());
        for part in ["followed", "undecided", "1 at 0/3000060", "both write", "connected"] {
            assert!(out.contains(part), "{part} in\n{out}");
        }
    }

    #[test]
    fn a_dry_run_says_that_nothing_was_changed() {
        let answer = DecideTimelineResponse {
            timelines: timelines(),
            changes: vec!["timeline 2: undecided -> retired".into()],
        };
        assert!(outcome(&answer, true).starts_with("nothing was changed"));
        assert!(!outcome(&answer, false).contains("nothing was changed"));
    }

    #[test]
    fn json_says_null_for_what_is_not_known() {
        let value = record_json(&timelines()[0]);
        assert_eq!((&value["reason"], &value["parent"]), (&Value::Null, &Value::Null));
        assert_eq!(value["flushed_lsn"], "0/5000000");
    }
}
