//! What a database holds, as a pure value, and what each statement of the workload does to it.
//!
//! A [`Model`] changes by [`Model::apply`] alone. Text columns and large objects hold no text here: their content is a function of
//! `(id, seed, pieces)`, which PostgreSQL computes too (`klio_text`), so that comparing is cheap and exact.
//! What must stay true: applying the effects of committed transactions in the order of their commit records gives what a reader
//! of that moment sees. Effects of different workers commute or are ordered by row locks, so this order is enough.

use std::collections::{BTreeMap, BTreeSet};

/// How many accounts money moves between.
pub const ACCOUNTS: i32 = 200;

/// Content of a generated text: which one, and how many pieces of 32 characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Text {
    /// Makes it unlike others.
    pub seed: i64,
    /// Pieces of 32 characters; from about 130 on PostgreSQL stores it out of line (TOAST).
    pub pieces: i32,
}

/// A table of one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Its content does not survive a crash or a restore.
    pub unlogged: bool,
    /// Where it lies; `None` is the database's default.
    pub tablespace: Option<String>,
    /// Added columns `c<number>` with the value every row has.
    pub columns: Vec<(u32, i32)>,
    /// Further indexes.
    pub indexes: BTreeSet<String>,
    /// Rows by id.
    pub rows: BTreeMap<i64, Text>,
}

/// A transfer as the history table keeps it, summed up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct History {
    /// Rows.
    pub count: i64,
    /// Sum of amounts.
    pub amount: i64,
    /// Sum of ids.
    pub ids: i64,
}

/// A prepared transaction that is neither committed nor rolled back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Its transaction id.
    pub xid: u32,
    /// What it does once committed.
    pub effects: Vec<Effect>,
}

/// Everything that is compared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Model {
    /// Balances; their sum is always 0.
    pub accounts: BTreeMap<i32, i64>,
    /// The history of transfers.
    pub history: History,
    /// Tables by name.
    pub tables: BTreeMap<String, Table>,
    /// Large objects.
    pub large: BTreeMap<u32, Text>,
    /// Tablespaces besides the two of PostgreSQL itself, by OID.
    pub tablespaces: BTreeMap<u32, String>,
    /// Databases besides the three of PostgreSQL itself; each is named `d<oid>`.
    pub databases: BTreeSet<u32>,
    /// By global id.
    pub prepared: BTreeMap<String, Prepared>,
}

/// What a statement does once its transaction is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Moves money and notes it with this id.
    Transfer {
        /// Id in the history.
        id: i64,
        /// Account that gives.
        from: i32,
        /// Account that gets.
        to: i32,
        /// How much.
        amount: i64,
    },
    /// A new, empty table.
    Create {
        /// Table.
        table: String,
        /// Without WAL.
        unlogged: bool,
        /// Where.
        tablespace: Option<String>,
    },
    /// Removes a table.
    Drop(String),
    /// Empties a table.
    Truncate(String),
    /// Adds `c<number>` with a default.
    AddColumn {
        /// Table.
        table: String,
        /// Number of the column.
        number: u32,
        /// Value in every row.
        value: i32,
    },
    /// One more index.
    Index {
        /// Table.
        table: String,
        /// Its name.
        index: String,
    },
    /// Rewrites the table elsewhere.
    Move {
        /// Table.
        table: String,
        /// Where to.
        tablespace: Option<String>,
    },
    /// Rewrites the table with or without WAL.
    Persistence {
        /// Table.
        table: String,
        /// Without WAL.
        unlogged: bool,
    },
    /// Rows `first..=last`, all new.
    Insert {
        /// Table.
        table: String,
        /// First id.
        first: i64,
        /// Last id.
        last: i64,
        /// Content.
        text: Text,
    },
    /// New content for the rows there are in `first..=last`.
    Update {
        /// Table.
        table: String,
        /// First id.
        first: i64,
        /// Last id.
        last: i64,
        /// Content.
        text: Text,
    },
    /// Removes the rows there are in `first..=last`.
    Delete {
        /// Table.
        table: String,
        /// First id.
        first: i64,
        /// Last id.
        last: i64,
    },
    /// A new large object, or new content for one.
    Large(u32, Text),
    /// Removes a large object.
    Unlink(u32),
}

impl Effect {
    /// The table it changes, if any.
    #[must_use]
    pub fn table(&self) -> Option<&str> {
        match self {
            Effect::Drop(table)
            | Effect::Truncate(table)
            | Effect::Create { table, .. }
            | Effect::AddColumn { table, .. }
            | Effect::Index { table, .. }
            | Effect::Move { table, .. }
            | Effect::Persistence { table, .. }
            | Effect::Insert { table, .. }
            | Effect::Update { table, .. }
            | Effect::Delete { table, .. } => Some(table),
            Effect::Transfer { .. } | Effect::Large(..) | Effect::Unlink(_) => None,
        }
    }
}

impl Model {
    /// As [`super::setup`] leaves a new cluster.
    #[must_use]
    pub fn initial() -> Self {
        Self { accounts: (1..=ACCOUNTS).map(|id| (id, 0)).collect(), ..Self::default() }
    }

    fn table(&mut self, name: &str) -> &mut Table {
        self.tables.get_mut(name).unwrap_or_else(|| panic!("the model has no table {name}"))
    }

    /// Forgets a prepared transaction, because it ends; returns what it does if it is committed.
    pub fn take_prepared(&mut self, xid: u32) -> Option<Vec<Effect>> {
        let mut found = self.prepared.extract_if(.., |_, prepared| prepared.xid == xid);
        found.next().map(|(_, prepared)| prepared.effects)
    }

    /// Does what a committed statement did.
    ///
    /// # Panics
    /// When it names a table that is not there: the workload is wrong, not the product.
    pub fn apply(&mut self, effect: &Effect) {
        match effect.clone() {
            Effect::Transfer { id, from, to, amount } => {
                *self.accounts.entry(from).or_default() -= amount;
                *self.accounts.entry(to).or_default() += amount;
                let History { count, amount: sum, ids } = self.history;
                self.history = History { count: count + 1, amount: sum + amount, ids: ids + id };
            }
            Effect::Create { table, unlogged, tablespace } => {
                self.tables.insert(table, Table { unlogged, tablespace, ..Table::default() });
            }
            Effect::Drop(table) => drop(self.tables.remove(&table)),
            Effect::Truncate(table) => self.table(&table).rows.clear(),
            Effect::AddColumn { table, number, value } => {
                self.table(&table).columns.push((number, value));
            }
            Effect::Index { table, index } => drop(self.table(&table).indexes.insert(index)),
            Effect::Move { table, tablespace } => self.table(&table).tablespace = tablespace,
            Effect::Persistence { table, unlogged } => self.table(&table).unlogged = unlogged,
            Effect::Insert { table, first, last, text } => {
                self.table(&table).rows.extend((first..=last).map(|id| (id, text)));
            }
            Effect::Update { table, first, last, text } => {
                self.table(&table).rows.range_mut(first..=last).for_each(|(_, row)| *row = text);
            }
            Effect::Delete { table, first, last } => {
                self.table(&table).rows.retain(|id, _| !(first..=last).contains(id));
            }
            Effect::Large(id, text) => drop(self.large.insert(id, text)),
            Effect::Unlink(id) => drop(self.large.remove(&id)),
        }
    }

    /// What a reader sees after a crash or a restore: tables without WAL are empty.
    #[must_use]
    pub fn recovered(mut self) -> Self {
        for table in self.tables.values_mut().filter(|table| table.unlogged) {
            table.rows.clear();
        }
        self
    }

    /// The part of one worker: the tables and large objects it alone changes.
    #[must_use]
    pub fn owned_by(&self, worker: &super::Owner) -> Self {
        let mut own = Self::default();
        let tables = self.tables.iter().filter(|(name, _)| worker.owns_table(name));
        own.tables = tables.map(|(name, table)| (name.clone(), table.clone())).collect();
        let large = self.large.iter().filter(|(id, _)| worker.owns_large(**id));
        own.large = large.map(|(id, text)| (*id, *text)).collect();
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_is_neither_made_nor_lost() {
        let mut model = Model::initial();
        for id in 0..50 {
            let (from, to) = (i32::try_from(id).unwrap() + 1, 7);
            model.apply(&Effect::Transfer { id, from, to, amount: id * 3 });
        }
        assert_eq!(model.accounts.values().sum::<i64>(), 0);
        assert_eq!((model.history.count, model.history.ids), (50, 49 * 25));
    }

    #[test]
    fn tables_without_wal_are_there_and_empty_after_recovery() {
        let mut model = Model::default();
        let (table, text) = ("w1_t1".to_owned(), Text { seed: 1, pieces: 1 });
        let (unlogged, tablespace) = (true, None);
        model.apply(&Effect::Create { table: table.clone(), unlogged, tablespace });
        model.apply(&Effect::Insert { table: table.clone(), first: 1, last: 5, text });
        assert_eq!(model.tables[&table].rows.len(), 5);
        assert!(model.recovered().tables[&table].rows.is_empty());
    }
}
