//! The part of `klio check` that looks at the server.

use super::{
    check::{Mark, Report},
    check_postgres::clock,
    connect, text,
};
use crate::{
    config::Config,
    error::Error,
    server_link::{Connection, Expiry},
    streamer::Identity,
};
use klio_proto::v1::{CheckRequest, CheckResponse, PositionRequest};

/// A certificate that expires sooner than this gets a warning.
const EXPIRY_WARN_SECONDS: f64 = 14.0 * 86400.0;
/// Less free space on tier 1 than this share gets a warning.
const FREE_WARN_SHARE: f64 = 0.1;

/// Checks the server, its certificates, and everything that it reports.
pub(super) async fn run(
    config: &Config,
    postgres: Option<Identity>,
    report: &mut Report,
) -> Result<(), Error> {
    let connection = match connect(config).await {
        Ok(connection) => connection,
        Err(error) => {
            report.fail("server", &error);
            return Ok(());
        }
    };
    report.add(Mark::Ok, "server", format!("reached at {}", config.server.address), "");
    certificates(connection.expiry, report);
    let cluster = config.cluster()?.to_string();
    match connection.catalog().check(CheckRequest { cluster: cluster.clone() }).await {
        Ok(answer) => answered(&cluster, &answer.into_inner(), report),
        Err(status) => {
            report.fail("cluster", &Error::from_status("ask the server", &status));
            return Ok(());
        }
    }
    if let Some(identity) = postgres {
        system(&connection, cluster, identity, report).await;
    }
    Ok(())
}

/// Checks that the PostgreSQL that is pinned under the cluster's name is this one.
async fn system(connection: &Connection, cluster: String, pg: Identity, report: &mut Report) {
    let request = PositionRequest {
        cluster,
        system_identifier: pg.system_identifier,
        segment_size: pg.segment_size.as_u32(),
        postgres_version: pg.version,
        // The check is whether this PostgreSQL is the one that the name stands for, so no other generation may answer.
        knows_generations: false,
        with_tier2: false,
        empty_in_tier2: false,
    };
    match connection.wal().position(request).await {
        Ok(answer) => {
            let newest = answer.into_inner().timelines.into_iter().max_by_key(|t| t.timeline);
            let text = newest.map_or_else(
                || "nothing received yet".to_owned(),
                |t| format!("timeline {} up to {}", t.timeline, text::lsn(t.flushed_lsn)),
            );
            report.add(Mark::Ok, "position", text, "");
        }
        Err(status) => {
            report.fail("position", &Error::from_status("ask for the position", &status))
        }
    }
}

fn certificates(expiry: Option<Expiry>, report: &mut Report) {
    let Some(expiry) = expiry else {
        let hint = "server.unsafe_plaintext is for tests only";
        return report.add(
            Mark::Warn,
            "tls",
            "none: anybody on the network between can read WAL",
            hint,
        );
    };
    let each = [("client certificate", expiry.client), ("server certificate", expiry.server)];
    for (name, end) in each {
        let Some(end) = end else { continue };
        let left = end as f64 - text::now();
        let mark = match left {
            ..=0.0 => Mark::Fail,
            ..=EXPIRY_WARN_SECONDS => Mark::Warn,
            _ => Mark::Ok,
        };
        let text = format!("until {}", text::time(end as f64));
        report.add(mark, name, text, "renew it; running programs read the new file by themselves");
    }
}

fn answered(cluster: &str, answer: &CheckResponse, report: &mut Report) {
    let text = format!("{cluster} allowed for {:?}", answer.identity);
    report.add(Mark::Ok, "cluster", text, "");
    let ours = env!("CARGO_PKG_VERSION");
    let mark = if answer.server_version == ours { Mark::Ok } else { Mark::Warn };
    let text = format!("server {}, client {ours}", answer.server_version);
    report.add(mark, "versions", text, "run the same version on both ends");
    clock("server clock", answer.server_time, report);
    let (free, total) = (answer.tier1_free_bytes, answer.tier1_total_bytes);
    let mark = match () {
        () if free == 0 => Mark::Fail,
        () if (free as f64) < total as f64 * FREE_WARN_SHARE => Mark::Warn,
        () => Mark::Ok,
    };
    let text = format!("{} free of {}", text::size(free), text::size(total));
    report.add(mark, "tier 1", text, "free space, or give the server a larger disk");
    let mark = if answer.queue_ready { Mark::Ok } else { Mark::Warn };
    let state = if answer.queue_ready { "ready" } else { "not ready" };
    report.add(mark, "queue", state, "WAL is still received and stored; look at the server's log");
    let mark = if answer.tier2_configured { Mark::Ok } else { Mark::Warn };
    let state = if answer.tier2_configured { "configured" } else { "not configured" };
    report.add(mark, "tier 2", state, "set [tier2] in the server's configuration to archive WAL");
    if !answer.ready && answer.problems.is_empty() {
        report.add(Mark::Fail, "server state", "not ready", "look at the server's log");
    }
    for problem in &answer.problems {
        report.add(Mark::Fail, "server state", problem.clone(), "look at the server's log");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_an_expired_certificate_fail() {
        let mut report = Report::default();
        certificates(Some(Expiry { client: Some(1), server: None }), &mut report);
        let answer =
            CheckResponse { ready: true, server_time: text::now(), ..CheckResponse::default() };
        answered("pg-1", &answer, &mut report);
        let failed: Vec<_> =
            report.0.iter().filter(|i| i.mark == Mark::Fail).map(|i| i.name).collect();
        assert_eq!(failed, ["client certificate", "tier 1"]);
    }
}
