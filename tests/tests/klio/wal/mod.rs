//! WAL: streaming, timelines, generations, holes, rot, the wire and wal-fetch.

mod history;
mod holes;
mod lost_server;
mod rot;
mod stream;
mod timeline;
mod two_writers;
mod wal_agent;
mod wal_record;
mod wire;
