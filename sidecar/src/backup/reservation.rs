//! The server's promise to leave the repository alone while a backup runs, and to let no other backup run.
//!
//! The promise holds while an answer stream stays open. When the connection breaks, the same name is reserved again.
//! Maintenance that the server may start in between does no harm, because it marks packs long before it removes them
//! (REPO4). If the reservation cannot be renewed, the backup has to end.

use crate::{
    backoff::Backoff,
    error::{Error, Failure},
    server_link::{Connection, ServerLink},
};
use klio_proto::{
    Code,
    v1::{self, reserve_request::Purpose},
};
use klio_storage::layout::{BackupName, ClusterName};
use rand::{SeedableRng, rngs::StdRng};
use std::time::Duration;
use tokio::{task::JoinSet, time::Instant};
use tonic::Streaming;

/// Long enough for a server to restart, and far less than the time between marking and removing a pack.
const PATIENCE: Duration = Duration::from_secs(120);

/// A reservation that is renewed for as long as this lives.
#[derive(Debug)]
pub struct Reservation {
    /// The backup's name, as requested or as the server created it.
    pub name: BackupName,
    keeper: JoinSet<Error>,
}

type Answers = Streaming<v1::ReserveResponse>;

impl Reservation {
    /// Reserves a name; if `None`, the server creates one.
    ///
    /// # Errors
    /// The server's error, in particular `BUSY` while another backup of the cluster runs.
    pub async fn take(
        link: &ServerLink,
        cluster: &ClusterName,
        name: Option<&BackupName>,
    ) -> Result<Self, Error> {
        let wanted = name.map(ToString::to_string).unwrap_or_default();
        let reserved = reserve(link, cluster, &wanted, false).await;
        let (name, connection, answers) = reserved.map_err(|error| match error.failure {
            Failure::Code(Code::Invalid) if !wanted.is_empty() => {
                error.hint("choose another --name; klio list shows the names in use")
            }
            _ => error,
        })?;
        let mut keeper = JoinSet::new();
        keeper.spawn(keep(link.clone(), cluster.clone(), name.clone(), connection, answers));
        Ok(Self { name, keeper })
    }

    /// Waits until the reservation is lost for good; returns the reason. Cancel-safe.
    pub async fn lost(&mut self) -> Error {
        match self.keeper.join_next().await {
            Some(Ok(error)) => error,
            _ => Error::new(Failure::Code(Code::Internal), "keep reservation: its task ended"),
        }
    }
}

/// Owns the connection as well, because the connection closes with its last user.
async fn keep(
    link: ServerLink,
    cluster: ClusterName,
    name: BackupName,
    mut connection: Connection,
    mut answers: Answers,
) -> Error {
    loop {
        let why = loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => break "the server closed the stream".to_owned(),
                Err(status) => break Error::from_status("keep reservation", &status).message,
            }
        };
        tracing::warn!(backup = %name, "lost the reservation of the repository: {why}; reserving it again");
        drop(connection);
        (connection, answers) = match again(&link, &cluster, &name).await {
            Ok(fresh) => fresh,
            Err(error) => return error.during("renew the reservation of the repository"),
        };
        tracing::info!(backup = %name, "reserved the repository again");
    }
}

async fn again(
    link: &ServerLink,
    cluster: &ClusterName,
    name: &BackupName,
) -> Result<(Connection, Answers), Error> {
    let deadline = Instant::now() + PATIENCE;
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
    let mut rng = StdRng::from_os_rng();
    loop {
        let error = match reserve(link, cluster, name.as_str(), true).await {
            Ok((_, connection, answers)) => return Ok((connection, answers)),
            Err(error) => error,
        };
        let pause = backoff.pause(&mut rng);
        // BUSY may refer to our own lost connection, if the server has not noticed its end yet.
        if !error.retryable() || Instant::now() + pause >= deadline {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
    }
}

async fn reserve(
    link: &ServerLink,
    cluster: &ClusterName,
    name: &str,
    resumed: bool,
) -> Result<(BackupName, Connection, Answers), Error> {
    const DOING: &str = "reserve the repository";
    let failed = |status: tonic::Status| Error::from_status(DOING, &status);
    let connection = link.connect().await?;
    let request = v1::ReserveRequest {
        cluster: cluster.to_string(),
        purpose: Purpose::Backup.into(),
        backup_name: name.to_owned(),
        resumed,
    };
    let mut answers = connection.base().reserve(request).await.map_err(failed)?.into_inner();
    let first = answers.message().await.map_err(failed)?;
    let name = first.map(|m| m.backup_name).unwrap_or_default();
    let name = name
        .parse()
        .map_err(|error| Error::new(Failure::Code(Code::Invalid), format!("{DOING}: {error}")))?;
    Ok((name, connection, answers))
}
