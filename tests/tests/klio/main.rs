//! The end-to-end tests: one program, with a directory for each room of Klio.
//!
//! They start the real programs, PostgreSQL, nats-server and an S3 endpoint, and mostly wait for them, so more of them run at a time
//! than there are cores (`RUST_TEST_THREADS` in the Makefile). A test must therefore not depend on how fast it runs, nor on being alone.

#![allow(
    clippy::unwrap_used,
    reason = "a test program; clippy's own exception covers test functions only"
)]

mod access;
mod backup;
mod docs;
mod faults;
mod house;
mod maintenance;
mod restore;
mod telemetry;
mod wal;
