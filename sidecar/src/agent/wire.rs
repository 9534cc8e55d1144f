//! The protocol between `wal-fetch` and the agent: lines of text over a unix socket in a directory that only our user
//! can enter.
//!
//! | who | line |
//! |---|---|
//! | caller | `klio-wal 1 <fingerprint> <file>`, followed by ` <traceparent>` if it is traced |
//! | agent | `wait`, about every second |
//! | agent | `file <name in the spool> <bytes>`, `absent <text>`, `failed <text>` or `other`; each ends the answer |
//!
//! After `file` the caller renames the file and closes the connection. The agent removes a file that was not renamed.

use klio_storage::layout::WalFile;
use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
};

/// The longest line that either side accepts.
pub(super) const LINE_BYTES_MAX: usize = 4096;

const GREETING: &str = "klio-wal 1";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    pub fingerprint: String,
    pub file: WalFile,
    /// W3C trace context of the caller; empty if it has none.
    pub traceparent: String,
}

impl Question {
    pub fn line(&self) -> String {
        let line = format!("{GREETING} {} {} {}", self.fingerprint, self.file, self.traceparent);
        format!("{}\n", line.trim_end())
    }

    pub fn parse(line: &str) -> Option<Self> {
        let rest = line.trim_end().strip_prefix(GREETING)?.strip_prefix(' ')?;
        let (fingerprint, rest) = rest.split_once(' ')?;
        let (file, traceparent) = rest.split_once(' ').unwrap_or((rest, ""));
        let (fingerprint, traceparent) = (fingerprint.to_owned(), traceparent.to_owned());
        Some(Self { fingerprint, file: file.parse().ok()?, traceparent })
    }
}

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Line {
    /// The file is still being fetched.
    Wait,
    /// The file lies in the spool under this name.
    File { name: String, bytes: u64 },
    /// The file definitely does not exist (P7).
    Absent(String),
    /// The agent cannot provide the file.
    Failed(String),
    /// The agent has other settings and is exiting.
    Other,
}

impl Line {
    pub fn text(&self) -> String {
        let clean = |text: &str| -> String {
            let room = LINE_BYTES_MAX / 4;
            text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(room / 4).collect()
        };
        match self {
            Line::Wait => "wait\n".into(),
            Line::File { name, bytes } => format!("file {name} {bytes}\n"),
            Line::Absent(text) => format!("absent {}\n", clean(text)),
            Line::Failed(text) => format!("failed {}\n", clean(text)),
            Line::Other => "other\n".into(),
        }
    }

    pub fn parse(line: &str) -> Option<Self> {
        // A line without its end may have lost more than the line feed.
        let line = line.strip_suffix('\n')?;
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "wait" => Some(Line::Wait),
            "other" => Some(Line::Other),
            "absent" => Some(Line::Absent(rest.to_owned())),
            "failed" => Some(Line::Failed(rest.to_owned())),
            "file" => {
                let (name, bytes) = rest.split_once(' ')?;
                let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
                let bytes = bytes.parse().ok()?;
                plain.then(|| Line::File { name: name.to_owned(), bytes })
            }
            _ => None,
        }
    }
}

/// A socket's path in a form that fits into `sun_path`.
pub(super) struct ShortPath {
    path: PathBuf,
    _directory: Option<File>,
}

impl ShortPath {
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// `sun_path` has 108 bytes on Linux (unix(7)). A data directory's path can be longer; the directory is then named by
/// its descriptor.
pub(super) fn short_path(path: &Path) -> io::Result<ShortPath> {
    if path.as_os_str().len() <= 100 {
        return Ok(ShortPath { path: path.to_owned(), _directory: None });
    }
    let directory = File::open(path.parent().unwrap_or(Path::new(".")))?;
    let name = path.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    Ok(ShortPath { path: short, _directory: Some(directory) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_read_back() {
        for traceparent in ["", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"] {
            let question = Question {
                fingerprint: "ab12".into(),
                file: "00000002.history".parse().unwrap(),
                traceparent: traceparent.into(),
            };
            assert_eq!(Question::parse(&question.line()), Some(question));
        }
        for line in [
            Line::Wait,
            Line::Other,
            Line::File { name: "x.1".into(), bytes: 16 << 20 },
            Line::Absent("no such".into()),
            Line::Failed(String::new()),
        ] {
            assert_eq!(Line::parse(&line.text()), Some(line));
        }
    }

    /// P7: an answer that was cut off means nothing.
    #[test]
    fn a_line_that_was_cut_is_none() {
        let whole = Line::Absent("no such file".into()).text();
        for cut in 0..whole.len() {
            assert_eq!(Line::parse(&whole[..cut]), None, "{cut}");
        }
    }

    #[test]
    fn a_name_stays_in_the_spool() {
        for bad in ["file ../x 1\n", "file a/b 1\n", "file  1\n", "file . 1\n", "file x\n"] {
            assert_eq!(Line::parse(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_fits_into_one_line(text in ".{0,5000}") {
            let line = Line::Failed(text).text();
            prop_assert!(line.len() <= LINE_BYTES_MAX && line.ends_with('\n'));
            prop_assert_eq!(line.matches('\n').count(), 1);
            prop_assert!(Line::parse(&line).is_some());
        }
    }
}
