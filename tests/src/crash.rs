//! Lets a program of Klio die at one of its crash points (`klio_storage::crash`).
//!
//! What must stay true: a program dies once for each [`Armed`], however often it is started again with its environment.

use klio_storage::crash::{VARIABLE, index};
use std::path::PathBuf;

use crate::site::Site;

/// A point at which a program that has [`Armed::value`] in its environment dies.
#[derive(Debug, Clone)]
pub struct Armed {
    point: &'static str,
    pass: u64,
    mark: PathBuf,
}

impl Armed {
    /// The first time that the program comes to the point.
    ///
    /// # Panics
    /// When no program has that point.
    #[must_use]
    pub fn new(site: &Site, point: &'static str) -> Self {
        let _ = index(point);
        Self { point, pass: 1, mark: site.scratch(&format!("died-at-{point}")) }
    }

    /// The same, also when a program died there before.
    ///
    /// # Panics
    /// When what marks the earlier death cannot be removed.
    #[must_use]
    pub fn again(site: &Site, point: &'static str) -> Self {
        let armed = Self::new(site, point);
        if armed.has_died() {
            std::fs::remove_file(&armed.mark).expect("forget an earlier death");
        }
        armed
    }

    /// The time of that number instead of the first one.
    #[must_use]
    pub fn pass(self, pass: u64) -> Self {
        Self { pass, ..self }
    }

    /// The environment variable.
    pub const VARIABLE: &str = VARIABLE;

    /// What the variable is set to.
    #[must_use]
    pub fn value(&self) -> String {
        format!("{}:{}={}", self.point, self.pass, self.mark.display())
    }

    /// The point's name.
    #[must_use]
    pub fn point(&self) -> &'static str {
        self.point
    }

    /// Whether a program has died there.
    #[must_use]
    pub fn has_died(&self) -> bool {
        self.mark.exists()
    }
}
