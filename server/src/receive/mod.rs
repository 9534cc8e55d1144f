//! Receives a cluster's WAL: reads messages, makes their bytes durable, and sends acknowledgements.
//!
//! - An `Ack.flushed_lsn` is made from a `FlushedLsn` only (P1).
//! - One batch at a time is being written. Whatever arrives meanwhile becomes the next batch, so one fsync covers all
//!   of it (group commit) and no timer delays anything.
//! - Memory is bounded in bytes: a client that exceeds its window is refused.
//! - However a session ends (error, fence, shutdown, expired certificate), the store is as durable as its last
//!   acknowledgement says, and the place is free again.

pub(crate) mod as_of;
mod batch;
mod compare;
mod conflict;
pub(crate) mod open;
mod proof;
pub(crate) mod refill;
mod session;
mod slot;
mod trace;

pub use compare::{Comparer, Inbound, Verdict};
pub use refill::Pieces;
pub use session::{OnDivergence, Receiver, ReceiverOptions};
