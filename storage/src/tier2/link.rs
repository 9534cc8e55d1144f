//! How long a request to the store may take.
//!
//! One total time is too short for a slow uplink and too long for a dead one. A request has its patience and, for what it sends,
//! a time that grows with its size: the slowest link that is of use gets a part of 8 MiB through. What an answer brings must go
//! on coming: there progress decides.

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use object_store::client::{HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody};
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

/// A part of 8 MiB takes eight and a half minutes.
const SLOWEST_BYTES_PER_SECOND: u64 = 16 << 10;

/// Nothing came.
#[derive(Debug, thiserror::Error)]
#[error(
    "no answer within {0:?}; tier2.request_timeout_seconds is the time beside that for sending"
)]
struct Silent(Duration);

fn silent(waited: Duration) -> HttpError {
    HttpError::new(HttpErrorKind::Timeout, Silent(waited))
}

/// How long it is waited for the answer to a request.
pub(super) fn patience_for(request: &HttpRequest, patience: Duration) -> Duration {
    let bytes = request.body().content_length() as u64;
    patience + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}

/// Waits for the beginning of an answer. Cancel-safe.
pub(super) async fn answered<T>(
    work: impl Future<Output = Result<T, HttpError>>,
    within: Duration,
) -> Result<T, HttpError> {
    timeout(within, work).await.unwrap_or_else(|_| Err(silent(within)))
}

/// The same answer with a body that fails when it stops coming.
pub(super) fn patient(answer: HttpResponse, patience: Duration) -> HttpResponse {
    let (parts, body) = answer.into_parts();
    let sleep = Box::pin(sleep_until(Instant::now() + patience));
    let body = HttpResponseBody::new(Patient { body, sleep, patience });
    HttpResponse::from_parts(parts, body)
}

struct Patient {
    body: HttpResponseBody,
    sleep: Pin<Box<Sleep>>,
    patience: Duration,
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
            return Poll::Ready(frame);
        }
        let patience = self.patience;
        self.sleep.as_mut().poll(cx).map(|()| Some(Err(silent(patience))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn patience(bytes: usize) -> u64 {
        let request = HttpRequest::new(Bytes::from(vec![7; bytes]).into());
        patience_for(&request, PATIENCE).as_secs()
    }

    /// 60 seconds for a whole PUT: parts of 8 MiB never went through a slow uplink.
    #[test]
    fn what_is_sent_has_time_by_its_size_and_a_question_has_none_more() {
        assert_eq!(patience(0), 60);
        assert_eq!(patience(1000), 60);
        assert_eq!(patience(8 << 20), 60 + 512);
    }

    #[tokio::test]
    async fn an_answer_that_does_not_come_is_a_timeout() {
        let never = std::future::pending::<Result<(), HttpError>>();
        let error = answered(never, Duration::from_millis(5)).await.unwrap_err();
        assert_eq!(error.kind(), HttpErrorKind::Timeout);
    }
}
