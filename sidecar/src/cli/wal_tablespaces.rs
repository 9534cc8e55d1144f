//! `klio wal-tablespaces %f "%p"`: the second half of a restore_command for a copy whose tablespaces are elsewhere.
//!
//! It changes the segment that `wal-fetch` put in place: it removes the locations of tablespaces that were created
//! after the backup, as listed in `klio-restore.tablespaces` in the data directory (`klio_pg::Edit`). So replay
//! follows the links of the copy, and never a path of the original (P12). Anything unexpected stops PostgreSQL (P7).
//! It needs no configuration.

use super::exit;
use crate::restore::EDITS;
use klio_pg::{Edit, SegmentName, SegmentSize, edit_segment};
use std::{ffi::OsString, fs, path::Path};

pub(super) const VERB: &str = "wal-tablespaces";

/// Runs the command. PostgreSQL starts it in the data directory.
pub(super) fn run(arguments: &[OsString]) -> u8 {
    match edit(arguments) {
        Ok(()) => exit::OK,
        Err(problem) => {
            super::say(&format!("klio {VERB}: {problem}"));
            exit::STOP_RECOVERY
        }
    }
}

fn edit(arguments: &[OsString]) -> Result<(), String> {
    let [name, path] = arguments else { return Err("expected %f \"%p\"".to_owned()) };
    // A history file has no tablespaces.
    let Ok(name) = name.to_string_lossy().parse::<SegmentName>() else { return Ok(()) };
    let path = Path::new(path);
    let failed = |what: &str, path: &Path, error: std::io::Error| {
        format!("{what} {}: {error}", path.display())
    };
    let text =
        fs::read_to_string(EDITS).map_err(|error| failed("read", Path::new(EDITS), error))?;
    let edits: Result<Vec<Edit>, String> = text.lines().map(str::parse).collect();
    let edits = edits.map_err(|problem| format!("read {EDITS}: {problem}"))?;
    let mut segment = fs::read(path).map_err(|error| failed("read", path, error))?;
    let size = u32::try_from(segment.len()).ok().and_then(|bytes| SegmentSize::new(bytes).ok());
    let start = size.and_then(|size| name.start_lsn(size));
    let start = start.ok_or_else(|| format!("read {}: expected a WAL segment", path.display()))?;
    let changed = edit_segment(&edits, start, &mut segment)
        .map_err(|at| format!("{name} has other WAL at {at} than when the restore was planned"))?;
    if changed {
        fs::write(path, segment).map_err(|error| failed("write", path, error))?;
    }
    Ok(())
}
