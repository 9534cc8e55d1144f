//! `klio generation`: lists the histories of a cluster, and sends a person's decision about one. `list` ends with 3
//! while a history is undecided.

use super::{
    args::{DecideArgs, GenerationCommand},
    connect, exit, print, table, text,
};
use crate::{config::Config, error::Error};
use klio_proto::v1::{
    DecideGenerationRequest, Generation, ListGenerationsRequest,
    decide_generation_request::Decision,
};
use serde_json::{Value, json};

pub(super) async fn run(config: &Config, command: &GenerationCommand) -> Result<u8, Error> {
    match command {
        GenerationCommand::List { json } => list(config, *json).await,
        GenerationCommand::Follow(args) => decide(config, args, Decision::Follow).await,
        GenerationCommand::Retire(args) => decide(config, args, Decision::Retire).await,
    }
}

async fn list(config: &Config, as_json: bool) -> Result<u8, Error> {
    let request =
        ListGenerationsRequest { cluster: config.cluster()?.base().to_string(), outline: false };
    let answer = connect(config).await?.catalog().list_generations(request).await;
    let found = answer
        .map_err(|status| Error::from_status("list generations", &status))?
        .into_inner()
        .generations;
    if as_json {
        let all: Vec<Value> = found.iter().map(to_json).collect();
        print(&format!("{:#}\n", json!({ "generations": all })));
    } else {
        print(&to_table(&found));
    }
    let waits = found.iter().any(is_undecided);
    Ok(if waits { exit::PROBLEM } else { exit::OK })
}

async fn decide(config: &Config, args: &DecideArgs, decision: Decision) -> Result<u8, Error> {
    let request = DecideGenerationRequest {
        cluster: config.cluster()?.base().to_string(),
        number: args.number,
        decision: decision.into(),
        dry_run: args.dry_run,
    };
    let answer = connect(config).await?.catalog().decide_generation(request).await;
    let effects = answer
        .map_err(|status| Error::from_status("decide about a generation", &status))?
        .into_inner()
        .effects;
    if args.json {
        print(&format!("{:#}\n", json!({ "dry_run": args.dry_run, "effects": effects })));
        return Ok(exit::OK);
    }
    let first = if args.dry_run { "would happen; nothing was changed" } else { "done" };
    let lines: String = effects.iter().map(|effect| format!("- {effect}\n")).collect();
    print(&format!("{first}:\n{lines}"));
    Ok(exit::OK)
}

fn is_undecided(generation: &Generation) -> bool {
    matches!(generation.state.as_str(), "undecided" | "refused")
}

fn to_table(all: &[Generation]) -> String {
    let header =
        ["GENERATION", "STATE", "STREAM", "SYSTEM", "TIMELINE", "FLUSHED", "WAL", "BACKUPS"];
    let row = |g: &Generation| {
        vec![
            g.number.to_string(),
            g.state.clone(),
            if g.connected { "connected" } else { "not connected" }.into(),
            g.system_identifier.to_string(),
            g.timeline.to_string(),
            text::lsn(g.flushed_lsn),
            text::size(g.stored_bytes),
            g.backups.to_string(),
        ]
    };
    let mut out = table::render(&header, &all.iter().map(row).collect::<Vec<_>>());
    for g in all {
        if !g.reason.is_empty() {
            out += &format!(
                "generation {}, since {}: {}\n",
                g.number,
                text::time(g.since_time),
                g.reason
            );
        }
        if !g.decided_by.is_empty() {
            let (number, by, at) = (g.number, &g.decided_by, text::time(g.decided_time));
            out += &format!("generation {number}: {} since {at}, decided by {by}\n", g.state);
        }
        if is_undecided(g) {
            let n = g.number;
            out += &format!(
                "generation {n} waits for a decision: klio generation follow {n} --dry-run, klio generation retire {n} --dry-run\n"
            );
        }
    }
    out
}

pub(super) fn to_json(g: &Generation) -> Value {
    json!({
        "generation": g.number,
        "state": g.state,
        "connected": g.connected,
        "system_identifier": g.system_identifier.to_string(),
        "timeline": g.timeline,
        "flushed_lsn": (g.flushed_lsn > 0).then(|| text::lsn(g.flushed_lsn)),
        "stored_bytes": g.stored_bytes,
        "backups": g.backups,
        "newest_backup": (!g.newest_backup.is_empty()).then_some(&g.newest_backup),
        "since_time": (g.since_time > 0.0).then_some(g.since_time),
        "reason": g.reason,
        "decided_by": (!g.decided_by.is_empty()).then_some(&g.decided_by),
        "decided_time": (g.decided_time > 0.0).then_some(g.decided_time),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_person_says_how_to_decide() {
        let generation = Generation {
            number: 2,
            state: "undecided".into(),
            reason: "the WAL page at 0/3000000 differs".into(),
            ..Generation::default()
        };
        let text = to_table(&[generation]);
        for part in ["undecided", "0/3000000", "klio generation follow 2 --dry-run"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}
