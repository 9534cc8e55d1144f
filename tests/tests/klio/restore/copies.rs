//! A copy harms nothing (P12): what the files of a cluster, its tablespaces, roles and links would do is known before, and
//! does not happen. All with real PostgreSQL.

use super::rig::{LOCAL, Rig, recover, rows, state};
use klio_tests::{
    postgres::{Postgres, Stop, install},
    proof::Source,
    site::Site,
};
use serde_json::Value;
use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

fn append(path: &Path, text: &str) {
    let mut file = fs::OpenOptions::new().append(true).create(true).open(path).expect("open");
    file.write_all(text.as_bytes()).expect("write");
    install::give(path);
}

fn directory(path: PathBuf) -> PathBuf {
    fs::create_dir_all(&path).expect("make");
    install::give(&path);
    path
}

/// Of `klio drill --json`.
fn outcome(json: &str) -> (bool, String) {
    let json: Value = serde_json::from_str(json).expect("JSON");
    (json["drill"]["ok"] == true, json["drill"]["problems"].to_string())
}

/// A cluster whose files say everything that could make a copy act on the world or end elsewhere.
async fn everything_in_the_files(major: u32) {
    let mut pg = Rig::builder(major).create().await;
    let data = pg.data_dir();
    let out = directory(pg.socket_dir().join("outside"));
    let at = out.display();
    let main = data.join("postgresql.conf");
    fs::copy(data.join("pg_hba.conf"), out.join("hba.conf")).expect("copy");
    install::give(&out.join("hba.conf"));
    append(
        &main,
        &format!(
            "Data_Directory = '{}'\nhba_file '{at}/hba.conf'\nexternal_pid_file = '{at}/pid'\n\
             archive_cleanup_command = 'touch {at}/CLEANUP'\nrecovery_end_command = 'touch {at}/END'\n\
             recovery_min_apply_delay = '2h'\nlog_directory = '{at}/log'\ninclude_dir = 'conf.d'\n\
             include_if_exists = '{at}/more.conf'\nprimary_conninfo = 'host=nowhere'\n\
             Archive_Mode = ALWAYS\narchive_command = 'test ! -e {at}/COPY || test $PWD = {} || touch {at}/ARCHIVED'\n",
            data.display(),
            data.display()
        ),
    );
    directory(data.join("conf.d"));
    pg.start().await;
    let rig = Rig::of(Site::new().await, pg, false).await;
    // Since the start, so that PostgreSQL has never been asked: two targets at once, and one outside.
    let two = "recovery_target_time = '2020-01-01'\nrecovery_target_xid = '3'\nrecovery_target_inclusive = off\n\
               recovery_target_action = 'shutdown'\n";
    append(&data.join("conf.d/10.conf"), two);
    append(&out.join("more.conf"), "recovery_target_name = 'left over'\n");
    rig.row(1).await;
    rig.backup("only").await;
    rig.row(2).await;
    rig.flushed().await;
    // A copy that recovers archives nothing; one that was promoted may, and is told so.
    append(&out.join("COPY"), "");
    let before = state(&out);
    let mut copy = Postgres::empty(major);
    rig.files(Source::Server, &copy, &["--target-immediate", "--target-action", "pause"]).await;
    copy.adopt();
    copy.start().await;
    assert_eq!(copy.value("show archive_mode").await, "on");
    copy.stop(Stop::Fast).await;
    assert!(state(&out) == before, "the copy archived what it recovered");
    fs::remove_file(out.join("COPY")).expect("remove");
    let before = state(&out);
    for (args, harmless) in [(&["--latest"][..], false), (&["--latest", "--harmless"], true)] {
        let mut copy = Postgres::empty(major);
        let said = rig.files(Source::Server, &copy, args).await.stderr;
        assert!(said.contains("data_directory in postgresql.conf was made a comment"), "{said}");
        recover(&mut copy).await;
        assert_eq!(rows(&copy).await, 2);
        let own = copy.data_dir().display().to_string();
        assert_eq!(copy.value("show data_directory").await, own);
        assert_eq!(copy.value("show hba_file").await, format!("{own}/pg_hba.conf"));
        assert_eq!(copy.value("show log_directory").await, "log");
        for name in ["archive_cleanup_command", "recovery_end_command", "primary_conninfo"] {
            assert_eq!(copy.value(&format!("show {name}")).await, "", "{name}");
        }
        let listens = copy.value("show listen_addresses").await;
        assert_eq!(listens.is_empty(), harmless, "{listens}");
    }
    let drill = rig.drill(&["--json"]).await;
    assert!(outcome(&drill.stdout).0, "{}{}", drill.stdout, drill.stderr);
    assert!(state(&out) == before, "the copies touched what is the original's");

    // Two targets in files that are not ours to change: refused, before anything is written.
    append(&out.join("more.conf"), "recovery_target_time = '2020-01-01'\n");
    rig.refused(&["--latest"], LOCAL, &["more.conf", "second recovery target"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_the_files_of_a_cluster_leads_a_copy_astray_on_15() {
    everything_in_the_files(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_the_files_of_a_cluster_leads_a_copy_astray_on_16() {
    everything_in_the_files(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_the_files_of_a_cluster_leads_a_copy_astray_on_17() {
    everything_in_the_files(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_the_files_of_a_cluster_leads_a_copy_astray_on_18() {
    everything_in_the_files(18).await;
}

/// `log` and the configuration itself are links: the copy has a log directory of its own, and what is behind the other link
/// is not written to.
#[tokio::test(flavor = "multi_thread")]
async fn links_of_the_data_directory_never_lead_a_copy_into_the_original() {
    let mut pg = Rig::builder(15).create().await;
    let data = pg.data_dir();
    let out = directory(pg.socket_dir().join("outside"));
    let logs = directory(out.join("logs"));
    fs::rename(data.join("postgresql.conf"), out.join("postgresql.conf")).expect("move");
    let text = format!("data_directory = '{}'\nlogging_collector = on\n", data.display());
    append(&out.join("postgresql.conf"), &text);
    symlink(out.join("postgresql.conf"), data.join("postgresql.conf")).expect("link");
    symlink(&logs, data.join("log")).expect("link");
    pg.start().await;
    let mut rig = Rig::of(Site::new().await, pg, false).await;
    rig.row(1).await;
    rig.backup("only").await;
    rig.flushed().await;
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;
    let before = state(&out);
    let mut copy = Postgres::empty(15);
    let said = rig.files(Source::Server, &copy, &["--latest"]).await.stderr;
    assert!(said.contains("log was a link to"), "{said}");
    assert!(!copy.data_dir().join("postgresql.conf").is_symlink());
    recover(&mut copy).await;
    assert_eq!(rows(&copy).await, 1);
    assert!(fs::read_dir(copy.data_dir().join("log")).expect("read").next().is_some());
    copy.stop(Stop::Fast).await;
    assert!(state(&out) == before, "the copy wrote where the original does");
}

/// Tablespaces that are made after the backup, and while it runs, on the machine of the original.
async fn tablespaces_after_the_backup(major: u32) {
    let rig = Rig::new(major, false).await;
    rig.backup("only").await;
    let live = directory(rig.dir("live"));
    rig.pg.execute(&format!("create tablespace later location '{}'", live.display())).await;
    rig.pg.execute("create table far (id int) tablespace later").await;
    rig.pg.execute("insert into far select generate_series(1, 1000)").await;
    rig.row(1).await;
    rig.flushed().await;
    rig.pg.execute("checkpoint").await;
    let before = state(&live);

    let drills = directory(rig.dir("drills"));
    let inside = drills.display().to_string();
    let query = "select count(*) from far";
    let drill = rig.drill(&["--in", &inside, "--query", query, "--json"]).await;
    assert!(outcome(&drill.stdout).0, "{}{}", drill.stdout, drill.stderr);
    let json: Value = serde_json::from_str(&drill.stdout).expect("JSON");
    assert_eq!(json["rows"][0][0], "1000", "{json:#}");
    assert!(state(&live) == before, "the drill touched the original's tablespace");

    let place = live.display().to_string();
    rig.refused(&["--latest"], LOCAL, &[&place, "--tablespace-map"]).await;
    let elsewhere = rig.dir("elsewhere");
    let map = format!("{place}={}", elsewhere.display());
    let mut copy = rig.restored(Source::Server, &["--latest", "--tablespace-map", &map]).await;
    assert_eq!(copy.value(query).await, "1000");
    copy.execute("insert into far values (0)").await;
    let sql = "select pg_tablespace_location(oid) from pg_tablespace where spcname = 'later'";
    assert_eq!(copy.value(sql).await, elsewhere.display().to_string());
    copy.restart().await;
    assert_eq!(copy.value(query).await, "1001");
    assert!(state(&live) == before, "the restore touched the original's tablespace");

    // A target before it needs none of that.
    let early = rig.restored(Source::Server, &["--target-immediate"]).await;
    assert_eq!(early.value("select count(*) from pg_tablespace").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_made_after_the_backup_is_never_that_of_the_original_on_15() {
    tablespaces_after_the_backup(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_made_after_the_backup_is_never_that_of_the_original_on_16() {
    tablespaces_after_the_backup(16).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_made_after_the_backup_is_never_that_of_the_original_on_17() {
    tablespaces_after_the_backup(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_made_after_the_backup_is_never_that_of_the_original_on_18() {
    tablespaces_after_the_backup(18).await;
}

/// On another machine the place of such a tablespace is not there: it is made, and a delta restore empties it again.
#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_is_not_there_is_made_for_a_tablespace_of_after_the_backup() {
    let mut rig = Rig::new(15, false).await;
    rig.backup("only").await;
    let live = directory(rig.dir("live"));
    rig.pg.execute(&format!("create tablespace later location '{}'", live.display())).await;
    rig.pg.execute("create table far tablespace later as select 7 as x").await;
    rig.flushed().await;
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;
    fs::rename(&live, rig.dir("moved")).expect("move");
    let drill = rig.drill(&["--json"]).await;
    assert!(outcome(&drill.stdout).0, "{}{}", drill.stdout, drill.stderr);
    let mut copy = rig.restored(Source::Server, &["--latest"]).await;
    assert_eq!(copy.value("select x from far").await, "7");
    copy.execute("insert into far values (8)").await;
    copy.stop(Stop::Fast).await;
    let to = copy.data_dir().display().to_string();
    let args = ["restore", "--to", &to, "--latest", "--delta", "--target-action", "promote"];
    let again = rig.klio(Source::Server, &args).await;
    assert_eq!(again.code, Some(0), "{}{}", again.stdout, again.stderr);
    recover(&mut copy).await;
    assert_eq!(copy.value("select string_agg(x::text, ',') from far").await, "7");
}

/// Settings that recovery needs, raised after the backup.
async fn settings_that_recovery_needs(major: u32) {
    let mut rig = Rig::new(major, false).await;
    rig.backup("only").await;
    for (name, value) in [
        ("max_connections", "150"),
        ("max_worker_processes", "20"),
        ("max_wal_senders", "25"),
        ("max_prepared_transactions", "5"),
        ("max_locks_per_transaction", "100"),
    ] {
        rig.pg.execute(&format!("alter system set {name} = {value}")).await;
    }
    rig.pg.restart().await;
    rig.row(1).await;
    rig.flushed().await;
    let drill = rig.drill(&["--json"]).await;
    assert!(outcome(&drill.stdout).0, "{}{}", drill.stdout, drill.stderr);
    let copy = rig.restored(Source::Server, &["--latest"]).await;
    assert_eq!((rows(&copy).await, copy.value("show max_connections").await), (1, "150".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_recovery_must_be_set_to_is_known_from_wal_on_15() {
    settings_that_recovery_needs(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_recovery_must_be_set_to_is_known_from_wal_on_18() {
    settings_that_recovery_needs(18).await;
}

/// What roles, databases and files are set to, triggers on login, and files that are included and not there, say nothing
/// about a backup.
async fn a_good_backup_passes(major: u32) {
    let rig = Rig::new(major, false).await;
    rig.row(1).await;
    rig.flushed().await;
    // All in one session: the next one would meet what is set.
    let mut sql = "create role reader;
        alter role postgres set statement_timeout = '1ms';
        alter role postgres set lock_timeout = '1ms';
        alter role postgres set idle_session_timeout = '1ms';
        alter role postgres set role = 'reader';
        alter database template1 set default_transaction_read_only = on;
        alter database postgres set default_transaction_read_only = on;
        alter role all set session_preload_libraries = 'no_such_library';"
        .to_owned();
    if major >= 17 {
        // The port of a drill: the backup and the stream still have to come in.
        sql += "create function stop() returns event_trigger language plpgsql as
                $$ begin if current_setting('port') = '5432' then raise 'no entry'; end if; end $$;
                create event trigger stop on login execute function stop();";
    }
    sql += "insert into t values (2)";
    rig.pg.session().await.rows(&sql).await.expect("set everything");
    append(
        &rig.pg.data_dir().join("postgresql.conf"),
        "statement_timeout = '1ms'\nshared_preload_libraries = 'no_such_library'\ninclude '/nowhere/at/all.conf'\n",
    );
    let options = "-c statement_timeout=0 -c lock_timeout=0 -c idle_session_timeout=0 -c role=none \
                   -c session_preload_libraries= -c default_transaction_read_only=off";
    let dsn = format!("{} options='{options}'", rig.pg.conninfo());
    let mut backup = rig.site.klio_command(None, &["backup", "--name", "only"]);
    backup.env("KLIO_POSTGRES__DSN", dsn);
    let backup = klio_tests::programs::run(backup).await;
    assert_eq!(backup.code, Some(0), "{}{}", backup.stdout, backup.stderr);
    let args = ["--json", "--query", "create table x as select count(*) from t"];
    let drill = rig.drill(&args).await;
    assert!(outcome(&drill.stdout).0, "{}{}", drill.stdout, drill.stderr);
    // The same is told before a restore, which does not start with it.
    let to = rig.dir("restored").display().to_string();
    let plan = rig.klio(Source::Server, &["restore", "--to", &to, "--latest", "--dry-run"]).await;
    assert_eq!(plan.code, Some(0), "{}", plan.stderr);
    for words in ["/nowhere/at/all.conf, which does not exist", "no_such_library"] {
        assert!(plan.stderr.contains(words), "{words}: {}", plan.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_fails_for_a_bad_backup_only_on_15() {
    a_good_backup_passes(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_fails_for_a_bad_backup_only_on_17() {
    a_good_backup_passes(17).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_fails_for_a_bad_backup_only_on_18() {
    a_good_backup_passes(18).await;
}

/// No drill is no failed drill, and none lasts for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_drill_has_a_limit_and_trouble_of_its_own_is_no_failure_of_the_backup() {
    let rig = Rig::new(15, false).await;
    rig.backup("only").await;
    rig.flushed().await;
    let sql = "select pg_sleep(3600)";
    let args = ["--json", "--timeout", "20s", "--query", sql];
    let drill = rig.drill(&args).await;
    let (ok, problems) = outcome(&drill.stdout);
    assert!(!ok && problems.contains("did not end within 20s (--timeout)"), "{problems}");
    let file = rig.dir("file");
    fs::write(&file, "").expect("write");
    let inside = file.join("x").display().to_string();
    let drill = rig.drill(&["--in", &inside]).await;
    assert_eq!(drill.code, LOCAL, "{}{}", drill.stdout, drill.stderr);
}

/// What a promoted copy would do is named, and `--harmless` turns it off.
#[tokio::test(flavor = "multi_thread")]
async fn a_harmless_copy_takes_no_rows_archives_nothing_and_waits_for_nobody() {
    let publisher = Postgres::builder().set("wal_level", "logical").start().await;
    publisher.execute("create table rows (id int primary key)").await;
    publisher.execute("create publication p for table rows").await;
    let pg = Rig::builder(15).create().await;
    let archive = directory(pg.socket_dir().join("archive"));
    let text = format!("archive_mode = on\narchive_command = 'cp %p {}/%f'\n", archive.display());
    append(&pg.data_dir().join("postgresql.conf"), &text);
    let mut pg = pg;
    pg.start().await;
    let mut rig = Rig::of(Site::new().await, pg, false).await;
    rig.pg.execute("create table rows (id int primary key)").await;
    let to = publisher.conninfo();
    rig.pg.execute(&format!("create subscription s connection '{to}' publication p")).await;
    publisher.execute("insert into rows values (1)").await;
    rig.pg.wait_true("select count(*) = 1 from rows").await;
    rig.pg.execute("alter system set synchronous_standby_names = 'nobody'").await;
    rig.backup("only").await;
    rig.flushed().await;
    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;
    publisher.execute("insert into rows values (2)").await;
    let before = state(&archive);

    let mut copy = Postgres::empty(15);
    let said = rig.files(Source::Server, &copy, &["--latest"]).await.stderr;
    for words in ["archive_command", "subscriptions", "first COMMIT", "--harmless"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    fs::remove_dir_all(copy.data_dir()).expect("remove");
    let said = rig.files(Source::Server, &copy, &["--latest", "--harmless"]).await.stderr;
    assert!(!said.contains("once it is a primary"), "{said}");
    recover(&mut copy).await;
    copy.execute("create table own as select 1 as x").await;
    copy.switch_wal().await;
    copy.execute("checkpoint").await;
    assert_eq!(copy.value("select count(*) from rows").await, "1");
    let workers = "select count(*) from pg_stat_activity where backend_type like 'logical%'";
    assert_eq!(copy.value(workers).await, "0");
    copy.stop(Stop::Fast).await;
    assert!(state(&archive) == before, "the copy archived");
    rig.pg.start().await;
    rig.pg.wait_true("select count(*) = 2 from rows").await;
}
