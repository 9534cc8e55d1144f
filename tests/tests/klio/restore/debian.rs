//! Debian's layout: postgresql.conf, pg_hba.conf and pg_ident.conf lie outside of the data directory, so that no backup has them.
//! A drill needs none of them; a restore says how to start with them, and what it says is enough.

use super::rig::{Rig, rows, state};
use klio_tests::{
    postgres::{Postgres, Stop, install},
    programs,
    proof::Source,
    site::Site,
};
use std::{fs, io::Write};

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restore_says_starts_a_copy_with_the_configuration_of_elsewhere() {
    let major = 15;
    let pg = Rig::builder(major).create().await;
    let (data, etc) = (pg.data_dir(), pg.socket_dir().join("etc"));
    fs::create_dir(&etc).expect("make");
    let mut conf = fs::OpenOptions::new().append(true).open(data.join("postgresql.conf"));
    let text = format!(
        "data_directory = '{}'\nhba_file = '{at}/pg_hba.conf'\nident_file = '{at}/pg_ident.conf'\n\
         external_pid_file = '{at}/main.pid'\narchive_mode = on\narchive_command = 'touch {at}/ARCHIVED'\n\
         archive_cleanup_command = 'touch {at}/CLEANED'\nrecovery_end_command = 'touch {at}/ENDED'\n",
        data.display(),
        at = etc.display(),
    );
    conf.as_mut().expect("open").write_all(text.as_bytes()).expect("write");
    for file in ["pg_hba.conf", "pg_ident.conf"] {
        fs::copy(data.join(file), etc.join(file)).expect("copy");
        install::give(&etc.join(file));
    }
    install::give(&etc);
    let mut pg = pg;
    pg.start().await;
    // PostgreSQL has read it: from here on it lies elsewhere alone.
    fs::rename(data.join("postgresql.conf"), etc.join("postgresql.conf")).expect("move");
    for file in ["pg_hba.conf", "pg_ident.conf"] {
        fs::remove_file(data.join(file)).expect("remove");
    }
    let mut rig = Rig::of(Site::new().await, pg, false).await;
    rig.row(1).await;
    rig.backup("only").await;
    rig.row(2).await;
    rig.flushed().await;
    let drill = rig.drill(&[]).await;
    assert_eq!(drill.code, Some(0), "{}{}", drill.stdout, drill.stderr);

    let copy = Postgres::empty(major);
    let said = rig.files(Source::Server, &copy, &["--latest", "--harmless"]).await;
    assert!(
        said.stderr.contains("postgresql.conf is not in the data directory"),
        "{}",
        said.stderr
    );
    let start = said.stdout.lines().find(|line| line.trim_start().starts_with("pg_ctl"));
    let start = start.unwrap_or_else(|| panic!("{}", said.stdout)).trim();
    let own = etc.join("postgresql.conf").display().to_string();
    let debian = format!("/etc/postgresql/{major}/main/postgresql.conf");
    assert!(start.contains(&debian), "{start}");

    rig.stream = None;
    rig.pg.stop(Stop::Fast).await;
    let before = (state(&data), state(&etc));
    let bin = install::bin_dir(major).display().to_string();
    let log = copy.socket_dir().join("log").display().to_string();
    let line =
        start.replace(&debian, &own).replacen("pg_ctl", &format!("{bin}/pg_ctl -l {log} -w"), 1);
    let mut shell = install::command("/bin/sh".as_ref());
    let started = programs::run({
        shell.args(["-c", &line]);
        shell
    })
    .await;
    // The original's port and socket are its own now.
    let seen = match started.code {
        Some(0) => {
            rig.pg.wait_true("select not pg_is_in_recovery()").await;
            (rows(&rig.pg).await, rig.pg.value("show data_directory").await)
        }
        _ => (0, format!("{}{}{}", started.stdout, started.stderr, copy.log())),
    };
    let mut stop = install::command(format!("{bin}/pg_ctl").as_ref());
    stop.arg("-D").arg(copy.data_dir()).args(["-m", "immediate", "stop"]);
    programs::run(stop).await;
    assert_eq!(seen, (2, copy.data_dir().display().to_string()), "{line}");
    assert!((state(&data), state(&etc)) == before, "the copy touched what is the original's");
}
