//! The cluster that is backed up and restored: `pgbench -i -s 120` (pages that compress well) and 1.4 GB of md5 text with its index
//! (pages that do not), about 3.2 GB, in PostgreSQL 15 with `fsync` and data checksums off, as PostgreSQL 15 comes.

use crate::options::Options;
use klio_tests::postgres::Postgres;

/// Rows of the text table at scale 120: about 1.4 GB with the index.
const TEXT_ROWS_PER_SCALE: u64 = 70_000;

/// Makes it. WAL of the making is not archived.
pub async fn new(options: &Options) -> Postgres {
    let scale = options.base_scale();
    let pg = Postgres::builder()
        .durable()
        .set("shared_buffers", "512MB")
        .set("max_wal_size", "8GB")
        .set("checkpoint_timeout", "1h")
        .set("autovacuum", "off")
        .set("archive_mode", "on")
        .set("archive_command", "/bin/true")
        .start()
        .await;
    eprintln!("making pgbench -i -s {scale} and the text table");
    pg.pgbench(&["-i", "-q", "-s", &scale.to_string()]).await;
    let rows = TEXT_ROWS_PER_SCALE * u64::from(scale);
    pg.execute(&format!(
        "create table texts as select g as id, md5(g::text) as a, md5((g + 1)::text) as b, md5((g * 7)::text) as c \
         from generate_series(1, {rows}) g"
    ))
    .await;
    pg.execute("create index on texts (a)").await;
    pg.execute("vacuum").await;
    pg.execute("checkpoint").await;
    pg
}

/// Changes about 1.5 % of the pages, as the clients of a quiet half minute would.
pub async fn change(pg: &Postgres, options: &Options) {
    let each = (options.base_scale() * 12).max(10).to_string();
    pg.pgbench(&["-n", "-c", "2", "-t", &each]).await;
    pg.execute("checkpoint").await;
}
