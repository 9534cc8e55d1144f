//! The password file, `~/.pgpass`: lines of `host:port:database:user:password`.
//!
//! `*` alone matches anything; `\:` and `\\` stand for the second character; `#` begins a comment; the first match
//! wins (<https://www.postgresql.org/docs/current/libpq-pgpass.html>). A file that its group or others can access is
//! not used at all.

use super::Password;
use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// A parsed password file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PassFile {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    /// Host, port, database and user; `None` matches anything.
    keys: [Option<String>; 4],
    password: Password,
}

/// Why a password file is not used.
#[derive(Debug, thiserror::Error)]
pub enum PassFileWarning {
    /// Other users can access the file.
    #[error("expected mode 0600 or less, found {found:04o}\nhint: chmod 0600 {}", path.display())]
    Permissions { path: PathBuf, found: u32 },
    /// It is a directory, a pipe or a device.
    #[error("expected a plain file")]
    NotAFile,
    /// It exists but cannot be read.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl PassFile {
    /// Reads the file at `path`; `None` when there is none.
    ///
    /// The file exists but cannot be used; the caller goes on without it.
    pub fn load(path: &Path) -> Result<Option<PassFile>, PassFileWarning> {
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if !meta.is_file() {
            return Err(PassFileWarning::NotAFile);
        }
        let found = meta.permissions().mode() & 0o7777;
        if found & 0o077 != 0 {
            return Err(PassFileWarning::Permissions { path: path.to_owned(), found });
        }
        Ok(Some(Self::parse(&String::from_utf8_lossy(&fs::read(path)?))))
    }

    /// Reads the content; lines that are not entries are skipped, as libpq does.
    pub fn parse(content: &str) -> PassFile {
        PassFile { entries: content.lines().filter_map(Entry::parse).collect() }
    }

    /// The password of the first matching entry.
    pub fn lookup(&self, host: &str, port: u16, database: &str, user: &str) -> Option<&Password> {
        let port = port.to_string();
        let wanted = [host, &port, database, user];
        let fits = |e: &&Entry| {
            e.keys.iter().zip(wanted).all(|(key, value)| key.as_deref().is_none_or(|k| k == value))
        };
        self.entries.iter().find(fits).map(|e| &e.password)
    }
}

impl Entry {
    fn parse(line: &str) -> Option<Entry> {
        let line = line.trim_end_matches('\r');
        if line.starts_with('#') {
            return None;
        }
        let mut fields = split(line).into_iter();
        let mut key = || fields.next().map(|(raw_star, text)| (!raw_star).then_some(text));
        let keys = [key()?, key()?, key()?, key()?];
        let (_, password) = fields.next()?;
        Some(Entry { keys, password: Password::new(password)? })
    }
}

/// Splits at colons that are not escaped. The flag of each field says whether it is `*` alone.
fn split(line: &str) -> Vec<(bool, String)> {
    let mut fields = Vec::new();
    let (mut text, mut escaped_any) = (String::new(), false);
    let mut chars = line.chars();
    loop {
        match chars.next() {
            Some('\\') => {
                escaped_any = true;
                text.push(chars.next().unwrap_or('\\'));
            }
            Some(c) if c != ':' => text.push(c),
            end => {
                fields.push((text == "*" && !escaped_any, std::mem::take(&mut text)));
                escaped_any = false;
                if end.is_none() {
                    return fields;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found<'a>(file: &'a PassFile, host: &str, port: u16, db: &str, user: &str) -> &'a str {
        file.lookup(host, port, db, user).map_or("-", Password::reveal)
    }

    #[test]
    fn first_matching_line_wins() {
        let file = PassFile::parse(
            "# comment\n\nshort:line\ndb1:5432:replication:klio:one\ndb1:*:*:klio:two\n*:*:*:*:three\r\n",
        );
        assert_eq!(found(&file, "db1", 5432, "replication", "klio"), "one");
        assert_eq!(found(&file, "db1", 5433, "replication", "klio"), "two");
        assert_eq!(found(&file, "db2", 5432, "x", "y"), "three");
    }

    #[test]
    fn colons_and_backslashes_are_escaped_by_backslashes() {
        let file = PassFile::parse(
            r"::1:5432:*:klio:never
\:\:1:5432:*:kl\\io:p\:a\\ss:rest",
        );
        assert_eq!(found(&file, "::1", 5432, "db", r"kl\io"), r"p:a\ss");
        assert_eq!(found(&file, "::1", 5432, "db", "klio"), "-");
    }

    #[test]
    fn a_star_inside_a_field_is_only_a_star() {
        let file = PassFile::parse("db*:*:*:*:x\n\\*:*:*:*:y\n");
        assert_eq!(found(&file, "db1", 1, "d", "u"), "-");
        assert_eq!(found(&file, "*", 1, "d", "u"), "y");
    }

    #[test]
    fn file_readable_by_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        assert!(PassFile::load(&path).unwrap().is_none());
        fs::write(&path, "*:*:*:*:secret\n").unwrap();
        for (mode, good) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(PassFile::load(&path).is_ok(), good, "{mode:o}");
        }
        assert!(matches!(PassFile::load(dir.path()), Err(PassFileWarning::NotAFile)));
    }
}
