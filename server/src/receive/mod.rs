//! Receives one cluster's WAL: messages in, durable bytes down, acknowledgements out.
//!
//! - An `Ack.flushed_lsn` is made from a `FlushedLsn` and from nothing else (P1).
//! - One batch is on its way to the disk at a time; what arrives meanwhile becomes the next batch, so
//!   one fsync covers all of it (group commit) and no timer delays anything.
//! - Memory is bounded in bytes: a client that exceeds the window it was given is refused.
//! - Any end of a session (error, fence, shutdown, expired certificate) leaves the store as durable
//!   as its last acknowledgement, and the place free.

pub(crate) mod as_of;
mod batch;
mod compare;
mod conflict;
pub(crate) mod open;
mod proof;
pub(crate) mod refill;
mod registry;
mod session;
mod slot;
mod trace;

pub use compare::{Comparer, Inbound, Verdict};
pub use refill::Pieces;
pub use registry::{Claim, Claimed, ClusterState, Place, Progress, Registry};
pub use session::{Receiver, ReceiverOptions};
