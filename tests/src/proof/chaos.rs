//! Backups at random moments, and what may happen meanwhile.
//!
//! A backup that nothing disturbs must succeed; one that is disturbed may end with an error, and must not hang.

use super::{Move, Plan, Report, Restorer, Source, hostile, rig::Rig};
use crate::{
    postgres::install,
    process::{Running, descendants},
    programs,
    s3::{Fault, Rule},
    site::PATIENCE,
    workload::Workload,
};
use klio_pg::Lsn;
use rand::{Rng, rngs::StdRng};
use std::{
    fs,
    time::{Duration, Instant},
};

/// A backup of a database that is written to as fast as it goes, on a machine that does much else, takes minutes.
const BACKUP: Duration = Duration::from_secs(600);
/// How long a disturbance lasts.
const WHILE: Duration = Duration::from_millis(700);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Backup,
    BrokenBackup,
    Sidecar,
    Server,
    Queue,
    Postgres,
    ServerInBackup,
    PostgresInBackup,
    Bucket,
    Hang,
    Quiet,
    LostTier1,
    Drill,
    Clock,
    Hostile,
    Copy,
}

/// The moves that are made at any moment while the primary lives.
const LIVE: [(Move, Event); 3] = [
    (Move::LostTier1, Event::LostTier1),
    (Move::Clock, Event::Clock),
    (Move::Hostile, Event::Hostile),
];
/// Those that need a backup, each with its chance; life goes on for a few events afterwards.
const BEHIND_BACKUP: [(Move, Event, f64); 2] =
    [(Move::Tablespaces, Event::Drill, 0.1), (Move::Copy, Event::Copy, 0.15)];

fn choose(rng: &mut StdRng, plan: &Plan) -> Event {
    if !plan.chaos {
        return if rng.random_bool(0.5) { Event::Backup } else { Event::Quiet };
    }
    let live = LIVE.map(|(what, _)| what);
    if let Some(made) = plan.moves.among(rng, &live, 0.2) {
        let event = LIVE.iter().find(|(what, _)| *what == made);
        return event.map_or(Event::Quiet, |(_, event)| *event);
    }
    match rng.random_range(0..100) {
        0..20 => Event::Backup,
        20..35 => Event::BrokenBackup,
        35..45 => Event::Sidecar,
        45..53 => Event::Server,
        53..57 => Event::Queue,
        57..65 => Event::Postgres,
        65..75 => Event::ServerInBackup,
        75..82 => Event::PostgresInBackup,
        82..90 => Event::Bucket,
        90..95 => Event::Hang,
        _ => Event::Quiet,
    }
}

/// Runs until the time is over and a backup is finished; returns a position behind the first finished one.
pub(super) async fn run(
    rig: &mut Rig,
    load: &mut Workload,
    rng: &mut StdRng,
    plan: &Plan,
    report: &mut Report,
) -> Lsn {
    let begun = Instant::now();
    let mut first = None;
    // Sometimes the only backup is taken late.
    tokio::time::sleep(Duration::from_millis(rng.random_range(0..1500))).await;
    while begun.elapsed() < plan.load || first.is_none() {
        let event = if begun.elapsed() > plan.load * 4 { Event::Backup } else { choose(rng, plan) };
        if event != Event::Quiet && event != Event::Backup {
            report.faults.push(format!("{event:?}"));
        }
        if live(event, rig, rng, report).await {
            let position = rig.pg.insert_lsn().await;
            first.get_or_insert(position);
        }
    }
    for (what, event, chance) in BEHIND_BACKUP {
        if plan.chaos && plan.moves.decide(rng, what, chance) {
            report.faults.push(format!("{event:?}"));
            happen(event, rig, rng).await;
            for _ in 0..rng.random_range(0..3) {
                let event = choose(rng, plan);
                report.faults.push(format!("{event:?}"));
                live(event, rig, rng, report).await;
            }
        }
    }
    // The restore targets behind the backup need some commits.
    let enough = load.count() + 150;
    crate::wait::eventually_now("commits behind the backup", PATIENCE, || load.count() > enough)
        .await;
    first.expect("a backup was finished")
}

/// One event and a moment of quiet. Whether a backup was finished.
async fn live(event: Event, rig: &mut Rig, rng: &mut StdRng, report: &mut Report) -> bool {
    let done = happen(event, rig, rng).await;
    match done {
        Some(true) => report.backups.0 += 1,
        Some(false) => report.backups.1 += 1,
        None => tokio::time::sleep(Duration::from_millis(rng.random_range(0..400))).await,
    }
    done == Some(true)
}

fn backup(rig: &Rig) -> Running {
    let command = rig.site.klio_command(Some(&rig.pg), &["backup"]);
    Running::spawn("klio backup", command, &rig.site.scratch("backup.log"))
}

async fn end(mut backup: Running) -> bool {
    backup.wait_exit(BACKUP).await.success()
}

/// Tier 1 is gone, with what only it had of this primary's WAL: the new one goes on at the bucket's end, and PostgreSQL gives the rest.
/// One misfortune at a time: backups have reached the bucket, and the primary lives until all of it is acknowledged again.
async fn lose_tier1(rig: &mut Rig) {
    rig.backups_archived().await;
    rig.site.kill9();
    fs::remove_dir_all(rig.site.dir().join("data")).expect("lose tier 1");
    rig.site.start().await;
    rig.acknowledged().await;
}

/// A drill on the primary's machine, with a tablespace that no backup knows: it is good, and the primary's own files are as they
/// were (the round looks at them once the workload has ended).
async fn drill(rig: &mut Rig) {
    crate::workload::one_more_tablespace(&rig.pg, &rig.places()).await;
    let inside = rig.kept_directory();
    fs::create_dir(&inside).expect("make a directory for a drill");
    install::give(&inside);
    let restorer = Restorer::new(&rig.site, &rig.s3, Source::Server, rig.hands());
    let args = ["drill", "--in", &inside.display().to_string(), "--json"].map(str::to_owned);
    let mut command = restorer.command(&args);
    command.env("KLIO_DRILL__BIN_DIR", install::bin_dir(rig.pg.major()));
    let outcome = programs::run(command).await;
    assert_eq!(outcome.code, Some(0), "a drill: {}{}", outcome.stdout, outcome.stderr);
    rig.drilled = true;
}

/// The server's clock jumps far ahead or back in the middle of a backup, and is right again a moment later. Meanwhile the bucket and the
/// certificates refuse what is of another time, so the backup may end with an error; nothing may expire by it, and all goes on
/// afterwards.
async fn clock(rig: &mut Rig, rng: &mut StdRng) -> bool {
    let backup = backup(rig);
    tokio::time::sleep(Duration::from_millis(rng.random_range(0..1500))).await;
    let days = rng.random_range(1..400) * if rng.random_bool(0.7) { 1 } else { -1 };
    rig.site.turn_clock(days * 86_400);
    tokio::time::sleep(WHILE * 3).await;
    rig.site.turn_clock(0);
    end(backup).await
}

/// `Some` says whether a backup succeeded.
async fn happen(event: Event, rig: &mut Rig, rng: &mut StdRng) -> Option<bool> {
    let moment = Duration::from_millis(rng.random_range(0..1500));
    match event {
        Event::Quiet => None,
        Event::Backup => {
            let mut backup = backup(rig);
            let status = backup.wait_exit(BACKUP).await;
            assert!(
                status.success(),
                "an undisturbed klio backup ended with {status}:\n{}",
                backup.log()
            );
            Some(true)
        }
        Event::BrokenBackup => {
            let mut backup = backup(rig);
            tokio::time::sleep(moment).await;
            let done = backup.exit().is_some_and(|status| status.success());
            backup.kill9_tree();
            Some(done)
        }
        Event::Sidecar => {
            rig.stream = None;
            tokio::time::sleep(moment / 3).await;
            rig.stream = Some(rig.site.stream(&rig.pg));
            None
        }
        Event::Server => {
            rig.site.kill9();
            tokio::time::sleep(moment / 3).await;
            rig.site.start().await;
            None
        }
        Event::Queue => {
            let server = rig.site.server().pid();
            let queue = descendants(server).into_iter().find(|process| {
                fs::read_to_string(format!("/proc/{}/comm", process.pid()))
                    .is_ok_and(|name| name.trim() == "nats-server")
            });
            queue.inspect(|queue| queue.kill9());
            None
        }
        Event::Postgres => {
            rig.pg.kill9();
            rig.pg.start().await;
            None
        }
        Event::ServerInBackup => {
            let backup = backup(rig);
            tokio::time::sleep(moment).await;
            rig.site.kill9();
            rig.site.start().await;
            Some(end(backup).await)
        }
        Event::PostgresInBackup => {
            let backup = backup(rig);
            tokio::time::sleep(moment).await;
            rig.pg.kill9();
            rig.pg.start().await;
            Some(end(backup).await)
        }
        Event::Bucket => {
            rig.s3.faults().inject(Rule::always(Fault::SlowDown));
            tokio::time::sleep(WHILE).await;
            rig.s3.faults().heal();
            None
        }
        Event::LostTier1 => {
            lose_tier1(rig).await;
            None
        }
        Event::Drill => {
            drill(rig).await;
            None
        }
        Event::Clock if rig.clocked() => Some(clock(rig, rng).await),
        Event::Clock => None,
        Event::Hostile => {
            hostile::attack(&rig.site, rng).await;
            None
        }
        Event::Copy => {
            rig.copy_streams().await;
            None
        }
        Event::Hang => {
            rig.site.server().pause();
            tokio::time::sleep(WHILE).await;
            rig.site.server().resume();
            None
        }
    }
}
