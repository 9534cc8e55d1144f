//! Finds out what the configuration files of a cluster would make a copy do, and what to do about it, before anything
//! is written (P12).
//!
//! Some settings cannot be overridden in `postgresql.auto.conf`: where the data and the access rules are, and
//! recovery targets, of which a second one is FATAL before ours is read. In files of the data directory, their lines
//! become comments. In files elsewhere, which belong to somebody else, they are overridden where PostgreSQL allows
//! it; otherwise the restore is refused. Where a copy that becomes a primary may act on the outside world, the user
//! gets a note. Pure.

use super::{
    conf::{boolean, line, silence},
    included::{At, Configuration, plain},
    settings::{Action, TARGETS},
    standby::Standby,
};
use crate::error::{Error, Failure};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// What to do about the configuration files of a cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Neutral {
    /// New contents of files in the data directory.
    pub rewritten: BTreeMap<PathBuf, Vec<u8>>,
    /// The content of the old `postgresql.auto.conf`.
    pub auto: Vec<u8>,
    /// The recovery target that files outside the data directory leave set.
    pub left_set: Option<&'static str>,
    /// Settings for `postgresql.auto.conf`.
    pub corrected: Vec<(&'static str, String)>,
    /// Notes for the user.
    pub notes: Vec<String>,
}

/// What the decision depends on, besides the files.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The directory that is restored to.
    pub data: &'a Path,
    pub action: Action,
    /// The copy becomes a standby: it has no target, and may take over from its primary.
    pub standby: Option<&'a Standby>,
    /// The copy must not act on the outside world.
    pub harmless: bool,
    /// The cluster has, or had, subscriptions.
    pub subscriptions: bool,
    /// The minimum values that recovery needs.
    pub needed: &'a [(&'static str, u32)],
    /// Whether the backup has a `pg_hba.conf` and a `pg_ident.conf`.
    pub rules: [bool; 2],
}

/// The settings that name the files with access rules, and the names of these files in the data directory.
const RULES: [(&str, &str); 2] = [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")];

/// The values that PostgreSQL uses if nothing sets these settings.
const DEFAULTS: [(&str, u32); 5] = [
    ("max_connections", 100),
    ("max_worker_processes", 8),
    ("max_wal_senders", 10),
    ("max_prepared_transactions", 0),
    ("max_locks_per_transaction", 64),
];

/// Decides what to do about the configuration.
///
/// # Errors
/// A setting outside of the data directory that cannot be overridden, and its file.
pub fn neutral(conf: &Configuration, asked: Asked<'_>) -> Result<Neutral, Error> {
    let mut done = Neutral {
        auto: conf.files.get(Path::new("postgresql.auto.conf")).cloned().unwrap_or_default(),
        left_set: left_set(conf)?,
        ..Neutral::default()
    };
    done.silence(conf, &asked);
    done.answer(conf, &asked)?;
    done.log(conf, &asked);
    done.raise(conf, &asked);
    let pauses = asked.action == Action::Pause && asked.standby.is_none();
    if pauses && conf.value("hot_standby").and_then(boolean) == Some(false) {
        done.corrected.push(("hot_standby", "on".to_owned()));
        done.notes.push(
            "hot_standby was off: it is on until ALTER SYSTEM RESET, because otherwise nobody can connect while recovery is paused"
                .to_owned(),
        );
    }
    done.archiving(conf, &asked);
    let missing = conf.missing.iter();
    done.notes.extend(
        missing.map(|text| {
            format!("{text}, which does not exist: PostgreSQL does not start without it")
        }),
    );
    match asked.standby {
        Some(standby) => done.notes.extend(standby.notes(conf)),
        None if asked.harmless => {}
        None => done.notes.extend(effects(conf, asked.subscriptions)),
    }
    Ok(done)
}

/// Whether a line in a file of the data directory becomes a comment.
fn is_silenced(name: &str, rules: [bool; 2]) -> bool {
    let rule = RULES.iter().zip(rules).any(|((rule, _), there)| *rule == name && there);
    rule || matches!(name, "data_directory" | "external_pid_file") || TARGETS.contains(&name)
}

/// The recovery target that files outside the data directory leave set. PostgreSQL applies targets in the order of
/// the files; those in files of the data directory become comments.
fn left_set(conf: &Configuration) -> Result<Option<&'static str>, Error> {
    let mut set: Option<(&'static str, &At)> = None;
    for (at, item) in &conf.items {
        let target = TARGETS.into_iter().find(|target| *target == item.name);
        let (Some(target), At::Outside(_)) = (target, at) else { continue };
        if let Some((other, there)) = set.filter(|(other, _)| *other != target) {
            let message = format!(
                "{target} in {at} is a second recovery target, after {other} in {there}: PostgreSQL does not start with \
                 two, and these files are not in the data directory"
            );
            return Err(Error::new(Failure::Local, message).hint(
                "remove the targets of an earlier recovery from these files; nothing was touched",
            ));
        }
        set = (!item.value.is_empty()).then_some((target, at));
    }
    Ok(set.map(|(target, _)| target))
}

impl Neutral {
    fn silence(&mut self, conf: &Configuration, asked: &Asked<'_>) {
        let mut lines: BTreeMap<&Path, Vec<usize>> = BTreeMap::new();
        for (at, item) in &conf.items {
            let At::Data(path) = at else { continue };
            if is_silenced(&item.name, asked.rules) {
                lines.entry(path).or_default().push(item.line);
                self.notes.push(format!("{} in {at} was made a comment", item.name));
            }
        }
        for (path, lines) in lines {
            let content = conf.files.get(path).map_or(&[][..], Vec::as_slice);
            self.rewritten.insert(path.to_owned(), silence(content, &lines));
        }
    }

    /// Overrides settings in files outside of the data directory.
    fn answer(&mut self, conf: &Configuration, asked: &Asked<'_>) -> Result<(), Error> {
        let outside = |name: &str| {
            let found = conf.items.iter().rfind(|(at, item)| {
                item.name == name && matches!(at, At::Outside(_)) && !item.value.is_empty()
            });
            found.map(|(at, _)| at)
        };
        if let Some(at) = outside("data_directory") {
            // PostgreSQL reads data_directory before it looks for postgresql.auto.conf, so it must be overridden in
            // postgresql.conf, where the last value counts.
            let main = Path::new("postgresql.conf");
            let content = conf.files.get(main).cloned().unwrap_or_default();
            let mut content = self.rewritten.remove(main).unwrap_or(content);
            let data = asked.data.to_str().ok_or_else(|| {
                let message = format!(
                    "data_directory is set in {at}, and {} is not UTF-8",
                    asked.data.display()
                );
                Error::new(Failure::Local, message).hint("restore to another directory")
            })?;
            content.extend(b"\n# klio restore: a file that is included says otherwise\n");
            content.extend(line("data_directory", data).into_bytes());
            self.rewritten.insert(main.to_owned(), content);
            self.notes.push(format!(
                "data_directory in {at} is overridden at the end of postgresql.conf, which names this directory"
            ));
        }
        if let Some(at) = outside("external_pid_file") {
            self.corrected.push(("external_pid_file", String::new()));
            self.notes.push(format!("external_pid_file in {at} is overridden: there will be none"));
        }
        for ((name, file), there) in RULES.into_iter().zip(asked.rules) {
            let Some(at) = outside(name).filter(|_| there) else { continue };
            let own = asked.data.join(file);
            self.corrected.push((name, own.display().to_string()));
            self.notes.push(format!("{name} in {at} is overridden: the copy has its own {file}"));
        }
        let ruled =
            conf.items.iter().any(|(_, item)| RULES.iter().any(|(name, _)| *name == item.name));
        if ruled && asked.rules.contains(&true) {
            self.notes.push(
                "the original's access rules are not in the backup: check the copy's pg_hba.conf before others may connect"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// Makes the copy write its log into its own directory only.
    fn log(&mut self, conf: &Configuration, asked: &Asked<'_>) {
        let directory = conf.value("log_directory");
        let own = |directory: &str| plain(&asked.data.join(directory)).starts_with(asked.data);
        if !conf.found || directory.is_some_and(|directory| !own(directory)) {
            self.corrected.push(("log_directory", "log".to_owned()));
        }
        if let Some(directory) = directory.filter(|directory| !own(directory)) {
            self.notes.push(format!(
                "log_directory was {directory:?}, where the original writes: the copy writes to its own directory log until \
                 ALTER SYSTEM RESET log_directory"
            ));
        }
        if conf.value("log_filename").is_some_and(|name| name.contains('/')) {
            self.corrected.push(("log_filename", "postgresql-%Y-%m-%d_%H%M%S.log".to_owned()));
        }
    }

    /// With `always`, PostgreSQL archives each file that it restores during recovery, and fills the last one up with zeros.
    fn archiving(&mut self, conf: &Configuration, asked: &Asked<'_>) {
        let always = |mode: &str| mode.eq_ignore_ascii_case("always");
        if asked.harmless || !conf.value("archive_mode").is_some_and(always) {
            return;
        }
        self.corrected.push(("archive_mode", "on".to_owned()));
        self.notes.push(
            "archive_mode was always: it is on until ALTER SYSTEM RESET archive_mode, because otherwise the copy would run \
             the original's archive_command for all WAL that it recovers"
                .to_owned(),
        );
    }

    /// Raises settings that are lower than on the primary, because recovery would otherwise end or pause.
    fn raise(&mut self, conf: &Configuration, asked: &Asked<'_>) {
        for (name, needed) in asked.needed {
            let default = DEFAULTS.iter().find(|(known, _)| known == name).map_or(0, |(_, d)| *d);
            let set = conf.value(name).map_or(default, |value| value.trim().parse().unwrap_or(0));
            if *needed > set {
                self.corrected.push((name, needed.to_string()));
                if conf.found {
                    self.notes.push(format!("{name} is {needed}, not {set}: recovery needs it"));
                }
            }
        }
    }
}

/// Notes about what a copy does, as the original does, once it is a primary.
fn effects(conf: &Configuration, subscriptions: bool) -> Vec<String> {
    let set = |name: &str| conf.value(name).filter(|value| !value.is_empty());
    let mut effects = Vec::new();
    let archives = conf.value("archive_mode").is_some_and(|mode| boolean(mode) != Some(false));
    for name in ["archive_command", "archive_library"] {
        if archives && set(name).is_some() {
            effects.push(format!(
                "archives with the original's {name}, beside or over the original's own files"
            ));
        }
    }
    if subscriptions {
        effects.push(
            "receives rows for its subscriptions from the publishers, in place of the original"
                .to_owned(),
        );
    }
    if let Some(names) = set("synchronous_standby_names") {
        effects.push(format!(
            "waits at its first COMMIT for synchronous_standby_names = {names:?} (for klio: until klio stream runs beside it)"
        ));
    }
    if let Some(libraries) = set("shared_preload_libraries") {
        effects.push(format!(
            "loads shared_preload_libraries = {libraries:?} and runs their jobs (pg_cron); it does not start if they are not installed"
        ));
    }
    if set("log_destination").is_some_and(|to| to.contains("syslog") || to.contains("eventlog")) {
        effects.push("logs to the system's log, as the original does".to_owned());
    }
    if set("ssl_passphrase_command").is_some() {
        effects.push("runs ssl_passphrase_command when it starts".to_owned());
    }
    let note =
        |effect| format!("once it is a primary the copy {effect}; --harmless turns that off");
    effects.into_iter().map(note).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::included::tests::Fake, *};

    fn asked(needed: &'static [(&'static str, u32)]) -> Asked<'static> {
        Asked {
            data: Path::new("/new"),
            action: Action::Promote,
            standby: None,
            harmless: false,
            subscriptions: false,
            needed,
            rules: [true, true],
        }
    }

    fn done(files: &[(&str, &str)]) -> Neutral {
        neutral(&Fake::new(files, &[]).read(), asked(&[])).unwrap()
    }

    #[test]
    fn what_would_lead_to_the_original_becomes_a_comment() {
        let done = done(&[
            (
                "/new/postgresql.conf",
                "a = 1\nData_Directory '/live'\ninclude 'x.conf'\nhba_file = '/etc/hba'\n",
            ),
            (
                "/new/x.conf",
                "recovery_target_time = 'x'\nrecovery_target_name = 'y'\nexternal_pid_file = '/run/p'",
            ),
        ]);
        let text = |name: &str| String::from_utf8(done.rewritten[Path::new(name)].clone()).unwrap();
        let main = "a = 1\n# klio restore: Data_Directory '/live'\ninclude 'x.conf'\n# klio restore: hba_file = '/etc/hba'\n";
        assert_eq!(text("postgresql.conf"), main);
        assert_eq!(text("x.conf").matches("# klio restore: ").count(), 3);
        assert_eq!((done.left_set, done.corrected), (None, vec![]));
        assert!(done.notes.iter().any(|note| note.contains("data_directory in postgresql.conf")));
    }

    #[test]
    fn what_stands_elsewhere_is_answered_or_refused() {
        let main = ("/new/postgresql.conf", "include '/etc/x.conf'\n");
        let outside = "data_directory = '/live'\nhba_file = '/h'\nexternal_pid_file = '/p'\nrecovery_target_xid = '5'";
        let done = done(&[main, ("/etc/x.conf", outside)]);
        let text = String::from_utf8(done.rewritten[Path::new("postgresql.conf")].clone()).unwrap();
        assert!(text.ends_with("data_directory = '/new'\n"), "{text}");
        assert_eq!(done.left_set, Some("recovery_target_xid"));
        let expected =
            [("external_pid_file", String::new()), ("hba_file", "/new/pg_hba.conf".to_owned())];
        assert_eq!(done.corrected, expected);
        let two = "recovery_target_xid = '5'\nrecovery_target_name = 'x'";
        let error =
            neutral(&Fake::new(&[main, ("/etc/x.conf", two)], &[]).read(), asked(&[])).unwrap_err();
        assert!(error.message.contains("/etc/x.conf") && error.message.contains("two"), "{error}");
        let emptied =
            "recovery_target_xid = '5'\nrecovery_target_xid = ''\nrecovery_target_name = 'x'";
        let one =
            neutral(&Fake::new(&[main, ("/etc/x.conf", emptied)], &[]).read(), asked(&[])).unwrap();
        assert_eq!(one.left_set, Some("recovery_target_name"));
    }

    #[test]
    fn a_link_to_the_live_configuration_is_replaced_where_it_must_be_changed_and_kept_where_not() {
        let link = [("postgresql.conf", "/etc/pg.conf")];
        let read = |text| neutral(&Fake::new(&[("/etc/pg.conf", text)], &link).read(), asked(&[]));
        assert_eq!(read("a = 1").unwrap().rewritten.len(), 0);
        let text = read("data_directory = '/live'").unwrap().rewritten;
        assert_eq!(text[Path::new("postgresql.conf")], b"# klio restore: data_directory = '/live'");
    }

    #[test]
    fn a_copy_archives_nothing_of_what_it_recovers() {
        for (text, expected) in [
            ("archive_mode = always", Some("on")),
            ("Archive_Mode='ALWAYS'", Some("on")),
            ("archive_mode = always\narchive_mode = on", None),
            ("archive_mode = on", None),
        ] {
            let done = done(&[("/new/postgresql.conf", text)]);
            let found = done.corrected.iter().find(|(name, _)| *name == "archive_mode");
            assert_eq!(found.map(|(_, value)| value.as_str()), expected, "{text}");
        }
        let auto = done(&[("/new/postgresql.auto.conf", "archive_mode = 'always'")]);
        assert!(auto.corrected.contains(&("archive_mode", "on".to_owned())));
        let harmless = Asked { harmless: true, ..asked(&[]) };
        let conf = Fake::new(&[("/new/postgresql.conf", "archive_mode = always")], &[]).read();
        assert_eq!(neutral(&conf, harmless).unwrap().corrected, []);
    }

    #[test]
    fn settings_that_recovery_needs_are_raised_never_lowered() {
        let needed =
            &[("max_connections", 300), ("max_wal_senders", 5), ("max_worker_processes", 9)];
        let conf = Fake::new(
            &[("/new/postgresql.conf", "max_connections = 200\nmax_worker_processes = 20")],
            &[],
        );
        let done = neutral(&conf.read(), asked(needed)).unwrap();
        assert_eq!(done.corrected, [("max_connections", "300".to_owned())]);
    }

    #[test]
    fn a_copy_logs_into_its_own_directory() {
        for (text, expected) in [
            ("log_directory = 'pg_log'", 0),
            ("log_directory = '/var/log'", 1),
            ("log_directory = '../log'", 1),
        ] {
            assert_eq!(done(&[("/new/postgresql.conf", text)]).corrected.len(), expected, "{text}");
        }
        // The configuration is outside of the data directory and its content is unknown.
        assert_eq!(done(&[]).corrected, [("log_directory", "log".to_owned())]);
    }

    #[test]
    fn what_the_copy_will_do_is_named_unless_it_is_harmless() {
        let text = "archive_mode = on\narchive_command = 'cp'\nsynchronous_standby_names = 'klio'\n\
                    shared_preload_libraries = 'pg_cron'\nlog_destination = 'syslog'";
        let notes = done(&[("/new/postgresql.conf", text)]).notes;
        for word in ["archive_command", "first COMMIT", "pg_cron", "system's log"] {
            assert!(notes.iter().any(|note| note.contains(word)), "{word}: {notes:?}");
        }
        let conf = Fake::new(&[("/new/postgresql.conf", text)], &[]).read();
        let asked = Asked { harmless: true, subscriptions: true, ..asked(&[]) };
        assert_eq!(neutral(&conf, asked).unwrap().notes, Vec::<String>::new());
    }
}
