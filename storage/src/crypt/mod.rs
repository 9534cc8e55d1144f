//! Encryption at rest. Everything depends on one age identity, which the user provides.
//!
//! CRYPT1  Encrypted files are standard age files (<https://age-encryption.org/v1>): `age -d -i identity FILE` decrypts
//!         them (P10).
//! CRYPT2  New files are encrypted for the newest identity and every additional recipient; every identity in the file
//!         decrypts old ones, so a rotated key keeps working until all files that need it are rewritten.
//! CRYPT3  A wrong key is `Denied`, and the error names the file's recipients; changed or truncated bytes are
//!         `Corrupt`. The result is never shortened.
//! CRYPT4  No secret appears in a message, a log line or `Debug`.
//!
//! An X25519 header does not name its recipients. Ours does, in a stanza that every age implementation ignores
//! (`header.rs`).

mod header;
mod identity;
mod incoming;
mod keys;
mod stream;

pub use header::{HEADER_LIMIT_BYTES, MAGIC, recipients_of};
pub use identity::IdentityText;
pub use keys::{Keys, payload_error, read_identity};
pub use stream::{Decrypted, Encrypted};

/// Whether new files are encrypted, and with which keys.
#[derive(Debug, Clone, Default)]
pub enum AtRest {
    /// Not encrypted, by an explicit setting. Files that were encrypted earlier cannot be read.
    #[default]
    Off,
    /// Encrypted with these keys. Existing plain files can still be read.
    On(Keys),
    /// Not encrypted from now on, but these keys still decrypt what was encrypted earlier.
    OffWith(Keys),
}

impl AtRest {
    /// The keys to encrypt with.
    pub const fn writing(&self) -> Option<&Keys> {
        match self {
            AtRest::On(keys) => Some(keys),
            AtRest::Off | AtRest::OffWith(_) => None,
        }
    }

    /// The keys to decrypt with.
    pub const fn reading(&self) -> Option<&Keys> {
        match self {
            AtRest::On(keys) | AtRest::OffWith(keys) => Some(keys),
            AtRest::Off => None,
        }
    }

    /// Whether new files are encrypted.
    pub const fn is_on(&self) -> bool {
        self.writing().is_some()
    }

    /// The keys to decrypt with, or the error that the encrypted `place` cannot be read.
    ///
    /// # Errors
    /// `Denied` without keys.
    pub fn need(&self, place: impl std::fmt::Display) -> Result<&Keys, crate::Error> {
        self.reading().ok_or_else(|| {
            let detail = "expected an age identity to decrypt it, found encryption switched off and no identity";
            crate::Error::new(crate::Kind::Denied, crate::Op::Open, place, detail)
                .hint("set encryption.identity_file to the identity it was encrypted for")
        })
    }
}
