//! Has tier 1 look again at a file that somebody found damaged: what is, is put aside and missed from then on.
//!
//! Whoever finds damage goes on whatever comes of it: a look that fails is told of here, once, and changes nothing.

use klio_storage::{
    Error, Kind,
    layout::{ClusterName, WalFile},
};

/// True when WAL is missed now. `look` is the store's `doubt`, and reads the whole file.
pub async fn put_aside(
    cluster: &ClusterName,
    file: WalFile,
    look: impl FnOnce() -> Result<bool, Error> + Send + 'static,
) -> bool {
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok(missed)) => return missed,
        Ok(Err(error)) if error.kind == Kind::NotFound => {}
        Ok(Err(error)) => {
            tracing::warn!(%cluster, %file, %error, "a damaged file cannot be put aside");
        }
        Err(error) => tracing::warn!(%cluster, %file, %error, "the look at a file ended"),
    }
    false
}
