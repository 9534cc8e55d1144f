//! Encryption keys of journals: one random data key per cluster, from which each journal's key is derived.
//!
//! | file | content |
//! |---|---|
//! | `<cluster>/open.key.age` | age: the line `klio-open-key 1 <64 hexadecimal digits>` |
//!
//! - A journal's key is HKDF-SHA-256 of the data key: salt = bytes 64..80 of its header, info = `klio journal 2` and
//!   bytes 0..48 of its header. Every new journal has a new random salt and id, so its key was never used before. A
//!   header that was modified, or that belongs to another cluster, yields a different key, which decrypts nothing.
//! - AES-256-GCM; the nonce is the frame's offset in the file as 8 bytes, little endian, then 4 zeros; all ones for the
//!   header's tag. A journal is only ever written forward, closing frames included. Whatever a crash or a failed write
//!   left behind the last acknowledged frame is dropped by copying the good frames into a new journal (`recover.rs`),
//!   so no offset is written twice under one key.
//! - The data key is wrapped by age for the identity and every recipient, and never leaves tier 1. It decrypts nothing
//!   in tier 2. Changing the identity wraps the key again; journals stay as they are.

use super::frame::{self, Format, FrameHeader, JournalHeader, KeyInfo, SIGNED_BYTES, TAG};
use crate::{
    Error, Kind, Op,
    crypt::Keys,
    disk::{Disk, durable, read_small},
};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, Tag, UnboundKey},
    error::Unspecified,
    hkdf,
    rand::{SecureRandom, SystemRandom},
};
use std::{fmt, io, path::Path, sync::Arc};
use zeroize::Zeroizing;

const FORMAT: &str = "klio-open-key 1 ";
const LIMIT_BYTES: u64 = 64 << 10;
const HEADER_NONCE: [u8; 12] = [0xFF; 12];
const INFO: &[u8] = b"klio journal 2";
/// The part of a header that identifies the journal: the input of key derivation.
const BOUND_BYTES: usize = 48;

/// The key of a cluster's journals.
pub(super) struct DataKey {
    bytes: Zeroizing<[u8; 32]>,
    id: [u8; 8],
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

fn expand<const N: usize>(secret: &[u8], salt: &[u8], info: &[&[u8]]) -> Zeroizing<[u8; N]> {
    struct Len(usize);
    impl hkdf::KeyType for Len {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut out = Zeroizing::new([0; N]);
    hkdf::Salt::new(hkdf::HKDF_SHA256, salt)
        .extract(secret)
        .expand(info, Len(N))
        .and_then(|okm| okm.fill(&mut out[..]))
        .expect("32 bytes are far below the limit of HKDF");
    out
}

impl DataKey {
    fn new(bytes: Zeroizing<[u8; 32]>) -> Self {
        let id = *expand(&bytes[..], b"", &[b"klio key id"]);
        Self { bytes, id }
    }

    /// Generates a random key.
    pub(super) fn generate() -> Result<Self, Error> {
        let mut bytes = Zeroizing::new([0; 32]);
        SystemRandom::new().fill(&mut bytes[..]).map_err(|_| {
            Error::new(
                Kind::Io,
                Op::Create,
                "data key",
                "the operating system provides no random numbers",
            )
        })?;
        Ok(Self::new(bytes))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let digits = std::str::from_utf8(text).ok()?.trim_end().strip_prefix(FORMAT)?;
        if digits.len() != 64 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        let mut bytes = Zeroizing::new([0; 32]);
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).ok()?;
        }
        Some(Self::new(bytes))
    }

    fn text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(FORMAT.len() + 65));
        text.push_str(FORMAT);
        for byte in self.bytes.iter() {
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        text.push('\n');
        text
    }

    /// Reads the stored key; `None` when there is none.
    ///
    /// # Errors
    /// `Denied` when the key is not wrapped for this identity, `Corrupt`, or an I/O error of the disk.
    pub(super) fn load(disk: &dyn Disk, path: &Path, keys: &Keys) -> Result<Option<Self>, Error> {
        let wrapped = match read_small(disk, path, LIMIT_BYTES) {
            Ok(wrapped) => wrapped,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(Op::Read, path, e)),
        };
        let text = keys.unwrap(&wrapped).map_err(|e| e.at(path.display()))?;
        Self::parse(&text).map(Some).ok_or_else(|| {
            let detail = "expected an open key of version 1, found something else";
            Error::new(Kind::Corrupt, Op::Open, path.display(), detail)
        })
    }

    /// Generates a key and stores it durably.
    pub(super) fn create(disk: &dyn Disk, path: &Path, keys: &Keys) -> Result<Self, Error> {
        let key = Self::generate()?;
        key.store(disk, path, keys)?;
        Ok(key)
    }

    /// Stores the key durably, wrapped for the current recipients.
    pub(super) fn store(&self, disk: &dyn Disk, path: &Path, keys: &Keys) -> Result<(), Error> {
        durable::overwrite(disk, path, &keys.wrap(self.text().as_bytes())?)
    }

    /// The key information for the header of a new journal.
    pub(super) fn info(&self, random: [u64; 2]) -> KeyInfo {
        let mut salt = [0; 16];
        salt[..8].copy_from_slice(&random[0].to_le_bytes());
        salt[8..].copy_from_slice(&random[1].to_le_bytes());
        KeyInfo { key_id: self.id, salt }
    }

    /// Derives the key of a journal without checking the tag of its header.
    pub(super) fn cipher(&self, header: &JournalHeader) -> Option<Cipher> {
        let info = header.key.filter(|info| info.key_id == self.id)?;
        let block = header.encode();
        let key = expand::<32>(&self.bytes[..], &info.salt, &[INFO, &block[..BOUND_BYTES]]);
        let key = UnboundKey::new(&AES_256_GCM, &key[..]).expect("32 bytes are a key");
        Some(Cipher(LessSafeKey::new(key)))
    }
}

/// Wraps a stored data key again for the current recipients. False when there is no data key.
pub(super) fn rewrap(disk: &dyn Disk, path: &Path, keys: &Keys) -> Result<bool, Error> {
    let Some(key) = DataKey::load(disk, path, keys)? else { return Ok(false) };
    key.store(disk, path, keys)?;
    Ok(true)
}

/// The keys that a cluster's journals are read and written with. A clone is cheap.
#[derive(Debug, Clone, Default)]
pub(super) struct JournalKeys {
    /// Decrypts existing journals, and encrypts new ones if `writing` is set.
    pub(super) data: Option<Arc<DataKey>>,
    /// Whether new journals are encrypted.
    pub(super) writing: bool,
}

impl JournalKeys {
    /// Completes the header of a new journal with an id and, if journals are encrypted, with the key information.
    ///
    /// # Errors
    /// `Invalid` when the journal has to be encrypted and there is no key.
    pub(super) fn begin(
        &self,
        header: &mut JournalHeader,
        next_id: &dyn Fn() -> u64,
    ) -> Result<Option<Arc<Cipher>>, Error> {
        header.id = next_id();
        header.key = None;
        if !self.writing {
            return Ok(None);
        }
        let key = self.data.as_ref().ok_or_else(|| {
            let detail = "expected an encryption key for the segment's journal, found none";
            Error::new(Kind::Invalid, Op::Create, header.segment(), detail)
        })?;
        header.key = Some(key.info([next_id(), next_id()]));
        Ok(key.cipher(header).map(Arc::new))
    }

    /// The cipher of a journal; `None` for a plain one.
    ///
    /// # Errors
    /// `Denied` when the journal was encrypted with another key, `Corrupt` when its header was modified.
    pub(super) fn cipher(
        &self,
        header: &JournalHeader,
        block: &[u8],
        path: &Path,
    ) -> Result<Option<Arc<Cipher>>, Error> {
        let Some(info) = header.key else { return Ok(None) };
        let Some(cipher) = self.data.as_ref().and_then(|key| key.cipher(header)) else {
            let expected = hex(&info.key_id);
            let found = self.data.as_ref().map_or("none".into(), |key| hex(&key.id));
            let detail = format!("expected the open key {expected}, found {found}");
            return Err(Error::new(Kind::Denied, Op::Open, path.display(), detail)
                .hint("check encryption.identity_file and the cluster's open.key.age"));
        };
        if cipher.is_signed(block) {
            return Ok(Some(Arc::new(cipher)));
        }
        let detail = "expected the journal header that was signed, found a modified one";
        Err(Error::new(Kind::Corrupt, Op::Open, path.display(), detail))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Completes a frame that will be written at `offset`. Its stored bytes are already in place, behind the space for its
/// header.
pub(super) fn finish(header: &FrameHeader, frame: &mut [u8], offset: u64, cipher: Option<&Cipher>) {
    match cipher {
        Some(cipher) => {
            header.put_fields(frame);
            cipher.seal(offset, header.format, frame);
        }
        None => frame::finish_plain(header, frame),
    }
}

/// Encrypts and decrypts the frames of one journal.
pub(super) struct Cipher(LessSafeKey);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher(..)")
    }
}

fn nonce(offset: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&offset.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

impl Cipher {
    /// Writes the authentication tag of a journal's header into its block.
    pub(super) fn sign(&self, block: &mut [u8]) {
        let tag = self.header_tag(&block[..SIGNED_BYTES]);
        block[SIGNED_BYTES..SIGNED_BYTES + TAG].copy_from_slice(&tag);
    }

    fn header_tag(&self, signed: &[u8]) -> [u8; TAG] {
        let nonce = Nonce::assume_unique_for_key(HEADER_NONCE);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(signed), &mut []);
        let tag = tag.expect("a header is far below the limit of GCM");
        std::array::from_fn(|n| tag.as_ref()[n])
    }

    /// Whether the first block of a journal is unmodified.
    pub(super) fn is_signed(&self, block: &[u8]) -> bool {
        let nonce = Nonce::assume_unique_for_key(HEADER_NONCE);
        let Some(tag) = block.get(SIGNED_BYTES..SIGNED_BYTES + TAG) else { return false };
        let mut tag: [u8; TAG] = std::array::from_fn(|n| tag[n]);
        self.0.open_in_place(nonce, Aad::from(&block[..SIGNED_BYTES]), &mut tag).is_ok()
    }

    /// Encrypts a frame in place: its fields are written, and its stored bytes follow the space for the tag.
    pub(super) fn seal(&self, offset: u64, format: Format, frame: &mut [u8]) {
        let (header, stored) = frame.split_at_mut(format.header_bytes(true));
        let (fields, tag) = header.split_at_mut(format.fields());
        let made = self.0.seal_in_place_separate_tag(nonce(offset), Aad::from(&*fields), stored);
        tag.copy_from_slice(made.expect("1 MiB is far below the limit of GCM").as_ref());
    }

    /// Decrypts a frame in place. On failure its stored bytes are destroyed.
    pub(super) fn open(
        &self,
        offset: u64,
        format: Format,
        frame: &mut [u8],
    ) -> Result<(), Unspecified> {
        let (header, stored) =
            frame.split_at_mut_checked(format.header_bytes(true)).ok_or(Unspecified)?;
        let (fields, tag) = header.split_at(format.fields());
        let tag: Tag = tag.try_into()?;
        self.0.open_in_place_separate_tag(nonce(offset), Aad::from(fields), tag, stored, 0..)?;
        Ok(())
    }
}
