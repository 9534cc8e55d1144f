//! The `[queue]` section, and the places where the executable is searched.

use super::Error;
use klio_pg::ByteSize;
use klio_storage::tier2::Secret;
use std::path::{Path, PathBuf};

/// The job queue: embedded by default, or an existing NATS given by `url`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QueueConfig {
    /// nats-server 2.12 or newer. If absent, it is searched beside klio-server, in `.tools/bin` and on PATH.
    pub executable: Option<PathBuf>,
    /// The most bytes of jobs stored. If the queue is full, jobs are derived later from the tiers (P4).
    pub max_bytes: ByteSize,
    /// `nats://host:port` or `tls://host:port`, several separated by commas: an existing NATS with JetStream instead
    /// of the embedded one.
    pub url: Option<String>,
    /// PEM file with the certificate authority of that NATS.
    pub ca_file: Option<PathBuf>,
    /// NATS credentials file.
    pub credentials_file: Option<PathBuf>,
    /// User name at that NATS.
    pub user: Option<String>,
    pub password: Option<Secret>,
    /// Copies of the stream in that NATS cluster, 1 to 5.
    pub replicas: usize,
}

impl Default for QueueConfig {
    fn default() -> Self {
        Self {
            executable: None,
            max_bytes: ByteSize::mib(256),
            url: None,
            ca_file: None,
            credentials_file: None,
            user: None,
            password: None,
            replicas: 1,
        }
    }
}

impl QueueConfig {
    /// Every problem that can be found without opening a file or a connection.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.max_bytes < ByteSize::mib(1) {
            problems.push(format!(
                "queue.max_bytes: expected at least 1 MiB, found {}",
                self.max_bytes
            ));
        }
        if !(1..=5).contains(&self.replicas) {
            problems.push(format!("queue.replicas: expected 1 to 5, found {}", self.replicas));
        }
        if self.user.is_some() != self.password.is_some() {
            problems.push("queue.user and queue.password: expected both or neither".into());
        }
        if self.url.is_none() {
            let external = [
                ("ca_file", self.ca_file.is_some()),
                ("credentials_file", self.credentials_file.is_some()),
                ("user", self.user.is_some()),
                ("replicas", self.replicas > 1),
            ];
            let named = external.iter().filter(|(_, given)| *given);
            problems.extend(named.map(|(key, _)| format!("queue.{key} needs queue.url")));
        } else if self.executable.is_some() {
            problems.push("queue.executable does not apply beside queue.url".into());
        }
        problems
    }

    /// Finds the nats-server to start.
    ///
    /// # Errors
    /// `NoExecutable` names every place that was tried.
    pub fn find_executable(&self) -> Result<PathBuf, Error> {
        if let Some(path) = &self.executable {
            let given = path.clone();
            return if path.is_file() { Ok(given) } else { Err(Error::NoExecutable(vec![given])) };
        }
        let beside = std::env::current_exe().ok().and_then(|e| e.parent().map(Path::to_owned));
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories = beside
            .into_iter()
            .chain([PathBuf::from(".tools/bin")])
            .chain(std::env::split_paths(&path).filter(|p| p.is_absolute()));
        let mut tried = Vec::new();
        for directory in directories {
            let candidate = directory.join("nats-server");
            if candidate.is_file() {
                return std::path::absolute(&candidate)
                    .map_err(Error::file("resolve", candidate.clone()));
            }
            tried.push(candidate);
        }
        Err(Error::NoExecutable(tried))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_executable_names_the_place_and_a_hint() {
        let config =
            QueueConfig { executable: Some("/nonexistent/nats".into()), ..QueueConfig::default() };
        let text = config.find_executable().unwrap_err().to_string();
        assert!(text.contains("/nonexistent/nats") && text.contains("hint:"), "{text}");
    }

    #[test]
    fn settings_of_the_other_kind_of_queue_are_refused() {
        assert_eq!(QueueConfig::default().validate(), Vec::<String>::new());
        let config = QueueConfig {
            ca_file: Some("/x".into()),
            user: Some("u".into()),
            replicas: 9,
            max_bytes: ByteSize::new(1),
            ..QueueConfig::default()
        };
        let text = config.validate().join("\n");
        for key in ["ca_file", "user", "replicas", "max_bytes", "password"] {
            assert!(text.contains(key), "{key}: {text}");
        }
    }
}
