//! The `[encryption]` section: encryption at rest.
//!
//! - Encryption is on by default: without an identity the server does not start. Only `off = true` switches it off.
//! - If it is off, an identity file that is still configured opens what was encrypted before.

use klio_storage::crypt::{AtRest, Keys};
use std::path::PathBuf;

/// The prefix of each problem of this section.
pub const SECTION: &str = "[encryption]";

/// `[encryption]`
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionConfig {
    /// The age identity that opens everything. If the file has several, the newest comes first.
    pub identity_file: Option<PathBuf>,
    /// Additional public recipients, for example an offline recovery key.
    pub recipients: Vec<String>,
    /// Whether everything is stored unencrypted.
    pub off: bool,
}

/// The key is missing or wrong. The start then ends with its own exit status, before anything is changed.
#[derive(Debug, thiserror::Error)]
#[error("encryption at rest: {0}")]
pub struct KeyProblem(#[from] klio_storage::Error);

impl EncryptionConfig {
    /// Problems that can be found without reading the identity.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.identity_file.is_none() && !self.off {
            problems.push(format!(
                "{SECTION}: expected identity_file, found none and off = false; hint: klio-server keygen \
                 --out FILE makes an identity; off = true stores everything unencrypted"
            ));
        }
        if self.off && !self.recipients.is_empty() {
            problems.push(format!("{SECTION} recipients: expected none beside off = true"));
        }
        problems
    }

    /// The keys, read from the identity file.
    ///
    /// # Errors
    /// The file is missing or is not an identity, or a recipient is invalid.
    pub fn at_rest(&self) -> Result<AtRest, klio_storage::Error> {
        let keys = |path: &PathBuf| Keys::load(path, &self.recipients);
        match (&self.identity_file, self.off) {
            (Some(path), false) => keys(path).map(AtRest::On),
            (Some(path), true) => keys(path).map(AtRest::OffWith),
            // `validate` refuses this unless encryption is off.
            (None, _) => Ok(AtRest::Off),
        }
    }
}
