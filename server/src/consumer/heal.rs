//! Repairs damaged WAL on tier 1 from tier 2, if the bucket has a good copy.
//!
//! - As with WAL from PostgreSQL, nothing is replaced before all of it has arrived and was checked; the damaged file
//!   is set aside.
//! - A failure is a warning: the next comparison tries again, and PostgreSQL is asked as well.

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use klio_storage::{
    Error, Kind, Op,
    crypt::AtRest,
    layout::{ClusterName, Form, WalFile},
    tier2::{StoredObject, Tier2},
    wal::{SealedDecoder, WalStore},
};
use std::pin::Pin;

type Pieces = Pin<Box<dyn Stream<Item = Result<Bytes, Error>> + Send>>;

/// Repairs what can be repaired of a cluster. `stored` lists the objects in tier 2.
pub(super) async fn heal(
    tier2: &Tier2,
    store: &WalStore,
    cluster: &ClusterName,
    stored: &[StoredObject],
) {
    for file in store.mendable(cluster) {
        let (of, place) = (store.clone(), cluster.clone());
        if let Err(error) = blocking(move || of.doubt(&place, file)).await {
            tracing::warn!(%cluster, %file, %error, "cannot check whether a damaged file is good again");
        }
        if !store.mendable(cluster).contains(&file) {
            continue;
        }
        let Some(object) = stored.iter().find(|object| object.file == file) else { continue };
        let done = match file {
            WalFile::Segment(_) => segment(tier2, store, cluster, *object).await,
            _ => partial(tier2, store, cluster, *object).await,
        };
        match done {
            Ok(()) => {
                tracing::info!(%cluster, %file, "restored lost WAL on tier 1 from tier 2");
            }
            Err(error) => {
                tracing::warn!(%cluster, %file, %error, "cannot restore lost WAL on tier 1 from tier 2; trying again later");
            }
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::new(Kind::Io, Op::Recover, "tier 1", e))?
}

/// The object as it is stored, or decrypted if keys are given.
async fn pieces(
    tier2: &Tier2,
    cluster: &ClusterName,
    object: StoredObject,
    at_rest: Option<&AtRest>,
) -> Result<Pieces, Error> {
    let key = object.file.key_in(cluster, object.form);
    let download = tier2.download(&key).await?;
    match (object.form, at_rest) {
        (Form::Age, Some(at_rest)) => {
            let keys = at_rest.need(&key)?;
            Ok(keys.decrypt_stream(download, key).await?.boxed())
        }
        _ => Ok(download.boxed()),
    }
}

async fn segment(
    tier2: &Tier2,
    store: &WalStore,
    cluster: &ClusterName,
    object: StoredObject,
) -> Result<(), Error> {
    let (WalFile::Segment(name), Some(pinned)) = (object.file, store.pinned(cluster)) else {
        return Ok(());
    };
    let Some(start) = name.start_lsn(pinned.segment_size) else { return Ok(()) };
    let mut pieces = pieces(tier2, cluster, object, Some(store.at_rest())).await?;
    let mut decoder = SealedDecoder::new(pinned.segment_size.bytes())?;
    let (of, place) = (store.clone(), cluster.clone());
    let mut refill = blocking(move || of.refill(&place, name.timeline(), start)).await?;
    while let Some(piece) = pieces.try_next().await? {
        (refill, decoder) = blocking(move || {
            decoder.push(&piece, &mut |plain| refill.push(plain))?;
            Ok((refill, decoder))
        })
        .await?;
    }
    blocking(move || {
        decoder.finish()?;
        refill.finish().map(drop)
    })
    .await
}

async fn partial(
    tier2: &Tier2,
    store: &WalStore,
    cluster: &ClusterName,
    object: StoredObject,
) -> Result<(), Error> {
    let mut pieces = pieces(tier2, cluster, object, None).await?;
    let (of, place) = (store.clone(), cluster.clone());
    let mut mend = blocking(move || of.mend(&place, object.file, object.form)).await?;
    while let Some(piece) = pieces.try_next().await? {
        mend = blocking(move || mend.push(&piece).map(|()| mend)).await?;
    }
    blocking(move || mend.finish()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::tests::held;
    use klio_pg::Lsn;
    use klio_storage::tier2::Tier2Config;

    const SEGMENT: u64 = 1 << 20;

    /// Regression test: the problem was never cleared, and evicting the file failed every time, although the bucket
    /// had all of it.
    #[tokio::test]
    async fn what_rotted_on_tier_1_is_taken_from_tier_2_again() {
        let dir = tempfile::tempdir().unwrap();
        let (root, bucket) = (dir.path().join("tier1"), dir.path().join("bucket"));
        let end = Lsn::new(3 * SEGMENT + 8192);
        let (store, cluster, bytes) = held(dir.path(), Lsn::new(SEGMENT), end);
        store.set_over(&cluster, true);
        let files: Vec<WalFile> = store
            .unsealed(&cluster)
            .into_iter()
            .map(|file| store.seal(&cluster, file).unwrap().file)
            .collect();
        assert_eq!(files.len(), 3);
        let tier2 = Tier2::open(&Tier2Config::new(format!("file://{}", bucket.display()))).unwrap();
        for file in &files {
            let key = file.key_in(&cluster, Form::Plain);
            let local = root.join(&key);
            std::fs::copy(&local, bucket.join(&key)).unwrap();
            let mut rotten = std::fs::read(&local).unwrap();
            let middle = rotten.len() / 2;
            rotten[middle] ^= 4;
            std::fs::write(&local, rotten).unwrap();
            assert!(store.doubt(&cluster, *file).unwrap(), "{file}");
        }
        assert_eq!(store.problems(&cluster).len(), 3);
        heal(&tier2, &store, &cluster, &[]).await;
        assert_eq!(store.problems(&cluster).len(), 3, "tier 2 has none of it");
        let stored = tier2.list_wal(&cluster).await.unwrap();
        heal(&tier2, &store, &cluster, &stored).await;
        assert_eq!(store.problems(&cluster), Vec::<String>::new());
        for file in store.unsealed(&cluster) {
            store.seal(&cluster, file).unwrap();
        }
        let mut found = Vec::new();
        for file in &files {
            found.extend(store.plain_bytes(store.read(&cluster, *file).unwrap()).unwrap());
        }
        assert!(found == bytes);
        assert_eq!(store.positions(&cluster)[0].flushed, end);
    }
}
