//! The gRPC services: translate, call, translate back. No decisions here.

pub mod auth;
mod catalog;
mod fetch;
mod wal;

pub use catalog::CatalogService;
pub use wal::WalService;
