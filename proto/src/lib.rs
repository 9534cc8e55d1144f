//! The klio.v1 gRPC contract.
//!
//! The generated messages are in [`v1`]; nothing outside this crate builds or reads a field that
//! has a validated twin. `code` is the table of error codes for both ends. This crate knows no disk
//! and opens no connection.

pub mod base;
pub mod code;
pub mod wal;

pub use code::Code;

/// Every service of the contract, for metrics: other names get no series.
pub const SERVICES: [&str; 4] =
    ["klio.v1.Wal", "klio.v1.Catalog", "klio.v1.Base", "grpc.health.v1.Health"];

/// The generated messages and services of `klio.v1`.
#[allow(clippy::all, clippy::disallowed_methods)]
pub mod v1 {
    tonic::include_proto!("klio.v1");
    /// The compiled descriptors, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/klio.v1.bin"));
}

#[cfg(test)]
mod foreign;

/// Peers of other versions: fields of future versions are accepted, and so are messages of past
/// versions.
#[cfg(test)]
#[allow(clippy::needless_update, reason = "messages will get more fields")]
mod tests {
    use super::*;
    use prost::Message;

    /// The message with a number, a text and a nested message in fields that no version has so far.
    fn of_a_version_to_come(message: &impl Message) -> Vec<u8> {
        let mut bytes = message.encode_to_vec();
        prost::encoding::uint64::encode(1999, &7, &mut bytes);
        prost::encoding::string::encode(2000, &"later".to_owned(), &mut bytes);
        prost::encoding::message::encode(2001, &v1::Gap::default(), &mut bytes);
        bytes
    }

    macro_rules! passes {
        ($($message:expr),* $(,)?) => {$({
            let message = $message;
            let mut decoded = message.clone();
            decoded.clear();
            decoded.merge(&of_a_version_to_come(&message)[..]).unwrap();
            assert_eq!(decoded, message);
        })*};
    }

    #[test]
    fn fields_of_a_version_to_come_pass_in_every_message_of_the_stream() {
        let open = v1::Open {
            cluster: "pg".into(),
            system_identifier: 7,
            segment_size: 16 << 20,
            postgres_version: 170_002,
            timeline: 1,
            start_lsn: 1 << 24,
            writer_id: "w".into(),
            gap: Some(v1::Gap { from_lsn: 1, to_lsn: 2, reason: "lost".into() }),
            ..Default::default()
        };
        passes!(
            open.clone(),
            v1::Append { start_lsn: 5, data: "abc".into(), wal_end_lsn: 9, ..Default::default() },
            v1::ReceiveRequest { kind: Some(v1::receive_request::Kind::Open(open.clone())) },
            v1::Opened { start_lsn: 4, window_bytes: 5, ..Default::default() },
            v1::Ack { received_lsn: 4, flushed_lsn: 5, ..Default::default() },
            v1::PositionRequest { cluster: "pg".into(), ..Default::default() },
            v1::PositionResponse {
                timelines: vec![v1::TimelinePosition { timeline: 1, ..Default::default() }],
                ..Default::default()
            },
            v1::FetchRequest { cluster: "pg".into(), name: "x".into(), ..Default::default() },
            v1::FetchHeader { plain_size: 5, tier: "tier1".into(), ..Default::default() },
        );
        // Also inside another message: the outer one is rebuilt around it.
        let later = of_a_version_to_come(&open);
        let mut bytes = Vec::new();
        prost::encoding::bytes::encode(1, &later, &mut bytes);
        let request = v1::ReceiveRequest::decode(&bytes[..]).unwrap();
        assert_eq!(request.kind, Some(v1::receive_request::Kind::Open(open)));
    }

    /// Messages of the first builds, written by hand: field numbers and types never change.
    #[test]
    fn an_open_of_the_first_builds_is_read() {
        let mut bytes = Vec::new();
        prost::encoding::string::encode(1, &"pg".to_owned(), &mut bytes);
        prost::encoding::uint64::encode(2, &7, &mut bytes);
        prost::encoding::uint32::encode(3, &(16 << 20), &mut bytes);
        prost::encoding::uint32::encode(4, &170_002, &mut bytes);
        prost::encoding::uint32::encode(5, &1, &mut bytes);
        prost::encoding::uint64::encode(6, &(1 << 24), &mut bytes);
        prost::encoding::string::encode(7, &"w".to_owned(), &mut bytes);
        let raw = v1::Open::decode(&bytes[..]).unwrap();
        let open = wal::Open::try_from(raw).unwrap();
        assert_eq!((open.timeline.get(), open.start.as_u64()), (1, 1 << 24));
    }
}
