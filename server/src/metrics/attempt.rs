//! How uploads end, as it is counted.

use klio_storage::layout::ClusterName;

/// How an attempt to upload a file ended: a closed set, for a metric's attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Attempt {
    /// This attempt uploaded it.
    Stored,
    /// It was in tier 2 already, with the same content.
    AlreadyThere,
    /// It is in neither tier.
    Missing,
    /// The file on tier 1 is damaged.
    Corrupt,
    /// What it needs is not in tier 2 yet.
    Waiting,
    /// Tier 2 has other content under its name.
    Conflict,
    /// The credentials were refused.
    Denied,
    /// The configuration is wrong; for example the bucket does not exist.
    Invalid,
    /// The network failed, or the object store throttles, is down or is full.
    Transient,
}

impl Attempt {
    pub const ALL: [Attempt; 9] = [
        Attempt::Stored,
        Attempt::AlreadyThere,
        Attempt::Missing,
        Attempt::Corrupt,
        Attempt::Waiting,
        Attempt::Conflict,
        Attempt::Denied,
        Attempt::Invalid,
        Attempt::Transient,
    ];

    /// The attribute's value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Attempt::Stored => "stored",
            Attempt::AlreadyThere => "already_there",
            Attempt::Missing => "missing",
            Attempt::Corrupt => "corrupt",
            Attempt::Waiting => "waiting",
            Attempt::Conflict => "conflict",
            Attempt::Denied => "denied",
            Attempt::Invalid => "invalid",
            Attempt::Transient => "transient",
        }
    }
}

/// Is called for every attempt, to count them.
pub trait Observer: Send + Sync + 'static {
    /// An attempt ended and uploaded `bytes`: 0 unless `Stored`.
    fn attempted(&self, cluster: &ClusterName, attempt: Attempt, bytes: u64);

    /// The same for an object of base backups.
    fn attempted_base(&self, _cluster: &ClusterName, _attempt: Attempt, _bytes: u64) {}
}

/// Counts nothing.
impl Observer for () {
    fn attempted(&self, _: &ClusterName, _: Attempt, _: u64) {}
}
