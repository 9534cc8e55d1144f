//! Base backups: a restic-format repository for each cluster, through `rustic_core`.
//!
//! R1  a file is whole or absent, and durable when `write` returns;
//! R2  a file's name is the SHA-256 of its bytes, so every reader can check it (the config aside);
//! R3  a snapshot is saved only when every byte of every file in it was read without an error: rustic
//!     itself leaves out what it cannot read and says nothing;
//! R4  nothing is removed at once: packs are marked first and go a day later, so that what a running
//!     backup or restore has seen in an index stays there.
//!
//! All calls block, and run on threads of their own: never on an async worker.

pub mod files;

pub use files::Files;

use zeroize::Zeroizing;

/// What opens a repository. Kept age-wrapped beside it, given to the cluster's sidecar over mutual TLS.
#[derive(Clone, serde::Serialize, serde::Deserialize)]
pub struct Secret {
    /// For restic and rustic: the password of the key file in the repository.
    pub password: Zeroizing<String>,
    /// restic's master key as JSON. With it no key has to be derived, which takes 128 MiB.
    pub master_key: Zeroizing<String>,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}
