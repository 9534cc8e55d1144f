//! How many bytes of WAL an object contains. A listing gives only its stored size, and the end of a partial
//! segment, up to which a restore is possible, follows only from its content.
//!
//! The object is read as a stream, decrypted and decoded with every check; nothing is stored. An object that cannot
//! be decoded is `Corrupt`.

use super::{Tier2, compare::ChunkReader, local::blocking};
use crate::{Error, crypt::AtRest, layout::Form, wal::decode};
use futures::StreamExt;
use std::io::Read;
use tokio::sync::mpsc;

impl Tier2 {
    /// The number of plain bytes of a WAL file, at most `limit`.
    ///
    /// # Errors
    /// `NotFound` is definitive; `Corrupt`; `Denied` without the key; otherwise an error of the store.
    pub async fn plain_size(
        &self,
        key: &str,
        form: Form,
        at_rest: &AtRest,
        limit: u64,
    ) -> Result<u64, Error> {
        let keys = match form {
            Form::Plain => None,
            Form::Age => Some(at_rest.need(self.place(key))?.clone()),
        };
        let mut chunks = self.download(key).await?;
        let (sender, receiver) = mpsc::channel(2);
        let feed = async move {
            while let Some(chunk) = chunks.next().await {
                if sender.send(chunk?).await.is_err() {
                    break; // the decoder gave up: it has its own error
                }
            }
            Ok::<_, Error>(())
        };
        let place = self.place(key);
        let measured = blocking(move || {
            let chunks = ChunkReader::new(receiver);
            let mut plain: Box<dyn Read> = match &keys {
                None => Box::new(chunks),
                Some(keys) => Box::new(keys.decrypt(chunks).map_err(|e| e.at(&place))?),
            };
            decode::decode_reader(&mut plain, limit, &mut |_| Ok(())).map_err(|e| e.at(&place))
        });
        // An answer that broke off is a failure of the store, not damage.
        let (fed, measured) = tokio::join!(feed, measured);
        fed?;
        measured
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Tier2Config, *};
    use crate::{Kind, crypt::Keys};

    #[tokio::test]
    async fn a_partial_segment_is_as_long_as_what_it_decodes_to() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("file://{}", directory.path().display());
        let tier2 = Tier2::open(&Tier2Config::new(url)).unwrap();
        let (identity, _) = Keys::generate();
        let keys = Keys::from_text(&identity, &[]).unwrap();
        let at_rest = AtRest::On(keys.clone());
        let mut context = zstd::bulk::Compressor::new(1).unwrap();
        context.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true)).unwrap();
        let pieces = [vec![7; 100_000], vec![9; 4711]];
        let stored: Vec<u8> = pieces.iter().flat_map(|p| context.compress(p).unwrap()).collect();
        std::fs::write(directory.path().join("plain"), &stored).unwrap();
        std::fs::write(directory.path().join("age"), keys.wrap(&stored).unwrap()).unwrap();
        std::fs::write(directory.path().join("cut"), &stored[..stored.len() - 3]).unwrap();
        let size = async |key, form, limit| tier2.plain_size(key, form, &at_rest, limit).await;
        assert_eq!(size("plain", Form::Plain, 1 << 20).await.unwrap(), 104_711);
        assert_eq!(size("age", Form::Age, 1 << 20).await.unwrap(), 104_711);
        for (key, form, limit, kind) in [
            ("cut", Form::Plain, 1 << 20, Kind::Corrupt),
            ("plain", Form::Plain, 104_710, Kind::Corrupt),
            ("none", Form::Plain, 1 << 20, Kind::NotFound),
        ] {
            assert_eq!(size(key, form, limit).await.unwrap_err().kind, kind, "{key}");
        }
        let off = AtRest::Off;
        let denied = tier2.plain_size("age", Form::Age, &off, 1 << 20).await.unwrap_err();
        assert_eq!(denied.kind, Kind::Denied);
    }
}
