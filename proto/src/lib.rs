//! The klio.v1 gRPC contract.
//!
//! Generated messages live in [`v1`]; nothing outside this crate builds or reads a field that has a
//! validated twin. `code` is the one table of error codes for both ends.
//! Knows no disk and opens no connection.

pub mod base;
pub mod code;
pub mod wal;

pub use code::Code;

/// Every service of the contract, for metrics: a name that is not here makes no series.
pub const SERVICES: [&str; 4] =
    ["klio.v1.Wal", "klio.v1.Catalog", "klio.v1.Base", "grpc.health.v1.Health"];

/// The generated messages and services of `klio.v1`.
#[allow(missing_docs, clippy::all, clippy::disallowed_methods)]
pub mod v1 {
    tonic::include_proto!("klio.v1");
    /// The compiled descriptors, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/klio.v1.bin"));
}
