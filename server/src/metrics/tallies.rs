//! Counts by instrument, cluster and one attribute value (the word), for the observable counters.
//!
//! - They are stored here because recording instruments never forget a series: that of a removed cluster would be
//!   shown for ever, and the SDK merges a thousand clusters with several outcomes into one series.
//! - Names and words are constants, so the words of an instrument are a closed set.

use super::Reading;
use klio_storage::layout::ClusterName;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

/// By instrument and word; the word is empty if the instrument has none.
type Counts = BTreeMap<(&'static str, &'static str), u64>;

#[derive(Debug, Default)]
pub struct Tallies(Mutex<BTreeMap<ClusterName, Counts>>);

impl Tallies {
    pub fn add(&self, cluster: &ClusterName, name: &'static str, word: &'static str, n: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // This is called for each message of WAL, so the name is copied the first time only.
        if !all.contains_key(cluster) {
            all.insert(cluster.clone(), Counts::new());
        }
        if let Some(counts) = all.get_mut(cluster) {
            *counts.entry((name, word)).or_default() += n;
        }
    }

    /// The counts of these clusters, with a 0 for each of `zeros` that was not counted yet.
    pub fn read(
        &self,
        clusters: &BTreeSet<ClusterName>,
        zeros: &[(&'static str, &'static [&'static str])],
        out: &mut Vec<Reading>,
    ) {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for cluster in clusters {
            let mut counts: Counts = zeros
                .iter()
                .flat_map(|(name, words)| words.iter().map(|word| ((*name, *word), 0)))
                .collect();
            counts.extend(all.get(cluster).into_iter().flatten().map(|(key, n)| (*key, *n)));
            out.extend(counts.into_iter().map(|((name, word), n)| Reading {
                name,
                cluster: Some(cluster.clone()),
                word,
                value: n as f64,
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<ClusterName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn read(tallies: &Tallies, names: &[&str]) -> Vec<(String, &'static str, f64)> {
        let mut out = Vec::new();
        tallies.read(&set(names), &[("klio.wal.written", &[""])], &mut out);
        out.into_iter().map(|r| (r.cluster.unwrap().to_string(), r.name, r.value)).collect()
    }

    #[test]
    fn counts_begin_with_zero_and_those_of_a_cluster_that_is_gone_disappear() {
        let tallies = Tallies::default();
        tallies.add(&"a".parse().unwrap(), "klio.wal.written", "", 2);
        tallies.add(&"a".parse().unwrap(), "klio.wal.written", "", 1);
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let both = [(a, "klio.wal.written", 3.0), (b.clone(), "klio.wal.written", 0.0)];
        assert_eq!(read(&tallies, &["a", "b"]), both);
        assert_eq!(read(&tallies, &["b"]), [(b, "klio.wal.written", 0.0)]);
    }
}
