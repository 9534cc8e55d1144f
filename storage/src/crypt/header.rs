//! What can be read from an age file without a key.
//!
//! An age header is text: a version line, stanzas of `-> TYPE ARGUMENTS` with a base64 body, and `--- MAC`. For each
//! recipient we add the following stanza behind the one that age needs:
//!
//! ```text
//! -> klio/recipient age1…
//!
//! ```
//!
//! The format tells every reader to ignore it. With it, a wrong key is recognized by reading the header instead of
//! guessing. It is covered by the header's MAC, and public recipients are not secret.

use age::{EncryptError, Recipient, x25519};
use age_core::format::{FileKey, Stanza};
use std::collections::HashSet;

/// The beginning of every age file.
pub const MAGIC: &[u8] = b"age-encryption.org/v1\n";
/// More than our headers need, even with dozens of recipients.
pub const HEADER_LIMIT_BYTES: usize = 16 << 10;

const TAG: &str = "klio/recipient";

/// A recipient that is named in the header.
#[derive(Clone)]
pub(super) struct Named {
    inner: x25519::Recipient,
    pub(super) name: String,
}

impl Named {
    pub(super) fn new(inner: x25519::Recipient) -> Self {
        let name = inner.to_string();
        Self { inner, name }
    }
}

impl Recipient for Named {
    fn wrap_file_key(
        &self,
        file_key: &FileKey,
    ) -> Result<(Vec<Stanza>, HashSet<String>), EncryptError> {
        let (mut stanzas, labels) = self.inner.wrap_file_key(file_key)?;
        stanzas.push(Stanza { tag: TAG.into(), args: vec![self.name.clone()], body: Vec::new() });
        Ok((stanzas, labels))
    }
}

/// The recipients that an age file's header names: empty for a file that Klio did not write. `None` when the bytes (all
/// of the file, or its first [`HEADER_LIMIT_BYTES`]) are not an age header. Nothing is authenticated, so use the result
/// for messages only.
pub fn recipients_of(bytes: &[u8]) -> Option<Vec<String>> {
    let mut found = Vec::new();
    for line in bytes.strip_prefix(MAGIC)?.split(|b| *b == b'\n') {
        if line.starts_with(b"---") {
            return Some(found);
        }
        let line = std::str::from_utf8(line).ok()?;
        if let Some((TAG, name)) = line.strip_prefix("-> ").and_then(|rest| rest.split_once(' ')) {
            // The header is untrusted: only valid recipients get into a message.
            if name.parse::<x25519::Recipient>().is_ok() {
                found.push(name.to_owned());
            }
        }
    }
    None
}
