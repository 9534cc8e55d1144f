#!/usr/bin/env bash
# The main job, narrated, on scratch directories: a real PostgreSQL, klio-server with its embedded queue,
# a real S3 endpoint, `klio stream`, load, a SIGKILL in the middle, and the proof that nothing is missing; a base backup,
# an accidental DELETE and the way back to the moment before it; a drill; the loss of the server's disk and of the primary,
# a restore from the bucket alone, and a new server that goes on with the same bucket. Ends with the metrics of both programs
# and with the trace id of the backup, found in the logs of both; copies of these stay in target/demo.
#
#   deploy/demo.sh            runs and cleans up
#   deploy/demo.sh --keep     leaves everything running and says how to go on by hand
#
# Starts servers on 127.0.0.1 only, on free ports; stops them by their process id.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

KEEP=false
case "${1:-}" in
  '') ;;
  --keep) KEEP=true ;;
  *) echo "usage: deploy/demo.sh [--keep]" >&2; exit 2 ;;
esac

if [ -n "${KLIO_BIN_DIR:-}" ]; then # other programs, as for the tests
  BIN=$KLIO_BIN_DIR
else
  echo "Building klio (release; the first time takes some minutes) ..."
  cargo build --quiet --release -p klio-server -p klio-sidecar -p klio-tests --bin klio --bin klio-server --bin klio-test-s3
  BIN=$PWD/target/release
fi
PGBIN=${PGBIN:-/usr/lib/postgresql/15/bin}
NATS=$PWD/.tools/bin/nats-server
WORK=$(mktemp -d /tmp/klio-demo.XXXXXX)
chmod 755 "$WORK"
declare -A PIDS=()
STARTED=$SECONDS

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
say() { printf '   %s\n' "$*"; }
show() { sed 's/^/   | /'; }
fail() { printf '\nDEMO FAILED: %s\n   logs: %s/*.log\n' "$*" "$WORK" >&2; KEEP_LOGS=true; exit 1; }

# PostgreSQL refuses to run as root.
as_pg() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }
free_port() { python3 -c 'import socket; s=socket.socket(); s.bind(("127.0.0.1",0)); print(s.getsockname()[1])'; }
wait_for() { # wait_for SECONDS WHAT COMMAND...
  local limit=$1 what=$2; shift 2
  local end=$((SECONDS + limit))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || fail "waited $limit s for: $what"
    read -rt 0.2 <> <(:) || :
  done
}
start() { # start NAME COMMAND...: in the background, log in $WORK/NAME.log
  local name=$1; shift
  "$@" >>"$WORK/$name.log" 2>&1 &
  PIDS[$name]=$!
}
stop() { # stop NAME [SIGNAL]
  local pid=${PIDS[$1]:-}
  [ -n "$pid" ] || return 0
  kill "-${2:-TERM}" "$pid" 2>/dev/null || :
  wait "$pid" 2>/dev/null || :
  unset "PIDS[$1]"
}
cleanup() {
  local status=$?
  $KEEP && [ $status = 0 ] && return
  stop klio-stream; stop klio-server; stop s3
  local data
  for data in pg pitr bucket; do as_pg "$PGBIN/pg_ctl" -D "$WORK/db/$data" -m immediate stop >/dev/null 2>&1 || :; done
  if [ $status = 0 ]; then rm -rf "$WORK"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

PGPORT=$(free_port); S3PORT=$(free_port); GRPC=$(free_port); ADMIN=$(free_port); PROM=$(free_port); SIDE=$(free_port); SIDEPROM=$(free_port)
sql() { sql_at "$PGPORT" "$1"; }
sql_at() { as_pg psql -X -q -t -A -h "$WORK/sock" -p "$1" -U postgres -d postgres -c "$2"; }

step "1. A scratch PostgreSQL ($("$PGBIN/postgres" --version))"
mkdir -p "$WORK/sock"; [ "$(id -u)" = 0 ] && chown postgres "$WORK/sock"
mkdir "$WORK/db"; [ "$(id -u)" = 0 ] && chown postgres "$WORK/db"
as_pg "$PGBIN/initdb" --data-checksums -D "$WORK/db/pg" -U postgres -A trust >"$WORK/initdb.log" 2>&1 || fail "initdb"
# wal_keep_size keeps PostgreSQL's own segments, only so that the demo can compare them at the end.
as_pg "$PGBIN/pg_ctl" -D "$WORK/db/pg" -l "$WORK/sock/postgres.log" -w start -o \
  "-p $PGPORT -k $WORK/sock -c listen_addresses='' -c wal_keep_size=4GB -c max_wal_size=4GB" >/dev/null || fail "start PostgreSQL"
say "socket $WORK/sock, port $PGPORT"

step "2. An S3 endpoint (stand-in for your object store; signatures are checked)"
start s3 "$BIN/klio-test-s3" --root "$WORK/s3" --port "$S3PORT" --bucket backups --access-key demo --secret-key demosecret
say "http://127.0.0.1:$S3PORT, bucket 'backups'"

step "3. klio-server: configuration, certificates and a client bundle, all from one command"
"$BIN/klio-server" init "$WORK/server" --cluster demo --listen "127.0.0.1:$GRPC" --admin-listen "127.0.0.1:$ADMIN" | show
SETTINGS=$(cat <<TOML

[tier2]
url = "s3://backups/klio"
endpoint = "http://127.0.0.1:$S3PORT"
region = "us-east-1"
access_key_id = "demo"
secret_access_key = "demosecret"

[queue]
executable = "$NATS"
TOML
)
printf '%s\n' "$SETTINGS" >>"$WORK/server/klio-server.toml"
# --debug: log lines carry the trace ids that an exporter would send. A collector takes them with OTEL_TRACES_EXPORTER=otlp.
start_server() {
  start klio-server env OTEL_METRICS_EXPORTER=prometheus OTEL_EXPORTER_PROMETHEUS_HOST=127.0.0.1 \
    OTEL_EXPORTER_PROMETHEUS_PORT="$PROM" "$BIN/klio-server" --debug run -c "$WORK/server/klio-server.toml"
  wait_for 30 "klio-server ready" curl -sf "http://127.0.0.1:$ADMIN/readyz"
}
start_server
say "ready: TLS 1.3 with client certificates on 127.0.0.1:$GRPC; its own NATS JetStream queue runs as a child process"

IDENTITY=$(sed -n 's/^identity_file *= *"\([^"]*\)".*/\1/p' "$WORK/server/klio-server.toml")
case $IDENTITY in /*) ;; *) IDENTITY=$WORK/server/$IDENTITY ;; esac
say "everything it stores is encrypted to the age identity $IDENTITY: keep a copy of that file elsewhere"

# The sidecar runs beside PostgreSQL, as its user; the bundle goes there.
mkdir "$WORK/sidecar"
cp "$WORK/server/clients/klio@demo/"* "$WORK/sidecar/"
BUNDLE=$WORK/sidecar/klio.toml
[ "$(id -u)" = 0 ] && chown -R postgres "$WORK/sidecar"
export KLIO_POSTGRES__DSN="host=$WORK/sock port=$PGPORT user=postgres dbname=postgres"
klio() { as_pg "$BIN/klio" "$@"; }

step "4. klio check: is everything fit?"
klio check -c "$BUNDLE" 2>&1 | show || :

step "5. klio stream: from now on every byte of WAL goes to the server"
start_stream() {
  local command=(env OTEL_METRICS_EXPORTER=prometheus OTEL_EXPORTER_PROMETHEUS_HOST=127.0.0.1 \
    OTEL_EXPORTER_PROMETHEUS_PORT="$SIDEPROM" "$BIN/klio" --debug stream --admin "127.0.0.1:$SIDE" -c "$BUNDLE")
  # No runuser in between: its pid would not be klio's.
  [ "$(id -u)" = 0 ] && command=(setpriv --reuid postgres --regid postgres --init-groups "${command[@]}")
  start klio-stream "${command[@]}"
  wait_for 30 "streaming" sh -c "'$BIN/klio' status -c '$BUNDLE' --json | grep -q '\"connected\": *true'"
}
start_stream
sql "alter system set synchronous_standby_names = 'klio'" ; sql "select pg_reload_conf()" >/dev/null
say "and PostgreSQL is told to wait for it (synchronous_standby_names = 'klio'):"
say "a COMMIT returns only when its WAL is fsynced on klio-server. RPO 0."

step "6. Load: pgbench, 4 clients, and a SIGKILL for klio-server in the middle"
as_pg "$PGBIN/pgbench" -q -i -s 20 -h "$WORK/sock" -p "$PGPORT" -U postgres postgres >"$WORK/pgbench-init.log" 2>&1 || fail "pgbench -i"
as_pg "$PGBIN/pgbench" -n -c 4 -j 2 -T 15 -P 3 -h "$WORK/sock" -p "$PGPORT" -U postgres postgres >"$WORK/pgbench.log" 2>&1 &
PIDS[pgbench]=$!
wait_for 10 "load running" grep -q 'progress: 3' "$WORK/pgbench.log"
stop klio-server KILL
say "klio-server is dead (SIGKILL). PostgreSQL goes on writing WAL, and commits wait ..."
start_server
say "... and it is back: it recovered its journals, the sidecar reconnected, commits go on."
wait "${PIDS[pgbench]}" || fail "pgbench lost its connection"
unset 'PIDS[pgbench]'
grep -E '^(tps|number of transactions actually|latency average)' "$WORK/pgbench.log" | show

step "7. What is durable, what is archived"
LAST=$(sql "select pg_walfile_name(pg_switch_wal())")
# The switched segment is complete once its successor is written to.
sql "create table after_switch(x int)"
SEGMENTS=$WORK/s3/backups/klio/demo/wal/00000001
wait_for 60 "segment $LAST archived" test -s "$SEGMENTS/$LAST.zst.age"
wait_for 30 "archive lag 0" sh -c "'$BIN/klio' status -c '$BUNDLE'"
klio status -c "$BUNDLE" | show
klio list wal -c "$BUNDLE" | show

step "8. The archived segments are byte for byte PostgreSQL's own"
same=0
for object in "$SEGMENTS"/*.zst.age; do
  name=$(basename "$object" .zst.age)
  [ -f "$WORK/db/pg/pg_wal/$name" ] || continue
  age -d -i "$IDENTITY" "$object" | zstd -dcq | cmp - "$WORK/db/pg/pg_wal/$name" || fail "segment $name differs"
  same=$((same + 1))
done
[ $same -gt 0 ] || fail "no archived segment to compare"
say "$same segments compared with 'age -d | zstd -d' and cmp: all equal, across the crash"

step "9. klio backup: a base backup of the running PostgreSQL"
klio backup --debug -c "$BUNDLE" 2>"$WORK/klio-backup.log" | show
TRACE=$(sed -n '/trace_id=[0-9a-f]\{32\}/{s/.*trace_id=\([0-9a-f]\{32\}\).*/\1/p;q}' "$WORK/klio-backup.log")
[ -n "$TRACE" ] || fail "the backup logged no trace id"
klio list backups -c "$BUNDLE" | show

step "10. More work, and an accident"
sql "create table orders (id bigint generated always as identity primary key, what text, at timestamptz default clock_timestamp())"
sql "insert into orders (what) select md5(g::text) from generate_series(1, 50000) g"
as_pg "$PGBIN/pgbench" -n -c 4 -j 2 -T 4 -h "$WORK/sock" -p "$PGPORT" -U postgres postgres >"$WORK/pgbench2.log" 2>&1 || fail "pgbench"
sql "insert into orders (what) values ('the last good order')"
BEFORE=$(sql "select clock_timestamp()")
say "$(sql "select count(*) from orders") orders at $BEFORE. Then somebody types:"
say "  DELETE FROM orders;   -- and forgets the WHERE"
sql "delete from orders"
sql "insert into orders (what) values ('life goes on')"
say "$(sql "select count(*) from orders") order left. Synchronous replication protects from none of this."

step "11. klio restore: the moment before, in a new directory, beside the running primary"
T=$SECONDS
klio restore -c "$BUNDLE" --to "$WORK/db/pitr" --target-time "$BEFORE" --target-action promote 2>&1 | show
PITR=$(free_port)
start_copy() { # start_copy DIR PORT: no streaming from it, no waiting for anybody
  as_pg "$PGBIN/pg_ctl" -D "$WORK/db/$1" -l "$WORK/sock/$1.log" -w -t 300 start -o \
    "-p $2 -k $WORK/sock -c listen_addresses='' -c synchronous_standby_names=''" >/dev/null || fail "start $1: see $WORK/sock/$1.log"
  wait_for 120 "recovery of $1" sh -c "psql -X -q -t -A -h '$WORK/sock' -p $2 -U postgres -d postgres -c 'select pg_is_in_recovery()' | grep -q f"
}
start_copy pitr "$PITR"
[ "$(sql_at "$PITR" "select count(*) from orders")" = 50001 ] || fail "the orders are not back"
say "$(sql_at "$PITR" "select count(*) from orders") orders are back, '$(sql_at "$PITR" "select what from orders order by id desc limit 1")' among them ($((SECONDS - T)) s)"
as_pg "$PGBIN/pg_ctl" -D "$WORK/db/pitr" -m fast stop >/dev/null

step "12. klio drill: prove that a restore works, before it is needed"
klio drill -c "$BUNDLE" 2>&1 | show

step "13. The worst day: the server's disk and the primary are lost. What is left: the bucket and the key"
LAST=$(sql "select pg_walfile_name(pg_switch_wal())")
sql "create table after_all(x int)"
wait_for 60 "segment $LAST archived" test -s "$SEGMENTS/$LAST.zst.age"
wait_for 60 "the backup archived" sh -c "ls '$WORK/s3/backups/klio/demo/backups/'*.json"
stop klio-server KILL; stop klio-stream KILL
as_pg "$PGBIN/pg_ctl" -D "$WORK/db/pg" -m immediate stop >/dev/null
mkdir "$WORK/safe"; cp "$IDENTITY" "$WORK/safe/identity.txt"
rm -rf "$WORK/server" "$WORK/db/pg"
cat >"$WORK/safe/bucket.toml" <<TOML
[tier2]
endpoint = "http://127.0.0.1:$S3PORT"
region = "us-east-1"
access_key_id = "demo"
secret_access_key = "demosecret"
TOML
[ "$(id -u)" = 0 ] && chown -R postgres "$WORK/safe"
say "rm -rf server/ and the data directory of PostgreSQL: gone."
T=$SECONDS
klio restore -c "$WORK/safe/bucket.toml" --from s3://backups/klio --identity "$WORK/safe/identity.txt" --cluster demo \
  --to "$WORK/db/bucket" --latest --target-action promote 2>&1 | show
NEW=$(free_port)
start_copy bucket "$NEW"
[ "$(sql_at "$NEW" "select count(*) from orders")" = 1 ] || fail "the restored database is not the newest state"
[ "$(sql_at "$NEW" "select sum(abalance) from pgbench_accounts")" = "$(sql_at "$NEW" "select sum(delta) from pgbench_history")" ] \
  || fail "balances and history differ"
say "PostgreSQL is back from the bucket alone in $((SECONDS - T)) s; $(sql_at "$NEW" "select count(*) from pgbench_history") transactions of pgbench, and the sums agree"

step "14. Life goes on: a new klio-server with the same key and bucket, and the restored PostgreSQL streams to it"
"$BIN/klio-server" init "$WORK/server" --cluster demo --listen "127.0.0.1:$GRPC" --admin-listen "127.0.0.1:$ADMIN" >/dev/null
cp "$WORK/safe/identity.txt" "$WORK/server/$(basename "$IDENTITY")"
printf '%s\n' "$SETTINGS" >>"$WORK/server/klio-server.toml"
cp "$WORK/server/clients/klio@demo/"* "$WORK/sidecar/"
[ "$(id -u)" = 0 ] && chown -R postgres "$WORK/sidecar"
export KLIO_POSTGRES__DSN="host=$WORK/sock port=$NEW user=postgres dbname=postgres"
start_server
start_stream
sql_at "$NEW" "insert into orders (what) values ('the first one after it')"
LAST=$(sql_at "$NEW" "select pg_walfile_name(pg_switch_wal())")
sql_at "$NEW" "create table after_switch_2(x int)"
wait_for 60 "segment $LAST archived" test -s "$WORK/s3/backups/klio/demo/wal/${LAST:0:8}/$LAST.zst.age"
klio status -c "$BUNDLE" | show || :

step "15. What it measured and what it did"
OUT=$PWD/target/demo; rm -rf "$OUT"; mkdir -p "$OUT"
curl -sf "http://127.0.0.1:$PROM/metrics" >"$OUT/klio-server.metrics.txt" || fail "scrape klio-server"
curl -sf "http://127.0.0.1:$SIDE/metrics" >"$OUT/klio-stream.metrics.txt" || fail "scrape klio stream"
cp "$WORK/klio-backup.log" "$WORK/klio-server.log" "$WORK/klio-stream.log" "$OUT/"
grep -hE '^klio_(wal_(written_total|latest_written|lag)|consumer_(written_total|latest)|queue_messages|stream_connected|base_snapshots|recovery_)' \
  "$OUT"/*.metrics.txt | sort -u | sed -n 1,20p | show
say "The backup of step 9 is one trace, from the command to the bucket. Its id in the logs of both programs:"
for log in klio-backup klio-server; do
  lines=$(grep -c "trace_id=$TRACE" "$OUT/$log.log") || fail "trace id $TRACE is not in $log.log"
  say "\$ grep $TRACE target/demo/$log.log   # $lines lines"
  sed -nE "s/^([^ ]+) +([A-Z]+) .*: (backup begins|backup committed|a backup is complete|a backup is in tier 2) .* (trace_id=$TRACE) .*/\\1 \\2 \\3 ... \\4/p" \
    "$OUT/$log.log" | show
done

step "Done in $((SECONDS - STARTED)) s"
if $KEEP; then
  say "Metrics:  http://127.0.0.1:$PROM/metrics (klio-server)   http://127.0.0.1:$SIDE/metrics (klio stream)"
else
  say "Metrics:  file://$OUT/klio-server.metrics.txt   file://$OUT/klio-stream.metrics.txt"
fi
say "Trace id: $TRACE"
if $KEEP; then
  PIDFILE=$WORK/pids; printf '%s\n' "${PIDS[@]}" >"$PIDFILE"
  say "Everything is still running: PostgreSQL, klio-server, klio stream, the bucket. Go on by hand:"
  say "  psql -h $WORK/sock -p $NEW -U postgres postgres"
  say "  $( [ "$(id -u)" = 0 ] && echo 'runuser -u postgres -- ')$BIN/klio list -c $BUNDLE"
  say "Stop it:"
  say "  $( [ "$(id -u)" = 0 ] && echo 'runuser -u postgres -- ')$PGBIN/pg_ctl -D $WORK/db/bucket stop -m fast; kill \$(cat $PIDFILE); rm -rf $WORK"
  trap - EXIT
else
  say "Everything is stopped and $WORK is removed. 'make demo DEMO_ARGS=--keep' leaves it running, with live metrics."
fi
