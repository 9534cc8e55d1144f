//! Tests the agent with a source in memory: order, bounds, missing files, failures, and callers that go away.

use super::{
    client::{self, Errand, Outcome, SILENCE_MAX},
    engine::{Engine, Limits},
    life::Life,
    serve::{self, Served},
    spool::Spool,
    wire::{Line, Question},
};
use crate::{
    error::Failure,
    wal_source::{
        Expected,
        testing::{FakeSource, SYSTEM, segment},
    },
};
use klio_pg::{SegmentName, TimelineId};
use klio_proto::Code;
use klio_storage::layout::WalFile;
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tokio::{net::UnixListener, sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

const OURS: &str = "ours";
const MIB: u64 = 1 << 20;

/// An agent in this process.
struct Agent {
    source: Arc<FakeSource>,
    directory: TempDir,
    leave: CancellationToken,
    tasks: JoinSet<()>,
}

impl Agent {
    async fn start(source: FakeSource, segments_max: u64) -> Self {
        let (source, directory) = (Arc::new(source), tempfile::tempdir().unwrap());
        let spool = Spool::claim(&directory.path().join(".klio")).await.unwrap().unwrap();
        let listener = UnixListener::bind(spool.socket()).unwrap();
        let expected = Expected { system_identifier: Some(SYSTEM), has_target: false };
        let limits = Limits { bytes_max: segments_max * MIB, ..Limits::default() };
        let leave = CancellationToken::new();
        let engine =
            Engine::new(Arc::clone(&source) as _, expected, spool.files(), limits, leave.clone());
        let (asks, queue) = mpsc::channel(4);
        let served = Served { fingerprint: OURS.into(), asks, leave: leave.clone() };
        let activity = Life::new(None, Duration::from_secs(60)).activity();
        let mut tasks = JoinSet::new();
        let ended = leave.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = engine.run(queue) => {}
                () = serve::serve(listener, served, activity) => {}
                () = ended.cancelled() => {}
            }
            drop(spool);
        });
        Self { source, directory, leave, tasks }
    }

    fn spool(&self) -> PathBuf {
        self.directory.path().join(".klio")
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("RECOVERYXLOG")
    }

    async fn ask_with(&self, fingerprint: &'static str, file: WalFile) -> Outcome {
        let (spool, path) = (self.spool(), self.path());
        let asking = tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + Duration::from_secs(20);
            let errand = Errand {
                spool: &spool,
                fingerprint,
                file,
                path: &path,
                deadline,
                silence_max: SILENCE_MAX,
            };
            client::ask(&errand, || Err(std::io::Error::other("none is started here")))
        });
        asking.await.unwrap()
    }

    async fn ask(&self, file: WalFile) -> Outcome {
        self.ask_with(OURS, file).await
    }

    /// Requests a segment, expects it with the right bytes, and removes it as PostgreSQL does.
    async fn take(&self, name: SegmentName) {
        assert_eq!(self.ask(WalFile::Segment(name)).await, Outcome::Placed, "{name}");
        assert!(std::fs::read(self.path()).unwrap() == self.source.plain(name), "{name} differs");
        std::fs::remove_file(self.path()).unwrap();
    }

    fn times_asked(&self, name: SegmentName) -> usize {
        self.source.asked().iter().filter(|file| **file == WalFile::Segment(name)).count()
    }

    /// Bytes in the spool.
    fn held(&self) -> u64 {
        let entries = std::fs::read_dir(self.spool()).into_iter().flatten().flatten();
        entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
    }

    async fn until(&self, what: &str, is: impl Fn() -> bool) {
        let wait = async {
            while !is() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(20), wait).await.is_err() {
            panic!("{what} did not happen; asked: {:?}", self.source.asked());
        }
    }
}

async fn agent(numbers: std::ops::Range<u32>) -> Agent {
    Agent::start(FakeSource::new(numbers), 16).await
}

fn asked_for(name: SegmentName) -> WalFile {
    WalFile::Segment(name)
}

#[tokio::test]
async fn what_is_read_ahead_is_asked_for_once() {
    let agent = agent(0..30).await;
    for number in 3..25 {
        agent.take(segment(1, number)).await;
        agent.until("the next", || agent.times_asked(segment(1, number + 1)) > 0).await;
    }
    for number in 3..25 {
        assert_eq!(agent.times_asked(segment(1, number)), 1, "{number}");
    }
}

/// AGENT2, P7: that a segment was missing while reading ahead says nothing about the moment when PostgreSQL requests
/// it.
#[tokio::test]
async fn an_absence_is_asked_for_anew_each_time() {
    let agent = agent(0..6).await;
    agent.take(segment(1, 5)).await;
    let next = segment(1, 6);
    agent.until("reading ahead to the end", || agent.times_asked(next) == 1).await;
    for asked in 2..5 {
        let outcome = agent.ask(asked_for(next)).await;
        assert!(
            matches!(outcome, Outcome::Absent(ref text) if text.contains("no ")),
            "{outcome:?}"
        );
        assert_eq!(agent.times_asked(next), asked);
    }
    agent.source.change(|script| {
        script.segments.insert(next);
    });
    agent.take(next).await;
}

/// AGENT2: more of an unfinished segment may exist a moment later.
#[tokio::test]
async fn an_unfinished_segment_is_neither_read_ahead_nor_kept() {
    let agent = agent(0..6).await;
    let open = segment(1, 6);
    agent.source.change(|script| {
        script.partials.insert(open, 100_000);
    });
    agent.take(segment(1, 5)).await;
    agent.until("reading ahead to the end", || agent.times_asked(open) == 1).await;
    for bytes in [200_000, 300_000] {
        agent.source.change(|script| {
            script.partials.insert(open, bytes);
        });
        assert_eq!(agent.ask(asked_for(open)).await, Outcome::Placed);
        let content = std::fs::read(agent.path()).unwrap();
        assert_eq!(content.len() as u64, MIB);
        assert!(content[..bytes] == agent.source.plain(open)[..bytes]);
        assert!(content[bytes..].iter().all(|byte| *byte == 0));
    }
}

#[tokio::test]
async fn any_order_and_any_file_is_served() {
    let agent = agent(0..40).await;
    let two = TimelineId::new(2).unwrap();
    let line = b"1\t0/900000\tno recovery target specified\n".to_vec();
    agent.source.change(|script| {
        script.segments.extend((9..40).map(|number| segment(2, number)));
        script.histories.insert(two, line.clone());
    });
    assert_eq!(agent.ask(WalFile::History(two)).await, Outcome::Placed);
    assert_eq!(std::fs::read(agent.path()).unwrap(), line);
    let three = WalFile::History(TimelineId::new(3).unwrap());
    assert!(matches!(agent.ask(three).await, Outcome::Absent(_)));
    for number in [20, 21, 5, 6, 7, 4, 3, 2, 30, 8, 8] {
        agent.take(segment(1, number)).await;
    }
    let nowhere = asked_for(segment(7, 9));
    assert!(matches!(agent.ask(nowhere).await, Outcome::Absent(_)));
    for number in 9..20 {
        agent.take(segment(2, number)).await;
    }
}

/// AGENT4.
#[tokio::test]
async fn the_spool_never_holds_more_than_it_may() {
    for most in [1, 3, 8] {
        let agent = Agent::start(FakeSource::new(0..60), most).await;
        for number in 0..40 {
            agent.take(segment(1, number)).await;
            assert!(agent.held() <= most * MIB, "{} bytes of {most} MiB", agent.held());
        }
        agent.until("the spool to fill", || agent.held() == most * MIB).await;
        agent.take(segment(1, 3)).await;
        agent
            .until("the spool to be the new window's", || {
                agent.held() <= most * MIB && agent.times_asked(segment(1, 4)) > 1
            })
            .await;
    }
}

#[tokio::test]
async fn trouble_is_the_caller_s_to_retry_and_wrong_settings_end_the_agent() {
    let agent = agent(0..6).await;
    let unavailable = Some(Failure::Code(Code::Unavailable));
    agent.source.change(|script| script.fail = unavailable);
    let outcome = agent.ask(asked_for(segment(1, 1))).await;
    assert!(
        matches!(outcome, Outcome::Unusable(ref why) if why.contains("as told")),
        "{outcome:?}"
    );
    agent.source.change(|script| script.fail = None);
    agent.take(segment(1, 1)).await;
    agent.source.change(|script| script.fail = Some(Failure::Config));
    assert!(matches!(agent.ask(asked_for(segment(1, 9))).await, Outcome::Unusable(_)));
    agent.until("the agent to leave", || !agent.spool().exists()).await;
}

#[tokio::test]
async fn a_caller_with_other_settings_is_not_served() {
    let agent = agent(0..6).await;
    let outcome = agent.ask_with("theirs", asked_for(segment(1, 1))).await;
    assert!(matches!(outcome, Outcome::Unusable(_)), "{outcome:?}");
    agent.until("the agent to leave", || agent.leave.is_cancelled()).await;
    assert_eq!(agent.source.asked(), []);
}

/// WAL with a flipped bit is never replayed; the copy of the other tier is used.
#[tokio::test]
async fn of_a_damaged_segment_the_other_copy_is_given() {
    let agent = agent(0..12).await;
    agent.source.change(|script| {
        script.damaged.extend([3, 5].map(|number| asked_for(segment(1, number))));
    });
    for number in 3..8 {
        agent.take(segment(1, number)).await;
    }
}

/// AGENT3: a file for a caller that was killed is never put in place, and costs nothing.
#[tokio::test]
async fn a_caller_that_goes_away_leaves_no_trace() {
    let agent = agent(0..30).await;
    let question = Question {
        fingerprint: OURS.into(),
        file: asked_for(segment(1, 3)),
        traceparent: String::new(),
    };
    for take_answer in [false, true] {
        let (socket, line) = (super::spool::socket_in(&agent.spool()), question.line());
        let killed = tokio::task::spawn_blocking(move || {
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.write_all(line.as_bytes()).unwrap();
            if take_answer {
                let mut answer = String::new();
                BufReader::new(&stream).read_line(&mut answer).unwrap();
                assert!(matches!(Line::parse(&answer), Some(Line::File { .. })), "{answer:?}");
            }
        });
        killed.await.unwrap();
    }
    agent.take(segment(1, 3)).await;
    agent.take(segment(1, 4)).await;
    assert!(!agent.path().exists());
}

/// AGENT1: the agent is killed while a caller waits.
#[tokio::test]
async fn an_agent_that_dies_never_answers_wrongly() {
    let mut agent = agent(0..6).await;
    agent.source.gate.forget_permits(usize::MAX);
    let (spool, path) = (agent.spool(), agent.path());
    let waiting = tokio::task::spawn_blocking(move || {
        let file = asked_for(segment(1, 1));
        let deadline = Instant::now() + Duration::from_secs(20);
        let errand = Errand {
            spool: &spool,
            fingerprint: OURS,
            file,
            path: &path,
            deadline,
            silence_max: SILENCE_MAX,
        };
        client::ask(&errand, || Err(std::io::Error::other("none is started here")))
    });
    let line = Question {
        fingerprint: OURS.into(),
        file: asked_for(segment(1, 2)),
        traceparent: String::new(),
    }
    .line();
    let socket = super::spool::socket_in(&agent.spool());
    let stream = UnixStream::connect(socket).unwrap();
    (&stream).write_all(line.as_bytes()).unwrap();
    // Let both requests arrive.
    tokio::time::sleep(Duration::from_millis(50)).await;
    agent.tasks.abort_all();
    assert!(matches!(waiting.await.unwrap(), Outcome::Unusable(_)));
    let mut rest = String::new();
    let _ = BufReader::new(&stream).read_to_string(&mut rest);
    assert_eq!(rest, "");
    assert!(!agent.path().exists());
}

#[tokio::test]
async fn two_callers_of_one_file_both_get_it() {
    let agent = agent(0..6).await;
    let (spool, directory) = (agent.spool(), agent.directory.path().to_owned());
    let ask = |spool: PathBuf, path: PathBuf| {
        tokio::task::spawn_blocking(move || {
            let file = asked_for(segment(1, 3));
            let deadline = Instant::now() + Duration::from_secs(20);
            let errand = Errand {
                spool: &spool,
                fingerprint: OURS,
                file,
                path: &path,
                deadline,
                silence_max: SILENCE_MAX,
            };
            client::ask(&errand, || Err(std::io::Error::other("none is started here")))
        })
    };
    let (a, b) = (directory.join("a"), directory.join("b"));
    let (first, second) = (ask(spool.clone(), a.clone()), ask(spool, b.clone()));
    assert_eq!((first.await.unwrap(), second.await.unwrap()), (Outcome::Placed, Outcome::Placed));
    for path in [a, b] {
        assert!(std::fs::read(path).unwrap() == agent.source.plain(segment(1, 3)));
    }
}

#[tokio::test]
async fn wal_of_another_postgresql_is_not_handed_over() {
    let directory = tempfile::tempdir().unwrap();
    let source = Arc::new(FakeSource::new(0..3));
    let spool = Spool::claim(&directory.path().join(".klio")).await.unwrap().unwrap();
    let expected = Expected { system_identifier: Some(SYSTEM + 1), has_target: false };
    let leave = CancellationToken::new();
    let engine = Engine::new(source, expected, spool.files(), Limits::default(), leave.clone());
    let (asks, queue) = mpsc::channel(1);
    let (reply, answer) = tokio::sync::oneshot::channel();
    asks.send(super::engine::Ask {
        file: asked_for(segment(1, 1)),
        traceparent: String::new(),
        reply,
    })
    .await
    .unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(engine.run(queue));
    let answer = answer.await.unwrap();
    assert!(matches!(answer, super::engine::Reply::Failed(_)), "{answer:?}");
}
