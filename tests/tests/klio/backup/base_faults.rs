//! Base backups when things break: processes killed and connections cut at random in backup, verification, maintenance and restore;
//! a timeline that ends under a backup; files that shrink, vanish and appear; very many files.
//!
//! After each, everything goes on without a hand: the next backup works, and what is restored is what was there.

use klio_tests::{
    damage::flip,
    install_crypto,
    postgres::{Postgres, Stop, install},
    process::Running,
    programs,
    proof::Restorer,
    proxy::Proxy,
    scratch::Scratch,
    site::{PATIENCE, Site},
    wait::eventually,
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{fs, path::Path, time::Duration};

struct Rig {
    site: Site,
    pg: Postgres,
    _stream: Running,
    scratch: Scratch,
}

/// A server and a streaming PostgreSQL.
async fn rig(builder: klio_tests::postgres::Builder) -> Rig {
    rig_with(builder, &[]).await
}

/// The same with these variables of the server.
async fn rig_with(builder: klio_tests::postgres::Builder, variables: &[(&str, &str)]) -> Rig {
    install_crypto();
    let mut site = Site::new().await;
    variables.iter().for_each(|(name, value)| site.set(name, value));
    site.start().await;
    let pg = builder.start().await;
    let stream = site.stream(&pg);
    pg.wait_true("select count(*) = 1 from pg_stat_replication where state = 'streaming'").await;
    let scratch = Scratch::new("base-faults");
    install::give(scratch.path());
    Rig { site, pg, _stream: stream, scratch }
}

impl Rig {
    fn start_backup(&self, args: &[&str]) -> Running {
        self.start_backup_of(&self.pg, args)
    }

    fn start_backup_of(&self, pg: &Postgres, args: &[&str]) -> Running {
        // Its log tells the phases then.
        let mut all = vec!["backup", "--debug"];
        all.extend(args);
        let command = self.site.klio_command(Some(pg), &all);
        Running::spawn("klio backup", command, &self.scratch.join("backup.log"))
    }

    async fn backup(&self) {
        let outcome = self.site.klio(Some(&self.pg), &["backup"]).await;
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    }

    async fn backup_as(&self, name: &str) {
        let outcome = self.site.klio(Some(&self.pg), &["backup", "--name", name]).await;
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    }

    fn restorer(&self) -> Restorer {
        Restorer::of_server(&self.site, &self.scratch)
    }

    /// Restores everything there is and starts it.
    async fn restored(&self) -> Postgres {
        let mut pg = Postgres::empty(install::DEBIAN_MAJOR);
        let outcome = programs::run(self.restorer().latest(&pg, &[])).await;
        assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
        pg.recover().await;
        pg
    }
}

/// Waits until these have replayed everything that the first one wrote.
async fn replayed(from: &Postgres, followers: &[&Postgres]) {
    let end = from.write_wal(1).await;
    for follower in followers {
        follower.wait_true(&format!("select pg_last_wal_replay_lsn() >= '{end}'")).await;
    }
}

/// Waits until PostgreSQL has answered `pg_backup_start` and files are read.
async fn copying(backup: &mut Running) {
    backup.wait_log("phase=\"copying\"", PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_and_cuts_in_loops_leave_a_repository_that_works() {
    let rig = &mut rig(Postgres::builder()).await;
    let mut rng = StdRng::seed_from_u64(5);
    rig.pg
        .execute("create table t as select g, md5(g::text) from generate_series(1, 200000) g")
        .await;
    rig.backup().await;
    let proxy = Proxy::new(rig.site.port());
    let address = format!("https://localhost:{}", proxy.port());
    for round in 0..8 {
        rig.pg.execute("update t set md5 = md5(md5) where g % 7 = 0").await;
        let verb = ["backup", "verify", "restore", "backup"][round % 4];
        let target = rig.scratch.join(format!("broken{round}"));
        let mut command = match verb {
            "restore" => {
                let args = ["restore", "--latest", "--to", &target.display().to_string()];
                rig.restorer().command(&args.map(str::to_owned))
            }
            verb => rig.site.klio_command(Some(&rig.pg), &[verb]),
        };
        command.args(["--server", &address]);
        let mut running = Running::spawn(verb, command, &rig.scratch.join("broken.log"));
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..1500))).await;
        match rng.random_range(0..3) {
            0 => running.kill9_tree(),
            1 => proxy.outage(Duration::from_millis(300)).await,
            _ => {
                rig.site.kill9();
                rig.site.start().await;
            }
        }
        // However it ends, it ends.
        running.wait_exit(PATIENCE).await;
    }
    rig.backup().await;
    let verified = rig.site.klio(None, &["verify", "--read-data", "all"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    let sum = "select sum(hashtext(md5)::bigint) from t";
    let expected = rig.pg.value(sum).await;
    rig.pg.write_wal(1).await;
    rig.site.wait_flushed(rig.pg.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(restored.value(sum).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_was_killed_does_not_start_and_is_finished_by_the_next() {
    let rig = &mut rig(Postgres::builder()).await;
    rig.pg
        .execute("create table t as select g, md5(g::text) from generate_series(1, 400000) g")
        .await;
    rig.backup().await;
    rig.site.wait_flushed(rig.pg.flush_lsn().await).await;
    let mut pg = Postgres::empty(install::DEBIAN_MAJOR);
    let command = rig.restorer().latest(&pg, &[]);
    let mut restore = Running::spawn("klio restore", command, &rig.scratch.join("restore.log"));
    let written = |pg: &Postgres| size(&pg.data_dir()) > 1 << 20;
    eventually("the first files", PATIENCE, || async { written(&pg) }).await;
    restore.kill9_tree();
    let finished = restore.exit().is_some_and(|status| status.success());
    assert!(!finished, "it was killed after it had ended: the test needs more data");
    let control = pg.data_dir().join("global/pg_control");
    assert!(!control.exists(), "half a restore must not look like a cluster");
    // Another restore does not overwrite by mistake; the same with --delta finishes it.
    let refused = programs::run(rig.restorer().latest(&pg, &[])).await;
    assert!(
        refused.code != Some(0) && refused.stderr.contains("unfinished restore"),
        "{}",
        refused.stderr
    );
    let outcome = programs::run(rig.restorer().latest(&pg, &["--delta"])).await;
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    pg.recover().await;
    assert_eq!(pg.value("select count(*) from t").await, "400000");
}

fn size(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_under_a_backup_ends_it_and_the_next_one_works() {
    let rig = &mut rig(Postgres::builder().set("wal_keep_size", "1GB")).await;
    rig.pg.execute("create table t as select generate_series(1, 100000) g").await;
    let standby = rig.pg.standby().await;
    replayed(&rig.pg, &[&standby]).await;
    let mut backup = rig.start_backup_of(&standby, &[]);
    copying(&mut backup).await;
    backup.pause();
    rig.pg.stop(Stop::Immediate).await;
    standby.promote().await;
    backup.resume();
    let status = backup.wait_exit(PATIENCE).await;
    assert!(!status.success(), "half of it is of a standby:\n{}", backup.log());
    assert!(backup.log().contains("promoted"), "the reason is named:\n{}", backup.log());
    // The new primary is streamed from and backed up, and the backup of its timeline is restored.
    let _stream = rig.site.stream(&standby);
    standby.execute("create table after as select generate_series(1, 5) g").await;
    let outcome = rig.site.klio(Some(&standby), &["backup"]).await;
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    standby.write_wal(1).await;
    rig.site.wait_flushed(standby.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(restored.value("select count(*) from after").await, "5");
    assert_eq!(restored.timeline().await.get(), 3);
}

/// The standby that is backed up goes on beside another one that was promoted.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_standby_that_follows_a_promotion_leads_to_the_new_timeline() {
    let rig = &mut rig(Postgres::builder().set("wal_keep_size", "1GB")).await;
    rig.pg.execute("create table t as select generate_series(1, 100000) g").await;
    let (heir, standby) = (rig.pg.standby().await, rig.pg.standby().await);
    replayed(&rig.pg, &[&heir, &standby]).await;
    let mut backup = rig.start_backup_of(&standby, &[]);
    copying(&mut backup).await;
    backup.pause();
    rig.pg.stop(Stop::Immediate).await;
    heir.promote().await;
    let _stream = rig.site.stream(&heir);
    standby.set("primary_conninfo", &heir.conninfo()).await;
    heir.execute("create table after as select generate_series(1, 5) g").await;
    heir.execute("checkpoint").await;
    replayed(&heir, &[&standby]).await;
    standby.execute("checkpoint").await;
    standby.wait_true("select min_recovery_end_timeline = 2 from pg_control_recovery()").await;
    backup.resume();
    let status = backup.wait_exit(PATIENCE).await;
    assert!(status.success(), "{}", backup.log());
    let listed = rig.site.klio(None, &["list", "--json"]).await.stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let record = &listed["backups"][0]["backup"];
    assert_eq!([&record["start_timeline"], &record["stop_timeline"]], [1, 2], "{listed}");
    rig.site.wait_flushed(heir.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(restored.value("select count(*) from after").await, "5");
    assert_eq!(restored.timeline().await.get(), 3);
}

/// pg_control names the old timeline until the checkpoint that follows a promotion is done; WAL is of the new one at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_begun_right_after_a_promotion_is_of_the_new_timeline() {
    let rig = &mut rig(Postgres::builder().set("wal_keep_size", "1GB")).await;
    rig.pg.execute("create table t as select generate_series(1, 1000) g").await;
    let standby = rig.pg.standby().await;
    replayed(&rig.pg, &[&standby]).await;
    rig.pg.stop(Stop::Immediate).await;
    let sql = "select pid from pg_stat_activity where backend_type = 'checkpointer'";
    let pid: i32 = standby.value(sql).await.parse().expect("a process id");
    let checkpointer = rustix::process::Pid::from_raw(pid).expect("a process id");
    let send = |signal| rustix::process::kill_process(checkpointer, signal).expect("signalled");
    send(rustix::process::Signal::STOP);
    assert_eq!(standby.value("select pg_promote(true, 60)").await, "t");
    let control = "select timeline_id from pg_control_checkpoint()";
    assert_eq!(standby.value(control).await, "1", "the checkpoint is not done");
    let _stream = rig.site.stream(&standby);
    let mut backup = rig.start_backup_of(&standby, &[]);
    backup.wait_log("phase=\"checkpoint", PATIENCE).await;
    send(rustix::process::Signal::CONT);
    let status = backup.wait_exit(PATIENCE).await;
    assert!(status.success(), "{}", backup.log());
    let listed = rig.site.klio(None, &["list", "--json"]).await.stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
    let record = &listed["backups"][0]["backup"];
    let timelines = [&record["start_timeline"], &record["stop_timeline"]];
    assert_eq!(timelines, [2, 2], "{listed}");
    standby.execute("create table after as select generate_series(1, 5) g").await;
    rig.site.wait_flushed(standby.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(restored.value("select count(*) from after").await, "5");
    assert_eq!(restored.timeline().await.get(), 3);
}

/// What a prune leaves behind a backup that named packs which were just being removed.
#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_names_packs_that_are_gone_spoils_no_later_backup() {
    // Or the server puts the index right by itself before anybody looks.
    let off = [("KLIO_MAINTENANCE__ENABLED", "false")];
    let rig = &mut rig_with(Postgres::builder(), &off).await;
    rig.pg.execute("create table t as select generate_series(1, 20000) g").await;
    rig.backup().await;
    let main = rig.site.tier1().join("main");
    for directory in ["backups", "base/snapshots", "base/data"] {
        for file in all_files(&main.join(directory)) {
            fs::remove_file(file).expect("removed");
        }
    }
    // Its own verification is of this backup, which is whole.
    let mut backup = rig.site.klio_command(Some(&rig.pg), &["backup"]);
    backup.env("KLIO_BACKUP__MAINTENANCE", "false");
    let outcome = programs::run(backup).await;
    assert_eq!(outcome.code, Some(0), "{}{}", outcome.stdout, outcome.stderr);
    let verified = rig.site.klio(None, &["verify"]).await;
    assert_ne!(verified.code, Some(0), "{}", verified.stdout);
    let told = format!("{}{}", verified.stdout, verified.stderr);
    assert!(told.contains("hint: klio retention apply"), "{told}");
    let applied = rig.site.klio(None, &["retention", "apply"]).await;
    assert_eq!(applied.code, Some(0), "{}{}", applied.stdout, applied.stderr);
    let verified = rig.site.klio(None, &["verify", "--read-data", "all"]).await;
    assert_eq!(verified.code, Some(0), "{}{}", verified.stdout, verified.stderr);
    rig.backup().await;
    rig.site.wait_flushed(rig.pg.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(restored.value("select count(*) from t").await, "20000");
}

/// RESTORE6: nobody finds out in the middle of a restore what verify has known for days.
#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_is_known_to_be_damaged_is_restored_only_by_its_name() {
    let rig = &mut rig(Postgres::builder()).await;
    let data = rig.site.tier1().join("main/base/data");
    rig.pg
        .execute("create table a as select g, md5(g::text) from generate_series(1, 30000) g")
        .await;
    rig.backup_as("good").await;
    let good = all_files(&data);
    rig.pg
        .execute("create table b as select g, md5(g::text) from generate_series(1, 30000) g")
        .await;
    rig.backup_as("bad").await;
    let mut bad = all_files(&data);
    bad.retain(|pack| !good.contains(pack));
    flip_in_largest(&bad);
    let verified = rig.site.klio(None, &["verify", "--read-data", "all"]).await;
    assert_eq!(verified.code, Some(40), "{}", verified.stdout);
    rig.site.wait_flushed(rig.pg.flush_lsn().await).await;
    let listed = rig.site.klio(None, &["list", "backups"]).await.stdout;
    assert!(listed.contains("backup bad is damaged"), "{listed}");

    let mut pg = Postgres::empty(install::DEBIAN_MAJOR);
    let outcome = programs::run(rig.restorer().latest(&pg, &[])).await;
    let told = format!("{}{}", outcome.stdout, outcome.stderr);
    assert_eq!(outcome.code, Some(0), "{told}");
    assert!(told.contains("backup bad is damaged"), "{told}");
    pg.recover().await;
    assert_eq!(pg.value("select count(*) from b").await, "30000", "from good, by its WAL");

    flip_in_largest(&good);
    rig.site.klio(None, &["verify", "--read-data", "all"]).await;
    let pg = Postgres::empty(install::DEBIAN_MAJOR);
    let outcome = programs::run(rig.restorer().latest(&pg, &[])).await;
    assert_eq!(outcome.code, Some(30), "{}{}", outcome.stdout, outcome.stderr);
    assert!(outcome.stderr.contains("--backup bad restores from it anyway"), "{}", outcome.stderr);
    assert!(!pg.data_dir().exists(), "nothing was touched");
    let outcome = programs::run(rig.restorer().latest(&pg, &["--backup", "bad"])).await;
    assert_eq!(outcome.code, Some(21), "{}{}", outcome.stdout, outcome.stderr);
}

fn flip_in_largest(files: &[std::path::PathBuf]) {
    let size = |file: &&std::path::PathBuf| fs::metadata(file).map_or(0, |meta| meta.len());
    let file = files.iter().max_by_key(size).expect("a file");
    flip(file);
}

fn all_files(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory").flatten() {
        match entry.path().is_dir() {
            true => found.extend(all_files(&entry.path())),
            false => found.push(entry.path()),
        }
    }
    found
}

/// Relations of two segments (files of 1 GB, mostly holes) are vacuumed and dropped while they are read.
#[tokio::test(flavor = "multi_thread")]
async fn relations_of_many_segments_may_shrink_under_a_backup() {
    let rig = &mut rig(Postgres::builder().set("max_wal_size", "4GB")).await;
    for table in ["shrinks", "vanishes"] {
        rig.pg
            .execute(&format!("create table {table} (g int) with (autovacuum_enabled = off)"))
            .await;
        rig.pg.execute(&format!("insert into {table} select generate_series(1, 1000)")).await;
        let sql = format!("select pg_relation_filepath('{table}')");
        let path = rig.pg.data_dir().join(rig.pg.value(&sql).await);
        rig.pg.stop(Stop::Fast).await;
        // Pages of zeros are valid, empty pages; PostgreSQL itself leaves them behind after a crash.
        grow(&path, 1 << 30);
        grow(&path.with_extension("1"), if table == "shrinks" { 256 << 20 } else { 1 << 20 });
        rig.pg.start().await;
    }
    let mut backup = rig.start_backup(&[]);
    copying(&mut backup).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    backup.pause();
    rig.pg.execute("vacuum shrinks").await;
    rig.pg.execute("drop table vanishes").await;
    rig.pg.execute("create table appears as select generate_series(1, 77) g").await;
    rig.pg.execute("checkpoint").await;
    backup.resume();
    let status = backup.wait_exit(PATIENCE).await;
    assert!(status.success(), "{}", backup.log());
    rig.pg.write_wal(1).await;
    rig.site.wait_flushed(rig.pg.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(restored.value("select count(*) from shrinks").await, "1000");
    assert_eq!(restored.value("select count(*) from appears").await, "77");
    assert_eq!(restored.value("select to_regclass('vanishes') is null").await, "t");
    let pages = restored.value("select pg_relation_size('shrinks') / 8192").await;
    assert_eq!(pages, rig.pg.value("select pg_relation_size('shrinks') / 8192").await);
}

fn grow(path: &Path, size: u64) {
    let file = fs::OpenOptions::new().create(true).append(true).open(path).expect("open a segment");
    file.set_len(size).expect("grow a segment");
    install::give(path);
}

/// 100,000 are in `cargo bench -p klio-tests -- files --tables 100000`: PostgreSQL needs minutes to make them.
#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_small_tables_are_backed_up_and_restored() {
    let rig = &mut rig(Postgres::builder().set("max_locks_per_transaction", "2000")).await;
    for first in (0..10_000).step_by(2000) {
        rig.pg
            .execute(&format!(
                "do $$ begin for n in {first}..{} loop \
                   execute format('create table t%s as select %s as n', n, n); end loop; end $$",
                first + 1999
            ))
            .await;
    }
    rig.backup().await;
    rig.pg.write_wal(1).await;
    rig.site.wait_flushed(rig.pg.flush_lsn().await).await;
    let restored = rig.restored().await;
    assert_eq!(
        restored.value("select count(*) from pg_class where relname ~ '^t[0-9]+$'").await,
        "10000"
    );
    assert_eq!(restored.value("select (select n from t0) + (select n from t9999)").await, "9999");
}
