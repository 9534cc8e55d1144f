//! One run: draining a copy of the slot, with `pg_receivewal` or with Klio.
//!
//! The clock runs from the start of the receiving program until everything is durable: for `pg_receivewal` until it has
//! ended (it syncs each file when it is complete), for Klio until PostgreSQL's slot has been told so (P1).
//! CPU time of Klio's server counts until all segments are sealed (and archived, with tier 2): the whole work.

use crate::{
    meter::{self, Meter},
    workload::{Workload, megabytes},
};
use klio_tests::{postgres::Session, process::Running, s3::S3, scratch::Scratch, site::Site};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Between two looks at a run.
const SAMPLE: Duration = Duration::from_millis(10);
/// Between two looks at the metrics page, which cost the server something.
const LAG_SAMPLE: Duration = Duration::from_millis(50);
/// No run takes this long.
const DEADLINE: Duration = Duration::from_secs(300);

/// What a run gave.
#[derive(Debug)]
pub struct Run {
    /// Until everything was durable.
    pub seconds: f64,
    /// CPU seconds by role.
    pub cpu: BTreeMap<&'static str, f64>,
    /// Peak resident bytes by role.
    pub peaks: BTreeMap<&'static str, u64>,
    /// While draining.
    pub lags: Vec<Lag>,
    /// From the start until all was sealed, and archived with tier 2.
    pub settled_seconds: f64,
}

/// How far behind tier 1 the later stages were at one moment, in segments.
#[derive(Debug, Clone, Copy)]
pub struct Lag {
    /// Flushed and not yet in a sealed file.
    pub unsealed: f64,
    /// Flushed and not yet proven in tier 2.
    pub unarchived: f64,
}

/// Drains with `pg_receivewal`.
pub async fn receivewal(load: &Workload, more: &[&str]) -> Run {
    let slot = load.slot().await;
    let (scratch, end) = (Scratch::new("receivewal"), load.end.to_string());
    let dir = scratch.join("wal");
    let mut args = vec!["--slot", &slot, "--endpos", &end, "--no-loop"];
    args.extend(more);
    let session = load.pg.session().await;
    let begun = Instant::now();
    let mut running = load.pg.start_receivewal(&dir, &args);
    let mut meter = Meter::default();
    meter.watch_new("pg_receivewal", running.pid());
    loop {
        find_walsender(&session, &slot, &mut meter).await;
        meter.sample();
        if meter::read(running.pid()).is_none_or(|r| r.ended) {
            break;
        }
        assert!(begun.elapsed() < DEADLINE, "pg_receivewal does not end:\n{}", running.log());
        tokio::time::sleep(SAMPLE).await;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let status = running.wait_exit(DEADLINE).await;
    assert!(status.success(), "pg_receivewal: {status}:\n{}", running.log());
    let files = std::fs::read_dir(&dir).expect("read what was received").flatten();
    let complete = files.filter(|f| f.path().extension().is_none_or(|e| e != "partial")).count();
    assert!(complete as u64 >= load.segments(), "pg_receivewal: {complete} files");
    load.drop_slot(&slot).await;
    let (cpu, peaks) = (meter.cpu(), meter.peaks());
    Run { seconds, cpu, peaks, lags: Vec::new(), settled_seconds: seconds }
}

/// A server and a sidecar that drain a copy of the slot.
struct Klio<'a> {
    load: &'a Workload,
    slot: String,
    site: Site,
    sidecar: Running,
    session: Session,
    begun: Instant,
    meter: Meter,
}

/// Drains with Klio through TLS, with or without tier 2.
pub async fn klio(load: &Workload, s3: Option<&S3>) -> Run {
    let (mut klio, run) = begin(load, s3).await;
    klio.sidecar.terminate(DEADLINE).await;
    klio.site.stop().await;
    load.drop_slot(&klio.slot).await;
    run
}

/// As [`klio`] without tier 2, and the server is left running for more.
pub async fn klio_server(load: &Workload) -> Site {
    let (mut klio, _) = begin(load, None).await;
    klio.sidecar.terminate(DEADLINE).await;
    load.drop_slot(&klio.slot).await;
    klio.site
}

async fn begin<'a>(load: &'a Workload, s3: Option<&S3>) -> (Klio<'a>, Run) {
    let mut site = Site::new().await;
    if let Some(s3) = s3 {
        site.set_tier2(s3);
    }
    site.start().await;
    let slot = load.slot().await;
    let session = load.pg.session().await;
    let mut meter = Meter::default();
    meter.watch("server", site.server().pid());
    if let Some(queue) = meter::child(site.server(), "nats-server") {
        meter.watch("queue", queue);
    }
    if s3.is_some() {
        meter.watch("bucket and bench", std::process::id());
    }
    let mut command = site.klio_command(Some(&load.pg), &["stream"]);
    command.env("KLIO_POSTGRES__SLOT", &slot);
    let begun = Instant::now();
    let sidecar = Running::spawn("klio stream", command, &site.scratch("stream.log"));
    meter.watch_new("sidecar", sidecar.pid());
    let mut klio = Klio { load, slot, site, sidecar, session, begun, meter };
    let run = klio.drain(s3.is_some()).await;
    (klio, run)
}

impl Klio<'_> {
    async fn drain(&mut self, tier2: bool) -> Run {
        let mut lags = Vec::new();
        let mut next_lag = self.begun;
        while !self.is_durable().await {
            self.check();
            if Instant::now() >= next_lag {
                lags.extend(self.lag().await);
                next_lag = Instant::now() + LAG_SAMPLE;
            }
            tokio::time::sleep(SAMPLE).await;
        }
        let seconds = self.begun.elapsed().as_secs_f64();
        while !self.is_settled(tier2).await {
            self.check();
            tokio::time::sleep(SAMPLE).await;
        }
        self.meter.sample();
        let settled_seconds = self.begun.elapsed().as_secs_f64();
        let (cpu, peaks) = (self.meter.cpu(), self.meter.peaks());
        Run { seconds, cpu, peaks, lags, settled_seconds }
    }

    /// PostgreSQL was told that all is flushed.
    async fn is_durable(&mut self) -> bool {
        find_walsender(&self.session, &self.slot, &mut self.meter).await;
        self.meter.sample();
        let sql = format!(
            "SELECT restart_lsn >= '{}' FROM pg_replication_slots WHERE slot_name = '{}'",
            self.load.end, self.slot
        );
        let rows = self.session.rows(&sql).await.expect("ask for the slot");
        rows.first().and_then(|r| r.first()).is_some_and(|v| v == "t")
    }

    fn check(&mut self) {
        let (sidecar, server) = (self.sidecar.is_running(), self.site.server().is_running());
        let in_time = self.begun.elapsed() < DEADLINE;
        assert!(
            sidecar && server && in_time,
            "drain with klio: sidecar runs {sidecar}, server runs {server}, in time {in_time}\n{}\n{}",
            self.sidecar.log(),
            self.site.log()
        );
    }

    async fn is_settled(&self, tier2: bool) -> bool {
        let page = self.site.metrics().await;
        let reached = |name: &str| lsn(&page, name) >= self.load.end.as_u64();
        reached("klio_wal_sealed_lsn") && (!tier2 || reached("klio_wal_archived_lsn"))
    }

    /// `None` before the first byte is durable.
    async fn lag(&self) -> Option<Lag> {
        let page = self.site.metrics().await;
        let start = self.load.start.as_u64();
        let flushed = lsn(&page, "klio_wal_flushed_lsn");
        let behind = |name: &str| {
            let bytes = flushed.saturating_sub(lsn(&page, name).max(start));
            megabytes(bytes) / megabytes(self.load.segment.bytes())
        };
        let (unsealed, unarchived) =
            (behind("klio_wal_sealed_lsn"), behind("klio_wal_archived_lsn"));
        (flushed > start).then_some(Lag { unsealed, unarchived })
    }
}

/// An LSN gauge of the only cluster; 0 while it is not there.
fn lsn(page: &klio_tests::http::Metrics, name: &str) -> u64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number")]
    let value = page.sum(name, &[]) as u64;
    value
}

async fn find_walsender(session: &Session, slot: &str, meter: &mut Meter) {
    if meter.cpu().contains_key("walsender") {
        return;
    }
    let sql = format!(
        "SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{slot}' AND active_pid > 0"
    );
    let rows = session.rows(&sql).await.expect("ask for the walsender");
    if let Some(pid) = rows.first().and_then(|r| r.first()?.parse().ok()) {
        meter.watch_new("walsender", pid);
    }
}
