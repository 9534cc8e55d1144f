//! Names a generation of a cluster by its number, which stays with one history whatever is decided later (P11).

use super::ServerLink;
use crate::error::{Error, Failure};
use klio_proto::v1;
use klio_storage::layout::ClusterName;

/// `NAME@N`, also for the first generation, whose directory has the plain name.
///
/// # Errors
/// `Config` if the number is 0.
pub fn numbered(cluster: &ClusterName, number: u32) -> Result<ClusterName, Error> {
    ClusterName::parse_generation(&format!("{}@{number}", cluster.base()))
        .map_err(|error| Error::new(Failure::Config, error))
}

/// The generation that a name means now: a name with a number means itself, a plain name the current generation. The name is
/// returned as it is if the server is too old to know generations, or does not know the cluster.
///
/// # Errors
/// The server cannot be asked.
pub async fn settle(link: &ServerLink, named: &ClusterName) -> Result<ClusterName, Error> {
    if named.number().is_some() {
        return Ok(named.clone());
    }
    let request = v1::ListGenerationsRequest { cluster: named.to_string() };
    let answer = link.connect().await?.catalog().list_generations(request).await;
    let found = match answer {
        Ok(answer) => answer.into_inner().generations,
        Err(status) if status.code() == tonic::Code::Unimplemented => return Ok(named.clone()),
        Err(status) => return Err(Error::from_status("ask for generations", &status)),
    };
    let current = found.iter().find(|generation| generation.state == "current");
    current.map_or_else(|| Ok(named.clone()), |current| numbered(named, current.number))
}
