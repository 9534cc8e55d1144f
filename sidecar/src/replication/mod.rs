//! A client of PostgreSQL's physical replication protocol.
//!
//! [`Client::connect`] logs in, the client's methods run commands, [`Client::start`] turns the client into a
//! [`WalStream`], and [`WalStream::finish`] returns the client. Each connection owns one socket, without a task or a
//! queue: a caller that does not read slows PostgreSQL down. Nothing is retried, no connection is made again and no
//! timeline is followed; `streamer` does that, based on [`ErrorKind`] and [`StreamEnd`]. `streamer` relies on two
//! guarantees: WAL is delivered without holes or overlaps, and PostgreSQL is told only positions that the caller
//! passed (P1).

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
