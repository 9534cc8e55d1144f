//! PostgreSQL's own vocabulary: LSNs, segments, timelines, WAL pages and replication messages.
//!
//! A leaf crate: pure functions over values and bytes. No I/O, no clock, no runtime, no other Klio
//! crate. All parsers here handle untrusted input, so they return errors and never panic.

mod backup_label;
mod checksum;
mod control;
mod lsn;
mod number;
mod page;
mod relation;
mod replication;
mod segment;
mod segment_header;
mod size;
mod timeline;
mod wal_change;
mod wal_edit;
mod wal_level_scan;
mod wal_prepare;
mod wal_record;
mod wal_xact;

pub use backup_label::{
    BackupLabel, BackupLabelError, TABLESPACE_MAP_FILE, TablespaceEntry, format_tablespace_map,
    parse_tablespace_map,
};
pub use checksum::{PageHeader, page_checksum};
pub use control::{ControlError, ControlFile};
pub use lsn::{Lsn, ParseLsnError};
pub use page::{PAGE_BYTES, PageChecker, PageError, PageExpectation};
pub use relation::{Fork, RelationFile};
pub use replication::{
    MessageError, PrimaryKeepalive, ReplicationMessage, StatusUpdate, XLogData, decode_message,
    encode_status, pg_micros_from_unix, unix_micros_from_pg,
};
pub use segment::{ParseSegmentError, SegmentName, SegmentSize, SegmentSizeError};
pub use segment_header::{SEGMENT_HEADER_BYTES, SegmentHeader, SegmentHeaderError};
pub use size::ByteSize;
pub use timeline::{HistoryEntry, HistoryError, ParseTimelineError, TimelineHistory, TimelineId};
pub use wal_change::{WalLevel, WalParameters};
pub use wal_edit::{Edit, TABLESPACE_RECORD_SPAN, edit_segment, tablespace_in_place};
pub use wal_level_scan::LevelScan;
pub use wal_prepare::Prepared;
pub use wal_record::{Found, Landmark, RecordWalker};
