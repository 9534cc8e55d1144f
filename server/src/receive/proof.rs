//! Asks the PostgreSQL behind a stream whether it writes now, and takes its answer.
//!
//! A question and its answer carry the same random number, so an answer to an earlier question proves nothing. A
//! client that cannot answer, a half-closed stream and a session that ends leave the question unanswered.

use super::session::Responses;
use crate::registry::{PROOF_TIMEOUT, Question};
use klio_proto::{
    v1::{self, receive_request, receive_response},
    wal::{Alive, AlivePostgres},
};
use tokio::sync::mpsc;
use tonic::Streaming;

fn prove(nonce: u64) -> v1::ReceiveResponse {
    v1::ReceiveResponse { kind: Some(receive_response::Kind::Prove(v1::Prove { nonce })) }
}

/// A client that asks to stream and has no session yet.
pub(super) struct Claimant<'a> {
    pub(super) inbound: &'a mut Streaming<v1::ReceiveRequest>,
    pub(super) responses: &'a Responses,
    pub(super) can_prove: bool,
}

impl Claimant<'_> {
    /// What the client's PostgreSQL says now; `None` when it does not answer in time, or with another message.
    pub(super) async fn prove(&mut self) -> Option<AlivePostgres> {
        if !self.can_prove {
            return None;
        }
        let nonce = rand::random();
        let asked = async {
            self.responses.send(Ok(prove(nonce))).await.ok()?;
            let Some(receive_request::Kind::Alive(alive)) =
                self.inbound.message().await.ok()??.kind
            else {
                return None;
            };
            Alive::try_from(alive).ok().filter(|alive| alive.nonce == nonce)?.postgres
        };
        tokio::time::timeout(PROOF_TIMEOUT, asked).await.ok().flatten()
    }
}

/// The questions to a live session.
pub(super) struct Proof {
    questions: mpsc::Receiver<Question>,
    can_prove: bool,
    /// The number of a question that is sent as soon as there is room.
    unsent: Option<u64>,
    /// The last question; an earlier one has timed out.
    open: Option<(u64, Question)>,
}

impl Proof {
    pub(super) fn new(questions: mpsc::Receiver<Question>, can_prove: bool) -> Self {
        Self { questions, can_prove, unsent: None, open: None }
    }

    /// Takes a question, or sends one to the client. Cancel-safe.
    pub(super) async fn step(&mut self, responses: &Responses) {
        let Self { questions, can_prove, unsent, open } = self;
        tokio::select! {
            permit = responses.reserve(), if unsent.is_some() => {
                // Without a client the stream ends anyway.
                if let (Ok(permit), Some(nonce)) = (permit, unsent.take()) {
                    permit.send(Ok(prove(nonce)));
                }
            }
            question = questions.recv() => match question {
                Some(question) if *can_prove => {
                    let nonce = rand::random();
                    (*unsent, *open) = (Some(nonce), Some((nonce, question)));
                }
                Some(unanswered) => drop(unanswered),
                None => std::future::pending().await,
            },
        }
    }

    /// Called when the client sends nothing more.
    pub(super) fn close(&mut self) {
        (self.can_prove, self.unsent, self.open) = (false, None, None);
    }

    pub(super) fn answered(&mut self, alive: Alive) {
        let Some((_, question)) = self.open.take_if(|(nonce, _)| *nonce == alive.nonce) else {
            return;
        };
        if let Some(postgres) = alive.postgres {
            // The side that asked may have timed out.
            let _ = question.send(postgres);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::{Lsn, TimelineId};
    use tokio::sync::oneshot;

    fn says(nonce: u64) -> Alive {
        let timeline = TimelineId::new(1).unwrap();
        let postgres = AlivePostgres { in_recovery: false, timeline, position: Lsn::new(5) };
        Alive { nonce, postgres: Some(postgres) }
    }

    async fn asked(sent: &mut mpsc::Receiver<Result<v1::ReceiveResponse, tonic::Status>>) -> u64 {
        match sent.recv().await.unwrap().unwrap().kind {
            Some(receive_response::Kind::Prove(v1::Prove { nonce })) => nonce,
            other => panic!("expected a question, found {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_question_goes_to_the_client_and_only_its_own_answer_counts() {
        let (ask, questions) = mpsc::channel(1);
        let (responses, mut sent) = mpsc::channel(4);
        let mut proof = Proof::new(questions, true);
        let (question, mut answer) = oneshot::channel();
        ask.send(question).await.unwrap();
        proof.step(&responses).await;
        proof.step(&responses).await;
        let nonce = asked(&mut sent).await;
        proof.answered(says(nonce.wrapping_add(1)));
        assert!(answer.try_recv().is_err(), "of another question");
        proof.answered(says(nonce));
        assert_eq!(answer.await.ok(), says(nonce).postgres);
        // A repeated answer has no effect.
        proof.answered(says(nonce));
    }

    #[tokio::test]
    async fn an_old_client_is_not_asked_and_proves_nothing() {
        let (ask, questions) = mpsc::channel(1);
        let (responses, mut sent) = mpsc::channel(4);
        let mut proof = Proof::new(questions, false);
        let (question, answer) = oneshot::channel();
        ask.send(question).await.unwrap();
        proof.step(&responses).await;
        assert!(answer.await.is_err());
        assert!(sent.try_recv().is_err());
    }

    #[tokio::test]
    async fn a_postgres_that_does_not_answer_proves_nothing() {
        let (ask, questions) = mpsc::channel(1);
        let (responses, mut sent) = mpsc::channel(4);
        let mut proof = Proof::new(questions, true);
        let (question, answer) = oneshot::channel();
        ask.send(question).await.unwrap();
        proof.step(&responses).await;
        proof.step(&responses).await;
        let nonce = asked(&mut sent).await;
        proof.answered(Alive { nonce, postgres: None });
        assert!(answer.await.is_err());
    }
}
