//! A job: one finished file of one cluster that is to be uploaded to tier 2.
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
//! A job of kind `base` has `object` instead of `file`: its key below `<cluster>/`, such as `base/data/ab/ab…` or
//! `backups/<name>.json`. Its subject is `klio.jobs.base.<cluster>.<object, / as ., . as =>`.
//!
//! A job is JSON, on the subject `klio.jobs.wal.<cluster>.<timeline>.<file, dots as dashes>`. Each file has its own
//! subject, so that a job which is queued already is not queued again. Every field is only a hint (P4): the consumer
//! looks at the file. A job of an unknown version stays in the queue for a newer server.

use klio_storage::{
    layout::{BaseObject, ClusterName, WalFile},
    tier2::Sha256Sum,
};
use serde_json::Value;

/// The value of `v`.
pub const VERSION: u64 = 1;
/// All our subjects.
pub const SUBJECTS: &str = "klio.jobs.>";

/// A WAL file to upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    pub cluster: ClusterName,
    pub file: WalFile,
    /// Bytes of the file on tier 1.
    pub size: u64,
    /// Its checksum, if known.
    pub sha256: Option<Sha256Sum>,
}

/// An object of base backups to upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseJob {
    pub cluster: ClusterName,
    pub object: BaseObject,
    /// Bytes of the file on tier 1.
    pub size: u64,
}

/// A job of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// A WAL file.
    Wal(Job),
    /// An object of base backups.
    Base(BaseJob),
}

impl From<Job> for Task {
    fn from(job: Job) -> Self {
        Task::Wal(job)
    }
}

impl From<BaseJob> for Task {
    fn from(job: BaseJob) -> Self {
        Task::Base(job)
    }
}

impl Task {
    pub const fn cluster(&self) -> &ClusterName {
        match self {
            Task::Wal(job) => &job.cluster,
            Task::Base(job) => &job.cluster,
        }
    }

    /// The file or object, for spans and logs.
    pub fn what(&self) -> String {
        match self {
            Task::Wal(job) => job.file.to_string(),
            Task::Base(job) => job.object.to_string(),
        }
    }

    /// The payload of the message.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Task::Wal(job) => job.encode(),
            Task::Base(job) => job.encode(),
        }
    }

    /// The subject on which it is published.
    pub fn subject(&self) -> String {
        match self {
            Task::Wal(job) => job.subject(),
            Task::Base(job) => job.subject(),
        }
    }

    /// The idempotency key.
    pub fn id(&self) -> String {
        match self {
            Task::Wal(job) => job.id(),
            Task::Base(job) => job.id(),
        }
    }
}

/// Why a message is not one of our jobs.
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
    /// `Version` is checked before anything else.
    pub fn decode(payload: &[u8]) -> Result<Self, JobError> {
        let wire: Wire = read(payload, "wal")?;
        Ok(Self {
            cluster: ClusterName::parse_generation(&wire.cluster).map_err(|e| malformed(&e))?,
            file: wire.file.parse().map_err(|e| malformed(&e))?,
            size: wire.size,
            sha256: wire.sha256,
        })
    }

    /// The subject on which it is published.
    pub fn subject(&self) -> String {
        let file = self.file.to_string().replace('.', "-");
        format!("klio.jobs.wal.{}.{}.{file}", self.cluster, self.file.timeline())
    }

    /// Idempotency key.
    pub fn id(&self) -> String {
        format!("wal/{}/{}", self.cluster, self.file)
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
struct BaseWire {
    v: u64,
    kind: String,
    cluster: String,
    object: String,
    size: u64,
}

impl BaseJob {
    /// The message's payload.
    pub fn encode(&self) -> Vec<u8> {
        let wire = BaseWire {
            v: VERSION,
            kind: "base".into(),
            cluster: self.cluster.to_string(),
            object: self.object.relative(),
            size: self.size,
        };
        serde_json::to_vec(&wire).expect("a struct of strings and numbers is always JSON")
    }

    /// Reads a payload.
    ///
    /// # Errors
    /// `Version` is checked before anything else.
    pub fn decode(payload: &[u8]) -> Result<Self, JobError> {
        let wire: BaseWire = read(payload, "base")?;
        let object = BaseObject::parse_relative(&wire.object).ok_or_else(|| {
            malformed(&format_args!("expected an object, found {:?}", wire.object))
        })?;
        let cluster = ClusterName::parse_generation(&wire.cluster).map_err(|e| malformed(&e))?;
        Ok(Self { cluster, object, size: wire.size })
    }

    /// The subject on which it is published. Names of backups may contain dots, which would separate parts of the
    /// subject.
    pub fn subject(&self) -> String {
        let object = self.object.relative().replace('.', "=").replace('/', ".");
        format!("klio.jobs.base.{}.{object}", self.cluster)
    }

    /// Idempotency key.
    pub fn id(&self) -> String {
        format!("base/{}/{}", self.cluster, self.object)
    }
}

fn malformed(problem: &dyn std::fmt::Display) -> JobError {
    JobError::Malformed(problem.to_string())
}

/// Reads a payload of a kind; checks its version before anything else.
fn read<T: serde::de::DeserializeOwned>(payload: &[u8], kind: &str) -> Result<T, JobError> {
    let value: Value = serde_json::from_slice(payload).map_err(|e| malformed(&e))?;
    match value.get("v").and_then(Value::as_u64) {
        Some(VERSION) => {}
        Some(other) => return Err(JobError::Version(other)),
        None => return Err(malformed(&"expected a version in \"v\", found none")),
    }
    let found = value.get("kind").and_then(Value::as_str).unwrap_or_default();
    if found != kind {
        return Err(malformed(&format_args!("expected kind {kind}, found {found:?}")));
    }
    serde_json::from_value(value).map_err(|e| malformed(&e))
}

/// The subjects of one cluster's base backups.
pub fn base_subjects_of(cluster: &ClusterName) -> String {
    format!("klio.jobs.base.{cluster}.>")
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

    #[test]
    fn a_field_of_a_version_to_come_passes() {
        let good = job("00000002.history");
        let text = String::from_utf8(good.encode()).unwrap();
        let later = text.replacen('{', "{\"of_a_version_to_come\":[1],", 1);
        assert_eq!(Job::decode(later.as_bytes()), Ok(good));
    }

    #[test]
    fn jobs_of_base_backups_round_trip_on_subjects_of_their_own() {
        let id = "ab".repeat(32);
        let mut subjects = std::collections::BTreeSet::new();
        for object in [
            "cluster.json".to_owned(),
            "repository.json".into(),
            "repository.json.age".into(),
            "base/config".into(),
            format!("base/keys/{id}"),
            format!("base/data/ab/{id}"),
            format!("base/snapshots/{id}"),
            "backups/a.b.json".into(),
            "backups/a-b.json".into(),
            "backups/a.json".into(),
        ] {
            let object = BaseObject::parse_relative(&object).unwrap();
            let generation = ClusterName::parse_generation("pg-1@2").unwrap();
            let job = BaseJob { cluster: generation, object: object.clone(), size: 9 };
            assert_eq!(BaseJob::decode(&job.encode()), Ok(job));
            let job = BaseJob { cluster: "pg-1".parse().unwrap(), object, size: 9 };
            assert_eq!(BaseJob::decode(&job.encode()), Ok(job.clone()));
            assert!(job.subject().starts_with("klio.jobs.base.pg-1."));
            assert!(!job.subject().contains(".."), "{}", job.subject());
            assert!(subjects.insert(job.subject()), "{}", job.subject());
        }
        let text = r#"{"v":1,"kind":"base","cluster":"pg","object":"../x","size":1}"#;
        assert!(matches!(BaseJob::decode(text.as_bytes()), Err(JobError::Malformed(_))));
        let wal = job("00000002.history").encode();
        assert!(matches!(BaseJob::decode(&wal), Err(JobError::Malformed(_))));
        let newer = text.replace("\"v\":1", "\"v\":2");
        assert_eq!(BaseJob::decode(newer.as_bytes()), Err(JobError::Version(2)));
    }

    proptest! {
        #[test]
        fn round_trips(
            cluster in "[a-z0-9][a-z0-9_-]{0,62}(@[1-9][0-9]{0,3})?",
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
                cluster: ClusterName::parse_generation(&cluster).unwrap(),
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
