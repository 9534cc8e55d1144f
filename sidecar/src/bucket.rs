//! The bucket of `restore.from` (`--from`), opened without a server, for `restore`, `list` and `wal-fetch`.
//!
//! The options are those of the server's `[tier2]` section, so that a shell or file with the server's settings can be
//! used here too. Nothing is ever written. Messages contain neither credentials nor the identity. `NotFound` always
//! refers to an object in the bucket, never to a local file (P7).

use crate::{
    config::{Config, bucket::settings},
    error::{Error, Failure},
    server_link::{Which, numbered},
};
use klio_pg::{TimelineHistory, TimelineId};
use klio_proto::Code;
use klio_storage::{
    Kind,
    catalog::Timelines,
    crypt::Keys,
    generations::Generations,
    layout::{BackupName, BaseObject, ClusterName, Form, WalFile},
    record,
    tier2::{ListedObject, Tier2},
};

/// Only klio-server has what a person decided last.
const AS_RECORDED: &str = ", the current one according to the bucket (a decision that klio-server has not uploaded yet is not known here; --generation N chooses another one)";

/// The bucket, and the keys for encrypted files in it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Bucket {
    pub tier2: Tier2,
    /// The keys from `restore.identity`; `None` if it is not set.
    pub keys: Option<Keys>,
}

impl Bucket {
    /// Opens the bucket without connecting to it. `None` if `restore.from` is not set, so that the server is the source.
    ///
    /// # Errors
    /// Wrong settings, and files that cannot be read.
    pub fn open(config: &Config) -> Result<Option<Self>, Error> {
        let restore = &config.restore;
        if restore.from.is_empty() {
            return Ok(None);
        }
        let settings = settings(config)
            .map_err(|problems| Error::new(Failure::Config, problems.join("; ")))?;
        let tier2 = Tier2::open(&settings).map_err(|e| unopened(&e).during("open the bucket"))?;
        let keys = if restore.identity.as_os_str().is_empty() {
            None
        } else {
            let keys = Keys::load(&restore.identity, &[]);
            Some(keys.map_err(|e| {
                let hint = "set restore.identity (--identity) to the age identity file that klio-server had";
                unopened(&e).during("read restore.identity").hint(hint)
            })?)
        };
        Ok(Some(Self { tier2, keys }))
    }
}

impl Bucket {
    /// The name under which a history is stored: `<name>@<number>` stands for itself, a plain name for the current history.
    ///
    /// # Errors
    /// The bucket cannot be read, or has no generation of this number.
    pub async fn resolve(&self, named: &ClusterName) -> Result<ClusterName, Error> {
        let which = self.which(named).await?;
        Ok(Generations::place(&which.name, which.name.generation()))
    }

    /// The generation that a name means according to the bucket, which does not know what klio-server has decided since it
    /// last uploaded its record.
    ///
    /// # Errors
    /// As [`Bucket::resolve`].
    pub async fn which(&self, named: &ClusterName) -> Result<Which, Error> {
        let all = self.generations(named).await?;
        let number = named.number().unwrap_or_else(|| all.current());
        if all.get(number).is_none() {
            let known: Vec<_> = all.all().iter().map(|g| g.number.to_string()).collect();
            let message = format!(
                "read --generation: cluster {} has generations {} in this bucket, found {number}",
                named.base(),
                known.join(", ")
            );
            return Err(Error::new(Failure::Config, message));
        }
        let (several, is_named) = (all.all().len() > 1, named.number().is_some());
        let doubt = if several && !is_named { AS_RECORDED } else { "" }.to_owned();
        Ok(Which { name: numbered(named, number)?, matters: several || is_named, doubt })
    }

    /// As [`Which::elsewhere`], from the bucket.
    ///
    /// # Errors
    /// The bucket cannot be read.
    pub async fn elsewhere(&self, own: &Which) -> Result<Option<String>, Error> {
        let mut counted = Vec::new();
        for generation in self.generations(&own.name).await?.all() {
            let place = Generations::place(&own.name, generation.number);
            let names = self.backups(&place).await?;
            counted.push((generation.number, names.len() as u64));
        }
        Ok(own.elsewhere(counted))
    }

    /// The names of the backups that are stored for a generation.
    ///
    /// # Errors
    /// The bucket cannot be read.
    pub async fn backups(&self, place: &ClusterName) -> Result<Vec<BackupName>, Error> {
        let listed = self.tier2.list_prefix(&format!("{place}/backups")).await;
        let name = |object: ListedObject| {
            let relative = object.key.strip_prefix(&format!("{place}/"))?;
            match BaseObject::parse_relative(relative)? {
                BaseObject::Record(name) => Some(name),
                _ => None,
            }
        };
        Ok(listed.map_err(|e| of_storage(&e))?.into_iter().filter_map(name).collect())
    }

    async fn generations(&self, cluster: &ClusterName) -> Result<Generations, Error> {
        let key = BaseObject::Generations.key(&cluster.base());
        let bytes = self.tier2.read_small(&key, record::LIMIT_BYTES).await;
        let bytes = bytes.map_err(|e| of_storage(&e))?;
        let read = |bytes: bytes::Bytes| record::decode(&bytes, &key);
        Ok(bytes.map(read).transpose().map_err(|e| of_storage(&e))?.unwrap_or_default())
    }

    /// The decisions and conflicts that are recorded about a cluster's timelines; empty if two were never written at once.
    ///
    /// # Errors
    /// The bucket cannot be read; `Corrupt`.
    pub async fn timelines(&self, cluster: &ClusterName) -> Result<Timelines, Error> {
        let key = BaseObject::Timelines.key(cluster);
        let bytes = self.tier2.read_small(&key, record::LIMIT_BYTES).await;
        let bytes = bytes.map_err(|e| of_storage(&e))?;
        let read = |bytes: bytes::Bytes| Timelines::decode(&bytes, &key);
        Ok(bytes.map(read).transpose().map_err(|e| of_storage(&e))?.unwrap_or_default())
    }

    /// The ancestors of a timeline; `None` if there is no history file of it.
    ///
    /// # Errors
    /// The bucket cannot be read; `Forbidden` or `Config` without the identity that decrypts it; `Corrupt`.
    pub async fn history(
        &self,
        cluster: &ClusterName,
        timeline: TimelineId,
    ) -> Result<Option<TimelineHistory>, Error> {
        for form in Form::BOTH {
            let key = WalFile::History(timeline).key_in(cluster, form);
            let bytes = self.tier2.read_small(&key, record::LIMIT_BYTES).await;
            let Some(bytes) = bytes.map_err(|e| of_storage(&e))? else { continue };
            let plain = match (form, &self.keys) {
                (Form::Plain, _) => bytes.to_vec(),
                (Form::Age, Some(keys)) => {
                    keys.unwrap(&bytes).map_err(|e| of_storage(&e))?.to_vec()
                }
                (Form::Age, None) => {
                    let message = format!("read {key}: it is encrypted, and no identity is given");
                    return Err(Error::new(Failure::Config, message)
                        .hint("set restore.identity (--identity)"));
                }
            };
            let history = TimelineHistory::parse(timeline, &plain);
            return history
                .map(Some)
                .map_err(|e| Error::new(Failure::Code(Code::Corrupt), format!("read {key}: {e}")));
        }
        Ok(None)
    }
}

/// Converts an error of the storage crate. `NotFound` stays definitive (P7).
pub fn of_storage(error: &klio_storage::Error) -> Error {
    let failure = match error.kind {
        Kind::NotFound => Failure::Code(Code::NotFound),
        Kind::Conflict | Kind::Newer => Failure::Code(Code::Invalid),
        Kind::Invalid => Failure::Config,
        Kind::Corrupt => Failure::Code(Code::Corrupt),
        Kind::Denied => Failure::Code(Code::Forbidden),
        Kind::Full | Kind::Poisoned | Kind::Io => Failure::Local,
        Kind::Transient => Failure::Code(Code::Unavailable),
    };
    Error::of_storage(failure, error)
}

/// Converts an error from before the bucket was read. A missing local file must not look like a missing object (P7).
fn unopened(error: &klio_storage::Error) -> Error {
    let failure = match error.kind {
        Kind::NotFound | Kind::Invalid => Failure::Config,
        _ => Failure::Local,
    };
    Error::of_storage(failure, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_storage::generations::Stranger;

    fn config(text: &str) -> Config {
        Config::from_layers(Some(text), &[], &[]).unwrap()
    }

    /// A bucket with the record of two generations, of which only the first has a backup.
    fn two_generations(root: &std::path::Path) -> Bucket {
        let mut all = Generations::default();
        let (reason, system_identifier) = ("set back".to_owned(), 7);
        let stranger = Stranger { reason, system_identifier, ..Stranger::default() };
        all.begin(stranger, 1.0, true).unwrap();
        all.follow(2, "ops", 2.0).unwrap();
        std::fs::create_dir_all(root.join("main/backups")).unwrap();
        std::fs::create_dir_all(root.join("main@2")).unwrap();
        std::fs::write(root.join("main/backups/b1.json"), "{}").unwrap();
        let record = record::encode(&all, "generations.json").unwrap();
        std::fs::write(root.join("main/generations.json"), record).unwrap();
        let from = format!("[restore]\nfrom = \"file://{}\"\n", root.display());
        Bucket::open(&config(&from)).unwrap().unwrap()
    }

    /// Regression test: a restore from the bucket did not say that it took the generation that the bucket calls the
    /// current one, nor that another one has backups.
    #[tokio::test]
    async fn the_current_generation_of_a_bucket_is_told_with_its_doubt_and_where_backups_are() {
        let directory = tempfile::tempdir().unwrap();
        let bucket = two_generations(directory.path());
        let which = async |name: &str| {
            bucket.which(&ClusterName::parse_generation(name).unwrap()).await.unwrap()
        };
        let current = which("main").await;
        assert_eq!(current.name.as_str(), "main@2");
        let said = current.said().unwrap();
        assert!(said.contains("generation 2 of main") && said.contains("not known here"), "{said}");
        let elsewhere = bucket.elsewhere(&current).await.unwrap().unwrap();
        assert!(elsewhere.contains("1 in generation 1: use --generation 1"), "{elsewhere}");
        let named = which("main@1").await;
        assert_eq!(named.said().as_deref(), Some("generation 1 of main"));
        assert_eq!(bucket.elsewhere(&named).await.unwrap(), None);
        assert_eq!(bucket.resolve(&named.name).await.unwrap().as_str(), "main");
        let only = which("other").await;
        assert_eq!((only.name.as_str(), only.said()), ("other@1", None));
    }

    /// P7. In a manual test, `klio wal-fetch` with a missing identity file had answered 1, which means the end of the archive.
    #[test]
    fn a_file_of_ours_that_is_missing_or_wrong_is_never_a_missing_object() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().display();
        let from = format!("[restore]\nfrom = \"file://{place}\"\n");
        let s3 = "[restore]\nfrom = \"s3://b\"\n[tier2]\nregion = \"eu\"\n";
        std::fs::write(directory.path().join("rubbish"), "rubbish").unwrap();
        for text in [
            format!("{from}identity = \"{place}/none\"\n"),
            format!("{from}identity = \"{place}/rubbish\"\n"),
            format!("{from}identity = \"{place}\"\n"),
            format!("[restore]\nfrom = \"file://{place}/none\"\n"),
            format!("{s3}ca_file = \"{place}/none\"\n"),
        ] {
            let error = Bucket::open(&config(&text)).unwrap_err();
            assert!(matches!(error.failure, Failure::Config | Failure::Local), "{error:?}");
        }
        let missing = format!("{from}identity = \"{place}/none\"\n");
        let error = Bucket::open(&config(&missing)).unwrap_err();
        assert!(error.hint.contains("--identity"), "{error}");
        assert!(!error.message.contains("hint"), "{error}");
    }
}
