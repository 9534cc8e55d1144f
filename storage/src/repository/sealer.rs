//! restic's encryption of one piece: AES-256-CTR with Poly1305-AES.
//!
//! | bytes | what |
//! |---|---|
//! | 0..16 | nonce, random |
//! | 16..n-16 | ciphertext |
//! | n-16..n | Poly1305-AES of the ciphertext |
//!
//! The format is documented in <https://restic.readthedocs.io/en/stable/100_references.html#keys-encryption-and-mac>.
//! rustic implements it internally but gives no access to it, and its readers cannot see packs that are marked for
//! removal (REPO4).

use super::Secret;
use crate::{Error, Kind, Op};
use aes256ctr_poly1305aes::{Aes256CtrPoly1305Aes, Key, Nonce, aead::Aead};
use rand::RngCore;
use rustic_core::repofile::MasterKey;
use std::io::Read;
use zeroize::Zeroizing;

const NONCE_BYTES: usize = 16;
/// The byte before the zstd stream of a compressed index or snapshot.
const COMPRESSED: u8 = 2;
/// Limit for the JSON of an index or a snapshot. A larger one is not a file of ours, but made to fill the memory of its
/// readers (P13).
const JSON_BYTES_MAX: u64 = 256 << 20;

/// Encrypts and decrypts pieces.
#[derive(Clone)]
pub(super) struct Sealer(Aes256CtrPoly1305Aes);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(..)")
    }
}

/// Parses the master key in a secret.
pub(super) fn master_key(secret: &Secret) -> Result<MasterKey, Error> {
    let bad =
        |detail: &str| Error::new(Kind::Invalid, Op::Decode, "a repository's master key", detail);
    // serde's error text would quote the key.
    let key: MasterKey =
        serde_json::from_str(&secret.master_key).map_err(|_| bad("expected restic's key JSON"))?;
    if key.encrypt.len() != 32 || key.mac.k.len() != 16 || key.mac.r.len() != 16 {
        return Err(bad("expected 32, 16 and 16 bytes"));
    }
    Ok(key)
}

impl Sealer {
    pub(super) fn new(key: &MasterKey) -> Self {
        let mut bytes = Zeroizing::new([0; 64]);
        bytes[..32].copy_from_slice(&key.encrypt);
        bytes[32..48].copy_from_slice(&key.mac.k);
        bytes[48..].copy_from_slice(&key.mac.r);
        Self(Aes256CtrPoly1305Aes::new(Key::from_slice(bytes.as_slice())))
    }

    /// Decrypts; `None` when the bytes were not encrypted with this key or are damaged.
    pub(super) fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_at_checked(NONCE_BYTES)?;
        self.0.decrypt(Nonce::from_slice(nonce), rest).ok()
    }

    pub(super) fn seal(&self, plain: &[u8]) -> Result<Vec<u8>, Error> {
        let mut sealed = vec![0; NONCE_BYTES];
        rand::rng().fill_bytes(&mut sealed);
        let text = self.0.encrypt(Nonce::from_slice(&sealed), plain);
        let text = text.map_err(|e| Error::new(Kind::Io, Op::Write, "a repository file", e))?;
        sealed.extend_from_slice(&text);
        Ok(sealed)
    }

    /// Decrypts the JSON of an index or a snapshot; `None` also for one larger than `JSON_BYTES_MAX`.
    pub(super) fn open_file(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let plain = self.open(sealed)?;
        match plain.first() {
            Some(b'{' | b'[') => Some(plain),
            Some(&COMPRESSED) => {
                let mut json = Vec::new();
                let decoder = zstd::Decoder::new(&plain[1..]).ok()?;
                decoder.take(JSON_BYTES_MAX + 1).read_to_end(&mut json).ok()?;
                (json.len() as u64 <= JSON_BYTES_MAX).then_some(json)
            }
            _ => None,
        }
    }
}
