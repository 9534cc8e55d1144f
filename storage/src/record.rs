//! Small JSON records with a version and a checksum: the one shape for `cluster.json`, `gaps.json`,
//! backup records and their like.
//!
//! | field | what |
//! |---|---|
//! | `format` | version of the file's format, 1 |
//! | `crc32c` | checksum of `body` written without white space, eight hexadecimal digits |
//! | `body` | the record |
//!
//! Read by hand with any JSON tool (P10). Replaced as a whole, durably, never written into. A record
//! that cannot be read is `Corrupt`, never "not there" (P6).

use crate::{
    Error, Kind, Op,
    disk::{Disk, durable, read_small},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{io, path::Path};

const FORMAT: u32 = 1;
/// Far more than any record ever takes.
pub const LIMIT_BYTES: u64 = 16 << 20;

#[derive(Deserialize)]
struct Version {
    format: u32,
}

#[derive(Serialize, Deserialize)]
struct Stamped<T> {
    format: u32,
    crc32c: String,
    body: T,
}

fn stamp<T: Serialize>(body: &T) -> Result<String, serde_json::Error> {
    Ok(format!("{:08x}", crc32c::crc32c(&serde_json::to_vec(body)?)))
}

/// Reads a record's bytes. `place` is for the error.
///
/// # Errors
/// `Corrupt`: not JSON, another version, or another checksum.
pub fn decode<T: Serialize + DeserializeOwned>(
    bytes: &[u8],
    place: impl std::fmt::Display,
) -> Result<T, Error> {
    let corrupt = |detail: String| Error::new(Kind::Corrupt, Op::Read, &place, detail);
    let version: Version = serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))?;
    if version.format != FORMAT {
        let found = version.format;
        return Err(corrupt(format!("expected format version {FORMAT}, found {found}")));
    }
    let record: Stamped<T> = serde_json::from_slice(bytes).map_err(|e| corrupt(e.to_string()))?;
    let expected = stamp(&record.body).map_err(|e| corrupt(e.to_string()))?;
    if record.crc32c != expected {
        let found = record.crc32c;
        return Err(corrupt(format!("expected checksum {expected}, found {found:?}")));
    }
    Ok(record.body)
}

/// A record's bytes.
///
/// # Errors
/// `Invalid` for a body that JSON cannot hold.
pub fn encode<T: Serialize>(body: &T, place: impl std::fmt::Display) -> Result<Vec<u8>, Error> {
    let failed = |e| Error::new(Kind::Invalid, Op::Write, &place, e);
    let crc32c = stamp(body).map_err(failed)?;
    let stamped = Stamped { format: FORMAT, crc32c, body };
    let mut text = serde_json::to_vec_pretty(&stamped).map_err(failed)?;
    text.push(b'\n');
    Ok(text)
}

/// Reads a record's file; `None` when there is none.
///
/// # Errors
/// As [`decode`], and as the disk fails.
pub fn load<T: Serialize + DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
) -> Result<Option<T>, Error> {
    match read_small(disk, path, LIMIT_BYTES) {
        Ok(bytes) => decode(&bytes, path.display()).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(Op::Read, path, e)),
    }
}

/// Replaces a record's file, durably.
///
/// # Errors
/// As [`encode`], and as the disk fails; then the old one is still there.
pub fn store<T: Serialize>(disk: &dyn Disk, path: &Path, body: &T) -> Result<(), Error> {
    durable::overwrite(disk, path, &encode(body, path.display())?)
}
