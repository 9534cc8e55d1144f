//! What `klio timeline list` says of a cluster, and what a person decides about its timelines.

use crate::{
    programs::{self, Outcome},
    site::{PATIENCE, Site},
    wait::eventually,
};
use klio_pg::Lsn;
use serde_json::Value;
use std::path::Path;

/// Every timeline as the list has it.
pub async fn list(site: &Site) -> Vec<Value> {
    let outcome = site.klio(None, &["timeline", "list", "--json"]).await;
    let value: Value = serde_json::from_str(&outcome.stdout).unwrap_or_default();
    value["timelines"].as_array().cloned().unwrap_or_default()
}

/// A timeline as it stands: its standing, whether it streams, and how far it is.
pub async fn line(site: &Site, timeline: u32) -> Option<(String, bool, Lsn)> {
    let all = list(site).await;
    let found = all.iter().find(|line| line["timeline"] == timeline)?;
    let standing = found["standing"].as_str().unwrap_or_default().to_owned();
    let flushed = found["flushed_lsn"].as_str()?.parse().ok()?;
    Some((standing, found["connected"].as_bool()?, flushed))
}

/// Waits until it streams, stands so, and is durable up to `end`.
pub async fn wait_line(site: &Site, timeline: u32, standing: &str, end: Lsn) {
    let what = format!("timeline {timeline} to be {standing} and durable up to {end}");
    eventually(&what, PATIENCE, || async {
        match line(site, timeline).await {
            Some((found, true, flushed)) if found == standing && flushed >= end => Ok(()),
            found => Err(found),
        }
    })
    .await;
}

/// `klio timeline` with the configuration of whoever decides.
pub async fn decide(site: &Site, bundle: &Path, args: &[&str]) -> Outcome {
    let args = [&["timeline"], args, &["--cluster", "main"]].concat();
    programs::run(site.klio_command_of(bundle, None, &args)).await
}
