//! New clusters as copies of one: initdb takes a second of processor time, a copy a tenth of it.
//!
//! What must stay true: a copy differs from what initdb makes in nothing that PostgreSQL or Klio looks at. Its system identifier is its
//! own, in `pg_control` and in the first segment, because Klio tells clusters apart by it. A template is made once for each initdb
//! program and each set of arguments, below `target/`; who finds it whole uses it, whoever made it.

use super::{expect_success, install};
use crate::{env, programs, scratch::Scratch};
use klio_pg::ControlFile;
use klio_storage::tier2::Sha256Sum;
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

/// Where the first segment's page header has the system identifier (`XLogLongPageHeaderData`).
const SEGMENT_IDENTIFIER_AT: u64 = 24;

/// Makes a data directory as initdb with these arguments does.
///
/// # Panics
/// When initdb fails, or the copy.
pub(super) async fn lay_out(major: u32, arguments: &[String], data: &Path) {
    let initdb = install::bin_dir(major).join("initdb");
    let template = template(&initdb, arguments).await;
    copy(&template, data);
    give_identity(data);
}

async fn template(initdb: &Path, arguments: &[String]) -> PathBuf {
    let program = fs::metadata(initdb).expect("look at initdb");
    let what = format!("{} {} {} {arguments:?}", initdb.display(), program.len(), program.mtime());
    let root = env::repository().join("target/pg-templates");
    fs::create_dir_all(&root).expect("make a place for templates");
    let template = root.join(&Sha256Sum::of(what.as_bytes()).to_string()[..16]);
    let lock = File::create(template.with_extension("lock")).expect("make a lock file");
    lock.lock().expect("wait for whoever makes the template");
    if !template.exists() {
        let scratch = Scratch::new("template");
        install::give(scratch.path());
        let made = scratch.join("data");
        let mut command = install::command(initdb);
        command.args(arguments).arg("-D").arg(&made);
        expect_success("initdb", programs::run(command).await);
        // Under its name it is whole: a run that was killed leaves `.new` behind.
        let unfinished = template.with_extension("new");
        let _ = fs::remove_dir_all(&unfinished);
        copy(&made, &unfinished);
        fs::rename(&unfinished, &template).expect("name the template");
    }
    template
}

fn copy(from: &Path, to: &Path) {
    let output = Command::new("cp").arg("-a").args([from, to]).output().expect("run cp");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "copy {} to {}: {errors}", from.display(), to.display());
}

/// As initdb makes it: of the time, and unlike any other of this run.
fn new_identifier() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let process = u64::from(std::process::id()) & 0xFFF;
    now.as_secs() << 32
        | u64::from(now.subsec_micros()) << 12 & 0xFFFF_F000
        | (process ^ count) & 0xFFF
}

fn give_identity(data: &Path) {
    let identifier = new_identifier();
    let path = data.join(ControlFile::PATH);
    let mut control = fs::read(&path).expect("read pg_control");
    set_identifier(&mut control, identifier);
    fs::write(&path, control).expect("write pg_control");
    let wal = fs::read_dir(data.join("pg_wal")).expect("read pg_wal");
    let segments =
        wal.map(|entry| entry.expect("read pg_wal").path()).filter(|path| path.is_file());
    for segment in segments {
        let segment = File::options().write(true).open(segment).expect("open the first segment");
        let written = segment.write_all_at(&identifier.to_le_bytes(), SEGMENT_IDENTIFIER_AT);
        written.expect("write into the first segment");
    }
}

/// The file begins with the identifier; a checksum of everything before it ends what is used of it.
fn set_identifier(control: &mut [u8], identifier: u64) {
    let sum = |control: &[u8], at: usize| crc32c::crc32c(&control[..at]).to_le_bytes();
    let at = (256..512).step_by(4).find(|at| control[*at..*at + 4] == sum(control, *at));
    let at = at.expect("find the checksum of pg_control");
    control[..8].copy_from_slice(&identifier.to_le_bytes());
    let new = sum(control, at);
    control[at..at + 4].copy_from_slice(&new);
}
