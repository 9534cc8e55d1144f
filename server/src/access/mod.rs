//! Who may connect, and who may call what (P8): certificates, TLS, roles.
//!
//! Nothing here knows what a call does. A connection or a call that is refused costs the server no more than a
//! handshake.

pub mod auth;
pub mod pki;
pub mod roles;
pub mod tls;

mod handshakes;
