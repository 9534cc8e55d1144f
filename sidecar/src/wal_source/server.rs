//! WAL from klio-server, over one connection that is opened again after a failure.

use super::{Answer, Shape, WalSource};
use crate::{
    error::{Error, Failure},
    server_link::{Connection, ServerLink},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use klio_proto::{
    Code,
    v1::{FetchRequest, FetchResponse},
};
use klio_storage::layout::{ClusterName, WalFile};
use tokio::sync::Mutex;
use tonic::Streaming;

pub(super) struct FromServer {
    link: ServerLink,
    cluster: String,
    /// Whether PostgreSQL asks, which may be a standby.
    for_postgresql: bool,
    connection: Mutex<Option<Connection>>,
}

impl FromServer {
    pub fn new(link: ServerLink, cluster: &ClusterName, for_postgresql: bool) -> Self {
        Self { link, cluster: cluster.to_string(), for_postgresql, connection: Mutex::new(None) }
    }

    async fn connection(&self) -> Result<Connection, Error> {
        // Locked while connecting, so that several waiting callers share one connection.
        let mut slot = self.connection.lock().await;
        if let Some(open) = slot.as_ref() {
            return Ok(open.clone());
        }
        Ok(slot.insert(self.link.connect().await?).clone())
    }
}

#[tonic::async_trait]
impl WalSource for FromServer {
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
        let connection = self.connection().await?;
        let request = FetchRequest {
            cluster: self.cluster.clone(),
            name: file.to_string(),
            tier2_only: other_copy,
            for_standby: self.for_postgresql && super::a_standby_asks(),
        };
        let answer = begin(&connection, request).await;
        // A lost connection never recovers; an error that the server returned does not affect the connection.
        if matches!(&answer, Err(error) if error.failure == Failure::Code(Code::Unavailable)) {
            *self.connection.lock().await = None;
        }
        answer
    }
}

async fn begin(connection: &Connection, request: FetchRequest) -> Result<Answer, Error> {
    const DOING: &str = "ask the server";
    let answer = connection.wal().fetch(request).await;
    let mut answer = answer.map_err(|status| Error::from_status(DOING, &status))?.into_inner();
    let first = answer.message().await.map_err(|status| Error::from_status(DOING, &status))?;
    let Some((header, data)) = first.and_then(|m| m.header.map(|h| (h, m.data))) else {
        let message = format!("{DOING}: no answer");
        return Err(Error::new(Failure::Code(Code::Unavailable), message));
    };
    let shape = Shape::of(&header)?;
    let rest = stream::unfold(Some(answer), next);
    let pieces = stream::iter([Ok(data)]).chain(rest).boxed();
    Ok(Answer { shape, keys: None, pieces })
}

type Rest = Option<Streaming<FetchResponse>>;

async fn next(rest: Rest) -> Option<(Result<Bytes, Error>, Rest)> {
    let mut answer = rest?;
    match answer.message().await {
        Ok(message) => message.map(|m| (Ok(m.data), Some(answer))),
        Err(status) => {
            let error = Error::from_status("read the server's answer", &status);
            // The answer had begun, so whatever interrupted it does not mean "no such file" (P7).
            let error = match error.failure {
                Failure::Code(Code::NotFound) => {
                    Error::new(Failure::Code(Code::Unavailable), error.message)
                }
                _ => error,
            };
            Some((Err(error), None))
        }
    }
}
