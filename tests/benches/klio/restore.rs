//! Restores of the newest backup by both tools: into an empty directory, and onto one that differs in 1.5 % of its pages,
//! which the page cache has or has not.
//!
//! Only the files: no recovery. What they restore must be complete: the same relative names with the same sizes, and pages as
//! they were (sizes are checked here, content by the restore proof).

use crate::{
    backup::{Pair, Step, Tool},
    measured::{self, Measured},
    workload::settle_disk,
};
use klio_tests::{postgres::install, proof::Restorer, scratch::Scratch};
use rustix::fs::{Advice, fadvise};
use std::{
    fs,
    io::{self, Seek, SeekFrom, Write},
    path::Path,
};

/// Every so many-th page is overwritten before a delta restore: 1.5 %.
const EVERY: u64 = 67;
const PAGE: u64 = 8192;

/// Full, then delta with the directory in the page cache, as a PostgreSQL that ran on it leaves it, then delta from the disk.
pub async fn all(pair: &Pair, tool: Tool) -> Vec<(Step, Measured)> {
    let scratch = Scratch::new("restored");
    install::give(scratch.path());
    let to = scratch.join("data");
    let full = one(pair, tool, &to, false, &scratch).await;
    let size = measured::stored_bytes(&to.join("base"));
    let mut measured = vec![(Step::Restore, full)];
    for (step, cached) in [(Step::Delta, true), (Step::DeltaCold, false)] {
        let touched = disturb(&to.join("base"));
        assert!(touched > 0, "nothing was changed before the delta restore");
        keep_in_cache(&to.join("base"), cached);
        measured.push((step, one(pair, tool, &to, true, &scratch).await));
        let found = measured::stored_bytes(&to.join("base"));
        assert_eq!(found, size, "the delta restore is incomplete");
        let left = disturbed(&to.join("base"));
        assert_eq!(left, 0, "{tool:?}: the delta restore left {left} wrong pages");
    }
    measured
}

/// Reads all files, or has the page cache forget them.
fn keep_in_cache(directory: &Path, cached: bool) {
    files(directory, &mut |path, _| {
        let mut file = fs::File::open(path).expect("open a relation");
        if cached {
            io::copy(&mut file, &mut io::sink()).expect("read a relation");
        } else {
            file.sync_all().expect("write a relation to disk");
            fadvise(&file, 0, None, Advice::DontNeed).expect("forget a relation");
        }
    });
}

async fn one(pair: &Pair, tool: Tool, to: &Path, delta: bool, scratch: &Scratch) -> Measured {
    settle_disk().await;
    match tool {
        Tool::Peer => {
            if !delta {
                fs::create_dir(to).expect("make the target");
                install::give(to);
            }
            pair.peer.restore(to, delta).await
        }
        Tool::Klio => {
            let restorer = Restorer::of_server(&pair.site, scratch);
            let mut args = vec!["restore".to_owned(), "--target-immediate".to_owned()];
            args.extend(["--to".to_owned(), to.display().to_string()]);
            args.extend(delta.then(|| "--delta".to_owned()));
            let log = scratch.join("restore.log");
            measured::run("klio restore", restorer.command(&args), &log).await
        }
    }
}

const MARK: &[u8] = b"overwritten by the benchmark";

fn files(directory: &Path, each: &mut impl FnMut(&Path, u64)) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.metadata() {
            Ok(meta) if meta.is_dir() => files(&entry.path(), each),
            Ok(meta) => each(&entry.path(), meta.len()),
            Err(_) => {}
        }
    }
}

/// Overwrites every 67th page, counted over all files; returns how many.
fn disturb(directory: &Path) -> u64 {
    let (mut page, mut touched) = (0, 0);
    files(directory, &mut |path, size| {
        let mut file = fs::OpenOptions::new().write(true).open(path).expect("open a relation");
        for block in 0..size / PAGE {
            page += 1;
            if page % EVERY == 0 {
                file.seek(SeekFrom::Start(block * PAGE + 100)).expect("seek");
                file.write_all(MARK).expect("overwrite a page");
                touched += 1;
            }
        }
    });
    touched
}

/// How many pages still have the mark.
fn disturbed(directory: &Path) -> u64 {
    let mut left = 0;
    files(directory, &mut |path, _| {
        let content = fs::read(path).expect("read a relation");
        left += content
            .chunks(PAGE as usize)
            .filter(|page| page.get(100..100 + MARK.len()) == Some(MARK))
            .count() as u64;
    });
    left
}
