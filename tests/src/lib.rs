//! The harness: real PostgreSQL, nats-server, S3 and Klio's own programs on free loopback ports, with faults to switch on.
//!
//! What must stay true: whatever a value here has started ends when the value is dropped, also when the test panics, and
//! (through [`guard`]) when the test program itself is killed. Tests run in parallel, so nothing here is global except ports.
//! The harness is test code: a thing that goes wrong panics with the log of the program that failed.

pub mod base_client;
pub mod bundle;
pub mod client;
pub mod crash;
pub mod damage;
pub mod disaster;
pub mod env;
pub mod guard;
pub mod http;
pub mod mount;
pub mod nats;
pub mod otlp;
pub mod pki;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod programs;
pub mod prometheus;
pub mod promtool;
pub mod proof;
pub mod proxy;
pub mod readme;
pub mod s3;
pub mod scratch;
pub mod site;
pub mod strace;
pub mod timelines;
pub mod tls;
pub mod traced;
pub mod wait;
pub mod workload;

/// Makes ring the process's crypto provider; the first line of every test that uses TLS or an object store.
///
/// Calling it again changes nothing.
pub fn install_crypto() {
    // An error only says that a provider is installed already, by another test of the same program.
    let _ = rustls::crypto::ring::default_provider().install_default();
}
