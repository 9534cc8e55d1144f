//! Answers the server's question whether this PostgreSQL writes now: another timeline of the cluster wants to be streamed.
//!
//! PostgreSQL is asked afresh, over a connection of its own: the one that streams may be to a server process that lives on
//! after its PostgreSQL lost its role, and what it said before proves nothing. No answer in time is an answer, too.

use super::source::{Primary, Session};
use futures::future::BoxFuture;
use klio_proto::v1;
use std::time::Duration;

/// Shorter than the server waits, so that it hears that there is none.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// Asks, for a number to repeat.
pub(super) type Prover<'a> = Box<dyn Fn(u64) -> BoxFuture<'a, v1::Alive> + Send + Sync + 'a>;

/// Over new connections to `primary`.
pub(super) fn prover<P: Primary>(primary: &P) -> Prover<'_> {
    Box::new(move |nonce| Box::pin(ask(primary, nonce)))
}

/// What PostgreSQL says now.
pub(super) async fn ask<P: Primary>(primary: &P, nonce: u64) -> v1::Alive {
    let asked = async { primary.connect().await?.identify().await };
    match tokio::time::timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(identity)) => {
            let (in_recovery, timeline) = (identity.in_recovery, identity.timeline.get());
            tracing::info!(
                in_recovery,
                timeline,
                position = %identity.end,
                "the server asks whether this PostgreSQL writes: another timeline is streamed, too"
            );
            let position_lsn = identity.end.as_u64();
            v1::Alive { nonce, answered: true, in_recovery, timeline, position_lsn }
        }
        Ok(Err(error)) => silent(nonce, &error.message),
        Err(_) => silent(nonce, "no answer in time"),
    }
}

fn silent(nonce: u64, why: &str) -> v1::Alive {
    tracing::warn!(why, "the server asks whether this PostgreSQL writes, and it does not answer");
    v1::Alive { nonce, ..v1::Alive::default() }
}
