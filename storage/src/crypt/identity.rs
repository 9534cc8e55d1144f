//! The text of an identity file, as `age-keygen` writes it.
//!
//! One identity per line (`AGE-SECRET-KEY-1…`), `#` begins a comment. The first one is the newest, and new files are
//! encrypted for it. A rotation inserts a new one at the beginning and keeps the others.

use crate::{Error, Kind, Op};
use age::{secrecy::ExposeSecret, x25519};
use std::fmt;
use zeroize::Zeroizing;

/// The text of an identity file; wiped when dropped.
#[derive(Clone)]
pub struct IdentityText(Zeroizing<String>);

impl fmt::Debug for IdentityText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityText(..)")
    }
}

impl IdentityText {
    /// Generates an identity: the text of its file, and its public recipient. `created` goes into a comment.
    pub fn generate(created: &str) -> (Self, String) {
        let identity = x25519::Identity::generate();
        let recipient = identity.to_public().to_string();
        let secret = identity.to_string();
        let text = Zeroizing::new(format!(
            "# created: {created}\n# public key: {recipient}\n{}\n",
            secret.expose_secret()
        ));
        (Self(text), recipient)
    }

    /// From the text of an existing file.
    pub fn new(text: Zeroizing<String>) -> Self {
        Self(text)
    }

    /// The text, which is secret.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// This text followed by the identities of `older`.
    #[must_use]
    pub fn before(self, older: &Self) -> Self {
        Self(Zeroizing::new(format!("{}{}", *self.0, *older.0)))
    }

    /// The identities, newest first.
    pub(super) fn identities(&self, place: &str) -> Result<Vec<x25519::Identity>, Error> {
        let mut found = Vec::new();
        for (number, line) in self.0.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            // The line is not repeated in the error: it may be a secret with a typing error.
            let identity = line.parse().map_err(|why: &str| {
                let number = number + 1;
                let detail = format!("expected AGE-SECRET-KEY-1… on line {number}, found {why}");
                Error::new(Kind::Invalid, Op::Configure, place, detail).hint(
                    "create one with klio-server keygen; plugins and passphrases are not supported",
                )
            })?;
            found.push(identity);
        }
        if found.is_empty() {
            let detail = "expected at least one age identity, found none";
            return Err(Error::new(Kind::Invalid, Op::Configure, place, detail)
                .hint("create one with klio-server keygen"));
        }
        Ok(found)
    }
}
