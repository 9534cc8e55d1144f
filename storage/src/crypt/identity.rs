//! The text of an identity file, as `age-keygen` writes it.
//!
//! One identity a line (`AGE-SECRET-KEY-1…`), `#` begins a comment. The first one is the newest: what is written is for
//! it. A rotation puts a new one in front and keeps the rest.

use crate::{Error, Kind, Op};
use age::{secrecy::ExposeSecret, x25519};
use std::fmt;
use zeroize::Zeroizing;

/// An identity file's text; wiped when dropped.
#[derive(Clone)]
pub struct IdentityText(Zeroizing<String>);

impl fmt::Debug for IdentityText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityText(..)")
    }
}

impl IdentityText {
    /// A new identity's file, and its public recipient. `created` goes into a comment.
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

    /// An existing file's text.
    pub fn new(text: Zeroizing<String>) -> Self {
        Self(text)
    }

    /// The text: secret.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// This text with the identities of `older` behind its own.
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
            // The line is not repeated: it may be a secret with a typing error.
            let identity = line.parse().map_err(|why: &str| {
                let number = number + 1;
                let detail = format!("expected AGE-SECRET-KEY-1… on line {number}, found {why}");
                Error::new(Kind::Invalid, Op::Configure, place, detail)
                    .hint("klio-server keygen makes one; plugins and passphrases are not supported")
            })?;
            found.push(identity);
        }
        if found.is_empty() {
            let detail = "expected at least one age identity, found none";
            return Err(Error::new(Kind::Invalid, Op::Configure, place, detail)
                .hint("klio-server keygen makes one"));
        }
        Ok(found)
    }
}
