//! The sidecar beside PostgreSQL: replication client, streamer, and the commands a person types.
//!
//! `streamer` moves WAL and decides nothing that `plan` has not decided; `cli` translates.

pub mod admin;
pub mod agent;
pub mod backup;
pub mod bucket;
pub mod cli;
pub mod config;
pub mod conninfo;
pub mod error;
#[cfg(test)]
mod fake_server;
pub mod replication;
pub mod restore;
pub mod server_link;
pub mod streamer;
pub mod wal_source;
