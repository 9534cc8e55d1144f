//! Makes sure that the replication slot exists and retains WAL.
//!
//! The slot is created with RESERVE_WAL, so that it retains WAL before the first byte is streamed. A slot that
//! retains nothing (because it was invalidated, or created without RESERVE_WAL) is dropped and created again, which
//! loses nothing: a physical slot has no other state. START_REPLICATION then shows which WAL was lost meanwhile, and
//! that is declared as a gap.

use crate::{
    error::{Error, Failure},
    replication::{self, Client, ErrorKind, SlotName},
};
use klio_pg::Lsn;
use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};

/// The slot's name and what is known about the slot.
#[derive(Debug, Clone)]
pub(super) struct SlotKeeper {
    name: SlotName,
    create: bool,
    /// PostgreSQL refused START_REPLICATION because the slot is invalidated, although the slot still has a restart
    /// position.
    invalid: Arc<AtomicBool>,
    /// The restart position at creation, if this process created the slot. While the slot is still there, the
    /// position proves nothing about acknowledged WAL.
    created_at: Arc<AtomicU64>,
}

/// SQLSTATE object_not_in_prerequisite_state: PostgreSQL's answer for an invalidated slot.
const INVALIDATED: &str = "55000";

impl SlotKeeper {
    pub fn new(name: SlotName, create: bool) -> Self {
        Self { name, create, invalid: Arc::default(), created_at: Arc::default() }
    }

    pub const fn name(&self) -> &SlotName {
        &self.name
    }

    /// Whether `error` says that the slot is invalidated. If so, [`SlotKeeper::ensure`] will create it again.
    pub fn is_invalidated(&self, error: &replication::Error) -> bool {
        let is = error.server().is_some_and(|s| s.sqlstate == INVALIDATED);
        if is {
            self.invalid.store(true, Relaxed);
        }
        is
    }

    /// The position up to which PostgreSQL was told that WAL is flushed, derived from the slot's restart position.
    /// `None` when the slot was just created and therefore says nothing about it.
    pub fn acknowledged(&self, restart: Option<Lsn>) -> Option<Lsn> {
        restart.filter(|lsn| lsn.as_u64() != self.created_at.load(Relaxed))
    }

    /// Makes sure that the slot retains WAL, and returns the oldest position that it retains.
    pub async fn ensure(&self, client: &mut Client) -> Result<Option<Lsn>, Error> {
        let name = &self.name;
        match client.read_slot(name).await? {
            Some(state) if state.restart_lsn.is_some() && !self.invalid.load(Relaxed) => {
                return Ok(state.restart_lsn);
            }
            None if !self.create => {
                let message = format!("read slot {name}: expected it to exist, found none");
                return Err(Error::new(Failure::Postgres, message)
                    .hint("set postgres.create_slot, or create it with RESERVE_WAL"));
            }
            // `create_slot` is off, so the slot is not dropped. PostgreSQL reserves WAL for it when streaming begins.
            Some(state) if !self.create => return Ok(state.restart_lsn),
            Some(_) => {
                tracing::warn!(slot = %name, "the replication slot retains no WAL (invalidated?); creating it again");
                match client.drop_slot(name).await {
                    Ok(()) => {}
                    Err(e) if e.kind() == ErrorKind::SlotMissing => {}
                    Err(e) => return Err(e.into()),
                }
            }
            None => {}
        }
        let created = client.create_slot(name).await?;
        self.invalid.store(false, Relaxed);
        self.created_at.store(created.restart_lsn.as_u64(), Relaxed);
        tracing::info!(slot = %name, restart_lsn = %created.restart_lsn, "replication slot created");
        Ok(Some(created.restart_lsn))
    }
}
