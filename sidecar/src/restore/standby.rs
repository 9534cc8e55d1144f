//! A restore that goes on as a standby: `standby.signal`, no target, the newest timeline, and the primary to follow.
//!
//! A standby has no target: all `recovery_target*` settings are emptied. Settings with which a copy could act on the
//! outside world are emptied as in every restore, except the primary: the user named it, or there is none, because the
//! primary in the cluster's own files is the original's. `restore_command` is the same as in every restore: if
//! `standby.signal` exists, `klio wal-fetch` answers soon, and never makes the standby end (P7).

use super::included::Configuration;
use crate::{
    conninfo::Written,
    error::{Error, Failure},
    replication::SlotName,
};
use klio_pg::Edit;

/// The options for a standby.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standby {
    /// `primary_conninfo`; with `None` the standby reads WAL only through restore_command.
    pub primary: Option<Written>,
    /// `primary_slot_name`
    pub slot: Option<SlotName>,
}

/// The only setting that may contain a secret.
pub const PRIMARY: &str = "primary_conninfo";

impl Standby {
    /// The settings that a standby has in addition to those of every restore.
    pub fn pairs(&self) -> [(&'static str, String); 2] {
        let primary = self.primary.as_ref().map_or_else(String::new, |p| p.reveal().to_owned());
        let slot = self.slot.as_ref().map_or_else(String::new, ToString::to_string);
        [(PRIMARY, primary), ("primary_slot_name", slot)]
    }

    /// The "recovery target" of a standby as text for the user.
    pub fn describe(&self) -> String {
        let slot = self.slot.as_ref().map_or_else(String::new, |slot| format!(", slot {slot}"));
        match &self.primary {
            Some(primary) => format!("none: a standby of {primary}{slot}"),
            None => "none: a standby that follows the archive alone".to_owned(),
        }
    }

    /// Notes for the user.
    pub fn notes(&self, conf: &Configuration) -> Vec<String> {
        let set = |name: &str| conf.value(name).filter(|value| !value.is_empty());
        let mut notes = Vec::new();
        match &self.primary {
            None => notes.push(
                "without --primary-conninfo the standby follows the WAL that klio has received, and asks for more every \
                 wal_retrieve_retry_interval"
                    .to_owned(),
            ),
            Some(primary) => notes.extend(self.about(primary, set("port"))),
        }
        if self.primary.is_none() && set(PRIMARY).is_some() {
            notes.push(
                "primary_conninfo of the cluster's own files is emptied: it names the original's primary".to_owned(),
            );
        }
        notes
    }

    fn about(&self, primary: &Written, own_port: Option<&str>) -> Vec<String> {
        let mut notes = Vec::new();
        if primary.has_secret() {
            notes.push(
                "primary_conninfo holds a password, which PostgreSQL needs in clear text in postgresql.auto.conf; better \
                 use passfile=... with a file that holds it"
                    .to_owned(),
            );
        }
        let port = primary.value("port").unwrap_or("5432");
        if is_here(primary.value("hostaddr").or(primary.value("host")))
            && port == own_port.unwrap_or("5432")
        {
            notes.push(format!(
                "primary_conninfo names this machine and port {port}, which the restored postgresql.conf sets for \
                 the standby itself: give the standby another port, or name the primary's machine"
            ));
        }
        notes
    }
}

/// Whether a host is this machine, judged by its name alone. Without a host, libpq uses the local socket.
fn is_here(host: Option<&str>) -> bool {
    let Some(host) = host else { return true };
    let local = |ip: std::net::IpAddr| ip.is_loopback();
    host == "localhost" || host.starts_with(['/', '@']) || host.parse().is_ok_and(local)
}

/// Refuses a plan that needs changes to the copy's WAL. A standby replays `CREATE TABLESPACE` again after a restart,
/// and also receives it from its primary, whose WAL cannot be changed.
///
/// # Errors
/// The plan needs such changes.
pub fn refuse_edits(edits: &[Edit]) -> Result<(), Error> {
    if edits.is_empty() {
        return Ok(());
    }
    let message = "a tablespace that was made after the backup cannot go elsewhere on a standby: it may replay CREATE \
                   TABLESPACE from its primary, too, and then at the original's location";
    Err(Error::new(Failure::Local, message).hint(
        "take a base backup now and restore that with --tablespace-map, or leave out the map of that tablespace; nothing \
         was touched",
    ))
}

#[cfg(test)]
mod tests {
    use super::{super::included::tests::Fake, *};

    fn standby(primary: &str) -> Standby {
        Standby { primary: Some(Written::parse(primary).unwrap()), slot: "s_1".parse().ok() }
    }
    fn notes(standby: &Standby, conf: &str) -> String {
        standby.notes(&Fake::new(&[("/new/postgresql.conf", conf)], &[]).read()).join("\n")
    }

    #[test]
    fn a_password_is_written_for_postgresql_and_shown_to_nobody() {
        let standby = standby("host=db password=s3cret");
        assert_eq!(standby.pairs()[0].1, "host=db password=s3cret");
        let shown = [standby.describe(), notes(&standby, ""), format!("{standby:?}")].concat();
        assert!(shown.contains("slot s_1") && shown.contains("password=***"), "{shown}");
        assert!(!shown.contains("s3cret"), "{shown}");
    }

    #[test]
    fn a_standby_that_would_follow_itself_is_told() {
        for (primary, conf, told) in [
            ("host=localhost user=r", "", true),
            ("user=r port=5433", "port = 5433", true),
            ("host=/run/postgresql", "port = 5432", true),
            ("host=127.0.0.1 port=5433", "", false),
            ("host=db", "", false),
            ("host=db hostaddr=::1", "", true),
        ] {
            let notes = notes(&standby(primary), conf);
            assert_eq!(notes.contains("the standby itself"), told, "{primary} {conf}: {notes}");
        }
    }

    #[test]
    fn whose_primary_the_files_name_is_said_when_none_was_typed() {
        let alone = Standby::default();
        let said = notes(&alone, "primary_conninfo = 'host=other'");
        assert!(said.contains("is emptied"), "{said}");
        assert_eq!(alone.pairs()[0].1, "");
        assert!(notes(&alone, "").contains("follows the WAL that klio has received"));
    }
}
