//! Encryption at rest: one age identity, given by the user, is the root of everything.
//!
//! CRYPT1  What is encrypted is a standard age file (<https://age-encryption.org/v1>): `age -d -i identity FILE` opens it (P10).
//! CRYPT2  New files are for the newest identity and every extra recipient; every identity of the file opens old ones, so a
//!     rotated key keeps working until all that needs it is written again.
//! CRYPT3  A wrong key is `Denied` and names whom the file is for; changed or cut bytes are `Corrupt`. Never a short result.
//! CRYPT4  No secret in a message, a log line or `Debug`.
//!
//! An X25519 header does not say for whom it is. Ours does, in a stanza that every age ignores (`header.rs`).

mod header;
mod identity;
mod incoming;
mod keys;
mod stream;

pub use header::{HEADER_LIMIT_BYTES, MAGIC, recipients_of};
pub use identity::IdentityText;
pub use keys::{Keys, payload_error, read_identity};
pub use stream::{Decrypted, Encrypted};

/// Whether what is written is encrypted.
#[derive(Debug, Clone, Default)]
pub enum AtRest {
    /// Plain, by an explicit setting. Encrypted files of earlier are not readable.
    #[default]
    Off,
    /// Encrypted with these keys. Plain files of earlier stay readable.
    On(Keys),
    /// Plain from now on, but these keys still open what was encrypted before.
    OffWith(Keys),
}

impl AtRest {
    /// The keys to write with.
    pub const fn writing(&self) -> Option<&Keys> {
        match self {
            AtRest::On(keys) => Some(keys),
            AtRest::Off | AtRest::OffWith(_) => None,
        }
    }

    /// The keys to read with.
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

    /// The keys to read with, or why `place`, which is encrypted, cannot be read.
    ///
    /// # Errors
    /// `Denied` without keys.
    pub fn need(&self, place: impl std::fmt::Display) -> Result<&Keys, crate::Error> {
        self.reading().ok_or_else(|| {
            let detail = "expected an age identity to decrypt it, found encryption switched off and none given";
            crate::Error::new(crate::Kind::Denied, crate::Op::Open, place, detail)
                .hint("set encryption.identity_file to the identity it was encrypted for")
        })
    }
}
