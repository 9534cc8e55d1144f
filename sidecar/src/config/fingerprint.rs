//! Tells whether two programs run with the same settings, without revealing the settings.
//!
//! The fingerprint covers everything that settings can come from: the file's text, the environment variables that
//! this program and the object store libraries read, the options, and the program's version.

use super::Config;
use sha2::{Digest, Sha256};

/// Prefixes of the variables that decide where WAL comes from.
const PREFIXES: [&str; 5] = ["KLIO_", "AWS_", "GOOGLE_", "AZURE_", "SSL_CERT_"];

impl Config {
    /// A digest in hexadecimal digits, from which no secret can be derived.
    pub fn fingerprint(&self, flags: &[(&str, String)]) -> String {
        let mut environment: Vec<_> = std::env::vars_os()
            .filter(|(name, _)| {
                PREFIXES.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes()))
            })
            .collect();
        environment.sort();
        let mut sum = Sha256::new();
        let mut add = |bytes: &[u8]| {
            sum.update((bytes.len() as u64).to_le_bytes());
            sum.update(bytes);
        };
        add(env!("CARGO_PKG_VERSION").as_bytes());
        for (name, value) in &environment {
            add(name.as_encoded_bytes());
            add(value.as_encoded_bytes());
        }
        for (name, value) in flags {
            add(name.as_bytes());
            add(value.as_bytes());
        }
        if let Some(file) = &self.file {
            add(file.as_os_str().as_encoded_bytes());
            add(&std::fs::read(file).unwrap_or_default());
        }
        sum.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_setting_is_another_fingerprint() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("klio.toml");
        let with = |text: &str, flags: &[(&str, String)]| {
            std::fs::write(&file, text).unwrap();
            Config::load(Some(&file), flags).unwrap().fingerprint(flags)
        };
        let first = with("cluster = \"a\"", &[]);
        assert_eq!(first, with("cluster = \"a\"", &[]));
        assert_ne!(first, with("cluster = \"b\"", &[]));
        assert_ne!(first, with("cluster = \"a\"", &[("restore.from", "s3://b".into())]));
    }
}
