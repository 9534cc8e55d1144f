//! Peak memory of `klio backup` and `klio restore` with many files: it must not grow with their number.

use crate::{
    measured::{self, Measured},
    options::Options,
    table,
};
use klio_tests::{
    postgres::Postgres, postgres::install, proof::Restorer, scratch::Scratch, site::Site,
};

/// Runs and prints it.
pub async fn run(options: &Options) {
    let mut rows = Vec::new();
    for tables in options.tables() {
        let (files, backup, restore) = one(tables).await;
        let cells = |run: Measured| {
            [format!("{:.2}", run.seconds), format!("{:.0}", table::mib(run.peak_bytes))]
        };
        let mut row = vec![tables.to_string(), files.to_string()];
        row.extend(cells(backup));
        row.extend(cells(restore));
        rows.push(row);
    }
    let head = ["tables", "files", "backup, s", "peak MiB", "restore, s", "peak MiB"];
    table::print("Many small tables: memory of the sidecar", &head, &rows);
}

async fn one(tables: u32) -> (u64, Measured, Measured) {
    let pg = Postgres::builder().set("max_locks_per_transaction", "1000").start().await;
    eprintln!("making {tables} tables");
    // Some at a time, because a transaction has a lock for each.
    let all: Vec<u32> = (0..tables).collect();
    for some in all.chunks(500) {
        let make = |n: &u32| {
            format!("create table t{n} (id int primary key); insert into t{n} values ({n})")
        };
        pg.execute(&some.iter().map(make).collect::<Vec<_>>().join("; ")).await;
    }
    let mut site = Site::new().await;
    site.start().await;
    let _stream = site.stream(&pg);
    pg.wait_true("select count(*) = 1 from pg_stat_replication where state = 'streaming'").await;
    let scratch = Scratch::new("files");
    install::give(scratch.path());
    let command = site.klio_command(Some(&pg), &["backup", "--checkpoint", "fast"]);
    let backup = measured::run("klio backup", command, &scratch.join("backup.log")).await;
    let to = scratch.join("data");
    let args = ["restore", "--target-immediate", "--to", &to.display().to_string()];
    let args = args.map(str::to_owned);
    let command = Restorer::of_server(&site, &scratch).command(&args);
    let restore = measured::run("klio restore", command, &scratch.join("restore.log")).await;
    (count(&to), backup, restore)
}

fn count(directory: &std::path::Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count(&entry.path()) } else { 1 }).sum()
}
