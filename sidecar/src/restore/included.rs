//! Which configuration files a restored cluster reads, in PostgreSQL's order: `postgresql.conf` with everything it
//! includes, at any depth, then `postgresql.auto.conf`.
//!
//! All of it is read before anything is written (RESTORE1). Files of the data directory are read from the backup.
//! Links and includes that lead out of the data directory are read where they lead, and never written to.

use super::conf::{self, Item};
use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

/// PostgreSQL's CONF_FILE_MAX_DEPTH.
const DEPTH_MAX: u32 = 10;
/// Limit for links that lead to links.
const LINKS_MAX: u32 = 16;

/// Access to the files of the backup and of this machine.
pub trait Read {
    /// A file that the backup has in the data directory; `None` if it has none of this name.
    ///
    /// # Errors
    /// The repository cannot be read.
    fn stored(&self, path: &Path) -> Result<Option<Vec<u8>>, crate::error::Error>;
    /// Where a link of the data directory leads, as it was stored.
    fn link(&self, path: &Path) -> Option<PathBuf>;
    /// Files and links in a directory of the backup.
    fn stored_names(&self, directory: &Path) -> Vec<PathBuf>;
    /// A file outside of the data directory, on this machine.
    ///
    /// # Errors
    /// An I/O error of the file system.
    fn outside(&self, path: &Path) -> std::io::Result<Vec<u8>>;
    /// The entries of a directory outside of the data directory.
    ///
    /// # Errors
    /// An I/O error of the file system.
    fn outside_names(&self, directory: &Path) -> std::io::Result<Vec<PathBuf>>;
}

/// Where a configuration file is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum At {
    /// In the data directory, by its path relative to it.
    Data(PathBuf),
    /// Outside of the data directory.
    Outside(PathBuf),
}

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (At::Data(path) | At::Outside(path)) = self;
        write!(f, "{}", path.display())
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Every setting with the file that sets it, in PostgreSQL's order; without those of `postgresql.auto.conf`.
    pub items: Vec<(At, Item)>,
    /// The settings of `postgresql.auto.conf`.
    pub auto: Vec<Item>,
    /// The configuration files in the data directory, with their content.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    /// Directories outside of the data directory that are included.
    pub directories: Vec<PathBuf>,
    /// Files that could not be read and without which PostgreSQL does not start, as text for the user.
    pub missing: Vec<String>,
    /// Whether the backup has a `postgresql.conf`.
    pub found: bool,
}

impl Configuration {
    /// Reads the configuration. `data` is the directory that is restored to.
    ///
    /// # Errors
    /// The repository cannot be read.
    pub fn read(data: &Path, from: &dyn Read) -> Result<Self, crate::error::Error> {
        let mut reading = Reading { data, from, found: Configuration::default() };
        let main = At::Data("postgresql.conf".into());
        if let Some(content) = reading.content(&main)? {
            reading.found.found = true;
            reading.file(&main, content, 0)?;
        }
        let auto = reading.content(&At::Data("postgresql.auto.conf".into()))?.unwrap_or_default();
        reading.found.auto = conf::parse(&auto);
        reading.found.files.insert("postgresql.auto.conf".into(), auto);
        Ok(reading.found)
    }

    /// The value of a setting when PostgreSQL starts; `None` if no file sets it.
    pub fn value(&self, name: &str) -> Option<&str> {
        let mut items = self.items.iter().map(|(_, item)| item).chain(&self.auto).rev();
        items.find(|item| item.name == name).map(|item| item.value.as_str())
    }
}

struct Reading<'a> {
    data: &'a Path,
    from: &'a dyn Read,
    found: Configuration,
}

impl Reading<'_> {
    /// Follows the links of the data directory to where a path really lies.
    fn place(&self, path: &Path) -> At {
        let mut path = plain(path);
        for _ in 0..LINKS_MAX {
            let Ok(inside) = path.strip_prefix(self.data) else { return At::Outside(path) };
            let linked = inside.ancestors().filter(|part| !part.as_os_str().is_empty());
            let linked = linked.filter_map(|part| Some((part, self.from.link(part)?))).last();
            let Some((link, to)) = linked else { return At::Data(inside.to_owned()) };
            let directory = self.data.join(link).parent().map(Path::to_owned).unwrap_or_default();
            let rest = inside.strip_prefix(link).unwrap_or(Path::new(""));
            path = plain(&directory.join(to).join(rest));
        }
        At::Outside(path)
    }

    /// The place that a restore could write to. A link to a file may be replaced by a file, but a file that is
    /// reached through a linked directory lies outside.
    fn own(&self, at: &At) -> At {
        let At::Data(path) = at else { return at.clone() };
        let directory = path.parent().unwrap_or(Path::new(""));
        match self.place(&self.data.join(directory)) {
            At::Data(_) => at.clone(),
            At::Outside(directory) => {
                At::Outside(directory.join(path.file_name().unwrap_or_default()))
            }
        }
    }

    /// The content of a file; `None` if it is not in the backup or, outside of the data directory, cannot be read.
    fn content(&self, at: &At) -> Result<Option<Vec<u8>>, crate::error::Error> {
        match at {
            At::Data(path) => match self.place(&self.data.join(path)) {
                At::Data(path) => self.from.stored(&path),
                At::Outside(path) => Ok(self.from.outside(&path).ok()),
            },
            At::Outside(path) => Ok(self.from.outside(path).ok()),
        }
    }

    fn file(&mut self, at: &At, content: Vec<u8>, depth: u32) -> Result<(), crate::error::Error> {
        let items = conf::parse(&content);
        let own = self.own(at);
        if let At::Data(path) = &own {
            self.found.files.insert(path.clone(), content);
        }
        for item in items {
            match item.name.as_str() {
                "include" | "include_if_exists" | "include_dir" if depth >= DEPTH_MAX => {
                    self.found.missing.push(format!("{at}: includes are nested too deep"));
                }
                "include_dir" => self.directory(at, &item.value, depth)?,
                "include" => self.include(at, &item.value, true, depth)?,
                "include_if_exists" => self.include(at, &item.value, false, depth)?,
                _ => self.found.items.push((own.clone(), item)),
            }
        }
        Ok(())
    }

    /// The path that `value` means in the file `at`: relative to that file's directory, by the name under which the
    /// file was opened.
    fn beside(&self, at: &At, value: &str) -> PathBuf {
        let file = match at {
            At::Data(path) => self.data.join(path),
            At::Outside(path) => path.clone(),
        };
        file.parent().unwrap_or(Path::new("/")).join(value)
    }

    /// The name under which PostgreSQL opens a path. It is not resolved, so that a link can be replaced by a file.
    fn named(&self, path: &Path) -> At {
        let path = plain(path);
        match path.strip_prefix(self.data) {
            Ok(inside) => At::Data(inside.to_owned()),
            Err(_) => At::Outside(path),
        }
    }

    fn include(
        &mut self,
        at: &At,
        value: &str,
        must: bool,
        depth: u32,
    ) -> Result<(), crate::error::Error> {
        let included = self.named(&self.beside(at, value));
        match self.content(&included)? {
            Some(content) => self.file(&included, content, depth + 1),
            None => {
                if must {
                    self.found.missing.push(format!("{at} includes {included}"));
                }
                Ok(())
            }
        }
    }

    fn directory(&mut self, at: &At, value: &str, depth: u32) -> Result<(), crate::error::Error> {
        let directory = plain(&self.beside(at, value));
        let names = match self.place(&directory) {
            At::Data(inside) => self.from.stored_names(&inside),
            At::Outside(path) => {
                let names = self.from.outside_names(&path);
                self.found.directories.push(path);
                let Ok(names) = names else {
                    let text = format!("{at} includes the directory {}", directory.display());
                    self.found.missing.push(text);
                    return Ok(());
                };
                names
            }
        };
        let mut names: Vec<_> = names.iter().filter_map(|path| path.file_name()).collect();
        names.sort_unstable();
        for name in names {
            let text = name.to_string_lossy();
            if !text.starts_with('.') && text.ends_with(".conf") {
                self.include(at, &directory.join(name).to_string_lossy(), false, depth)?;
            }
        }
        Ok(())
    }
}

/// Removes `.` and `..` from a path without looking at the file system.
pub fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::io;

    /// Files by their absolute path; those below `/new` are in the backup.
    #[derive(Default)]
    pub(in super::super) struct Fake {
        pub files: BTreeMap<PathBuf, String>,
        pub links: BTreeMap<PathBuf, PathBuf>,
    }

    impl Fake {
        pub fn new(files: &[(&str, &str)], links: &[(&str, &str)]) -> Self {
            let own = |(a, b): &(&str, &str)| (PathBuf::from(*a), (*b).to_owned());
            let links = links.iter().map(own).map(|(a, b)| (a, b.into()));
            Self { files: files.iter().map(own).collect(), links: links.collect() }
        }
        pub fn read(&self) -> Configuration {
            Configuration::read(Path::new("/new"), self).unwrap()
        }
        fn names(&self, directory: &Path) -> Vec<PathBuf> {
            self.files.keys().filter(|path| path.parent() == Some(directory)).cloned().collect()
        }
    }

    impl Read for Fake {
        fn stored(&self, path: &Path) -> Result<Option<Vec<u8>>, crate::error::Error> {
            Ok(self.files.get(&Path::new("/new").join(path)).map(|text| text.clone().into_bytes()))
        }
        fn link(&self, path: &Path) -> Option<PathBuf> {
            self.links.get(path).cloned()
        }
        fn stored_names(&self, directory: &Path) -> Vec<PathBuf> {
            self.names(&Path::new("/new").join(directory))
        }
        fn outside(&self, path: &Path) -> io::Result<Vec<u8>> {
            let found = self.files.get(path).map(|text| text.clone().into_bytes());
            found.ok_or_else(|| io::ErrorKind::NotFound.into())
        }
        fn outside_names(&self, directory: &Path) -> io::Result<Vec<PathBuf>> {
            let names = self.names(directory);
            if names.is_empty() { Err(io::ErrorKind::NotFound.into()) } else { Ok(names) }
        }
    }

    #[test]
    fn includes_are_read_in_place_however_deep_and_auto_conf_comes_last() {
        let fake = Fake::new(
            &[
                (
                    "/new/postgresql.conf",
                    "a = 1\ninclude 'sub/x.conf'\nb = 1\ninclude_dir 'conf.d'\n",
                ),
                ("/new/sub/x.conf", "include_if_exists = 'none.conf'\ninclude = '../y'\nb = 0\n"),
                ("/new/y", "include '/etc/z.conf'\n"),
                ("/etc/z.conf", "include 'w'\n"),
                ("/etc/w", "a = 2\n"),
                ("/new/conf.d/2.conf", "c = 2"),
                ("/new/conf.d/1.conf", "c = 1\nd = 1"),
                ("/new/conf.d/.hidden.conf", "c = 9"),
                ("/new/conf.d/3.conf.bak", "c = 9"),
                ("/new/postgresql.auto.conf", "d = 5"),
            ],
            &[],
        );
        let found = fake.read();
        let values: Vec<_> = ["a", "b", "c", "d", "e"].map(|n| found.value(n)).to_vec();
        assert_eq!(values, [Some("2"), Some("1"), Some("2"), Some("5"), None]);
        assert_eq!(found.missing, Vec::<String>::new());
        let outside = found.items.iter().filter(|(at, _)| matches!(at, At::Outside(_))).count();
        assert_eq!((outside, found.files.len()), (1, 6));
    }

    #[test]
    fn links_are_followed_and_what_is_missing_is_named() {
        let fake = Fake::new(
            &[
                ("/etc/pg/postgresql.conf", "include 'near.conf'\ninclude_dir 'd'\n"),
                ("/new/near.conf", "a = 1"),
                ("/live/d/1.conf", "b = 2\ninclude 'gone.conf'\n"),
            ],
            &[("postgresql.conf", "/etc/pg/postgresql.conf"), ("d", "../live/d")],
        );
        let found = fake.read();
        assert_eq!((found.value("a"), found.value("b")), (Some("1"), Some("2")));
        assert_eq!(found.directories, [PathBuf::from("/live/d")]);
        assert_eq!(found.missing.len(), 1, "{:?}", found.missing);
        assert!(found.missing[0].contains("gone.conf"));
        assert!(found.found);
        let round = Fake::new(&[("/new/postgresql.conf", "include 'postgresql.conf'")], &[]);
        assert!(round.read().missing[0].contains("too deep"));
        let circle = Fake::new(&[], &[("postgresql.conf", "postgresql.conf")]);
        assert!(!circle.read().found);
    }
}
