//! The walker on WAL that the tests build record by record: what it finds, and that no bytes make it
//! panic.

use super::*;
use proptest::prelude::*;

const SEGMENT: u32 = 1 << 20;
const BASE: u64 = 3 << 20;

/// Writes WAL with PostgreSQL's layout.
struct Writer {
    bytes: Vec<u8>,
    previous: u64,
    /// Remaining bytes of the record that is being written, for page headers.
    left: u32,
}

impl Writer {
    fn new() -> Self {
        let mut writer = Self { bytes: Vec::new(), previous: 0, left: 0 };
        writer.page();
        writer
    }
    fn at(&self) -> u64 {
        BASE + self.bytes.len() as u64
    }
    fn page(&mut self) {
        let at = self.at();
        let long = at.is_multiple_of(u64::from(SEGMENT));
        let flags = u16::from(long) << 1 | u16::from(self.left > 0);
        self.bytes.extend(0xD110u16.to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(1u32.to_le_bytes());
        self.bytes.extend(at.to_le_bytes());
        self.bytes.extend(self.left.to_le_bytes());
        self.bytes.extend([0; 4]);
        if long {
            self.bytes.extend([0; 16]);
        }
    }
    fn put(&mut self, data: &[u8]) {
        for byte in data {
            if self.at().is_multiple_of(PAGE_BYTES) {
                self.page();
            }
            self.bytes.push(*byte);
            self.left -= 1;
        }
    }
    /// Writes a record and returns its start.
    fn record(&mut self, rmid: u8, info: u8, xid: u32, body: &[u8]) -> Lsn {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        if self.at().is_multiple_of(PAGE_BYTES) {
            self.left = 0;
            self.page();
        }
        let start = self.at();
        let mut header = Vec::new();
        let total = (24 + body.len()) as u32;
        header.extend(total.to_le_bytes());
        header.extend(xid.to_le_bytes());
        header.extend(self.previous.to_le_bytes());
        header.extend([info, rmid, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &header);
        header.extend(crc.to_le_bytes());
        self.left = total;
        self.put(&header);
        self.put(body);
        self.previous = start;
        Lsn::new(start)
    }
    fn commit(&mut self, xid: u32, unix_micros: i64) -> Lsn {
        self.record(RM_XACT, 0, xid, &main(&time(unix_micros)))
    }
}

fn time(unix_micros: i64) -> Vec<u8> {
    crate::pg_micros_from_unix(unix_micros).to_le_bytes().to_vec()
}

fn main(data: &[u8]) -> Vec<u8> {
    [&[255, data.len() as u8], data].concat()
}

fn walk(bytes: &[u8], cut: usize) -> (RecordWalker, Vec<Found>) {
    let size = SegmentSize::new(SEGMENT).unwrap();
    let mut walker = RecordWalker::new(size, 15, Lsn::new(BASE));
    let mut all = Vec::new();
    bytes.chunks(cut).for_each(|c| walker.push(c, &mut |f| all.push(f)));
    (walker, all)
}

#[test]
fn a_prepared_transaction_has_the_id_it_was_prepared_with() {
    let mut writer = Writer::new();
    let mut data = time(5);
    data.extend(0x1Bu32.to_le_bytes());
    data.extend([0; 8]);
    data.extend(2u32.to_le_bytes());
    data.extend([9; 8]);
    data.extend(1u32.to_le_bytes());
    data.extend([9; 16]);
    data.extend(4242u32.to_le_bytes());
    data.extend(b"gid\0");
    // Behind a replication origin and a top-level transaction id.
    let body = [&[253, 1, 0, 252, 1, 0, 0, 0][..], &main(&data)].concat();
    writer.record(RM_XACT, 0x30 | 0x80, 0, &body);
    let (_, found) = walk(&writer.bytes, 1000);
    assert_eq!(found[0].landmark, Landmark::Commit { xid: 4242, unix_micros: 5 });
}

#[test]
fn a_restore_point_has_its_name() {
    let mut writer = Writer::new();
    let mut data = time(7);
    data.extend(b"before the upgrade\0");
    data.resize(72, 0);
    let lsn = writer.record(RM_XLOG, XLOG_RESTORE_POINT, 0, &main(&data));
    // XLOG_BACKUP_END and a checkpoint are not restore points.
    writer.record(RM_XLOG, 0x50, 0, &main(&data));
    let (_, found) = walk(&writer.bytes, 8192);
    let landmark = Landmark::RestorePoint { name: "before the upgrade".into(), unix_micros: 7 };
    assert_eq!((found.len(), &found[0].landmark, found[0].lsn), (1, &landmark, lsn));
    assert!(!landmark.stops_by_time());
}

#[test]
fn settings_and_tablespaces_are_told_with_what_their_records_say() {
    let mut writer = Writer::new();
    let mut data: Vec<u8> =
        [120u32, 8, 10, 20, 64, 0].iter().flat_map(|n| n.to_le_bytes()).collect();
    data.extend([0, 1, 0, 0]);
    let changed = writer.record(RM_XLOG, XLOG_PARAMETER_CHANGE, 0, &main(&data));
    let created = writer.record(RM_TBLSPC, TBLSPC_CREATE, 9, &main(b"\x01\x40\0\0/srv/caf\xe9\0"));
    let dropped = writer.record(RM_TBLSPC, TBLSPC_DROP, 9, &main(&16385u32.to_le_bytes()));
    let (_, found) = walk(&writer.bytes, 5);
    let parameters = WalParameters {
        max_connections: 120,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 20,
        max_locks_per_transaction: 64,
        wal_level: crate::WalLevel::Minimal,
        wal_log_hints: false,
        track_commit_timestamp: true,
    };
    let path = b"/srv/caf\xe9".to_vec();
    let expected = [
        (changed, Landmark::Parameters(parameters)),
        (created, Landmark::TablespaceCreated { oid: 16385, path }),
        (dropped, Landmark::TablespaceDropped { oid: 16385 }),
    ];
    let found: Vec<_> = found.into_iter().map(|f| (f.lsn, f.landmark)).collect();
    assert_eq!(found, expected);
    assert!(expected.iter().all(|(_, l)| !l.stops_by_time() && l.unix_micros().is_none()));
}

#[test]
fn wal_goes_on_in_the_next_segment_after_a_switch() {
    let mut writer = Writer::new();
    writer.commit(1, 10);
    writer.record(RM_XLOG, XLOG_SWITCH, 0, &[]);
    writer.bytes.resize(SEGMENT as usize, 0);
    writer.page();
    let second = writer.commit(2, 20);
    for cut in [7, 8192, writer.bytes.len()] {
        let (walker, found) = walk(&writer.bytes, cut);
        assert_eq!(found.len(), 2, "cut {cut}");
        assert_eq!((found[1].lsn, walker.last_record()), (second, Some(second)));
    }
}

#[test]
fn a_record_cut_off_by_a_crash_is_passed_over_and_what_follows_is_read() {
    let mut writer = Writer::new();
    writer.commit(1, 10);
    let good = writer.previous;
    writer.record(5, 0, 0, &vec![7; 20_000]);
    let page = (24 << 10) - 8192;
    writer.bytes.truncate(page);
    writer.left = 0;
    writer.page();
    writer.bytes[page + 2] |= OVERWRITES as u8;
    writer.previous = good;
    let lsn = writer.commit(2, 20);
    let (walker, found) = walk(&writer.bytes, 999);
    assert_eq!((found.len(), walker.last_record()), (2, Some(lsn)));
}

#[test]
fn zeros_are_the_end_of_wal() {
    let mut writer = Writer::new();
    let lsn = writer.commit(1, 10);
    let end = writer.at().next_multiple_of(8);
    writer.bytes.resize(SEGMENT as usize, 0);
    let (walker, found) = walk(&writer.bytes, 8192);
    assert_eq!((found.len(), walker.ended()), (1, Some("zeros")));
    assert_eq!((walker.last_record(), walker.records_end()), (Some(lsn), Some(Lsn::new(end))));
}

proptest! {
    /// Records of any length over many pages, in pieces of any length, starting at any page.
    #[test]
    fn every_commit_is_found_however_wal_is_cut(
        bodies in prop::collection::vec(0usize..30_000, 1..30), cut in 1usize..20_000, from in 0usize..9,
    ) {
        let mut writer = Writer::new();
        let mut commits = Vec::new();
        for (n, body) in bodies.iter().enumerate() {
            writer.record(10, 0, 0, &vec![n as u8; *body]);
            commits.push((writer.commit(n as u32, n as i64), n as u32));
        }
        let (walker, found) = walk(&writer.bytes, cut);
        let seen: Vec<(Lsn, u32)> = found.iter().map(|f| match f.landmark {
            Landmark::Commit { xid, .. } => (f.lsn, xid),
            _ => (f.lsn, u32::MAX),
        }).collect();
        prop_assert_eq!(&seen, &commits);
        prop_assert_eq!(walker.last_record(), commits.last().map(|c| c.0));
        prop_assert_eq!(walker.ended(), None);

        let begin = from * PAGE_BYTES as usize;
        if begin < writer.bytes.len() {
            let size = SegmentSize::new(SEGMENT).unwrap();
            let mut later = Vec::new();
            let mut walker = RecordWalker::new(size, 15, Lsn::new(BASE + begin as u64));
            writer.bytes[begin..].chunks(cut).for_each(|c| walker.push(c, &mut |f| later.push(f)));
            prop_assert!(found.ends_with(&later), "{} of {}", later.len(), found.len());
            let after = found.iter().filter(|f| f.lsn >= Lsn::new(BASE + begin as u64)).count();
            prop_assert_eq!(later.len(), after);
        }
    }

    #[test]
    fn a_flipped_bit_ends_wal_there(at in 40usize..30_000, bit in 0u8..8) {
        let mut writer = Writer::new();
        for n in 0..900 {
            writer.commit(n, i64::from(n));
        }
        let (_, all) = walk(&writer.bytes, 8192);
        writer.bytes[at] ^= 1 << bit;
        let (_, found) = walk(&writer.bytes, 8192);
        // What comes before is unchanged; a bit in padding or in unchecked header fields changes nothing.
        prop_assert!(all.starts_with(&found));
        prop_assert!(found.iter().all(|f| f.lsn < Lsn::new(BASE + at as u64)) || found == all);
    }

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..40_000), cut in 1usize..9000) {
        walk(&bytes, cut);
    }
}
