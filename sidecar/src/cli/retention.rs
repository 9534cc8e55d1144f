//! `klio retention plan` and `klio retention apply`: shows what would be deleted and why, or deletes it.

use super::{
    args::RetentionCommand,
    connect, exit, print, print_json, say_elsewhere, table, text,
    work::{Answer, follow},
};
use crate::{
    config::Config,
    error::{Error, Failure},
    server_link::which,
};
use klio_pg::Lsn;
use klio_proto::{
    Code,
    v1::{MaintainRequest, MaintainResponse, PlanRetentionRequest, maintain_response},
};
use klio_storage::catalog::{MaintenanceOutcome, RetentionPlan, retention::Decision};

pub(super) async fn run(config: &Config, command: &RetentionCommand) -> Result<u8, Error> {
    match command {
        RetentionCommand::Plan { json } => plan(config, *json).await,
        RetentionCommand::Apply { json } => apply(config, *json).await,
    }
}

async fn plan(config: &Config, json: bool) -> Result<u8, Error> {
    let doing = "plan retention";
    let connection = connect(config).await?;
    let which = which(&connection, &config.cluster()?).await?;
    let request = PlanRetentionRequest { cluster: which.name.to_string() };
    let answer = connection.base().plan_retention(request).await;
    let answer = answer.map_err(|status| Error::from_status(doing, &status))?.into_inner();
    let plan: RetentionPlan = serde_json::from_slice(&answer.plan)
        .map_err(|e| Error::new(Failure::Code(Code::Invalid), format!("{doing}: {e}")))?;
    match json {
        true => print_json(&which, &plan)?,
        false => print(&(which.line() + &explain(&plan))),
    }
    if plan.backups.is_empty() {
        say_elsewhere(&connection, &which).await;
    }
    Ok(if plan.alarms.is_empty() { exit::OK } else { exit::PROBLEM })
}

async fn apply(config: &Config, json: bool) -> Result<u8, Error> {
    let doing = "apply retention";
    let connection = connect(config).await?;
    let which = which(&connection, &config.cluster()?).await?;
    let request = MaintainRequest { cluster: which.name.to_string() };
    let answers = connection.base().maintain(request).await;
    let answers = answers.map_err(|status| Error::from_status(doing, &status))?.into_inner();
    let read = |answer: MaintainResponse| match answer.kind? {
        maintain_response::Kind::Progress(step) => Some(Answer::Step(step)),
        maintain_response::Kind::Outcome(bytes) => Some(Answer::Outcome(bytes)),
    };
    let outcome: MaintenanceOutcome = follow(doing, answers, json, read).await?;
    match json {
        true => print_json(&which, &outcome)?,
        false => print(&(which.line() + &summary(&outcome))),
    }
    Ok(if outcome.held_back.is_empty() { exit::OK } else { exit::PROBLEM })
}

fn word(decision: &Decision) -> &'static str {
    match (decision.present, decision.keep) {
        (true, true) => "keep",
        (true, false) => "DROP",
        (false, true) => "wanted",
        (false, false) => "-",
    }
}

fn explain(plan: &RetentionPlan) -> String {
    let mut out = String::new();
    for alarm in &plan.alarms {
        out += &format!("NOTHING IS DELETED: {alarm}\n");
    }
    let mut rows = Vec::new();
    for backup in &plan.backups {
        let reasons = |decision: &Decision| decision.reasons.join(", ");
        let mut row = vec![
            backup.name.to_string(),
            text::time(backup.committed_unix),
            word(&backup.tier1).to_owned(),
            reasons(&backup.tier1),
        ];
        if plan.has_tier2 {
            row.push(word(&backup.tier2).to_owned());
            row.push(reasons(&backup.tier2));
        }
        rows.push(row);
    }
    let header = ["BACKUP", "COMMITTED", "TIER 1", "WHY", "TIER 2", "WHY"];
    let columns = if plan.has_tier2 { 6 } else { 4 };
    out += &table::render(&header[..columns], &rows);
    let below = |lsn: Option<Lsn>| lsn.map_or_else(|| "-".into(), |lsn| format!("below {lsn}"));
    let wal = plan.wal.iter().map(|line| {
        let mut row = vec![
            line.timeline.get().to_string(),
            below(line.tier1_below),
            line.tier1_reason.clone(),
        ];
        if plan.has_tier2 {
            row.push(below(line.tier2_below));
            row.push(line.tier2_reason.clone());
        }
        row
    });
    let rows: Vec<Vec<String>> = wal.collect();
    if !rows.is_empty() {
        let header = ["WAL OF TIMELINE", "TIER 1 MAY DROP", "WHY", "TIER 2 MAY DROP", "WHY"];
        let columns = if plan.has_tier2 { 5 } else { 3 };
        out += &format!("\n{}", table::render(&header[..columns], &rows));
    }
    out
}

fn summary(outcome: &MaintenanceOutcome) -> String {
    let names = |names: &[klio_storage::layout::BackupName]| match names.len() {
        0 => "none".to_owned(),
        _ => names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    };
    let mut out = format!(
        "backups expired      {}\nevicted from tier 1  {}\nWAL files removed    {} from tier 1, {} from tier 2\npacks                {} removed, {} marked for later removal\nfreed                {} on tier 1, {} in tier 2\n",
        names(&outcome.expired),
        names(&outcome.evicted),
        outcome.wal_removed_tier1,
        outcome.wal_removed_tier2,
        outcome.packs_removed,
        outcome.packs_marked,
        text::size(outcome.freed_tier1_bytes),
        text::size(outcome.freed_tier2_bytes),
    );
    for reason in &outcome.held_back {
        out += &format!("held back: {reason}\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::catalog::{
        Policies,
        retention::{BackupPlan, Hold, WalPlan},
    };

    #[test]
    fn a_plan_explains_what_goes_and_what_stays() {
        let decision = |present, keep, reason: &str| Decision {
            present,
            keep,
            reasons: vec![reason.to_owned()],
        };
        let plan = RetentionPlan {
            as_of_unix: 1.0,
            policies: Policies::default(),
            has_tier2: true,
            alarms: vec!["a record cannot be read".into()],
            hold: Hold::All,
            backups: vec![BackupPlan {
                name: "20261121T051800Z".parse().unwrap(),
                committed_unix: 1_795_238_280.0,
                tier1: decision(true, false, "no rule of tier 1"),
                tier2: decision(true, true, "last 2"),
            }],
            wal: vec![WalPlan {
                timeline: klio_pg::TimelineId::new(1).unwrap(),
                tier1_below: Some(Lsn::new(0x300_0000)),
                tier1_reason: "backup b needs it".into(),
                tier2_below: None,
                tier2_reason: "it is newer than every backup".into(),
            }],
        };
        let text = explain(&plan);
        for part in [
            "NOTHING IS DELETED: a record",
            "DROP",
            "no rule of tier 1",
            "keep",
            "last 2",
            "below 0/3000000",
            "newer than every",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
