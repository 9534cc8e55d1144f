//! The places where repository files are stored.

mod bucket;
mod local;
mod tiered;
mod windowed;
mod without;

pub use bucket::BucketFiles;
pub use local::LocalFiles;
pub use tiered::Tiered;
pub use windowed::Windowed;
pub use without::Without;

use crate::{
    Error,
    layout::{BaseFile, BaseKind},
};
use bytes::Bytes;

/// A place for repository files: tier 1, the bucket, or a server over gRPC. Every call blocks.
pub trait Files: Send + Sync + std::fmt::Debug + 'static {
    /// The name of the place for messages; contains no secret.
    fn place(&self) -> String;

    /// Every file of a kind with its size in bytes. An empty place gives an empty list.
    ///
    /// # Errors
    /// An error of the place.
    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error>;

    /// Reads a whole file.
    ///
    /// # Errors
    /// `NotFound` is definitive.
    fn read(&self, file: BaseFile) -> Result<Bytes, Error>;

    /// Reads `length` bytes from `offset` on.
    ///
    /// # Errors
    /// `NotFound` is definitive; `Corrupt` when the file is shorter.
    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error>;

    /// Stores a file whose content is the parts in order. Durable on return (REPO1); storing the same file
    /// again succeeds.
    ///
    /// # Errors
    /// `Conflict` if other bytes are stored under the name; `Corrupt` when the bytes do not have the
    /// SHA-256 in the name.
    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error>;

    /// Removes a file; a missing file is not an error.
    ///
    /// # Errors
    /// `Denied` if only appending is allowed.
    fn remove(&self, file: BaseFile) -> Result<(), Error>;
}
