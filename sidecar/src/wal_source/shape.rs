//! How to interpret the bytes of an answer, and how large the complete file must be.
//!
//! A whole segment has exactly the segment size. A partial segment is padded with zeros, which PostgreSQL reads as
//! the end of WAL.

use crate::error::{Error, Failure};
use klio_pg::{SegmentHeader, SegmentSize};
use klio_proto::{
    Code,
    v1::{FetchHeader, FetchKind},
};
use klio_storage::layout::WalFile;

/// A history file has some lines; this is a generous limit.
const HISTORY_BYTES_MAX: u64 = 1 << 20;
/// The largest possible wal_segment_size.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// The kind of a received file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole segment, which never changes.
    Segment,
    /// The beginning of a segment; more of it may follow.
    Partial,
    History,
}

/// How the bytes are encoded, and how large the file must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub content: Content,
    /// Whether the bytes are zstd frames.
    pub compressed: bool,
    /// Number of bytes after decompression; `None` if unknown before reading.
    pub plain: Option<u64>,
    /// The cluster's segment size; `None` if the source does not know it.
    pub segment: Option<SegmentSize>,
    /// A partial segment after which WAL was lost although later WAL exists.
    pub before_hole: bool,
}

impl Shape {
    /// The shape of a file that is stored in the bucket.
    pub fn stored(file: WalFile) -> Self {
        let content = match file {
            WalFile::Segment(_) => Content::Segment,
            WalFile::Partial(_) => Content::Partial,
            WalFile::History(_) => Content::History,
        };
        let compressed = content != Content::History;
        Self { content, compressed, plain: None, segment: None, before_hole: false }
    }

    /// The shape of a server's answer.
    ///
    /// # Errors
    /// `Invalid` for a header that no server may send.
    pub fn of(header: &FetchHeader) -> Result<Self, Error> {
        let wrong = |expected: &str, found: String| {
            let message = format!("read answer: expected {expected}, found {found}");
            Error::new(Failure::Code(Code::Invalid), message)
        };
        let known = Some(header.plain_size).filter(|size| *size > 0);
        let segment = match header.segment_size {
            0 => None,
            size => {
                Some(SegmentSize::new(size).map_err(|e| wrong("a segment size", e.to_string()))?)
            }
        };
        let (content, compressed, plain) = match header.kind() {
            FetchKind::SegmentZstd => {
                (Content::Segment, true, known.or(segment.map(SegmentSize::bytes)))
            }
            FetchKind::PartialZstd => (Content::Partial, true, known),
            FetchKind::PartialRaw => (Content::Partial, false, Some(header.plain_size)),
            FetchKind::HistoryRaw => (Content::History, false, known),
            FetchKind::Unspecified => {
                return Err(wrong("a file this klio knows", format!("{header:?}")));
            }
        };
        let before_hole = header.before_hole;
        let shape = Self { content, compressed, plain, segment, before_hole };
        if plain.is_some_and(|plain| plain > shape.limit()) {
            return Err(wrong("at most a segment", format!("{header:?}")));
        }
        Ok(shape)
    }

    /// Whether the file is final, so that it may be fetched before it is requested.
    pub fn is_final(&self) -> bool {
        self.content == Content::Segment
    }

    /// The maximum number of plain bytes.
    pub fn limit(&self) -> u64 {
        match (self.content, self.segment) {
            (Content::History, _) => HISTORY_BYTES_MAX,
            (_, Some(segment)) => segment.bytes(),
            (_, None) => SEGMENT_BYTES_MAX,
        }
    }

    /// The size that the file must have after `came` bytes were received; `None` if they cannot be the whole file.
    /// `header` is the segment's own header, or `None` if fewer bytes than a header were received.
    pub fn full_size(&self, came: u64, header: Option<&SegmentHeader>) -> Option<u64> {
        if self.plain.is_some_and(|plain| plain != came) || came > self.limit() {
            return None;
        }
        let says = header.map(|header| header.segment_size);
        if self.segment.is_some() && says.is_some() && says != self.segment {
            return None;
        }
        let segment = self.segment.or(says).map(SegmentSize::bytes);
        match self.content {
            Content::History => Some(came).filter(|came| *came > 0),
            Content::Segment => segment.filter(|segment| *segment == came),
            Content::Partial => segment.filter(|segment| came <= *segment),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use klio_pg::{Lsn, TimelineId};

    fn shape(kind: FetchKind, plain_size: u64, segment_size: u32) -> Result<Shape, Error> {
        let kind = kind.into();
        Shape::of(&FetchHeader { kind, plain_size, segment_size, ..FetchHeader::default() })
    }

    fn header(size: u32) -> SegmentHeader {
        SegmentHeader {
            timeline: TimelineId::new(1).unwrap(),
            start: Lsn::ZERO,
            system_identifier: 1,
            segment_size: SegmentSize::new(size).unwrap(),
        }
    }

    #[test]
    fn a_segment_has_its_exact_size() {
        let known = shape(FetchKind::SegmentZstd, 1 << 24, 1 << 24).unwrap();
        let own = header(1 << 24);
        assert_eq!(known.full_size(1 << 24, Some(&own)), Some(1 << 24));
        assert_eq!(known.full_size((1 << 24) - 1, Some(&own)), None);
        assert_eq!(known.full_size(1 << 24, Some(&header(1 << 20))), None);
        // From a bucket, only the segment's own header gives its size.
        let unknown = Shape::stored("000000010000000000000001".parse().unwrap());
        assert_eq!(unknown.full_size(1 << 20, Some(&header(1 << 20))), Some(1 << 20));
        assert_eq!(unknown.full_size((1 << 20) - 1, Some(&header(1 << 20))), None);
        assert_eq!(unknown.full_size(1 << 20, None), None);
    }

    #[test]
    fn a_partial_segment_is_padded() {
        let raw = shape(FetchKind::PartialRaw, 100, 1 << 20).unwrap();
        assert_eq!((raw.full_size(100, None), raw.full_size(99, None)), (Some(1 << 20), None));
        let stored = Shape::stored("000000010000000000000001.partial".parse().unwrap());
        assert_eq!(stored.full_size(70, Some(&header(1 << 20))), Some(1 << 20));
        assert_eq!(stored.full_size((1 << 20) + 1, Some(&header(1 << 20))), None);
        assert_eq!(stored.full_size(7, None), None);
        assert!(shape(FetchKind::PartialRaw, 2 << 20, 1 << 20).is_err());
        assert!(!raw.is_final() && !stored.is_final());
    }

    #[test]
    fn a_history_file_is_small_and_not_empty() {
        let history = shape(FetchKind::HistoryRaw, 0, 0).unwrap();
        assert_eq!(history.full_size(50, None), Some(50));
        assert_eq!((history.full_size(0, None), history.full_size(2 << 20, None)), (None, None));
        assert!(shape(FetchKind::Unspecified, 0, 0).is_err());
        assert!(shape(FetchKind::SegmentZstd, 0, 3).is_err());
    }
}
