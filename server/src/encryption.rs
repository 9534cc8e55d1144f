//! Encryption at rest as the server is told: `[encryption]`.
//!
//! - It is on: without an identity the server does not start. `off = true` is the only way out of it.
//! - Switched off, an identity file that is still named opens what was encrypted before.

use klio_storage::crypt::{AtRest, Keys};
use std::path::PathBuf;

/// How each problem of this section begins.
pub const SECTION: &str = "[encryption]";

/// `[encryption]`
#[derive(Debug, Clone, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionConfig {
    /// The age identity that opens everything; newest first when there are several in it.
    pub identity_file: Option<PathBuf>,
    /// More public recipients: an offline recovery key, for example.
    pub recipients: Vec<String>,
    /// Everything is stored plain.
    pub off: bool,
}

/// No key, or not the right one: a start that ends with an exit status of its own, having touched nothing.
#[derive(Debug, thiserror::Error)]
#[error("encryption at rest: {0}")]
pub struct KeyProblem(#[from] klio_storage::Error);

impl EncryptionConfig {
    /// What can be seen without reading the identity.
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
    /// The file is missing or is no identity, or a recipient is none.
    pub fn at_rest(&self) -> Result<AtRest, klio_storage::Error> {
        let keys = |path: &PathBuf| Keys::load(path, &self.recipients);
        match (&self.identity_file, self.off) {
            (Some(path), false) => keys(path).map(AtRest::On),
            (Some(path), true) => keys(path).map(AtRest::OffWith),
            // Refused by `validate` unless off.
            (None, _) => Ok(AtRest::Off),
        }
    }
}
