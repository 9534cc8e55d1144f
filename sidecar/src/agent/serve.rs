//! Answers callers on the socket, one question for each connection.

use super::{
    engine::{Ask, Handed, Reply},
    wire::{LINE_BYTES_MAX, Line, Question},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream, unix::OwnedWriteHalf},
    sync::{Semaphore, mpsc, oneshot},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// How often a caller is told that its file is still being fetched.
const WAIT_EVERY: Duration = Duration::from_secs(1);
/// How long a caller may take to send its question, and to rename the file after the answer.
const CALLER_PATIENCE: Duration = Duration::from_secs(10);
/// PostgreSQL asks for one file at a time. More callers mean that PostgreSQL was killed several times and left them
/// behind.
const CALLERS_MAX: usize = 16;

#[derive(Debug, Clone)]
pub(super) struct Served {
    pub fingerprint: String,
    pub asks: mpsc::Sender<Ask>,
    pub leave: CancellationToken,
}

/// The time of the last question or of the last sign that a caller still waits.
pub(super) type Activity = Arc<tokio::sync::watch::Sender<tokio::time::Instant>>;

/// Accepts callers until it is dropped.
pub(super) async fn serve(listener: UnixListener, served: Served, activity: Activity) {
    let callers = Arc::new(Semaphore::new(CALLERS_MAX));
    let mut tasks = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next() => continue,
        };
        match (accepted, Arc::clone(&callers).try_acquire_owned()) {
            (Ok((stream, _)), Ok(place)) => {
                let (served, activity) = (served.clone(), Arc::clone(&activity));
                tasks.spawn(async move {
                    let _place = place;
                    let _ = converse(stream, &served, &activity).await;
                });
            }
            // Too many callers: the connection is closed, and the caller fetches directly.
            (Ok(_), Err(_)) => {}
            (Err(error), _) => {
                tracing::warn!("cannot accept a caller: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, served: &Served, activity: &Activity) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = String::new();
    let asking = (&mut reader).take(LINE_BYTES_MAX as u64);
    let read = tokio::time::timeout(CALLER_PATIENCE, { asking }.read_line(&mut line)).await;
    let Some(question) = read.ok().and_then(Result::ok).and_then(|_| Question::parse(&line)) else {
        return Ok(());
    };
    if question.fingerprint != served.fingerprint {
        tracing::info!("the settings have changed; exiting to make room for a new agent");
        writer.write_all(Line::Other.text().as_bytes()).await?;
        served.leave.cancel();
        return Ok(());
    }
    activity.send_replace(tokio::time::Instant::now());
    let Some(reply) = wait(question, served, activity, &mut reader, &mut writer).await? else {
        return Ok(());
    };
    let (line, handed) = match reply {
        Reply::File(handed) => (file_line(&handed), Some(handed)),
        Reply::Absent(text) => (Line::Absent(text), None),
        Reply::Failed(text) => (Line::Failed(text), None),
    };
    writer.write_all(line.text().as_bytes()).await?;
    // The caller may rename the file until it closes the connection.
    let mut rest = [0];
    let _ = tokio::time::timeout(CALLER_PATIENCE, reader.read(&mut rest)).await;
    drop(handed);
    Ok(())
}

fn file_line(handed: &Handed) -> Line {
    let name = handed.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Line::File { name, bytes: handed.size }
}

/// The reply; `None` if the caller went away.
async fn wait(
    question: Question,
    served: &Served,
    activity: &Activity,
    reader: &mut BufReader<tokio::net::unix::OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
) -> std::io::Result<Option<Reply>> {
    let (reply, mut answer) = oneshot::channel();
    let Question { file, traceparent, .. } = question;
    if served.asks.send(Ask { file, traceparent, reply }).await.is_err() {
        return Ok(Some(Reply::Failed("the agent is exiting".into())));
    }
    let mut gone = [0];
    loop {
        tokio::select! {
            biased;
            reply = &mut answer => {
                let failed = |_| Reply::Failed("the agent aborted the fetch".into());
                return Ok(Some(reply.unwrap_or_else(failed)));
            }
            _ = reader.read(&mut gone) => return Ok(None),
            () = tokio::time::sleep(WAIT_EVERY) => {
                activity.send_replace(tokio::time::Instant::now());
                writer.write_all(Line::Wait.text().as_bytes()).await?;
            }
        }
    }
}
