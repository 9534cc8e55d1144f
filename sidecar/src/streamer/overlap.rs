//! Proves to the server that this PostgreSQL's WAL is the WAL that it holds, before streaming continues (P11).
//!
//! - The sidecar reads and digests WAL; the server compares and decides.
//! - WAL is read on the connection that the stream will use, and without the slot, so that the slot does not advance.
//! - Having nothing to compare is no failure: the server says so in its status and checks the first new record
//!   instead.

use super::{
    ends::Stream,
    plan::Overlap,
    source::{Identity, Primary, Session},
};
use crate::{
    error::{Error, Failure},
    server_link::Traced,
};
use bytes::Bytes;
use klio_pg::Lsn;
use klio_proto::v1::{self, compare_request::Kind, wal_client::WalClient};
use klio_storage::wal::overlap::PageDigests;

/// Bytes of digests in one message.
const DIGESTS_BYTES: usize = 64 << 10;
/// How much new WAL is sent when nothing can be compared: more than a page, so that it contains the beginning of a
/// record.
const HEAD_BYTES: u64 = 64 << 10;

/// What a comparison needs besides the overlap.
pub(super) struct Side<'a> {
    /// The cluster's name with the generation, in the form sent to the server.
    pub place: &'a str,
    pub identity: Identity,
    /// PostgreSQL's history file of the compared timeline.
    pub history: Option<Bytes>,
    /// Where the stream continues, if it does so on this timeline.
    pub next: Option<Lsn>,
    pub server: &'a mut WalClient<Traced>,
}

pub(super) enum Compared {
    /// The same, with a whole record in the compared WAL.
    Proven,
    /// No difference was found, but it is not proven.
    Same,
    /// Where and how the histories diverge.
    Diverged(String),
}

/// The result of reading WAL from PostgreSQL.
enum Read<S> {
    All(S, Vec<u8>),
    /// PostgreSQL has removed the beginning.
    Removed,
}

impl<P: Primary> Stream<'_, P> {
    /// Compares from each possible start in turn until the history is proven. Returns the connection, or a new one to
    /// the same PostgreSQL.
    pub async fn compare(
        &self,
        mut postgres: P::Session,
        overlap: &Overlap,
        side: &mut Side<'_>,
    ) -> Result<(P::Session, Compared), Error> {
        for start in &overlap.starts {
            match read_digests(postgres, overlap, *start).await? {
                Read::Removed => postgres = self.again(side.identity).await?,
                Read::All(back, digests) => {
                    postgres = back;
                    match self.ask(overlap, *start, digests, Bytes::new(), side).await? {
                        Answer::Proven | Answer::OldServer => {
                            return Ok((postgres, Compared::Proven));
                        }
                        Answer::Same => {}
                        Answer::Diverged(detail) => {
                            return Ok((postgres, Compared::Diverged(detail)));
                        }
                    }
                }
            }
        }
        let (postgres, head) = self.head(postgres, overlap, side).await?;
        let compared = match self.ask(overlap, overlap.end, Vec::new(), head, side).await? {
            Answer::Diverged(detail) => Compared::Diverged(detail),
            _ => Compared::Same,
        };
        Ok((postgres, compared))
    }

    /// The first bytes of new WAL; empty when PostgreSQL has none yet or has removed them.
    async fn head(
        &self,
        postgres: P::Session,
        overlap: &Overlap,
        side: &Side<'_>,
    ) -> Result<(P::Session, Bytes), Error> {
        let Some(start) = side.next.filter(|next| *next < side.identity.end) else {
            return Ok((postgres, Bytes::new()));
        };
        let end = side.identity.end.min(start.advance(HEAD_BYTES));
        let mut head = Vec::new();
        let mut take = |piece: &[u8]| head.extend_from_slice(piece);
        let read = postgres.read(overlap.timeline, start, end, &mut take).await;
        match read {
            Ok(back) => Ok((back, Bytes::from(head))),
            Err(error) if error.failure == Failure::WalRemoved => {
                Ok((self.again(side.identity).await?, Bytes::new()))
            }
            Err(error) => Err(error),
        }
    }

    /// Connects again: PostgreSQL closes a connection that asked for removed WAL.
    pub async fn again(&self, before: Identity) -> Result<P::Session, Error> {
        let mut postgres = self.primary.connect().await?;
        let now = postgres.identify().await?;
        let same = |i: Identity| (i.system_identifier, i.timeline, i.in_recovery);
        if same(now) != same(before) {
            let message = "compare WAL: expected the same PostgreSQL, timeline and role as before, found others";
            return Err(Error::new(Failure::Postgres, message));
        }
        Ok(postgres)
    }

    async fn ask(
        &self,
        overlap: &Overlap,
        start: Lsn,
        digests: Vec<u8>,
        head: Bytes,
        side: &mut Side<'_>,
    ) -> Result<Answer, Error> {
        let says = overlap.is_current && !side.identity.in_recovery;
        let begin = v1::CompareBegin {
            cluster: side.place.to_owned(),
            system_identifier: side.identity.system_identifier,
            segment_size: side.identity.segment_size.as_u32(),
            postgres_version: side.identity.version,
            writer_id: self.writer_id.to_owned(),
            timeline: overlap.timeline.get(),
            history: side.history.clone().unwrap_or_default(),
            start_lsn: start.as_u64(),
            end_lsn: overlap.end.as_u64(),
            next_lsn: side.next.unwrap_or(overlap.end).as_u64(),
            held_lsn: overlap.held.as_u64(),
            postgres_end_lsn: if says { side.identity.end.as_u64() } else { 0 },
        };
        let digests = Bytes::from(digests);
        let pieces = (0..digests.len()).step_by(DIGESTS_BYTES);
        let pieces: Vec<Bytes> =
            pieces.map(|at| digests.slice(at..digests.len().min(at + DIGESTS_BYTES))).collect();
        let head = (!head.is_empty()).then_some(Kind::Head(head));
        let messages = std::iter::once(Kind::Begin(begin))
            .chain(pieces.into_iter().map(Kind::Digests))
            .chain(head)
            .map(|kind| v1::CompareRequest { kind: Some(kind) });
        match side.server.compare(tokio_stream::iter(messages)).await {
            Ok(answer) => Ok(read_answer(answer.into_inner())),
            // A server of an earlier version has no such call; its own checks still apply.
            Err(status) if status.code() == tonic::Code::Unimplemented => Ok(Answer::OldServer),
            Err(status) => Err(Error::from_status("compare WAL with the server's", &status)),
        }
    }
}

enum Answer {
    Proven,
    Same,
    OldServer,
    Diverged(String),
}

fn read_answer(answer: v1::CompareResponse) -> Answer {
    match answer.verdict() {
        v1::CompareVerdict::Diverged => Answer::Diverged(answer.detail),
        _ if answer.proven => Answer::Proven,
        _ => Answer::Same,
    }
}

async fn read_digests<S: Session>(
    postgres: S,
    overlap: &Overlap,
    start: Lsn,
) -> Result<Read<S>, Error> {
    let mut digests = PageDigests::new(start);
    let mut take = |piece: &[u8]| digests.push(piece);
    let read = postgres.read(overlap.timeline, start, overlap.end, &mut take).await;
    match read {
        Ok(back) if digests.position() == overlap.end => Ok(Read::All(back, digests.finish())),
        // The timeline ended earlier, or PostgreSQL stopped.
        Ok(_) => {
            let found = digests.position();
            let message = format!("compare WAL: expected it up to {}, found {found}", overlap.end);
            Err(Error::new(Failure::Postgres, message))
        }
        Err(error) if error.failure == Failure::WalRemoved => Ok(Read::Removed),
        Err(error) => Err(error),
    }
}
