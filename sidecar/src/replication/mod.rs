//! A client of PostgreSQL's physical replication protocol.
//!
//! [`Client::connect`] logs in, its methods run commands, [`Client::start`] turns it into a
//! [`WalStream`], and the end of that gives the client back.
//! Owns one socket; no task, no queue: backpressure is the caller not reading.
//! Does not retry, reconnect or follow timelines; `streamer` does, by [`ErrorKind`] and [`StreamEnd`].
//! Two promises to `streamer`: WAL comes without gap or overlap, and PostgreSQL hears of no
//! position that the caller did not give (P1).

mod auth;
mod commands;
mod connect;
mod error;
mod rows;
mod slot;
mod stream;
mod tls;
mod transport;
mod verify;
mod wire;

pub use commands::{Client, ServerVersion, SystemIdentity};
pub use error::{Error, ErrorKind, ServerError};
pub use rows::Row;
pub use slot::{CreatedSlot, SlotName, SlotNameError, SlotState};
pub use stream::{Event, Finished, StreamEnd, WalStream};
