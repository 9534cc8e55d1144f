//! The part of `klio check` that looks at PostgreSQL. Changes nothing: the slot is only read, never created.

use super::{
    check::{Mark, Report},
    conninfo, slot, text,
};
use crate::{
    config::Config, conninfo::ConnInfo, error::Error, replication::Client, streamer::Identity,
};

/// A larger difference of clocks makes times in status and logs misleading.
pub(super) const SKEW_WARN_SECONDS: f64 = 5.0;
/// With a larger difference one of the clocks must be wrong, and retention, schedules and target times depend on them.
const SKEW_FAIL_SECONDS: f64 = 3600.0;

/// Checks everything that can be reached, and returns PostgreSQL's identity for the check of the server.
pub(super) async fn run(config: &Config, report: &mut Report) -> Result<Option<Identity>, Error> {
    let info = conninfo(config)?;
    let identity = match replication(&info, report).await {
        Ok(identity) => Some(identity),
        Err(error) => {
            report.fail("postgres", &error);
            None
        }
    };
    match Client::connect_sql(&info).await {
        Ok(mut client) => {
            if let Err(error) = sql(&mut client, config, identity.is_none(), report).await {
                report.fail("postgres sql", &error);
            }
            client.close().await;
        }
        // This is the same failure as above and was reported there.
        Err(_) if identity.is_none() => {}
        Err(error) => report.add(
            Mark::Warn,
            "postgres sql",
            format!("slots and walsenders are not checked: {error}"),
            "let the role connect to a database (dbname in postgres.dsn, pg_hba.conf)",
        ),
    }
    Ok(identity)
}

async fn replication(info: &ConnInfo, report: &mut Report) -> Result<Identity, Error> {
    let mut client = Client::connect(info).await?;
    let version = client.server_version().await?;
    let segment_size = client.segment_size().await?;
    let system = client.identify_system().await?;
    let wal_level = client.show("wal_level").await?;
    let standby = client.in_hot_standby();
    let kind = if standby { "standby" } else { "primary" };
    report.add(
        Mark::Ok,
        "postgres",
        format!("{kind} at {}, replication connection accepted", client.host()),
        "",
    );
    let good = version.major() >= 15;
    report.add(
        if good { Mark::Ok } else { Mark::Fail },
        "version",
        version.to_string(),
        "Klio needs PostgreSQL 15 or newer",
    );
    level(&wal_level, report);
    report.add(Mark::Ok, "wal segment size", text::size(segment_size.bytes()), "");
    report.add(
        Mark::Ok,
        "system",
        format!(
            "identifier {}, timeline {}, WAL up to {}",
            system.system_identifier,
            system.timeline.get(),
            system.flush_lsn
        ),
        "",
    );
    client.close().await;
    Ok(Identity {
        system_identifier: system.system_identifier,
        version: version.number(),
        segment_size,
        timeline: system.timeline,
        end: system.flush_lsn,
        in_recovery: standby,
    })
}

fn level(wal_level: &str, report: &mut Report) {
    let good = matches!(wal_level, "replica" | "logical");
    report.add(
        if good { Mark::Ok } else { Mark::Fail },
        "wal_level",
        wal_level,
        "set wal_level = replica in postgresql.conf and restart PostgreSQL",
    );
}

/// One row: used and allowed counts, synchronous_standby_names, the clock, connected names, wal_level, and the segment size.
const LIMITS: &str = "SELECT \
    (SELECT count(*) FROM pg_stat_replication), current_setting('max_wal_senders'), \
    (SELECT count(*) FROM pg_replication_slots), current_setting('max_replication_slots'), \
    current_setting('synchronous_standby_names'), extract(epoch FROM clock_timestamp())::float8, \
    (SELECT string_agg(application_name, ', ') FROM pg_stat_replication), \
    current_setting('wal_level'), \
    (SELECT setting FROM pg_settings WHERE name = 'wal_segment_size')";

/// With `alone`, there was no replication connection from which wal_level is known.
async fn sql(
    client: &mut Client,
    config: &Config,
    alone: bool,
    report: &mut Report,
) -> Result<(), Error> {
    let slot = slot::name(config)?;
    let found = slot::read(client, &slot).await?;
    let rows = client.query(LIMITS).await?;
    let Some(row) = rows.first() else { return Ok(()) };
    if alone && let Some(found) = row.text(7) {
        level(found, report);
    }
    let number = |column| row.text(column).and_then(|t| t.parse::<u64>().ok()).unwrap_or(0);
    let streaming = found.as_ref().is_some_and(|slot| slot.active);
    // Klio's own connection is among those in use if it streams; otherwise one more has to be free.
    let needed = |used: u64, ours: bool| if ours { used } else { used + 1 };
    let (used, limit) = (number(0), number(1));
    report.add(
        if needed(used, streaming) <= limit { Mark::Ok } else { Mark::Fail },
        "max_wal_senders",
        format!("{used} of {limit} in use"),
        "raise max_wal_senders and restart PostgreSQL",
    );
    let (used, limit) = (number(2), number(3));
    report.add(
        if needed(used, found.is_some()) <= limit { Mark::Ok } else { Mark::Fail },
        "max_replication_slots",
        format!("{used} of {limit} in use"),
        "drop a slot that nobody needs, or raise max_replication_slots and restart PostgreSQL",
    );
    let segment = number(8).max(1);
    slot_item(&slot.to_string(), found, config.postgres.create_slot, segment, report);
    let names = row.text(4).unwrap_or_default();
    let connected = row.text(6).unwrap_or("none");
    let sync = match names {
        "" => "empty: commits do not wait for Klio".to_owned(),
        names => format!("{names:?}; connected: {connected}"),
    };
    report.add(Mark::Ok, "synchronous standby", sync, "");
    if let Some(theirs) = row.text(5).and_then(|t| t.parse::<f64>().ok()) {
        clock("postgres clock", theirs, report);
    }
    Ok(())
}

/// Reports the slot. `segment` is the segment size: even an idle PostgreSQL writes up to that much while klio stream
/// is restarted, so less than that gets only a warning.
fn slot_item(
    name: &str,
    found: Option<slot::SlotRow>,
    create: bool,
    segment: u64,
    report: &mut Report,
) {
    let Some(row) = found else {
        let mark = if create { Mark::Ok } else { Mark::Fail };
        let text = format!("{name} does not exist yet; klio stream creates it");
        return report.add(mark, "slot", text, "postgres.create_slot is false: create it by hand");
    };
    let kept = row.retained_bytes.map_or_else(|| "nothing".into(), text::size);
    let unreceived = row.retained_bytes.filter(|_| !row.active).unwrap_or(0);
    let state = match (row.active, unreceived) {
        (true, _) => format!("streaming, keeps {kept}"),
        (false, 0) => "idle, keeps nothing".to_owned(),
        (false, _) => format!("nobody receives it, keeps {kept} that klio-server may not have"),
    };
    let (mark, hint) = match row.wal_status.as_str() {
        "lost" => {
            (Mark::Fail, "WAL was lost; klio stream records the gap and creates the slot again")
        }
        "unreserved" => (Mark::Warn, "WAL is about to be lost: max_slot_wal_keep_size is exceeded"),
        "extended" if !row.active => {
            (Mark::Fail, "nobody reads the slot: start klio stream, or run klio slot drop")
        }
        _ if unreceived >= segment => (
            Mark::Fail,
            "start klio stream or look at its log; if it will not come back, run klio slot drop",
        ),
        _ if unreceived > 0 => (Mark::Warn, "start klio stream"),
        _ => (Mark::Ok, ""),
    };
    let status = if row.wal_status.is_empty() { "no WAL reserved" } else { &row.wal_status };
    report.add(mark, "slot", format!("{name}: {state}, {status}"), hint);
}

/// Compares a clock with this machine's.
pub(super) fn clock(name: &'static str, theirs: f64, report: &mut Report) {
    let skew = theirs - text::now();
    let side = if skew < 0.0 { "behind" } else { "ahead of" };
    let text = format!("{} {side} this machine's", text::duration(skew.abs()));
    if skew.abs() < SKEW_FAIL_SECONDS {
        let mark = if skew.abs() > SKEW_WARN_SECONDS { Mark::Warn } else { Mark::Ok };
        return report.add(mark, name, text, "synchronise the clocks (NTP)");
    }
    // Klio cannot know which of the two is right, so it shows both.
    let text = format!("{} there, {} here: {text}", text::time(theirs), text::time(text::now()));
    let hint = "one of the two is wrong: set it, and synchronise the clocks (NTP); retention, schedules and --target-time depend on them";
    report.add(Mark::Fail, name, text, hint);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_slot_fails_and_an_absent_one_only_when_we_may_not_create_it() {
        let row = |status: &str| slot::SlotRow {
            active: false,
            wal_status: status.into(),
            restart_lsn: None,
            retained_bytes: None,
        };
        let idle = |retained| slot::SlotRow { retained_bytes: Some(retained), ..row("reserved") };
        let item = |found, create| {
            let mut report = Report::default();
            slot_item("klio", found, create, 1 << 20, &mut report);
            report.0[0].clone()
        };
        let mark = |found, create| item(found, create).mark;
        assert_eq!(mark(Some(row("lost")), true), Mark::Fail);
        assert_eq!(mark(Some(row("reserved")), true), Mark::Ok);
        assert_eq!(mark(None, true), Mark::Ok);
        assert_eq!(mark(None, false), Mark::Fail);
        assert_eq!(mark(Some(idle(0)), true), Mark::Ok);
        assert_eq!(mark(Some(idle(4096)), true), Mark::Warn);
        let dead = item(Some(idle(22 << 20)), true);
        assert_eq!(dead.mark, Mark::Fail);
        assert!(dead.text.contains("nobody receives it, keeps 22"), "{dead:?}");
        let live = slot::SlotRow { active: true, ..idle(22 << 20) };
        assert_eq!(mark(Some(live), true), Mark::Ok);
    }

    #[test]
    fn clocks_that_differ_are_a_warning_and_a_wrong_one_fails_with_both_times() {
        let mut report = Report::default();
        for skew in [60.0, 0.0, -400.0 * 86400.0] {
            clock("x", text::now() + skew, &mut report);
        }
        let marks: Vec<_> = report.0.iter().map(|item| item.mark).collect();
        assert_eq!(marks, [Mark::Warn, Mark::Ok, Mark::Fail]);
        let both = report.0[2].text.split(" there, ").collect::<Vec<_>>();
        assert!(both.len() == 2 && both[0] != both[1], "{both:?}");
    }
}
