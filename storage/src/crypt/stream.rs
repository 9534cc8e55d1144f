//! Streaming encryption and decryption: 64 KiB in memory, whatever the size.

use std::{
    fmt,
    io::{self, BufReader, Chain, Cursor, Read, Write},
};

/// A writer that encrypts. Without [`Encrypted::finish`] the file is truncated, which every reader notices.
pub struct Encrypted<W: Write>(pub(super) age::stream::StreamWriter<W>);

impl<W: Write> Encrypted<W> {
    /// Writes the end, and returns the inner writer.
    ///
    /// # Errors
    /// An error of the inner writer.
    pub fn finish(self) -> io::Result<W> {
        self.0.finish()
    }
}

impl<W: Write> Write for Encrypted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl<W: Write> fmt::Debug for Encrypted<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encrypted(..)")
    }
}

/// A reader that decrypts. Changed or truncated bytes give `InvalidData` or `UnexpectedEof`, never an early
/// end.
pub struct Decrypted<R: Read>(
    pub(super) age::stream::StreamReader<Chain<Cursor<Vec<u8>>, BufReader<R>>>,
);

impl<R: Read> Read for Decrypted<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out)
    }
}

impl<R: Read> fmt::Debug for Decrypted<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decrypted(..)")
    }
}
