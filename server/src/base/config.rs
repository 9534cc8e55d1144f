//! The `[base]` section: how repositories are created.

use klio_pg::ByteSize;
use klio_storage::repository::Settings;

/// `[base]`. The sizes are fixed when a repository is created; the level applies to all new data.
#[derive(Debug, Clone, Copy, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BaseConfig {
    /// Bytes per chunk.
    pub chunk_size: ByteSize,
    /// zstd level; 0 stores uncompressed.
    pub compression_level: i32,
    /// Bytes per pack.
    pub pack_size: ByteSize,
}

impl Default for BaseConfig {
    fn default() -> Self {
        let Settings { chunk_size, compression_level, pack_size } = Settings::default();
        Self { chunk_size, compression_level, pack_size }
    }
}

impl BaseConfig {
    pub const fn settings(&self) -> Settings {
        let Self { chunk_size, compression_level, pack_size } = *self;
        Settings { chunk_size, compression_level, pack_size }
    }

    pub fn validate(&self) -> Vec<String> {
        let checked = self.settings().validate();
        checked.err().map(|error| format!("[base] {}", error.detail)).into_iter().collect()
    }
}
