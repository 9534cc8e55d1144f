//! `<cluster>/archive.json` in tier 1: the archive's state across restarts. It is a cache that can be rebuilt from both
//! tiers (P4), so an unreadable file costs a listing, never a segment.
//!
//! | line | what |
//! |---|---|
//! | 1 | JSON: `format` = `klio-archive`, `version` = 1, `crc32c` of line 2 without its newline, 8 hex digits |
//! | 2 | JSON: the `Archive` |
//!
//! Read it with `tail -1 archive.json | jq` (P10). It is replaced by temporary file, fsync, rename, fsync of the
//! directory: after a crash either the old or the new file is there, complete. Fields may be added within a version:
//! unknown ones are ignored.

use super::Archive;
use crate::{
    Error, Kind, Op,
    disk::{RealDisk, durable},
    layout::ClusterName,
};
use std::{
    fs,
    path::{Path, PathBuf},
};

const FORMAT: &str = "klio-archive";
const VERSION: u32 = 1;

#[derive(serde::Serialize, serde::Deserialize)]
struct Header {
    format: String,
    version: u32,
    crc32c: String,
}

/// The path of a cluster's file below the tier-1 root.
pub fn path(root: &Path, cluster: &ClusterName) -> PathBuf {
    root.join(cluster.as_str()).join("archive.json")
}

/// Reads the file; `None` when there is none.
///
/// # Errors
/// `Corrupt` for a damaged or unknown file: rebuild it from both tiers.
pub fn read(path: &Path) -> Result<Option<Archive>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(Op::Read, path, error)),
    };
    decode(&bytes)
        .map(Some)
        .map_err(|detail| Error::new(Kind::Corrupt, Op::Decode, path.display(), detail))
}

/// Replaces the file, durably.
///
/// # Errors
/// An I/O error of the disk; then the old file is still in place.
pub fn write(path: &Path, archive: &Archive) -> Result<(), Error> {
    let bytes = encode(archive)
        .map_err(|error| Error::new(Kind::Invalid, Op::Write, path.display(), error))?;
    durable::overwrite(&RealDisk, path, &bytes)
}

fn encode(archive: &Archive) -> Result<Vec<u8>, serde_json::Error> {
    let body = serde_json::to_string(archive)?;
    let crc32c = format!("{:08x}", crc32c::crc32c(body.as_bytes()));
    let header = Header { format: FORMAT.into(), version: VERSION, crc32c };
    Ok(format!("{}\n{body}\n", serde_json::to_string(&header)?).into_bytes())
}

fn decode(bytes: &[u8]) -> Result<Archive, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "expected text, found other bytes")?;
    let (header, body) = text.split_once('\n').ok_or("expected two lines, found one")?;
    let body =
        body.strip_suffix('\n').ok_or("expected a newline at the end, found a truncated file")?;
    let header: Header = serde_json::from_str(header).map_err(|error| error.to_string())?;
    if header.format == FORMAT && header.version > VERSION {
        let found = header.version;
        return Err(format!("expected version {VERSION}, found {found}: written by a newer Klio"));
    }
    if header.format != FORMAT || header.version != VERSION {
        return Err(format!(
            "expected {FORMAT} version {VERSION}, found {} version {}",
            header.format, header.version
        ));
    }
    let found = format!("{:08x}", crc32c::crc32c(body.as_bytes()));
    if header.crc32c != found {
        return Err(format!("expected crc32c {}, found {found}", header.crc32c));
    }
    serde_json::from_str(body).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::SegmentSize;
    use proptest::prelude::*;

    fn archive(numbers: &[u32]) -> Archive {
        let mut archive = Archive::new(SegmentSize::new(1 << 20).unwrap());
        for number in numbers {
            let kind = [".partial", "", ""][*number as usize % 3];
            let name = format!("0000000100000000{:08X}{kind}", number % 4096);
            archive.record(name.parse().unwrap(), u64::from(*number), Some(5));
        }
        archive.record("00000002.history".parse().unwrap(), 7, None);
        archive
    }

    #[test]
    fn the_file_survives_and_is_replaced_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("archive.json");
        assert_eq!(read(&file).unwrap(), None);
        for state in [archive(&[1, 2]), archive(&[1, 2, 3, 9])] {
            write(&file, &state).unwrap();
            assert_eq!(read(&file).unwrap(), Some(state));
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_later_version_is_refused_by_name() {
        let text = String::from_utf8(encode(&archive(&[1])).unwrap()).unwrap();
        let error = decode(text.replace("\"version\":1", "\"version\":2").as_bytes()).unwrap_err();
        assert!(error.contains("found 2: written by a newer Klio"), "{error}");
    }

    #[test]
    fn a_field_of_a_version_to_come_passes() {
        let archive = archive(&[1, 2]);
        let mut body = serde_json::to_value(&archive).unwrap();
        body["of_a_version_to_come"] = 1.into();
        body["totals"]["of_a_version_to_come"] = "x".into();
        let body = body.to_string();
        let crc32c = format!("{:08x}", crc32c::crc32c(body.as_bytes()));
        let header = Header { format: FORMAT.into(), version: VERSION, crc32c };
        let text = format!("{}\n{body}\n", serde_json::to_string(&header).unwrap());
        assert_eq!(decode(text.as_bytes()), Ok(archive));
    }

    proptest! {
        #[test]
        fn round_trips(numbers: Vec<u32>) {
            let archive = archive(&numbers);
            prop_assert_eq!(decode(&encode(&archive).unwrap()), Ok(archive));
        }

        #[test]
        fn no_cut_and_no_flipped_bit_passes(numbers: Vec<u32>, at: prop::sample::Index, bit in 0u8..8) {
            let good = encode(&archive(&numbers)).unwrap();
            let at = at.index(good.len());
            prop_assert!(decode(&good[..at]).is_err());
            let mut flipped = good.clone();
            flipped[at] ^= 1 << bit;
            // The flip may only have changed the case of a checksum digit in the header, which is not damage.
            if let Ok(read) = decode(&flipped) {
                prop_assert_eq!(read, archive(&numbers));
            }
        }
    }
}
