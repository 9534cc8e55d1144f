//! `service=NAME`: settings from a connection service file, as libpq reads it
//! (<https://www.postgresql.org/docs/current/libpq-pgservice.html>).
//!
//! They rank after the connection string and before other variables. The files are `~/.pg_service.conf` (or the file
//! that is named), then `pg_service.conf` in `PGSYSCONFDIR`; the first section of this name counts. `ldap:` lines are
//! refused, and so is a service inside a service.

use super::{ConnInfoError, Env, keyword};
use std::path::{Path, PathBuf};

const PERSONAL: &str = ".pg_service.conf";
const SYSTEM: &str = "pg_service.conf";
/// The directory that Debian's libpq uses.
const SYSTEM_DIR: &str = "/etc/postgresql-common";

/// Reads the keywords and values of a service.
///
/// # Errors
/// No file has the service, a named file cannot be read, or a line of the service is wrong.
pub(super) fn load(
    name: &str,
    file: Option<String>,
    env: Env<'_>,
) -> Result<Vec<(String, String)>, ConnInfoError> {
    let set = |variable: &str| env(variable).filter(|value| !value.is_empty());
    let personal = match file {
        Some(file) => Some((PathBuf::from(file), true)),
        None => set("HOME").map(|home| (PathBuf::from(home).join(PERSONAL), false)),
    };
    let system = set("PGSYSCONFDIR").unwrap_or_else(|| SYSTEM_DIR.to_owned());
    let files = personal.into_iter().chain([(PathBuf::from(system).join(SYSTEM), false)]);
    let mut looked = Vec::new();
    for (path, named) in files {
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                if let Some(found) = section(&text, name, &path)? {
                    return Ok(found);
                }
            }
            // libpq's rule: only a file that the user named must exist.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !named => {}
            Err(error) => return Err(trouble(&path, 0, error.to_string())),
        }
        looked.push(path.display().to_string());
    }
    Err(ConnInfoError::Service(format!(
        "find service {name:?}: expected a section [{name}] in {}, found none",
        looked.join(" or ")
    )))
}

fn trouble(path: &Path, line: usize, problem: String) -> ConnInfoError {
    let at = if line > 0 { format!(", line {line}") } else { String::new() };
    ConnInfoError::Service(format!("read service file {}{at}: {problem}", path.display()))
}

fn section(
    text: &str,
    name: &str,
    path: &Path,
) -> Result<Option<Vec<(String, String)>>, ConnInfoError> {
    let header = format!("[{name}]");
    let mut found: Option<Vec<(String, String)>> = None;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let wrong = |problem: &str| Err(trouble(path, number + 1, problem.to_owned()));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.starts_with('[') {
            if found.is_some() {
                break;
            }
            found = (line == header).then(Vec::new);
            continue;
        }
        let Some(pairs) = &mut found else { continue };
        if line.starts_with("ldap") {
            return wrong("ldap lookups are not supported");
        }
        let Some((keyword, value)) = line.split_once('=') else {
            return wrong("expected keyword=value");
        };
        match keyword {
            "service" | "servicefile" => return wrong("a service cannot name another one"),
            keyword if keyword::find(keyword).is_none() => return wrong("unknown keyword"),
            keyword if pairs.iter().all(|(known, _)| known != keyword) => {
                pairs.push((keyword.to_owned(), value.to_owned()));
            }
            // The first value of a keyword counts.
            _ => {}
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conninfo::ConnInfo;

    #[test]
    fn a_service_stands_between_the_connection_string_and_the_variables() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("services");
        let text = "# ours\n[other]\nhost=no\n[prod]\nhost=db1\nport=6000\nport=1\nuser=klio\nsslmode=require\n[prod]\nhost=late\n";
        std::fs::write(&file, text).unwrap();
        std::fs::write(directory.path().join(PERSONAL), "[home]\nhost=h\n").unwrap();
        std::fs::write(directory.path().join(SYSTEM), "[system]\nhost=s\n").unwrap();
        let place = directory.path().display().to_string();
        let read = |dsn: &str, file: Option<&str>| {
            let env = |name: &str| match name {
                "PGSERVICEFILE" => file.map(str::to_owned),
                "HOME" | "PGSYSCONFDIR" => Some(place.clone()),
                "PGPORT" => Some("7000".to_owned()),
                "PGDATABASE" => Some("d".to_owned()),
                _ => None,
            };
            ConnInfo::parse_as(dsn, &env, Some("os"))
        };
        let file = file.display().to_string();
        let prod = read("service=prod user=me", Some(&file)).unwrap();
        assert_eq!(prod.hosts[0].to_string(), "db1:6000");
        assert_eq!((prod.user.as_str(), prod.dbname.as_deref()), ("me", Some("d")));
        assert_eq!(read("service=home", None).unwrap().hosts[0].to_string(), "h:7000");
        assert_eq!(read("service=system", None).unwrap().hosts[0].to_string(), "s:7000");
        for (dsn, file, part) in [
            ("service=nobody", None, "[nobody]"),
            ("service=prod", Some("/none"), "/none"),
            ("service=bad", Some("bad"), "line 2"),
        ] {
            let bad = directory.path().join("bad");
            std::fs::write(&bad, "[bad]\nnonsense=1\n").unwrap();
            let file = file.map(|f| if f == "bad" { bad.display().to_string() } else { f.into() });
            let error = read(dsn, file.as_deref()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
