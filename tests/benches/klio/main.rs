//! The benchmarks of docs/benchmarks.md: Klio's release programs against `pg_receivewal` and pgBackRest on the same machine, interleaved.
//!
//! `cargo bench -p klio-tests [-- PART... --quick]` with PART one of `catch_up`, `sync_commit`, `wal_fetch`, `memory`, `backup`,
//! `restore`, `files`, `replay`, `telemetry`.
//! Nothing here asserts on time: it measures and prints, a person judges. What it does assert is that every measured run
//! did its whole job. Tables go to standard output as Markdown, progress to standard error.

mod backup;
mod catch_up;
mod dataset;
mod drain;
mod files;
mod idle;
mod measured;
mod meter;
mod options;
mod peer;
mod replay;
mod restore;
mod stats;
mod sync_commit;
mod table;
mod telemetry;
mod wal_fetch;
mod workload;

use options::{Options, Part};

fn main() {
    let options = match Options::read(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("{problem}\n{}", options::USAGE);
            std::process::exit(2);
        }
    };
    klio_tests::install_crypto();
    // One thread: what is measured gets the cores.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("start the runtime of the benchmarks");
    runtime.block_on(run(&options));
}

async fn run(options: &Options) {
    if [Part::CatchUp, Part::WalFetch, Part::Telemetry].iter().any(|part| options.wants(*part)) {
        let load = workload::Workload::new(options.scale()).await;
        if options.wants(Part::CatchUp) {
            catch_up::run(&load, options).await;
        }
        if options.wants(Part::WalFetch) && options.with_klio() {
            wal_fetch::run(&load, options).await;
        }
        if options.wants(Part::Telemetry) && options.with_klio() {
            telemetry::run(&load, options).await;
        }
    }
    if options.wants(Part::SyncCommit) {
        sync_commit::run(options).await;
    }
    if options.wants(Part::Memory) && options.with_klio() {
        idle::run(options).await;
    }
    if options.with_klio() && (options.wants(Part::Backup) || options.wants(Part::Restore)) {
        backup::run(options).await;
    }
    if options.wants(Part::Files) && options.with_klio() {
        files::run(options).await;
    }
    if options.wants(Part::Replay) && options.with_klio() {
        replay::run(options).await;
    }
}
