//! `klio list wal`: ranges of WAL by timeline and tier, and recorded gaps.

pub(super) mod backups;

use super::{
    connect, exit, print,
    status::{gap_json, gap_text},
    table, text,
};
use crate::{config::Config, error::Error, server_link::which};
use klio_proto::v1::{ListWalRequest, ListWalResponse};
use serde_json::{Value, json};

pub(super) async fn wal(config: &Config, as_json: bool) -> Result<u8, Error> {
    let connection = connect(config).await?;
    let which = which(&connection, &config.cluster()?).await?;
    let answer = connection
        .catalog()
        .list_wal(ListWalRequest { cluster: which.name.to_string() })
        .await
        .map_err(|status| Error::from_status("list WAL", &status))?
        .into_inner();
    print(&match as_json {
        true => format!("{:#}\n", which.tag(to_json(&answer))),
        false => which.line() + &to_table(&answer),
    });
    Ok(exit::OK)
}

fn to_table(answer: &ListWalResponse) -> String {
    let rows: Vec<Vec<String>> = answer
        .ranges
        .iter()
        .map(|r| {
            vec![
                r.timeline.to_string(),
                r.tier.clone(),
                text::lsn(r.start_lsn),
                text::lsn(r.end_lsn),
                r.segments.to_string(),
                text::size(r.end_lsn.saturating_sub(r.start_lsn)),
                text::size(r.stored_bytes),
            ]
        })
        .collect();
    let header = ["TIMELINE", "TIER", "FROM", "TO", "SEGMENTS", "WAL", "STORED"];
    let mut out = table::render(&header, &rows);
    if !answer.histories.is_empty() {
        let all: Vec<String> = answer.histories.iter().map(ToString::to_string).collect();
        out += &format!("\nhistory files of timelines: {}\n", all.join(", "));
    }
    answer.gaps.iter().for_each(|gap| out += &format!("{}\n", gap_text(gap)));
    out
}

fn to_json(answer: &ListWalResponse) -> Value {
    let ranges: Vec<Value> = answer
        .ranges
        .iter()
        .map(|r| {
            json!({
                "timeline": r.timeline,
                "tier": r.tier,
                "start_lsn": klio_pg::Lsn::new(r.start_lsn),
                "end_lsn": klio_pg::Lsn::new(r.end_lsn),
                "segments": r.segments,
                "stored_bytes": r.stored_bytes,
            })
        })
        .collect();
    json!({
        "ranges": ranges,
        "gaps": answer.gaps.iter().map(gap_json).collect::<Vec<_>>(),
        "histories": answer.histories,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_proto::v1::WalRange;

    #[test]
    fn ranges_are_listed_by_tier() {
        let range = |tier: &str| WalRange {
            timeline: 1,
            tier: tier.into(),
            start_lsn: 1 << 24,
            end_lsn: 3 << 24,
            segments: 2,
            stored_bytes: 100,
        };
        let answer = ListWalResponse {
            ranges: vec![range("tier1"), range("tier2")],
            gaps: vec![],
            histories: vec![2],
        };
        let text = to_table(&answer);
        assert!(text.contains("32.0 MiB") && text.contains("timelines: 2"), "{text}");
        assert_eq!(to_json(&answer)["ranges"][1]["tier"], "tier2");
    }
}
