//! The run loop between a simulated PostgreSQL and a fake server, over real gRPC.

mod postgres;

use super::*;
use crate::{
    config,
    fake_server::{FakeServer, HeldWal, lsn},
};
use klio_proto::Code;
use opentelemetry::metrics::{MeterProvider, noop::NoopMeterProvider};
use postgres::{FakePostgres, SEGMENT};
use std::sync::Arc;
use tokio::task::JoinSet;

const START: u64 = 3 * SEGMENT;

/// A running streamer.
struct Rig {
    server: FakeServer,
    postgres: FakePostgres,
    state: Arc<State>,
    stop: CancellationToken,
    tasks: JoinSet<Result<(), Error>>,
}

impl Rig {
    async fn new(postgres: FakePostgres, setup: impl FnOnce(&FakeServer, &mut Options)) -> Self {
        let server = FakeServer::start().await;
        let mut options = Options {
            cluster: "pg-1".parse().unwrap(),
            on_gap: OnGap::Record,
            batch_bytes: 256 << 10,
            status_interval: Duration::from_millis(20),
            retry_min: Duration::from_millis(1),
            retry_max: Duration::from_millis(20),
            stop_timeout: Duration::from_secs(10),
        };
        setup(&server, &mut options);
        let settings = config::Server {
            address: server.address.clone(),
            unsafe_plaintext: true,
            ..config::Server::default()
        };
        let meter = NoopMeterProvider::new().meter("test");
        let metrics = Metrics::new(&meter, "pg-1");
        let state = Arc::clone(&metrics.state);
        let link = ServerLink::new(&settings).unwrap();
        let streamer = Streamer::new(postgres.clone(), link, options, metrics);
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(streamer.run(stop.clone()));
        Self { server, postgres, state, stop, tasks }
    }

    async fn ended(&mut self) -> Result<(), Error> {
        let ended = tokio::time::timeout(Duration::from_secs(20), self.tasks.join_next()).await;
        ended.expect("the streamer ends").unwrap().unwrap()
    }

    async fn stop(mut self) -> FakeServer {
        self.stop.cancel();
        self.ended().await.unwrap();
        let wrong = self.server.script().wrong.clone();
        assert!(wrong.is_empty(), "{wrong:?}");
        self.server
    }

    /// Waits until PostgreSQL has heard that everything up to `end` is flushed.
    async fn flushed(&self, end: u64) {
        self.postgres
            .until("flush reported", |inner| {
                inner.reports.iter().any(|r| r.flushed.as_u64() >= end)
            })
            .await;
    }
}

#[tokio::test]
async fn all_wal_arrives_and_postgres_hears_of_it() {
    let end = START + 5 * SEGMENT + 4711;
    let rig = Rig::new(FakePostgres::new(START + 99, end), |_, _| {}).await;
    rig.flushed(end).await;
    assert!(rig.state.is_connected());
    assert_eq!(rig.postgres.flushed(), end);
    assert_eq!(rig.postgres.inner().starts, [(1, START)]);
    let server = rig.stop().await;
    let held = server.script().timelines[&1];
    assert_eq!((held.start, held.flushed), (START, end));
}

/// P1: another streamer reported WAL to PostgreSQL as flushed that it had only sent.
#[tokio::test]
async fn postgres_never_hears_more_than_the_server_flushed() {
    let end = START + SEGMENT / 2;
    let rig =
        Rig::new(FakePostgres::new(START, end), |server, _| server.change(|s| s.hold_acks = true))
            .await;
    rig.server
        .until("all is received", |s| s.timelines.get(&1).is_some_and(|t| t.received == end))
        .await;
    rig.postgres
        .until("received is reported", |p| p.reports.iter().any(|r| r.written == lsn(end)))
        .await;
    assert_eq!(rig.postgres.flushed(), 0, "flushed before the server flushed");
    rig.server.change(|s| s.hold_acks = false);
    rig.flushed(end).await;
    let (highest, acked) = (rig.postgres.flushed(), rig.server.script().max_acked);
    assert!(highest <= acked, "reported {highest}, acknowledged {acked}");
    rig.stop().await;
}

#[tokio::test]
async fn the_window_holds_and_reading_stops_when_it_is_full() {
    let (window, end) = (200_000, START + 8 * SEGMENT);
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        server.change(|s| {
            s.hold_acks = true;
            s.window = window;
        });
    })
    .await;
    rig.server.until("the window is full", |s| s.max_outstanding == window).await;
    // Two status rounds later nothing more has been read.
    let reports = rig.postgres.inner().reports.len();
    rig.postgres.until("signs of life go on", |p| p.reports.len() > reports + 2).await;
    let read = rig.postgres.inner().sent - START;
    assert!(read <= window + (256 << 10) + (128 << 10), "{read} bytes read");
    rig.server.change(|s| s.hold_acks = false);
    rig.flushed(end).await;
    assert_eq!(rig.stop().await.script().max_outstanding, window);
}

/// P2.
#[tokio::test]
async fn a_broken_stream_resumes_at_the_servers_position() {
    let end = START + 6 * SEGMENT + 5;
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        server.change(|s| s.break_after = Some(START + 2 * SEGMENT));
    })
    .await;
    rig.flushed(end).await;
    let server = rig.stop().await;
    let script = server.script();
    assert_eq!(script.opens.len(), 2);
    assert!(script.opens[1].start_lsn > START, "began anew at {}", script.opens[1].start_lsn);
    assert_eq!(script.opens[0].writer_id, script.opens[1].writer_id);
}

/// A commit may wait for an acknowledgement that was lost with the previous process.
#[tokio::test]
async fn what_is_durable_already_is_reported_without_new_wal() {
    let end = START + 12_345;
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        let held = HeldWal { start: START, received: end, flushed: end };
        server.change(|s| s.hold(1, held));
    })
    .await;
    rig.flushed(end).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_refusal_that_does_not_pass_ends_with_its_code() {
    for code in Code::ALL.iter().filter(|code| !code.retryable()) {
        let mut rig = Rig::new(FakePostgres::new(START, START + 10), |server, _| {
            server.change(|s| s.refuse_opens = vec![*code]);
        })
        .await;
        let error = rig.ended().await.unwrap_err();
        assert_eq!(crate::cli::exit::of(&error), code.exit(), "{code:?}");
        assert_eq!(error.hint, code.hint());
    }
}

#[tokio::test]
async fn a_refusal_that_passes_is_tried_again() {
    let end = START + 10;
    let codes: Vec<Code> = Code::ALL.iter().copied().filter(|code| code.retryable()).collect();
    let count = codes.len();
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        server.change(|s| s.refuse_opens = codes);
    })
    .await;
    rig.flushed(end).await;
    assert_eq!(rig.stop().await.script().opens.len(), count + 1);
}

#[tokio::test]
async fn a_promotion_is_followed_and_histories_are_stored() {
    let switch = START + SEGMENT + 300;
    let postgres = FakePostgres::new(START, switch);
    let rig = Rig::new(postgres.clone(), |_, _| {}).await;
    rig.flushed(switch).await;
    postgres.promote(3, switch + 2 * SEGMENT);
    rig.flushed(switch + 2 * SEGMENT).await;
    postgres.promote(4, switch + 3 * SEGMENT);
    rig.flushed(switch + 3 * SEGMENT).await;
    let server = rig.stop().await;
    let script = server.script();
    let opened: Vec<u32> = script.opens.iter().map(|o| o.timeline).collect();
    assert_eq!(opened, [1, 3, 4], "the next timeline is not always one more");
    assert_eq!(script.timelines[&1].flushed, switch);
    assert_eq!(script.timelines[&3].start, START + SEGMENT, "from the segment of the switch");
    assert_eq!(script.histories.keys().copied().collect::<Vec<_>>(), [3, 4]);
    let gaps = script.opens.iter().filter(|o| o.gap.is_some()).count();
    assert_eq!(gaps, 0);
}

/// The new primary has WAL that the old one had not sent before it failed.
#[tokio::test]
async fn an_unfinished_ancestor_is_finished_from_the_new_primary() {
    let switch = START + 2 * SEGMENT + 300;
    let postgres = FakePostgres::new(START, switch);
    postgres.promote(2, switch + SEGMENT);
    let held = START + SEGMENT + 7;
    let rig = Rig::new(postgres, |server, _| {
        let held = HeldWal { start: START, received: held, flushed: held };
        server.change(|s| s.hold(1, held));
    })
    .await;
    rig.flushed(switch + SEGMENT).await;
    let starts = rig.postgres.inner().starts.clone();
    assert_eq!(starts, [(1, held), (2, START + 2 * SEGMENT)]);
    assert_eq!(rig.stop().await.script().timelines[&1].flushed, switch);
}

/// P11: the old primary's own history continues past the point that the server holds.
#[tokio::test]
async fn another_history_is_never_appended() {
    let held = START + SEGMENT + 5000;
    let postgres = FakePostgres::new(START, START + 4 * SEGMENT);
    postgres.change(|inner| inner.other_from = Some(START + 20_000));
    let mut rig = Rig::new(postgres, |server, _| {
        let held = HeldWal { start: START, received: held, flushed: held };
        server.change(|s| s.hold(1, held));
    })
    .await;
    let error = rig.ended().await.unwrap_err();
    assert_eq!(crate::cli::exit::of(&error), 25);
    let script = rig.server.script();
    assert!(script.opens.is_empty(), "opened nevertheless");
    // A copied slot still has the position of the time of the copy, so the comparison begins there.
    assert_eq!(script.compares[0].start_lsn, START);
    drop(script);
}

fn generation(
    number: u32,
    state: &str,
    flushed: Option<u64>,
) -> klio_proto::v1::GenerationPosition {
    let position = |flushed_lsn| klio_proto::v1::TimelinePosition {
        timeline: 1,
        start_lsn: START,
        flushed_lsn,
        has_history: false,
        missing: vec![],
        damaged: vec![],
    };
    klio_proto::v1::GenerationPosition {
        number,
        state: state.into(),
        same_system: true,
        timelines: flushed.into_iter().map(position).collect(),
        decided: String::new(),
        unclear: String::new(),
    }
}

/// The generation is found by WAL content, at every connection.
#[tokio::test]
async fn the_generation_whose_bytes_are_postgresqls_is_taken() {
    let held = START + SEGMENT + 5000;
    let rig = Rig::new(FakePostgres::new(START, START + 4 * SEGMENT), |server, _| {
        let found = HeldWal { start: START, received: held, flushed: held };
        server.change(|s| {
            s.hold(1, found);
            s.generations = vec![
                generation(1, "current", Some(held + 77)),
                generation(3, "undecided", Some(held)),
                generation(2, "retired", Some(held)),
            ];
            s.others = vec!["pg-1@1".into(), "pg-1@2".into()];
        });
    })
    .await;
    rig.flushed(START + 4 * SEGMENT).await;
    let server = rig.stop().await;
    assert_eq!(server.script().opens[0].cluster, "pg-1@3");
}

#[tokio::test]
async fn a_history_that_a_person_has_closed_ends_the_program() {
    let held = START + SEGMENT + 5000;
    let mut rig = Rig::new(FakePostgres::new(START, START + 4 * SEGMENT), |server, _| {
        server.change(|s| {
            s.generations =
                vec![generation(1, "current", Some(held)), generation(2, "retired", Some(held))];
            s.others = vec!["pg-1@1".into()];
            s.begins = Some(3);
        });
    })
    .await;
    let error = rig.ended().await.unwrap_err();
    assert_eq!(error.failure, Failure::Code(Code::Diverged));
    assert!(error.message.contains("generation 2") && error.message.contains("retired"), "{error}");
}

/// Nothing that PostgreSQL still has can be compared. With one history no other is possible; with several, the
/// streamer must not guess.
#[tokio::test]
async fn what_cannot_be_compared_goes_on_only_where_there_is_no_choice() {
    for (others, expected) in [(vec![], "pg-1@1"), (vec![2], "pg-1@3")] {
        let held = START + SEGMENT;
        let postgres = FakePostgres::new(START + SEGMENT, START + 3 * SEGMENT);
        let rig = Rig::new(postgres, |server, _| {
            server.change(|s| {
                let found = HeldWal { start: START, received: held, flushed: held };
                s.hold(1, found);
                s.generations = vec![generation(1, "current", Some(held))];
                let other = |number: &u32| generation(*number, "undecided", Some(held));
                s.generations.extend(others.iter().map(other));
                s.begins = Some(3);
            });
        })
        .await;
        rig.flushed(START + 3 * SEGMENT).await;
        let server = rig.stop().await;
        assert_eq!(server.script().opens[0].cluster, expected);
    }
}

/// A server whose tier 1 was lost, to which only the undecided generation 2 has streamed again. `far` is what tier 2 has
/// of the first one.
async fn second_after_a_lost_tier1(
    state: &str,
    far: Option<Vec<klio_proto::v1::GenerationPosition>>,
    change: impl FnOnce(&mut crate::fake_server::Script),
) -> Rig {
    let held = START + SEGMENT + 5000;
    let near = vec![generation(1, state, None), generation(2, "undecided", Some(held + 77))];
    let rank = |mut all: Vec<klio_proto::v1::GenerationPosition>| {
        all.sort_by_key(|g| g.state == "retired");
        all
    };
    let held = HeldWal { start: START, received: held, flushed: held };
    Rig::new(FakePostgres::new(START, START + 4 * SEGMENT), |server, _| {
        server.change(|s| {
            s.hold(1, held);
            s.generations = rank(near);
            s.in_tier2 = far.map(rank);
            s.others = vec!["pg-1@2".into()];
            s.begins = Some(3);
            change(s);
        });
    })
    .await
}

fn in_tier2(state: &str) -> Option<Vec<klio_proto::v1::GenerationPosition>> {
    let held = START + SEGMENT + 5000;
    Some(vec![generation(1, state, Some(held)), generation(2, "undecided", Some(held + 77))])
}

/// P11, regression test: the PostgreSQL that connected second after a lost tier 1 was told to begin where tier 2 does not
/// end, again and again.
#[tokio::test]
async fn what_tier_1_lost_is_looked_for_in_tier_2() {
    let rig = second_after_a_lost_tier1("current", in_tier2("current"), |_| {}).await;
    rig.flushed(START + 4 * SEGMENT).await;
    let server = rig.stop().await;
    let script = server.script();
    assert_eq!(script.opens[0].cluster, "pg-1@1");
    assert_eq!(script.opens[0].start_lsn, START + SEGMENT + 5000);
    assert_eq!((script.tier2_asked, script.empty_asked), (0, 1));
}

/// A server of before does not know the question; a start that it refuses is reason to ask it for everything.
#[tokio::test]
async fn a_refused_beginning_is_reason_to_ask_tier_2() {
    let rig = second_after_a_lost_tier1("current", in_tier2("current"), |s| {
        s.asks_no_empty = true;
    })
    .await;
    rig.server.until("tier 2 asked", |s| s.tier2_asked > 0).await;
    rig.flushed(START + 4 * SEGMENT).await;
    rig.stop.cancel();
    let script = rig.server.script();
    let opens: Vec<_> = script.opens.iter().map(|o| (o.cluster.as_str(), o.start_lsn)).collect();
    assert_eq!(opens, [("pg-1@1", START + SEGMENT + 5000)], "{:?}", script.wrong);
    assert_eq!(script.tier2_asked, 1);
}

/// P4: what continues WAL on tier 1 does not wait for the bucket.
#[tokio::test]
async fn a_stream_that_tier_1_proves_asks_no_bucket() {
    let rig = second_after_a_lost_tier1("current", None, |s| {
        let held = s.timelines[&1].flushed;
        s.generations =
            vec![generation(1, "current", None), generation(2, "undecided", Some(held))];
        s.others.clear();
    })
    .await;
    rig.flushed(START + 4 * SEGMENT).await;
    let server = rig.stop().await;
    let script = server.script();
    assert_eq!(script.opens[0].cluster, "pg-1@2");
    assert_eq!((script.tier2_asked, script.empty_asked), (0, 0));
}

/// P11, regression test: a closed history of which tier 1 holds nothing was not compared, and received as a new one.
#[tokio::test]
async fn a_closed_history_that_only_tier_2_has_stays_closed() {
    let mut rig = second_after_a_lost_tier1("retired", in_tier2("retired"), |_| {}).await;
    let error = rig.ended().await.unwrap_err();
    assert_eq!(crate::cli::exit::of(&error), 25);
    assert!(error.message.contains("generation 1") && error.message.contains("retired"), "{error}");
    assert!(rig.server.script().opens.is_empty());
}

/// Nothing begins while it is not known whether PostgreSQL continues a closed history.
#[tokio::test]
async fn what_cannot_be_compared_with_a_closed_history_waits_for_the_bucket() {
    for unreadable in [vec![], vec!["pg-1@1".to_owned()]] {
        let far = in_tier2("retired").filter(|_| !unreadable.is_empty());
        let mut rig =
            second_after_a_lost_tier1("retired", far, |s| s.unreadable = unreadable).await;
        rig.server.until("asked again", |s| s.empty_asked > 2).await;
        assert!(rig.server.script().opens.is_empty());
        rig.server.change(|s| {
            s.unreadable.clear();
            s.in_tier2 = in_tier2("retired");
        });
        let error = rig.ended().await.unwrap_err();
        assert_eq!(error.failure, Failure::Code(Code::Diverged), "{error}");
    }
}

/// P4, regression test: one damaged record of a closed history in the bucket ended the stream of every PostgreSQL.
#[tokio::test]
async fn a_generation_that_cannot_be_read_holds_up_only_who_may_continue_it() {
    let unclear = |number| klio_proto::v1::GenerationPosition {
        unclear: "cluster.json is damaged".into(),
        ..generation(number, "retired", None)
    };
    let mut far = in_tier2("current").unwrap();
    far.push(unclear(3));
    let rig = second_after_a_lost_tier1("current", Some(far), |s| {
        s.generations.push(generation(3, "retired", None));
    })
    .await;
    rig.flushed(START + 4 * SEGMENT).await;
    assert_eq!(rig.stop().await.script().opens[0].cluster, "pg-1@1");
    // Nothing else can be PostgreSQL's history: it waits until a person has repaired the record.
    let far = vec![unclear(1), generation(2, "undecided", Some(START + SEGMENT + 5077))];
    let rig = second_after_a_lost_tier1("retired", Some(far), |_| {}).await;
    rig.server.until("asked again", |s| s.empty_asked > 2).await;
    assert!(rig.server.script().opens.is_empty());
}

/// P4: there is no other history to go on with, whatever the bucket has.
#[tokio::test]
async fn a_stream_that_can_go_on_does_not_depend_on_the_bucket() {
    let held = START + SEGMENT;
    let rig = Rig::new(FakePostgres::new(START + SEGMENT, START + 3 * SEGMENT), |server, _| {
        server.change(|s| {
            s.hold(1, HeldWal { start: START, received: held, flushed: held });
            s.generations =
                vec![generation(1, "current", Some(held)), generation(2, "retired", None)];
            s.tier2_fails = Some(Code::Corrupt);
        });
    })
    .await;
    rig.flushed(START + 3 * SEGMENT).await;
    let server = rig.stop().await;
    let script = server.script();
    assert_eq!((script.empty_asked, script.opens.len()), (1, 1));
}

/// P8.
#[tokio::test]
async fn an_old_primary_ends_with_stale_timeline() {
    let mut rig = Rig::new(FakePostgres::new(START, START + SEGMENT), |server, _| {
        let held = HeldWal { start: START, received: START, flushed: START };
        server.change(|s| s.hold(2, held));
    })
    .await;
    let error = rig.ended().await.unwrap_err();
    assert_eq!(error.failure, Failure::Code(Code::StaleTimeline));
    assert!(rig.server.script().opens.is_empty(), "opened nevertheless");
}

#[tokio::test]
async fn a_primary_that_lost_wal_is_refused_and_a_lagging_standby_is_waited_for() {
    let ahead = START + SEGMENT;
    let setup = |server: &FakeServer, _: &mut Options| {
        let held = HeldWal { start: START, received: ahead, flushed: ahead };
        server.change(|s| s.hold(1, held));
    };
    let mut rig = Rig::new(FakePostgres::new(START, START + 10), setup).await;
    assert_eq!(rig.ended().await.unwrap_err().failure, Failure::Code(Code::Diverged));
    // A server of an earlier version compares nothing, so the position check refuses the stream.
    let before = |server: &FakeServer, options: &mut Options| {
        setup(server, options);
        server.change(|s| s.compares_nothing = true);
    };
    let mut rig = Rig::new(FakePostgres::new(START, START + 10), before).await;
    assert_eq!(rig.ended().await.unwrap_err().failure, Failure::PostgresRefused);
    let standby = FakePostgres::new(START, START + 10);
    standby.change(|inner| inner.in_recovery = true);
    let rig = Rig::new(standby.clone(), setup).await;
    rig.server.until("it asks again", |s| s.positions_asked > 2).await;
    standby.change(|inner| inner.end = ahead + 20);
    rig.flushed(ahead + 20).await;
    rig.stop().await;
}

fn removed() -> (FakePostgres, HeldWal) {
    let postgres = FakePostgres::new(START, START + 6 * SEGMENT);
    postgres.change(|inner| {
        inner.oldest = START + 4 * SEGMENT;
        inner.slot = START + 4 * SEGMENT + 50;
    });
    let at = START + SEGMENT + 7;
    (postgres, HeldWal { start: START, received: at, flushed: at })
}

#[tokio::test]
async fn removed_wal_is_declared_as_a_gap_never_skipped_silently() {
    let (postgres, held) = removed();
    let rig = Rig::new(postgres, |server, _| server.change(|s| s.hold(1, held))).await;
    rig.flushed(START + 6 * SEGMENT).await;
    let server = rig.stop().await;
    let script = server.script();
    assert_eq!(script.opens.len(), 2, "removal is found out once");
    let gap = script.opens[1].gap.clone().unwrap();
    assert_eq!((gap.from_lsn, gap.to_lsn), (held.flushed, START + 4 * SEGMENT));
}

/// PostgreSQL has more WAL than the slot retains.
#[tokio::test]
async fn a_gap_ends_at_the_oldest_wal_that_postgresql_has_and_not_at_the_slot() {
    let (postgres, held) = removed();
    postgres.change(|inner| {
        inner.end = START + 20 * SEGMENT;
        inner.slot = START + 19 * SEGMENT;
    });
    let rig = Rig::new(postgres, |server, _| server.change(|s| s.hold(1, held))).await;
    rig.flushed(START + 20 * SEGMENT).await;
    assert!(rig.postgres.inner().looked.len() <= 5, "{:?}", rig.postgres.inner().looked);
    let server = rig.stop().await;
    let script = server.script();
    let gap = script.opens.last().unwrap().gap.clone().unwrap();
    assert_eq!((gap.from_lsn, gap.to_lsn), (held.flushed, START + 4 * SEGMENT));
    // Tier 2 is asked only before a gap is declared (P4).
    assert_eq!((script.positions_asked, script.tier2_asked), (2, 1));
}

/// A tier 1 was lost while a later segment was already in tier 2.
#[tokio::test]
async fn what_the_server_misses_is_asked_for_again_while_postgresql_has_it() {
    let end = START + 9 * SEGMENT;
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        let at = START + 5 * SEGMENT;
        let stretch = |from, to| klio_proto::v1::Stretch { from_lsn: from, to_lsn: to };
        server.change(|s| {
            s.hold(1, HeldWal { start: START, received: at, flushed: at });
            s.missing = vec![stretch(START - SEGMENT, START), stretch(START + SEGMENT, at)];
        });
    })
    .await;
    rig.flushed(end).await;
    assert_eq!(rig.postgres.inner().starts, [(1, START + SEGMENT)]);
    rig.stop().await;
}

/// A segment in the middle rotted on the server: it is sent again while the stream continues.
#[tokio::test]
async fn what_the_server_lost_in_the_middle_is_given_again_beside_the_stream() {
    let (end, at) = (START + 9 * SEGMENT, START + 5 * SEGMENT);
    let stretch = |n: u64| klio_proto::v1::Stretch {
        from_lsn: START + n * SEGMENT,
        to_lsn: START + (n + 1) * SEGMENT,
    };
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        server.change(|s| {
            s.hold(1, HeldWal { start: START, received: at, flushed: at });
            s.damaged = vec![stretch(1), stretch(3)];
        });
    })
    .await;
    rig.flushed(end).await;
    rig.server.until("both segments given again", |s| s.damaged.is_empty()).await;
    let given = [3, 1].map(|n| (START + n * SEGMENT, SEGMENT));
    assert_eq!(rig.server.script().refilled, given, "the newest first, whole");
    assert_eq!(rig.postgres.inner().starts, [(1, at)], "nothing is streamed twice");
    rig.stop().await;
}

#[tokio::test]
async fn removed_wal_ends_with_22_when_told_to_stop() {
    let (postgres, held) = removed();
    let mut rig = Rig::new(postgres, |server, options| {
        server.change(|s| s.hold(1, held));
        options.on_gap = OnGap::Stop;
    })
    .await;
    let error = rig.ended().await.unwrap_err();
    assert_eq!(crate::cli::exit::of(&error), 22);
    assert!(rig.server.script().opens.iter().all(|open| open.gap.is_none()), "recorded");
}

/// WAL that has arrived is worth saving, above all when its PostgreSQL is gone for good.
#[tokio::test]
async fn what_a_dying_postgres_had_sent_becomes_durable() {
    let end = START + 3 * SEGMENT;
    let postgres = FakePostgres::new(START, end);
    let rig = Rig::new(postgres.clone(), |server, _| server.change(|s| s.hold_acks = true)).await;
    rig.server.until("the window is full", |s| s.max_outstanding == s.window).await;
    let read = postgres.inner().sent;
    postgres.change(|inner| inner.crashed = true);
    rig.server.change(|s| s.hold_acks = false);
    rig.server.until("all that was read is durable", |s| s.timelines[&1].flushed >= read).await;
    postgres.change(|inner| inner.crashed = false);
    rig.flushed(end).await;
    rig.stop().await;
}

/// The slot loses WAL while it is being streamed: the WAL before stays, and the gap is declared.
#[tokio::test]
async fn wal_removed_in_the_middle_of_a_stream_is_a_gap_from_the_last_byte() {
    let (postgres, window) = (FakePostgres::new(START, START + 9 * SEGMENT), SEGMENT);
    let rig = Rig::new(postgres.clone(), |server, _| server.change(|s| s.hold_acks = true)).await;
    rig.server.until("the window is full", |s| s.max_outstanding == window).await;
    postgres.change(|inner| {
        inner.oldest = START + 6 * SEGMENT;
        inner.slot = START + 6 * SEGMENT + 50;
    });
    rig.server.change(|s| s.hold_acks = false);
    rig.flushed(START + 9 * SEGMENT).await;
    let read = rig.server.script().opens.last().unwrap().gap.clone().unwrap();
    assert!(read.from_lsn >= START + window, "bytes that had come were thrown away: {read:?}");
    assert_eq!(read.to_lsn, START + 6 * SEGMENT);
    rig.stop().await;
}

#[tokio::test]
async fn a_stop_waits_for_the_last_acknowledgement() {
    let end = START + SEGMENT;
    let mut rig =
        Rig::new(FakePostgres::new(START, end), |server, _| server.change(|s| s.hold_acks = true))
            .await;
    rig.server
        .until("all is received", |s| s.timelines.get(&1).is_some_and(|t| t.received == end))
        .await;
    rig.stop.cancel();
    assert_eq!(rig.postgres.flushed(), 0);
    rig.server.change(|s| s.hold_acks = false);
    rig.ended().await.unwrap();
    assert_eq!(rig.postgres.flushed(), end, "PostgreSQL did not hear of the last acknowledgement");
}

#[tokio::test]
async fn a_stop_without_an_acknowledgement_ends_in_time() {
    let end = START + SEGMENT;
    let mut rig = Rig::new(FakePostgres::new(START, end), |server, options| {
        server.change(|s| s.hold_acks = true);
        options.stop_timeout = Duration::from_millis(50);
    })
    .await;
    rig.server
        .until("all is received", |s| s.timelines.get(&1).is_some_and(|t| t.received == end))
        .await;
    rig.stop.cancel();
    rig.ended().await.unwrap();
    assert_eq!(rig.postgres.flushed(), 0);
}

#[tokio::test]
async fn an_idle_stream_tells_both_ends_that_it_lives() {
    let end = START + 10;
    let rig = Rig::new(FakePostgres::new(START, end), |_, _| {}).await;
    rig.flushed(end).await;
    rig.server.until("the server hears", |s| s.empty_appends > 2).await;
    assert_eq!(rig.state.wal_end(), lsn(end));
    rig.stop().await;
}

/// P7: a position that PostgreSQL reported once is not sent repeatedly; the server would take a hanging PostgreSQL
/// for one that has written nothing since.
#[tokio::test]
async fn a_silent_postgres_is_not_said_to_be_where_it_was() {
    let end = START + 10;
    let rig = Rig::new(FakePostgres::new(START, end), |_, _| {}).await;
    rig.flushed(end).await;
    let hears = |more| {
        let before = rig.server.script().empty_appends;
        rig.server.until("the server hears", move |s| s.empty_appends >= before + more)
    };
    hears(2).await;
    let told = rig.server.script().told;
    hears(4).await;
    assert_eq!(rig.server.script().told, told, "old news as new");
    let asked = rig.postgres.inner().reports.iter().filter(|r| r.reply_requested).count();
    assert!(asked > 3, "it is asked, too");
    rig.postgres.change(|inner| inner.ask_reply = true);
    rig.server.until("news of PostgreSQL", |s| s.told > told).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_reply_request_is_answered_at_once() {
    let end = START + 10;
    let rig = Rig::new(FakePostgres::new(START, end), |_, options| {
        options.status_interval = Duration::from_secs(30);
    })
    .await;
    rig.flushed(end).await;
    let before = rig.postgres.inner().reports.len();
    rig.postgres.change(|inner| inner.ask_reply = true);
    rig.postgres.until("the reply", |inner| inner.reports.len() > before).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_clean_shutdown_of_postgres_leaves_nothing_behind() {
    let end = START + SEGMENT / 3;
    let postgres = FakePostgres::new(START, end);
    let rig = Rig::new(postgres.clone(), |_, _| {}).await;
    rig.flushed(end).await;
    postgres.change(|inner| inner.shutdown = true);
    rig.server.until("it comes back", |s| s.opens.len() > 1).await;
    postgres.change(|inner| {
        inner.shutdown = false;
        inner.end += 1000;
    });
    rig.flushed(end + 1000).await;
    rig.stop().await;
}

/// P8: another timeline is to be streamed. The server is told PostgreSQL's state of now, and streaming continues
/// meanwhile.
#[tokio::test]
async fn the_server_is_told_what_postgres_says_when_it_asks() {
    let end = START + SEGMENT;
    let rig = Rig::new(FakePostgres::new(START, end), |server, _| {
        server.change(|s| s.prove_at_open = Some(41));
    })
    .await;
    rig.flushed(end).await;
    let first = rig.server.script().proofs.clone();
    assert_eq!(first.len(), 1);
    let said = (first[0].nonce, first[0].answered, first[0].in_recovery, first[0].timeline);
    assert_eq!((said, first[0].position_lsn), ((41, true, false, 1), end));
    assert!(rig.server.script().opens[0].can_prove);
    // Later, in the middle of the stream, it has become a standby.
    rig.postgres.change(|p| p.in_recovery = true);
    rig.server.change(|s| s.prove_while_open = Some(42));
    rig.server.until("the second answer", |s| s.proofs.len() == 2).await;
    let second = rig.server.script().proofs[1];
    assert!(second.nonce == 42 && second.answered && second.in_recovery, "{second:?}");
    rig.stop().await;
}

/// A PostgreSQL that is gone proves nothing, and the answer says so at once.
#[tokio::test]
async fn a_postgres_that_does_not_answer_is_said_not_to() {
    let end = START + SEGMENT;
    let rig = Rig::new(FakePostgres::new(START, end), |_, _| {}).await;
    rig.flushed(end).await;
    rig.postgres.change(|p| p.refuses = true);
    rig.server.change(|s| s.prove_while_open = Some(43));
    rig.server.until("the answer", |s| s.proofs.len() == 1).await;
    assert!(!rig.server.script().proofs[0].answered);
    rig.postgres.change(|p| p.refuses = false);
    rig.stop().await;
}
