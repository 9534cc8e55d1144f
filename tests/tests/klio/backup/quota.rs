//! P13: what one cluster may use, on the real server. What is over it is refused in words, for that cluster alone, and its WAL
//! goes on.

use klio_pg::Lsn;
use klio_proto::{
    Code,
    v1::{FileKind, reserve_request::Purpose},
};
use klio_tests::{
    base_client::{Base, pack, real_pack, segment_size},
    client::{self, Stream, wal},
    install_crypto,
    site::{PATIENCE, Site},
    wait::eventually,
};
use std::path::PathBuf;
use tonic::{Status, transport::Channel};

const START: Lsn = Lsn::new(0x0100_0000);
const MIB: usize = 1 << 20;

/// A server with these quotas, and the bundle of a second cluster.
async fn started(quotas: &[(&str, &str)]) -> (Site, PathBuf) {
    install_crypto();
    let mut site = Site::new().await;
    for (name, value) in quotas {
        site.set(&format!("KLIO_QUOTA__{name}"), value);
    }
    site.start().await;
    let made = site.server_tool(&["client", "app@other"]).await;
    assert_eq!(made.code, Some(0), "{made:?}");
    let bundle = site.dir().join("clients/app@other/klio.toml");
    (site, bundle)
}

async fn base(site: &Site, bundle: &std::path::Path, cluster: &str) -> (Base, Channel) {
    let channel = client::connect(site, bundle).await.expect("connect");
    (Base::new(&channel, cluster), channel)
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Status>, words: &[&str]) {
    let status = result.expect_err("refused");
    assert_eq!(Code::of(&status), Code::Quota, "{status:?}");
    for word in words {
        assert!(status.message().contains(word), "{word:?} is missing in {:?}", status.message());
    }
}

/// Bytes that do not compress.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(step).take(bytes).collect()
}

/// WAL that does not get smaller when it is compressed: what follows each page's header is noise.
fn noisy_wal(at: Lsn, seed: u64) -> Vec<u8> {
    const PAGE: usize = 8192;
    const HEADER_MAX: usize = 40;
    let mut pages = wal(at, MIB, segment_size(), 1);
    let noise = noise(seed, MIB);
    for (page, noise) in pages.chunks_mut(PAGE).zip(noise.chunks(PAGE)) {
        page[HEADER_MAX..].copy_from_slice(&noise[HEADER_MAX..]);
    }
    pages
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_over_its_stored_bytes_takes_no_backup_and_its_wal_and_all_others_go_on() {
    let (site, other) = started(&[("STORED_BYTES", "25165824")]).await;
    let (main, channel) = base(&site, &site.bundle(), "main").await;
    let secret = main.open().await.expect("a repository");
    let mut stream = main.stream_wal(&channel, START, MIB).await;
    let lease = main.reserve_backup("b1").await;
    // What is refused, and what is sent again, counts nothing: 40 MiB of attempts.
    let (good, bytes) = real_pack(&secret, &noise(1, 4 * MIB));
    for _ in 0..5 {
        let lie = main.put(pack(b"another"), &bytes).await.expect_err("another sum");
        assert_eq!(Code::of(&lie), Code::Invalid, "{lie:?}");
    }
    for turn in 0..5 {
        assert_eq!(main.put(good, &bytes).await.expect("stored"), turn > 0);
    }
    // What is stored counts: some more go, and then it is refused, which a retry of what is there is not.
    let mut stored = 1;
    let full = loop {
        let (file, bytes) = real_pack(&secret, &noise(100 + stored, 4 * MIB));
        match main.put(file, &bytes).await {
            Ok(_) => stored += 1,
            Err(status) => break status,
        }
        assert!(stored < 6, "more was stored than the quota is");
    };
    assert!(stored > 1, "one fits besides: {full:?}");
    refused::<()>(Err(full), &["cluster main", "quota.stored_bytes", "24.0 MiB"]);
    assert!(main.put(good, &bytes).await.expect("it is there"));
    // WAL goes on, beyond the quota, and that is shown.
    for turn in 1..32_u64 {
        let at = START.advance(turn * MIB as u64);
        stream.append(at, noisy_wal(at, turn)).await;
        stream.flushed(at.advance(MIB as u64)).await.expect("acknowledged");
    }
    // Whoever is refused has it measured again, so neither the status nor the metrics wait for the next turn.
    let (more, more_bytes) = real_pack(&secret, &noise(99, 4 * MIB));
    eventually("status and metrics to tell", PATIENCE, || async {
        refused(main.put(more, &more_bytes).await, &["quota.stored_bytes"]);
        let told = site
            .status()
            .await
            .is_some_and(|s| s["problems"].to_string().contains("quota.stored_bytes"));
        let ratio = site.metrics().await.sum("klio_quota_used_ratio", &[]);
        if told && ratio > 1.0 { Ok(()) } else { Err((told, ratio)) }
    })
    .await;
    drop(lease);
    // Another cluster has all of its own.
    let (theirs, channel) = base(&site, &other, "other").await;
    let secret = theirs.open().await.expect("a repository");
    let _stream = theirs.stream_wal(&channel, START, MIB).await;
    let _lease = theirs.reserve_backup("b1").await;
    let (file, bytes) = real_pack(&secret, &noise(2, 4 * MIB));
    assert!(!theirs.put(file, &bytes).await.expect("stored"));
    assert_eq!(main.list(FileKind::Data).await.expect("read on").len(), stored as usize);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_backup_has_its_bytes_and_the_next_one_has_them_again() {
    let (site, _) = started(&[("BACKUP_BYTES", "6291456")]).await;
    let (main, channel) = base(&site, &site.bundle(), "main").await;
    let secret = main.open().await.expect("a repository");
    let _stream = main.stream_wal(&channel, START, MIB).await;
    for name in ["b1", "b2"] {
        let _lease = main.reserve_backup(name).await;
        let [one, two] = [1, 2]
            .map(|n| real_pack(&secret, &noise(n + u64::from(name.as_bytes()[1]) * 10, 4 * MIB)));
        assert!(!main.put(one.0, &one.1).await.expect("stored"));
        refused(main.put(two.0, &two.1).await, &["quota.backup_bytes", "6.0 MiB"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_restores_and_connections_are_bounded_for_each_cluster_and_wal_has_its_own_places() {
    let (site, other) = started(&[("CALLS", "3"), ("RESTORES", "2"), ("CONNECTIONS", "2")]).await;
    let (main, channel) = base(&site, &site.bundle(), "main").await;
    main.open().await.expect("a repository");
    let mut stream = main.stream_wal(&channel, START, MIB).await;
    let restore = || main.reserve(Purpose::Restore, "");
    let mut held = vec![restore().await.expect("one").1, restore().await.expect("two").1];
    refused(restore().await.map(drop), &["quota.restores", "cluster main"]);
    let third = main.reserve_backup("b1").await;
    refused(main.list(FileKind::Data).await, &["quota.calls", "cluster main"]);
    // WAL is not refused for it, neither on the stream nor on a new one.
    let at = START.advance(MIB as u64);
    stream.append(at, wal(at, MIB, segment_size(), 1)).await;
    stream.flushed(at.advance(MIB as u64)).await.expect("acknowledged");
    // A second connection has no calls of its own, and a third is not let in.
    let (again, second) = base(&site, &site.bundle(), "main").await;
    refused(again.list(FileKind::Data).await, &["quota.calls"]);
    let next = at.advance(MIB as u64);
    let open = client::open("main", segment_size(), next);
    drop(stream);
    let _wal: Stream = eventually("the WAL to be taken", PATIENCE, || async {
        Stream::open(&second, open.clone()).await.map_err(|status| status.to_string())
    })
    .await;
    let kept_out = match client::connect(&site, &site.bundle()).await {
        Ok(channel) => Base::new(&channel, "main").holdings().await.is_err(),
        Err(_) => true,
    };
    assert!(kept_out, "a third connection is let in");
    // Another cluster feels nothing of it.
    let (theirs, _) = base(&site, &other, "other").await;
    theirs.open().await.expect("a repository");
    assert!(theirs.reserve(Purpose::Restore, "").await.is_ok());
    // A place is free again when its call has ended.
    drop(third);
    held.pop();
    eventually("a place", PATIENCE, || async { main.list(FileKind::Data).await.is_ok() }).await;
}
