//! Measures how fast page checksums are, and checks that they are PostgreSQL's. Give it files of a cluster
//! made by `initdb -k`, for example `cargo run --release -p klio-pg --example checksum_speed --
//! $PGDATA/base/1/1259`.

use klio_pg::{PageHeader, page_checksum};
use std::time::Instant;

fn main() {
    let (mut checked, mut wrong) = (0_u64, 0_u64);
    for path in std::env::args().skip(1) {
        let bytes = std::fs::read(&path).unwrap_or_default();
        for (block, page) in (0_u32..).zip(bytes.chunks_exact(8192)) {
            match PageHeader::read(page) {
                Some(header) if !header.is_new() => {
                    checked += 1;
                    wrong += u64::from(header.checksum != page_checksum(page, block));
                }
                _ => {}
            }
        }
    }
    println!("{checked} pages checked, {wrong} wrong");
    let bytes: Vec<u8> = (0..64 << 20).map(|n: u32| (n >> 7) as u8).collect();
    let begun = Instant::now();
    let rounds = 20;
    let mut all = 0_u64;
    for _ in 0..rounds {
        for (block, page) in (0_u32..).zip(bytes.chunks_exact(8192)) {
            all += u64::from(page_checksum(page, block));
        }
    }
    let rate = (rounds * bytes.len()) as f64 / begun.elapsed().as_secs_f64() / 1e6;
    println!("{rate:.0} MB/s ({all})");
}
