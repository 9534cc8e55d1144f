//! A source that answers soon or fails, for a standby, which asks again by itself.
//!
//! Each pause is limited, not the whole transfer, so that a slow link can still deliver a large segment.

use super::{Answer, WalSource};
use crate::error::{Error, Failure};
use futures::{StreamExt, stream};
use klio_proto::Code;
use klio_storage::layout::WalFile;
use std::{sync::Arc, time::Duration};
use tokio::time::{Instant, timeout_at};

/// Limits the pauses of another source.
pub(super) struct Prompt {
    pub inner: Arc<dyn WalSource>,
    /// The first bytes must have arrived by then.
    pub begun: Instant,
    /// The longest pause after that.
    pub quiet_max: Duration,
}

#[tonic::async_trait]
impl WalSource for Prompt {
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
        let quiet_max = self.quiet_max;
        // The other copy is requested only after the first one was received, so its deadline starts anew.
        let begun = if other_copy { Instant::now() + quiet_max } else { self.begun };
        let asked = timeout_at(begun, self.inner.ask(file, other_copy)).await;
        let Answer { shape, keys, pieces } = asked.unwrap_or_else(|_| Err(silence()))?;
        let pieces = stream::unfold(Some((pieces, begun)), move |state| async move {
            let (mut pieces, until) = state?;
            match timeout_at(until, pieces.next()).await {
                Ok(piece) => piece.map(|piece| (piece, Some((pieces, Instant::now() + quiet_max)))),
                Err(_) => Some((Err(silence()), None)),
            }
        });
        Ok(Answer { shape, keys, pieces: pieces.boxed() })
    }
}

fn silence() -> Error {
    Error::new(
        Failure::Code(Code::Unavailable),
        "expected an answer within some seconds, found none",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::testing::FakeSource, *};
    use bytes::Bytes;

    const HOUR: Duration = Duration::from_secs(3600);

    #[derive(Clone, Copy, PartialEq)]
    enum Way {
        NeverAnswers,
        /// One piece, then nothing.
        Stalls,
        /// One piece, and another one after the deadline for the first.
        Slow,
    }

    struct Odd(FakeSource, Way, Instant);

    #[tonic::async_trait]
    impl WalSource for Odd {
        async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
            let (way, begun) = (self.1, self.2);
            if way == Way::NeverAnswers {
                std::future::pending::<()>().await;
            }
            let answer = self.0.ask(file, other_copy).await?;
            let second = async move {
                match way {
                    Way::Slow => tokio::time::sleep_until(begun + Duration::from_millis(1)).await,
                    _ => std::future::pending().await,
                }
                Ok(Bytes::from_static(b"second"))
            };
            let pieces = stream::iter([Ok(Bytes::from_static(b"first"))]);
            Ok(Answer { pieces: pieces.chain(stream::once(second)).boxed(), ..answer })
        }
    }

    async fn pieces(way: Way, begun: Duration, quiet_max: Duration) -> Result<usize, Error> {
        let begun = Instant::now() + begun;
        let inner: Arc<dyn WalSource> = Arc::new(Odd(FakeSource::new(0..1), way, begun));
        let prompt = Prompt { inner, begun, quiet_max };
        let file = "000000010000000000000000".parse().unwrap();
        let mut pieces = prompt.ask(file, false).await?.pieces;
        let mut came = 0;
        while let Some(piece) = pieces.next().await {
            piece?;
            came += 1;
        }
        Ok(came)
    }

    #[tokio::test]
    async fn what_makes_progress_may_take_long_and_silence_ends_it() {
        let soon = Duration::from_millis(20);
        assert_eq!(pieces(Way::Slow, soon, HOUR).await.unwrap(), 2);
        for (way, begun, quiet_max) in [(Way::NeverAnswers, soon, HOUR), (Way::Stalls, HOUR, soon)]
        {
            let error = pieces(way, begun, quiet_max).await.unwrap_err();
            assert_eq!(error.failure, Failure::Code(Code::Unavailable));
        }
    }
}
