//! WAL from klio-server, over one connection that is opened again after a failure.

use super::{Answer, Shape, WalSource};
use crate::{
    error::{Error, Failure},
    server_link::{Connection, ServerLink, settle},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use klio_proto::{
    Code,
    v1::{FetchRequest, FetchResponse},
};
use klio_storage::layout::{ClusterName, WalFile};
use tokio::sync::{Mutex, OnceCell};
use tonic::Streaming;

pub(super) struct FromServer {
    link: ServerLink,
    named: ClusterName,
    /// The generation that is read, once it is known.
    cluster: OnceCell<ClusterName>,
    /// Whether PostgreSQL asks, which may be a standby.
    for_postgresql: bool,
    connection: Mutex<Option<Connection>>,
}

impl FromServer {
    /// The server resolves the cluster's name at each request.
    pub fn new(link: ServerLink, named: ClusterName, for_postgresql: bool) -> Self {
        let cluster = OnceCell::new_with(Some(named.clone()));
        Self { link, named, cluster, for_postgresql, connection: Mutex::new(None) }
    }

    /// The name is resolved at the first request, and kept: a decision that a person makes during a recovery must not
    /// switch the recovery to another history's WAL (P11).
    pub fn settled(link: ServerLink, named: ClusterName) -> Self {
        Self { cluster: OnceCell::new(), ..Self::new(link, named, true) }
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
        let settled = async { settle(&self.link, &self.named).await.map(|which| which.name) };
        let cluster = self.cluster.get_or_try_init(|| settled).await?.to_string();
        let connection = self.connection().await?;
        let request = FetchRequest {
            cluster,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config, fake_server::FakeServer, wal_source::testing::segment};

    /// What was asked for in the names of which cluster, while another generation is followed in between.
    async fn asked(
        source: impl FnOnce(ServerLink) -> FromServer,
        current: Option<u32>,
    ) -> Vec<String> {
        let server = FakeServer::start().await;
        server.change(|script| script.current = current);
        let settings = config::Server {
            address: server.address.clone(),
            unsafe_plaintext: true,
            ..config::Server::default()
        };
        let source = source(ServerLink::new(&settings).unwrap());
        let file = WalFile::Segment(segment(1, 5));
        assert!(source.ask(file, false).await.is_err(), "the server has no files");
        server.change(|script| script.current = current.map(|number| number + 1));
        assert!(source.ask(file, false).await.is_err());
        server.script().fetched_of.clone()
    }

    #[tokio::test]
    async fn a_recovery_stays_with_the_generation_that_it_began_with() {
        let named = |name: &str| ClusterName::parse_generation(name).unwrap();
        let settled = |link| FromServer::settled(link, named("pg"));
        assert_eq!(asked(settled, Some(1)).await, ["pg@1", "pg@1"]);
        assert_eq!(asked(settled, Some(2)).await, ["pg@2", "pg@2"]);
        assert_eq!(asked(settled, None).await, ["pg", "pg"]);
        let numbered = |link| FromServer::settled(link, named("pg@1"));
        assert_eq!(asked(numbered, Some(2)).await, ["pg@1", "pg@1"]);
        let each = |link| FromServer::new(link, named("pg"), true);
        assert_eq!(asked(each, Some(1)).await, ["pg", "pg"]);
    }
}
