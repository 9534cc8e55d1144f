//! What a broken or hostile client says on the wire: refused by name, and nothing of it is written.

use klio_pg::{Lsn, SegmentSize};
use klio_proto::{
    Code,
    v1::{self, catalog_client::CatalogClient, wal_client::WalClient},
};
use klio_tests::{
    client::{self, Stream, open, wal},
    install_crypto,
    site::Site,
};
use tonic::Status;

const START: Lsn = Lsn::new(0x0100_0000);

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).expect("1 MiB")
}

async fn site() -> (Site, tonic::transport::Channel) {
    install_crypto();
    let mut site = Site::new().await;
    site.start().await;
    let channel = client::connect(&site, &site.bundle()).await.expect("connect");
    (site, channel)
}

/// Opens at first contact and sends a little good WAL.
async fn begun(channel: &tonic::transport::Channel) -> Stream {
    let mut stream = Stream::open(channel, open("main", size(), START)).await.expect("open");
    stream.append(START, wal(START, 16384, size(), 1)).await;
    stream.flushed(START.advance(16384)).await.expect("acknowledged");
    stream
}

#[track_caller]
fn expect(status: &Status, code: Code, words: &[&str]) {
    assert_eq!(Code::of(status), code, "{status:?}");
    for word in words {
        assert!(status.message().contains(word), "{word:?} is missing in {:?}", status.message());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lsns_that_jump_and_pages_that_lie_end_the_stream_and_are_not_stored() {
    let (site, channel) = site().await;
    let held = START.advance(16384);
    let mut cases: Vec<(Lsn, Vec<u8>, Code, &str)> = vec![
        (START, wal(START, 8192, size(), 1), Code::BadPosition, "expected the byte at 0/1004000"),
        (
            held.advance(8192),
            wal(held.advance(8192), 8192, size(), 1),
            Code::BadPosition,
            "0/1006000",
        ),
        (Lsn::new(u64::MAX), vec![0; 10], Code::BadPosition, "FFFFFFFF/FFFFFFFF"),
        (held, wal(held, 8192, size(), 7), Code::BadWal, "xlp_tli"),
        (held, wal(START, 8192, size(), 1), Code::BadWal, "xlp_"),
    ];
    // Zeros are what a segment switch leaves, but then up to the segment's end.
    let mut holed = vec![0; 8192];
    holed.extend(wal(held.advance(8192), 8192, size(), 1));
    cases.push((held, holed, Code::BadWal, "zeros"));
    let mut bent = wal(held, 8192, size(), 1);
    bent[9] ^= 4;
    cases.push((held, bent, Code::BadWal, "xlp_pageaddr"));
    drop(begun(&channel).await);
    for (start, data, code, word) in cases {
        let mut stream =
            Stream::open(&channel, open("main", size(), held)).await.expect("open again");
        stream.append(start, data).await;
        let status = stream.flushed(Lsn::new(u64::MAX)).await.expect_err("refused");
        expect(&status, code, &[word]);
    }
    // Nothing of it was stored: the stream goes on where the good bytes ended.
    let mut stream = Stream::open(&channel, open("main", size(), held)).await.expect("open again");
    stream.append(held, wal(held, 8192, size(), 1)).await;
    stream.flushed(held.advance(8192)).await.expect("acknowledged");
    drop(site);
}

#[tokio::test(flavor = "multi_thread")]
async fn opens_that_do_not_fit_what_is_held_are_refused() {
    let (_site, channel) = site().await;
    drop(begun(&channel).await);
    let held = START.advance(16384);
    type Break = fn(&mut v1::Open);
    let cases: [(Break, Code, &str); 8] = [
        (|o| o.start_lsn = START.as_u64(), Code::BadPosition, "0/1004000"),
        (|o| o.start_lsn += 8192, Code::BadPosition, "0/1004000"),
        (|o| o.system_identifier += 1, Code::WrongSystem, "7000000000000000002"),
        (|o| o.segment_size = 16 << 20, Code::WrongSystem, "16777216"),
        (|o| o.timeline = 0, Code::Invalid, "timeline"),
        (|o| o.cluster = "../main".into(), Code::Invalid, "../main"),
        (|o| o.cluster = "other".into(), Code::Forbidden, "other"),
        (|o| o.segment_size = 12345, Code::Invalid, "12345"),
    ];
    for (change, code, word) in cases {
        let mut message = open("main", size(), held);
        change(&mut message);
        let status = Stream::open(&channel, message).await.err().expect("refused");
        expect(&status, code, &[word]);
    }
    Stream::open(&channel, open("main", size(), held)).await.expect("the right one");
}

/// A cluster that was promoted before anybody backed it up: its history comes before its first byte.
#[tokio::test(flavor = "multi_thread")]
async fn first_contact_may_be_on_a_later_timeline() {
    let (_site, channel) = site().await;
    let message = v1::Open { timeline: 2, ..open("main", size(), START) };
    let history = v1::PutHistoryRequest {
        cluster: "main".into(),
        system_identifier: client::SYSTEM,
        timeline: 2,
        content: b"1\t0/1004000\tno recovery target specified\n".to_vec().into(),
        segment_size: message.segment_size,
        postgres_version: message.postgres_version,
    };
    let mut wal_client = WalClient::new(channel.clone());
    wal_client.put_history(history.clone()).await.expect("stored");
    let other = v1::PutHistoryRequest { system_identifier: client::SYSTEM + 1, ..history };
    let status = wal_client.put_history(other).await.expect_err("another system");
    expect(&status, Code::WrongSystem, &[]);
    let mut stream = Stream::open(&channel, message).await.expect("timeline 2");
    let mut bytes = wal(START, 16384, size(), 1);
    bytes.extend(wal(START.advance(16384), 8192, size(), 2));
    stream.append(START, bytes).await;
    stream.flushed(START.advance(3 * 8192)).await.expect("acknowledged");
}

/// P8: a claim ends an earlier session only when it would itself be admitted.
#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_is_refused_cuts_the_live_stream_off_in_no_case() {
    let (_site, channel) = site().await;
    let mut live = begun(&channel).await;
    let held = START.advance(16384);
    let newer = |timeline| v1::Open {
        timeline,
        writer_id: "another".into(),
        ..open("main", size(), START)
    };
    let history = |timeline, content: &str| v1::PutHistoryRequest {
        cluster: "main".into(),
        system_identifier: client::SYSTEM,
        timeline,
        content: content.as_bytes().to_vec().into(),
        segment_size: size().as_u32(),
        postgres_version: open("main", size(), START).postgres_version,
    };
    let mut wal_client = WalClient::new(channel.clone());
    // Its history is there, and it lacks WAL on the way; the other one's history is not there at all.
    wal_client.put_history(history(3, "1\t0/9004000\tx\n")).await.expect("stored");
    let late = v1::Open { start_lsn: 0x0900_0000, ..newer(3) };
    let unaligned = v1::Open { start_lsn: START.as_u64() + 8192, ..newer(3) };
    let same = v1::Open { timeline: 1, start_lsn: START.as_u64(), ..newer(1) };
    let younger = v1::Open { postgres_timeline: 1, ..newer(2) };
    let cases = [
        (newer(2), Code::Invalid),
        (late, Code::BadPosition),
        (unaligned, Code::BadPosition),
        (same, Code::BadPosition),
        (younger, Code::Invalid),
        (v1::Open { system_identifier: client::SYSTEM + 1, ..newer(2) }, Code::WrongSystem),
    ];
    let mut at = held;
    for (message, code) in cases {
        let status = Stream::open(&channel, message).await.err().expect("refused");
        expect(&status, code, &[]);
        live.append(at, wal(at, 8192, size(), 1)).await;
        at = at.advance(8192);
        live.flushed(at).await.expect("the live stream goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_timeline_after_a_newer_one_is_refused() {
    let (_site, channel) = site().await;
    drop(begun(&channel).await);
    let history = v1::PutHistoryRequest {
        cluster: "main".into(),
        system_identifier: client::SYSTEM,
        timeline: 2,
        content: b"1\t0/1004000\tno recovery target specified\n".to_vec().into(),
        segment_size: size().as_u32(),
        postgres_version: open("main", size(), START).postgres_version,
    };
    let mut wal_client = WalClient::new(channel.clone());
    wal_client.put_history(history.clone()).await.expect("stored");
    wal_client.put_history(history.clone()).await.expect("idempotent");
    let other =
        v1::PutHistoryRequest { content: b"1\t0/1000000\tother\n".to_vec().into(), ..history };
    assert!(wal_client.put_history(other).await.is_err(), "another content for the same history");
    let mut second = open("main", size(), START);
    second.timeline = 2;
    let mut stream = Stream::open(&channel, second).await.expect("timeline 2");
    let end = START.advance(4 * 8192);
    let mut bytes = wal(START, 16384, size(), 1);
    bytes.extend(wal(START.advance(16384), 16384, size(), 2));
    stream.append(START, bytes).await;
    stream.flushed(end).await.expect("acknowledged");
    let status = Stream::open(&channel, open("main", size(), START.advance(16384)))
        .await
        .err()
        .expect("refused");
    expect(&status, Code::StaleTimeline, &["2", "1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_window_and_oversized_messages_are_refused() {
    let (mut site, channel) = site().await;
    let mut stream = begun(&channel).await;
    let held = START.advance(16384);
    // 5 MiB in one message: more than any message may have.
    stream.append(held, wal(held, 5 << 20, size(), 1)).await;
    assert!(stream.flushed(Lsn::new(u64::MAX)).await.is_err());
    assert!(site.server().is_running());
    let mut stream = Stream::open(&channel, open("main", size(), held)).await.expect("open again");
    stream.append(held, wal(held, 8192, size(), 1)).await;
    stream.flushed(held.advance(8192)).await.expect("acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_leave_the_directory_are_refused_on_every_call() {
    let (_site, channel) = site().await;
    drop(begun(&channel).await);
    for name in [
        "../../etc/passwd",
        "00000001000000000000000",
        "",
        "cluster.json",
        "0000000100000000000000010",
    ] {
        let request =
            v1::FetchRequest { cluster: "main".into(), name: name.into(), ..Default::default() };
        let status = WalClient::new(channel.clone()).fetch(request).await.expect_err("refused");
        expect(&status, Code::Invalid, &[]);
    }
    let request = v1::FetchRequest {
        cluster: "../main".into(),
        name: "000000010000000000000001".into(),
        ..Default::default()
    };
    let status = WalClient::new(channel.clone()).fetch(request).await.expect_err("refused");
    expect(&status, Code::Invalid, &["../main"]);
    let request = v1::ListWalRequest { cluster: "other".into() };
    let status = CatalogClient::new(channel).list_wal(request).await.expect_err("refused");
    expect(&status, Code::Forbidden, &["other"]);
}
