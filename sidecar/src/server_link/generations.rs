//! Names a generation of a cluster by its number, which stays with one history whatever is decided later (P11), and says
//! which one a command works on.

use super::{Connection, ServerLink};
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

/// The generation that a command works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Which {
    /// The name to ask by: with the number, unless the server is too old to know generations.
    pub name: ClusterName,
    /// The cluster has other generations as well, or the user named this one.
    pub matters: bool,
    /// What makes it uncertain that this is the generation that the user means; may be empty.
    pub doubt: String,
}

impl Which {
    /// A generation that the user named, or the name itself from an old server.
    pub fn named(name: &ClusterName) -> Self {
        Self { name: name.clone(), matters: name.number().is_some(), doubt: String::new() }
    }

    /// `generation 2 of main`, if a reader has to know.
    pub fn said(&self) -> Option<String> {
        let (number, base) = (self.name.generation(), self.name.base());
        self.matters.then(|| format!("generation {number} of {base}{}", self.doubt))
    }

    /// The same as the first line of a listing; otherwise nothing.
    pub fn line(&self) -> String {
        self.said().map_or_else(String::new, |said| format!("{said}\n"))
    }

    /// Adds the number to a JSON document, also where there is only one generation.
    pub fn tag(&self, mut document: serde_json::Value) -> serde_json::Value {
        if let Some(fields) = document.as_object_mut() {
            fields.insert("generation".into(), self.name.generation().into());
        }
        document
    }

    /// What to do with the other generations that have base backups, given as number and count; `None` if there are
    /// none.
    pub fn elsewhere(&self, all: impl IntoIterator<Item = (u32, u64)>) -> Option<String> {
        let others =
            all.into_iter().filter(|(n, backups)| *n != self.name.generation() && *backups > 0);
        let (numbers, said): (Vec<u32>, Vec<String>) =
            others.map(|(number, n)| (number, format!("{n} in generation {number}"))).unzip();
        let choice = match numbers.as_slice() {
            [] => return None,
            [only] => format!("--generation {only}"),
            _ => "--generation N".to_owned(),
        };
        Some(format!(
            "cluster {} has base backups in other generations, {}: use {choice}",
            self.name.base(),
            said.join(" and ")
        ))
    }
}

/// The generation that a name means now: a name with a number means itself, a plain name the current generation. The name is
/// taken as it is if the server is too old to know generations, or does not know the cluster.
///
/// # Errors
/// The server cannot be asked.
pub async fn which(connection: &Connection, named: &ClusterName) -> Result<Which, Error> {
    if named.number().is_some() {
        return Ok(Which::named(named));
    }
    let found = generations(connection, named, true).await?;
    let Some(current) = found.iter().find(|generation| generation.state == "current") else {
        return Ok(Which::named(named));
    };
    let (name, matters) = (numbered(named, current.number)?, found.len() > 1);
    Ok(Which { name, matters, doubt: String::new() })
}

/// As [`which`], over a connection of its own, which is opened only if the server has to be asked.
///
/// # Errors
/// The server cannot be asked.
pub async fn settle(link: &ServerLink, named: &ClusterName) -> Result<Which, Error> {
    match named.number() {
        Some(_) => Ok(Which::named(named)),
        None => which(&link.connect().await?, named).await,
    }
}

/// As [`Which::elsewhere`], from the server.
///
/// # Errors
/// The server cannot be asked.
pub async fn elsewhere(connection: &Connection, own: &Which) -> Result<Option<String>, Error> {
    let all = generations(connection, &own.name, false).await?;
    Ok(own.elsewhere(all.iter().map(|generation| (generation.number, generation.backups))))
}

/// Without `outline`, the server may have to ask the bucket.
async fn generations(
    connection: &Connection,
    named: &ClusterName,
    outline: bool,
) -> Result<Vec<v1::Generation>, Error> {
    let request = v1::ListGenerationsRequest { cluster: named.base().to_string(), outline };
    match connection.catalog().list_generations(request).await {
        Ok(answer) => Ok(answer.into_inner().generations),
        Err(status) if status.code() == tonic::Code::Unimplemented => Ok(Vec::new()),
        Err(status) => Err(Error::from_status("ask for generations", &status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn which(name: &str, matters: bool) -> Which {
        let name = ClusterName::parse_generation(name).unwrap();
        Which { name, matters, doubt: String::new() }
    }

    /// Regression test: no output said which generation it was about, and after `klio generation follow 2` a restore
    /// said only that there is no base backup.
    #[test]
    fn a_generation_is_named_where_there_are_several_and_those_with_backups_are_pointed_out() {
        assert_eq!(which("main@1", false).said(), None);
        let two = which("main@2", true);
        assert_eq!(two.said().as_deref(), Some("generation 2 of main"));
        assert_eq!(two.elsewhere([(2, 9), (3, 0)]), None);
        assert_eq!(
            two.elsewhere([(1, 1), (2, 0)]).as_deref(),
            Some(
                "cluster main has base backups in other generations, 1 in generation 1: use --generation 1"
            )
        );
        let several = two.elsewhere([(1, 3), (2, 0), (3, 1)]).unwrap();
        assert!(
            several.contains("3 in generation 1 and 1 in generation 3: use --generation N"),
            "{several}"
        );
    }

    #[test]
    fn a_document_says_its_generation_always() {
        let document = serde_json::json!({ "backups": [] });
        assert_eq!(which("main", false).tag(document.clone())["generation"], 1);
        assert_eq!(which("main@2", true).tag(document)["generation"], 2);
    }
}
