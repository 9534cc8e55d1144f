//! `klio restore`, `klio list` and `klio drill`, end to end: every kind of target, every refusal with the directory untouched (RESTORE1).
//!
//! Commands run as the user who runs PostgreSQL. How restored content compares with a recorded workload is `proof.rs`.

use super::rig::{LOCAL, Rig, UNREACHABLE, recover, rows, state};
use klio_tests::{
    mount::SmallDisk,
    postgres::{Postgres, Stop, install},
    process::Running,
    programs,
    proof::Source,
    s3::{Fault, Rule},
    scratch::Scratch,
    site::PATIENCE,
    wait::eventually,
};
use serde_json::Value;
use std::{
    fs,
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

async fn story(major: u32) {
    let rig = Rig::new(major, false).await;
    rig.row(1).await;
    rig.backup("first").await;
    let two = rig.row(2).await;
    rig.pg.execute("select pg_create_restore_point('before three')").await;
    let three = rig.row(3).await;
    rig.backup("second").await;
    let four = rig.row(4).await;
    let five = rig.row(5).await;
    rig.flushed().await;
    for (args, expected) in [
        (vec!["--latest"], 5),
        (vec!["--target-time", &four.time], 4),
        (vec!["--target-time", &two.time], 2),
        (vec!["--target-name", "before three"], 2),
        (vec!["--target-xid", &three.xid], 3),
        (vec!["--target-immediate"], 3),
        (vec!["--target-immediate", "--backup", "first"], 1),
        (vec!["--latest", "--backup", "first"], 5),
        // The end of the last record, at which no record begins.
        (vec!["--target-lsn", &five.lsn.to_string()], 5),
    ] {
        let pg = rig.restored(Source::Server, &args).await;
        assert_eq!(rows(&pg).await, expected, "{args:?}");
        assert_eq!(pg.value("show archive_mode").await, "off");
    }
    // A target is listed, and so is what is to be expected of it.
    let outcome = rig.klio(Source::Server, &["list", "--json"]).await;
    let list: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(2), "{list:#}");
    assert_eq!(list["timelines"][0]["windows"][0]["backups"][1], "second", "{list:#}");
    let text = rig.klio(Source::Server, &["list"]).await.stdout;
    assert!(text.contains("second") && text.contains("recoverable"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_target_is_recovered_to_on_15() {
    story(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_target_is_recovered_to_on_17() {
    story(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_goes_on_and_is_restored_again_from_its_new_timeline() {
    let mut rig = Rig::new(15, false).await;
    rig.backup("only").await;
    let one = rig.row(1).await;
    rig.row(2).await;
    let lost = rig.row(3).await;
    rig.row(4).await;
    rig.flushed().await;
    for round in 0..2 {
        let target = if round == 0 { one.clone() } else { rig.row(20).await };
        let gone = rig.row(21 + round).await;
        rig.row(30).await;
        rig.flushed().await;
        rig.pg.stop(Stop::Fast).await;
        rig.stream = None;
        let pg = rig.restored(Source::Server, &["--target-time", &target.time]).await;
        assert_eq!(pg.timeline().await.get(), round + 2);
        assert_eq!(rows(&pg).await, target.rows);
        rig.pg = pg;
        rig.stream = Some(rig.site.stream(&rig.pg));
        let row = rig.row(10 + round).await;
        eventually("the new timeline", PATIENCE, || async {
            let flushed = rig.site.lsn("flushed_lsn").await?;
            let status = rig.site.status().await?;
            (status["timeline"] == round + 2 && flushed >= row.lsn).then_some(())
        })
        .await;
        // What was left behind is still there, on its own timeline.
        let old = (round + 1).to_string();
        let args = ["--target-time", &gone.time, "--target-timeline", &old];
        let pg = rig.restored(Source::Server, &args).await;
        assert_eq!(
            pg.value(&format!("select count(*) from t where id = {}", gone.rows)).await,
            "1"
        );
    }
    let pg = rig.restored(Source::Server, &["--latest"]).await;
    let ids = pg.value("select string_agg(id::text, ',' order by id) from t").await;
    assert_eq!(ids, "1,10,11,20");
    assert_eq!(pg.timeline().await.get(), 4);
    let pg = rig
        .restored(Source::Server, &["--target-time", &lost.time, "--target-timeline", "1"])
        .await;
    assert_eq!(pg.value("select max(id) from t where id < 10").await, "3");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_reached_is_refused_and_nothing_is_touched() {
    let rig = Rig::new(15, false).await;
    let before = rig.row(1).await;
    rig.backup("only").await;
    rig.row(2).await;
    rig.flushed().await;
    let r = &rig;
    r.refused(
        &["--target-time", &before.time],
        UNREACHABLE,
        &["before the end of backup only", "reachable"],
    )
    .await;
    r.refused(
        &["--target-time", "2099-01-01 00:00:00+00"],
        UNREACHABLE,
        &["cannot be reached", "PostgreSQL's clock"],
    )
    .await;
    r.refused(
        &["--target-lsn", &before.lsn.to_string()],
        UNREACHABLE,
        &["before the end of backup only"],
    )
    .await;
    r.refused(&["--target-lsn", "F/0"], UNREACHABLE, &["F/0 is behind the end of the WAL"]).await;
    r.refused(
        &["--target-name", "nobody made it"],
        UNREACHABLE,
        &["nobody made it", "not in the WAL"],
    )
    .await;
    r.refused(&["--target-xid", "999999"], UNREACHABLE, &["transaction 999999"]).await;
    r.refused(&["--target-timeline", "7"], UNREACHABLE, &["timeline 7"]).await;
    r.refused(&["--backup", "other"], UNREACHABLE, &["no base backup other"]).await;
    r.refused(&["--target-time", "yesterday"], Some(4), &["--target-time"]).await;
    r.refused(&["--tablespace-map", "/no=/where"], Some(4), &["no such tablespace"]).await;
    r.refused(&["--latest", "--target-immediate"], Some(2), &["cannot be used with"]).await;
    r.refused(&["--cluster", "another"], Some(15), &["another"]).await;

    // Directories that are not fit.
    let plan = r
        .klio(Source::Server, &["restore", "--dry-run", "--json", "--to", "/tmp/klio-nowhere"])
        .await;
    assert_eq!(plan.code, Some(0), "{}", plan.stderr);
    assert!(!Path::new("/tmp/klio-nowhere").exists());
    let json: Value = serde_json::from_str(&plan.stdout).expect("JSON");
    assert_eq!(json["plan"]["backup"], "only");
    let full = r.dir("full");
    fs::create_dir(&full).expect("make a directory");
    fs::write(full.join("precious"), "data").expect("write");
    install::give(&full);
    let running = r.pg.data_dir();
    let foreign = Postgres::builder().start().await;
    let mut foreign = foreign;
    foreign.stop(Stop::Fast).await;
    for (to, delta, words) in [
        (full.clone(), false, "expected an empty or absent directory"),
        (full.clone(), true, "found no global/pg_control"),
        (running.clone(), true, "PostgreSQL (process"),
        (foreign.data_dir(), true, "belongs to another PostgreSQL"),
        (PathBuf::from("/proc/klio"), false, "/proc"),
    ] {
        let path = to.display().to_string();
        let before = if to == running { Vec::new() } else { state(&to) };
        let mut args = vec!["restore", "--to", &path];
        args.extend(delta.then_some("--delta"));
        let outcome = r.klio(Source::Server, &args).await;
        assert_eq!(outcome.code, LOCAL, "{path}: {}{}", outcome.stdout, outcome.stderr);
        assert!(outcome.stderr.contains(words), "{path}: {}", outcome.stderr);
        let after = if to == running { Vec::new() } else { state(&to) };
        assert!(before == after, "{path} was touched");
    }
    assert_eq!(rows(&r.pg).await, 2);
    if install::other_user().is_some() {
        let disk = r.dir("small");
        let _disk = SmallDisk::mount(&disk, 8);
        install::give(&disk);
        let path = disk.join("data").display().to_string();
        let outcome = r.klio(Source::Server, &["restore", "--to", &path]).await;
        assert_eq!(outcome.code, LOCAL, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("of free space"), "{}", outcome.stderr);
        assert!(!disk.join("data").exists());
        // Root's directory.
        let closed = Scratch::new("closed");
        let path = closed.join("data").display().to_string();
        let outcome = r.klio(Source::Server, &["restore", "--to", &path]).await;
        assert_eq!(outcome.code, LOCAL, "{}", outcome.stderr);
        assert!(outcome.stderr.contains("Permission denied"), "{}", outcome.stderr);
    }
}

/// A database that is idle: the state at a time after its last commit is its end, once that is certain.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_after_the_last_commit_is_waited_for_until_it_is_certain() {
    let rig = Rig::new(15, false).await;
    rig.backup("only").await;
    rig.row(1).await;
    rig.flushed().await;
    let now = rig.pg.value("select clock_timestamp()").await;
    let mut pg = Postgres::empty(15);
    let to = pg.data_dir().display().to_string();
    let args = ["restore", "--target-action", "promote", "--target-time", &now, "--to", &to];
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    let command = rig.restorer(Source::Server).command(&args);
    let mut fresh = Running::spawn("klio restore", command, &rig.dir("fresh.log"));
    fresh.wait_log("waiting", PATIENCE).await;
    assert!(!pg.data_dir().exists());
    // Another transaction makes it certain at once.
    rig.row(2).await;
    assert!(fresh.wait_exit(PATIENCE).await.success(), "{}", fresh.log());
    recover(&mut pg).await;
    assert_eq!(rows(&pg).await, 1);
    // And so does time.
    rig.flushed().await;
    let now = rig.pg.value("select clock_timestamp()").await;
    let pg = rig.restored(Source::Server, &["--target-time", &now]).await;
    assert_eq!(rows(&pg).await, 2);
    // But not when nobody tells what PostgreSQL writes.
    let mut rig = rig;
    rig.stream = None;
    let gone = "the stream to be gone";
    eventually(gone, PATIENCE, || async {
        (rig.site.status().await?["connected"] == false).then_some(())
    })
    .await;
    let now = rig.pg.value("select clock_timestamp()").await;
    rig.refused(&["--target-time", &now], UNREACHABLE, &["cannot be reached"]).await;
}

/// P7: the restore refuses before it touches anything, and names the hole.
#[tokio::test(flavor = "multi_thread")]
async fn missing_wal_in_the_middle_is_named_and_never_recovered_over() {
    let mut rig = Rig::new(15, false).await;
    rig.backup("only").await;
    let one = rig.row(1).await;
    rig.row(2).await;
    let size = rig.pg.segment_size().await;
    let hole = rig.pg.switch_wal().await;
    rig.pg.write_wal(5 << 20).await;
    let late = rig.row(3).await;
    rig.flushed().await;
    let from = hole.segment_start(size).advance(2 * size.bytes());
    let name = rig.pg.segment_of(from.advance(1)).await;
    let file = eventually("the segment to be sealed", PATIENCE, || async {
        let files = fs::read_dir(rig.site.wal_dir(1)).ok()?.flatten();
        files.map(|f| f.path()).find(|p| {
            let file = p.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            file.starts_with(&name.to_string()) && file.contains(".zst")
        })
    })
    .await;
    rig.site.stop().await;
    fs::remove_file(&file).expect("lose a segment");
    rig.site.start().await;
    let text = from.to_string();
    let words = ["is missing", text.as_str(), "reachable"];
    rig.refused(&["--latest"], UNREACHABLE, &words).await;
    rig.refused(&["--target-time", &late.time], UNREACHABLE, &words).await;
    rig.refused(&["--target-lsn", &late.lsn.to_string()], UNREACHABLE, &words).await;
    let pg = rig.restored(Source::Server, &["--target-time", &one.time]).await;
    assert_eq!(rows(&pg).await, 1);
    let list = rig.klio(Source::Server, &["list"]).await.stdout;
    assert!(list.contains(&format!("hole from {from}")), "{list}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bucket_and_the_key_are_enough() {
    let mut rig = Rig::new(15, true).await;
    rig.backup("only").await;
    let one = rig.row(1).await;
    rig.row(2).await;
    let size = rig.pg.segment_size().await;
    let switched = rig.pg.switch_wal().await.segment_start(size);
    rig.pg.write_wal(1).await;
    rig.site.wait_archived(switched).await;
    eventually("the backup in the bucket", PATIENCE, || async {
        rig.s3.keys("klio/main/backups").iter().any(|key| key.ends_with(".json"))
    })
    .await;
    let identity = rig.site.identity().expect("an identity");
    let kept = rig.dir("kept.txt");
    fs::copy(identity, &kept).expect("copy the identity");
    install::give(&kept);
    rig.stream = None;
    rig.site.kill9();
    rig.pg.stop(Stop::Immediate).await;
    // Credentials that can read only: every other request is refused.
    for method in ["PUT", "POST", "DELETE"] {
        let method = method.parse().expect("a method");
        rig.s3.faults().inject(Rule::always(Fault::Status(403)).on(method));
    }
    let pg = rig.restored(Source::Bucket, &["--latest"]).await;
    assert_eq!(rows(&pg).await, 2);
    let auto = fs::read_to_string(pg.data_dir().join("postgresql.auto.conf")).expect("read");
    assert!(auto.contains("--from") && !auto.contains(&rig.s3.settings().secret_key), "{auto}");
    let pg = rig.restored(Source::Bucket, &["--target-time", &one.time]).await;
    assert_eq!(rows(&pg).await, 1);
    let list = rig.klio(Source::Bucket, &["list", "backups"]).await;
    assert!(list.code == Some(0) && list.stdout.contains("only"), "{}", list.stderr);

    // Another key, and none.
    let other = rig.dir("other.txt");
    let made = rig.site.klio_server(&["keygen", "--out", &other.display().to_string()]).await;
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    install::give(&other);
    let to = rig.dir("wrong-key");
    let settings = rig.s3.settings();
    let bucket = format!("s3://{}/klio", settings.bucket);
    let config = rig.dir("hands/klio.toml").display().to_string();
    for identity in [Some(other), None] {
        let mut command = install::command(&programs::klio());
        command.args(["restore", "--latest", "-c", &config, "--from", &bucket, "--to"]).arg(&to);
        if let Some(identity) = identity {
            command.arg("--identity").arg(identity);
        }
        let outcome = programs::run(command).await;
        assert_ne!(outcome.code, Some(0));
        assert!(outcome.stderr.contains("identity"), "{}", outcome.stderr);
        assert!(!to.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_rewrites_what_differs_and_continues_what_was_cut_off() {
    let rig = Rig::new(15, false).await;
    rig.pg
        .execute(
            "insert into t select g, repeat(md5(g::text), 30) from generate_series(1, 20000) g",
        )
        .await;
    rig.backup("only").await;
    rig.flushed().await;
    let to = rig.dir("data");
    let path = to.display().to_string();
    let restore = ["restore", "--target-immediate", "--json", "--to", &path];
    let full = rig.klio(Source::Server, &restore).await;
    assert_eq!(full.code, Some(0), "{}", full.stderr);
    let good = state(&to);

    // A page here, a byte more, a file less, a file too many, a link, another mode.
    let filenode = rig.pg.value("select pg_relation_filepath('t')").await;
    let relation = fs::OpenOptions::new().write(true).open(to.join(&filenode)).expect("open");
    relation.write_all_at(b"broken", 8192 * 100 + 500).expect("write");
    relation.set_len(8192 * 900).expect("cut");
    let mut longer = fs::OpenOptions::new().append(true).open(to.join("PG_VERSION")).expect("open");
    longer.write_all(b"more").expect("write");
    fs::remove_file(to.join("global/pg_filenode.map")).expect("remove");
    fs::create_dir(to.join("base/stray")).expect("make");
    fs::write(to.join("base/stray/file"), "x").expect("write");
    install::give(&to.join("base/stray"));
    fs::remove_file(to.join("pg_hba.conf")).expect("remove");
    let outside = rig.dir("outside");
    fs::write(&outside, "not to be followed").expect("write");
    std::os::unix::fs::symlink(&outside, to.join("pg_hba.conf")).expect("link");
    let mut delta = restore.to_vec();
    delta.push("--delta");
    let outcome = rig.klio(Source::Server, &delta).await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(state(&to) == good, "the delta restore left a difference");
    assert_eq!(fs::read(&outside).expect("read"), b"not to be followed");
    let json: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    let number = |value: &Value| value.as_u64().expect("a number");
    let (written, bytes) = (number(&json["done"]["written_bytes"]), number(&json["done"]["bytes"]));
    assert!(written * 2 < bytes, "{written} of {bytes} bytes were written");

    // Cut off: what is there says so, and is no data directory.
    let cut = rig.dir("cut");
    let path = cut.display().to_string();
    let args: Vec<String> =
        ["restore", "--target-immediate", "--to", &path].iter().map(|a| (*a).to_owned()).collect();
    let mut cut_off = false;
    for _ in 0..20 {
        let command = rig.restorer(Source::Server).command(&args);
        let mut running = Running::spawn("klio restore", command, &rig.dir("cut.log"));
        eventually("the restore to begin", PATIENCE, || {
            let begun = cut.join("klio-restore.unfinished").exists() || !running.is_running();
            async move { begun.then_some(()) }
        })
        .await;
        running.kill9_tree();
        cut_off = cut.join("klio-restore.unfinished").exists();
        if cut_off {
            break;
        }
        fs::remove_dir_all(&cut).expect("remove");
    }
    assert!(cut_off, "the restore was never cut off");
    assert!(!cut.join("global/pg_control").exists());
    let again = rig.klio(Source::Server, &["restore", "--to", &path]).await;
    assert_eq!(again.code, LOCAL);
    assert!(again.stderr.contains("unfinished restore"), "{}", again.stderr);
    let outcome = rig
        .klio(Source::Server, &["restore", "--target-immediate", "--delta", "--to", &path])
        .await;
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let names = |all: &[(PathBuf, Vec<u8>)], root: &Path| -> Vec<(PathBuf, Vec<u8>)> {
        let relative = |p: &Path| p.strip_prefix(root).expect("below").to_owned();
        all.iter().map(|(p, content)| (relative(p), content.clone())).collect()
    };
    assert!(names(&state(&cut), &cut) == names(&good, &to));
}

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_go_where_the_map_says() {
    let rig = Rig::new(15, false).await;
    let (old, new) = (rig.dir("old-place"), rig.dir("new place"));
    for place in [&old, &new] {
        fs::create_dir(place).expect("make");
        install::give(place);
    }
    rig.pg.execute(&format!("create tablespace far location '{}'", old.display())).await;
    rig.pg.execute("create table far_t tablespace far as select 7 as x").await;
    rig.backup("only").await;
    rig.flushed().await;
    let before = state(&old);
    // Its old place is in use.
    let path = rig.dir("data").display().to_string();
    let outcome = rig.klio(Source::Server, &["restore", "--to", &path]).await;
    assert_eq!(outcome.code, LOCAL, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--tablespace-map"), "{}", outcome.stderr);
    let map = format!("{}={}", old.display(), new.display());
    let pg = rig.restored(Source::Server, &["--latest", "--tablespace-map", &map]).await;
    assert_eq!(pg.value("select x from far_t").await, "7");
    let sql = "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'far'";
    assert_eq!(pg.value(sql).await, new.display().to_string());
    assert!(state(&old) == before, "the original's tablespace was touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_passes_and_a_damaged_backup_fails_it() {
    let rig = Rig::new(15, false).await;
    let (place, drills) = (rig.dir("place"), rig.dir("drills"));
    for dir in [&place, &drills] {
        fs::create_dir(dir).expect("make");
        install::give(dir);
    }
    rig.pg.execute(&format!("create tablespace far location '{}'", place.display())).await;
    rig.pg.execute("create table far_t tablespace far as select 7 as x").await;
    rig.row(1).await;
    rig.backup("only").await;
    rig.row(2).await;
    rig.flushed().await;
    let inside = drills.display().to_string();
    let query = "select max(id) from t";
    let args = ["drill", "--in", &inside, "--query", query, "--json"];
    // As PostgreSQL's user, and as who runs the tests, which may be root.
    let good = rig.klio(Source::Server, &args).await;
    assert_eq!(good.code, Some(0), "{}{}", good.stdout, good.stderr);
    let json: Value = serde_json::from_str(&good.stdout).expect("JSON");
    assert_eq!(
        (&json["drill"]["ok"], &json["rows"][0][0]),
        (&true.into(), &"2".into()),
        "{json:#}"
    );
    let as_tester = rig.site.klio(None, &args).await;
    assert_eq!(as_tester.code, Some(0), "{}{}", as_tester.stdout, as_tester.stderr);
    assert_eq!(fs::read_dir(&drills).expect("read").count(), 0, "a drill left something");
    let list = rig.klio(Source::Server, &["list", "--json"]).await.stdout;
    let list: Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!(list["backups"][0]["drilled"]["ok"], true, "{list:#}");

    let bad = rig.klio(Source::Server, &["drill", "--in", &inside, "--query", "select 1/0"]).await;
    assert_eq!(bad.code, Some(3), "{}{}", bad.stdout, bad.stderr);
    assert!(bad.stdout.contains("division by zero"), "{}", bad.stdout);

    // Ctrl-C cleans up.
    let command =
        rig.restorer(Source::Server).command(&["drill".into(), "--in".into(), inside.clone()]);
    let mut running = Running::spawn("klio drill", command, &rig.dir("drill.log"));
    eventually("the drill to begin", PATIENCE, || {
        let begun = fs::read_dir(&drills).is_ok_and(|mut entries| entries.next().is_some());
        async move { begun.then_some(()) }
    })
    .await;
    running.signal(rustix::process::Signal::INT);
    assert_eq!(running.wait_exit(PATIENCE).await.code(), Some(9), "{}", running.log());
    assert_eq!(fs::read_dir(&drills).expect("read").count(), 0, "a stopped drill left something");

    // A bit flips in every pack.
    for directory in fs::read_dir(rig.site.tier1().join("main/base/data")).expect("read").flatten()
    {
        for pack in fs::read_dir(directory.path()).expect("read").flatten() {
            let file =
                fs::OpenOptions::new().read(true).write(true).open(pack.path()).expect("open");
            let mut byte = [0];
            file.read_exact_at(&mut byte, 100).expect("read");
            file.write_all_at(&[byte[0] ^ 4], 100).expect("write");
        }
    }
    let damaged = rig.klio(Source::Server, &["drill", "--in", &inside]).await;
    assert_eq!(damaged.code, Some(3), "{}{}", damaged.stdout, damaged.stderr);
    assert!(damaged.stdout.contains("FAILED"), "{}", damaged.stdout);
    assert_eq!(fs::read_dir(&drills).expect("read").count(), 0);
    // And a restore never gives damaged files back.
    let to = rig.dir("damaged").display().to_string();
    let elsewhere = rig.dir("elsewhere");
    let map = format!("{}={}", place.display(), elsewhere.display());
    let args = ["restore", "--latest", "--to", &to, "--tablespace-map", &map];
    let outcome = rig.klio(Source::Server, &args).await;
    assert_eq!(outcome.code, Some(21), "{}{}", outcome.stdout, outcome.stderr);
}

/// Damage that was found stays known until it is disproved, and a backup after it is not built on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_pack_stays_known_whatever_is_read_later_and_the_next_backup_is_whole() {
    let rig = Rig::new(15, false).await;
    rig.pg.execute("insert into t select 0, md5(i::text) from generate_series(1, 20000) i").await;
    rig.row(1).await;
    rig.backup("old").await;
    rig.flushed().await;
    // The largest holds chunks of files.
    let packs = state(&rig.site.tier1().join("main/base/data"));
    let (pack, bytes) = packs.into_iter().max_by_key(|(_, bytes)| bytes.len()).expect("a pack");
    let mut bad = bytes.clone();
    bad[100] ^= 4;
    fs::write(&pack, &bad).expect("write");
    let id = pack.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();

    let verify = async |args: &[&str]| {
        let args: Vec<&str> = ["verify", "--json"].iter().chain(args).copied().collect();
        let outcome = rig.site.klio(None, &args).await;
        let json: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        (outcome.code, json)
    };
    let known = async |name: &str| {
        let list = rig.site.klio(None, &["list", "backups", "--json"]).await.stdout;
        let list: Value = serde_json::from_str(&list).expect("JSON");
        let all = list["backups"].as_array().expect("backups").clone();
        let entry = all.iter().find(|b| b["backup"]["name"] == name);
        entry.unwrap_or_else(|| panic!("{name}: {list:#}"))["verified"]["ok"].clone()
    };
    let damaged = async || rig.site.metrics().await.sum("klio_verify_damaged", &[]);
    assert_eq!(verify(&["--read-data", "all"]).await.0, Some(40));
    // A smaller look finds no less, of one backup or all.
    for args in [&["--read-data", "0"][..], &["--read-data", "1", "--backup", "old"]] {
        let (code, json) = verify(args).await;
        assert_eq!(code, Some(40), "{args:?}: {json:#}");
        assert!(json["damaged"][0]["key"].as_str().is_some_and(|key| key.contains(&id)));
        assert_eq!(known("old").await, false);
        assert_eq!(damaged().await, 1.0);
    }

    // Nothing has changed: but for what is known, the next backup would be made of what is there.
    let args = ["backup", "--name", "new", "--full-read", "--json"];
    let outcome = rig.site.klio(Some(&rig.pg), &args).await;
    let json: Value = serde_json::from_str(&outcome.stdout).expect("JSON");
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    assert_eq!(json["verify"]["outcome"]["ok"], true, "{json:#}");
    rig.flushed().await;
    assert_eq!((known("new").await, known("old").await), (true.into(), false.into()));
    assert!(damaged().await >= 1.0, "a look at another backup disproves nothing");
    for args in [&["--read-data", "all"][..], &["--read-data", "0"]] {
        let args = [args, &["--backup", "new"]].concat();
        let (code, json) = verify(&args).await;
        assert_eq!(code, Some(0), "{json:#}");
    }
    let pg = rig.restored(Source::Server, &["--backup", "new", "--latest"]).await;
    assert_eq!(pg.value("select count(*) from t").await, "20001");

    // The damaged one stays where it is. Found good, it is damaged no longer.
    assert!(fs::read(&pack).expect("read") == bad);
    fs::write(&pack, &bytes).expect("write");
    let (code, json) = verify(&["--read-data", "0"]).await;
    assert_eq!(code, Some(0), "{json:#}");
    assert_eq!((known("new").await, known("old").await), (true.into(), true.into()));
    assert_eq!(damaged().await, 0.0);
}
