//! Framing: messages to and from a byte stream.
//!
//! Message bodies are slices of the read buffer, never copies. One read takes as much as has arrived, so that small
//! messages share a system call. Everything is cancel-safe: bytes that were read stay in `input`, bytes that were not
//! written yet stay in `output`. A server usually sends the reason before it closes the connection. So when a write
//! fails, everything that the server sent is read first, and the write error is reported only if no other error is
//! found. postgres-protocol's own `Message` does not support CopyBothResponse, so messages are dispatched by tag
//! here.

use super::{
    error::{Error, ErrorKind, ServerError},
    transport::Transport,
};
use bytes::{Bytes, BytesMut};
use postgres_protocol::message::backend::Header;
use std::{
    collections::BTreeMap,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio_util::io::poll_read_buf;

/// Size of a read buffer: four of PostgreSQL's largest WAL messages (128 KiB).
const READ_CHUNK_BYTES: usize = 512 * 1024;
/// With less room than this, a read is not worth its system call.
const READ_ROOM_BYTES: usize = 32 * 1024;
/// Far more than a walsender ever sends; a larger length is garbage.
const MESSAGE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// One message: its tag, and its body without the length.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub tag: u8,
    pub body: Bytes,
}

/// Both directions of a connection.
pub(super) struct Wire {
    transport: Transport,
    input: BytesMut,
    output: BytesMut,
    /// Whether TLS may still hold bytes that it has taken from `output`.
    unflushed: bool,
    /// The error of a failed write, after which nothing more is written.
    deaf: Option<Error>,
    parameters: BTreeMap<String, String>,
    /// The process number that the server sent at login.
    peer_pid: Option<u32>,
    /// How long the server may send nothing, or a write may block.
    patience: Duration,
}

impl Wire {
    pub(super) fn new(transport: Transport, patience: Duration) -> Wire {
        let (input, output) = (BytesMut::new(), BytesMut::new());
        Wire {
            transport,
            input,
            output,
            unflushed: false,
            deaf: None,
            parameters: BTreeMap::new(),
            peer_pid: None,
            patience,
        }
    }

    pub(super) const fn transport(&self) -> &Transport {
        &self.transport
    }
    pub(super) const fn patience(&self) -> Duration {
        self.patience
    }
    pub(super) fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    pub(super) const fn peer_pid(&self) -> Option<u32> {
        self.peer_pid
    }
    pub(super) fn set_peer_pid(&mut self, pid: Option<u32>) {
        self.peer_pid = pid;
    }

    /// The value of a setting that the server reported last.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// The buffer for outgoing messages; [`Wire::flush`] or the next receive sends them.
    pub(super) fn output(&mut self) -> &mut BytesMut {
        &mut self.output
    }

    /// A whole message that has already arrived. Notices and parameter reports before it are handled here.
    pub(super) fn buffered(&mut self, op: &str) -> Result<Option<Frame>, Error> {
        while let Some(frame) = split_frame(&mut self.input).map_err(|e| Error::protocol(op, e))? {
            match frame.tag {
                b'N' => {
                    tracing::debug!(notice = %ServerError::parse(&frame.body), "PostgreSQL sent a notice")
                }
                b'S' => self.remember(&frame.body),
                b'A' => {}
                _ => return Ok(Some(frame)),
            }
        }
        Ok(None)
    }

    fn remember(&mut self, body: &[u8]) {
        let mut fields = body.split(|b| *b == 0).map(String::from_utf8_lossy);
        if let (Some(name), Some(value)) = (fields.next(), fields.next()) {
            self.parameters.insert(name.into_owned(), value.into_owned());
        }
    }

    /// Sends pending messages, then reads what has arrived, at least one byte. Cancel-safe.
    pub(super) async fn exchange(&mut self, op: &str) -> Result<(), Error> {
        self.flush(op).await?;
        make_room(&mut self.input);
        let Wire { transport, input, .. } = self;
        let read = poll_fn(|cx| poll_fill(transport, input, cx)).await;
        let failure = match read {
            Ok(0) => {
                let closed =
                    io::Error::new(io::ErrorKind::UnexpectedEof, "server closed the connection");
                Error::caused(ErrorKind::Io, op, closed)
            }
            Ok(_) => return Ok(()),
            Err(e) => broken(op, e),
        };
        Err(self.deaf.take().unwrap_or(failure))
    }

    /// Sends pending messages, within the patience. Cancel-safe: unsent bytes stay queued. A broken connection is
    /// reported by the next read.
    pub(super) async fn flush(&mut self, op: &str) -> Result<(), Error> {
        if self.deaf.is_some() {
            self.output.clear();
        }
        if self.deaf.is_some() || self.output.is_empty() && !self.unflushed {
            return Ok(());
        }
        self.unflushed = true;
        let patience = self.patience;
        let write = async {
            while !self.output.is_empty() {
                if self.transport.write_buf(&mut self.output).await? == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
            }
            poll_fn(|cx| Pin::new(&mut self.transport).poll_flush(cx)).await
        };
        match tokio::time::timeout(patience, write).await {
            Ok(Ok(())) => self.unflushed = false,
            Ok(Err(e)) => self.deaf = Some(broken(op, e)),
            Err(_) => return Err(silent(op, "the server to read", patience)),
        }
        Ok(())
    }

    /// The next message, within the patience. Cancel-safe.
    pub(super) async fn receive(&mut self, op: &str) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = self.buffered(op)? {
                return Ok(frame);
            }
            match tokio::time::timeout(self.patience, self.exchange(op)).await {
                Ok(done) => done?,
                Err(_) => return Err(silent(op, "an answer", self.patience)),
            }
        }
    }

    /// Sends Terminate, so that the server does not log a lost connection.
    pub(super) async fn close(mut self) {
        postgres_protocol::message::frontend::terminate(&mut self.output);
        if self.flush("close the connection").await.is_ok() {
            let _ = self.transport.shutdown().await;
        }
    }
}

pub(super) fn silent(op: &str, what: &str, patience: Duration) -> Error {
    let message = format!("expected {what} within {} s, found none", patience.as_secs_f32());
    Error::new(ErrorKind::Io, op, message)
}

/// A TLS 1.3 server refuses a client certificate only after the handshake, so the error shows at the first read.
fn broken(op: &str, e: io::Error) -> Error {
    let tls = e.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
    Error::caused(if tls { ErrorKind::Tls } else { ErrorKind::Io }, op, e)
}

/// Reads until nothing more is available or the buffer is nearly full.
fn poll_fill(
    transport: &mut Transport,
    input: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    let mut total = ready!(poll_read_buf(Pin::new(&mut *transport), cx, input))?;
    while total > 0 && input.capacity() - input.len() >= READ_ROOM_BYTES {
        // An end of file or an error that follows some bytes is ignored here: the next read reports it again.
        match poll_read_buf(Pin::new(&mut *transport), cx, input) {
            Poll::Ready(Ok(more)) if more > 0 => total += more,
            _ => break,
        }
    }
    Poll::Ready(Ok(total))
}

/// Makes room for the rest of a message, or for a worthwhile read. Memory of buffers that nobody references is
/// reused.
fn make_room(input: &mut BytesMut) {
    let begun = match Header::parse(input) {
        Ok(Some(header)) => frame_bytes(header).min(MESSAGE_BYTES_MAX).saturating_sub(input.len()),
        _ => 0,
    };
    if input.capacity() - input.len() < begun.max(READ_ROOM_BYTES) {
        input.reserve(begun.max(READ_CHUNK_BYTES));
    }
}

fn frame_bytes(header: Header) -> usize {
    usize::try_from(header.len()).unwrap_or(0) + 1
}

/// Takes one whole message off the front of `input`.
fn split_frame(input: &mut BytesMut) -> Result<Option<Frame>, String> {
    let Some(header) = Header::parse(input).map_err(|e| e.to_string())? else { return Ok(None) };
    let total = frame_bytes(header);
    if total > MESSAGE_BYTES_MAX {
        return Err(format!(
            "expected a message of at most {MESSAGE_BYTES_MAX} bytes, found {:?} of {total}",
            char::from(header.tag())
        ));
    }
    if input.len() < total {
        return Ok(None);
    }
    let mut body = input.split_to(total).freeze();
    bytes::Buf::advance(&mut body, 5);
    Ok(Some(Frame { tag: header.tag(), body }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cut(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 1..6), cut in 0usize..300) {
            let mut raw = Vec::new();
            for body in &bodies {
                raw.push(b'd');
                raw.extend((body.len() as u32 + 4).to_be_bytes());
                raw.extend(body);
            }
            let cut = cut.min(raw.len());
            let mut input = BytesMut::from(&raw[..cut]);
            let mut seen = Vec::new();
            while let Some(f) = split_frame(&mut input).unwrap() { seen.push(f.body.to_vec()); }
            input.extend_from_slice(&raw[cut..]);
            while let Some(f) = split_frame(&mut input).unwrap() { seen.push(f.body.to_vec()); }
            prop_assert_eq!(seen, bodies);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let mut input = BytesMut::from(&bytes[..]);
            make_room(&mut input);
            while let Ok(Some(_)) = split_frame(&mut input) {}
        }
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for raw in [[b'd', 0x7F, 0, 0, 0], [b'd', 0, 0, 0, 3], [b'd', 0xFF, 0, 0, 0]] {
            assert!(split_frame(&mut BytesMut::from(&raw[..])).is_err());
        }
    }

    #[test]
    fn bodies_share_the_read_buffer() {
        let mut input = BytesMut::from(&b"d\0\0\0\x07abcZ"[..]);
        let at = input.as_ptr();
        let frame = split_frame(&mut input).unwrap().unwrap();
        assert_eq!(frame.body.as_ptr() as usize, at as usize + 5);
    }
}
