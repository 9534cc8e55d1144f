//! The keys of a process: identities for decryption, recipients for encryption.

use super::{
    header::{self, HEADER_LIMIT_BYTES, Named},
    identity::IdentityText,
    stream::{Decrypted, Encrypted},
};
use crate::{Error, Kind, Op};
use age::{DecryptError, Decryptor, Encryptor, Identity, x25519};
use std::{
    fmt,
    io::{self, BufReader, Read, Write},
    path::Path,
    sync::Arc,
};
use zeroize::Zeroizing;

/// Identity files have a few lines.
const IDENTITY_LIMIT_BYTES: u64 = 1 << 20;
/// The buffer for small secrets. It is large enough that it never grows, which would leave copies in memory.
const SMALL_SECRET_BYTES: usize = 16 << 10;

/// Identities, newest first, and recipients. A clone is cheap.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    /// Each with its recipient. Empty for keys that can only encrypt.
    identities: Vec<(x25519::Identity, String)>,
    recipients: Vec<Named>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("recipients", &self.recipients()).finish_non_exhaustive()
    }
}

impl Keys {
    /// From an identity file and additional recipients.
    ///
    /// # Errors
    /// `NotFound`, `Denied` or `Io` of the file; `Invalid` when it has no identity or an invalid line.
    pub fn load(identity_file: &Path, extra_recipients: &[String]) -> Result<Self, Error> {
        let text = read_identity(identity_file)?;
        Self::of(&text, extra_recipients, &identity_file.display().to_string())
    }

    /// From the text of an identity file and additional recipients.
    ///
    /// # Errors
    /// `Invalid` when it has no identity or an invalid line.
    pub fn from_text(identities: &str, extra_recipients: &[String]) -> Result<Self, Error> {
        let text = IdentityText::new(Zeroizing::new(identities.to_owned()));
        Self::of(&text, extra_recipients, "age identity")
    }

    /// As [`Keys::from_text`]; `place` is for the error.
    ///
    /// # Errors
    /// As [`Keys::from_text`].
    pub fn of(text: &IdentityText, extra: &[String], place: &str) -> Result<Self, Error> {
        let identities: Vec<_> = text
            .identities(place)?
            .into_iter()
            .map(|identity| {
                let name = identity.to_public().to_string();
                (identity, name)
            })
            .collect();
        let newest = identities.first().map(|(identity, _)| Named::new(identity.to_public()));
        let mut recipients: Vec<Named> = newest.into_iter().collect();
        for name in extra {
            let recipient: x25519::Recipient = name.trim().parse().map_err(|why: &str| {
                let detail = format!("expected an age recipient age1…, found {name:?}: {why}");
                Error::new(Kind::Invalid, Op::Configure, "recipients", detail)
            })?;
            let named = Named::new(recipient);
            if recipients.iter().all(|there| there.name != named.name) {
                recipients.push(named);
            }
        }
        Ok(Self(Arc::new(Inner { identities, recipients })))
    }

    /// Generates an identity: the text of its file, and its public recipient.
    pub fn generate() -> (Zeroizing<String>, String) {
        let (text, recipient) = IdentityText::generate("by klio");
        (Zeroizing::new(text.expose().to_owned()), recipient)
    }

    /// The recipients of new files: the newest identity's, then the additional ones.
    pub fn recipients(&self) -> Vec<String> {
        self.0.recipients.iter().map(|recipient| recipient.name.clone()).collect()
    }

    /// The recipient of each identity, newest first.
    pub fn own(&self) -> Vec<String> {
        self.0.identities.iter().map(|(_, name)| name.clone()).collect()
    }

    /// Encrypts something small.
    ///
    /// # Errors
    /// `Invalid`, which cannot happen with recipients that were parsed.
    pub fn wrap(&self, plain: &[u8]) -> Result<Vec<u8>, Error> {
        let mut writer = self.encrypt(Vec::with_capacity(plain.len() + 1024))?;
        let done = writer.write_all(plain).and_then(|()| writer.finish());
        done.map_err(|e| Error::new(Kind::Io, Op::Write, "age file", e))
    }

    /// Decrypts something small.
    ///
    /// # Errors
    /// As [`Keys::decrypt`].
    pub fn unwrap(&self, age: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        let mut plain = Zeroizing::new(Vec::with_capacity(SMALL_SECRET_BYTES.max(age.len())));
        let mut reader = self.decrypt(age)?;
        reader.read_to_end(&mut plain).map_err(|e| payload_error("age file", &e))?;
        Ok(plain)
    }

    /// Returns a writer that encrypts into `to`. It must be finished.
    ///
    /// # Errors
    /// `Io` when writing the header to `to` fails.
    pub fn encrypt<W: Write>(&self, to: W) -> Result<Encrypted<W>, Error> {
        let recipients = self.0.recipients.iter().map(|r| r as &dyn age::Recipient);
        let encryptor = Encryptor::with_recipients(recipients)
            .map_err(|e| Error::new(Kind::Invalid, Op::Write, "age file", e))?;
        let writer = encryptor
            .wrap_output(to)
            .map_err(|e| Error::io(Op::Write, Path::new("age file"), e))?;
        Ok(Encrypted(writer))
    }

    /// Decrypts `from`, whose header is read here. Convert errors while reading the result with [`payload_error`].
    ///
    /// # Errors
    /// `Denied`, with the recipients, when none of the identities decrypts it; `Corrupt` when it is not an age file or
    /// its header was changed; an error of `from`.
    pub fn decrypt<R: Read>(&self, mut from: R) -> Result<Decrypted<R>, Error> {
        let mut head = Vec::with_capacity(HEADER_LIMIT_BYTES);
        (&mut from)
            .take(HEADER_LIMIT_BYTES as u64)
            .read_to_end(&mut head)
            .map_err(|e| Error::io(Op::Read, Path::new("age file"), e))?;
        let recipients = header::recipients_of(&head);
        // With a zero-capacity buffer, the second part ends a header that is longer than any of ours.
        let whole = io::Cursor::new(head).chain(BufReader::with_capacity(0, from));
        let identities = self.identities().map(|identity| identity as &dyn Identity);
        Decryptor::new_buffered(whole)
            .and_then(|decryptor| decryptor.decrypt(identities))
            .map(Decrypted)
            .map_err(|e| self.header_error(e, recipients.as_deref()))
    }

    pub(super) fn identities(&self) -> impl Iterator<Item = &x25519::Identity> {
        self.0.identities.iter().map(|(identity, _)| identity)
    }

    /// The error for a header that cannot be decrypted.
    pub(super) fn header_error(&self, cause: DecryptError, recipients: Option<&[String]>) -> Error {
        let place = "age file";
        let own = self.own();
        let for_us = recipients.is_some_and(|all| all.iter().any(|name| own.contains(name)));
        match cause {
            DecryptError::Io(e) if e.kind() != io::ErrorKind::UnexpectedEof => {
                Error::io(Op::Read, Path::new(place), e)
            }
            DecryptError::NoMatchingKeys | DecryptError::KeyDecryptionFailed
                if !for_us && recipients.is_some() =>
            {
                let detail = format!(
                    "expected an identity of {}, found those of {}",
                    listed(recipients.unwrap_or_default()),
                    listed(&own)
                );
                Error::new(Kind::Denied, Op::Open, place, detail)
                    .hint("add the identity it was encrypted for to the identity file")
            }
            other => {
                let detail = format!("expected a complete age file, found: {other}");
                Error::new(Kind::Corrupt, Op::Open, place, detail)
            }
        }
    }
}

fn listed(names: &[String]) -> String {
    if names.is_empty() {
        "a recipient that the header does not name".into()
    } else {
        names.join(" or ")
    }
}

/// The error for a failure while the content of an age file is read: changed or truncated bytes are `Corrupt`.
pub fn payload_error(place: impl fmt::Display, cause: &io::Error) -> Error {
    use io::ErrorKind::{InvalidData, UnexpectedEof};
    let kind = match cause.kind() {
        InvalidData | UnexpectedEof => Kind::Corrupt,
        _ => Error::io(Op::Read, Path::new(""), io::Error::from(cause.kind())).kind,
    };
    Error::new(kind, Op::Read, place, cause)
}

/// Reads the text of an identity file.
///
/// # Errors
/// `NotFound`, `Denied` or `Io` of the file; `Invalid` when it is far too large or not text.
pub fn read_identity(path: &Path) -> Result<IdentityText, Error> {
    let failed = |e| {
        Error::io(Op::Open, path, e).hint(
            "check encryption.identity_file, or create an age identity with klio-server keygen",
        )
    };
    let mut text = Zeroizing::new(String::new());
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut limited = file.take(IDENTITY_LIMIT_BYTES + 1);
    match limited.read_to_string(&mut text) {
        Ok(count) if count as u64 <= IDENTITY_LIMIT_BYTES => Ok(IdentityText::new(text)),
        Err(e) if e.kind() != io::ErrorKind::InvalidData => Err(failed(e)),
        _ => {
            let detail = "expected an age identity file, found something else";
            Err(Error::new(Kind::Invalid, Op::Configure, path.display(), detail)
                .hint("create one with klio-server keygen"))
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
