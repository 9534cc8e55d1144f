//! A source in memory for tests: returns the files that it was given, records requests, and fails as instructed.

use super::{Answer, Shape, WalSource};
use crate::error::{Error, Failure};
use bytes::Bytes;
use futures::{StreamExt, stream};
use klio_pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use klio_proto::Code;
use klio_storage::{layout::WalFile, testing::SimulatedWal};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};
use tokio::sync::Semaphore;

pub(crate) const SYSTEM: u64 = 77;

/// Content of the source, and instructions.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub segments: BTreeSet<SegmentName>,
    /// Unfinished segments, with their number of plain bytes.
    pub partials: BTreeMap<SegmentName, usize>,
    pub histories: BTreeMap<TimelineId, Vec<u8>>,
    /// If set, every request fails with this.
    pub fail: Option<Failure>,
    /// Files whose first copy is damaged.
    pub damaged: BTreeSet<WalFile>,
    /// Every requested file, in order.
    pub asked: Vec<WalFile>,
}

/// Returns 1 MiB segments of [`SimulatedWal`].
pub(crate) struct FakeSource {
    pub script: Mutex<Script>,
    wal: SimulatedWal,
    /// Each permit lets one request through.
    pub gate: Semaphore,
}

/// The segment `number` of `timeline`, of 1 MiB segments.
pub(crate) fn segment(timeline: u32, number: u32) -> SegmentName {
    format!("{timeline:08X}{:08X}{:08X}", number / 4096, number % 4096).parse().unwrap()
}

/// Compresses as the server does.
pub(crate) fn compress(plain: &[u8]) -> Vec<u8> {
    let mut context = zstd::bulk::Compressor::new(1).unwrap();
    context.set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(true)).unwrap();
    context.compress(plain).unwrap()
}

impl FakeSource {
    /// A source with the segments `numbers` of timeline 1, which answers at once.
    pub fn new(numbers: std::ops::Range<u32>) -> Self {
        let segments = numbers.map(|number| segment(1, number)).collect();
        let script = Mutex::new(Script { segments, ..Script::default() });
        let gate = Semaphore::new(Semaphore::MAX_PERMITS / 2);
        Self { script, wal: SimulatedWal::small(SYSTEM), gate }
    }

    pub fn change(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    pub fn asked(&self) -> Vec<WalFile> {
        self.script.lock().unwrap().asked.clone()
    }

    /// The plain bytes of a segment.
    pub fn plain(&self, name: SegmentName) -> Vec<u8> {
        let size = self.wal.pinned().segment_size;
        let start = name.start_lsn(size).unwrap();
        let end = Lsn::new(start.as_u64() + size.bytes());
        self.wal.bytes(&TimelineHistory::root(name.timeline()), start, end)
    }

    fn answer(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
        let mut script = self.script.lock().unwrap();
        script.asked.push(file);
        if let Some(failure) = script.fail {
            return Err(Error::new(failure, "as told"));
        }
        let (stored, mut bytes) = match file {
            WalFile::Segment(name) if script.segments.contains(&name) => {
                (file, compress(&self.plain(name)))
            }
            WalFile::Segment(name) if script.partials.contains_key(&name) => {
                let plain = self.plain(name);
                (WalFile::Partial(name), compress(&plain[..script.partials[&name]]))
            }
            WalFile::History(timeline) if script.histories.contains_key(&timeline) => {
                (file, script.histories[&timeline].clone())
            }
            _ => {
                let message = format!("no {file}");
                return Err(Error::new(Failure::Code(Code::NotFound), message));
            }
        };
        if script.damaged.contains(&file) && !other_copy {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
        }
        let pieces: Vec<_> =
            bytes.chunks(50_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let pieces = stream::iter(pieces).boxed();
        Ok(Answer { shape: Shape::stored(stored), keys: None, pieces })
    }
}

#[tonic::async_trait]
impl WalSource for FakeSource {
    async fn ask(&self, file: WalFile, other_copy: bool) -> Result<Answer, Error> {
        self.gate.acquire().await.unwrap().forget();
        self.answer(file, other_copy)
    }
}
