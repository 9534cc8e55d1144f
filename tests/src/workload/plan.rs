//! What a worker does next: a pure function of a random generator and of what the worker has.

use super::{
    Owner,
    model::{ACCOUNTS, Effect, Model, Table, Text},
};
use rand::{Rng, rngs::StdRng, seq::IteratorRandom};

/// A worker does not make more tables than these.
const TABLES_MOST: usize = 6;
/// A table does not grow beyond this many rows.
const ROWS_MOST: usize = 300;

/// Content of any size: mostly inline, some compressed, some out of line in many chunks.
pub fn text(rng: &mut StdRng) -> Text {
    let pieces = match rng.random_range(0..100) {
        0..85 => rng.random_range(1..9),
        85..97 => rng.random_range(60..400),
        _ => rng.random_range(1000..4000),
    };
    Text { seed: rng.random_range(1..i64::from(u32::MAX)), pieces }
}

/// A transfer between any two accounts.
pub fn transfer(rng: &mut StdRng, owner: &Owner) -> Effect {
    let from = rng.random_range(1..=ACCOUNTS);
    let to = (from + rng.random_range(1..ACCOUNTS)) % ACCOUNTS + 1;
    let to = if to == from { from % ACCOUNTS + 1 } else { to };
    Effect::Transfer { id: owner.ids(1), from, to, amount: rng.random_range(1..1000) }
}

/// One thing to do with own tables and large objects, as one or more effects in order; none when there is nothing to do it with.
pub fn next(rng: &mut StdRng, view: &Model, owner: &Owner, tablespaces: &[String]) -> Vec<Effect> {
    let tables = || view.tables.iter().filter(|(name, _)| owner.may_change(name));
    if tables().count() == 0 || (tables().count() < TABLES_MOST && rng.random_bool(0.06)) {
        return create(rng, owner, tablespaces);
    }
    if rng.random_bool(0.12) {
        return large(rng, view, owner);
    }
    let Some((name, table)) = tables().choose(rng) else { return Vec::new() };
    change(rng, owner, name, table, tablespaces)
}

/// Whether these effects may be rolled back and followed by a crash.
///
/// PostgreSQL (15 to 18) does not survive that where they made a file of an unlogged table: rolling back unlinks the init fork at
/// once and leaves the empty main fork until the next checkpoint; replay then makes the init fork again, and if the abort record
/// was not flushed, recovery ends with "could not create file: File exists". Seen here without Klio.
pub fn may_be_undone(effects: &[Effect], view: &Model) -> bool {
    effects.iter().all(|effect| match effect {
        Effect::Create { unlogged, .. } | Effect::Persistence { unlogged: unlogged @ true, .. } => {
            !unlogged
        }
        other => other
            .table()
            .is_none_or(|name| view.tables.get(name).is_none_or(|table| !table.unlogged)),
    })
}

fn somewhere(rng: &mut StdRng, tablespaces: &[String]) -> Option<String> {
    if rng.random_bool(0.4) { tablespaces.iter().choose(rng).cloned() } else { None }
}

fn create(rng: &mut StdRng, owner: &Owner, tablespaces: &[String]) -> Vec<Effect> {
    let table = owner.table(owner.ids(1));
    let unlogged = rng.random_bool(0.25);
    let tablespace = somewhere(rng, tablespaces);
    let mut effects = vec![Effect::Create { table: table.clone(), unlogged, tablespace }];
    if rng.random_bool(0.5) {
        effects.push(insert(rng, owner, &table));
        // Within one transaction, as a crash in between would empty it.
        if unlogged && rng.random_bool(0.5) {
            effects.push(Effect::Persistence { table, unlogged: false });
        }
    }
    effects
}

fn insert(rng: &mut StdRng, owner: &Owner, table: &str) -> Effect {
    let text = text(rng);
    let count = if text.pieces > 100 { 2 } else { rng.random_range(1..25) };
    let first = owner.ids(count);
    Effect::Insert { table: table.to_owned(), first, last: first + count - 1, text }
}

fn large(rng: &mut StdRng, view: &Model, owner: &Owner) -> Vec<Effect> {
    let old = view.large.keys().filter(|id| owner.owns_large(**id)).choose(rng).copied();
    match old {
        Some(id) if rng.random_bool(0.3) => vec![Effect::Unlink(id)],
        Some(id) if rng.random_bool(0.4) => vec![Effect::Large(id, text(rng))],
        _ => vec![Effect::Large(owner.large(), text(rng))],
    }
}

fn change(
    rng: &mut StdRng,
    owner: &Owner,
    name: &str,
    table: &Table,
    tablespaces: &[String],
) -> Vec<Effect> {
    let name = name.to_owned();
    let range = |rng: &mut StdRng| {
        let first = table.rows.keys().choose(rng).copied().unwrap_or_default();
        (first, first + rng.random_range(0..12))
    };
    match rng.random_range(0..100) {
        0..45 if table.rows.len() < ROWS_MOST => vec![insert(rng, owner, &name)],
        0..75 => {
            let (first, last) = range(rng);
            vec![Effect::Update { table: name, first, last, text: text(rng) }]
        }
        75..86 => {
            let (first, last) = range(rng);
            vec![Effect::Delete { table: name, first, last }]
        }
        86..88 => vec![Effect::Truncate(name)],
        88..90 => vec![Effect::Drop(name)],
        90..93 if table.columns.len() < 4 => {
            let number = u32::try_from(table.columns.len()).unwrap_or_default() + 1;
            vec![Effect::AddColumn { table: name, number, value: rng.random_range(0..1000) }]
        }
        93..95 if table.indexes.len() < 3 => {
            let index = format!("{name}_i{}", owner.ids(1));
            vec![Effect::Index { table: name, index }]
        }
        95..97 => {
            let tablespace = somewhere(rng, tablespaces);
            vec![Effect::Move { table: name, tablespace }]
        }
        // What an unlogged table holds is not known for sure after a crash, so it becomes logged empty.
        97..99 if table.unlogged => vec![
            Effect::Truncate(name.clone()),
            Effect::Persistence { table: name, unlogged: false },
        ],
        97..99 => vec![Effect::Persistence { table: name, unlogged: true }],
        _ => vec![insert(rng, owner, &name)],
    }
}
