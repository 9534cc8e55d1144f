//! Creating a repository (its secret, config and key file), and opening it.
//!
//! The master key comes from the secret, not from a password, so opening does not derive a key. The key file is for
//! stock restic, which gets the same master key with the password (P10). It is written after the config, and again if
//! it is missing, so that a crash between the two is repaired by the next `create`. Deriving its key takes 128 MiB for
//! a moment, so only one derivation runs at a time in the whole process, however many clusters start at once.

use super::{Files, Key, Repository, Secret, Settings, Snapshots, read_checked, sealer};
use crate::{
    Error, Kind, Op,
    layout::{BaseFile, BaseKind},
};
use klio_pg::{ByteSize, PAGE_BYTES};
use rand::RngCore;
use rustic_core::{
    ConfigOptions, Credentials, KeyOptions, NoProgressBars, RepositoryBackends,
    repofile::{Chunker, ConfigFile, MasterKey},
};
use sealer::Sealer;
use std::sync::{Arc, Mutex, PoisonError};
use zeroize::Zeroizing;

/// Bytes of randomness in a password: as much as in the AES key that it protects.
const PASSWORD_BYTES: usize = 32;
/// Trees are small and read often; this is rustic's own default.
const TREE_PACK: ByteSize = ByteSize::mib(4);

/// Held while scrypt runs.
static DERIVING: Mutex<()> = Mutex::new(());

impl Secret {
    /// Generates a secret from the operating system's randomness.
    ///
    /// # Panics
    /// When the operating system provides no randomness.
    pub fn generate() -> Self {
        let mut bytes = Zeroizing::new([0; PASSWORD_BYTES]);
        rand::rng().fill_bytes(bytes.as_mut_slice());
        let password: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let master = serde_json::to_string(&MasterKey::new());
        let master = master.expect("a key is three byte strings, which JSON can hold");
        Self { password: Zeroizing::new(password), master_key: Zeroizing::new(master) }
    }
}

impl Settings {
    /// Checks the settings.
    ///
    /// # Errors
    /// `Invalid` names the setting and what it allows.
    pub fn validate(&self) -> Result<(), Error> {
        let bad =
            |detail: String| Err(Error::new(Kind::Invalid, Op::Configure, "a repository", detail));
        let (chunk, pack, level) =
            (self.chunk_size.bytes(), self.pack_size.bytes(), self.compression_level);
        if chunk % PAGE_BYTES != 0 || !(8 << 10..=8 << 20).contains(&chunk) {
            return bad(format!(
                "chunk_size: expected 8 KiB to 8 MiB in whole pages, found {chunk} bytes"
            ));
        }
        if !(1 << 20..=1 << 30).contains(&pack) {
            return bad(format!("pack_size: expected 1 MiB to 1 GiB, found {pack} bytes"));
        }
        if !(0..=22).contains(&level) {
            return bad(format!("compression_level: expected 0 to 22, found {level}"));
        }
        Ok(())
    }

    fn options(&self) -> Result<ConfigOptions, Error> {
        let mut options = ConfigOptions::default()
            .set_chunker(Chunker::FixedSize)
            .set_compression(self.compression_level)
            // The size of a pack does not depend on the size of the repository, which bounds memory and the size of a
            // tier-2 job.
            .set_datapack_growfactor(0)
            .set_treepack_growfactor(0)
            // Not needed: whoever stores a file compares its SHA-256, and a chunk that was damaged before that fails
            // its own.
            .set_extra_verify(false);
        // The type is from a crate that rustic does not re-export, but it parses its own text form.
        options.set_chunk_size = Some(size(self.chunk_size).parse().map_err(bad_size)?);
        options.set_datapack_size = Some(size(self.pack_size).parse().map_err(bad_size)?);
        options.set_treepack_size = Some(size(TREE_PACK).parse().map_err(bad_size)?);
        Ok(options)
    }
}

fn size(size: ByteSize) -> String {
    format!("{}B", size.bytes())
}

fn bad_size(error: String) -> Error {
    Error::new(Kind::Invalid, Op::Configure, "a repository", error)
}

impl Repository {
    /// Creates a repository, or opens an existing one with the same secret, so repeating it is harmless.
    ///
    /// # Errors
    /// `Conflict` if there is one with another key; otherwise an error of `files`.
    pub fn create(
        files: Arc<dyn Files>,
        secret: &Secret,
        settings: &Settings,
    ) -> Result<Self, Error> {
        settings.validate()?;
        if files.list(BaseKind::Config)?.is_empty() {
            let repository = Self::unopened(Arc::clone(&files), secret)?;
            match repository.write_config(settings) {
                // Another process was faster, or an earlier attempt succeeded further than it reported.
                Err(error) if error.kind == Kind::Conflict => {}
                other => other?,
            }
        }
        let repository = Self::open(files, secret).map_err(|error| match error.kind {
            Kind::Denied => Error::new(Kind::Conflict, Op::Create, error.place, error.detail),
            _ => error,
        })?;
        repository.require_key(secret)?;
        Ok(repository)
    }

    /// Opens an existing repository.
    ///
    /// # Errors
    /// `NotFound` without a repository; `Denied` when the secret belongs to another one; `Corrupt` when the config
    /// cannot be parsed.
    pub fn open(files: Arc<dyn Files>, secret: &Secret) -> Result<Self, Error> {
        let repository = Self::unopened(files, secret)?;
        let fail = |kind, detail: &str| {
            let place = format!("{}/config", repository.place());
            Error::new(kind, Op::Open, place, detail)
        };
        let sealed = read_checked(repository.files.as_ref(), BaseFile::CONFIG)?;
        let json = repository.key.sealer.open_file(&sealed).ok_or_else(|| {
            fail(
                Kind::Denied,
                "the key does not decrypt it: it belongs to another repository, or is damaged",
            )
        })?;
        let config: ConfigFile = serde_json::from_slice(&json)
            .map_err(|_| fail(Kind::Corrupt, "expected restic's config JSON"))?;
        if config.version != 2 {
            let detail = format!("expected format version 2, found {}", config.version);
            return Err(fail(Kind::Invalid, &detail));
        }
        Ok(repository)
    }

    fn unopened(files: Arc<dyn Files>, secret: &Secret) -> Result<Self, Error> {
        let master = sealer::master_key(secret)?;
        let sealer = Sealer::new(&master);
        Ok(Self { files, key: Arc::new(Key { master, sealer }), hidden: None, level: None })
    }

    fn write_config(&self, settings: &Settings) -> Result<(), Error> {
        let (backend, trace) = self.backend(Snapshots::Save, None);
        let backends = RepositoryBackends::new(Arc::new(backend), None);
        let credentials = Credentials::Masterkey(self.key.master.clone());
        let options = settings.options()?;
        rustic_core::Repository::new_with_progress(&super::options(), &backends, NoProgressBars)
            .and_then(|new| new.init(&credentials, &KeyOptions::default(), &options))
            .map(|_| ())
            .map_err(|e| trace.take_error().unwrap_or_else(|| self.fail(Op::Create, e)))
    }

    /// Writes the key file for the password if there is none.
    fn require_key(&self, secret: &Secret) -> Result<(), Error> {
        if !self.files.list(BaseKind::Key)?.is_empty() {
            return Ok(());
        }
        let (opened, _) = self.rustic(Snapshots::Save)?;
        // The lock's poison is ignored: a panic leaves nothing half done, because the last step writes the key.
        let _one = DERIVING.lock().unwrap_or_else(PoisonError::into_inner);
        let options = KeyOptions::default().hostname("klio".to_owned()).username("klio".to_owned());
        opened.add_key(&secret.password, &options).map_err(|e| self.fail(Op::Create, e))?;
        Ok(())
    }
}
