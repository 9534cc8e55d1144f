//! The sidecar beside PostgreSQL: replication client, streamer, base backups, restore, and the commands for people.
//!
//! `streamer` moves WAL and does only what its `plan` has decided; `cli` translates between command line and the other modules.

pub mod admin;
pub mod agent;
mod backoff;
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
mod schedule;
pub mod server_link;
pub mod streamer;
pub mod wal_source;
