//! Verifies WAL in both tiers: a file must decrypt, decode to its size, and begin with the header of the segment that
//! its name says, of this PostgreSQL.
//!
//! A history file contains nothing that would reveal a wrong digit, so all its copies must be equal. If they differ,
//! this is reported, and none is overwritten with another one, because it is unknown which one is right.
//!
//! Memory: a piece of a file. Only a file that has to be repaired is read as a whole, as stored: at most one
//! compressed segment.
//!
//! If all WAL is read, changes of `wal_level` are reported as well, because an earlier version did not record them
//! when it received the WAL.
//!
//! WAL from start to stop of each backup is always read; of the WAL after that, a percentage if requested. Whether WAL
//! is missing in between is checked by the server, which also knows the open segment.

use super::verify::{Checker, Copy, Tier};
use crate::maintenance::protocol::{Archived, VerifyJob};
use bytes::Bytes;
use futures::StreamExt;
use klio_pg::{
    LevelScan, Lsn, SEGMENT_HEADER_BYTES, SegmentHeader, SegmentName, SegmentSize, TimelineHistory,
    WalLevel,
};
use klio_storage::{
    Error, Kind, Op,
    crypt::{AtRest, payload_error},
    layout::{BackupName, Form, WalFile},
    record::Unknown,
    tier2::Download,
    wal::{LevelChange, decode},
};
use rand::Rng;
use std::{
    collections::BTreeMap,
    io::{self, Read},
};

/// PostgreSQL's own history files have one line per ancestor.
const HISTORY_LIMIT_BYTES: u64 = 1 << 20;

/// The tiers that have a file, and its size.
type Held = BTreeMap<(WalFile, Form), ([bool; 2], u64)>;

pub(super) fn run(checker: &mut Checker<'_>, job: &VerifyJob) -> Result<(), Error> {
    let Ok(size) = SegmentSize::new(job.segment_size) else { return Ok(()) };
    checker.phase("list WAL");
    let held = held(checker)?;
    let mut chosen = Vec::new();
    let there = |file, form| held.get(&(file, form)).is_some_and(|(tiers, _)| tiers[1]);
    for (&(file, form), &(tiers, bytes)) in &held {
        let again = job.again.contains(&file.key_in(&checker.ground.cluster, form));
        let Some(owners) = wanted(file, size, job, again) else { continue };
        let must = owed(file, size, &job.archived) && !there(file, form.other());
        chosen.push((file, form, [false, tiers[1] || must], bytes, owners));
    }
    checker.phase("read WAL");
    checker.step.total_bytes = chosen.iter().map(|c| c.3).sum();
    checker.step.total_files = chosen.len() as u64;
    let at_rest = checker.ground.at_rest.clone();
    let all = job.wal && job.read_percent >= 100.0 && job.all;
    let mut levels = all.then(|| Levels::new(size));
    let histories: BTreeMap<WalFile, Vec<BackupName>> = chosen
        .iter()
        .filter(|(file, ..)| matches!(file, WalFile::History(_)))
        .map(|(file, .., owners)| (*file, owners.clone()))
        .collect();
    for (file, form, expected, bytes, owners) in chosen {
        let key = file.key_in(&checker.ground.cluster, form);
        let what = What { file, form, size, job, at_rest: &at_rest };
        if segment_of(file).is_some() && is_good(checker, &key, expected, what, levels.as_mut())? {
            checker.done(bytes);
            continue;
        }
        let judge = |stored: &Bytes| judge(file, form, stored.as_ref(), size, job, &at_rest);
        let mut instead =
            |checker: &mut Checker<'_>| in_form(checker, file, form, size, job, &at_rest);
        checker.prove_or(&key, expected, &|| owners.clone(), &judge, &mut instead)?;
        checker.done(bytes);
    }
    checker.result.levels = levels.map(|levels| levels.found).unwrap_or_default();
    for (file, owners) in histories {
        compare_copies(checker, file, size, job, &at_rest, owners)?;
    }
    Ok(())
}

/// A file to check, and what it is checked against.
#[derive(Clone, Copy)]
struct What<'a> {
    file: WalFile,
    form: Form,
    size: SegmentSize,
    job: &'a VerifyJob,
    at_rest: &'a AtRest,
}

/// Collects the changes of `wal_level` in the WAL that is read, from each segment once.
struct Levels {
    scan: LevelScan,
    upto: Option<SegmentName>,
    found: Vec<LevelChange>,
}

impl Levels {
    const fn new(size: SegmentSize) -> Self {
        Self { scan: LevelScan::new(size), upto: None, found: Vec::new() }
    }
}

/// Whether every copy that exists or must exist is good. Reads piece by piece. A bad copy is not reported here,
/// because it is then read again and repaired.
fn is_good(
    checker: &mut Checker<'_>,
    key: &str,
    expected: [bool; 2],
    what: What<'_>,
    mut levels: Option<&mut Levels>,
) -> Result<bool, Error> {
    for (tier, expected) in [Tier::One, Tier::Two].into_iter().zip(expected) {
        let Some(mut stored) = Stored::open(checker, tier, key)? else {
            if expected {
                return Ok(false);
            }
            continue;
        };
        let mut found = Vec::new();
        // The second copy of a segment has no new information.
        let unseen = levels.as_ref().filter(|levels| levels.upto < segment_of(what.file));
        let mut trial = unseen.map(|levels| levels.scan.clone());
        let judged = judge_and_scan(what, &mut stored, trial.as_mut(), &mut found);
        if let Some(error) = stored.failed.take() {
            return Err(error);
        }
        // A bad copy is read again, and counted then.
        if judged.is_err() {
            return Ok(false);
        }
        checker.result.files += 1;
        checker.result.read_bytes += stored.bytes;
        if let (Some(levels), Some(scan)) = (levels.as_deref_mut(), trial) {
            levels.upto = segment_of(what.file);
            levels.scan = scan;
            levels.found.append(&mut found);
        }
    }
    Ok(true)
}

/// A stored file that is read piece by piece.
struct Stored {
    from: From,
    runtime: tokio::runtime::Handle,
    out: super::Output,
    bytes: u64,
    /// An error that says nothing about the file.
    failed: Option<Error>,
}

enum From {
    Disk(std::fs::File),
    Bucket(Download, Bytes),
    /// The file exists, but the disk cannot read it.
    Lost(io::ErrorKind),
}

impl Stored {
    /// `None` when the file does not exist. A file that the disk cannot open fails when it is read.
    fn open(checker: &Checker<'_>, tier: Tier, key: &str) -> Result<Option<Self>, Error> {
        let ground = checker.ground;
        let from = match tier {
            Tier::One => match std::fs::File::open(ground.root.join(key)) {
                Ok(file) => From::Disk(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => From::Lost(error.kind()),
            },
            Tier::Two => {
                let Some(tier2) = &ground.tier2 else { return Ok(None) };
                match ground.runtime.block_on(tier2.download(key)) {
                    Ok(download) => From::Bucket(download, Bytes::new()),
                    Err(error) if error.kind == Kind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        };
        let (runtime, out) = (ground.runtime.clone(), ground.out.clone());
        Ok(Some(Self { from, runtime, out, bytes: 0, failed: None }))
    }
}

impl Read for Stored {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.out.still();
        let count = match &mut self.from {
            From::Disk(file) => file.read(buffer)?,
            From::Lost(kind) => return Err((*kind).into()),
            From::Bucket(download, piece) => {
                while piece.is_empty() {
                    match self.runtime.block_on(download.next()) {
                        None => return Ok(0),
                        Some(Ok(next)) => *piece = next,
                        Some(Err(error)) => {
                            let told = io::Error::other(error.to_string());
                            self.failed = (error.kind != Kind::Corrupt).then_some(error);
                            return Err(told);
                        }
                    }
                }
                let count = piece.len().min(buffer.len());
                buffer[..count].copy_from_slice(&piece.split_to(count));
                count
            }
        };
        self.bytes += count as u64;
        Ok(count)
    }
}

fn judge_and_scan(
    what: What<'_>,
    stored: impl Read,
    mut scan: Option<&mut LevelScan>,
    found: &mut Vec<LevelChange>,
) -> Result<(), String> {
    let What { file, form, size, job, at_rest } = what;
    let mut at = segment_of(file).and_then(|name| name.start_lsn(size)).unwrap_or(Lsn::ZERO);
    let mut see = |piece: &[u8]| {
        let Some(scan) = scan.as_deref_mut() else { return };
        scan.push(at, piece, &mut |lsn, parameters| {
            let (timeline, minimal) = (file.timeline(), parameters.wal_level == WalLevel::Minimal);
            found.push(LevelChange { timeline, lsn, minimal, unknown: Unknown::default() });
        });
        at = at.advance(piece.len() as u64);
    };
    judge_seeing(file, form, stored, size, job, at_rest, &mut see)
}

/// Reports copies of a history, in either tier and form, that are not equal. Bad copies were reported before.
fn compare_copies(
    checker: &mut Checker<'_>,
    file: WalFile,
    size: SegmentSize,
    job: &VerifyJob,
    at_rest: &AtRest,
    owners: Vec<BackupName>,
) -> Result<(), Error> {
    let mut texts = Vec::new();
    for form in [Form::Plain, Form::Age] {
        let key = file.key_in(&checker.ground.cluster, form);
        let judge = |stored: &Bytes| judge(file, form, stored.as_ref(), size, job, at_rest);
        for tier in [Tier::One, Tier::Two] {
            let Copy::Good(bytes) = checker.copy(tier, &key, &judge)? else { continue };
            let text = plain(file, form, bytes.as_ref(), at_rest).and_then(|read| text(file, read));
            if let Ok(text) = text {
                texts.push((format!("{} {key}", tier.name()), text));
            }
        }
    }
    let Some(problem) = disagreement(&texts) else { return Ok(()) };
    let key = file.key_in(&checker.ground.cluster, Form::Plain);
    let tier = "both".to_owned();
    checker.damaged(klio_storage::catalog::Damage { tier, key, problem }, owners);
    Ok(())
}

/// Where a copy differs from the first one, as text; `None` when all are equal.
fn disagreement(texts: &[(String, Vec<u8>)]) -> Option<String> {
    let (first, expected) = texts.first()?;
    let (other, found) = texts.iter().find(|(_, text)| text != expected)?;
    let lines = |text: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(text).lines().map(str::to_owned).collect()
    };
    let (expected, found) = (lines(expected), lines(found));
    let at = (0..expected.len().max(found.len())).find(|&n| expected.get(n) != found.get(n));
    let line = |lines: &[String]| at.and_then(|n| lines.get(n)).cloned().unwrap_or_default();
    Some(format!(
        "the copies differ, and either may be right: {first} has {:?}, {other} has {:?} in line {}; hint: compare both with the cluster's pg_wal and replace the wrong one",
        line(&expected),
        line(&found),
        at.map_or(0, |n| n + 1),
    ))
}

fn plain<'a>(
    file: WalFile,
    form: Form,
    stored: impl Read + 'a,
    at_rest: &AtRest,
) -> Result<Box<dyn Read + 'a>, String> {
    Ok(match form {
        Form::Plain => Box::new(stored),
        Form::Age => {
            let keys = at_rest.need(file).map_err(|e| e.detail)?;
            Box::new(keys.decrypt(stored).map_err(|e| e.detail)?)
        }
    })
}

fn text(file: WalFile, plain: impl Read) -> Result<Vec<u8>, String> {
    let mut text = Vec::new();
    let read = plain.take(HISTORY_LIMIT_BYTES).read_to_end(&mut text);
    read.map_err(|e| payload_error(file, &e).detail)?;
    Ok(text)
}

/// The content of a file in this form, made from its other form. The tiers may have different forms, for example when
/// encryption was switched on in between.
fn in_form(
    checker: &mut Checker<'_>,
    file: WalFile,
    form: Form,
    size: SegmentSize,
    job: &VerifyJob,
    at_rest: &AtRest,
) -> Result<Option<Bytes>, Error> {
    let key = file.key_in(&checker.ground.cluster, form.other());
    let fits = |stored: &Bytes| judge(file, form.other(), stored.as_ref(), size, job, at_rest);
    for tier in [Tier::One, Tier::Two] {
        let Copy::Good(bytes) = checker.copy(tier, &key, &fits)? else { continue };
        let keys = at_rest.need(file)?;
        let made = match form {
            Form::Plain => keys.unwrap(&bytes)?.to_vec(),
            Form::Age => keys.wrap(&bytes)?,
        };
        return Ok(Some(made.into()));
    }
    Ok(None)
}

/// The files that both tiers list.
fn held(checker: &Checker<'_>) -> Result<Held, Error> {
    let ground = checker.ground;
    let mut held = Held::new();
    let directory = ground.root.join(ground.cluster.as_str()).join("wal");
    let mut add = |relative: &str, tier: usize, size: u64| {
        if let Some(stored) = WalFile::parse_stored(relative) {
            let entry = held.entry(stored).or_default();
            entry.0[tier] = true;
            entry.1 = entry.1.max(size);
        }
    };
    let list = |directory: &std::path::Path| match ground.disk.list(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(|e| Error::io(Op::List, directory, e)),
    };
    let size = |path: &std::path::Path| ground.disk.stat(path).map_or(0, |stat| stat.size);
    for entry in list(&directory)? {
        if !entry.is_dir {
            add(&entry.name, 0, size(&directory.join(&entry.name)));
            continue;
        }
        let below = directory.join(&entry.name);
        for file in list(&below)? {
            add(&format!("{}/{}", entry.name, file.name), 0, size(&below.join(&file.name)));
        }
    }
    if let Some(tier2) = &ground.tier2 {
        let prefix = format!("{}/wal", ground.cluster);
        for object in ground.runtime.block_on(tier2.list_prefix(&prefix))? {
            if let Some(relative) = object.key.strip_prefix(&prefix) {
                add(relative.trim_start_matches('/'), 1, object.size);
            }
        }
    }
    Ok(held)
}

const fn segment_of(file: WalFile) -> Option<SegmentName> {
    match file {
        WalFile::Segment(name) | WalFile::Partial(name) => Some(name),
        WalFile::History(_) => None,
    }
}

/// The backups that need a file; `None` when it need not be read. `again` says that it was damaged before.
fn wanted(
    file: WalFile,
    size: SegmentSize,
    job: &VerifyJob,
    again: bool,
) -> Option<Vec<BackupName>> {
    let mut owners = Vec::new();
    let mut sure = again;
    for backup in &job.backups {
        let record = &backup.record;
        let Some(start) = segment_of(file).and_then(|name| name.start_lsn(size)) else {
            // A history file is small, and every recovery to a later timeline needs it.
            owners.push(record.name.clone());
            sure = true;
            continue;
        };
        let end = start.advance(size.bytes());
        if file.timeline() >= record.start_timeline && end > record.start_lsn {
            owners.push(record.name.clone());
            sure |= file.timeline() <= record.stop_timeline && start < record.stop_lsn;
        }
    }
    if owners.is_empty() {
        return None;
    }
    let share = || rand::rng().random_range(0.0..100.0) < job.read_percent;
    (sure || job.wal && share()).then_some(owners)
}

/// Whether tier 2 must have the file.
fn owed(file: WalFile, size: SegmentSize, archived: &[Archived]) -> bool {
    let WalFile::Segment(name) = file else { return false };
    let Some(start) = name.start_lsn(size) else { return false };
    let inside = |a: &Archived| a.timeline == name.timeline() && a.from <= start && start < a.to;
    archived.iter().any(inside)
}

fn judge(
    file: WalFile,
    form: Form,
    stored: &[u8],
    size: SegmentSize,
    job: &VerifyJob,
    at_rest: &AtRest,
) -> Result<(), String> {
    judge_seeing(file, form, stored, size, job, at_rest, &mut |_| {})
}

/// The same piece by piece; all plain WAL is also passed to `see`.
fn judge_seeing(
    file: WalFile,
    form: Form,
    stored: impl Read,
    size: SegmentSize,
    job: &VerifyJob,
    at_rest: &AtRest,
    see: &mut dyn FnMut(&[u8]),
) -> Result<(), String> {
    let mut plain = plain(file, form, stored, at_rest)?;
    let Some(name) = segment_of(file) else {
        let text = text(file, plain)?;
        return TimelineHistory::parse(file.timeline(), &text).map(drop).map_err(|e| e.to_string());
    };
    let mut header = Vec::with_capacity(SEGMENT_HEADER_BYTES);
    let mut keep = |piece: &[u8]| {
        let missing = SEGMENT_HEADER_BYTES.saturating_sub(header.len()).min(piece.len());
        header.extend_from_slice(&piece[..missing]);
        see(piece);
        Ok(())
    };
    let found = decode::decode_reader(&mut plain, size.bytes(), &mut keep).map_err(|e| e.detail)?;
    let whole = matches!(file, WalFile::Segment(_));
    if whole && found != size.bytes() {
        return Err(format!("expected {} bytes of WAL, found {found}", size.bytes()));
    }
    let header: [u8; SEGMENT_HEADER_BYTES] =
        header.try_into().map_err(|_| format!("expected a page header, found {found} bytes"))?;
    let header = SegmentHeader::parse(&header).map_err(|e| e.to_string())?;
    header.belongs_to(name).map_err(|e| e.to_string())?;
    if header.system_identifier != job.system_identifier {
        let expected = job.system_identifier;
        return Err(format!(
            "expected system identifier {expected}, found {}",
            header.system_identifier
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::TimelineId;
    use klio_storage::testing::SimulatedWal;

    /// Returns a few bytes at a time, and then an error.
    struct Slow<'a>(&'a [u8], usize);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.1 == 0 {
                return Err(io::Error::other("the link broke"));
            }
            let count = self.0.len().min(buffer.len()).min(7).min(self.1);
            buffer[..count].copy_from_slice(&self.0[..count]);
            (self.0, self.1) = (&self.0[count..], self.1 - count);
            Ok(count)
        }
    }

    #[test]
    fn wal_is_judged_piece_by_piece_as_it_is_whole() {
        let wal = SimulatedWal::small(7);
        let pinned = wal.pinned();
        let size = pinned.segment_size;
        let timeline = TimelineId::new(1).unwrap();
        let from = Lsn::new(2 * size.bytes());
        let plain = wal.bytes(&TimelineHistory::root(timeline), from, from.advance(size.bytes()));
        let stored = zstd::encode_all(plain.as_slice(), 1).unwrap();
        let job = |system_identifier| VerifyJob {
            backups: vec![],
            others: vec![],
            all: true,
            again: Default::default(),
            read_percent: 100.0,
            read_after: None,
            wal: true,
            archived: vec![],
            segment_size: size.as_u32(),
            system_identifier,
        };
        let file = WalFile::Segment(SegmentName::containing(timeline, from, size));
        let at_rest = AtRest::Off;
        let judged = |job: &VerifyJob, from: &mut dyn Read| {
            let what = What { file, form: Form::Plain, size, job, at_rest: &at_rest };
            let mut scan = LevelScan::new(size);
            judge_and_scan(what, from, Some(&mut scan), &mut Vec::new())
        };
        let (good, other) = (job(pinned.system_identifier), job(8));
        assert_eq!(judged(&good, &mut Slow(&stored, usize::MAX)), Ok(()));
        assert!(judged(&other, &mut Slow(&stored, usize::MAX)).is_err());
        for upto in [1, stored.len() / 2, stored.len() - 1] {
            assert!(judged(&good, &mut Slow(&stored, upto)).is_err(), "breaks off at {upto}");
            assert!(judged(&good, &mut &stored[..upto]).is_err(), "ends at {upto}");
        }
    }

    #[test]
    fn copies_that_differ_are_told_with_their_first_different_line() {
        let copy = |place: &str, text: &str| (place.to_owned(), text.as_bytes().to_vec());
        let (a, b) = ("1\t0/10\tx\n2\t0/20\ty\n", "1\t0/10\tx\n2\t0/30\ty\n");
        assert_eq!(disagreement(&[]), None);
        assert_eq!(disagreement(&[copy("one", a)]), None);
        assert_eq!(disagreement(&[copy("one", a), copy("two", a)]), None);
        let told = disagreement(&[copy("one", a), copy("two", a), copy("three", b)]).unwrap();
        for part in ["one has", "0/20", "three has", "0/30", "in line 2", "hint:"] {
            assert!(told.contains(part), "{part}: {told}");
        }
        assert!(disagreement(&[copy("one", a), copy("two", "1\t0/10\tx\n")]).is_some());
    }
}
