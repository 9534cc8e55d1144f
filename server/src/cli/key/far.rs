//! The part of `klio-server key` that lies in the bucket.
//!
//! An object is written over only by bytes that were decrypted again and found to hold the same, in one request, which
//! leaves the old or the new object, whole. What lies there afterwards is read back; if it is neither, the old one is
//! put back. So there is always one that the identity file opens (P5). Only the server's own clusters are written.

use super::{Keys, name};
use anyhow::{Context, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use klio_storage::{
    catalog::archive_file,
    crypt::{self, HEADER_LIMIT_BYTES},
    layout::{ClusterName, Form, WalFile},
    tier2::{ListedObject, Tier2},
    wal::WalStore,
};
use std::collections::BTreeMap;

/// Objects whose headers are read, or that are written again, at once.
const AT_ONCE: usize = 4;
/// Larger ones are written again one by one: each is in memory three times.
const SMALL_BYTES: u64 = 64 << 20;

/// For whom an object is; of the beginning only, which is all that says it.
async fn recipients(tier2: &Tier2, object: &ListedObject) -> anyhow::Result<Vec<String>> {
    let length = object.size.min(HEADER_LIMIT_BYTES as u64);
    let download = tier2.download_range(&object.key, 0, Some(length)).await?;
    let head: Vec<Bytes> = download.try_collect().await?;
    Ok(crypt::recipients_of(&head.concat()).unwrap_or_default())
}

/// Every encrypted object of the bucket, and for whom it is.
pub(super) async fn locked(tier2: &Tier2) -> anyhow::Result<Vec<(String, Vec<String>)>> {
    let mut found = Vec::new();
    for cluster in tier2.clusters().await? {
        let mut objects = tier2.list_prefix(cluster.as_str()).await?;
        objects.retain(|object| object.key.ends_with(".age"));
        let heads = stream::iter(objects).map(|object| async move {
            anyhow::Ok((object.key.clone(), recipients(tier2, &object).await?))
        });
        found.extend(heads.buffered(AT_ONCE).try_collect::<Vec<_>>().await?);
    }
    Ok(found)
}

/// Writes a cluster's WAL again that is not for the recipients of now.
pub(super) async fn rewrap_wal(
    store: &WalStore,
    tier2: &Tier2,
    cluster: &ClusterName,
    keys: &Keys,
) -> anyhow::Result<()> {
    let prefix = format!("{cluster}/wal");
    let mut objects = Vec::new();
    for object in tier2.list_prefix(&prefix).await? {
        let relative = object.key.strip_prefix(&prefix).unwrap_or_default().trim_start_matches('/');
        if let Some((file, Form::Age)) = WalFile::parse_stored(relative) {
            objects.push((file, object));
        }
    }
    let at_once = match objects.iter().all(|(_, object)| object.size <= SMALL_BYTES) {
        true => AT_ONCE,
        false => 1,
    };
    let each = stream::iter(objects).map(|(file, object)| async move {
        if recipients(tier2, &object).await? == keys.recipients() {
            return Ok(None);
        }
        let size = rewrap(tier2, &object.key, keys)
            .await
            .with_context(|| format!("write {} again", object.key))?;
        anyhow::Ok(Some((file, size)))
    });
    let written: Vec<Option<(WalFile, u64)>> = each.buffered(at_once).try_collect().await?;
    let written: Vec<(WalFile, u64)> = written.into_iter().flatten().collect();
    // Proven to hold what they held: that they have other sizes must not put them in doubt.
    let path = archive_file::path(store.root(), cluster);
    if let Some(mut archive) = archive_file::read(&path)? {
        written.iter().for_each(|(file, size)| archive.accept_size(*file, *size));
        archive_file::write(&path, &archive)?;
    }
    println!("{cluster}: wrote {} WAL files again in tier 2", written.len());
    Ok(())
}

/// Gives the new size.
async fn rewrap(tier2: &Tier2, key: &str, keys: &Keys) -> anyhow::Result<u64> {
    let old = tier2.download(key).await?.whole().await?;
    let plain = keys.unwrap(&old).map_err(|e| e.at(key))?;
    let new = Bytes::from(keys.wrap(&plain)?);
    if *keys.unwrap(&new)? != *plain {
        bail!("expected what was encrypted to decrypt to the same, found something else");
    }
    tier2.replace(key, new.clone()).await?;
    let there = tier2.download(key).await?.whole().await?;
    if there != new {
        tier2.replace(key, old).await.context("put the old object back")?;
        bail!("expected the bytes that were written, found others: the old object was put back");
    }
    Ok(new.len() as u64)
}

/// Says which objects the newest identity does not open.
pub(super) async fn tell_still_needed(tier2: &Tier2, keys: &Keys) -> anyhow::Result<()> {
    let newest = keys.own().into_iter().next();
    let mut left: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for (key, to) in locked(tier2).await? {
        if newest.as_ref().is_some_and(|newest| !to.contains(newest)) {
            left.entry(name(&to)).or_insert((0, key)).0 += 1;
        }
    }
    if left.is_empty() {
        println!("nothing in tier 2 needs an older identity");
    }
    for (recipient, (count, example)) in left {
        println!(
            "{count} objects in tier 2 still need the identity of {recipient}, such as {example}: keep it"
        );
    }
    Ok(())
}
