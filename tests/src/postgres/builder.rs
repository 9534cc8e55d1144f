//! A new cluster: initdb, configuration, first start.

use super::{Postgres, install, template};
use std::{fmt::Write, fs, os::unix::fs::PermissionsExt, path::Path, process::Command};

/// What can be set before the first start of a [`Postgres`].
#[derive(Debug, Clone)]
pub struct Builder {
    major: u32,
    segment_mib: u32,
    settings: Vec<(String, String)>,
    hba: Vec<String>,
    files: Vec<(String, String)>,
    initdb: Vec<String>,
}

impl Default for Builder {
    fn default() -> Self {
        let settings = [
            ("fsync", "off"),
            ("shared_buffers", "32MB"),
            ("max_wal_senders", "20"),
            ("max_replication_slots", "20"),
            ("max_connections", "60"),
            ("listen_addresses", "127.0.0.1"),
            // Kept in the data directory, so that nothing of it stays in /dev/shm after a kill.
            ("dynamic_shared_memory_type", "mmap"),
            ("log_replication_commands", "on"),
            // Tests of idle streams should not wait for the default of ten seconds.
            ("wal_receiver_status_interval", "1s"),
        ];
        Self {
            major: install::DEBIAN_MAJOR,
            segment_mib: 16,
            settings: settings.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec(),
            hba: Vec::new(),
            files: Vec::new(),
            initdb: Vec::new(),
        }
    }
}

impl Builder {
    /// Major version, 15 to 18; 15 without this.
    #[must_use]
    pub fn major(mut self, major: u32) -> Self {
        self.major = major;
        self
    }

    /// WAL segment size in MiB, a power of two from 1 to 1024; 16 without this.
    #[must_use]
    pub fn segment_mib(mut self, mib: u32) -> Self {
        self.segment_mib = mib;
        self
    }

    /// A line for postgresql.conf; a later one of the same name wins.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.settings.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With `fsync`, as in production: for benchmarks.
    #[must_use]
    pub fn durable(self) -> Self {
        self.set("fsync", "on")
    }

    /// A line for `pg_hba.conf`. With any, TCP connections are refused except by these lines; the unix socket stays trusted.
    #[must_use]
    pub fn hba(mut self, line: &str) -> Self {
        self.hba.push(line.to_owned());
        self
    }

    /// A file in the data directory, readable by PostgreSQL only: certificates and keys.
    #[must_use]
    pub fn file(mut self, name: &str, content: &str) -> Self {
        self.files.push((name.to_owned(), content.to_owned()));
        self
    }

    /// A further argument for initdb, such as `--data-checksums`.
    #[must_use]
    pub fn initdb(mut self, argument: &str) -> Self {
        self.initdb.push(argument.to_owned());
        self
    }

    /// Creates the cluster and starts it.
    ///
    /// # Panics
    /// When either fails.
    pub async fn start(self) -> Postgres {
        let mut postgres = self.create().await;
        postgres.start().await;
        postgres
    }

    /// Creates the cluster without starting it.
    ///
    /// # Panics
    /// When initdb fails.
    pub async fn create(self) -> Postgres {
        let postgres = Postgres::place(self.major);
        let fixed = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"];
        let mut arguments: Vec<String> = fixed.map(str::to_owned).to_vec();
        arguments.extend(["--no-sync".to_owned(), "--no-instructions".to_owned()]);
        arguments.push(format!("--wal-segsize={}", self.segment_mib));
        arguments.extend(self.initdb.iter().cloned());
        template::lay_out(self.major, &arguments, &postgres.data_dir()).await;
        self.configure(&postgres);
        postgres
    }

    fn configure(&self, postgres: &Postgres) {
        let mut conf = String::new();
        for (name, value) in &self.settings {
            let _ = writeln!(conf, "{name} = '{}'", value.replace('\'', "''"));
        }
        let _ = write!(conf, "{}", place_settings(postgres));
        append(&postgres.data_dir().join("postgresql.conf"), &conf);
        if !self.hba.is_empty() {
            let local = "local all all trust\nlocal replication all trust\n";
            let hba = format!("{local}{}\n", self.hba.join("\n"));
            fs::write(postgres.data_dir().join("pg_hba.conf"), hba).expect("write pg_hba.conf");
        }
        for (name, content) in &self.files {
            let path = postgres.data_dir().join(name);
            fs::write(&path, content).expect("write a file into the data directory");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("protect a file");
            install::give(&path);
        }
    }
}

/// The settings that say where a server listens; a standby made from a copy has its own.
pub(super) fn place_settings(postgres: &Postgres) -> String {
    format!(
        "port = {}\nunix_socket_directories = '{}'\n",
        postgres.port(),
        postgres.socket_dir().display()
    )
}

pub(super) fn append(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().append(true).open(path).expect("open a settings file");
    file.write_all(text.as_bytes()).expect("write a settings file");
}

/// A killed PostgreSQL leaves a small System V segment behind, and the machine has 4096 of them; line 7 of postmaster.pid
/// names it. Nothing happens after an orderly stop.
pub(super) fn free_shared_memory(data_dir: &Path) {
    let file = fs::read_to_string(data_dir.join("postmaster.pid")).unwrap_or_default();
    let id = file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
    if let Some(id) = id {
        let _ = Command::new("ipcrm").args(["-m", id]).output();
    }
}
