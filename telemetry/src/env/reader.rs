//! Reads single variables, and collects the problems with their values.
//!
//! A problem is reported once, even if three signals read the same general variable. The reported value is redacted,
//! or left out if the whole variable is a secret.

use crate::redact::redact;
use std::{fmt, time::Duration};

/// Returns the value of the variable with this name.
pub(crate) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// One bad value: the variable, its value, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub variable: String,
    /// Its value, without secrets.
    pub value: String,
    /// The kind of value that was expected.
    pub expected: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: found {:?}, expected {}", self.variable, self.value, self.expected)
    }
}

pub(super) struct Reader<'a> {
    get: Lookup<'a>,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(get: Lookup<'a>) -> Self {
        Self { get, problems: Vec::new() }
    }

    pub(super) fn into_problems(self) -> Vec<Problem> {
        self.problems
    }

    pub(super) fn problem(&mut self, variable: &str, value: &str, expected: impl Into<String>) {
        let problem = Problem {
            variable: variable.into(),
            value: redact(value).into_owned(),
            expected: expected.into(),
        };
        if !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }

    /// The trimmed value; an empty one counts as unset.
    pub(super) fn text(&self, variable: &str) -> Option<String> {
        (self.get)(variable).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
    }

    pub(super) fn parsed<T>(
        &mut self,
        variable: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(variable)?;
        let value = parse(&text);
        if value.is_none() {
            self.problem(variable, &text, expected);
        }
        value
    }

    /// `true` or `false`, in any case; unset is false.
    pub(super) fn flag(&mut self, variable: &str) -> bool {
        self.choice(variable, &[("true", true), ("false", false)]).unwrap_or(false)
    }

    pub(super) fn choice<T: Copy>(&mut self, variable: &str, known: &[(&str, T)]) -> Option<T> {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        self.parsed(variable, &format!("one of {}", names.join(", ")), |s| {
            known.iter().find(|(name, _)| name.eq_ignore_ascii_case(s)).map(|(_, value)| *value)
        })
    }

    /// Milliseconds, at least one.
    pub(super) fn millis(&mut self, variable: &str) -> Option<Duration> {
        self.parsed(variable, "a number of milliseconds above 0", |s| {
            s.parse().ok().filter(|ms| *ms > 0).map(Duration::from_millis)
        })
    }

    pub(super) fn positive(&mut self, variable: &str) -> Option<usize> {
        self.parsed(variable, "a whole number above 0", |s| s.parse().ok().filter(|n| *n > 0))
    }

    /// The non-empty parts of a comma-separated list.
    pub(super) fn list(&self, variable: &str) -> Vec<String> {
        let text = self.text(variable).unwrap_or_default();
        text.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect()
    }

    /// `a=b,c=d` with percent-encoded values. A bad pair is left out and reported without its value, because headers
    /// contain credentials.
    pub(super) fn pairs(&mut self, variable: &str, expected: &str) -> Vec<(String, String)> {
        let mut pairs = Vec::new();
        for part in self.list(variable) {
            let decoded = part.split_once('=').and_then(|(key, value)| {
                let key = key.trim();
                let value = percent_decode(value.trim())?;
                (!key.is_empty()).then(|| (key.to_owned(), value))
            });
            match decoded {
                Some(pair) => pairs.push(pair),
                None => {
                    let shown = part.split('=').next().unwrap_or_default();
                    let shown =
                        if part.contains('=') { format!("{shown}=***") } else { "***".into() };
                    self.problem(variable, &shown, expected);
                }
            }
        }
        pairs
    }
}

/// RFC 3986 percent-decoding; `None` for a broken escape, or if the result is not UTF-8.
pub(super) fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let hex = std::str::from_utf8(tail.get(..2)?).ok()?;
            let valid = hex.bytes().all(|b| b.is_ascii_hexdigit());
            bytes.push(valid.then(|| u8::from_str_radix(hex, 16).ok())??);
            rest = &tail[2..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}
