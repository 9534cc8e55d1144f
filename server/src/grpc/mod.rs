//! The gRPC services: they translate requests, call the rest of the server, and translate the answers back. They make
//! no decisions.

mod base;
mod catalog;
pub mod counted;
mod fetch;
mod generations;
mod timelines;
pub mod trace;
mod wal;

pub use base::BaseService;
pub use catalog::CatalogService;
pub use generations::Histories;
pub use wal::WalService;
