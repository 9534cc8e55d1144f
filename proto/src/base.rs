//! Validated twins of the base-backup service's messages: the only place that validates them.
//!
//! Names and JSON documents stay text and bytes, because `storage`, which this crate does not know,
//! defines what they mean. The server may still refuse what a twin accepts, because it knows what is
//! stored.

use crate::{Code, v1, wal::System};
use std::ops::Range;
use tonic::Status;

/// Maximum number of bytes of a file in one message.
pub const PIECE_BYTES_MAX: usize = 1 << 20;
/// Pack sizes in restic have 32 bits.
pub const FILE_BYTES_MAX: u64 = (4 << 30) - 1;
/// Far more than a record with a hundred tablespaces needs.
pub const RECORD_BYTES_MAX: usize = 1 << 20;
/// Maximum number of ranges of a file in one request.
pub const RANGES_MAX: usize = 1024;

/// A kind of repository file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    Config,
    Key,
    Data,
    Index,
    Snapshot,
}

impl FileKind {
    /// Converts a kind from the wire.
    ///
    /// # Errors
    /// `INVALID` for an unspecified kind and for one of a newer version.
    pub fn read(number: i32) -> Result<Self, Status> {
        match v1::FileKind::try_from(number) {
            Ok(v1::FileKind::Config) => Ok(Self::Config),
            Ok(v1::FileKind::Key) => Ok(Self::Key),
            Ok(v1::FileKind::Data) => Ok(Self::Data),
            Ok(v1::FileKind::Index) => Ok(Self::Index),
            Ok(v1::FileKind::Snapshot) => Ok(Self::Snapshot),
            Ok(v1::FileKind::Unspecified) | Err(_) => {
                Err(invalid("file kind", "a kind of repository file", number))
            }
        }
    }
}

impl From<FileKind> for v1::FileKind {
    fn from(kind: FileKind) -> Self {
        match kind {
            FileKind::Config => Self::Config,
            FileKind::Key => Self::Key,
            FileKind::Data => Self::Data,
            FileKind::Index => Self::Index,
            FileKind::Snapshot => Self::Snapshot,
        }
    }
}

/// The name of a repository file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileName {
    pub kind: FileKind,
    /// 64 lower-case hexadecimal digits; empty for the config only.
    pub id: String,
}

impl TryFrom<Option<v1::FileName>> for FileName {
    type Error = Status;
    fn try_from(raw: Option<v1::FileName>) -> Result<Self, Status> {
        let raw = raw.ok_or_else(|| invalid("file name", "a file name", "none"))?;
        let kind = FileKind::read(raw.kind)?;
        let digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        let good = match kind {
            FileKind::Config => raw.id.is_empty(),
            _ => raw.id.len() == 64 && raw.id.bytes().all(digit),
        };
        if !good {
            let found: String = raw.id.chars().take(70).collect();
            return Err(invalid("file id", "64 lower-case hexadecimal digits", found));
        }
        Ok(Self { kind, id: raw.id })
    }
}

/// Asks for the secret of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenRepositoryRequest {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    /// The PostgreSQL; `None`: only open an existing repository, never create one.
    pub system: Option<System>,
    /// For a backup without a comparison of WAL.
    pub unproven: bool,
}

impl TryFrom<v1::OpenRepositoryRequest> for OpenRepositoryRequest {
    type Error = Status;
    fn try_from(raw: v1::OpenRepositoryRequest) -> Result<Self, Status> {
        let system = match raw.system_identifier {
            0 => None,
            identifier => Some(System::read(identifier, raw.segment_size, raw.postgres_version)?),
        };
        Ok(Self { cluster: raw.cluster, system, unproven: raw.unproven })
    }
}

/// The first message of a file upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutFile {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub name: FileName,
    /// Size of the file in bytes, 1 or more.
    pub size: u64,
    /// The first bytes of the file.
    pub data: bytes::Bytes,
}

impl TryFrom<v1::PutFileRequest> for PutFile {
    type Error = Status;
    fn try_from(raw: v1::PutFileRequest) -> Result<Self, Status> {
        let name = FileName::try_from(raw.name)?;
        if !(1..=FILE_BYTES_MAX).contains(&raw.size) {
            return Err(invalid("file size", "1 to 4294967295 bytes", raw.size));
        }
        let data = piece(raw.data)?;
        Ok(Self { cluster: raw.cluster, name, size: raw.size, data })
    }
}

/// Checks a piece of a file that follows the first message.
///
/// # Errors
/// `INVALID` for a piece that is too long.
pub fn piece(data: bytes::Bytes) -> Result<bytes::Bytes, Status> {
    if data.len() > PIECE_BYTES_MAX {
        return Err(invalid("piece of a file", "at most 1048576 bytes", data.len()));
    }
    Ok(data)
}

/// Asks for a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetFileRequest {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub name: FileName,
    pub part: Part,
}

/// Which part of a file is requested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// From this byte to the end.
    From(u64),
    /// These byte ranges in order; at least one, and none is empty.
    Ranges(Vec<Range<u64>>),
}

impl TryFrom<v1::GetFileRequest> for GetFileRequest {
    type Error = Status;
    fn try_from(raw: v1::GetFileRequest) -> Result<Self, Status> {
        let name = FileName::try_from(raw.name)?;
        let within = |offset: u64, length: u64| match offset.checked_add(length) {
            Some(end) if end <= FILE_BYTES_MAX => Ok(offset..end),
            _ => Err(invalid(
                "range",
                "a range within 4 GiB",
                format!("{length} bytes from {offset}"),
            )),
        };
        let part = match (raw.ranges.as_slice(), raw.length) {
            ([], 0) => Part::From(within(raw.offset, 0)?.start),
            ([], length) => Part::Ranges(vec![within(raw.offset, length)?]),
            (ranges, 0) if raw.offset == 0 => {
                if ranges.len() > RANGES_MAX {
                    return Err(invalid("ranges", "at most 1024", ranges.len()));
                }
                let ranges = ranges.iter().map(|range| match range.length {
                    0 => Err(invalid("range", "at least one byte", 0)),
                    length => within(range.offset, length),
                });
                Part::Ranges(ranges.collect::<Result<_, _>>()?)
            }
            _ => return Err(invalid("range", "either one range or a list", "both")),
        };
        Ok(Self { cluster: raw.cluster, name, part })
    }
}

/// Why a repository is reserved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// For a backup of this name; `None`: the server makes a name.
    Backup(Option<String>),
    /// For a running backup of this name that lost its reservation.
    Resumed(String),
    /// For a restore of this backup; `None`: the client does not say which.
    Restore(Option<String>),
}

/// Asks for a reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReserveRequest {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub purpose: Purpose,
}

impl TryFrom<v1::ReserveRequest> for ReserveRequest {
    type Error = Status;
    fn try_from(raw: v1::ReserveRequest) -> Result<Self, Status> {
        use v1::reserve_request::Purpose as Raw;
        let name = Some(raw.backup_name).filter(|name| !name.is_empty());
        let purpose = match (Raw::try_from(raw.purpose), name, raw.resumed) {
            (Ok(Raw::Backup), name, false) => Purpose::Backup(name),
            (Ok(Raw::Backup), Some(name), true) => Purpose::Resumed(name),
            (Ok(Raw::Backup), None, true) | (Ok(Raw::Restore), _, true) => {
                return Err(invalid("resumed", "the name of a backup", "none"));
            }
            (Ok(Raw::Restore), name, false) => Purpose::Restore(name),
            _ => return Err(invalid("purpose", "a backup or a restore", raw.purpose)),
        };
        Ok(Self { cluster: raw.cluster, purpose })
    }
}

/// Checks the size of a JSON document.
///
/// # Errors
/// `INVALID` for an empty or extremely long one.
pub fn document(what: &str, bytes: bytes::Bytes) -> Result<bytes::Bytes, Status> {
    if !(1..=RECORD_BYTES_MAX).contains(&bytes.len()) {
        return Err(invalid(what, "1 to 1048576 bytes", bytes.len()));
    }
    Ok(bytes)
}

/// Checks a percentage.
///
/// # Errors
/// `INVALID` outside 0 to 100.
pub fn percent(what: &str, value: f64) -> Result<f64, Status> {
    if (0.0..=100.0).contains(&value) { Ok(value) } else { Err(invalid(what, "0 to 100", value)) }
}

fn invalid(what: &str, expected: &str, found: impl std::fmt::Display) -> Status {
    Code::Invalid.status(format!("read {what}: expected {expected}, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(kind: v1::FileKind, id: &str) -> Option<v1::FileName> {
        Some(v1::FileName { kind: kind.into(), id: id.into() })
    }

    #[test]
    fn names_that_are_none_are_refused() {
        let id = "ab".repeat(32);
        assert!(FileName::try_from(name(v1::FileKind::Data, &id)).is_ok());
        assert!(FileName::try_from(name(v1::FileKind::Config, "")).is_ok());
        for bad in [
            None,
            name(v1::FileKind::Unspecified, &id),
            name(v1::FileKind::Config, &id),
            name(v1::FileKind::Data, ""),
            name(v1::FileKind::Data, "../../../etc/passwd"),
            name(v1::FileKind::Key, &id.to_uppercase()),
            Some(v1::FileName { kind: 99, id }),
        ] {
            let status = FileName::try_from(bad).unwrap_err();
            assert_eq!(Code::of(&status), Code::Invalid);
        }
    }

    #[test]
    fn absurd_sizes_and_ranges_are_refused() {
        let put = |size| v1::PutFileRequest {
            cluster: "pg".into(),
            name: name(v1::FileKind::Data, &"ab".repeat(32)),
            size,
            data: bytes::Bytes::new(),
        };
        assert!(PutFile::try_from(put(1)).is_ok());
        assert!(PutFile::try_from(put(0)).is_err());
        assert!(PutFile::try_from(put(4 << 30)).is_err());
        let long = v1::PutFileRequest { data: vec![0; PIECE_BYTES_MAX + 1].into(), ..put(5) };
        assert!(PutFile::try_from(long).is_err());
        let get = |offset, length| v1::GetFileRequest {
            cluster: "pg".into(),
            name: name(v1::FileKind::Config, ""),
            offset,
            length,
            ranges: Vec::new(),
        };
        let part = |raw| GetFileRequest::try_from(raw).map(|request| request.part);
        let list = |ranges: &[(u64, u64)], offset| {
            let ranges = ranges.iter().map(|&(offset, length)| v1::ByteRange { offset, length });
            part(v1::GetFileRequest { ranges: ranges.collect(), ..get(offset, 0) })
        };
        assert_eq!(part(get(7, 0)).unwrap(), Part::From(7));
        assert_eq!(part(get(7, 2)).unwrap(), list(&[(7, 2)], 0).unwrap());
        assert!(part(get(u64::MAX, 2)).is_err());
        assert!(part(get(0, 1 << 40)).is_err());

        assert_eq!(list(&[(9, 1), (0, 4)], 0).unwrap(), Part::Ranges(vec![9..10, 0..4]));
        for (ranges, offset) in [
            (vec![(1, 1)], 5),
            (vec![(1, 1), (3, 0)], 0),
            (vec![(u64::MAX, 1)], 0),
            (vec![(1, 1); RANGES_MAX + 1], 0),
        ] {
            assert!(list(&ranges, offset).is_err(), "{} ranges from {offset}", ranges.len());
        }
    }

    #[test]
    fn a_reservation_says_what_for() {
        let ask_again = |purpose: i32, name: &str, resumed| {
            ReserveRequest::try_from(v1::ReserveRequest {
                cluster: "pg".into(),
                purpose,
                backup_name: name.into(),
                resumed,
            })
            .map(|r| r.purpose)
        };
        let ask = |purpose, name: &str| ask_again(purpose, name, false);
        assert_eq!(ask_again(1, "x", true).unwrap(), Purpose::Resumed("x".into()));
        assert!(ask_again(1, "", true).is_err() && ask_again(2, "", true).is_err());
        assert_eq!(ask(1, "").unwrap(), Purpose::Backup(None));
        assert_eq!(ask(1, "x").unwrap(), Purpose::Backup(Some("x".into())));
        assert_eq!(ask(2, "").unwrap(), Purpose::Restore(None));
        assert_eq!(ask(2, "x").unwrap(), Purpose::Restore(Some("x".into())));
        for (purpose, name) in [(0, ""), (0, "x"), (9, "")] {
            assert!(ask(purpose, name).is_err(), "{purpose} {name}");
        }
    }

    #[test]
    fn a_repository_is_made_only_for_a_system() {
        let ask = |system_identifier, segment_size| {
            OpenRepositoryRequest::try_from(v1::OpenRepositoryRequest {
                cluster: "pg".into(),
                system_identifier,
                segment_size,
                postgres_version: 150_018,
                unproven: false,
            })
        };
        assert_eq!(ask(0, 0).unwrap().system, None);
        assert!(ask(7, 1 << 24).unwrap().system.is_some());
        assert!(ask(7, 5).is_err());
    }
}
