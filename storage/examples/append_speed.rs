//! Measures how fast tier 1 takes WAL: append and flush of real segments, with the time of the syncs reported
//! separately.
//!
//! `cargo run --release -p klio-storage --example append_speed -- [--encrypted] DIRECTORY BATCH_KIB SEGMENT_FILE...`:
//! DIRECTORY is a new directory to write to; the files are consecutive segments of one timeline, such as those of a
//! `pg_wal`.

use klio_pg::{Lsn, SegmentName, SegmentSize};
use klio_storage::{
    crypt::{AtRest, Keys},
    disk::RealDisk,
    layout::{ClusterName, WalFile},
    wal::{OpenRequest, Pinned, WalOptions, WalStore},
};
use std::{error::Error, path::PathBuf, sync::Arc, time::Instant};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1).peekable();
    let at_rest = match arguments.next_if(|argument| argument == "--encrypted") {
        Some(_) => AtRest::On(Keys::from_text(&Keys::generate().0, &[])?),
        None => AtRest::Off,
    };
    let directory = PathBuf::from(arguments.next().ok_or("expected a directory")?);
    let batch = arguments.next().ok_or("expected KiB in a batch")?.parse::<usize>()? << 10;
    let files: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    let first = std::fs::read(files.first().ok_or("expected segments")?)?;
    let number = |at: usize, len: usize| {
        first[at..at + len].iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b))
    };
    let size = SegmentSize::new(number(32, 4) as u32)?;
    let name = files[0].file_name().and_then(|n| n.to_str()).ok_or("expected a file name")?;
    let segment: SegmentName = name.parse()?;
    let postgres_version = match number(0, 2) {
        0xD110 => 150_000,
        0xD113 => 160_000,
        0xD116 => 170_000,
        _ => 180_000,
    };
    let pinned = Pinned { system_identifier: number(24, 8), segment_size: size, postgres_version };
    let store = WalStore::open(
        Arc::new(RealDisk),
        directory,
        WalOptions { at_rest, ..WalOptions::default() },
    )?;
    let cluster: ClusterName = "bench".parse()?;
    store.pin(&cluster, pinned)?;
    let start = segment.start_lsn(size).ok_or("expected a segment of that size")?;
    let timeline = segment.timeline();
    let request = OpenRequest { timeline, start, gap: None, now_unix: 0.0, slot_restart: None };
    let mut writer = store.open_writer(&cluster, &request)?;
    let (mut append, mut flush, mut seal, mut bytes) = (0.0, 0.0, 0.0, 0u64);
    let (mut sealed_bytes, mut flushes) = (0u64, 0u64);
    let mut finished: Vec<WalFile> = Vec::new();
    for file in &files {
        let content = std::fs::read(file)?;
        for chunk in content.chunks(batch) {
            let begun = Instant::now();
            let at: Lsn = writer.position();
            writer.append(at, chunk)?;
            append += begun.elapsed().as_secs_f64();
            let begun = Instant::now();
            writer.flush()?;
            flush += begun.elapsed().as_secs_f64();
            flushes += 1;
            bytes += chunk.len() as u64;
        }
        let begun = Instant::now();
        writer.preparation().map_or(Ok(()), |preparation| preparation.run())?;
        finished.extend(writer.take_finished());
        for file in finished.drain(..) {
            sealed_bytes += store.seal(&cluster, file)?.size;
        }
        seal += begun.elapsed().as_secs_f64();
    }
    let rate = |seconds: f64| bytes as f64 / 1e6 / seconds;
    println!(
        "{} MB in batches of {} KiB: append {:.0} MB/s, flush {:.0} MB/s ({:.2} ms each), both {:.0} MB/s, seal {:.0} MB/s, ratio {:.2}",
        bytes / 1_000_000,
        batch >> 10,
        rate(append),
        rate(flush),
        flush * 1e3 / flushes as f64,
        rate(append + flush),
        rate(seal),
        bytes as f64 / sealed_bytes as f64,
    );
    Ok(())
}
