//! The part of `klio-server key` that works on the bucket.
//!
//! An object is replaced only by bytes that were decrypted again and found to have the same content, in one request,
//! which leaves either the old or the new object, whole. Afterwards it is read; if it is neither, the old one is
//! written back. So there is always an object that the identity file opens (P5). Only the clusters of this server are
//! written.

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
use std::{
    cell::Cell,
    collections::BTreeMap,
    path::PathBuf,
    pin::pin,
    time::{Duration, Instant},
};

/// How many objects are handled at once.
const AT_ONCE: usize = 4;
/// Larger objects are encrypted again one at a time, because each is in memory three times.
const SMALL_BYTES: u64 = 64 << 20;
/// Shortest time between two writes of the archive state: its file may be large, so it is not written for every object.
const KEEP_INTERVAL: Duration = Duration::from_secs(1);

/// The recipients of an object. They are in its beginning, so only that is read.
async fn recipients(tier2: &Tier2, object: &ListedObject) -> anyhow::Result<Vec<String>> {
    let length = object.size.min(HEADER_LIMIT_BYTES as u64);
    let download = tier2.download_range(&object.key, 0, Some(length)).await?;
    let head: Vec<Bytes> = download.try_collect().await?;
    Ok(crypt::recipients_of(&head.concat()).unwrap_or_default())
}

/// Every encrypted object of the bucket, with its recipients.
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

/// Encrypts a cluster's WAL again if it is not for the current recipients.
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
    // An object store may list them in any order.
    objects.sort_by_key(|(file, _)| *file);
    let at_once = match objects.iter().all(|(_, object)| object.size <= SMALL_BYTES) {
        true => AT_ONCE,
        false => 1,
    };
    let failed = &Cell::new(false);
    let each = stream::iter(objects).map(|(file, object)| async move {
        if failed.get() || recipients(tier2, &object).await? == keys.recipients() {
            return Ok(None);
        }
        let size = rewrap(tier2, &object.key, keys)
            .await
            .with_context(|| format!("write {} again", object.key))?;
        anyhow::Ok(Some((file, size)))
    });
    let mut each = pin!(each.buffered(at_once));
    let mut proved = Proved::of(store, cluster);
    let (mut count, mut first) = (0_u64, None);
    // After a failure nothing new is begun, but what is under way is waited for, because it may have been written.
    while let Some(written) = each.next().await {
        match written {
            Ok(None) => {}
            Ok(Some((file, size))) => {
                count += 1;
                proved.add(file, size)?;
            }
            Err(error) => {
                failed.set(true);
                first.get_or_insert(error);
            }
        }
    }
    proved.keep()?;
    if let Some(error) = first {
        return Err(error);
    }
    println!("{cluster}: re-encrypted {count} WAL files in tier 2");
    Ok(())
}

/// Objects that were proven to have unchanged content. Their new sizes must not make them count as unproven.
///
/// They are recorded periodically, because the command may be interrupted at any moment. An object that was not
/// recorded is found good again by reading it.
struct Proved {
    path: PathBuf,
    new: Vec<(WalFile, u64)>,
    kept: Instant,
}

impl Proved {
    fn of(store: &WalStore, cluster: &ClusterName) -> Self {
        let path = archive_file::path(store.root(), cluster);
        Self { path, new: Vec::new(), kept: Instant::now() }
    }

    fn add(&mut self, file: WalFile, size: u64) -> anyhow::Result<()> {
        self.new.push((file, size));
        if self.kept.elapsed() < KEEP_INTERVAL {
            return Ok(());
        }
        self.keep()
    }

    fn keep(&mut self) -> anyhow::Result<()> {
        if let Some(mut archive) = archive_file::read(&self.path)? {
            self.new.drain(..).for_each(|(file, size)| archive.accept_size(file, size));
            archive_file::write(&self.path, &archive)?;
        }
        self.kept = Instant::now();
        Ok(())
    }
}

/// Returns the new size.
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

/// Prints which objects the newest identity does not open.
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
            "{count} objects in tier 2 still need the identity of {recipient}, such as {example}: keep that identity"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::SegmentSize;
    use klio_storage::{
        catalog::Archive, disk::RealDisk, layout::Form, tier2::Tier2Config, wal::WalOptions,
    };
    use std::{fs, sync::Arc};

    #[tokio::test]
    async fn what_was_proven_before_a_rewrap_failed_is_not_in_doubt_afterwards() {
        let directory = tempfile::tempdir().unwrap();
        let (root, bucket) = (directory.path().join("tier1"), directory.path().join("bucket"));
        let cluster: ClusterName = "pg".parse().unwrap();
        fs::create_dir_all(root.join("pg")).unwrap();
        fs::create_dir_all(bucket.join("pg/wal/00000001")).unwrap();
        let ((old_text, _), (new_text, _)) = (Keys::generate(), Keys::generate());
        let old = Keys::from_text(&old_text, &[]).unwrap();
        let new = Keys::from_text(&format!("{}\n{}\n", *new_text, *old_text), &[]).unwrap();
        let file =
            |number: u32| -> WalFile { format!("0000000100000000{number:08X}").parse().unwrap() };
        let at = |number| bucket.join(file(number).key_in(&cluster, Form::Age));
        for number in 1..=9 {
            let mut bytes = old.wrap(&vec![7; 1000]).unwrap();
            if number == 3 {
                *bytes.last_mut().unwrap() ^= 1;
            }
            fs::write(at(number), bytes).unwrap();
        }
        let store =
            WalStore::open(Arc::new(RealDisk), root.clone(), WalOptions::default()).unwrap();
        let path = archive_file::path(&root, &cluster);
        archive_file::write(&path, &Archive::new(SegmentSize::new(1 << 20).unwrap())).unwrap();
        let tier2 = Tier2::open(&Tier2Config::new(format!("file://{}", bucket.display()))).unwrap();
        let before: Vec<Vec<u8>> = (1..=9).map(|n| fs::read(at(n)).unwrap()).collect();
        let error = rewrap_wal(&store, &tier2, &cluster, &new).await.unwrap_err();
        assert!(format!("{error:#}").contains(&file(3).to_string()), "{error:#}");
        let archive = archive_file::read(&path).unwrap().unwrap();
        let written: Vec<u32> =
            (1..=9).filter(|n| fs::read(at(*n)).unwrap() != before[*n as usize - 1]).collect();
        assert!(written.starts_with(&[1, 2]) && !written.contains(&3), "{written:?}");
        for number in written {
            let size = fs::metadata(at(number)).unwrap().len();
            assert!(archive.accepts(file(number), 1, size), "{number}");
        }
    }
}
