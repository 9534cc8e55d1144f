//! Compares a PostgreSQL's WAL with the stored WAL, before a stream continues there (P11).
//!
//! - The server compares, with the bytes it has itself, of tier 1 or else of tier 2. The client only says which WAL it
//!   has; what it says decides nothing (P13).
//! - Equal bytes prove a common history only if they contain a whole record: page headers and zeros are the same
//!   everywhere.
//! - Pages that differ only in the location of a tablespace, which a restore removed from the copy's WAL, count as
//!   equal (edited.rs).
//! - WAL that cannot be read or is missing is not compared, and is evidence for neither side. Only for a closed
//!   generation the answer of a bucket is waited for: without it, a history that a person has closed would be received
//!   as a new one.
//! - Memory is bounded: one comparison holds the digests of one segment, and only a few comparisons run at once.

use crate::{
    base::BaseStore,
    errors::{self, blocking},
    fetch::{Located, Source},
};
use bytes::Bytes;
use futures::StreamExt;
use klio_pg::{
    Lsn, PAGE_BYTES, RecordWalker, SegmentName, SegmentSize, TimelineHistory, TimelineId,
};
use klio_proto::{
    Code,
    v1::{self, compare_request::Kind},
    wal::{CompareBegin, Gap, Open},
};
use klio_storage::{
    Error,
    catalog::BackupRecord,
    generations::{Generation, Generations, Stranger},
    layout::{ClusterName, WalFile},
    wal::{
        SealedDecoder, Seam, TakenOver,
        overlap::{self, DIGEST_BYTES, PageDigests},
    },
};
use std::{
    collections::VecDeque,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::Semaphore;
use tonic::Status;

mod edited;
mod seen;

use seen::Seen;

/// The number of comparisons at once. Each reads a segment from disk, and sends nothing.
const AT_ONCE: usize = 4;
/// The number of comparisons remembered. A writer opens its stream right after its comparison; if more writers than
/// this compare in between, the oldest has to compare again.
const PROOFS_MAX: usize = 4096;
/// How many segments back the last whole record is searched.
const SEAM_SEGMENTS: u64 = 4;
/// The most WAL that a client may send so that the record across the end of the stored WAL can be completed.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// No difference was found.
    Same {
        /// Whether a whole record was among the bytes compared.
        proven: bool,
    },
    /// Two different histories.
    Diverged {
        /// The first LSN at which they differ.
        at: Lsn,
        /// What each side has there.
        detail: String,
    },
}

/// What a writer compared last.
#[derive(Debug)]
struct Proof {
    writer_id: String,
    cluster: ClusterName,
    timeline: TimelineId,
    end: Lsn,
    proven: bool,
}

/// What is known about the beginning of a stream.
#[derive(Debug, Default)]
pub struct Continuity {
    /// Checks the first new record against the stored WAL.
    pub seam: Option<Seam>,
    /// Why nothing was proven; `None` when it was proven, or when there is nothing to continue.
    pub unproven: Option<String>,
}

/// Runs the comparisons and remembers their results. Cheap to clone.
#[derive(Clone)]
pub struct Comparer {
    base: BaseStore,
    source: Source,
    turns: Arc<Semaphore>,
    /// Limits the comparisons that read the bucket.
    far_turns: Arc<Semaphore>,
    proofs: Arc<Mutex<VecDeque<Proof>>>,
    findings: Arc<Mutex<VecDeque<Finding>>>,
}

/// The result that a writer's history is not this cluster's.
#[derive(Debug)]
struct Finding {
    writer_id: String,
    cluster: ClusterName,
    detail: String,
    /// What was seen of the history, if it was compared.
    seen: Option<Seen>,
}

impl Comparer {
    /// Reads from both tiers.
    pub fn new(base: BaseStore) -> Self {
        let (store, tier2) = (base.wal().clone(), base.tier2().cloned());
        let source = Source { store, tier2, readers: base.readers().clone() };
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let far_turns = Arc::new(Semaphore::new(AT_ONCE));
        let (proofs, findings) = (Arc::default(), Arc::default());
        Self { base, source, turns, far_turns, proofs, findings }
    }

    /// Compares the digests that `inbound` delivers with the WAL stored for `cluster`.
    ///
    /// # Errors
    /// `WRONG_SYSTEM`; `INVALID` for messages that cannot be right; `UNAVAILABLE` when only the bucket has the WAL of a
    /// closed generation, and does not answer.
    pub async fn compare(
        &self,
        cluster: &ClusterName,
        begin: CompareBegin,
        inbound: impl Inbound,
    ) -> Result<Verdict, Status> {
        self.base.check_system(cluster, begin.system).await?;
        let mut seen = Seen::new(cluster, &begin, &self.base.generations(cluster).await?.all());
        let verdict = self.judge(cluster, &begin, inbound, &mut seen).await?;
        match &verdict {
            Verdict::Diverged { at, detail } => {
                tracing::warn!(%cluster, timeline = begin.timeline.get(), %at, detail, "PostgreSQL's history differs from the stored one");
                let (writer_id, cluster) = (begin.writer_id, cluster.clone());
                let (detail, seen) = (detail.clone(), Some(seen));
                self.keep(Finding { writer_id, cluster, detail, seen });
            }
            Verdict::Same { proven } => self.remember(Proof {
                writer_id: begin.writer_id,
                cluster: cluster.clone(),
                timeline: begin.timeline,
                end: begin.end,
                proven: *proven,
            }),
        }
        Ok(verdict)
    }

    async fn judge(
        &self,
        cluster: &ClusterName,
        begin: &CompareBegin,
        inbound: impl Inbound,
        seen: &mut Seen,
    ) -> Result<Verdict, Status> {
        let mut inbox = Inbox { inbound, digests: Vec::new(), head: Vec::new(), ended: false };
        if let Some(verdict) = self.compare_history(cluster, begin).await? {
            seen.leave_at_beginning(begin.start);
            inbox.show(begin, begin.start, seen).await;
            return Ok(verdict);
        }
        let mut held = Held::new(begin.system.segment_size, major(begin), begin.start);
        let mut at = begin.start;
        while at < begin.end {
            let segment = SegmentName::containing(begin.timeline, at, begin.system.segment_size);
            let end = next_segment(at, begin.system.segment_size).min(begin.end);
            let theirs = inbox.digests(overlap::pages(at, end)).await?;
            seen.pass(at, &theirs);
            let ours = self.read_into(cluster, segment, at..end, &mut held).await?;
            if ours.len() < theirs.len() {
                seen.skip_to(end);
            }
            if let Some(page) = overlap::first_difference(at, &ours, &theirs) {
                let sides = (ours.as_slice(), theirs.as_slice());
                if !self.is_edited(cluster, segment, at..end, &held, sides).await? {
                    seen.leave(page, at, &theirs);
                    inbox.show(begin, end, seen).await;
                    return Ok(different(begin.timeline, page, at, &ours, &theirs));
                }
                tracing::info!(%cluster, %page, "WAL comes from a restored copy with relocated tablespaces; it counts as equal");
            }
            at = end;
        }
        if let Some(end) = begin.postgres_end.filter(|end| *end < begin.held) {
            let (timeline, held) = (begin.timeline, begin.held);
            let detail = format!(
                "timeline {timeline:?} is held up to {held}, and PostgreSQL, which is not in recovery, has it only up to {end}: it was set back"
            );
            seen.leave_at_end();
            return Ok(Verdict::Diverged { at: end, detail });
        }
        let head = inbox.head().await?;
        if !held.proven && !head.is_empty() {
            let seam = self.seam(cluster, begin.system.segment_size, major(begin), begin).await?;
            if let Some(Err(broken)) = seam.map(|mut seam| seam.push(&head)) {
                return Ok(Verdict::Diverged { at: broken.at, detail: broken.to_string() });
            }
        }
        Ok(Verdict::Same { proven: held.proven })
    }

    /// A timeline's number does not identify it: the points where it left its ancestors have to be the same, too.
    async fn compare_history(
        &self,
        cluster: &ClusterName,
        begin: &CompareBegin,
    ) -> Result<Option<Verdict>, Status> {
        let Some(theirs) = &begin.history else { return Ok(None) };
        let Some(held) = self.stored_history(cluster, begin.timeline).await? else {
            return Ok(None);
        };
        let (a, b) = (held.entries(), theirs.entries());
        if a == b {
            return Ok(None);
        }
        let part = a.iter().zip(b).find(|(a, b)| a != b);
        let at = part.map(|(a, b)| a.end.min(b.end)).or(held.switch_point());
        let show = |history: &TimelineHistory| {
            let path =
                history.entries().iter().map(|e| format!("{:?} up to {}", e.timeline, e.end));
            let path: Vec<_> = path.collect();
            if path.is_empty() { "no ancestors".to_owned() } else { path.join(", ") }
        };
        let detail = format!(
            "the history of timeline {:?} is held with {}, and PostgreSQL's has {}",
            begin.timeline,
            show(&held),
            show(theirs)
        );
        Ok(Some(Verdict::Diverged { at: at.unwrap_or(Lsn::ZERO), detail }))
    }

    /// The history of a timeline on tier 1, or in tier 2 if a lost tier 1 had it. One that cannot be read is not
    /// compared.
    async fn stored_history(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Option<TimelineHistory>, Status> {
        if let Ok(held) = self.base.wal().history(cluster, timeline) {
            return Ok(Some(held));
        }
        match self.base.history_asked_of_tier2(cluster, timeline).await {
            Ok(content) => {
                Ok(content.and_then(|content| TimelineHistory::parse(timeline, &content).ok()))
            }
            Err(status) => {
                self.must_answer(cluster, Code::of(&status), status.message()).await?;
                let error = status.message();
                tracing::warn!(%cluster, timeline = timeline.get(), error, "cannot read a timeline's history; it is not compared");
                Ok(None)
            }
        }
    }

    /// Reads part of a stored segment, as digests of whole pages, and feeds its records to the walker of `held`.
    async fn read_into(
        &self,
        cluster: &ClusterName,
        segment: SegmentName,
        range: std::ops::Range<Lsn>,
        held: &mut Held,
    ) -> Result<Vec<u8>, Status> {
        let size = held.size;
        let part = Part::new(segment, size, range.clone(), held.walker_at(range.start));
        let Some(part) = self.read(cluster, segment, size, part).await? else {
            (held.walker, held.proven) = (None, false);
            return Ok(Vec::new());
        };
        let Part { digests, walker, .. } = part;
        let reached = digests.position();
        // If the stored bytes end before the range does, what lies before that end proves nothing about the rest.
        let proven = held.proven || walker.last_record().is_some();
        held.proven = proven && reached == range.end;
        held.walker = (reached == range.end).then_some(walker);
        let whole = match reached == range.end {
            true => overlap::pages(range.start, range.end),
            false => reached.bytes_since(range.start) / PAGE_BYTES,
        };
        let mut digests = digests.finish();
        digests.truncate(usize::try_from(whole).unwrap_or(usize::MAX).saturating_mul(DIGEST_BYTES));
        Ok(digests)
    }

    /// Whether the pages differ only in the location of tablespaces of a restored copy.
    async fn is_edited(
        &self,
        cluster: &ClusterName,
        segment: SegmentName,
        range: std::ops::Range<Lsn>,
        held: &Held,
        (ours, theirs): (&[u8], &[u8]),
    ) -> Result<bool, Status> {
        let (size, whole) = (held.size, edited::around(&range));
        let Some(mut kept) = edited::Kept::of(range, ours, theirs) else { return Ok(false) };
        let mut walker = RecordWalker::new(size, held.major, whole.start);
        let mut at = whole.start;
        while at < whole.end {
            let here = self.segment_beside(cluster, segment, at, size);
            let end = next_segment(at, size).min(whole.end);
            let mut part = Part::new(here, size, at..end, walker);
            part.kept = Some(kept.clone());
            walker = match self.read(cluster, here, size, part).await? {
                Some(part) => {
                    kept = part.kept.unwrap_or(kept);
                    part.walker
                }
                None if here == segment => return Ok(false),
                // A record that is not stored as a whole cannot explain a difference.
                None => RecordWalker::new(size, held.major, end),
            };
            at = end;
            // The zeros after a switch to the next segment are not the end of the WAL, so the walker starts again
            // behind them.
            if walker.ended().is_some() || walker.position() != at {
                walker = RecordWalker::new(size, held.major, at);
            }
        }
        Ok(kept.is_explained(size))
    }

    /// The segment that contains `at`, which lies in `segment` or next to it. WAL from before the timeline began is in
    /// its ancestor's segment.
    fn segment_beside(
        &self,
        cluster: &ClusterName,
        segment: SegmentName,
        at: Lsn,
        size: SegmentSize,
    ) -> SegmentName {
        let beside = SegmentName::containing(segment.timeline(), at, size);
        let is_before = segment.start_lsn(size).is_some_and(|start| at < start);
        let history = self.base.wal().history(cluster, segment.timeline()).ok();
        match history.filter(|_| is_before) {
            Some(history) => SegmentName::containing(history.timeline_at(at), at, size),
            None => beside,
        }
    }

    /// Reads a stored segment; `None` when it is not there or cannot be read.
    async fn read(
        &self,
        cluster: &ClusterName,
        segment: SegmentName,
        size: SegmentSize,
        mut part: Part,
    ) -> Result<Option<Part>, Status> {
        // Whether it should be there does not matter: what no tier has, nothing waits for.
        let found = match self.source.look(cluster, WalFile::Segment(segment)).await {
            Ok(Some(found)) => found,
            Ok(None) => {
                tracing::debug!(%cluster, %segment, "neither tier has the segment; it is not compared");
                return Ok(None);
            }
            Err(status) => {
                self.must_answer(cluster, Code::of(&status), status.message()).await?;
                tracing::debug!(%cluster, %segment, error = status.message(), "segment not found; it is not compared");
                return Ok(None);
            }
        };
        // The turn is taken only for reading: a slow client occupies no turn (P13), and a slow bucket occupies none of
        // those for tier 1 (P4).
        let is_far = matches!(found, Located::Tier2 { .. });
        let turns = if is_far { &self.far_turns } else { &self.turns };
        let _turn = turns.acquire().await;
        let read = match found {
            Located::Tier1 { found, .. } => {
                let store = self.base.wal().clone();
                blocking(move || {
                    let read = store.plain_pieces(found, &mut |piece| {
                        part.push(piece);
                        Ok(())
                    });
                    Ok(read.map(|()| part))
                })
                .await?
            }
            Located::Tier2 { file, download, keys, .. } => {
                from_bucket(file, download, keys, size, part).await
            }
        };
        match read {
            Ok(part) => Ok(Some(part)),
            Err(error) => {
                let code = Code::of(&errors::status(&error));
                self.must_answer(cluster, code, &error.to_string()).await?;
                tracing::warn!(%cluster, %segment, %error, "cannot read a stored segment; it is not compared");
                Ok(None)
            }
        }
    }

    /// Whether the comparison may do without WAL that could not be read.
    ///
    /// # Errors
    /// `UNAVAILABLE` for a closed generation, if its WAL can be read later.
    async fn must_answer(
        &self,
        cluster: &ClusterName,
        code: Code,
        why: &str,
    ) -> Result<(), Status> {
        if code != Code::Unavailable {
            return Ok(());
        }
        let generation = self.base.generations(cluster).await?.get(cluster.generation());
        let Some(closed) = generation.filter(|generation| !generation.state.is_open()) else {
            return Ok(());
        };
        let (base, number, state) = (cluster.base(), closed.number, closed.state.word());
        Err(Code::Unavailable.status(format!(
            "compare WAL of {base}: expected the WAL of generation {number}, which is {state} and may be the history of this PostgreSQL, found that it cannot be read now: {why}"
        )))
    }

    /// A checker for the new WAL from `begin.next` on, made from the last stored segment.
    async fn seam(
        &self,
        cluster: &ClusterName,
        size: SegmentSize,
        major: u32,
        begin: &CompareBegin,
    ) -> Result<Option<Seam>, Status> {
        self.seam_at(cluster, size, major, begin.timeline, begin.end, begin.next).await
    }

    async fn seam_at(
        &self,
        cluster: &ClusterName,
        size: SegmentSize,
        major: u32,
        timeline: TimelineId,
        end: Lsn,
        next: Lsn,
    ) -> Result<Option<Seam>, Status> {
        if end == Lsn::ZERO {
            return Ok(None);
        }
        let nearest = Lsn::new(end.as_u64() - 1).segment_start(size);
        let mut walked = None;
        // A record may be longer than a segment, so the last whole one may begin several segments back.
        for back in 0..SEAM_SEGMENTS {
            let before = back.saturating_mul(size.bytes());
            let Some(start) = nearest.as_u64().checked_sub(before) else { break };
            let from = Lsn::new(start);
            match self.walk(cluster, size, timeline, from..end, major).await? {
                Some(walker) if walker.last_record().is_some() => {
                    walked = Some(walker);
                    break;
                }
                Some(_) => {}
                None => break,
            }
        }
        Ok(match next == end {
            true => walked.and_then(|walker| Seam::continues(walker, next)),
            false => Some(Seam::behind(walked.as_ref(), size, major, next)),
        })
    }

    /// Walks the stored records of a range; `None` when part of the range cannot be read.
    async fn walk(
        &self,
        cluster: &ClusterName,
        size: SegmentSize,
        timeline: TimelineId,
        range: std::ops::Range<Lsn>,
        major: u32,
    ) -> Result<Option<RecordWalker>, Status> {
        let mut walker = RecordWalker::new(size, major, range.start);
        let mut at = range.start;
        while at < range.end {
            let segment = SegmentName::containing(timeline, at, size);
            let end = next_segment(at, size).min(range.end);
            let part = Part::new(segment, size, at..end, walker);
            let Some(part) = self.read(cluster, segment, size, part).await? else {
                return Ok(None);
            };
            if part.digests.position() != end {
                return Ok(None);
            }
            (walker, at) = (part.walker, end);
        }
        Ok(Some(walker))
    }

    fn remember(&self, proof: Proof) {
        let mut proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        proofs.retain(|p| p.writer_id != proof.writer_id || p.cluster != proof.cluster);
        proofs.push_back(proof);
        if proofs.len() > PROOFS_MAX {
            proofs.pop_front();
        }
    }

    /// Remembers that the history of a writer is not that of `cluster`, which its first new record showed.
    pub fn found(&self, writer_id: &str, cluster: &ClusterName, detail: &str) {
        let (writer_id, cluster) = (writer_id.to_owned(), cluster.clone());
        self.keep(Finding { writer_id, cluster, detail: detail.to_owned(), seen: None });
    }

    fn keep(&self, finding: Finding) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        findings.retain(|f| f.writer_id != finding.writer_id || f.cluster != finding.cluster);
        findings.push_back(finding);
        if findings.len() > PROOFS_MAX {
            findings.pop_front();
        }
    }

    /// Why a writer's history is not that of `cluster`, if a comparison found so.
    pub fn finding(&self, writer_id: &str, cluster: &ClusterName) -> Option<String> {
        let findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |f: &&Finding| f.writer_id == writer_id && f.cluster == *cluster;
        findings.iter().find(fits).map(|f| f.detail.clone())
    }

    /// What is known of a writer whose history is not that of the current generation `cluster`.
    ///
    /// # Errors
    /// `INVALID` when the writer has not compared itself.
    pub fn why_another(
        &self,
        writer_id: &str,
        cluster: &ClusterName,
        system_identifier: u64,
    ) -> Result<Stranger, Status> {
        let stranger = |reason| Stranger { reason, system_identifier, ..Stranger::default() };
        let findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        let found = findings.iter().find(|f| f.writer_id == writer_id && f.cluster == *cluster);
        if let Some(Finding { detail, seen, .. }) = found {
            let left = seen.as_ref().and_then(Seen::left);
            let seen = seen.as_ref().map(Seen::refused).unwrap_or_default();
            return Ok(Stranger { left, seen, ..stranger(detail.clone()) });
        }
        drop(findings);
        if self.is_unproven(writer_id, cluster) {
            let why = "PostgreSQL no longer has the WAL that would show which history it continues";
            return Ok(stranger(why.to_owned()));
        }
        Err(Code::Invalid.status(format!(
            "begin a generation of {}: expected a comparison with the current one first",
            cluster.base()
        )))
    }

    /// Why a writer's history is not that of the current generation, if it streams into another one and has compared
    /// itself.
    ///
    /// # Errors
    /// The errors of [`BaseStore::generations`].
    pub async fn why_apart(
        &self,
        writer_id: &str,
        cluster: &ClusterName,
    ) -> Result<Option<String>, Status> {
        let current = self.base.generations(cluster).await?.current();
        let current = Generations::place(cluster, current);
        if current == *cluster {
            return Ok(None);
        }
        Ok(self.why_another(writer_id, &current, 0).ok().map(|stranger| stranger.reason))
    }

    /// Whether a backup may be committed next to the WAL of `cluster`: its PostgreSQL must have been compared up to
    /// the backup's stop LSN.
    ///
    /// # Errors
    /// `DIVERGED` when the writer has another history; `INCOMPLETE` when it was not compared that far; `INVALID` when
    /// nothing was compared and PostgreSQL may continue one of several histories.
    pub async fn may_commit(
        &self,
        cluster: &ClusterName,
        writer_id: &str,
        document: &[u8],
    ) -> Result<(), Status> {
        // A document that is not a backup record is refused by the code that parses it.
        let Ok(record) = serde_json::from_slice::<BackupRecord>(document) else { return Ok(()) };
        let refuse = |code: Code, detail: &str| {
            Err(code.status(format!("commit backup {} of {cluster}: {detail}", record.name)))
        };
        if writer_id.is_empty() {
            return self.may_be_unproven(cluster, &record.system_identifier).await;
        }
        if self.compared_up_to(writer_id, cluster).is_some_and(|end| end >= record.stop_lsn) {
            return Ok(());
        }
        match self.finding(writer_id, cluster) {
            Some(detail) => refuse(Code::Diverged, &detail),
            None => refuse(Code::Incomplete, "its WAL was not compared with the stored WAL"),
        }
    }

    /// Whether a backup may be taken without a comparison: there must be one history alone that a PostgreSQL with this
    /// system identifier may continue. A closed one counts as well, because its PostgreSQL may still run.
    ///
    /// # Errors
    /// `INVALID` when there are several; the errors of [`BaseStore::generations`].
    pub async fn may_be_unproven(&self, cluster: &ClusterName, system: &str) -> Result<(), Status> {
        let may = |generation: &Generation| {
            let place = Generations::place(cluster, generation.number);
            let pinned = self.base.wal().pinned(&place).map(|p| p.system_identifier.to_string());
            let known = pinned.unwrap_or_else(|| generation.system_identifier.clone());
            known.is_empty() || known == system
        };
        let all = self.base.generations(cluster).await?.all();
        match all.iter().filter(|generation| may(generation)).count() {
            ..=1 => Ok(()),
            count => Err(Code::Invalid.status(format!(
                "back up {}: expected a comparison of WAL, because this PostgreSQL may continue any of {count} generations, found none; hint: ALTER ROLE ... REPLICATION, a replication line in pg_hba.conf, and a klio of the server's version",
                cluster.base()
            ))),
        }
    }

    /// Whether a writer compared itself with a cluster, and the result was neither the same history nor a different
    /// one.
    pub fn is_unproven(&self, writer_id: &str, cluster: &ClusterName) -> bool {
        let proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        proofs.iter().any(|p| p.writer_id == writer_id && p.cluster == *cluster && !p.proven)
    }

    fn compared_up_to(&self, writer_id: &str, cluster: &ClusterName) -> Option<Lsn> {
        let proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |p: &&Proof| p.writer_id == writer_id && p.cluster == *cluster;
        proofs.iter().find(fits).map(|proof| proof.end)
    }

    /// Takes out what the writer compared with this cluster: a comparison is valid for one stream.
    fn take(&self, writer_id: &str, cluster: &ClusterName) -> Option<Proof> {
        let mut proofs = self.proofs.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |p: &Proof| p.writer_id == writer_id && p.cluster == *cluster;
        let found = proofs.iter().position(fits).and_then(|at| proofs.remove(at));
        proofs.retain(|p| p.writer_id != writer_id);
        found
    }

    /// How the stream that `open` asks for may begin, judged by what its writer compared before. `taken` lists what
    /// the stream continues in tier 2.
    ///
    /// # Errors
    /// `DIVERGED` when nothing can be proven, and a history that was refused earlier may be this one.
    pub async fn continuity(
        &self,
        cluster: &ClusterName,
        open: &Open,
        taken: &[TakenOver],
    ) -> Result<Continuity, Status> {
        let proof = self.take(&open.writer_id, cluster);
        let positions = self.base.wal().positions(cluster);
        if positions.is_empty() && taken.is_empty() {
            return Ok(Continuity::default());
        }
        let here = positions.iter().find(|p| p.timeline == open.timeline).map(|p| p.flushed);
        let there = taken.iter().find(|t| t.timeline == open.timeline).map(|t| t.end);
        let held = here.max(there);
        // For a timeline that is new here, its ancestor was compared, whose bytes come again with the timeline.
        let fits = |proof: &Proof| match held {
            Some(held) => proof.timeline == open.timeline && proof.end == held,
            None => proof.timeline < open.timeline,
        };
        let unproven = match &proof {
            Some(proof) if proof.proven && open.gap.is_none() && fits(proof) => {
                return Ok(Continuity::default());
            }
            Some(_) => "PostgreSQL no longer has the WAL before it",
            None => "the sidecar is older than the server and cannot compare its WAL",
        };
        let seam = match held {
            Some(held) => {
                let end = open.gap.as_ref().map_or(held, |gap: &Gap| gap.from);
                let (size, major) =
                    (open.system.segment_size, open.system.postgres_version / 10_000);
                self.seam_at(cluster, size, major, open.timeline, end, open.start).await?
            }
            None => None,
        };
        let all = self.base.generations(cluster).await?;
        // After a gap the first record proves next to nothing.
        if (seam.is_none() || open.gap.is_some())
            && let Some(refused) =
                all.undecided().find(|g| !g.taken && g.is_of(open.system.system_identifier))
        {
            return Err(Code::Diverged.status(format!(
                "open cluster {cluster}: {unproven}, and another history was refused under this name: {}",
                refused.reason
            )));
        }
        Ok(Continuity { seam, unproven: Some(unproven.to_owned()) })
    }
}

async fn from_bucket(
    file: WalFile,
    download: klio_storage::tier2::Download,
    keys: Option<klio_storage::crypt::Keys>,
    size: SegmentSize,
    mut part: Part,
) -> Result<Part, Error> {
    let mut plain = match keys {
        None => download.boxed(),
        Some(keys) => keys.decrypt_stream(download, file.to_string()).await?.boxed(),
    };
    let mut decoder = SealedDecoder::new(size.bytes())?;
    while let Some(piece) = plain.next().await {
        decoder.push(&piece?, &mut |piece| {
            part.push(piece);
            Ok(())
        })?;
    }
    decoder.finish()?;
    Ok(part)
}

const fn major(begin: &CompareBegin) -> u32 {
    begin.system.postgres_version / 10_000
}

fn next_segment(at: Lsn, size: SegmentSize) -> Lsn {
    at.segment_start(size).advance(size.bytes())
}

fn different(timeline: TimelineId, page: Lsn, start: Lsn, ours: &[u8], theirs: &[u8]) -> Verdict {
    let index = usize::try_from(page.bytes_since(start) / PAGE_BYTES).unwrap_or(0) * DIGEST_BYTES;
    let show = |digests: &[u8]| {
        let bytes = digests.get(index..index + DIGEST_BYTES).unwrap_or_default();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let (ours, theirs) = (show(ours), show(theirs));
    let detail = format!(
        "the WAL page at {page} of timeline {timeline:?} is held with digest {ours}, and PostgreSQL's has {theirs}"
    );
    Verdict::Diverged { at: page, detail }
}

/// The walker over stored records, across all segments that were read without a hole.
struct Held {
    size: SegmentSize,
    major: u32,
    walker: Option<RecordWalker>,
    proven: bool,
}

impl Held {
    fn new(size: SegmentSize, major: u32, start: Lsn) -> Self {
        let walker = Some(RecordWalker::new(size, major, start));
        Self { size, major, walker, proven: false }
    }

    fn walker_at(&mut self, at: Lsn) -> RecordWalker {
        let walker = self.walker.take().filter(|walker| walker.position() == at);
        walker.unwrap_or_else(|| RecordWalker::new(self.size, self.major, at))
    }
}

/// A part of a segment; the segment is read from its beginning.
struct Part {
    /// Bytes still to skip before the part.
    skip: u64,
    /// Bytes of the part still to read.
    left: u64,
    digests: PageDigests,
    walker: RecordWalker,
    /// Collects the differing pages, when they are to be explained.
    kept: Option<edited::Kept>,
}

impl Part {
    fn new(
        segment: SegmentName,
        size: SegmentSize,
        range: std::ops::Range<Lsn>,
        walker: RecordWalker,
    ) -> Self {
        let start = segment.start_lsn(size).unwrap_or(range.start);
        let (skip, left) = (range.start.bytes_since(start), range.end.bytes_since(range.start));
        Self { skip, left, digests: PageDigests::new(range.start), walker, kept: None }
    }

    fn push(&mut self, piece: &[u8]) {
        let skip = usize::try_from(self.skip).map_or(piece.len(), |skip| skip.min(piece.len()));
        self.skip -= skip as u64;
        let piece = &piece[skip..];
        let take = usize::try_from(self.left).map_or(piece.len(), |left| left.min(piece.len()));
        self.left -= take as u64;
        let piece = &piece[..take];
        if let Some(kept) = &mut self.kept {
            kept.push(self.digests.position(), piece);
            self.walker.push(piece, &mut |found| kept.see(&found));
        } else {
            self.walker.push(piece, &mut |_| {});
        }
        self.digests.push(piece);
    }
}

/// Where the messages of a comparison come from.
pub trait Inbound: Send {
    /// The next message; `None` at the end.
    fn next(&mut self) -> impl Future<Output = Result<Option<v1::CompareRequest>, Status>> + Send;
}

struct Inbox<I> {
    inbound: I,
    digests: Vec<u8>,
    head: Vec<u8>,
    ended: bool,
}

/// What a comparison needs next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// Digests, or already the WAL after them.
    Digests,
    /// Only the WAL after the digests.
    Head,
}

impl<I: Inbound> Inbox<I> {
    async fn digests(&mut self, pages: u64) -> Result<Vec<u8>, Status> {
        let bytes = usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(DIGEST_BYTES);
        while self.digests.len() < bytes {
            if !self.more(Awaited::Digests).await? {
                let found = self.digests.len() / DIGEST_BYTES;
                let detail = format!("compare WAL: expected {pages} more digests, found {found}");
                return Err(Code::Invalid.status(detail));
            }
        }
        let rest = self.digests.split_off(bytes);
        Ok(std::mem::replace(&mut self.digests, rest))
    }

    /// Shows `seen` the digests from `at` on that it still wants, of WAL that was found to differ. What does not come
    /// shows nothing.
    async fn show(&mut self, begin: &CompareBegin, mut at: Lsn, seen: &mut Seen) {
        while at < begin.end && at < seen.wanted() {
            let end = next_segment(at, begin.system.segment_size).min(begin.end);
            let Ok(theirs) = self.digests(overlap::pages(at, end)).await else { return };
            seen.pass(at, &theirs);
            at = end;
        }
    }

    async fn head(&mut self) -> Result<Vec<u8>, Status> {
        while self.more(Awaited::Head).await? {}
        Ok(std::mem::take(&mut self.head))
    }

    /// Takes one more message. What is not awaited is refused, so that at most the digests of one segment and one
    /// message are held (P8, P13).
    async fn more(&mut self, awaited: Awaited) -> Result<bool, Status> {
        if self.ended {
            return Ok(false);
        }
        let add = |into: &mut Vec<u8>, data: Bytes| {
            into.extend_from_slice(&data);
            Ok(true)
        };
        match self.inbound.next().await?.map(|message| message.kind) {
            None => {
                self.ended = true;
                Ok(false)
            }
            Some(Some(Kind::Digests(data)))
                if awaited == Awaited::Digests && data.len() % DIGEST_BYTES == 0 =>
            {
                add(&mut self.digests, data)
            }
            Some(Some(Kind::Head(data))) if self.head.len() + data.len() <= HEAD_BYTES_MAX => {
                add(&mut self.head, data)
            }
            Some(_) => {
                Err(Code::Invalid
                    .status("compare WAL: expected digests, then at most 64 KiB of WAL"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::stranger,
        consumer::tests::{base_store, pinned, s3, tier2},
        queue::tests::TestQueue,
    };
    use std::fs;

    /// Regression test: after a decision only one generation is open, and a backup of the old machine that nobody had
    /// compared was committed into it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_backup_without_a_comparison_needs_one_history_alone_also_among_closed_ones() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let queue = TestQueue::start(directory.path()).await;
        let base = base_store(root.path(), &queue, None);
        let comparer = Comparer::new(base.clone());
        let main: ClusterName = "main".parse().unwrap();
        base.wal().pin(&main, pinned(7)).unwrap();
        assert!(comparer.may_be_unproven(&main, "7").await.is_ok());
        // Another system identifier after pg_upgrade.
        base.begin_generation(&main, stranger("upgraded", 8), true).await.unwrap();
        base.change_generations(&main, |all| all.follow(2, "ops", 1.0)).await.unwrap();
        assert!(comparer.may_be_unproven(&main, "8").await.is_ok());
        base.begin_generation(&main, stranger("set back", 8), true).await.unwrap();
        base.change_generations(&main, |all| all.follow(3, "ops", 2.0)).await.unwrap();
        let refused = comparer.may_be_unproven(&main, "8").await.unwrap_err();
        assert_eq!(Code::of(&refused), Code::Invalid, "{refused}");
        assert!(refused.message().contains("any of 2 generations"), "{refused}");
        queue.stop().await;
    }

    /// A client that has digests of one segment, which are those of nothing.
    struct OneSegment(bool);

    impl Inbound for OneSegment {
        async fn next(&mut self) -> Result<Option<v1::CompareRequest>, Status> {
            let all = vec![0; DIGEST_BYTES * ((1 << 20) / PAGE_BYTES as usize)];
            let kind = Some(Kind::Digests(all.into()));
            Ok(std::mem::take(&mut self.0).then_some(v1::CompareRequest { kind }))
        }
    }

    /// P8, P13, regression test: digests that nothing asked for were kept without a limit.
    #[tokio::test]
    async fn digests_of_more_wal_than_is_compared_are_refused() {
        let inbox = |asked| Inbox {
            inbound: OneSegment(asked),
            digests: Vec::new(),
            head: Vec::new(),
            ended: false,
        };
        let refused = inbox(true).head().await.unwrap_err();
        assert_eq!(Code::of(&refused), Code::Invalid, "{refused}");
        assert!(inbox(false).head().await.unwrap().is_empty());
    }

    /// P11, regression test: after a lost tier 1 nothing showed that the timeline's number was taken before.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_history_that_only_the_bucket_has_is_compared() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let base = base_store(root.path(), &queue, Some(tier2(&s3)));
        let main: ClusterName = "main".parse().unwrap();
        let far = s3.object(&WalFile::History(TimelineId::new(2).unwrap()).key(&main));
        fs::create_dir_all(far.parent().unwrap()).unwrap();
        fs::write(far, "1\t0/100000\tx\n").unwrap();
        base.wal().pin(&main, pinned(7)).unwrap();
        let comparer = Comparer::new(base);
        let compare = async |history: &'static str| {
            let begin = v1::CompareBegin {
                cluster: main.to_string(),
                system_identifier: 7,
                segment_size: 1 << 20,
                postgres_version: 170_000,
                writer_id: "w".into(),
                timeline: 2,
                history: history.into(),
                start_lsn: 1 << 20,
                end_lsn: 2 << 20,
                next_lsn: 2 << 20,
                held_lsn: 2 << 20,
                ..v1::CompareBegin::default()
            };
            let begin = CompareBegin::try_from(begin).unwrap();
            comparer.compare(&main, begin, OneSegment(true)).await.unwrap()
        };
        let other = compare("1\t0/180000\tx\n").await;
        assert!(matches!(other, Verdict::Diverged { .. }), "{other:?}");
        assert_eq!(compare("1\t0/100000\tx\n").await, Verdict::Same { proven: false });
        // An open generation goes on without the bucket (P4).
        s3.on_request(|_| Some(s3::Fault::Status(503, "SlowDown")));
        assert_eq!(compare("1\t0/100000\tx\n").await, Verdict::Same { proven: false });
        queue.stop().await;
    }

    /// P11: without the bucket's answer a closed history would be received as a new one; an open one goes on without it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_comparison_with_a_closed_history_waits_for_the_bucket() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (queue, s3) = (TestQueue::start(directory.path()).await, s3::S3::start().await);
        let base = base_store(root.path(), &queue, Some(tier2(&s3)));
        let main: ClusterName = "main".parse().unwrap();
        for place in [main.clone(), main.with_generation(2)] {
            base.wal().pin(&place, pinned(7)).unwrap();
        }
        base.begin_generation(&main, stranger("a clone", 7), true).await.unwrap();
        base.change_generations(&main, |all| all.retire(2, "ops", 1.0)).await.unwrap();
        let comparer = Comparer::new(base);
        s3.on_request(|_| Some(s3::Fault::Status(503, "SlowDown")));
        let compare = async |place: ClusterName| {
            let begin = v1::CompareBegin {
                cluster: place.to_string(),
                system_identifier: 7,
                segment_size: 1 << 20,
                postgres_version: 170_000,
                writer_id: "w".into(),
                timeline: 1,
                start_lsn: 1 << 20,
                end_lsn: 2 << 20,
                next_lsn: 2 << 20,
                held_lsn: 2 << 20,
                ..v1::CompareBegin::default()
            };
            let begin = CompareBegin::try_from(begin).unwrap();
            comparer.compare(&place, begin, OneSegment(true)).await
        };
        assert_eq!(compare(main.clone()).await.unwrap(), Verdict::Same { proven: false });
        let refused = compare(main.with_generation(2)).await.unwrap_err();
        assert_eq!(Code::of(&refused), Code::Unavailable, "{refused}");
        assert!(refused.message().contains("generation 2, which is retired"), "{refused}");
        // What the bucket does not have, nothing waits for.
        s3.heal();
        let absent = compare(main.with_generation(2)).await.unwrap();
        assert_eq!(absent, Verdict::Same { proven: false });
        // Nor for WAL from before the history began, or that has expired: the bucket answered (P4).
        let later = "000000010000000000000009".parse::<WalFile>().unwrap();
        let later = s3.object(&later.key(&main.with_generation(2)));
        fs::create_dir_all(later.parent().unwrap()).unwrap();
        fs::write(later, zstd::encode_all(&vec![1; 1 << 20][..], 1).unwrap()).unwrap();
        let begins_behind = compare(main.with_generation(2)).await.unwrap();
        assert_eq!(begins_behind, Verdict::Same { proven: false });
        queue.stop().await;
    }
}
