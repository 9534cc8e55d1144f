//! Fields of a record that this program does not know. A struct that is read, changed and written again, or passed on
//! between programs, ends with `#[serde(flatten)] unknown: Unknown`, so that an older program preserves what a newer
//! one wrote (P10).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The fields of a newer version, unchanged. Nothing is decided from them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Unknown(Map<String, Value>);

impl Unknown {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
