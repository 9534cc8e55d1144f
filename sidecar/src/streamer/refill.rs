//! Sends the server segments again that it had received and then lost: damaged segments in the middle of what it
//! holds (P2).
//!
//! - Runs beside the stream, over its own connection and without the slot. The stream never waits for it, and the
//!   positions that were reported to PostgreSQL do not change.
//! - Sends the newest segment first, because PostgreSQL removes the oldest first. A segment that PostgreSQL has
//!   removed is not requested again in this session.
//! - A failure is only a warning; the next round tries again.

use super::{
    choice::{Candidate, Tier2},
    ends::Stream,
    plan::{Facts, Wanted},
    source::{Identity, Primary, Session},
};
use crate::{
    error::{Error, Failure},
    server_link::Traced,
};
use bytes::Bytes;
use klio_pg::Lsn;
use klio_proto::v1::{self, refill_request::Kind, wal_client::WalClient};
use std::{convert::Infallible, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Interval between rounds, and so the delay for damage that is found while the stream runs.
const EVERY: Duration = Duration::from_secs(600);
/// How much WAL is read from PostgreSQL and held in memory at a time.
const READ_BYTES: u64 = 4 << 20;
/// WAL bytes in one message.
const MESSAGE_BYTES: usize = 1 << 20;

/// What refilling needs from the session.
pub(super) struct Refilling {
    pub server: WalClient<Traced>,
    /// The cluster's name with the generation, in the form sent to the server.
    pub place: String,
    pub identity: Identity,
    pub number: Option<u32>,
    pub facts: Facts,
}

impl<P: Primary> Stream<'_, P> {
    /// Sends damaged segments again, now and periodically.
    pub async fn refill(&self, mut with: Refilling) -> Infallible {
        let mut held = with.facts.held.clone();
        let mut removed = None;
        loop {
            for wanted in with.facts.wanted(&held) {
                if removed.is_some_and(|removed| wanted.start <= removed) {
                    continue;
                }
                let (timeline, start) = (wanted.timeline.get(), wanted.start);
                match self.refill_one(&with, wanted).await {
                    Ok(()) => {
                        tracing::info!(timeline, %start, "sent a segment again that the server had lost");
                    }
                    Err(error) => {
                        if error.failure == Failure::WalRemoved {
                            removed = removed.max(Some(wanted.start));
                        }
                        tracing::warn!(timeline, %start, %error, "cannot send a segment again that the server lost; hint: if this continues, take a base backup now");
                    }
                }
            }
            tokio::time::sleep(EVERY).await;
            let asked =
                self.candidates(&mut with.server, with.identity, Tier2::IfTier1IsEmpty).await;
            let own = |found: &Candidate| found.number == with.number;
            match asked.map(|all| all.into_iter().find(own)) {
                Ok(Some(found)) => held = found.held,
                Ok(None) => held.clear(),
                Err(error) => {
                    tracing::debug!(%error, "cannot ask the server which segments it lost")
                }
            }
        }
    }

    async fn refill_one(&self, with: &Refilling, wanted: Wanted) -> Result<(), Error> {
        let begin = v1::RefillBegin {
            cluster: with.place.clone(),
            system_identifier: with.identity.system_identifier,
            segment_size: with.identity.segment_size.as_u32(),
            postgres_version: with.identity.version,
            writer_id: self.writer_id.to_owned(),
            timeline: wanted.timeline.get(),
            start_lsn: wanted.start.as_u64(),
        };
        let (pieces, queue) = mpsc::channel(1);
        let message = |kind| v1::RefillRequest { kind: Some(kind) };
        // The channel is new and empty, so this cannot fail.
        let _ = pieces.try_send(message(Kind::Begin(begin)));
        let (identity, mut server) = (with.identity, with.server.clone());
        let feeding = async move {
            let mut postgres = self.primary.connect().await?;
            let found = postgres.identify().await?;
            if found.system_identifier != identity.system_identifier {
                let message = "read WAL: expected the same PostgreSQL as before, found another";
                return Err(Error::new(Failure::Postgres, message));
            }
            let mut at = wanted.start;
            while at < wanted.end {
                let end = wanted.end.min(at.advance(READ_BYTES));
                let read;
                (postgres, read) = read_piece(postgres, wanted, at, end).await?;
                for from in (0..read.len()).step_by(MESSAGE_BYTES) {
                    let piece = read.slice(from..read.len().min(from + MESSAGE_BYTES));
                    // The server has ended the call; its answer says why.
                    if pieces.send(message(Kind::Data(piece))).await.is_err() {
                        return Ok(());
                    }
                }
                at = end;
            }
            Ok(())
        };
        let taking = server.refill(ReceiverStream::new(queue));
        let (fed, taken) = tokio::join!(feeding, taking);
        fed?;
        let failed = |status| Error::from_status("send segment again", &status);
        taken.map(drop).map_err(failed)
    }
}

async fn read_piece<S: Session>(
    postgres: S,
    wanted: Wanted,
    start: Lsn,
    end: Lsn,
) -> Result<(S, Bytes), Error> {
    let mut read = Vec::new();
    let mut take = |piece: &[u8]| read.extend_from_slice(piece);
    let postgres = postgres.read(wanted.timeline, start, end, &mut take).await?;
    if read.len() as u64 == end.bytes_since(start) {
        return Ok((postgres, Bytes::from(read)));
    }
    let found = start.advance(read.len() as u64);
    let message = format!("read WAL: expected it up to {end}, found {found}");
    Err(Error::new(Failure::Postgres, message))
}
