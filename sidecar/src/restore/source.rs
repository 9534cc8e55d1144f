//! Where a restore reads: a server, or the bucket itself, for which the bucket's credentials suffice.
//!
//! Both give the same: backup records, holdings, the repository and WAL. What cannot be listed is an error, never an
//! empty list (P7).

use crate::{
    bucket::{Bucket, of_storage},
    config::Config,
    error::{Error, Failure},
    server_link::{BaseLink, GrpcFiles, ServerLink, Which, elsewhere, settle},
    wal_source::{self, Expected, Fetch, Target as FetchTarget, WalSource},
};
use klio_pg::{ByteSize, Lsn, SegmentName, SegmentSize, TimelineId};
use klio_proto::{
    Code,
    v1::{self, reserve_request::Purpose},
};
use klio_storage::{
    catalog::{
        BackupRecord, DrillOutcome, Holdings, VerifyOutcome,
        holdings::{HeldFile, Parts},
    },
    crypt::AtRest,
    generations::Generations,
    layout::{BackupName, BaseObject, ClusterName, WalFile},
    record,
    repository::{
        BucketFiles, Files, Repository, SECRET_LIMIT_BYTES, Secret, Windowed, decode_secret,
        secret_objects,
    },
    tier2::StoredObject,
    wal::{LevelChange, Pinned},
};
use std::{sync::Arc, time::Duration};
use tokio::{runtime::Handle, sync::watch, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

/// Size of one read: a request costs a round trip, and neighbouring chunks are read soon after (docs/benchmarks.md).
const WINDOW: ByteSize = ByteSize::mib(2);
/// Size of one read in a delta restore, which reads single chunks that are far apart.
const DELTA_WINDOW: ByteSize = ByteSize::kib(256);
/// Limit of the memory for all windows together.
const WINDOWS: ByteSize = ByteSize::mib(64);

/// How long a restore waits for the server to confirm its reservation. Without this wait a small restore would be done
/// before, and PostgreSQL would then fetch WAL that is not protected.
const RESERVED_WITHIN: Duration = Duration::from_secs(5);
/// Pause before the reservation is requested again. A restarted server has forgotten it, but removes nothing in its
/// first minutes.
const RESERVE_AGAIN: Duration = Duration::from_secs(10);

/// A backup, where it is stored, and the newest results about it.
#[derive(Debug, Clone)]
pub struct Known {
    pub record: BackupRecord,
    /// All of its files are on tier 1.
    pub tier1: bool,
    /// All of its files were verified in tier 2.
    pub tier2: bool,
    pub verified: Option<VerifyOutcome>,
    pub drilled: Option<DrillOutcome>,
}

/// The backups and the WAL that can be restored from.
#[derive(Debug, Clone, Default)]
pub struct Catalog {
    /// Oldest first.
    pub backups: Vec<Known>,
    /// What could not be read, as text for the user.
    pub problems: Vec<String>,
    pub holdings: Holdings,
}

impl Known {
    /// Why a restore of this backup is expected to fail; `None` if nothing speaks against it.
    pub fn doubt(&self) -> Option<String> {
        let outcome = self.verified.as_ref().filter(|outcome| !outcome.ok)?;
        let files = outcome.damaged.iter().filter(|damage| self.needs(&damage.key)).count();
        let name = &self.record.name;
        (files > 0).then(|| {
            format!("backup {name} is damaged: {files} of its files are changed or missing")
        })
    }

    /// Whether every restore of this backup needs the object: files of the repository, and WAL between the backup's
    /// start and end. Other WAL is needed only for some targets.
    fn needs(&self, key: &str) -> bool {
        let Some((_, relative)) = key.split_once('/') else { return false };
        let Some(wal) = relative.strip_prefix("wal/") else { return relative.starts_with("base/") };
        let Some((WalFile::Segment(segment), _)) = WalFile::parse_stored(wal) else { return false };
        let size = SegmentSize::new(self.record.segment_size).ok();
        let start = size.and_then(|size| Some((segment.start_lsn(size)?, size)));
        start.is_some_and(|(start, size)| {
            start < self.record.stop_lsn && start.advance(size.bytes()) > self.record.start_lsn
        })
    }
}

impl Catalog {
    pub fn records(&self) -> Vec<BackupRecord> {
        self.backups.iter().map(|known| known.record.clone()).collect()
    }

    /// The records of the backups of which no damage is known.
    pub fn sound(&self) -> Vec<BackupRecord> {
        let sound = self.backups.iter().filter(|known| known.doubt().is_none());
        sound.map(|known| known.record.clone()).collect()
    }

    pub fn known(&self, name: &BackupName) -> Option<&Known> {
        self.backups.iter().find(|known| known.record.name == *name)
    }
}

enum Place {
    Server(BaseLink, ServerLink),
    Bucket(Bucket),
}

pub struct Source {
    cluster: ClusterName,
    which: Which,
    place: Place,
    wal: Arc<dyn WalSource>,
    stop: CancellationToken,
}

/// Protects the WAL of a backup from the server's retention until it is dropped.
#[derive(Debug, Default)]
pub struct Reserved(#[allow(dead_code)] JoinSet<()>);

impl Source {
    /// Reads the settings; connects to nothing yet.
    ///
    /// # Errors
    /// Wrong settings, and files that cannot be read.
    pub fn open(config: &Config, stop: &CancellationToken) -> Result<Self, Error> {
        let place = match Bucket::open(config)? {
            Some(bucket) => Place::Bucket(bucket),
            None => {
                let link = ServerLink::new(&config.server)?;
                let base = BaseLink::new(link.clone(), stop.clone());
                Place::Server(base.patience(Duration::from_secs(30)), link)
            }
        };
        let cluster = config.cluster()?;
        let wal = wal_source::open_as(config, cluster.clone(), false)?;
        Ok(Self { which: Which::named(&cluster), cluster, place, wal, stop: stop.clone() })
    }

    /// Resolves the cluster's name to the generation that is current now, and stays with it: a decision that somebody
    /// makes during the restore or the recovery must not switch it to another history (P11). WAL is therefore asked for
    /// by the generation's number, and also the first generation, whose directory has the plain name.
    ///
    /// # Errors
    /// The server or the bucket cannot be read.
    pub async fn settle(mut self, config: &Config) -> Result<Self, Error> {
        match &self.place {
            Place::Bucket(bucket) => {
                self.which = bucket.which(&self.cluster).await?;
                self.cluster = Generations::place(self.told(), self.told().generation());
            }
            Place::Server(_, link) => {
                self.which = settle(link, &self.cluster).await?;
                self.cluster = self.told().clone();
            }
        }
        self.wal = wal_source::open_as(config, self.told().clone(), false)?;
        Ok(self)
    }

    /// The cluster's name to pass to wal-fetch: with the number of its generation, unless the server knows no generations.
    pub fn told(&self) -> &ClusterName {
        &self.which.name
    }

    /// The generation that is read.
    pub const fn which(&self) -> &Which {
        &self.which
    }

    /// The other generations that have base backups, as text for the user; `None` if there are none, or if that cannot be
    /// found out.
    pub async fn elsewhere(&self) -> Option<String> {
        let found = match &self.place {
            Place::Server(_, link) => match link.connect().await {
                Ok(connection) => elsewhere(&connection, &self.which).await,
                Err(error) => Err(error),
            },
            Place::Bucket(bucket) => bucket.elsewhere(&self.which).await,
        };
        found.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot find out whether other generations have base backups");
            None
        })
    }

    /// Adds to an error about what this generation does not have which one it is, and which others have backups.
    pub async fn located(&self, mut error: Error) -> Error {
        if let Some(said) = self.which.said() {
            error = error.during(said);
        }
        if let Some(elsewhere) = self.elsewhere().await {
            let before = if error.hint.is_empty() { "" } else { "; " };
            error.hint = format!("{}{before}{elsewhere}", error.hint);
        }
        error
    }

    /// The server's address or the bucket's URL, as text for the user.
    pub fn name(&self) -> String {
        match &self.place {
            Place::Server(base, _) => base.address().to_owned(),
            Place::Bucket(bucket) => bucket.tier2.url().to_owned(),
        }
    }

    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Whether the bucket is read directly, without a server.
    pub const fn is_bucket(&self) -> bool {
        matches!(self.place, Place::Bucket(_))
    }

    /// Lists all backups and all WAL.
    ///
    /// # Errors
    /// The server or the bucket cannot be read.
    pub async fn catalog(&self) -> Result<Catalog, Error> {
        match &self.place {
            Place::Server(base, _) => self.ask_server(base).await,
            Place::Bucket(bucket) => self.list_bucket(bucket).await,
        }
    }

    async fn ask_server(&self, base: &BaseLink) -> Result<Catalog, Error> {
        let cluster = self.cluster.to_string();
        let listed = base
            .call("list backups", async |mut client| {
                let request = v1::ListBackupsRequest { cluster: cluster.clone() };
                client.list_backups(request).await.map(tonic::Response::into_inner)
            })
            .await?;
        let holdings = base
            .call("list the stored WAL", async |mut client| {
                let request = v1::HoldingsRequest { cluster: cluster.clone() };
                client.holdings(request).await.map(tonic::Response::into_inner)
            })
            .await?;
        let holdings = json(&holdings.holdings, "holdings")?;
        let known = |entry: v1::BackupEntry| {
            Ok(Known {
                record: json(&entry.record, "backup record")?,
                tier1: entry.tier1,
                tier2: entry.tier2,
                verified: optional(&entry.verified, "verification")?,
                drilled: optional(&entry.drilled, "drill")?,
            })
        };
        let backups: Result<Vec<Known>, Error> = listed.backups.into_iter().map(known).collect();
        Ok(Catalog { backups: backups?, problems: listed.problems, holdings })
    }

    async fn list_bucket(&self, bucket: &Bucket) -> Result<Catalog, Error> {
        let (tier2, cluster) = (&bucket.tier2, &self.cluster);
        let mut catalog = Catalog::default();
        for name in bucket.backups(cluster).await? {
            match self.bucket_record(bucket, &name).await {
                Ok(Some(record)) => catalog.backups.push(Known {
                    record,
                    tier1: false,
                    tier2: true,
                    verified: None,
                    drilled: None,
                }),
                Ok(None) => {}
                Err(error) if error.failure == Failure::Code(Code::Corrupt) => {
                    catalog.problems.push(format!("backup {name}: {}", error.message));
                }
                Err(error) => return Err(error),
            }
        }
        catalog.backups.sort_by(|a, b| {
            a.record.stopped_postgres_unix.total_cmp(&b.record.stopped_postgres_unix)
        });
        catalog.holdings = self.bucket_holdings(bucket).await?;
        if catalog.backups.is_empty() && catalog.holdings.timelines.is_empty() {
            let message = format!("find cluster {cluster}: there is none in {}", tier2.url());
            let error = Error::new(Failure::Config, message)
                .hint("compare --cluster and --from with the settings of klio-server");
            return Err(self.located(error).await);
        }
        Ok(catalog)
    }

    async fn bucket_record(
        &self,
        bucket: &Bucket,
        name: &BackupName,
    ) -> Result<Option<BackupRecord>, Error> {
        let key = name.record_key(&self.cluster);
        let bytes = bucket.tier2.read_small(&key, record::LIMIT_BYTES).await;
        let bytes = bytes.map_err(|e| of_storage(&e))?;
        let read = |bytes: bytes::Bytes| record::decode(&bytes, &key).map_err(|e| of_storage(&e));
        bytes.map(read).transpose()
    }

    async fn bucket_holdings(&self, bucket: &Bucket) -> Result<Holdings, Error> {
        let (tier2, cluster) = (&bucket.tier2, &self.cluster);
        let failed = |error: klio_storage::Error| of_storage(&error);
        let key = BaseObject::Cluster.key(cluster);
        let pinned = tier2.read_small(&key, record::LIMIT_BYTES).await.map_err(failed)?;
        let pinned = pinned.map(|b| Pinned::decode(&b, &key).map_err(failed)).transpose()?;
        let mut parts = Parts {
            segment_size: pinned.as_ref().map(|p| p.segment_size),
            system_identifier: pinned.as_ref().map(|p| p.system_identifier),
            as_of_unix: jiff::Timestamp::now().as_microsecond() as f64 / 1e6,
            marks: bucket.timelines(cluster).await?,
            ..Parts::default()
        };
        let key = BaseObject::WalLevels.key(cluster);
        let levels = tier2.read_small(&key, record::LIMIT_BYTES).await.map_err(failed)?;
        let levels =
            levels.map(|b| LevelChange::decode_all(&b, &key).map_err(failed)).transpose()?;
        parts.levels = levels.unwrap_or_default();
        let scratch = super::Scratch::new(None)?;
        for object in tier2.list_wal(cluster).await.map_err(failed)? {
            let mut held = HeldFile::from(object.file);
            match object.file {
                WalFile::History(timeline) => {
                    let text = self.history(timeline, &scratch).await?;
                    parts.histories.insert(timeline, text);
                }
                WalFile::Partial(name) => {
                    held.end =
                        partial_end(bucket, cluster, &object, name, parts.segment_size).await?;
                }
                WalFile::Segment(_) => {}
            }
            parts.tier2.push(held);
        }
        Ok(Holdings::from_parts(parts))
    }

    async fn history(
        &self,
        timeline: TimelineId,
        scratch: &super::Scratch,
    ) -> Result<String, Error> {
        let file = WalFile::History(timeline);
        let path = self.fetch(file, scratch).await?;
        let text = std::fs::read(&path).map_err(|e| super::local("read", &path, &e))?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Fetches a WAL file, whole and checked, into `scratch`, unless it is there already.
    ///
    /// # Errors
    /// `NotFound` is definitive (P7).
    pub async fn fetch(
        &self,
        file: WalFile,
        scratch: &super::Scratch,
    ) -> Result<std::path::PathBuf, Error> {
        let path = scratch.join(&file.to_string());
        if path.is_file() {
            return Ok(path);
        }
        let target = Arc::new(FetchTarget::beside(&path)?);
        // The planner knows where recovery ends.
        let expected = Expected { has_target: true, ..Expected::default() };
        let fetch = Fetch { source: Arc::clone(&self.wal), file, expected };
        let fetched = fetch.until(&target, Instant::now() + Duration::from_secs(60));
        tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(super::stopped()),
            result = fetched => drop(result?),
        }
        target.commit(&path, false)?;
        Ok(path)
    }

    /// Opens the repository. With `delta`, reads are small because most chunks will not be read. The second value is
    /// direct access to the server's files, if there is a server.
    ///
    /// # Errors
    /// The server or the bucket cannot be read; `Forbidden` without the decryption key.
    pub(super) async fn repository(
        &self,
        delta: bool,
    ) -> Result<(Repository, Option<GrpcFiles>), Error> {
        let window = if delta { DELTA_WINDOW } else { WINDOW };
        let mut server = None;
        let (files, secret): (Arc<dyn Files>, Secret) = match &self.place {
            Place::Server(base, link) => {
                let cluster = self.cluster.to_string();
                let answer = base
                    .call("open the repository", async |mut client| {
                        let request = v1::OpenRepositoryRequest {
                            cluster: cluster.clone(),
                            ..Default::default()
                        };
                        client.open_repository(request).await.map(tonic::Response::into_inner)
                    })
                    .await?;
                let files = GrpcFiles::new(
                    link.clone(),
                    self.cluster.clone(),
                    Handle::current(),
                    self.stop.clone(),
                );
                server = Some(files.clone());
                (Arc::new(Windowed::new(files, window, WINDOWS)), json(&answer.secret, "secret")?)
            }
            Place::Bucket(bucket) => {
                let secret = self.bucket_secret(bucket).await?;
                let (tier2, cluster) = (bucket.tier2.clone(), self.cluster.clone());
                let files = BucketFiles::new(tier2, cluster, Handle::current());
                (Arc::new(Windowed::new(files, window, WINDOWS)), secret)
            }
        };
        let opened = tokio::task::spawn_blocking(move || Repository::open(files, &secret)).await;
        Ok((super::joined(opened)?, server))
    }

    async fn bucket_secret(&self, bucket: &Bucket) -> Result<Secret, Error> {
        let at_rest = bucket.keys.clone().map_or(AtRest::Off, AtRest::On);
        for object in secret_objects(&at_rest) {
            let key = object.key(&self.cluster);
            let found = bucket.tier2.read_small(&key, SECRET_LIMIT_BYTES).await;
            let Some(bytes) = found.map_err(|e| of_storage(&e))? else { continue };
            let encrypted = object == BaseObject::Secret { encrypted: true };
            return decode_secret(&bytes, encrypted, &at_rest, &key).map_err(|error| {
                of_storage(&error).hint(
                    "name klio-server's age identity file (encryption.identity_file) with --identity",
                )
            });
        }
        let place = bucket.tier2.url();
        let message = format!(
            "open the repository of cluster {}: {place} has no repository.json[.age]",
            self.cluster
        );
        Err(Error::new(Failure::Code(Code::Corrupt), message))
    }

    /// Reserves the backup at the server, so that its WAL stays while this restore runs, and an hour longer. Packs do
    /// not depend on it: they are marked long before they are removed (REPO4). Waits a few seconds for the server's
    /// confirmation and then goes on without it. The request is repeated in the background until the server confirms,
    /// and again when the connection breaks, for example because the server was restarted.
    pub async fn reserve(&self, backup: &BackupName) -> Reserved {
        let Place::Server(_, link) = &self.place else { return Reserved::default() };
        let request = v1::ReserveRequest {
            cluster: self.cluster.to_string(),
            purpose: Purpose::Restore.into(),
            backup_name: backup.to_string(),
            ..v1::ReserveRequest::default()
        };
        let (link, (heard, mut first)) = (link.clone(), watch::channel(false));
        let mut keeper = JoinSet::new();
        keeper.spawn(async move {
            loop {
                keep_reserved(&link, request.clone(), &heard).await;
                tokio::time::sleep(RESERVE_AGAIN).await;
            }
        });
        let _ = tokio::time::timeout(RESERVED_WITHIN, first.wait_for(|heard| *heard)).await;
        Reserved(keeper)
    }

    /// Records at the server how a drill went. Does nothing if there is no server.
    ///
    /// # Errors
    /// The server's refusal, or that it cannot be reached.
    pub async fn record_drill(&self, outcome: &DrillOutcome) -> Result<(), Error> {
        let Place::Server(base, _) = &self.place else { return Ok(()) };
        let outcome = serde_json::to_vec(outcome)
            .map_err(|e| Error::new(Failure::Code(Code::Internal), format!("write drill: {e}")))?;
        let cluster = self.cluster.to_string();
        base.call("record the drill", async |mut client| {
            let (cluster, outcome) = (cluster.clone(), outcome.clone().into());
            client.record_drill(v1::RecordDrillRequest { cluster, outcome }).await.map(drop)
        })
        .await
    }
}

/// One past the last byte of a partial segment. All of its bytes were acknowledged, so it counts up to its last byte.
async fn partial_end(
    bucket: &Bucket,
    cluster: &ClusterName,
    object: &StoredObject,
    name: SegmentName,
    size: Option<SegmentSize>,
) -> Result<Option<Lsn>, Error> {
    let Some(size) = size else { return Ok(None) };
    let Some(start) = name.start_lsn(size) else { return Ok(None) };
    let at_rest = bucket.keys.clone().map_or(AtRest::Off, AtRest::On);
    let key = object.file.key_in(cluster, object.form);
    let bytes = bucket.tier2.plain_size(&key, object.form, &at_rest, size.bytes()).await;
    bytes.map(|bytes| Some(start.advance(bytes))).map_err(|e| of_storage(&e))
}

/// Holds one reservation for as long as the connection lives.
async fn keep_reserved(
    link: &ServerLink,
    request: v1::ReserveRequest,
    heard: &watch::Sender<bool>,
) {
    let Ok(connection) = link.connect().await else { return };
    match connection.base().reserve(request).await {
        Ok(answer) => {
            let mut answers = answer.into_inner();
            while let Ok(Some(_)) = answers.message().await {
                heard.send_replace(true);
            }
        }
        Err(status) => tracing::debug!("reserve for a restore: {}", status.message()),
    }
}

fn json<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|error| {
        // The message must not show the bytes: one of these documents is a secret.
        let at = (error.line(), error.column());
        Error::new(Failure::Code(Code::Invalid), format!("read {what}: not as expected at {at:?}"))
    })
}

fn optional<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<Option<T>, Error> {
    if bytes.is_empty() { Ok(None) } else { json(bytes, what).map(Some) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RESTORE6.
    #[test]
    fn a_backup_is_in_doubt_for_what_each_restore_of_it_needs() {
        let (start, stop) = (klio_pg::Lsn::new(0x50_0028), klio_pg::Lsn::new(0x60_0138));
        let timeline = TimelineId::new(1).unwrap();
        let record =
            klio_storage::testing::backup_record("b".parse().unwrap(), timeline, start, stop);
        let size = SegmentSize::new(record.segment_size).unwrap();
        let name =
            |lsn: klio_pg::Lsn| klio_pg::SegmentName::containing(timeline, lsn, size).to_string();
        let (own, later) =
            (name(record.start_lsn), name(record.stop_lsn.advance(9 * size.bytes())));
        let known = Known { record, tier1: true, tier2: false, verified: None, drilled: None };
        for (key, needed) in [
            ("main/base/data/ab/abcd".to_owned(), true),
            (format!("main/wal/00000001/{own}.zst.age"), true),
            (format!("main/wal/00000001/{later}.zst"), false),
            ("main/wal/00000002.history".to_owned(), false),
            ("main/cluster.json".to_owned(), false),
        ] {
            assert_eq!(known.needs(&key), needed, "{key}");
        }
    }
}
