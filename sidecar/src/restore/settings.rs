//! `postgresql.auto.conf` of a restored cluster: how it recovers, and which of its old settings must not act (P12).
//!
//! PostgreSQL reads settings in the order of its files, `postgresql.auto.conf` last; only the command line overrides
//! it. If a recovery target is set while another one is set, even to an empty value, PostgreSQL ends with FATAL
//! (`error_multiple_recovery_targets`). So all other targets are emptied first, beginning with the one that is set,
//! and the target of this restore comes last. Every setting that could end recovery elsewhere, run a command of the
//! original cluster or lead out of the directory is written, as an empty value unless the restore sets it.
//!
//! A standby has no target. Its primary is what the user typed, including a password if there is one (`shown` hides
//! it). No other secret is written: `restore_command` names files. Text in restore_command is read by three parsers:
//! PostgreSQL's configuration file (quotes doubled), PostgreSQL's `%` placeholders (`%` doubled), and the shell
//! (single quotes).

use super::{
    conf::{line, name_of},
    show_time,
    standby::{PRIMARY, Standby},
    target::Recovery,
};
use klio_pg::TimelineId;
use std::path::PathBuf;

/// What PostgreSQL does at the target (`recovery_target_action`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Waits for `pg_wal_replay_resume()`.
    Pause,
    /// Becomes a primary.
    Promote,
    /// Stops.
    Shutdown,
}

impl Action {
    /// As PostgreSQL spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Action::Pause => "pause",
            Action::Promote => "promote",
            Action::Shutdown => "shutdown",
        }
    }
}

/// How this program was called, so that restore_command can call `wal-fetch` the same way.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Invocation {
    pub program: PathBuf,
    /// `--config FILE`, `--cluster NAME`, `--from URL` and so on; paths are absolute.
    pub arguments: Vec<String>,
}

impl Invocation {
    /// The command for the shell; `%f` and `%p` are replaced by PostgreSQL. With `edited`, the copy's WAL differs
    /// from the original's, so `wal-tablespaces` runs after `wal-fetch`; the command fails if one of them fails.
    pub fn restore_command(&self, edited: bool) -> String {
        let word = |word: &str| shell(word).replace('%', "%%");
        let program = word(&self.program.display().to_string());
        let arguments: Vec<String> = self.arguments.iter().map(|argument| word(argument)).collect();
        let words = [&[program.clone(), "wal-fetch".to_owned()][..], &arguments].concat();
        let fetch = format!("{} %f \"%p\"", words.join(" "));
        match edited {
            true => format!("{fetch} && {program} wal-tablespaces %f \"%p\""),
            false => fetch,
        }
    }
}

/// Quotes a word for the shell if it needs quotes.
pub fn shell(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-=:@,+".contains(&b);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The settings of one recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The cluster's major version: PostgreSQL does not start with a setting that it does not know.
    pub major: u32,
    pub restore_command: String,
    /// Where recovery ends.
    pub recovery: Recovery,
    /// `recovery_target_inclusive`
    pub inclusive: bool,
    /// The timeline to recover along; `None` for that of the backup, if the server or bucket has no history file for it.
    pub timeline: Option<TimelineId>,
    /// What PostgreSQL does then; without effect if there is no target.
    pub action: Action,
    /// The copy becomes a standby, follows this primary, and has no target.
    pub standby: Option<Standby>,
    /// The recovery target that configuration files outside the data directory leave set; it is emptied first.
    pub left_set: Option<&'static str>,
    /// Settings that replace those of the cluster's own files, because the copy must not have them or needs higher values.
    pub corrected: Vec<(&'static str, String)>,
    /// The copy must not act on the outside world, not even after a promotion.
    pub harmless: bool,
    /// Nothing of the old `postgresql.auto.conf` is kept.
    pub alone: bool,
}

/// All settings that set a recovery target.
pub const TARGETS: [&str; 5] = [
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_xid",
];

/// Settings that are always removed from the old `postgresql.auto.conf`: those of an older recovery, and includes.
const NEVER_KEPT: [&str; 13] = [
    "restore_command",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "promote_trigger_file",
    "include",
    "include_if_exists",
    "include_dir",
];

/// Settings of every copy: it runs no command but restore_command, and does not delay recovery. It also follows no
/// primary, unless the user named one ([`Standby`]).
const EMPTY: [(&str, &str); 3] = [
    ("archive_cleanup_command", ""),
    ("recovery_end_command", ""),
    ("recovery_min_apply_delay", "0"),
];

/// Settings for `--harmless` and for drills: no archiving, no subscriptions, no background workers or code of
/// extensions except what was asked for, no waiting for standbys, no connections from other machines, and no log
/// messages elsewhere.
pub const HARMLESS: [(&str, &str); 13] = [
    ("archive_mode", "off"),
    ("archive_command", ""),
    ("archive_library", ""),
    ("max_logical_replication_workers", "0"),
    ("max_sync_workers_per_subscription", "0"),
    ("synchronous_standby_names", ""),
    ("shared_preload_libraries", ""),
    ("session_preload_libraries", ""),
    ("local_preload_libraries", ""),
    ("listen_addresses", ""),
    ("bonjour", "off"),
    ("log_destination", "stderr"),
    ("ssl", "off"),
];

impl Settings {
    /// Names and values of all settings, in the order in which they are written.
    pub fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = vec![("restore_command", self.restore_command.clone())];
        pairs.extend(EMPTY.map(|(name, value)| (name, value.to_owned())));
        pairs.extend(self.standby.clone().unwrap_or_default().pairs());
        if self.major < 16 {
            pairs.push(("promote_trigger_file", String::new()));
        }
        pairs.extend(self.corrected.iter().cloned());
        if self.harmless {
            let new = |(name, _): &(&str, &str)| pairs.iter().all(|(known, _)| known != name);
            let harmless = HARMLESS.into_iter().filter(new).collect::<Vec<_>>();
            pairs.extend(harmless.into_iter().map(|(name, value)| (name, value.to_owned())));
        }
        pairs.extend(self.target());
        pairs
    }

    fn target(&self) -> Vec<(&'static str, String)> {
        let ours = match &self.recovery {
            Recovery::End => None,
            Recovery::Immediate => Some(("recovery_target", "immediate".to_owned())),
            Recovery::Time(time) => Some(("recovery_target_time", show_time(*time))),
            Recovery::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
            Recovery::Name(name) => Some(("recovery_target_name", name.clone())),
            Recovery::Xid(xid) => Some(("recovery_target_xid", xid.to_string())),
        };
        let mut emptied: Vec<&str> = self.left_set.into_iter().chain(TARGETS).collect();
        let is_ours = |name: &str| ours.as_ref().is_some_and(|(ours, _)| *ours == name);
        emptied.retain(|name| !is_ours(name));
        let mut pairs: Vec<(&'static str, String)> = Vec::new();
        for name in emptied {
            if pairs.iter().all(|(known, _)| *known != name) {
                pairs.push((name, String::new()));
            }
        }
        if self.standby.is_some() {
            pairs.push(("recovery_target_timeline", "latest".to_owned()));
            return pairs;
        }
        let timeline = self.timeline.map_or("current".to_owned(), |t| t.get().to_string());
        pairs.push(("recovery_target_timeline", timeline));
        pairs.push(("recovery_target_inclusive", self.inclusive.to_string()));
        pairs.push(("recovery_target_action", self.action.name().to_owned()));
        pairs.extend(ours);
        pairs
    }

    /// [`Settings::pairs`] for people and logs, with the primary's password hidden.
    pub fn shown(&self) -> Vec<(&'static str, String)> {
        let primary = self.standby.as_ref().and_then(|standby| standby.primary.as_ref());
        let shown = |(name, value)| match primary {
            Some(primary) if name == PRIMARY => (name, primary.to_string()),
            _ => (name, value),
        };
        self.pairs().into_iter().map(shown).collect()
    }

    /// Name of the file that makes PostgreSQL recover.
    pub fn signal(&self) -> &'static str {
        if self.standby.is_some() { "standby.signal" } else { "recovery.signal" }
    }

    /// The new content of `postgresql.auto.conf`.
    pub fn auto_conf(&self, old: &[u8]) -> Vec<u8> {
        let pairs = self.pairs();
        let goes =
            |name: &str| NEVER_KEPT.contains(&name) || pairs.iter().any(|(ours, _)| *ours == name);
        let mut text = Vec::new();
        let old = if self.alone { &[][..] } else { old };
        for kept in old.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            if name_of(&String::from_utf8_lossy(kept)).is_none_or(|(name, _)| !goes(&name)) {
                text.extend_from_slice(kept);
                text.push(b'\n');
            }
        }
        if text.is_empty() {
            text = b"# Do not edit this file manually!\n\
                     # It will be overwritten by the ALTER SYSTEM command.\n"
                .to_vec();
        }
        pairs.iter().for_each(|(name, value)| text.extend(line(name, value).into_bytes()));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(recovery: Recovery) -> Settings {
        let program = "/opt/it's here/klio".into();
        let arguments = vec!["--config".into(), "/etc/100%/klio.toml".into()];
        Settings {
            major: 15,
            restore_command: Invocation { program, arguments }.restore_command(false),
            recovery,
            inclusive: true,
            timeline: TimelineId::new(2),
            action: Action::Pause,
            standby: None,
            left_set: None,
            corrected: Vec::new(),
            harmless: false,
            alone: false,
        }
    }

    fn text(settings: &Settings, old: &str) -> String {
        String::from_utf8(settings.auto_conf(old.as_bytes())).unwrap()
    }

    #[test]
    fn the_command_survives_configuration_percent_and_shell() {
        let text = text(&settings(Recovery::Immediate), "");
        let line = text.lines().find(|l| l.starts_with("restore_command")).unwrap();
        // Unquoted as PostgreSQL does it.
        let value = line.split_once(" = '").unwrap().1.strip_suffix('\'').unwrap();
        let command = value.replace("''", "'").replace(r"\\", r"\");
        assert_eq!(
            command,
            r#"'/opt/it'\''s here/klio' wal-fetch --config '/etc/100%%/klio.toml' %f "%p""#
        );
    }

    #[test]
    fn wal_that_is_changed_goes_through_both_programs() {
        let invocation = Invocation { program: "/opt/a b/klio".into(), arguments: Vec::new() };
        let expected =
            "'/opt/a b/klio' wal-fetch %f \"%p\" && '/opt/a b/klio' wal-tablespaces %f \"%p\"";
        assert_eq!(invocation.restore_command(true), expected);
    }

    #[test]
    fn stale_recovery_settings_go_and_others_stay() {
        let old = "# comment\nwork_mem = '8MB'\nRECOVERY_TARGET_TIME = 'x'\nrestore_command='y'\n\
                   include '/live'\nArchive_Cleanup_Command 'rm'\nlast = 'no line end'";
        let ours = settings(Recovery::Xid(7));
        let new = text(&ours, old);
        let kept = "# comment\nwork_mem = '8MB'\nlast = 'no line end'\nrestore_command = ";
        assert!(new.starts_with(kept), "{new}");
        assert!(!new.contains("RECOVERY_TARGET_TIME") && !new.contains("'y'"), "{new}");
        assert!(!new.contains("'rm'") && !new.contains("include '"), "{new}");
        assert!(new.ends_with("recovery_target_action = 'pause'\nrecovery_target_xid = '7'\n"));
        assert_eq!(text(&ours, &new), new);
        assert_eq!(ours.auto_conf(b"a = '\xff'\n")[..9], *b"a = '\xff'\nr");
    }

    #[test]
    fn every_other_target_is_emptied_before_ours_the_one_that_is_set_first() {
        let mut ours = settings(Recovery::Name("it's".into()));
        ours.left_set = Some("recovery_target_time");
        let names: Vec<&str> = ours.target().into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            names,
            [
                "recovery_target_time",
                "recovery_target",
                "recovery_target_lsn",
                "recovery_target_xid",
                "recovery_target_timeline",
                "recovery_target_inclusive",
                "recovery_target_action",
                "recovery_target_name",
            ]
        );
        assert!(text(&ours, "").ends_with("recovery_target_name = 'it''s'\n"));
    }

    #[test]
    fn commands_of_the_cluster_are_emptied_and_only_what_the_version_knows_is_written() {
        let mut ours = settings(Recovery::Immediate);
        for name in ["archive_cleanup_command", "recovery_end_command", "primary_conninfo"] {
            assert!(text(&ours, "").contains(&format!("{name} = ''\n")), "{name}");
        }
        assert!(text(&ours, "").contains("promote_trigger_file = ''"));
        ours.major = 16;
        assert!(!text(&ours, "promote_trigger_file = 'x'").contains("promote_trigger_file"));
    }

    #[test]
    fn a_standby_has_no_end_and_the_primary_that_was_typed() {
        let mut ours = settings(Recovery::End);
        let primary = crate::conninfo::Written::parse("host=db password='it s'").unwrap();
        ours.standby = Some(Standby { primary: Some(primary), slot: "s".parse().ok() });
        ours.left_set = Some("recovery_target_xid");
        let new = text(&ours, "primary_conninfo = 'host=old'\nhot_standby_feedback = 'on'");
        assert!(
            !new.contains("host=old") && new.contains("hot_standby_feedback = 'on'\n"),
            "{new}"
        );
        assert!(new.contains("primary_conninfo = 'host=db password=''it s'''\n"), "{new}");
        assert!(new.contains("primary_slot_name = 's'\n"), "{new}");
        assert!(new.contains("archive_cleanup_command = ''\n"), "{new}");
        for target in TARGETS {
            assert!(new.contains(&format!("{target} = ''\n")), "{target}: {new}");
        }
        assert!(new.ends_with("recovery_target_timeline = 'latest'\n"), "{new}");
        assert!(!new.contains("recovery_target_action"), "{new}");
        assert!(!format!("{:?}", ours.shown()).contains("it s"));
        assert_eq!(ours.signal(), "standby.signal");
    }

    #[test]
    fn harmless_beats_what_is_there() {
        let mut ours = settings(Recovery::Immediate);
        ours.harmless = true;
        let new =
            text(&ours, "archive_command = 'cp %p /live/%f'\nshared_preload_libraries = 'cron'");
        assert!(!new.contains("/live") && !new.contains("cron"), "{new}");
        assert!(new.contains("archive_mode = 'off'\n"), "{new}");
        ours.alone = true;
        assert!(!text(&ours, "statement_timeout = '1ms'").contains("statement_timeout"));
    }
}
