//! Reads what a PostgreSQL holds into a [`Model`], and says how two differ.
//!
//! Generated content is checked by PostgreSQL itself (`klio_text` of the row's own columns); what does not fit is a difference.

use super::model::{History, Model, Prepared, Table, Text};
use crate::postgres::{Postgres, Session};
use std::fmt::Debug;

/// No more differences than these are told.
const TOLD: usize = 12;

fn parse<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("read a number: found {text:?}"))
}

async fn rows(session: &Session, sql: &str) -> Result<Vec<Vec<String>>, String> {
    session.rows(sql).await.map_err(|e| format!("{sql}: {e:?}"))
}

/// Everything a model knows. The effects of prepared transactions cannot be seen; they are left empty.
///
/// # Errors
/// What cannot be read, or content that is damaged.
pub async fn read(pg: &Postgres) -> Result<Model, String> {
    let session = Session::connect(&pg.conninfo()).await.map_err(|e| format!("connect: {e:?}"))?;
    // Index scans would only tell what indexes say; pg_amcheck compares those with the tables.
    rows(&session, "set enable_indexscan = off; set enable_indexonlyscan = off").await?;
    let mut model = Model::default();
    for row in rows(&session, "select id, balance from accounts").await? {
        model.accounts.insert(parse(&row[0]), parse(&row[1]));
    }
    let sql = "select count(*), coalesce(sum(amount), 0), coalesce(sum(id), 0) from history";
    let sums = rows(&session, sql).await?.swap_remove(0);
    model.history =
        History { count: parse(&sums[0]), amount: parse(&sums[1]), ids: parse(&sums[2]) };
    read_tables(&session, &mut model).await?;
    read_large(&session, &mut model).await?;
    let sql = "select oid, spcname from pg_tablespace where oid >= 16384";
    model.tablespaces =
        rows(&session, sql).await?.into_iter().map(|r| (parse(&r[0]), r[1].clone())).collect();
    let sql = "select oid from pg_database where oid >= 16384";
    model.databases = rows(&session, sql).await?.iter().map(|r| parse(&r[0])).collect();
    for row in rows(&session, "select gid, transaction from pg_prepared_xacts").await? {
        let prepared = Prepared { xid: parse(&row[1]), effects: Vec::new() };
        model.prepared.insert(row[0].clone(), prepared);
    }
    Ok(model)
}

async fn read_tables(session: &Session, model: &mut Model) -> Result<(), String> {
    let sql = "select relname, relpersistence, coalesce(spcname, '') from pg_class c \
               left join pg_tablespace t on t.oid = c.reltablespace \
               where relkind = 'r' and relnamespace = 'public'::regnamespace \
               and relname not in ('accounts', 'history')";
    for row in rows(session, sql).await? {
        let mut table = Table {
            unlogged: row[1] == "u",
            tablespace: Some(row[2].clone()).filter(|name| !name.is_empty()),
            ..Table::default()
        };
        read_table(session, &row[0], &mut table).await?;
        model.tables.insert(row[0].clone(), table);
    }
    Ok(())
}

async fn read_table(session: &Session, name: &str, table: &mut Table) -> Result<(), String> {
    let sql = format!(
        "select indexrelid::regclass::text from pg_index \
         where indrelid = '{name}'::regclass and not indisprimary and indisvalid"
    );
    table.indexes = rows(session, &sql).await?.into_iter().map(|mut r| r.swap_remove(0)).collect();
    let sql = format!(
        "select attname from pg_attribute where attrelid = '{name}'::regclass \
         and attname ~ '^c[0-9]+$' order by attnum"
    );
    for column in rows(session, &sql).await?.into_iter().map(|mut r| r.swap_remove(0)) {
        // Every row has the default, which is in the catalogue also when there is no row.
        let sql = format!(
            "select pg_get_expr(adbin, adrelid), (select count(*) from {name} where {column} \
               is distinct from pg_get_expr(adbin, adrelid)::int) \
             from pg_attrdef join pg_attribute on attrelid = adrelid and attnum = adnum \
             where attrelid = '{name}'::regclass and attname = '{column}'"
        );
        let found = rows(session, &sql).await?.swap_remove(0);
        if found[1] != "0" {
            return Err(format!("{name}.{column}: {} rows without the default", found[1]));
        }
        table.columns.push((parse(&column[1..]), parse(&found[0])));
    }
    let sql = format!("select id, seed, pieces, payload = klio_text(id, seed, pieces) from {name}");
    for row in rows(session, &sql).await? {
        if row[3] != "t" {
            return Err(format!("{name}: damaged payload in row {}", row[0]));
        }
        let text = Text { seed: parse(&row[1]), pieces: parse(&row[2]) };
        if table.rows.insert(parse(&row[0]), text).is_some() {
            return Err(format!("{name}: two rows with id {}", row[0]));
        }
    }
    Ok(())
}

/// The text of a large object does not name its seed, so it is looked for among what the workload writes beside it: the comment.
async fn read_large(session: &Session, model: &mut Model) -> Result<(), String> {
    let sql = "select m.oid, d.description from pg_largeobject_metadata m \
               left join pg_description d on d.objoid = m.oid and d.classoid = 'pg_largeobject'::regclass";
    for row in rows(session, sql).await? {
        let (seed, pieces) =
            row[1].split_once(' ').ok_or(format!("large object {}: no comment", row[0]))?;
        let sql = format!(
            "select lo_get({0}) = convert_to(klio_text({0}, {seed}, {pieces}), 'UTF8')",
            row[0]
        );
        if rows(session, &sql).await?.swap_remove(0).swap_remove(0) != "t" {
            return Err(format!("large object {}: damaged content", row[0]));
        }
        model.large.insert(parse(&row[0]), Text { seed: parse(seed), pieces: parse(pieces) });
    }
    Ok(())
}

fn differ<K: Debug + Ord, V: Debug + PartialEq>(
    what: &str,
    expected: impl IntoIterator<Item = (K, V)>,
    found: impl IntoIterator<Item = (K, V)>,
    into: &mut Vec<String>,
) {
    let mut found: std::collections::BTreeMap<K, V> = found.into_iter().collect();
    for (key, value) in expected {
        match found.remove(&key) {
            Some(other) if other == value => {}
            other => into.push(format!("{what} {key:?}: expected {value:?}, found {other:?}")),
        }
    }
    into.extend(found.into_iter().map(|(k, v)| format!("{what} {k:?}: not expected, found {v:?}")));
}

/// How what was found differs from what was expected; empty when it does not.
#[must_use]
pub fn differences(expected: &Model, found: &Model) -> Vec<String> {
    let mut list = Vec::new();
    differ("account", &expected.accounts, &found.accounts, &mut list);
    differ("history", [("", expected.history)], [("", found.history)], &mut list);
    let names = |model: &Model| -> Vec<(String, Table)> {
        let bare = |table: &Table| Table { rows: Default::default(), ..table.clone() };
        model.tables.iter().map(|(name, table)| (name.clone(), bare(table))).collect()
    };
    differ("table", names(expected), names(found), &mut list);
    for (name, table) in &expected.tables {
        if let Some(other) = found.tables.get(name) {
            differ(&format!("row of {name}"), &table.rows, &other.rows, &mut list);
        }
    }
    differ("large object", &expected.large, &found.large, &mut list);
    differ("tablespace", &expected.tablespaces, &found.tablespaces, &mut list);
    let databases = |model: &Model| -> Vec<(u32, ())> {
        model.databases.iter().map(|oid| (*oid, ())).collect()
    };
    differ("database", databases(expected), databases(found), &mut list);
    let prepared = |model: &Model| -> Vec<(String, u32)> {
        model.prepared.iter().map(|(gid, p)| (gid.clone(), p.xid)).collect()
    };
    differ("prepared transaction", prepared(expected), prepared(found), &mut list);
    if list.len() > TOLD {
        let more = list.len() - TOLD;
        list.truncate(TOLD);
        list.push(format!("and {more} more"));
    }
    list
}
