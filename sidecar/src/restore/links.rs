//! Links in the data directory that lead out of it: a copy must not write where the original writes (P12).
//!
//! A link to something that is only read (settings, certificates) stays a link. A link to a directory, such as `log`,
//! becomes an empty directory of the copy's own. A link in place of database files is refused, because the files
//! behind it are not in the backup. In a delta restore, a link that the directory has already stays, since it is the
//! directory's own.

use super::{included::plain, place::Places};
use crate::error::{Error, Failure};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Directories whose content a backup must have.
const TABLES: [&str; 6] =
    ["base", "global", "pg_xact", "pg_multixact", "pg_commit_ts", "pg_twophase"];

/// What is done about the links.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Links {
    /// Absolute paths of links in the backup that become directories.
    pub directories: BTreeSet<PathBuf>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// Decides about every link. `read` has the directories outside from which settings are read.
///
/// # Errors
/// A link in place of database files.
pub fn links(
    links: &BTreeMap<PathBuf, PathBuf>,
    places: &Places,
    read: &[PathBuf],
    delta: bool,
) -> Result<Links, Error> {
    let mut done = Links::default();
    for (path, to) in links {
        let at = places.data.join(path);
        let dest = plain(&at.parent().unwrap_or(&places.data).join(to));
        let first = path.iter().next().unwrap_or_default().to_string_lossy().into_owned();
        let own = delta && fs::read_link(&at).is_ok_and(|there| there == *to);
        if own || first == "pg_tblspc" || places.all().any(|place| dest.starts_with(place)) {
            continue;
        }
        let temporary = path.file_name().is_some_and(|name| name == "pgsql_tmp");
        if TABLES.contains(&first.as_str()) && !temporary {
            let message = format!(
                "the backup has a link {} -> {} in place of database files: the files behind it are not in the backup",
                path.display(),
                to.display()
            );
            return Err(Error::new(Failure::Unreachable, message).hint(
                "use a tablespace instead of the link on the original PostgreSQL, then take a new backup; this restore has written nothing",
            ));
        }
        if is_directory(path, &dest) && !read.contains(&dest) {
            done.notes.push(format!(
                "{} was a link to {}: the copy gets an empty directory of its own",
                path.display(),
                to.display()
            ));
            done.directories.insert(at);
        }
    }
    Ok(done)
}

/// Whether a link leads to a directory. If the destination is not on this machine, this is a guess by the name.
fn is_directory(path: &Path, dest: &Path) -> bool {
    match fs::metadata(dest) {
        Ok(meta) => meta.is_dir(),
        Err(_) => path.extension().is_none() || path.starts_with("log"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_become_the_copy_s_own_and_what_is_read_stays_a_link() {
        let scratch = tempfile::tempdir().unwrap();
        let (live, data) = (scratch.path().join("live"), scratch.path().join("new"));
        fs::create_dir_all(live.join("conf.d")).unwrap();
        fs::write(live.join("postgresql.conf"), "").unwrap();
        let (tablespaces, made) = (BTreeMap::new(), BTreeMap::new());
        let places = Places { data: data.clone(), tablespaces, made };
        let links_of = |all: &[(&str, PathBuf)]| {
            all.iter().map(|(a, b)| (PathBuf::from(a), b.clone())).collect::<BTreeMap<_, _>>()
        };
        let all = links_of(&[
            ("log", live.clone()),
            ("old_log", "/nowhere/log".into()),
            ("inside", "log/x".into()),
            ("conf.d", live.join("conf.d")),
            ("postgresql.conf", live.join("postgresql.conf")),
            ("server.crt", "/nowhere/server.crt".into()),
            ("up", "../live".into()),
        ]);
        let done = links(&all, &places, &[live.join("conf.d")], false).unwrap();
        let expected = ["log", "old_log", "up"].map(|name| data.join(name));
        assert_eq!(done.directories, BTreeSet::from(expected));
        assert_eq!(done.notes.len(), 3);

        // The target directory has the link already.
        fs::create_dir(&data).unwrap();
        std::os::unix::fs::symlink(&live, data.join("log")).unwrap();
        let done = links(&links_of(&[("log", live.clone())]), &places, &[], true).unwrap();
        assert_eq!(done, Links::default());
        for path in ["base/5", "global", "base/5/16384", "pg_xact"] {
            assert!(
                links(&links_of(&[(path, live.clone())]), &places, &[], false).is_err(),
                "{path}"
            );
        }
        let temporary = links_of(&[("base/pgsql_tmp", live)]);
        assert_eq!(links(&temporary, &places, &[], false).unwrap().directories.len(), 1);
    }
}
