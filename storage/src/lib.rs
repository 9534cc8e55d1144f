//! What Klio stores, and how it is stored on disk and in the bucket.
//!
//! The layout of both tiers, the codec, the tier-1 WAL store, the tier-2 store and the catalog. This
//! crate knows nothing of gRPC, the queue or exporters: callers pass bytes in and get facts and
//! errors back.

pub mod catalog;
pub mod crash;
pub mod crypt;
pub mod disk;
pub mod error;
pub mod generations;
pub mod layout;
pub mod record;
pub mod repository;
pub mod sum;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tier2;
pub mod timelines;
pub mod wal;

pub use error::{Error, Kind, Op};
