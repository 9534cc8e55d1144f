//! The SQL of each effect.

use super::model::{Effect, Text};
use std::path::Path;

/// What [`super::setup`] runs once in a new cluster.
pub fn setup(accounts: i32) -> String {
    format!(
        "create extension amcheck; \
         create function klio_text(id bigint, seed bigint, n int) returns text language sql immutable as \
           $$ select string_agg(md5(id || ':' || seed || ':' || g), '') from generate_series(1, n) g $$; \
         create table accounts (id int primary key, balance bigint not null) with (fillfactor = 70); \
         insert into accounts select g, 0 from generate_series(1, {accounts}) g; \
         create table history (id bigint primary key, \"from\" int not null, \"to\" int not null, amount bigint not null)"
    )
}

fn located(tablespace: Option<&str>) -> String {
    tablespace.map_or_else(String::new, |name| format!(" tablespace {name}"))
}

fn content(id: &str, text: Text) -> String {
    format!("{}, {}, klio_text({id}, {}, {})", text.seed, text.pieces, text.seed, text.pieces)
}

/// A new tablespace; its directory must be there.
pub fn tablespace(name: &str, places: &Path) -> String {
    format!("create tablespace {name} location '{}'", places.join(name).display())
}

/// A new database; PostgreSQL has two ways to copy the template.
pub fn database(oid: u32) -> String {
    let strategy = if oid.is_multiple_of(2) { "wal_log" } else { "file_copy" };
    format!("create database d{oid} template template0 oid {oid} strategy {strategy}")
}

/// Begins a transaction, puts its mark into WAL (a logical message, which nobody but the oracle reads) and does `text`. The
/// first row is its id.
pub fn begin(mark: i64, text: &str) -> String {
    let message = format!("select pg_logical_emit_message(true, '{mark}', '')");
    format!("begin; select pg_current_xact_id(); {message}; {text}")
}

/// The statement that has this effect.
pub fn statement(effect: &Effect) -> String {
    match effect {
        Effect::Transfer { id, from, to, amount } => {
            // The lower account first, whichever way the money goes: no deadlocks.
            let change = |account: i32, amount: i64| {
                format!("update accounts set balance = balance + {amount} where id = {account}; ")
            };
            let mut both = [(*from, -amount), (*to, *amount)];
            both.sort_unstable();
            format!(
                "{}{}insert into history values ({id}, {from}, {to}, {amount})",
                change(both[0].0, both[0].1),
                change(both[1].0, both[1].1)
            )
        }
        Effect::Create { table, unlogged, tablespace } => format!(
            "create {} table {table} (id bigint primary key, seed bigint not null, pieces int not null, payload text not null){}",
            if *unlogged { "unlogged" } else { "" },
            located(tablespace.as_deref())
        ),
        Effect::Drop(table) => format!("drop table {table}"),
        Effect::Truncate(table) => format!("truncate {table}"),
        Effect::AddColumn { table, number, value } => {
            format!("alter table {table} add column c{number} int not null default {value}")
        }
        Effect::Index { table, index } => format!("create index {index} on {table} (seed, id)"),
        Effect::Move { table, tablespace } => format!(
            "alter table {table} set tablespace {}",
            tablespace.as_deref().unwrap_or("pg_default")
        ),
        Effect::Persistence { table, unlogged } => {
            format!("alter table {table} set {}", if *unlogged { "unlogged" } else { "logged" })
        }
        Effect::Insert { table, first, last, text } => format!(
            "insert into {table} (id, seed, pieces, payload) select g, {} from generate_series({first}, {last}) g",
            content("g", *text)
        ),
        Effect::Update { table, first, last, text } => format!(
            "update {table} set (seed, pieces, payload) = ({}) where id between {first} and {last}",
            content("id", *text)
        ),
        Effect::Delete { table, first, last } => {
            format!("delete from {table} where id between {first} and {last}")
        }
        Effect::Large(id, Text { seed, pieces }) => format!(
            "select lo_unlink(oid) from pg_largeobject_metadata where oid = {id}; \
             select lo_from_bytea({id}, convert_to(klio_text({id}, {seed}, {pieces}), 'UTF8')); \
             comment on large object {id} is '{seed} {pieces}'"
        ),
        Effect::Unlink(id) => format!("select lo_unlink({id})"),
    }
}
