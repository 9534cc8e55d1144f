//! The queue on a real nats-server.

use super::{Job, Queue, QueueConfig, Started, child, job, stream};
use async_nats::jetstream::{self, consumer::pull};
use futures::StreamExt;
use std::{path::Path, path::PathBuf, time::Duration};
use tokio_util::sync::CancellationToken;

/// A queue for a test.
pub(crate) struct TestQueue {
    pub(crate) queue: Queue,
    cancel: CancellationToken,
    tasks: tokio::task::JoinSet<()>,
}

/// The nats-server that `make tools` installs.
pub(crate) fn nats_server() -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.tools/bin/nats-server");
    if tools.is_file() {
        return tools;
    }
    let config = QueueConfig::default();
    config.find_executable().expect("nats-server is not installed: run make tools")
}

impl TestQueue {
    pub(crate) async fn start(directory: &Path) -> Self {
        rustls::crypto::ring::default_provider().install_default().ok();
        let config = QueueConfig { executable: Some(nats_server()), ..QueueConfig::default() };
        let cancel = CancellationToken::new();
        let Started { queue, tasks } =
            Queue::start(&config, directory, cancel.clone()).await.unwrap();
        Self { queue, cancel, tasks }
    }

    /// A queue that is started and connected.
    pub(crate) async fn up(directory: &Path) -> Self {
        let this = Self::start(directory).await;
        this.connected().await;
        this
    }

    pub(crate) async fn connected(&self) -> super::Connection {
        let mut connection = self.queue.connection();
        let up = connection.wait_for(Option::is_some);
        let up = tokio::time::timeout(Duration::from_secs(30), up).await.expect("queue comes up");
        up.unwrap().clone().unwrap()
    }

    pub(crate) async fn stop(mut self) {
        self.cancel.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Waits for a condition, at most half a minute.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..1500 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("did not happen: {what}");
}

pub(crate) fn pid(directory: &Path) -> Option<rustix::process::Pid> {
    let text = std::fs::read_to_string(directory.join("nats.pid")).ok()?;
    rustix::process::Pid::from_raw(text.trim().parse().ok()?)
}

fn alive(pid: rustix::process::Pid) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
}

/// A closed pipe would end the program with SIGPIPE.
fn keep_open(stderr: tokio::process::ChildStderr) {
    std::mem::forget(stderr);
}

fn job(number: u32) -> Job {
    Job {
        cluster: "pg-1".parse().unwrap(),
        file: format!("0000000100000000{number:08X}").parse().unwrap(),
        size: 5,
        sha256: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_job_is_queued_once_and_comes_out_with_its_headers() {
    let directory = tempfile::tempdir().unwrap();
    let test = TestQueue::up(directory.path()).await;
    for _ in 0..3 {
        test.queue.publish_and_wait(job(1)).await.unwrap();
        // Longer than the duplicate window, so that only the subject can tell.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    test.queue.publish_and_wait(job(2)).await.unwrap();
    eventually("two jobs are counted", || test.queue.stats().messages == 2).await;
    assert!(test.queue.stats().bytes > 0 && test.queue.stats().connected);
    let jetstream = test.connected().await.jetstream;
    let consumer = jetstream
        .create_consumer_on_stream(
            pull::Config {
                filter_subject: job::subjects_of(&job(1).cluster),
                ..pull::Config::default()
            },
            stream::STREAM,
        )
        .await
        .unwrap();
    let mut batch = consumer.fetch().max_messages(2).messages().await.unwrap();
    let message = batch.next().await.unwrap().unwrap();
    assert_eq!(Job::decode(&message.payload).unwrap(), job(1));
    let id = message.headers.as_ref().and_then(|h| h.get("Nats-Msg-Id")).unwrap();
    assert_eq!(id.as_str(), job(1).id());
    message.double_ack().await.unwrap();
    // An acknowledged job is removed, and the same job may be queued again.
    eventually("one job is left", || test.queue.stats().messages == 1).await;
    test.queue.publish_and_wait(job(1)).await.unwrap();
    eventually("two jobs again", || test.queue.stats().messages == 2).await;
    test.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_survive_a_killed_server_which_is_started_again() {
    let directory = tempfile::tempdir().unwrap();
    let test = TestQueue::up(directory.path()).await;
    test.queue.publish_and_wait(job(1)).await.unwrap();
    let before = test.connected().await.generation;
    let killed = pid(directory.path()).unwrap();
    rustix::process::kill_process(killed, rustix::process::Signal::KILL).unwrap();
    let mut connection = test.queue.connection();
    let next = connection.wait_for(|c| c.as_ref().is_some_and(|c| c.generation > before));
    tokio::time::timeout(Duration::from_secs(30), next).await.expect("comes back").unwrap();
    assert_eq!(test.queue.stats().messages, 1);
    assert!(test.queue.wanted().await.all, "everything is compared after a loss");
    test.stop().await;
}

/// QUEUE2: while the queue is down, publishing returns at once and only marks the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn publishing_never_waits_and_a_lost_job_is_marked() {
    let directory = tempfile::tempdir().unwrap();
    let test = TestQueue::start(directory.path()).await; // not up yet
    let begun = std::time::Instant::now();
    (0..20_000).for_each(|n| test.queue.publish(job(n)));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let mut marked = test.queue.wanted().await;
    while !marked.clusters.contains(&job(1).cluster) {
        marked = test.queue.wanted().await;
    }
    test.stop().await;
}

/// Guards against a bug of other projects, whose queue listens without authentication.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_without_this_runs_credentials_gets_in() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let test = TestQueue::up(directory.path()).await;
    let mode = |name| std::fs::metadata(directory.path().join(name)).unwrap().permissions().mode();
    assert_eq!(mode("nats.conf") & 0o777, 0o600);
    let server = test.connected().await.jetstream.client().server_info();
    assert!(async_nats::connect(format!("127.0.0.1:{}", server.port)).await.is_err());
    let wrong = async_nats::ConnectOptions::with_user_and_password("klio".into(), "guess".into());
    assert!(wrong.connect(format!("127.0.0.1:{}", server.port)).await.is_err());
    test.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_queue_leaves_no_process_and_a_stale_one_is_ended() {
    let directory = tempfile::tempdir().unwrap();
    let test = TestQueue::up(directory.path()).await;
    let first = pid(directory.path()).unwrap();
    test.stop().await;
    assert!(!alive(first));
    // A process that outlived its parent: started by hand with the same configuration.
    let mut stale = std::process::Command::new(nats_server())
        .arg("-c")
        .arg(directory.path().join("nats.conf"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::fs::write(directory.path().join("nats.pid"), format!("{}\n", stale.id())).unwrap();
    let test = TestQueue::up(directory.path()).await;
    assert!(stale.try_wait().unwrap().is_some(), "the stale one is gone");
    assert_ne!(pid(directory.path()).unwrap().as_raw_nonzero().get() as u32, stale.id());
    test.stop().await;
}

/// CHILD2: the kernel ends the child when the thread that forked it ends, without any code of ours.
#[tokio::test(flavor = "multi_thread")]
async fn the_child_dies_with_the_thread_that_forked_it() {
    let directory = tempfile::tempdir().unwrap();
    let forker = child::Forker::start().unwrap();
    let credentials = child::Credentials::random();
    let executable = nats_server();
    let start =
        child::start(&forker, &executable, directory.path(), 1 << 20, &credentials, keep_open);
    let running = start.await.unwrap();
    let pid = running.pid();
    assert!(alive(pid));
    std::mem::forget(running); // as after a SIGKILL: nobody drops or stops anything
    drop(forker);
    eventually("the child is gone", || !alive(pid)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_stream_is_made_again() {
    let directory = tempfile::tempdir().unwrap();
    let test = TestQueue::up(directory.path()).await;
    let connection = test.connected().await;
    let jetstream: jetstream::Context = connection.jetstream;
    jetstream.delete_stream(stream::STREAM).await.unwrap();
    let mut changes = test.queue.connection();
    let next =
        changes.wait_for(|c| c.as_ref().is_some_and(|c| c.generation > connection.generation));
    tokio::time::timeout(Duration::from_secs(30), next).await.expect("made again").unwrap();
    test.queue.publish_and_wait(job(1)).await.unwrap();
    test.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_nats_can_be_used_by_url() {
    let directory = tempfile::tempdir().unwrap();
    let forker = child::Forker::start().unwrap();
    let credentials = child::Credentials::random();
    let executable = nats_server();
    let start =
        child::start(&forker, &executable, directory.path(), 1 << 28, &credentials, keep_open);
    let running = start.await.unwrap();
    rustls::crypto::ring::default_provider().install_default().ok();
    let config = QueueConfig {
        url: Some(running.url.clone()),
        user: Some(child::USER.into()),
        password: Some(klio_storage::tier2::Secret::new(credentials.password.as_str())),
        ..QueueConfig::default()
    };
    let cancel = CancellationToken::new();
    let Started { queue, mut tasks } =
        Queue::start(&config, directory.path(), cancel.clone()).await.unwrap();
    let mut connection = queue.connection();
    let up = connection.wait_for(Option::is_some);
    tokio::time::timeout(Duration::from_secs(30), up).await.expect("connects").unwrap();
    queue.publish_and_wait(job(1)).await.unwrap();
    cancel.cancel();
    while tasks.join_next().await.is_some() {}
    running.stop().await;
}

#[tokio::test]
async fn a_program_that_is_no_nats_server_is_refused() {
    let config = QueueConfig { executable: Some("/bin/true".into()), ..QueueConfig::default() };
    let directory = tempfile::tempdir().unwrap();
    let error =
        Queue::start(&config, directory.path(), CancellationToken::new()).await.err().unwrap();
    assert!(error.to_string().contains("2.12"), "{error}");
}

/// A full queue refuses new jobs, loses none that it has, and accepts jobs again when there is room.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_refuses_and_recovers() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let directory = tempfile::tempdir().unwrap();
    let config = QueueConfig {
        executable: Some(nats_server()),
        max_bytes: klio_pg::ByteSize::mib(1),
        ..QueueConfig::default()
    };
    let cancel = CancellationToken::new();
    let Started { queue, mut tasks } =
        Queue::start(&config, directory.path(), cancel.clone()).await.unwrap();
    let mut connection = queue.connection();
    let up = connection.wait_for(Option::is_some);
    let up = tokio::time::timeout(Duration::from_secs(30), up).await.expect("comes up");
    let jetstream = up.unwrap().clone().unwrap().jetstream;
    let mut queued = 0;
    let refused = loop {
        let batch = (queued..queued + 32).map(|n| queue.publish_and_wait(job(n)));
        if let Err(error) = futures::future::try_join_all(batch).await {
            break error;
        }
        queued += 32;
        assert!(queued < 20_000, "1 MiB is full long before");
    };
    assert!(refused.to_string().contains("maximum bytes"), "{refused}");
    assert!(queued > 500, "{queued}");
    queue.publish_and_wait(job(1)).await.unwrap(); // queued already: no more room is needed
    let stream = jetstream.get_stream(stream::STREAM).await.unwrap();
    stream.purge().await.unwrap();
    queue.publish_and_wait(job(30_000)).await.unwrap();
    cancel.cancel();
    while tasks.join_next().await.is_some() {}
}
