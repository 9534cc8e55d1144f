//! Limits how long a request to the store may take, by its progress and never by its total time.
//!
//! A body is sent in small pieces, each of which records when it was written to the connection. While pieces are being
//! written, a request may take any time over any link; when none is written for the configured time, the request fails.
//! After the last piece the answer may take that time plus the time that the bytes still in buffers may need
//! ([`Pace`]). The body of the answer has to keep arriving as well. The kernel applies the same limit to bytes that it
//! has taken (TCP_USER_TIMEOUT, dial.rs).

use super::{pace::Pace, progress};
use bytes::Bytes;
use http::{HeaderValue, header::CONTENT_LENGTH};
use http_body::{Body, Frame, SizeHint};
use object_store::{
    PutPayload,
    client::{
        HttpClient, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody, HttpResponse,
        HttpResponseBody,
    },
};
use std::{
    future::Future,
    io,
    pin::{Pin, pin},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// The connection takes a piece as a whole: at 1 KiB/s one every 16 seconds.
const PIECE_BYTES: usize = 16 << 10;

/// A request made no progress.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stalled {
    #[error(
        "the link stands still: {taken} of {bytes} bytes were taken, then none for {patience:?} (tier2.request_timeout_seconds)"
    )]
    Sending { taken: u64, bytes: u64, patience: Duration },
    #[error(
        "the link stands still: {taken} of {bytes} bytes were taken, but were not acknowledged for {patience:?} (tier2.request_timeout_seconds)"
    )]
    Lost { taken: u64, bytes: u64, patience: Duration },
    #[error("no answer came within {within:?} after the request (tier2.request_timeout_seconds)")]
    Silent { within: Duration },
    #[error("the answer stopped arriving for {patience:?} (tier2.request_timeout_seconds)")]
    Answer { patience: Duration },
}

impl From<Stalled> for HttpError {
    fn from(stalled: Stalled) -> Self {
        HttpError::new(HttpErrorKind::Timeout, stalled)
    }
}

/// The connection to a store, for all its requests.
#[derive(Debug)]
pub(super) struct Link {
    patience: Duration,
    pace: Mutex<Pace>,
}

impl Link {
    pub(super) fn new(patience: Duration) -> Self {
        Self { patience, pace: Mutex::default() }
    }

    /// Sends a request and waits for the beginning of its answer. Dropping the future cancels it.
    pub(super) async fn execute(
        &self,
        client: &HttpClient,
        request: HttpRequest,
    ) -> Result<HttpResponse, HttpError> {
        let (request, sending) = Sending::watch(request);
        let answer = self.answered(client.execute(request), &sending).await?;
        Ok(self.patient(answer))
    }

    async fn answered<T>(
        &self,
        work: impl Future<Output = Result<T, HttpError>>,
        sending: &Sending,
    ) -> Result<T, HttpError> {
        let begun = Instant::now();
        let mut work = pin!(work);
        loop {
            let until = self.until(sending, begun);
            tokio::select! {
                biased;
                answer = &mut work => {
                    if answer.is_ok() {
                        self.pace().answered(sending.bytes, begun.elapsed());
                    }
                    return answer.map_err(|error| self.told(error, sending));
                }
                () = sleep_until(until) => {}
            }
            // More pieces may have been written meanwhile.
            if self.until(sending, begun) <= Instant::now() {
                self.pace().unanswered(sending.bytes, begun.elapsed());
                return Err(self.stalled(sending).into());
            }
        }
    }

    fn until(&self, sending: &Sending, begun: Instant) -> Instant {
        let taken = sending.taken.lock();
        let last = taken.last.max(begun);
        let on_its_way = match taken.bytes < sending.bytes {
            true => Duration::ZERO,
            false => self.pace().to_arrive(sending.bytes, last - begun),
        };
        last + self.patience + on_its_way
    }

    fn stalled(&self, sending: &Sending) -> Stalled {
        let taken = sending.taken.lock();
        let (bytes, patience) = (sending.bytes, self.patience);
        match taken.bytes < bytes {
            true => Stalled::Sending { taken: taken.bytes, bytes, patience },
            false => Stalled::Silent { within: taken.last.elapsed() },
        }
    }

    /// Replaces the kernel's error, which says less.
    fn told(&self, error: HttpError, sending: &Sending) -> HttpError {
        let (taken, bytes, patience) = (sending.taken.lock().bytes, sending.bytes, self.patience);
        match taken > 0 && timed_out(&error) {
            true => Stalled::Lost { taken, bytes, patience }.into(),
            false => error,
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same answer with a body that fails when it stops arriving.
    fn patient(&self, answer: HttpResponse) -> HttpResponse {
        let (parts, body) = answer.into_parts();
        let patience = self.patience;
        let sleep = Box::pin(sleep_until(Instant::now() + patience));
        let upload = progress::Progress::current();
        let body = HttpResponseBody::new(Patient { body, sleep, patience, upload });
        HttpResponse::from_parts(parts, body)
    }
}

/// A body that is being sent.
struct Sending {
    bytes: u64,
    taken: Arc<Taken>,
}

#[derive(Debug)]
struct Taken {
    progress: Mutex<Progress>,
    /// The upload that the request belongs to, if somebody watches it.
    upload: Option<progress::Progress>,
}

#[derive(Debug)]
struct Progress {
    bytes: u64,
    last: Instant,
}

impl Taken {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A piece of a body. The connection drops it once it has written it.
struct Piece {
    bytes: Bytes,
    taken: Arc<Taken>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        taken.bytes += self.bytes.len() as u64;
        taken.last = Instant::now();
        drop(taken);
        if let Some(upload) = &self.taken.upload {
            upload.add(self.bytes.len() as u64, std::time::Instant::now());
        }
    }
}

impl Sending {
    /// The same request, with its body in pieces whose progress can be observed.
    fn watch(request: HttpRequest) -> (HttpRequest, Self) {
        let progress = Mutex::new(Progress { bytes: 0, last: Instant::now() });
        let taken = Arc::new(Taken { progress, upload: progress::Progress::current() });
        // A request without a body, or with a few bytes of XML.
        if request.body().as_bytes().is_some() {
            return (request, Self { bytes: 0, taken });
        }
        let (mut parts, body) = request.into_parts();
        let bytes = body.content_length() as u64;
        let mut pieces = Vec::with_capacity(bytes as usize / PIECE_BYTES + 1);
        for mut whole in chunks(body) {
            while !whole.is_empty() {
                let bytes = whole.split_to(whole.len().min(PIECE_BYTES));
                pieces.push(Bytes::from_owner(Piece { bytes, taken: Arc::clone(&taken) }));
            }
        }
        let body = match pieces.is_empty() {
            true => HttpRequestBody::empty(),
            false => {
                // A body in pieces has no length of its own, and S3 requires one.
                parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(bytes));
                pieces.into_iter().collect::<PutPayload>().into()
            }
        };
        (HttpRequest::from_parts(parts, body), Self { bytes, taken })
    }
}

/// Whether the kernel reported a timeout: no other layer has one.
fn timed_out(error: &HttpError) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(current) = cause {
        if let Some(io) = current.downcast_ref::<io::Error>() {
            return io.kind() == io::ErrorKind::TimedOut;
        }
        cause = current.source();
    }
    false
}

/// The chunks of a body in memory.
fn chunks(mut body: HttpRequestBody) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || {
        let mut context = Context::from_waker(Waker::noop());
        match Pin::new(&mut body).poll_frame(&mut context) {
            Poll::Ready(Some(Ok(frame))) => frame.into_data().ok(),
            _ => None,
        }
    })
}

struct Patient {
    body: HttpResponseBody,
    sleep: Pin<Box<Sleep>>,
    patience: Duration,
    upload: Option<progress::Progress>,
}

impl Body for Patient {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            let until = Instant::now() + self.patience;
            self.sleep.as_mut().reset(until);
            let arrived = frame.as_ref().and_then(|frame| frame.as_ref().ok()?.data_ref());
            if let (Some(upload), Some(bytes)) = (&self.upload, arrived) {
                upload.add(bytes.len() as u64, std::time::Instant::now());
            }
            return Poll::Ready(frame);
        }
        let patience = self.patience;
        self.sleep.as_mut().poll(cx).map(|()| Some(Err(Stalled::Answer { patience }.into())))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
