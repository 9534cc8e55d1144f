//! Arbitrary input from a peer: a message that cannot be decoded or is invalid is an error and never causes a panic.

use crate::{base, v1, wal};
use proptest::{collection::vec, prelude::*};
use prost::Message;

macro_rules! converted {
    ($bytes:expr, $($raw:ty => $twin:ty),* $(,)?) => {$(
        if let Ok(raw) = <$raw>::decode($bytes) {
            let _ = <$twin>::try_from(raw);
        }
    )*};
}

/// Decodes the bytes as each message that has a validated twin.
fn as_everything(bytes: &[u8]) {
    converted!(
        bytes,
        v1::PositionRequest => wal::PositionRequest,
        v1::BeginGenerationRequest => wal::BeginGenerationRequest,
        v1::PutHistoryRequest => wal::PutHistoryRequest,
        v1::CompareBegin => wal::CompareBegin,
        v1::RefillBegin => wal::RefillBegin,
        v1::Open => wal::Open,
        v1::OpenRepositoryRequest => base::OpenRepositoryRequest,
        v1::PutFileRequest => base::PutFile,
        v1::GetFileRequest => base::GetFileRequest,
        v1::ReserveRequest => base::ReserveRequest,
    );
    if let Ok(raw) = v1::FileName::decode(bytes) {
        let _ = base::FileName::try_from(Some(raw));
    }
    let _ = v1::ReceiveRequest::decode(bytes);
}

/// A field with any number (most messages have the first ten) and a number or bytes as its value.
fn field() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![9 => 1u32..11, 1 => 1u32..3000];
    let text = prop_oneof![
        "[a-z0-9@./]{0,70}".prop_map(String::into_bytes),
        vec(any::<u8>(), 0..70),
        Just("\u{0}".repeat(3).into_bytes()),
    ];
    let value = prop_oneof![
        prop_oneof![any::<u64>(), 0u64..4, Just(1 << 24), any::<u64>().prop_map(|n| n << 13)]
            .prop_map(Ok),
        text.prop_map(Err),
    ];
    (number, value).prop_map(|(number, value)| {
        let mut bytes = Vec::new();
        match value {
            Ok(number_value) => prost::encoding::uint64::encode(number, &number_value, &mut bytes),
            Err(text) => prost::encoding::bytes::encode(number, &text, &mut bytes),
        }
        bytes
    })
}

proptest! {
    #[test]
    fn no_bytes_make_a_message_panic(bytes in vec(any::<u8>(), 0..200)) {
        as_everything(&bytes);
    }

    #[test]
    fn no_bytes_of_well_formed_fields_make_a_message_panic(fields in vec(field(), 0..12)) {
        as_everything(&fields.concat());
    }

    /// An almost valid Open, with one byte changed and truncated anywhere.
    #[test]
    fn no_bytes_beside_a_good_open_make_it_panic(
        at in 0usize..60, to: u8, cut in 0usize..80, timeline: u32, start_lsn: u64, segment_size: u32,
    ) {
        let open = v1::Open {
            cluster: "pg".into(),
            system_identifier: 7,
            segment_size,
            postgres_version: 170_002,
            timeline,
            start_lsn,
            writer_id: "w".into(),
            gap: Some(v1::Gap { from_lsn: 1, to_lsn: start_lsn, reason: "lost".into() }),
            ..Default::default()
        };
        let mut bytes = open.encode_to_vec();
        as_everything(&bytes);
        let place = at % bytes.len();
        bytes[place] = to;
        as_everything(&bytes);
        bytes.truncate(cut);
        as_everything(&bytes);
    }
}
