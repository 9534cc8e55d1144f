//! What Klio keeps and how it lies on disk and in the bucket.
//!
//! Layout of both tiers, codec, tier-1 WAL store, tier-2 store and catalogue. Knows no gRPC, no queue
//! and no exporter: callers pass bytes in and get facts and errors out.

pub mod catalog;
pub mod crypt;
pub mod disk;
pub mod error;
pub mod generations;
pub mod layout;
pub mod record;
pub mod repository;
pub mod testing;
pub mod tier2;
pub mod wal;

pub use error::{Error, Kind, Op};
