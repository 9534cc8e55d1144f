//! What the parts of one stream share: both of its ends, what is remembered between sessions, and the history files that
//! PostgreSQL gave.

use super::{Options, metrics::Metrics, source::Session};
use crate::{
    error::{Error, Failure},
    server_link::ServerLink,
};
use bytes::Bytes;
use klio_pg::{Lsn, TimelineHistory, TimelineId};
use std::collections::BTreeMap;

/// Both ends of a stream. What it does is in `session`, `choice`, `overlap` and `refill`.
pub(super) struct Stream<'a, P> {
    pub primary: &'a P,
    pub link: &'a ServerLink,
    pub options: &'a Options,
    pub metrics: &'a Metrics,
    pub writer_id: &'a str,
}

/// What is remembered from one session to the next.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// PostgreSQL said that it no longer has the WAL at this position.
    pub removed: Option<(TimelineId, Lsn)>,
    /// The server refused the beginning of a generation of which it had said that it holds nothing: tier 2 has some.
    pub misplaced: bool,
    /// Generations whose server-side check of the first new record showed them to be another history.
    pub diverged: Vec<Option<u32>>,
    /// Flushed position acknowledged in any session; progress resets the backoff.
    pub flushed: Lsn,
}

/// History files that were read in this session.
#[derive(Default)]
pub(super) struct Histories(BTreeMap<TimelineId, Option<Bytes>>);

impl Histories {
    pub async fn get(
        &mut self,
        postgres: &mut impl Session,
        timeline: TimelineId,
    ) -> Result<Option<Bytes>, Error> {
        if let Some(known) = self.0.get(&timeline) {
            return Ok(known.clone());
        }
        let content = postgres.history(timeline).await?;
        self.0.insert(timeline, content.clone());
        Ok(content)
    }

    /// The path to `timeline`. A cluster that began on this timeline has no history file.
    pub async fn path(
        &mut self,
        postgres: &mut impl Session,
        timeline: TimelineId,
    ) -> Result<TimelineHistory, Error> {
        if timeline.get() == 1 {
            return Ok(TimelineHistory::root(timeline));
        }
        match self.get(postgres, timeline).await? {
            None => Ok(TimelineHistory::root(timeline)),
            Some(content) => TimelineHistory::parse(timeline, &content)
                .map_err(|error| Error::new(Failure::Postgres, error)),
        }
    }
}
