//! One connection that changes its own tables and moves money between everyone's accounts.
//!
//! What must stay true: the effects of a transaction are noted under the mark that it puts into WAL before COMMIT is sent, and noted
//! as acknowledged only after it was answered. So a worker may lose its connection, or be aborted, anywhere: WAL decides what happened.

use super::{
    Owner, Shared,
    model::{Effect, Model},
    oracle::Transaction,
    plan, sql,
};
use crate::postgres::Session;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// After so many transactions the workload slows down: a round has enough of them, and on a busy machine WAL would else come faster
/// than it is archived, for as long as a backup waits for that.
const ENOUGH: usize = 4000;
/// Between two transactions then.
const CALM: Duration = Duration::from_millis(100);
/// Between two attempts to connect to a PostgreSQL that is down.
const RECONNECT: Duration = Duration::from_millis(50);

/// The connection is gone, or the statement was refused.
enum Trouble {
    Refused(String),
    Gone,
}

type Done<T> = Result<T, Trouble>;

/// A transaction that has done everything but end.
struct Begun {
    xid: u32,
    mark: i64,
}

/// A worker.
pub(super) struct Worker {
    pub(super) owner: Owner,
    pub(super) rng: StdRng,
    pub(super) shared: Arc<Shared>,
    pub(super) view: Model,
    session: Option<Session>,
    prepared: BTreeMap<String, Vec<Effect>>,
}

impl Worker {
    pub(super) fn new(owner: Owner, seed: u64, shared: Arc<Shared>, base: &Model) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        let view = base.owned_by(&owner);
        let gid = |gid: &String| gid.split('_').nth(1) == Some(owner.number.to_string().as_str());
        let prepared = base.prepared.iter().filter(|(name, _)| gid(name));
        let prepared = prepared.map(|(name, p)| (name.clone(), p.effects.clone())).collect();
        Self { owner, rng, shared, view, session: None, prepared }
    }

    /// Works until told to stop.
    pub(super) async fn run(mut self) {
        while !self.shared.stopped() {
            if let Err(Trouble::Refused(why)) = self.step().await {
                self.shared.note_refusal(&why);
            }
            if self.shared.transactions().len() > ENOUGH {
                tokio::time::sleep(CALM).await;
            }
        }
    }

    async fn step(&mut self) -> Done<()> {
        match self.rng.random_range(0..100) {
            0..5 => self.two_phase().await,
            5..8 => self.vacuum().await,
            _ => self.transaction().await,
        }
    }

    /// Connects as long as it takes.
    async fn session(&mut self) -> Done<&Session> {
        if self.session.as_ref().is_some_and(|session| session.is_closed()) {
            self.session = None;
        }
        while self.session.is_none() {
            if self.shared.stopped() {
                return Err(Trouble::Gone);
            }
            match Session::connect(&self.shared.conninfo).await {
                Ok(session) => self.session = Some(session),
                Err(_) => tokio::time::sleep(RECONNECT).await,
            }
        }
        self.session.as_ref().ok_or(Trouble::Gone)
    }

    async fn run_sql(&mut self, sql: &str) -> Done<Vec<Vec<String>>> {
        self.session().await?;
        self.run_here(sql).await
    }

    /// On the connection there is: what ends a transaction must not be said on a new one.
    async fn run_here(&mut self, sql: &str) -> Done<Vec<Vec<String>>> {
        let session = self.session.as_ref().ok_or(Trouble::Gone)?;
        session.rows(sql).await.map_err(|error| match error.as_db_error() {
            // Class 57P: the server goes down or the connection is ended for it.
            Some(refused) if !refused.code().code().starts_with("57P") => {
                Trouble::Refused(format!("{refused} in {sql}"))
            }
            _ => Trouble::Gone,
        })
    }

    /// Statements of one transaction and what they do once it is committed.
    fn plan(&mut self) -> (String, Vec<Effect>, Model) {
        let mut view = self.view.clone();
        let mut effects = Vec::new();
        let mut text = String::new();
        if self.rng.random_bool(0.6) {
            effects.push(plan::transfer(&mut self.rng, &self.owner));
        }
        for _ in 0..self.rng.random_range(0..4) {
            let tablespaces = &self.shared.tablespaces;
            let more = plan::next(&mut self.rng, &view, &self.owner, tablespaces);
            more.iter().for_each(|effect| view.apply(effect));
            effects.extend(more);
        }
        for effect in &effects {
            text += &sql::statement(effect);
            text += "; ";
        }
        // Work that leaves nothing: a subtransaction that is undone, and a temporary table.
        if self.rng.random_bool(0.1) {
            let lost = plan::next(&mut self.rng, &view, &self.owner, &[]);
            if plan::may_be_undone(&lost, &view) {
                let lost: Vec<String> = lost.iter().map(sql::statement).collect();
                text += &format!("savepoint s; {}; rollback to s; ", lost.join("; "));
            }
        }
        if self.rng.random_bool(0.03) {
            text += "create temp table t on commit drop as select g, md5(g::text) from generate_series(1, 3000) g; ";
        }
        (text, effects, view)
    }

    async fn transaction(&mut self) -> Done<()> {
        let (text, effects, view) = self.plan();
        let begun = self.begin(&text, &effects).await?;
        let undo = self.rng.random_bool(0.05);
        if undo && plan::may_be_undone(&effects, &self.view) {
            self.shared.forget(begun.mark);
            return self.run_here("rollback").await.map(drop);
        }
        match self.run_here("commit").await {
            Ok(_) => self.shared.acknowledge(begun.mark),
            Err(Trouble::Refused(why)) => return Err(Trouble::Refused(why)),
            Err(Trouble::Gone) if self.committed(begun.xid).await? => {}
            Err(Trouble::Gone) => return Ok(()),
        }
        self.view = view;
        Ok(())
    }

    /// Everything but the end of a transaction. Its mark also makes sure that it has written WAL: for the commit record alone
    /// PostgreSQL neither flushes nor waits for a standby (`RecordTransactionCommit`).
    async fn begin(&mut self, text: &str, effects: &[Effect]) -> Done<Begun> {
        let mark = self.owner.ids(1);
        let rows = self.run_sql(&sql::begin(mark, text)).await;
        let xid = match rows {
            Ok(rows) => rows[0][0].parse().expect("a transaction id is a number"),
            Err(refused @ Trouble::Refused(_)) => {
                self.run_sql("rollback").await?;
                return Err(refused);
            }
            Err(Trouble::Gone) => return Err(Trouble::Gone),
        };
        let note = Transaction { effects: effects.to_vec(), acknowledged: false };
        self.shared.transactions().insert(mark, note);
        Ok(Begun { xid, mark })
    }

    /// After a lost answer: what became of it. A crash may have given its id to another transaction meanwhile; what the worker
    /// then believes wrongly it is refused later, and the oracle does not ask for it.
    async fn committed(&mut self, xid: u32) -> Done<bool> {
        loop {
            match self.run_sql(&format!("select pg_xact_status('{xid}'::xid8)")).await {
                Ok(rows) if rows[0][0] == "in progress" => tokio::time::sleep(RECONNECT).await,
                Ok(rows) => return Ok(rows[0][0] == "committed"),
                Err(refused @ Trouble::Refused(_)) => return Err(refused),
                Err(Trouble::Gone) => tokio::time::sleep(RECONNECT).await,
            }
            if self.shared.stopped() {
                return Err(Trouble::Gone);
            }
        }
    }

    /// Prepares a transaction, or ends a prepared one.
    async fn two_phase(&mut self) -> Done<()> {
        if self.prepared.len() < 2 && (self.prepared.is_empty() || self.rng.random_bool(0.5)) {
            return self.prepare().await;
        }
        let Some(gid) = self.prepared.keys().choose(&mut self.rng).cloned() else { return Ok(()) };
        let verb = if self.rng.random_bool(0.7) { "commit" } else { "rollback" };
        match self.run_sql(&format!("{verb} prepared '{gid}'")).await {
            Ok(_) => {}
            Err(Trouble::Gone) if !self.is_prepared(&gid).await? => {}
            other => return other.map(drop),
        }
        let effects = self.prepared.remove(&gid).unwrap_or_default();
        if verb == "commit" {
            effects.iter().for_each(|effect| self.view.apply(effect));
        }
        Ok(())
    }

    /// Only into a table of its own: a prepared transaction keeps its locks, over restarts too.
    async fn prepare(&mut self) -> Done<()> {
        let table = self.owner.prepared_table();
        if !self.view.tables.contains_key(&table) {
            let (unlogged, tablespace) = (false, None);
            return self.commit(vec![Effect::Create { table, unlogged, tablespace }]).await;
        }
        let first = self.owner.ids(5);
        let text = plan::text(&mut self.rng);
        let rows = Effect::Insert { table, first, last: first + 4, text };
        let effects = vec![rows, Effect::Large(self.owner.large(), text)];
        let all: Vec<String> = effects.iter().map(sql::statement).collect();
        self.begin(&all.join("; "), &effects).await?;
        let gid = self.owner.gid();
        match self.run_here(&format!("prepare transaction '{gid}'")).await {
            Ok(_) => {}
            Err(Trouble::Gone) if self.is_prepared(&gid).await? => {}
            other => return other.map(drop),
        }
        self.prepared.insert(gid, effects);
        Ok(())
    }

    async fn is_prepared(&mut self, gid: &str) -> Done<bool> {
        let sql = format!("select 1 from pg_prepared_xacts where gid = '{gid}'");
        loop {
            match self.run_sql(&sql).await {
                Ok(rows) => return Ok(!rows.is_empty()),
                Err(Trouble::Gone) if !self.shared.stopped() => tokio::time::sleep(RECONNECT).await,
                Err(trouble) => return Err(trouble),
            }
        }
    }

    /// One transaction with exactly these effects.
    async fn commit(&mut self, effects: Vec<Effect>) -> Done<()> {
        let all: Vec<String> = effects.iter().map(sql::statement).collect();
        let begun = self.begin(&all.join("; "), &effects).await?;
        match self.run_here("commit").await {
            Ok(_) => self.shared.acknowledge(begun.mark),
            Err(Trouble::Gone) if self.committed(begun.xid).await? => {}
            other => return other.map(drop),
        }
        effects.iter().for_each(|effect| self.view.apply(effect));
        Ok(())
    }

    /// Rewrites files without changing what they mean.
    async fn vacuum(&mut self) -> Done<()> {
        let Some(table) = self.view.tables.keys().choose(&mut self.rng).cloned() else {
            return Ok(());
        };
        let verb = ["vacuum", "vacuum full", "reindex table", "analyze", "vacuum (freeze)"]
            [self.rng.random_range(0..5)];
        // A prepared transaction may hold a lock on it; nobody waits for ever.
        self.run_sql("set lock_timeout = '2s'").await?;
        let done = self.run_sql(&format!("{verb} {table}")).await;
        self.run_sql("set lock_timeout = 0").await?;
        done.map(drop)
    }
}

/// The worker for what concerns the whole cluster.
pub(super) async fn administrate(mut worker: Worker) {
    while !worker.shared.stopped() {
        if let Err(Trouble::Refused(why)) = global(&mut worker).await {
            worker.shared.note_refusal(&why);
        }
        let pause = Duration::from_millis(worker.rng.random_range(20..250));
        let calm = worker.shared.transactions().len() > ENOUGH;
        tokio::time::sleep(if calm { pause * 10 } else { pause }).await;
    }
}

async fn global(worker: &mut Worker) -> Done<()> {
    match worker.rng.random_range(0..100) {
        0..20 => worker.run_sql("checkpoint").await.map(drop),
        20..35 => worker.run_sql("select pg_switch_wal()").await.map(drop),
        35..60 => {
            let name = format!("point{}", worker.owner.ids(1));
            worker.run_sql(&format!("select pg_create_restore_point('{name}')")).await?;
            worker.shared.restore_points().push(name);
            Ok(())
        }
        60..90 => tablespace(worker).await,
        _ => database(worker).await,
    }
}

/// The next step in the life of a tablespace: made, filled, emptied, removed.
async fn tablespace(worker: &mut Worker) -> Done<()> {
    let name = format!("tz{}", worker.rng.random_range(0..3));
    let sql = format!("select 1 from pg_tablespace where spcname = '{name}'");
    if worker.run_sql(&sql).await?.is_empty() {
        let sql = sql::tablespace(&name, &worker.shared.places);
        return worker.run_sql(&sql).await.map(drop);
    }
    let here = |table: &super::model::Table| table.tablespace.as_ref() == Some(&name);
    let table = worker.view.tables.iter().find(|(_, t)| here(t)).map(|(n, _)| n.clone());
    if let Some(table) = table {
        return worker.commit(vec![Effect::Drop(table)]).await;
    }
    if worker.rng.random_bool(0.6) {
        let table = worker.owner.table(worker.owner.ids(1));
        let tablespace = Some(name);
        let create = Effect::Create { table: table.clone(), unlogged: false, tablespace };
        let first = worker.owner.ids(100);
        let text = plan::text(&mut worker.rng);
        let insert = Effect::Insert { table, first, last: first + 40, text };
        return worker.commit(vec![create, insert]).await;
    }
    worker.run_sql(&format!("drop tablespace {name}")).await.map(drop)
}

async fn database(worker: &mut Worker) -> Done<()> {
    let sql = "select oid from pg_database where oid >= 16384";
    let there = worker.run_sql(sql).await?;
    match there.first() {
        Some(row) if there.len() > 1 || worker.rng.random_bool(0.6) => {
            worker.run_sql(&format!("drop database d{} with (force)", row[0])).await.map(drop)
        }
        _ => {
            let oid = 1_000_000_000 + u32::try_from(worker.owner.ids(1) % 1_000_000).unwrap_or(0);
            worker.run_sql(&sql::database(oid)).await.map(drop)
        }
    }
}
