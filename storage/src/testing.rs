//! Simulated WAL that looks like PostgreSQL's, and a backup record, for tests of this and other crates. Not used by the
//! programs.
//!
//! The WAL is a pure function of timeline and position, so a test need not keep a copy of what it sent. Page headers
//! are those of a real server; the rest is noise and zeros that compress about as well as WAL does.

pub use crate::repository::{Forge, ForgedPiece};
use crate::{
    catalog::{BackupRecord, PagesRecord},
    layout::BackupName,
    record::Unknown,
    wal::Pinned,
};
use klio_pg::{Lsn, PAGE_BYTES, SegmentSize, TimelineHistory, TimelineId};

/// The record of an empty backup of a cluster with segments of 1 MiB. Tests change the fields they need.
pub fn backup_record(
    name: BackupName,
    timeline: TimelineId,
    start_lsn: Lsn,
    stop_lsn: Lsn,
) -> BackupRecord {
    BackupRecord {
        name,
        system_identifier: "7".into(),
        postgres_version: 150_000,
        segment_size: 1 << 20,
        start_timeline: timeline,
        start_lsn,
        stop_timeline: timeline,
        stop_lsn,
        started_postgres_unix: 1.0,
        stopped_postgres_unix: 2.0,
        begun_unix: 1.0,
        committed_unix: 2.0,
        duration_seconds: 1.0,
        from_standby: false,
        snapshot: "00".repeat(32),
        backup_label: String::new(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        size_bytes: 0,
        files: 0,
        directories: 0,
        added_bytes: 0,
        stored_bytes: 0,
        pages: PagesRecord::default(),
        label: None,
        keep: false,
        redated_unix: None,
        klio_version: String::new(),
        unknown: Unknown::default(),
    }
}

const PAGE: usize = PAGE_BYTES as usize;
/// At this interval a page has 8 bytes that occur nowhere else.
const STAMP_EVERY: usize = 512;

/// The WAL of one simulated cluster.
#[derive(Debug, Clone)]
pub struct SimulatedWal {
    pinned: Pinned,
    /// Noise in the first part, zeros behind it.
    template: Vec<u8>,
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

const fn magic(postgres_version: u32) -> u16 {
    match postgres_version / 10_000 {
        15 => 0xD110,
        16 => 0xD113,
        17 => 0xD116,
        _ => 0xD118,
    }
}

impl SimulatedWal {
    /// WAL in which about `noise_percent` (0 to 100) of each page does not compress.
    pub fn new(pinned: Pinned, noise_percent: usize) -> Self {
        let mut template = vec![0; PAGE];
        let noise = PAGE * noise_percent.min(100) / 100;
        for (n, word) in template[..noise].chunks_mut(8).enumerate() {
            let value = mix(n as u64 + 1).to_le_bytes();
            word.copy_from_slice(&value[..word.len()]);
        }
        Self { pinned, template }
    }

    /// A PostgreSQL 17 with segments of 1 MiB, the smallest size there is.
    pub fn small(system_identifier: u64) -> Self {
        let segment_size = SegmentSize::new(1 << 20).expect("PostgreSQL allows 1 MiB");
        let pinned = Pinned { system_identifier, segment_size, postgres_version: 170_002 };
        Self::new(pinned, 12)
    }

    /// The identity that its server reports.
    pub const fn pinned(&self) -> Pinned {
        self.pinned
    }

    /// The bytes from `from` to `to` as a server on the timeline of `history` has them: up to each switch point they
    /// are those of the ancestor.
    pub fn bytes(&self, history: &TimelineHistory, from: Lsn, to: Lsn) -> Vec<u8> {
        let mut out = Vec::with_capacity(to.bytes_since(from) as usize);
        let mut at = from.as_u64();
        while at < to.as_u64() {
            let page = at - at % PAGE_BYTES;
            let content = self.page(history, page);
            let end = to.as_u64().min(page.saturating_add(PAGE_BYTES));
            out.extend_from_slice(&content[(at - page) as usize..(end - page) as usize]);
            at = end;
        }
        out
    }

    fn page(&self, history: &TimelineHistory, at: u64) -> Vec<u8> {
        let owner = history.timeline_at(Lsn::new(at));
        let mut page = self.page_of(owner, at);
        for entry in history.entries() {
            // The switch point is in this page: from there on the bytes are those of the descendant.
            let switch = entry.end.as_u64();
            if switch > at && switch - at < PAGE_BYTES {
                let cut = ((switch - at) as usize).max(40);
                let next = history.timeline_at(entry.end);
                page[cut..].copy_from_slice(&self.page_of(next, at)[cut..]);
            }
        }
        page
    }

    fn page_of(&self, timeline: TimelineId, at: u64) -> Vec<u8> {
        let mut page = self.template.clone();
        for place in (STAMP_EVERY / 2..PAGE).step_by(STAMP_EVERY) {
            let stamp = mix((at + place as u64) ^ (u64::from(timeline.get()) << 56));
            page[place..place + 8].copy_from_slice(&stamp.to_le_bytes());
        }
        let long = at.is_multiple_of(self.pinned.segment_size.bytes());
        page[0..2].copy_from_slice(&magic(self.pinned.postgres_version).to_le_bytes());
        page[2..4].copy_from_slice(&(u16::from(long) * 2).to_le_bytes());
        page[4..8].copy_from_slice(&timeline.get().to_le_bytes());
        page[8..16].copy_from_slice(&at.to_le_bytes());
        if long {
            page[24..32].copy_from_slice(&self.pinned.system_identifier.to_le_bytes());
            page[32..36].copy_from_slice(&self.pinned.segment_size.as_u32().to_le_bytes());
            page[36..40].copy_from_slice(&(PAGE_BYTES as u32).to_le_bytes());
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::{PageChecker, PageExpectation};

    #[test]
    fn it_passes_the_page_check_also_across_a_switch() {
        let wal = SimulatedWal::small(77);
        let child = TimelineId::new(2).unwrap();
        let switch = Lsn::new((5 << 20) + 12_345);
        let text = format!("1\t{switch}\tx\n");
        let history = TimelineHistory::parse(child, text.as_bytes()).unwrap();
        let root = TimelineHistory::root(TimelineId::new(1).unwrap());
        let (from, to) = (Lsn::new(5 << 20), Lsn::new(7 << 20));
        for history in [&root, &history] {
            let expect = PageExpectation {
                system_identifier: 77,
                segment_size: wal.pinned().segment_size,
                postgres_major: 17,
                history: history.clone(),
            };
            let bytes = wal.bytes(history, from, to);
            assert_eq!(bytes.len(), 2 << 20);
            PageChecker::new(expect, from).check(&bytes).unwrap();
        }
        let (a, b) = (wal.bytes(&root, from, to), wal.bytes(&history, from, to));
        assert_eq!(a[..12_345], b[..12_345]);
        assert_ne!(a[12_345..16_384], b[12_345..16_384]);
    }
}
