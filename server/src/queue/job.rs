//! A job: one finished WAL file of one cluster that tier 2 should get.
//!
//! | field | version 1 |
//! |---|---|
//! | `v` | 1 |
//! | `kind` | `wal` |
//! | `cluster` | cluster name |
//! | `file` | PostgreSQL's name of the file: segment, `.partial` or `.history` |
//! | `size` | bytes of the tier-1 file |
//! | `sha256` | of the tier-1 file, where known |
//!
//! JSON, on the subject `klio.jobs.wal.<cluster>.<timeline>.<file, dots as dashes>`: one subject a file,
//! so that a job which is queued already is not queued again. Every field is only a hint (P4): the
//! consumer looks at the file. A job of an unknown version is left in the queue for a newer server.

use klio_storage::{
    layout::{ClusterName, WalFile},
    tier2::Sha256Sum,
};
use serde_json::Value;

/// What `v` is.
pub const VERSION: u64 = 1;
/// Every subject of ours begins with this.
pub const SUBJECTS: &str = "klio.jobs.>";

/// A WAL file to offload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Whose.
    pub cluster: ClusterName,
    /// Which.
    pub file: WalFile,
    /// Bytes of the tier-1 file.
    pub size: u64,
    /// Its sum, where known.
    pub sha256: Option<Sha256Sum>,
}

/// Not a job of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// Written by a newer server.
    #[error("read job: expected version {VERSION}, found {0}")]
    Version(u64),
    /// Not readable at all.
    #[error("read job: {0}")]
    Malformed(String),
}

#[derive(serde::Serialize, serde::Deserialize)]
struct Wire {
    v: u64,
    kind: String,
    cluster: String,
    file: String,
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha256: Option<Sha256Sum>,
}

impl Job {
    /// The message's payload.
    pub fn encode(&self) -> Vec<u8> {
        let wire = Wire {
            v: VERSION,
            kind: "wal".into(),
            cluster: self.cluster.to_string(),
            file: self.file.to_string(),
            size: self.size,
            sha256: self.sha256,
        };
        serde_json::to_vec(&wire).expect("a struct of strings and numbers is always JSON")
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// `Version` before anything else is looked at.
    pub fn decode(payload: &[u8]) -> Result<Self, JobError> {
        let bad = |problem: &dyn std::fmt::Display| JobError::Malformed(problem.to_string());
        let value: Value = serde_json::from_slice(payload).map_err(|e| bad(&e))?;
        match value.get("v").and_then(Value::as_u64) {
            Some(VERSION) => {}
            Some(other) => return Err(JobError::Version(other)),
            None => return Err(bad(&"expected a version in \"v\", found none")),
        }
        let wire: Wire = serde_json::from_value(value).map_err(|e| bad(&e))?;
        if wire.kind != "wal" {
            return Err(bad(&format_args!("expected kind wal, found {:?}", wire.kind)));
        }
        Ok(Self {
            cluster: wire.cluster.parse().map_err(|e| bad(&e))?,
            file: wire.file.parse().map_err(|e| bad(&e))?,
            size: wire.size,
            sha256: wire.sha256,
        })
    }

    /// Where it is published.
    pub fn subject(&self) -> String {
        let file = self.file.to_string().replace('.', "-");
        format!("klio.jobs.wal.{}.{}.{file}", self.cluster, self.file.timeline())
    }

    /// Idempotency key.
    pub fn id(&self) -> String {
        format!("wal/{}/{}", self.cluster, self.file)
    }
}

/// The subjects of one cluster.
pub fn subjects_of(cluster: &ClusterName) -> String {
    format!("klio.jobs.wal.{cluster}.>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn job(text: &str) -> Job {
        Job { cluster: "pg-1".parse().unwrap(), file: text.parse().unwrap(), size: 7, sha256: None }
    }

    #[test]
    fn subjects_have_no_more_parts_than_meant() {
        for file in
            ["000000010000000000000001", "000000010000000000000001.partial", "00000002.history"]
        {
            assert_eq!(job(file).subject().split('.').count(), 6, "{file}");
        }
        assert_eq!(
            job("00000002.history").subject(),
            "klio.jobs.wal.pg-1.00000002.00000002-history"
        );
    }

    #[test]
    fn an_unknown_version_is_told_from_rubbish() {
        let text = String::from_utf8(job("00000002.history").encode()).unwrap();
        let newer = text.replace("\"v\":1", "\"v\":2").replace("\"cluster\"", "\"who\"");
        assert_eq!(Job::decode(newer.as_bytes()), Err(JobError::Version(2)));
        for bad in ["", "{}", "[]", "{\"v\":1}", "{\"v\":-1}"] {
            assert!(matches!(Job::decode(bad.as_bytes()), Err(JobError::Malformed(_))), "{bad}");
        }
        let path = text.replace("pg-1", "../x");
        assert!(matches!(Job::decode(path.as_bytes()), Err(JobError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn round_trips(
            cluster in "[a-z0-9][a-z0-9_-]{0,62}",
            timeline in 1u32..,
            position: u64,
            kind in 0..3,
            size: u64,
            sum in prop::option::of(any::<[u8; 32]>()),
        ) {
            let segment = format!("{timeline:08X}{position:016X}");
            let file = match kind {
                0 => segment,
                1 => format!("{segment}.partial"),
                _ => format!("{timeline:08X}.history"),
            };
            let job = Job {
                cluster: cluster.parse().unwrap(),
                file: file.parse().unwrap(),
                size,
                sha256: sum.map(Sha256Sum::new),
            };
            prop_assert_eq!(Job::decode(&job.encode()), Ok(job));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = Job::decode(&bytes);
        }
    }
}
