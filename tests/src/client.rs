//! A raw klio.v1 client: for saying what no honest sidecar would say.

use crate::site::Site;
use klio_pg::{Lsn, SegmentSize};
use klio_proto::v1::{self, receive_request::Kind, receive_response, wal_client::WalClient};
use std::{path::Path, time::Duration};
use tokio::sync::mpsc;
use tonic::{
    Status, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

/// Connects with the certificates of a bundle.
///
/// # Errors
/// As the handshake ends.
///
/// # Panics
/// When the bundle cannot be read.
pub async fn connect(site: &Site, bundle: &Path) -> Result<Channel, tonic::transport::Error> {
    let read = |name: &str| std::fs::read(bundle.with_file_name(name)).expect("the bundle's files");
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca.crt")))
        .identity(Identity::from_pem(read("client.crt"), read("client.key")))
        .domain_name("localhost");
    let endpoint = Endpoint::from_shared(format!("https://127.0.0.1:{}", site.port()))
        .expect("a valid address");
    endpoint.tls_config(tls)?.connect_timeout(Duration::from_secs(10)).connect().await
}

/// One open stream of WAL.
pub struct Stream {
    /// To send on.
    pub requests: mpsc::Sender<v1::ReceiveRequest>,
    /// To hear on.
    pub answers: Streaming<v1::ReceiveResponse>,
}

/// An open message that a server takes at first contact.
#[must_use]
pub fn open(cluster: &str, size: SegmentSize, start: Lsn) -> v1::Open {
    v1::Open {
        cluster: cluster.into(),
        system_identifier: SYSTEM,
        segment_size: size.as_u32(),
        postgres_version: 150_018,
        timeline: 1,
        start_lsn: start.as_u64(),
        writer_id: "test".into(),
        gap: None,
        slot_restart_lsn: 0,
        postgres_timeline: 0,
        can_prove: false,
    }
}

/// The system identifier of [`wal`].
pub const SYSTEM: u64 = 7_000_000_000_000_000_001;

impl Stream {
    /// Opens a stream and waits for the server's word.
    ///
    /// # Errors
    /// The server's refusal.
    ///
    /// # Panics
    /// When the server says something else than opened.
    pub async fn open(channel: &Channel, open: v1::Open) -> Result<Self, Status> {
        let (requests, queue) = mpsc::channel(16);
        let first = v1::ReceiveRequest { kind: Some(Kind::Open(open)) };
        requests.send(first).await.expect("the queue is ours");
        let queue = tokio_stream::wrappers::ReceiverStream::new(queue);
        let mut answers = WalClient::new(channel.clone()).receive(queue).await?.into_inner();
        match answers.message().await?.and_then(|m| m.kind) {
            Some(receive_response::Kind::Opened(_)) => Ok(Self { requests, answers }),
            other => panic!("expected opened, found {other:?}"),
        }
    }

    /// Sends WAL bytes.
    pub async fn append(&self, start: Lsn, data: Vec<u8>) {
        let wal_end = start.as_u64().saturating_add(data.len() as u64);
        let append = v1::Append {
            start_lsn: start.as_u64(),
            data: data.into(),
            wal_end_lsn: wal_end,
            traceparent: String::new(),
        };
        // A server that has ended the stream says why on the other side.
        let _ = self.requests.send(v1::ReceiveRequest { kind: Some(Kind::Append(append)) }).await;
    }

    /// Waits until this much is acknowledged as durable.
    ///
    /// # Errors
    /// How the server ended the stream instead.
    pub async fn flushed(&mut self, lsn: Lsn) -> Result<(), Status> {
        loop {
            match self.answers.message().await? {
                Some(v1::ReceiveResponse { kind: Some(receive_response::Kind::Ack(ack)) })
                    if ack.flushed_lsn >= lsn.as_u64() =>
                {
                    return Ok(());
                }
                Some(_) => {}
                None => return Err(Status::unavailable("the server ended the stream")),
            }
        }
    }
}

/// Pages of WAL as PostgreSQL 15 lays them out: right headers, arbitrary records. `start` is a page's.
#[must_use]
pub fn wal(start: Lsn, bytes: usize, size: SegmentSize, timeline: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        let at = start.advance(out.len() as u64);
        let long = at.offset_in(size) == 0;
        let mut page = vec![(at.as_u64() >> 13) as u8; 8192];
        page[..2].copy_from_slice(&0xD110_u16.to_le_bytes());
        page[2..4].copy_from_slice(&if long { 2_u16 } else { 0 }.to_le_bytes());
        page[4..8].copy_from_slice(&timeline.to_le_bytes());
        page[8..16].copy_from_slice(&at.as_u64().to_le_bytes());
        if long {
            page[24..32].copy_from_slice(&SYSTEM.to_le_bytes());
            page[32..36].copy_from_slice(&size.as_u32().to_le_bytes());
            page[36..40].copy_from_slice(&8192_u32.to_le_bytes());
        }
        out.extend(page);
    }
    out.truncate(bytes);
    out
}
