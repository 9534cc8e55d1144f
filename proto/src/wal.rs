//! Validated twins of the WAL service's messages: the only place that validates them.
//!
//! The types of a twin exclude invalid values (a segment size that PostgreSQL can have, a timeline
//! from 1 up). The store may still refuse what a twin accepts, because it knows what is stored.

use crate::{Code, v1};
use klio_pg::{Lsn, PAGE_BYTES, SegmentSize, TimelineHistory, TimelineId};
use tonic::Status;

/// Longest text that a peer may send for a name or reason; a longer one is an attack or a bug.
const TEXT_BYTES_MAX: usize = 512;

/// What identifies the PostgreSQL behind a call (P8: pinned at first contact).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct System {
    /// From IDENTIFY_SYSTEM; never 0.
    pub system_identifier: u64,
    /// wal_segment_size.
    pub segment_size: SegmentSize,
    /// server_version_num; 150000 or more.
    pub postgres_version: u32,
}

impl System {
    pub(crate) fn read(identifier: u64, segment: u32, version: u32) -> Result<Self, Status> {
        if identifier == 0 {
            return Err(invalid("system identifier", "a number other than 0", identifier));
        }
        if !(150_000..1_000_000).contains(&version) {
            return Err(invalid("PostgreSQL version", "15 or newer (150000 or more)", version));
        }
        let segment_size = SegmentSize::new(segment)
            .map_err(|e| Code::Invalid.status(format!("read request: {e}")))?;
        Ok(Self { system_identifier: identifier, segment_size, postgres_version: version })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PositionRequest {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub system: System,
    /// The caller knows generations and compares them itself.
    pub knows_generations: bool,
    /// Answer with the position that both tiers reach together.
    pub with_tier2: bool,
    /// The same for the generations of which tier 1 holds nothing.
    pub empty_in_tier2: bool,
}

impl TryFrom<v1::PositionRequest> for PositionRequest {
    type Error = Status;
    fn try_from(raw: v1::PositionRequest) -> Result<Self, Status> {
        let system = System::read(raw.system_identifier, raw.segment_size, raw.postgres_version)?;
        let knows_generations = raw.knows_generations;
        let (with_tier2, empty_in_tier2) = (raw.with_tier2, raw.empty_in_tier2);
        Ok(Self { cluster: raw.cluster, system, knows_generations, with_tier2, empty_in_tier2 })
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BeginGenerationRequest {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub system: System,
    /// As in [`Open`].
    pub writer_id: String,
}

impl TryFrom<v1::BeginGenerationRequest> for BeginGenerationRequest {
    type Error = Status;
    fn try_from(raw: v1::BeginGenerationRequest) -> Result<Self, Status> {
        let system = System::read(raw.system_identifier, raw.segment_size, raw.postgres_version)?;
        Ok(Self { cluster: raw.cluster, system, writer_id: raw.writer_id })
    }
}

/// A history file to store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutHistoryRequest {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub system: System,
    pub timeline: TimelineId,
    /// The content as PostgreSQL wrote it.
    pub content: bytes::Bytes,
}

impl TryFrom<v1::PutHistoryRequest> for PutHistoryRequest {
    type Error = Status;
    fn try_from(raw: v1::PutHistoryRequest) -> Result<Self, Status> {
        let system = System::read(raw.system_identifier, raw.segment_size, raw.postgres_version)?;
        let timeline = timeline(raw.timeline)?;
        Ok(Self { cluster: raw.cluster, system, timeline, content: raw.content })
    }
}

/// The first message of `Refill`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefillBegin {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub system: System,
    /// As in [`Open`].
    pub writer_id: String,
    pub timeline: TimelineId,
    /// The first byte of the segment.
    pub start: Lsn,
}

impl TryFrom<v1::RefillBegin> for RefillBegin {
    type Error = Status;
    fn try_from(raw: v1::RefillBegin) -> Result<Self, Status> {
        let system = System::read(raw.system_identifier, raw.segment_size, raw.postgres_version)?;
        let (timeline, start) = (timeline(raw.timeline)?, Lsn::new(raw.start_lsn));
        if start.offset_in(system.segment_size) != 0 {
            return Err(invalid("start", "the start of a segment", start));
        }
        Ok(Self { cluster: raw.cluster, system, writer_id: raw.writer_id, timeline, start })
    }
}

/// The first message of `Compare`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompareBegin {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub system: System,
    /// As in [`Open`].
    pub writer_id: String,
    /// The timeline whose WAL is compared.
    pub timeline: TimelineId,
    /// PostgreSQL's history of that timeline; `None` if there is no file.
    pub history: Option<TimelineHistory>,
    /// The start of a page.
    pub start: Lsn,
    /// Where the comparison ends.
    pub end: Lsn,
    /// Where the new WAL will begin.
    pub next: Lsn,
    /// The durable position that the server reported.
    pub held: Lsn,
    /// Where PostgreSQL's WAL of this timeline ends; `None` if that proves nothing.
    pub postgres_end: Option<Lsn>,
}

impl TryFrom<v1::CompareBegin> for CompareBegin {
    type Error = Status;
    fn try_from(raw: v1::CompareBegin) -> Result<Self, Status> {
        let system = System::read(raw.system_identifier, raw.segment_size, raw.postgres_version)?;
        let timeline = timeline(raw.timeline)?;
        if raw.writer_id.is_empty() || raw.writer_id.len() > TEXT_BYTES_MAX {
            return Err(invalid("writer_id length", "1 to 512 bytes", raw.writer_id.len()));
        }
        let history = match raw.history.is_empty() {
            true => None,
            false => {
                let parsed = TimelineHistory::parse(timeline, &raw.history);
                Some(parsed.map_err(|e| Code::Invalid.status(format!("read request: {e}")))?)
            }
        };
        let (start, end, next) =
            (Lsn::new(raw.start_lsn), Lsn::new(raw.end_lsn), Lsn::new(raw.next_lsn));
        if !raw.start_lsn.is_multiple_of(PAGE_BYTES) && start != end || start > end {
            let found = format!("{start} to {end}");
            return Err(invalid("range", "the start of a page and an end behind it", found));
        }
        let held = Lsn::new(raw.held_lsn);
        let postgres_end = (raw.postgres_end_lsn > 0).then_some(Lsn::new(raw.postgres_end_lsn));
        let (cluster, writer_id) = (raw.cluster, raw.writer_id);
        Ok(Self {
            cluster,
            system,
            writer_id,
            timeline,
            history,
            start,
            end,
            next,
            held,
            postgres_end,
        })
    }
}

/// WAL that PostgreSQL no longer has and the server never received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// First missing byte.
    pub from: Lsn,
    /// The first byte after the gap.
    pub to: Lsn,
    /// A sentence for people.
    pub reason: String,
}

/// The first message of `Receive`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Not validated here: the caller checks it against the certificate.
    pub cluster: String,
    pub system: System,
    /// The timeline to stream.
    pub timeline: TimelineId,
    /// The first byte that will be sent.
    pub start: Lsn,
    /// Random per sidecar process.
    pub writer_id: String,
    /// A gap that the sidecar declares.
    pub gap: Option<Gap>,
    /// The position that PostgreSQL was told was flushed, according to its slot.
    pub slot_restart: Option<Lsn>,
    /// The timeline that PostgreSQL is on: the one to stream, or a descendant.
    pub lives_on: TimelineId,
    /// Whether the sidecar answers `Prove`.
    pub can_prove: bool,
}

impl TryFrom<v1::Open> for Open {
    type Error = Status;
    fn try_from(raw: v1::Open) -> Result<Self, Status> {
        let system = System::read(raw.system_identifier, raw.segment_size, raw.postgres_version)?;
        let timeline = timeline(raw.timeline)?;
        if raw.writer_id.is_empty() || raw.writer_id.len() > TEXT_BYTES_MAX {
            return Err(invalid("writer_id length", "1 to 512 bytes", raw.writer_id.len()));
        }
        if raw.writer_id.chars().any(|c| !(c.is_ascii_graphic() || c == ' ')) {
            return Err(invalid("writer_id", "printable ASCII", format!("{:?}", raw.writer_id)));
        }
        let start = Lsn::new(raw.start_lsn);
        let gap = raw.gap.map(|gap| read_gap(gap, start)).transpose()?;
        let slot_restart = Some(Lsn::new(raw.slot_restart_lsn)).filter(|lsn| *lsn > Lsn::ZERO);
        let lives_on = TimelineId::new(raw.postgres_timeline).unwrap_or(timeline);
        if lives_on < timeline {
            let expected = format!("{} or newer", timeline.get());
            return Err(invalid("PostgreSQL's timeline", &expected, lives_on.get()));
        }
        let (cluster, writer_id, can_prove) = (raw.cluster, raw.writer_id, raw.can_prove);
        Ok(Self {
            cluster,
            system,
            timeline,
            start,
            writer_id,
            gap,
            slot_restart,
            lives_on,
            can_prove,
        })
    }
}

/// PostgreSQL's state when it is asked to prove that it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alive {
    /// The nonce of the question.
    pub nonce: u64,
    /// `None` if PostgreSQL did not answer.
    pub postgres: Option<AlivePostgres>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlivePostgres {
    /// Whether it is a standby, which writes nothing.
    pub in_recovery: bool,
    pub timeline: TimelineId,
    /// The end of its WAL.
    pub position: Lsn,
}

impl TryFrom<v1::Alive> for Alive {
    type Error = Status;
    fn try_from(raw: v1::Alive) -> Result<Self, Status> {
        let postgres = match raw.answered {
            false => None,
            true => Some(AlivePostgres {
                in_recovery: raw.in_recovery,
                timeline: timeline(raw.timeline)?,
                position: Lsn::new(raw.position_lsn),
            }),
        };
        Ok(Self { nonce: raw.nonce, postgres })
    }
}

fn read_gap(raw: v1::Gap, start: Lsn) -> Result<Gap, Status> {
    let gap = Gap { from: Lsn::new(raw.from_lsn), to: Lsn::new(raw.to_lsn), reason: raw.reason };
    if gap.reason.len() > TEXT_BYTES_MAX {
        return Err(invalid("gap reason length", "at most 512 bytes", gap.reason.len()));
    }
    if gap.to <= gap.from || gap.to != start {
        let expected = "a gap that ends at the start LSN and after its own beginning";
        let found = format!("{} to {}, start {start}", gap.from, gap.to);
        return Err(invalid("gap", expected, found));
    }
    Ok(gap)
}

/// Converts a timeline number from the wire.
///
/// # Errors
/// `INVALID` for 0.
pub fn timeline(number: u32) -> Result<TimelineId, Status> {
    TimelineId::new(number).ok_or_else(|| invalid("timeline", "1 or more", number))
}

fn invalid(what: &str, expected: &str, found: impl std::fmt::Display) -> Status {
    Code::Invalid.status(format!("read {what}: expected {expected}, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> v1::Open {
        v1::Open {
            cluster: "pg".into(),
            system_identifier: 7,
            segment_size: 16 << 20,
            postgres_version: 150_018,
            timeline: 1,
            start_lsn: 0x0300_0000,
            writer_id: "w".into(),
            gap: None,
            slot_restart_lsn: 0,
            postgres_timeline: 0,
            can_prove: false,
        }
    }

    #[test]
    fn absurd_fields_are_refused_by_name() {
        type Break = fn(&mut v1::Open);
        let broken: [(Break, &str); 7] = [
            (|o| o.system_identifier = 0, "system identifier"),
            (|o| o.segment_size = 3 << 20, "segment size"),
            (|o| o.segment_size = 0, "segment size"),
            (|o| o.postgres_version = 140_005, "PostgreSQL version"),
            (|o| o.timeline = 0, "timeline"),
            (|o| o.writer_id = "x".repeat(600), "writer_id"),
            (|o| o.gap = Some(v1::Gap { from_lsn: 5, to_lsn: 4, reason: String::new() }), "gap"),
        ];
        assert!(Open::try_from(good()).is_ok());
        for (change, name) in broken {
            let mut open = good();
            change(&mut open);
            let status = Open::try_from(open).unwrap_err();
            assert_eq!(Code::of(&status), Code::Invalid);
            assert!(status.message().contains(name), "{name}: {status}");
        }
    }
}
