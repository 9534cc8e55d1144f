//! The order of commits, read from PostgreSQL's own WAL with its own `pg_waldump`: independent of everything Klio does.
//!
//! Times are kept as the text `pg_waldump` prints in UTC (`2026-11-21 05:27:12.123456`), whose order is the order of time.

use crate::{
    postgres::{Postgres, install},
    programs,
    scratch::Scratch,
};
use klio_pg::Lsn;
use std::{fs, io::Read, path::Path};

/// A record that matters to where a recovery ends or to what it shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Where it begins.
    pub start: Lsn,
    /// What it is.
    pub kind: Kind,
}

/// What a record is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A transaction ends here; of a prepared one the id it was prepared with.
    End {
        /// Its id.
        xid: u32,
        /// Committed, not rolled back.
        committed: bool,
        /// When, by PostgreSQL's clock.
        time: String,
    },
    /// What a transaction of the workload calls itself: a crash takes ids back whose WAL was not flushed and gives them to others.
    Mark {
        /// Its id.
        xid: u32,
        /// Its mark, which nothing else ever had.
        mark: i64,
    },
    /// A transaction is prepared.
    Prepare {
        /// Its id.
        xid: u32,
        /// Its global id.
        gid: String,
    },
    /// `pg_create_restore_point`.
    RestorePoint(String),
    /// A tablespace is made (with the last part of its location) or removed by this transaction.
    Tablespace {
        /// The transaction.
        xid: u32,
        /// OID.
        oid: u32,
        /// `None`: removed.
        name: Option<String>,
    },
    /// A database is made or removed by this transaction.
    Database {
        /// The transaction.
        xid: u32,
        /// OID.
        oid: u32,
        /// Made, not removed.
        made: bool,
    },
}

/// All such records of one timeline from `start` to the end of WAL, in order. PostgreSQL 15, running or not.
///
/// # Panics
/// When the first of them cannot be read.
pub async fn records(pg: &Postgres, timeline: u32, start: Lsn) -> Vec<Record> {
    let readable = links(&pg.pg_wal());
    let mut command = install::command(&install::client("pg_waldump"));
    command
        .args(
            ["Transaction", "XLOG", "Tablespace", "Database", "LogicalMessage"]
                .map(|name| format!("--rmgr={name}")),
        )
        .args(["--timeline", &timeline.to_string()])
        .args(["--start", &start.to_string(), "--path"])
        .arg(readable.path());
    let outcome = programs::run(command).await;
    // Status 1 is the end of valid WAL, the usual end; where that is the end of a segment, the next one has no header yet.
    let ends = ["error in WAL record", "could not find file"];
    assert!(
        outcome.code == Some(0)
            || (outcome.stdout.contains("lsn:") && ends.iter().any(|e| outcome.stderr.contains(e))),
        "pg_waldump from {start}: {}",
        outcome.stderr
    );
    outcome.stdout.lines().filter_map(parse).collect()
}

/// Links to the segments that have a header: `pg_waldump` takes the segment size from any file it finds, and one that PostgreSQL
/// has only allocated so far is all zeros.
fn links(pg_wal: &Path) -> Scratch {
    let dir = Scratch::new("wal");
    for entry in fs::read_dir(pg_wal).expect("read pg_wal").flatten() {
        let mut magic = [0; 2];
        let read = fs::File::open(entry.path()).and_then(|mut file| file.read_exact(&mut magic));
        if entry.file_name().len() == 24 && read.is_ok() && magic != [0; 2] {
            std::os::unix::fs::symlink(entry.path(), dir.join(entry.file_name()))
                .expect("link a segment");
        }
    }
    dir
}

fn parse(line: &str) -> Option<Record> {
    let field = |name: &str| line.split_once(name)?.1.trim_start().split([',', ' ']).next();
    let start: Lsn = field("lsn: ")?.parse().ok()?;
    let description = line.split_once("desc: ")?.1;
    let (verb, rest) = description.split_once(' ')?;
    let own: u32 = field("tx:")?.parse().ok()?;
    let kind = match field("rmgr: ")? {
        "Transaction" => transaction(own, verb, rest)?,
        "XLOG" if verb == "RESTORE_POINT" => Kind::RestorePoint(rest.trim().to_owned()),
        // `transactional, prefix "17"; payload (0 bytes): `
        "LogicalMessage" => Kind::Mark { xid: own, mark: rest.split('"').nth(1)?.parse().ok()? },
        "Tablespace" => {
            let oid = rest.split(' ').next()?.parse().ok()?;
            let name = rest.trim_end_matches('"').rsplit_once('/').map(|(_, name)| name.to_owned());
            Kind::Tablespace { xid: own, oid, name }
        }
        "Database" => {
            // "copy dir 1663/4 to 1663/100001", "create dir 1663/100002", "dir 1663/100001"
            let oid = rest.rsplit_once('/')?.1.trim().parse().ok()?;
            Kind::Database { xid: own, oid, made: verb.starts_with("CREATE") }
        }
        _ => return None,
    };
    Some(Record { start, kind })
}

fn transaction(own: u32, verb: &str, rest: &str) -> Option<Kind> {
    match verb {
        "COMMIT" | "ABORT" => end(own, verb == "COMMIT", rest),
        "COMMIT_PREPARED" | "ABORT_PREPARED" => {
            let (xid, rest) = rest.split_once(": ")?;
            end(xid.parse().ok()?, verb == "COMMIT_PREPARED", rest)
        }
        "PREPARE" => {
            let gid = rest.strip_prefix("gid ")?.split(':').next()?;
            Some(Kind::Prepare { xid: own, gid: gid.to_owned() })
        }
        _ => None,
    }
}

/// `2026-11-21 05:27:12.123456 UTC; subxacts: ...`
fn end(xid: u32, committed: bool, rest: &str) -> Option<Kind> {
    let time = rest.get(..26)?;
    assert!(rest[26..].starts_with(" UTC"), "pg_waldump prints times in UTC, found {rest}");
    Some(Kind::End { xid, committed, time: time.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pg_waldump_prints_is_understood() {
        let record = |rmgr: &str, tx: &str, desc: &str| {
            format!(
                "rmgr: {rmgr} len (rec/tot):     46/    46, tx: {tx}, lsn: 0/01545AC8, prev 0/01545A80, desc: {desc}"
            )
        };
        let line = |tx: &str, desc: &str| record("Transaction", tx, desc);
        let time = "2026-11-21 05:27:12.123456";
        let end = |xid, committed| {
            Some(Record {
                start: Lsn::new(0x0154_5AC8),
                kind: Kind::End { xid, committed, time: time.into() },
            })
        };
        assert_eq!(parse(&line("       740", &format!("COMMIT {time} UTC"))), end(740, true));
        let more = format!("ABORT {time} UTC; subxacts: 741");
        assert_eq!(parse(&line("       740", &more)), end(740, false));
        let prepared = format!("COMMIT_PREPARED 7: {time} UTC");
        assert_eq!(parse(&line("         0", &prepared)), end(7, true));
        let prepare = parse(&line("         9", &format!("PREPARE gid p_1: {time} UTC"))).unwrap();
        assert_eq!(prepare.kind, Kind::Prepare { xid: 9, gid: "p_1".into() });
        let marked = "MESSAGE transactional, prefix \"100000017\"; payload (0 bytes): ";
        let mark = parse(&record("LogicalMessage", "        12", marked)).unwrap();
        assert_eq!(mark.kind, Kind::Mark { xid: 12, mark: 100_000_017 });
        let kind = |rmgr, desc| parse(&record(rmgr, "        12", desc)).unwrap().kind;
        assert_eq!(kind("XLOG", "RESTORE_POINT here"), Kind::RestorePoint("here".into()));
        let space = |name: Option<&str>| Kind::Tablespace {
            xid: 12,
            oid: 16391,
            name: name.map(str::to_owned),
        };
        assert_eq!(kind("Tablespace", "CREATE 16391 \"/tmp/x/tz0\""), space(Some("tz0")));
        assert_eq!(kind("Tablespace", "DROP 16391"), space(None));
        let database = |made| Kind::Database { xid: 12, oid: 100_001, made };
        let copied = "CREATE_FILE_COPY copy dir 1663/4 to 1663/100001";
        assert_eq!(kind("Database", copied), database(true));
        assert_eq!(kind("Database", "DROP dir 1663/100001"), database(false));
        assert_eq!(parse(&record("XLOG", "         0", "CHECKPOINT_ONLINE redo 0/1")), None);
    }
}
