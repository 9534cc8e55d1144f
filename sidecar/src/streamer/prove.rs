//! Answers the server's question whether this PostgreSQL is the one that writes now. The server asks when another
//! timeline of the cluster is to be streamed as well.
//!
//! PostgreSQL is asked over a new connection. The streaming connection may belong to a walsender that lives on after
//! its PostgreSQL lost its role, and an earlier answer proves nothing. A timeout is also reported to the server.

use super::source::{Primary, Session};
use futures::future::BoxFuture;
use klio_proto::v1;
use std::time::Duration;

/// Shorter than the server's own timeout, so that the server is told about a missing answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// Asks PostgreSQL; the argument is the server's nonce, which the answer repeats.
pub(super) type Prover<'a> = Box<dyn Fn(u64) -> BoxFuture<'a, v1::Alive> + Send + Sync + 'a>;

pub(super) fn prover<P: Primary>(primary: &P) -> Prover<'_> {
    Box::new(move |nonce| Box::pin(ask(primary, nonce)))
}

/// PostgreSQL's current role, timeline and position.
pub(super) async fn ask<P: Primary>(primary: &P, nonce: u64) -> v1::Alive {
    let asked = async { primary.connect().await?.identify().await };
    match tokio::time::timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(identity)) => {
            let (in_recovery, timeline) = (identity.in_recovery, identity.timeline.get());
            tracing::info!(
                in_recovery,
                timeline,
                position = %identity.end,
                "the server asked whether this PostgreSQL writes, because another timeline is streamed too"
            );
            let position_lsn = identity.end.as_u64();
            v1::Alive { nonce, answered: true, in_recovery, timeline, position_lsn }
        }
        Ok(Err(error)) => silent(nonce, &error.message),
        Err(_) => silent(nonce, "no answer in time"),
    }
}

fn silent(nonce: u64, why: &str) -> v1::Alive {
    tracing::warn!(
        why,
        "the server asked whether this PostgreSQL writes; PostgreSQL does not answer"
    );
    v1::Alive { nonce, ..v1::Alive::default() }
}
