//! What a record says that this program does not know. A part of a record that is read, changed and written again, or
//! passed on between programs, ends with `#[serde(flatten)] unknown: Unknown`: an older program then keeps what a newer one
//! wrote (P10).

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Fields of a newer version, as they came. Empty otherwise; nothing is decided from them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Unknown(Map<String, Value>);

impl Unknown {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
