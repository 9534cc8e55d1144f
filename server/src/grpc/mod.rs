//! The gRPC services: translate, call, translate back. No decisions here.

pub mod auth;
mod base;
mod catalog;
pub mod counted;
mod fetch;
mod generations;
pub mod roles;
mod timelines;
pub mod trace;
mod wal;

pub use base::BaseService;
pub use catalog::CatalogService;
pub use generations::Histories;
pub use wal::WalService;
