//! A password that does not print.
//!
//! `Debug` and `Display` show stars, whatever holds it. Only [`Password::reveal`] gives the text,
//! and only authentication calls that.

use std::fmt;

/// A secret text.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Takes the text; `None` when it is empty, which PostgreSQL treats as no password.
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        (!text.is_empty()).then_some(Self(text))
    }
    /// The text itself, to authenticate with.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
