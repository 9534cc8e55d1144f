//! klio-server: receives WAL over gRPC, makes it durable on tier 1, and uploads it to tier 2.
//!
//! Connects `storage`, `proto` and `telemetry`; does not depend on the sidecar.

pub mod access;
pub mod admin;
pub mod app;
pub mod base;
pub mod cli;
pub mod clock;
pub mod config;
pub mod consumer;
pub mod encryption;
pub mod errors;
pub mod fetch;
pub mod grpc;
pub mod maintenance;
pub mod metrics;
pub mod private;
pub mod queue;
pub mod quota;
pub mod readers;
pub mod receive;
pub mod registry;
mod rot;
pub mod seal;
pub mod status;
