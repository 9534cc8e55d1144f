//! A restore without any program of Klio: the commands of docs/disaster.md on a copy of the bucket made by another tool, which has
//! the layout of tier 1 (which itself may keep the newest backups only).

use crate::{
    disaster::commands,
    postgres::{Postgres, install},
    programs,
    s3::S3,
    scratch::Scratch,
    site::Site,
    workload::Target,
};
use klio_pg::Lsn;
use std::{fs, path::Path};

/// The setting of PostgreSQL for a target.
fn setting(target: &Target) -> String {
    match target {
        Target::Time(time) => format!("recovery_target_time = '{time}+00'"),
        Target::Lsn(lsn) => format!("recovery_target_lsn = '{lsn}'"),
        Target::Name(name) => format!("recovery_target_name = '{name}'"),
        Target::Xid(xid) => format!("recovery_target_xid = '{xid}'"),
        Target::Immediate => "recovery_target = 'immediate'".to_owned(),
        Target::Latest => String::new(),
    }
}

/// The newest backup that ended before `position`, by its record.
fn choice(cluster: &Path, position: Lsn) -> String {
    let records = fs::read_dir(cluster.join("backups")).expect("records of backups").flatten();
    let mut found: Vec<(Lsn, String)> = records
        .filter(|entry| entry.path().extension().is_some_and(|e| e == "json"))
        .filter_map(|entry| {
            let record: serde_json::Value =
                serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
            let body = &record["body"];
            Some((body["stop_lsn"].as_str()?.parse().ok()?, body["name"].as_str()?.to_owned()))
        })
        .filter(|(stop, _)| *stop <= position)
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| panic!("no backup ended before {position}")).1
}

/// Restores the files and lays out the recovery; PostgreSQL is started by the caller.
///
/// # Panics
/// When a command of the page fails.
pub async fn restore(
    site: &Site,
    s3: &S3,
    cluster: &str,
    target: &Target,
    position: Lsn,
    scratch: &Scratch,
) -> Postgres {
    let tier1 = scratch.join("tier1");
    let _ = fs::remove_dir_all(&tier1);
    copy(&s3.bucket_dir().join("klio"), &tier1);
    let identity = scratch.join("stock-identity.txt");
    if let Some(kept) = site.identity() {
        fs::copy(kept, &identity).expect("copy the identity");
        install::give(&identity);
    }
    let pg = Postgres::empty(install::DEBIAN_MAJOR);
    let text = |path: &Path| path.display().to_string();
    let work = pg.socket_dir().join("work");
    let settings = [
        ("CLUSTER", cluster.to_owned()),
        ("IDENTITY", text(&identity)),
        ("PGBIN", text(&install::bin_dir(install::DEBIAN_MAJOR))),
        ("PGDATA", text(&pg.data_dir())),
        ("WORK", text(&work)),
        ("TARGET", setting(target)),
        ("CHOICE", choice(&tier1.join(cluster), position)),
        ("TIER1", text(&tier1)),
    ];
    let file = scratch.join("script");
    fs::write(&file, commands(&["files"], &settings)).expect("write the script");
    let mut command = install::command("/bin/bash".as_ref());
    command.args(["-euo", "pipefail"]).arg(&file).env("HOME", pg.socket_dir());
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(0), "{settings:?}: {}{}", outcome.stdout, outcome.stderr);
    pg
}

/// A copy that PostgreSQL's user can read.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("make a directory");
    install::give(to);
    for entry in fs::read_dir(from).expect("read the bucket").flatten() {
        // s3s-fs's own.
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else if fs::copy(entry.path(), &target).is_ok() {
            install::give(&target);
        }
    }
}
