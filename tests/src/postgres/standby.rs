//! Standbys and promotion.
//!
//! The copy is taken by PostgreSQL's low-level backup functions, because `pg_basebackup` 15 refuses newer servers.

use super::{Postgres, builder, expect_success, install};
use crate::programs;
use std::fs;

impl Postgres {
    /// A streaming standby of this server, started and streaming.
    ///
    /// # Panics
    /// When any step fails.
    pub async fn standby(&self) -> Self {
        let standby = self.copy_for_standby().await;
        self.attach(standby).await
    }

    async fn attach(&self, mut standby: Self) -> Self {
        standby.start().await;
        let name = format!("standby{}", standby.port);
        self.wait_true(&format!(
            "SELECT count(*) = 1 FROM pg_stat_replication \
             WHERE application_name = '{name}' AND state = 'streaming'"
        ))
        .await;
        standby
    }

    async fn copy_for_standby(&self) -> Self {
        let settings = |standby: &Self| {
            let name = format!("standby{}", standby.port);
            format!("primary_conninfo = '{} application_name={name}'\n", self.conninfo())
        };
        self.base_copy("standby.signal", settings).await
    }

    /// A copy that recovers with these settings when it is started; it has no WAL of its own.
    ///
    /// # Panics
    /// When any step fails.
    pub async fn recovery_copy(&self, signal: &str, settings: &str) -> Self {
        let copy = self.base_copy(signal, |_| settings.to_owned()).await;
        for entry in fs::read_dir(copy.pg_wal()).expect("read pg_wal").flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                fs::remove_file(entry.path()).expect("empty pg_wal");
            }
        }
        copy
    }

    async fn base_copy(&self, signal: &str, settings: impl Fn(&Self) -> String) -> Self {
        let standby = Self::place(self.major);
        // pg_backup_start and _stop must be called on one connection.
        let session = self.session().await;
        let sql = "SELECT pg_backup_start('standby', true)";
        session.rows(sql).await.expect("begin a base backup");
        copy(self, &standby).await;
        let sql = "SELECT labelfile FROM pg_backup_stop(false)";
        let label =
            session.rows(sql).await.expect("end a base backup").swap_remove(0).swap_remove(0);

        let data = standby.data_dir();
        for (name, content) in [("backup_label", label.as_str()), (signal, "")] {
            fs::write(data.join(name), content).expect("write into the standby's data directory");
            install::give(&data.join(name));
        }
        let settings = format!("{}{}", builder::place_settings(&standby), settings(&standby));
        // postgresql.conf last: its settings for the place overrule the primary's.
        builder::append(&data.join("postgresql.conf"), &settings);
        standby
    }

    /// Promotes a standby and waits until it accepts writes on its new timeline.
    ///
    /// # Panics
    /// When it is none, or does not within a minute.
    pub async fn promote(&self) {
        assert_eq!(self.value("SELECT pg_promote(true, 60)").await, "t", "promote");
        self.execute("CHECKPOINT").await;
    }
}

async fn copy(primary: &Postgres, standby: &Postgres) {
    let mut command = install::command("/bin/cp".as_ref());
    command.arg("-a").arg(primary.data_dir()).arg(standby.data_dir());
    // Files may vanish while they are copied (temporary ones, recycled WAL): recovery does not need those.
    let outcome = programs::run(command).await;
    let vanished = |line: &str| line.contains("No such file or directory");
    assert!(outcome.stderr.lines().all(vanished), "copy the data directory: {}", outcome.stderr);

    let data = standby.data_dir();
    let mut command = install::command("/bin/rm".as_ref());
    command
        .arg("-rf")
        .args(["postmaster.pid", "postmaster.opts", "pg_replslot"].map(|f| data.join(f)));
    expect_success("clean the copy", programs::run(command).await);
    // Slots of the primary are not the standby's; the directory must be there.
    fs::create_dir(data.join("pg_replslot")).expect("make pg_replslot");
    install::give(&data.join("pg_replslot"));
}
