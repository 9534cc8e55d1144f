//! The replication client against a real PostgreSQL 15.
//!
//! Every test has its own server. Segments have 1 MiB, so that a test can fill several.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

#[path = "replication/authority.rs"]
mod authority;
#[path = "replication/cluster.rs"]
mod cluster;

use authority::{Authority, Issued};
use cluster::{Cluster, eventually, info, mib1, refused, write_owned};
use klio_pg::{Lsn, ReplicationMessage, StatusUpdate, TimelineHistory, TimelineId};
use klio_sidecar::{
    conninfo::ConnInfo,
    replication::{Client, ErrorKind, Event, SlotName, StreamEnd, WalStream},
};
use rustix::process::{Pid, Signal, kill_process};
use std::time::{Duration, Instant};

fn slot(name: &str) -> SlotName {
    name.parse().unwrap()
}

fn tli(number: u32) -> TimelineId {
    TimelineId::new(number).unwrap()
}

fn status(lsn: Lsn) -> StatusUpdate {
    StatusUpdate { written: lsn, flushed: lsn, sent_unix_micros: 0, reply_requested: false }
}

/// All WAL up to `end`.
async fn read_to(stream: &mut WalStream, end: Lsn) -> Vec<u8> {
    let mut out = Vec::new();
    while stream.next_lsn() < end {
        match stream.next().await.unwrap() {
            Event::Message(ReplicationMessage::XLogData(wal)) => out.extend_from_slice(&wal.data),
            Event::Message(ReplicationMessage::Keepalive(_)) => {}
            Event::End(end) => panic!("unexpected end {end:?}"),
        }
    }
    out
}

async fn read_end(stream: &mut WalStream) -> StreamEnd {
    loop {
        if let Event::End(end) = stream.next().await.unwrap() {
            return end;
        }
    }
}

/// PostgreSQL's own bytes from `start` to `end`, the start of a segment.
fn files(cluster: &Cluster, timeline: u32, start: Lsn, end: Lsn) -> Vec<u8> {
    let mut at = start.segment_start(mib1());
    let mut out = Vec::new();
    while at < end {
        out.extend(cluster.segment(timeline, at));
        at = at.advance(mib1().bytes());
    }
    out.split_off(start.offset_in(mib1()) as usize)
}

#[tokio::test]
async fn unix_socket_with_trust_answers_every_command() {
    let pg = Cluster::start(&[]).await;
    let mut client = pg.client().await;
    let id = client.identify_system().await.unwrap();
    let system = pg.sql("SELECT system_identifier FROM pg_control_system()").await;
    assert_eq!(Some(id.system_identifier.to_string()), system);
    assert_eq!(id.timeline, tli(1));
    assert!(id.flush_lsn > Lsn::ZERO);
    assert_eq!(client.server_version().await.unwrap().major(), 15);
    assert_eq!(client.segment_size().await.unwrap(), mib1());
    assert_eq!(client.show("wal_level").await.unwrap(), "replica");
    assert!(!client.in_hot_standby());

    // The connection is still usable after an error.
    let e = client.show("no_such_setting").await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Server);
    assert_eq!(e.server().map(|s| s.sqlstate.as_str()), Some("42704"));
    let e = client.timeline_history(tli(7)).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::TimelineMissing, "{e}");
    assert!(client.show("x; DROP").await.is_err());
    assert_eq!(client.identify_system().await.unwrap().system_identifier, id.system_identifier);
    client.close().await;
}

#[tokio::test]
async fn nobody_listening_is_a_connect_error_that_names_the_place() {
    let e = refused(&info("host=/nonexistent port=1 user=u")).await;
    assert_eq!(e.kind(), ErrorKind::Connect);
    assert!(e.to_string().contains("/nonexistent/.s.PGSQL.1"), "{e}");
}

async fn with_passwords() -> Cluster {
    let mut pg = Cluster::init(&[], 1);
    pg.hba(
        "host replication scram 127.0.0.1/32 scram-sha-256\n\
         host replication md5 127.0.0.1/32 md5\n\
         host replication clear 127.0.0.1/32 password\n\
         host replication plain 127.0.0.1/32 trust",
    );
    pg.launch().await;
    pg.sql("CREATE ROLE scram REPLICATION LOGIN PASSWORD 'open sesame'").await;
    pg.sql("CREATE ROLE clear REPLICATION LOGIN PASSWORD 'open sesame'").await;
    pg.sql("SET password_encryption = md5; CREATE ROLE md5 REPLICATION LOGIN PASSWORD 'old'").await;
    pg.sql("CREATE ROLE plain LOGIN").await;
    pg
}

fn tcp(pg: &Cluster, more: &str) -> ConnInfo {
    info(&format!("host=127.0.0.1 port={} {more}", pg.port))
}

#[tokio::test]
async fn tcp_with_scram_or_md5_logs_in() {
    let pg = with_passwords().await;
    for login in ["user=scram password='open sesame'", "user=md5 password=old"] {
        let mut client = Client::connect(&tcp(&pg, login)).await.unwrap();
        client.identify_system().await.unwrap();
    }
}

#[tokio::test]
async fn password_comes_from_the_password_file() {
    let pg = with_passwords().await;
    let path = pg.dir.path().join("pgpass");
    let line = format!("127.0.0.1:{}:replication:scram:open sesame\n", pg.port);
    write_owned(&path, &line, 0o600);
    let login = tcp(&pg, &format!("user=scram passfile={}", path.display()));
    Client::connect(&login).await.unwrap();

    write_owned(&path, &line, 0o644);
    let e = refused(&login).await;
    assert_eq!(e.kind(), ErrorKind::Auth);
    assert!(e.to_string().contains("requests the password of user"), "{e}");
}

#[tokio::test]
async fn wrong_password_is_refused_and_not_repeated() {
    let pg = with_passwords().await;
    for user in ["scram", "md5"] {
        let e = refused(&tcp(&pg, &format!("user={user} password=hunter2"))).await;
        assert_eq!(e.kind(), ErrorKind::Auth, "{e}");
        assert!(!format!("{e} {e:?}").contains("hunter2"));
    }
}

#[tokio::test]
async fn password_is_never_sent_in_the_clear_over_plain_tcp() {
    let pg = with_passwords().await;
    let e = refused(&tcp(&pg, "user=clear password='open sesame'")).await;
    assert_eq!(e.kind(), ErrorKind::Auth);
    assert!(e.to_string().contains("in clear text"), "{e}");
}

#[tokio::test]
async fn role_without_replication_is_a_permission_error() {
    let pg = with_passwords().await;
    let e = refused(&tcp(&pg, "user=plain")).await;
    assert_eq!(e.kind(), ErrorKind::Permission, "{e}");
    let e = refused(&tcp(&pg, "user=nobody")).await;
    assert_eq!(e.kind(), ErrorKind::Auth, "{e}");
}

/// A server whose certificate is for `localhost`, and the file of its authority.
async fn with_tls(hba: &str) -> (Cluster, Authority, String) {
    let authority = Authority::new();
    let server = authority.server(&["localhost"]);
    let (pg, ca) = with_certificate(hba, &server, &authority.pem).await;
    (pg, authority, ca)
}

async fn with_certificate(hba: &str, server: &Issued, ca_pem: &str) -> (Cluster, String) {
    let mut pg = Cluster::init(
        &["ssl=on", "ssl_cert_file=server.crt", "ssl_key_file=server.key", "ssl_ca_file=ca.crt"],
        1,
    );
    write_owned(&pg.data().join("server.crt"), &server.cert, 0o600);
    write_owned(&pg.data().join("server.key"), &server.key, 0o600);
    let ca = pg.data().join("ca.crt");
    write_owned(&ca, ca_pem, 0o600);
    pg.hba(hba);
    pg.launch().await;
    pg.sql("CREATE ROLE klio REPLICATION LOGIN PASSWORD 'open sesame'").await;
    let ca = ca.display().to_string();
    (pg, ca)
}

async fn tls_in_use(pg: &Cluster) -> Option<String> {
    pg.sql("SELECT s.version FROM pg_stat_ssl s JOIN pg_stat_activity a USING (pid) WHERE a.usename = 'klio' AND ssl").await
}

#[tokio::test]
async fn tls_verify_full_with_channel_binding_logs_in() {
    let (pg, _, ca) = with_tls("hostssl replication klio 127.0.0.1/32 scram-sha-256").await;
    for (version, more) in [("TLSv1.3", ""), ("TLSv1.2", "ssl_max_protocol_version=TLSv1.2")] {
        let mut client = Client::connect(&info(&format!(
            "host=localhost hostaddr=127.0.0.1 port={} user=klio password='open sesame' \
             sslmode=verify-full sslrootcert={ca} channel_binding=require {more}",
            pg.port
        )))
        .await
        .unwrap();
        client.identify_system().await.unwrap();
        assert_eq!(tls_in_use(&pg).await.as_deref(), Some(version));
        client.close().await;
        eventually("the walsender is gone", || async {
            tls_in_use(&pg).await.is_none().then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn certificate_for_another_host_is_refused_by_verify_full_only() {
    let (pg, _, ca) = with_tls("hostssl replication klio 127.0.0.1/32 scram-sha-256").await;
    let login = |host: &str, mode: &str, ca: &str| {
        info(&format!(
            "host={host} hostaddr=127.0.0.1 port={} user=klio password='open sesame' \
             sslmode={mode} sslrootcert={ca}",
            pg.port
        ))
    };
    let e = refused(&login("db.example", "verify-full", &ca)).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");
    let e = refused(&login("127.0.0.1", "verify-full", &ca)).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");
    for mode in ["verify-ca", "require", "prefer"] {
        Client::connect(&login("db.example", mode, &ca)).await.unwrap();
    }

    let other = pg.dir.path().join("other.crt");
    write_owned(&other, &Authority::new().pem, 0o600);
    let other = other.display().to_string();
    for mode in ["verify-full", "verify-ca", "require"] {
        let e = refused(&login("localhost", mode, &other)).await;
        assert_eq!(e.kind(), ErrorKind::Tls, "{mode}: {e}");
    }
}

/// PostgreSQL's manual recommends such certificates, and libpq accepts them.
#[tokio::test]
async fn self_signed_certificate_with_a_common_name_is_verified_as_by_libpq() {
    let hba = "hostssl replication klio 127.0.0.1/32 scram-sha-256";
    let login = |pg: &Cluster, host: &str, ca: &str| {
        info(&format!(
            "host={host} hostaddr=127.0.0.1 port={} user=klio password='open sesame' \
             sslmode=verify-full sslrootcert={ca} channel_binding=require",
            pg.port
        ))
    };
    let cert = Authority::self_signed("db.example", 2200);
    let (pg, ca) = with_certificate(hba, &cert, &cert.cert).await;
    Client::connect(&login(&pg, "db.example", &ca)).await.unwrap();
    let e = refused(&login(&pg, "db2.example", &ca)).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");

    let expired = Authority::self_signed("db.example", 2020);
    let (pg, ca) = with_certificate(hba, &expired, &expired.cert).await;
    let e = refused(&login(&pg, "db.example", &ca)).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");
    assert!(e.to_string().contains("expired"), "{e}");
}

#[tokio::test]
async fn modes_below_verify_need_no_root_and_prefer_falls_back() {
    let (pg, ..) = with_tls("hostssl replication klio 127.0.0.1/32 scram-sha-256").await;
    let login = |mode| tcp(&pg, &format!("user=klio password='open sesame' sslmode={mode}"));
    for mode in ["prefer", "allow", "require"] {
        Client::connect(&login(mode)).await.unwrap();
    }
    let e = refused(&login("disable")).await;
    assert_eq!(e.kind(), ErrorKind::Auth, "{e}");
    let e = refused(&login("verify-full")).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");
    assert!(e.to_string().contains("sslrootcert"), "{e}");

    let plain = with_passwords().await;
    let login = |mode| tcp(&plain, &format!("user=scram password='open sesame' {mode}"));
    Client::connect(&login("sslmode=prefer")).await.unwrap();
    let e = refused(&login("sslmode=require")).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");
    let e = refused(&login("channel_binding=require")).await;
    assert_eq!(e.kind(), ErrorKind::Auth, "{e}");
}

#[tokio::test]
async fn client_certificate_logs_in_without_a_password() {
    let (pg, authority, ca) = with_tls("hostssl replication klio 127.0.0.1/32 cert").await;
    let dir = tempfile::tempdir().unwrap();
    let issued = authority.client("klio");
    let (cert, key) = (dir.path().join("c.crt"), dir.path().join("c.key"));
    write_owned(&cert, &issued.cert, 0o644);
    write_owned(&key, &issued.key, 0o600);
    let base = format!("user=klio sslmode=verify-ca sslrootcert={ca}");
    let with_cert = format!("{base} sslcert={} sslkey={}", cert.display(), key.display());
    Client::connect(&tcp(&pg, &with_cert)).await.unwrap().identify_system().await.unwrap();

    let e = refused(&tcp(&pg, &base)).await;
    assert_eq!(e.kind(), ErrorKind::Auth, "{e}");

    write_owned(&key, &issued.key, 0o644);
    let e = refused(&tcp(&pg, &with_cert)).await;
    assert!(e.to_string().contains("expected mode 0600"), "{e}");

    let stranger = Authority::new().client("klio");
    write_owned(&cert, &stranger.cert, 0o644);
    write_owned(&key, &stranger.key, 0o600);
    let e = refused(&tcp(&pg, &with_cert)).await;
    assert_eq!(e.kind(), ErrorKind::Tls, "{e}");
}

/// Other tools created slots without reserving WAL, before anybody had streamed from them.
#[tokio::test]
async fn new_slot_reserves_wal_at_once() {
    let pg = Cluster::start(&[]).await;
    let mut client = pg.client().await;
    assert_eq!(client.read_slot(&slot("klio")).await.unwrap(), None);
    let made = client.create_slot(&slot("klio")).await.unwrap();
    let restart =
        pg.lsn("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'klio'").await;
    assert_eq!((made.restart_lsn, made.restart_timeline), (restart, tli(1)));
    let state = client.read_slot(&slot("klio")).await.unwrap().unwrap();
    assert_eq!((state.restart_lsn, state.restart_timeline), (Some(restart), Some(tli(1))));

    let e = client.create_slot(&slot("klio")).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SlotExists, "{e}");
    client.drop_slot(&slot("klio")).await.unwrap();
    assert_eq!(client.read_slot(&slot("klio")).await.unwrap(), None);
    let e = client.drop_slot(&slot("klio")).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SlotMissing, "{e}");
}

#[tokio::test]
async fn streamed_bytes_are_postgres_own_over_tls_and_from_inside_a_segment() {
    let (pg, _, ca) = with_tls("hostssl replication klio 127.0.0.1/32 scram-sha-256").await;
    let login =
        tcp(&pg, &format!("user=klio password='open sesame' sslmode=verify-ca sslrootcert={ca}"));
    let mut client = Client::connect(&login).await.unwrap();
    let made = client.create_slot(&slot("klio")).await.unwrap();
    let end = pg.fill(6).await;
    let start = made.restart_lsn.segment_start(mib1());
    let mut stream = client.start(Some(&slot("klio")), tli(1), start).await.unwrap();
    let got = read_to(&mut stream, end).await;
    assert!(end.bytes_since(start) >= 6 << 20);
    assert!(got[..end.bytes_since(start) as usize] == files(&pg, 1, start, end));

    // The same from 12345 bytes into the second segment, on the same connection.
    let client = stream.finish().await.unwrap().client.unwrap();
    let start = start.advance(mib1().bytes() + 12_345);
    let mut stream = client.start(Some(&slot("klio")), tli(1), start).await.unwrap();
    let got = read_to(&mut stream, end).await;
    assert!(got[..end.bytes_since(start) as usize] == files(&pg, 1, start, end));
}

#[tokio::test]
async fn reads_dropped_half_way_lose_nothing() {
    let pg = Cluster::start(&[]).await;
    let mut client = pg.client().await;
    let made = client.create_slot(&slot("klio")).await.unwrap();
    let end = pg.fill(4).await;
    let start = made.restart_lsn.segment_start(mib1());
    let mut stream = client.start(Some(&slot("klio")), tli(1), start).await.unwrap();
    let (mut got, mut dropped) = (Vec::new(), 0);
    while stream.next_lsn() < end {
        tokio::select! {
            biased;
            () = tokio::task::yield_now() => {
                dropped += 1;
                stream.send_status(&status(Lsn::ZERO)).await.unwrap();
                while let Some(Event::Message(m)) = stream.try_next().unwrap() {
                    if let ReplicationMessage::XLogData(wal) = m {
                        got.extend_from_slice(&wal.data);
                    }
                }
            }
            event = stream.next() => {
                if let Event::Message(ReplicationMessage::XLogData(wal)) = event.unwrap() {
                    got.extend_from_slice(&wal.data);
                }
            }
        }
        // Poll the read at least once before it is dropped.
        if let Ok(event) = tokio::time::timeout(Duration::from_micros(50), stream.next()).await
            && let Event::Message(ReplicationMessage::XLogData(wal)) = event.unwrap()
        {
            got.extend_from_slice(&wal.data);
        }
    }
    assert!(dropped > 0);
    assert!(got[..end.bytes_since(start) as usize] == files(&pg, 1, start, end));
}

#[tokio::test]
async fn reported_positions_reach_the_server_and_move_the_slot() {
    let pg = Cluster::start(&[]).await;
    let mut client = pg.client().await;
    let made = client.create_slot(&slot("klio")).await.unwrap();
    let end = pg.fill(2).await;
    let start = made.restart_lsn.segment_start(mib1());
    let mut stream = client.start(Some(&slot("klio")), tli(1), start).await.unwrap();
    read_to(&mut stream, end).await;
    let flushed = end.segment_start(mib1());
    let update = StatusUpdate { written: end.advance(8), ..status(flushed) };
    stream.send_status(&update).await.unwrap();
    let seen = eventually("positions arrive", || async {
        pg.sql("SELECT write_lsn || ' ' || flush_lsn FROM pg_stat_replication").await
    })
    .await;
    assert_eq!(seen, format!("{} {flushed}", update.written));
    let restart = pg.lsn("SELECT restart_lsn FROM pg_replication_slots").await;
    assert_eq!(restart, flushed);
    let name = pg.sql("SELECT application_name FROM pg_stat_replication").await;
    assert_eq!(name.as_deref(), Some("klio"));
}

#[tokio::test]
async fn promoted_standby_gives_the_next_timeline_and_the_switch_lsn() {
    // A standby removes streamed WAL at its next restart point.
    let primary = Cluster::start(&["wal_keep_size=64MB"]).await;
    let standby = primary.standby().await;
    let client = standby.client().await;
    assert!(client.in_hot_standby());
    let start = primary.fill(2).await;
    eventually("the standby has it", || async {
        let received = standby.lsn("SELECT pg_last_wal_receive_lsn()").await;
        (received >= start).then_some(())
    })
    .await;
    let mut stream = client.start(None, tli(1), start).await.unwrap();
    primary.fill(1).await;
    standby.sql("SELECT pg_promote()").await;
    let StreamEnd::TimelineEnded { next, switch } = read_end(&mut stream).await else {
        panic!("expected the end of the timeline")
    };
    assert_eq!((next, stream.next_lsn()), (tli(2), switch));
    // The end is returned again.
    assert!(matches!(stream.next().await, Ok(Event::End(StreamEnd::TimelineEnded { .. }))));

    let mut client = stream.finish().await.unwrap().client.unwrap();
    let history = client.timeline_history(next).await.unwrap();
    let history = TimelineHistory::parse(next, &history).unwrap();
    assert_eq!(history.switch_point(), Some(switch));

    // Requesting the old timeline at its very end is answered at once.
    let mut stream = client.start(None, tli(1), switch).await.unwrap();
    assert_eq!(read_end(&mut stream).await, StreamEnd::TimelineEnded { next, switch });

    // Like pg_receivewal: the new timeline from the start of the segment that contains the switch point.
    let client = stream.finish().await.unwrap().client.unwrap();
    let start = switch.segment_start(mib1());
    let end = standby.fill(1).await;
    let mut stream = client.start(None, next, start).await.unwrap();
    let got = read_to(&mut stream, end).await;
    assert!(got[..end.bytes_since(start) as usize] == files(&standby, 2, start, end));

    // The old timeline beyond the switch point, and a timeline that does not exist.
    let beyond = standby.client().await.start(None, tli(1), switch.advance(1 << 20)).await;
    assert_eq!(beyond.unwrap_err().kind(), ErrorKind::TimelineMissing);
    let unknown = standby.client().await.start(None, tli(9), switch).await;
    assert_eq!(unknown.unwrap_err().kind(), ErrorKind::TimelineMissing);
}

#[tokio::test]
async fn target_session_attrs_finds_the_wanted_role() {
    let primary = Cluster::start(&[]).await;
    let standby = primary.standby().await;
    let login = |wanted: &str| {
        info(&format!(
            "host={},{} port={},{} user=postgres target_session_attrs={wanted}",
            standby.dir.path().display(),
            primary.dir.path().display(),
            standby.port,
            primary.port
        ))
    };
    for (wanted, port) in [
        ("any", standby.port),
        ("primary", primary.port),
        ("read-write", primary.port),
        ("standby", standby.port),
        ("read-only", standby.port),
        ("prefer-standby", standby.port),
    ] {
        assert_eq!(Client::connect(&login(wanted)).await.unwrap().host().port, port, "{wanted}");
    }
    // A host that cannot be reached is skipped; a role that no host has is an error.
    let dead = format!("host=/nonexistent,{}", primary.dir.path().display());
    let dead = format!("{dead} port=1,{} user=postgres", primary.port);
    assert_eq!(Client::connect(&info(&dead)).await.unwrap().host().port, primary.port);
    let e = refused(&primary.info("target_session_attrs=standby")).await;
    assert_eq!(e.kind(), ErrorKind::Connect);
    assert!(e.to_string().contains("expected a standby, found a primary"), "{e}");
    Client::connect(&primary.info("target_session_attrs=prefer-standby")).await.unwrap();
}

#[tokio::test]
async fn removed_wal_is_reported_as_such() {
    let pg = Cluster::start(&["min_wal_size=2MB", "max_wal_size=2MB", "wal_recycle=off"]).await;
    let start = pg.lsn("SELECT pg_current_wal_flush_lsn()").await.segment_start(mib1());
    for _ in 0..3 {
        pg.fill(2).await;
    }
    let mut stream = pg.client().await.start(None, tli(1), start).await.unwrap();
    let e = stream.next().await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::WalRemoved, "{e}");
    assert!(stream.next().await.is_err());
}

#[tokio::test]
async fn invalidated_slot_holds_nothing_and_its_wal_is_removed() {
    let pg = Cluster::start(&[
        "min_wal_size=2MB",
        "max_wal_size=2MB",
        "wal_recycle=off",
        "max_slot_wal_keep_size=1MB",
    ])
    .await;
    let mut client = pg.client().await;
    let made = client.create_slot(&slot("klio")).await.unwrap();
    eventually("the slot is lost", || async {
        pg.fill(2).await;
        let lost = pg.sql("SELECT wal_status FROM pg_replication_slots").await;
        (lost.as_deref() == Some("lost")).then_some(())
    })
    .await;
    let state = client.read_slot(&slot("klio")).await.unwrap().unwrap();
    assert_eq!(state.restart_lsn, None);
    let e = match client.start(Some(&slot("klio")), tli(1), made.restart_lsn).await {
        Err(e) => e,
        Ok(mut stream) => loop {
            match stream.next().await {
                Ok(_) => {}
                Err(e) => break e,
            }
        },
    };
    assert_eq!(e.kind(), ErrorKind::WalRemoved, "{e}");
}

#[tokio::test]
async fn slot_in_use_missing_slot_and_a_start_ahead_of_the_server_are_told_apart() {
    let pg = Cluster::start(&[]).await;
    let mut client = pg.client().await;
    let made = client.create_slot(&slot("klio")).await.unwrap();
    let _busy = client.start(Some(&slot("klio")), tli(1), made.restart_lsn).await.unwrap();
    let start = async |name: &str, at: Lsn| {
        pg.client().await.start(Some(&slot(name)), tli(1), at).await.unwrap_err()
    };
    let e = start("klio", made.restart_lsn).await;
    assert_eq!(e.kind(), ErrorKind::SlotInUse, "{e}");
    let e = pg.client().await.drop_slot(&slot("klio")).await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SlotInUse, "{e}");
    let e = start("other", made.restart_lsn).await;
    assert_eq!(e.kind(), ErrorKind::SlotMissing, "{e}");
    pg.client().await.create_slot(&slot("other")).await.unwrap();
    let ahead = made.restart_lsn.advance(1 << 40);
    let mut stream = pg.client().await.start(Some(&slot("other")), tli(1), ahead).await.unwrap();
    let e = stream.next().await.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::StartAheadOfServer, "{e}");
    assert!(e.hint().is_some());
}

#[tokio::test]
async fn server_shutdown_ends_the_stream_after_its_last_byte() {
    let mut pg = Cluster::start(&[]).await;
    let start = pg.lsn("SELECT pg_current_wal_flush_lsn()").await;
    let mut stream = pg.client().await.start(None, tli(1), start).await.unwrap();
    read_to(&mut stream, start).await;
    pg.signal(Signal::INT);
    let end = loop {
        match stream.next().await.unwrap() {
            Event::End(end) => break end,
            Event::Message(_) => {
                let at = stream.next_lsn();
                stream.send_status(&status(at)).await.unwrap();
            }
        }
    };
    assert_eq!(end, StreamEnd::ServerShutdown);
    assert!(stream.finish().await.unwrap().client.is_none());
    pg.wait_stopped();
}

#[tokio::test]
async fn last_words_of_the_server_are_heard_although_it_no_longer_listens() {
    let pg = Cluster::start(&[]).await;
    let start = pg.lsn("SELECT pg_current_wal_flush_lsn()").await;
    for login in [pg.info(""), tcp(&pg, "user=postgres")] {
        let mut stream =
            Client::connect(&login).await.unwrap().start(None, tli(1), start).await.unwrap();
        pg.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_replication").await;
        eventually("the walsender is gone", || async {
            let left = pg.sql("SELECT count(*) FROM pg_stat_replication").await;
            (left.as_deref() == Some("0")).then_some(())
        })
        .await;
        for _ in 0..3 {
            stream.send_status(&status(start)).await.unwrap();
        }
        let e = loop {
            if let Err(e) = stream.next().await {
                break e;
            }
        };
        assert_eq!(e.server().map(|s| s.sqlstate.as_str()), Some("57P01"), "{e}");
        assert_eq!(e.kind(), ErrorKind::Connect);
    }
}

#[tokio::test]
async fn killed_server_is_an_io_or_connect_error() {
    let pg = Cluster::start(&[]).await;
    let start = pg.lsn("SELECT pg_current_wal_flush_lsn()").await;
    let mut stream = pg.client().await.start(None, tli(1), start).await.unwrap();
    pg.signal(Signal::QUIT);
    let e = loop {
        if let Err(e) = stream.next().await {
            break e;
        }
    };
    assert!(matches!(e.kind(), ErrorKind::Io | ErrorKind::Connect), "{e}");
}

#[tokio::test]
async fn silent_server_is_asked_first_and_then_given_up() {
    // This server sends no keepalives unless it is asked.
    let pg = Cluster::start(&["wal_sender_timeout=0"]).await;
    let start = pg.lsn("SELECT pg_current_wal_flush_lsn()").await;
    let mut client = pg.client().await;
    let patience = Duration::from_millis(600);
    client.set_patience(patience);
    let mut stream = client.start(None, tli(1), start).await.unwrap();
    // Alive but idle: its answers arrive for several times the patience.
    let begun = Instant::now();
    while begun.elapsed() < patience * 4 {
        stream.next().await.unwrap();
    }
    let walsender = pg.sql("SELECT pid FROM pg_stat_replication").await.unwrap();
    let walsender = Pid::from_raw(walsender.parse().unwrap()).unwrap();
    kill_process(walsender, Signal::STOP).unwrap();
    let begun = Instant::now();
    let e = loop {
        if let Err(e) = stream.next().await {
            break e;
        }
    };
    kill_process(walsender, Signal::CONT).unwrap();
    assert_eq!(e.kind(), ErrorKind::Io, "{e}");
    assert!(e.to_string().contains("expected a message within"), "{e}");
    assert!(begun.elapsed() < patience * 3, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_listener_that_never_answers_costs_the_connect_timeout() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let e = refused(&info(&format!("host=127.0.0.1 port={port} user=u connect_timeout=1"))).await;
    assert_eq!(e.kind(), ErrorKind::Connect, "{e}");
    assert!(e.to_string().contains("within 1 s"), "{e}");
}
