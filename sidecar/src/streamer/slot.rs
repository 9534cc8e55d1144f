//! Keeps the replication slot there and keeping WAL.
//!
//! Created with RESERVE_WAL, so that it keeps WAL before the first byte is streamed. A slot that keeps
//! nothing (invalidated, or created without reserving) is created anew: a physical slot holds no
//! other state. What was lost meanwhile is found by START_REPLICATION and declared as a gap.

use super::source::sort;
use crate::{
    error::{Error, Failure},
    replication::{self, Client, ErrorKind, SlotName},
};
use klio_pg::Lsn;
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// The slot's name and what we learnt about it.
#[derive(Debug, Clone)]
pub(super) struct SlotKeeper {
    name: SlotName,
    create: bool,
    /// PostgreSQL said at START_REPLICATION that the slot is invalid, though it names a position.
    invalid: Arc<AtomicBool>,
    /// Where it began when it was created here: as long as it is there, it says of nothing that it was acknowledged.
    created_at: Arc<AtomicU64>,
}

/// object_not_in_prerequisite_state: what PostgreSQL answers for an invalidated slot.
const INVALIDATED: &str = "55000";

impl SlotKeeper {
    pub fn new(name: SlotName, create: bool) -> Self {
        Self { name, create, invalid: Arc::default(), created_at: Arc::default() }
    }

    pub const fn name(&self) -> &SlotName {
        &self.name
    }

    /// Whether `error` says that the slot is of no more use; remembered for [`SlotKeeper::ensure`].
    pub fn is_invalidated(&self, error: &replication::Error) -> bool {
        let is = error.server().is_some_and(|s| s.sqlstate == INVALIDATED);
        if is {
            self.invalid.store(true, Relaxed);
        }
        is
    }

    /// Up to where PostgreSQL was told that WAL is flushed, as a slot that is at `restart` says; `None` where it says nothing.
    pub fn acknowledged(&self, restart: Option<Lsn>) -> Option<Lsn> {
        restart.filter(|lsn| lsn.as_u64() != self.created_at.load(Relaxed))
    }

    /// The oldest WAL that the slot keeps.
    pub async fn ensure(&self, client: &mut Client) -> Result<Option<Lsn>, Error> {
        let name = &self.name;
        match client.read_slot(name).await.map_err(|e| sort(&e))? {
            Some(state) if state.restart_lsn.is_some() && !self.invalid.load(Relaxed) => {
                return Ok(state.restart_lsn);
            }
            None if !self.create => {
                let message = format!("read slot {name}: expected it to exist, found none");
                return Err(Error::new(Failure::Postgres, message)
                    .hint("set postgres.create_slot, or create it with RESERVE_WAL"));
            }
            // Not ours to recreate; PostgreSQL begins to keep WAL when streaming begins.
            Some(state) if !self.create => return Ok(state.restart_lsn),
            Some(_) => {
                tracing::warn!(slot = %name, "the slot keeps no WAL (invalidated?); creating it anew");
                match client.drop_slot(name).await {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::SlotMissing => {}
                    Err(e) => return Err(sort(&e)),
                }
            }
            None => {}
        }
        let created = client.create_slot(name).await.map_err(|e| sort(&e))?;
        self.invalid.store(false, Relaxed);
        self.created_at.store(created.restart_lsn.as_u64(), Relaxed);
        tracing::info!(slot = %name, restart_lsn = %created.restart_lsn, "replication slot created");
        Ok(Some(created.restart_lsn))
    }
}
