//! Has tier 1 check a file again that was found damaged. If it is damaged, it is set aside and counts as missing.
//!
//! The caller continues whatever the result is: a check that fails is logged here, once, and changes nothing.

use klio_storage::{
    Error, Kind,
    layout::{ClusterName, WalFile},
};

/// Returns true when WAL is missing now. `look` is the store's `doubt`, and reads the whole file.
pub async fn put_aside(
    cluster: &ClusterName,
    file: WalFile,
    look: impl FnOnce() -> Result<bool, Error> + Send + 'static,
) -> bool {
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok(missed)) => return missed,
        Ok(Err(error)) if error.kind == Kind::NotFound => {}
        Ok(Err(error)) => {
            tracing::warn!(%cluster, %file, %error, "cannot set a damaged file aside");
        }
        Err(error) => {
            tracing::warn!(%cluster, %file, %error, "the check of a damaged file did not complete")
        }
    }
    false
}
