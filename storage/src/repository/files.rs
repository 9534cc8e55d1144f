//! Where the files of a repository are kept.

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

/// A place for repository files: tier 1, the bucket, or a server behind gRPC. Every call blocks.
pub trait Files: Send + Sync + std::fmt::Debug + 'static {
    /// For messages; holds no secret.
    fn place(&self) -> String;

    /// Every file of a kind with its size in bytes.
    ///
    /// # Errors
    /// As the place fails; an empty place is an empty list.
    fn list(&self, kind: BaseKind) -> Result<Vec<(BaseFile, u64)>, Error>;

    /// A whole file.
    ///
    /// # Errors
    /// `NotFound` is definitive.
    fn read(&self, file: BaseFile) -> Result<Bytes, Error>;

    /// `length` bytes from `offset` on.
    ///
    /// # Errors
    /// `NotFound` is definitive; `Corrupt` when the file is shorter.
    fn read_range(&self, file: BaseFile, offset: u64, length: u64) -> Result<Bytes, Error>;

    /// Stores a file that is the parts one after the other. Durable on return (REPO1); storing the same
    /// again is no error.
    ///
    /// # Errors
    /// `Conflict` for other bytes under the same name; `Corrupt` when the bytes are not what the name says.
    fn write(&self, file: BaseFile, parts: &[Bytes]) -> Result<(), Error>;

    /// Removes a file; one that is not there is no error.
    ///
    /// # Errors
    /// `Denied` where only appending is allowed.
    fn remove(&self, file: BaseFile) -> Result<(), Error>;
}
