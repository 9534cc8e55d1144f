//! What exists: facts derived from both tiers, kept so that they survive a restart.
//!
//! Pure where it decides; what it writes is a cache that both tiers can rebuild (P4).

pub mod archive;
pub mod archive_file;

pub use archive::{Archive, Frontier, Totals};
