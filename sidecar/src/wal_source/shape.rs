//! What the bytes of an answer are, and how large the file has to be in the end.
//!
//! A segment has one exact size or is none; a partial one is filled up with zeros, which PostgreSQL reads as the
//! end of WAL.

use crate::error::{Error, Failure};
use klio_pg::{SegmentHeader, SegmentSize};
use klio_proto::{
    Code,
    v1::{FetchHeader, FetchKind},
};
use klio_storage::layout::WalFile;

/// A history file is some lines; the largest reasonable size.
const HISTORY_BYTES_MAX: u64 = 1 << 20;
/// The largest wal_segment_size.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;

/// Which kind of file came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A whole segment: it never changes.
    Segment,
    /// The beginning of one; more of it may come.
    Partial,
    /// A history file.
    History,
}

/// How the bytes come and how large the file has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// What it is.
    pub content: Content,
    /// As zstd frames.
    pub compressed: bool,
    /// Bytes that come, after decompression; `None` where that is not known before reading.
    pub plain: Option<u64>,
    /// `None` where the source does not know it.
    pub segment: Option<SegmentSize>,
    /// A partial segment behind whose hole WAL goes on.
    pub before_hole: bool,
}

impl Shape {
    /// Of a file as it lies in the bucket.
    pub fn stored(file: WalFile) -> Self {
        let content = match file {
            WalFile::Segment(_) => Content::Segment,
            WalFile::Partial(_) => Content::Partial,
            WalFile::History(_) => Content::History,
        };
        let compressed = content != Content::History;
        Self { content, compressed, plain: None, segment: None, before_hole: false }
    }

    /// Of a server's answer.
    ///
    /// # Errors
    /// `Invalid` when it cannot be one.
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
            return Err(wrong("no more than a segment", format!("{header:?}")));
        }
        Ok(shape)
    }

    /// Whether the file is finished for good, so that it may be fetched before it is asked for.
    pub fn is_final(&self) -> bool {
        self.content == Content::Segment
    }

    /// The most that may come.
    pub fn limit(&self) -> u64 {
        match (self.content, self.segment) {
            (Content::History, _) => HISTORY_BYTES_MAX,
            (_, Some(segment)) => segment.bytes(),
            (_, None) => SEGMENT_BYTES_MAX,
        }
    }

    /// The size of the file when `came` bytes came; `None` when that cannot be all. `header` is what a segment
    /// says of itself, and `None` when fewer bytes came than a header has.
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
        // From a bucket: the segment says it itself.
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
