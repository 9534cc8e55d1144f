//! Small JSON records with a version and a checksum: the common format of `cluster.json`, `gaps.json`, backup records
//! and others.
//!
//! | field | what |
//! |---|---|
//! | `format` | version of the file's format, 2 |
//! | `crc32c` | checksum of the text of `body` exactly as it is stored, eight hexadecimal digits |
//! | `body` | the record |
//!
//! In format 1 the checksum is that of `body` written without white space. Such files are still read, but no longer
//! written.
//!
//! - The checksum does not depend on which fields a program knows, so a record may gain and lose fields within a format
//!   (P10): new fields have a default, and unknown ones are preserved by whoever writes the record again
//!   (`unknown.rs`). A new format is only needed for something that an older program would get wrong; such a program
//!   refuses it as `Newer`, not as damage.
//! - Any JSON tool can read it. It is replaced as a whole, durably, and never modified in place. A record that cannot
//!   be read is `Corrupt` or `Newer`, never absent (P6).

mod text;
mod unknown;

#[cfg(test)]
mod tests;

pub use unknown::Unknown;

use crate::{
    Error, Kind, Op,
    disk::{Disk, durable, read_small},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fmt::Display, io, path::Path};

/// The format whose checksum is of the body without white space.
const COMPACT: u32 = 1;
/// The format whose checksum is of the body as it is stored.
const FORMAT: u32 = 2;
/// Far more than any record needs.
pub const LIMIT_BYTES: u64 = 16 << 20;

#[derive(Deserialize)]
struct Version {
    format: u32,
}

#[derive(Deserialize)]
struct Stamp {
    crc32c: String,
}

fn sum(text: &str) -> String {
    format!("{:08x}", crc32c::crc32c(text.as_bytes()))
}

/// The text of the body, if its checksum is right.
fn checked<'a>(bytes: &'a [u8], place: &dyn Display) -> Result<&'a str, Error> {
    let corrupt = |detail: String| Error::new(Kind::Corrupt, Op::Read, place, detail);
    let version: Version = serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))?;
    let found = version.format;
    if found > FORMAT {
        let detail = format!(
            "expected format version {FORMAT} or older, found {found}: it was written by a newer Klio"
        );
        let hint =
            "use a Klio at least as new as the one that wrote it; the file is left unchanged";
        return Err(Error::new(Kind::Newer, Op::Read, place, detail).hint(hint));
    }
    if found < COMPACT {
        return Err(corrupt(format!("expected format version 1 or {FORMAT}, found {found}")));
    }
    let stamp: Stamp = serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))?;
    let document = std::str::from_utf8(bytes).map_err(|e| corrupt(e.to_string()))?;
    let body = text::member(document, "body")
        .ok_or_else(|| corrupt("expected a body, found none".into()))?;
    let expected = if found == COMPACT { sum(&text::compact(body)) } else { sum(body) };
    if stamp.crc32c == expected {
        return Ok(body);
    }
    let found = stamp.crc32c;
    Err(corrupt(format!("expected checksum {expected}, found {found:?}")))
}

/// Parses a record's bytes. `place` is for the error.
///
/// # Errors
/// `Newer` for a newer format; `Corrupt` if it is not JSON or has another checksum.
pub fn decode<T: DeserializeOwned>(bytes: &[u8], place: impl Display) -> Result<T, Error> {
    let body = checked(bytes, &place)?;
    serde_json::from_str(body).map_err(|e| Error::new(Kind::Corrupt, Op::Read, place, e))
}

/// The bytes of a record.
///
/// # Errors
/// `Invalid` for a body that JSON cannot represent.
pub fn encode<T: Serialize>(body: &T, place: impl Display) -> Result<Vec<u8>, Error> {
    let pretty = serde_json::to_string_pretty(body)
        .map_err(|e| Error::new(Kind::Invalid, Op::Write, &place, e))?;
    // Indentation for readers; there are no newlines inside strings.
    let body = pretty.replace('\n', "\n  ");
    let crc32c = sum(&body);
    let text = format!(
        "{{\n  \"format\": {FORMAT},\n  \"crc32c\": \"{crc32c}\",\n  \"body\": {body}\n}}\n"
    );
    Ok(text.into_bytes())
}

/// Reads a record's file; `None` when there is none.
///
/// # Errors
/// As [`decode`], or an I/O error of the disk.
pub fn load<T: DeserializeOwned>(disk: &dyn Disk, path: &Path) -> Result<Option<T>, Error> {
    match read_small(disk, path, LIMIT_BYTES) {
        Ok(bytes) => decode(&bytes, path.display()).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(Op::Read, path, e)),
    }
}

/// Replaces a record's file, durably.
///
/// # Errors
/// As [`encode`], or an I/O error of the disk; then the old file is still in place.
pub fn store<T: Serialize>(disk: &dyn Disk, path: &Path, body: &T) -> Result<(), Error> {
    durable::overwrite(disk, path, &encode(body, path.display())?)
}

/// Makes a record durable that was found at start, because its rename may not be durable. The bytes are unchanged,
/// whoever wrote them.
///
/// # Errors
/// As [`decode`], or an I/O error of the disk.
pub fn prove(disk: &dyn Disk, path: &Path) -> Result<(), Error> {
    let bytes = match read_small(disk, path, LIMIT_BYTES) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(Op::Read, path, e)),
    };
    checked(&bytes, &path.display())?;
    durable::overwrite(disk, path, &bytes)
}
