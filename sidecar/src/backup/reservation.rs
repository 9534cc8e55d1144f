//! The server's word that it leaves the repository alone while a backup runs, and that no other one runs.
//!
//! It is an answer that stays open. When the connection breaks, the same name is reserved again: what the
//! server may begin meanwhile is harmless for a while, because it marks packs long before it removes them
//! (REPO4). When that does not work out, the backup has to end.

use crate::{
    error::{Error, Failure},
    server_link::{Connection, ServerLink},
    streamer::Backoff,
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

/// A server that restarts is back by then; far less than the time for which marked packs are kept.
const PATIENCE: Duration = Duration::from_secs(120);

/// A reservation that is kept for as long as this lives.
#[derive(Debug)]
pub struct Reservation {
    /// The backup's name, as asked for or as the server made it.
    pub name: BackupName,
    keeper: JoinSet<Error>,
}

type Answers = Streaming<v1::ReserveResponse>;

impl Reservation {
    /// Reserves a name; without one the server makes it.
    ///
    /// # Errors
    /// The server's: `BUSY` while another backup of the cluster runs.
    pub async fn take(
        link: &ServerLink,
        cluster: &ClusterName,
        name: Option<&BackupName>,
    ) -> Result<Self, Error> {
        let wanted = name.map(ToString::to_string).unwrap_or_default();
        let reserved = reserve(link, cluster, &wanted, false).await;
        let (name, connection, answers) = reserved.map_err(|error| match error.failure {
            Failure::Code(Code::Invalid) if !wanted.is_empty() => {
                error.hint("choose another --name: klio list shows those that are taken")
            }
            _ => error,
        })?;
        let mut keeper = JoinSet::new();
        keeper.spawn(keep(link.clone(), cluster.clone(), name.clone(), connection, answers));
        Ok(Self { name, keeper })
    }

    /// Waits until it is lost for good; gives the reason. Cancel-safe.
    pub async fn lost(&mut self) -> Error {
        match self.keeper.join_next().await {
            Some(Ok(error)) => error,
            _ => Error::new(Failure::Code(Code::Internal), "keep reservation: its task ended"),
        }
    }
}

/// Holds the connection, too: it would close with its last user.
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
                Ok(None) => break "the server ended it".to_owned(),
                Err(status) => break Error::from_status("keep reservation", &status).message,
            }
        };
        tracing::warn!(backup = %name, "reservation lost: {why}; reserving again");
        drop(connection);
        (connection, answers) = match again(&link, &cluster, &name).await {
            Ok(fresh) => fresh,
            Err(error) => return error.during("keep the repository reserved"),
        };
        tracing::info!(backup = %name, "reserved again");
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
        // BUSY may be ourselves: a server that has not yet noticed the end of the old connection.
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
