//! Decrypts data from the network, piece by piece and without a thread.

use super::{Keys, header::HEADER_LIMIT_BYTES, payload_error};
use crate::Error;
use age::{Decryptor, Identity};
use bytes::{Bytes, BytesMut};
use futures::{AsyncReadExt, Stream, StreamExt, TryStreamExt, stream};
use std::io;

/// One chunk of the age format.
const PIECE_BYTES: usize = 64 << 10;

impl Keys {
    /// The plain content of an age file that arrives in pieces. Its errors are those of [`Keys::decrypt`] and
    /// [`payload_error`], or of the stream; `place` is for them.
    ///
    /// # Errors
    /// As [`Keys::decrypt`].
    pub async fn decrypt_stream<S>(
        &self,
        mut from: S,
        place: String,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + Send + use<S>, Error>
    where
        S: Stream<Item = Result<Bytes, Error>> + Send + Unpin + 'static,
    {
        let mut head = BytesMut::new();
        while head.len() < HEADER_LIMIT_BYTES
            && super::recipients_of(&head).is_none()
            && let Some(piece) = from.try_next().await?
        {
            head.extend_from_slice(&piece);
        }
        let recipients = super::recipients_of(&head);
        let whole = stream::iter([Ok(head.freeze())]).chain(from.map_err(io::Error::other));
        let refused = |e| self.header_error(e, recipients.as_deref()).at(&place);
        let decryptor = Decryptor::new_async(whole.into_async_read()).await.map_err(refused)?;
        let reader = {
            let identities = self.identities().map(|identity| identity as &dyn Identity);
            decryptor.decrypt_async(identities).map_err(refused)?
        };
        let pieces =
            stream::try_unfold((Box::pin(reader), place), |(mut reader, place)| async move {
                let mut piece = vec![0; PIECE_BYTES];
                match reader.read(&mut piece).await {
                    Ok(0) => Ok(None),
                    Ok(count) => {
                        piece.truncate(count);
                        Ok(Some((Bytes::from(piece), (reader, place))))
                    }
                    Err(e) => {
                        Err(e.downcast::<Error>().unwrap_or_else(|e| payload_error(&place, &e)))
                    }
                }
            });
        Ok(pieces)
    }
}
