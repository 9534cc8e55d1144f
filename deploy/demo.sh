#!/usr/bin/env bash
# The main job, narrated, on scratch directories: a real PostgreSQL, klio-server with its embedded queue,
# a real S3 endpoint, `klio stream`, load, a SIGKILL in the middle, and the proof that nothing is missing.
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

PROFILE=release
echo "Building klio (release; the first time takes some minutes) ..."
cargo build --quiet --release --workspace --bins
BIN=$PWD/target/$PROFILE
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
  as_pg "$PGBIN/pg_ctl" -D "$WORK/pg" -m immediate stop >/dev/null 2>&1 || :
  if [ $status = 0 ]; then rm -rf "$WORK"; fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

PGPORT=$(free_port); S3PORT=$(free_port); GRPC=$(free_port); ADMIN=$(free_port); PROM=$(free_port); SIDE=$(free_port)
sql() { as_pg psql -X -q -t -A -h "$WORK/sock" -p "$PGPORT" -U postgres -d postgres -c "$1"; }

step "1. A scratch PostgreSQL ($("$PGBIN/postgres" --version))"
mkdir -p "$WORK/sock"; [ "$(id -u)" = 0 ] && chown postgres "$WORK/sock"
mkdir "$WORK/pg"; [ "$(id -u)" = 0 ] && chown postgres "$WORK/pg"
as_pg "$PGBIN/initdb" -D "$WORK/pg" -U postgres -A trust >"$WORK/initdb.log" 2>&1 || fail "initdb"
# wal_keep_size keeps PostgreSQL's own segments, only so that the demo can compare them at the end.
as_pg "$PGBIN/pg_ctl" -D "$WORK/pg" -l "$WORK/sock/postgres.log" -w start -o \
  "-p $PGPORT -k $WORK/sock -c listen_addresses='' -c wal_keep_size=4GB -c max_wal_size=4GB" >/dev/null || fail "start PostgreSQL"
say "socket $WORK/sock, port $PGPORT"

step "2. An S3 endpoint (stand-in for your object store; signatures are checked)"
start s3 "$BIN/klio-test-s3" --root "$WORK/s3" --port "$S3PORT" --bucket backups --access-key demo --secret-key demosecret
say "http://127.0.0.1:$S3PORT, bucket 'backups'"

step "3. klio-server: configuration, certificates and a client bundle, all from one command"
"$BIN/klio-server" init "$WORK/server" --cluster demo --listen "127.0.0.1:$GRPC" --admin-listen "127.0.0.1:$ADMIN" | show
cat >>"$WORK/server/klio-server.toml" <<TOML

[tier2]
url = "s3://backups/klio"
endpoint = "http://127.0.0.1:$S3PORT"
region = "us-east-1"
access_key_id = "demo"
secret_access_key = "demosecret"

[queue]
executable = "$NATS"
TOML
start_server() {
  start klio-server env OTEL_METRICS_EXPORTER=prometheus OTEL_EXPORTER_PROMETHEUS_HOST=127.0.0.1 \
    OTEL_EXPORTER_PROMETHEUS_PORT="$PROM" "$BIN/klio-server" run -c "$WORK/server/klio-server.toml"
  wait_for 30 "klio-server ready" curl -sf "http://127.0.0.1:$ADMIN/readyz"
}
start_server
say "ready: TLS 1.3 with client certificates on 127.0.0.1:$GRPC; its own NATS JetStream queue runs as a child process"

BUNDLE=$WORK/server/clients/klio@demo/klio.toml
export KLIO_POSTGRES__DSN="host=$WORK/sock port=$PGPORT user=postgres dbname=postgres"
klio() { "$BIN/klio" "$@"; }

step "4. klio check: is everything fit?"
klio check -c "$BUNDLE" 2>&1 | show || :

step "5. klio stream: from now on every byte of WAL goes to the server"
start klio-stream "$BIN/klio" stream -c "$BUNDLE"
wait_for 30 "streaming" sh -c "'$BIN/klio' status -c '$BUNDLE' --json | grep -q '\"connected\": *true'"
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
wait_for 60 "segment $LAST archived" test -s "$WORK/s3/backups/klio/demo/wal/00000001/$LAST.zst"
wait_for 30 "archive lag 0" sh -c "'$BIN/klio' status -c '$BUNDLE'"
klio status -c "$BUNDLE" | show
klio list wal -c "$BUNDLE" | show

step "8. The archived segments are byte for byte PostgreSQL's own"
same=0
for object in "$WORK"/s3/backups/klio/demo/wal/00000001/*.zst; do
  name=$(basename "$object" .zst)
  [ -f "$WORK/pg/pg_wal/$name" ] || continue
  zstd -dcq "$object" | cmp - "$WORK/pg/pg_wal/$name" || fail "segment $name differs"
  same=$((same + 1))
done
[ $same -gt 0 ] || fail "no archived segment to compare"
say "$same segments compared with 'zstd -d' and cmp: all equal, across the crash"
klio wal-fetch -c "$BUNDLE" "$LAST" "$WORK/fetched"
cmp "$WORK/fetched" "$WORK/pg/pg_wal/$LAST" && say "klio wal-fetch $LAST gives it back as restore_command will ask for it"

step "9. Metrics (http://127.0.0.1:$PROM/metrics)"
curl -sf "http://127.0.0.1:$PROM/metrics" | grep -E '^klio_(wal|consumer|queue)_' | grep -v _bucket | sort | head -n 24 | show

step "Done in $((SECONDS - STARTED)) s"
if $KEEP; then
  PIDFILE=$WORK/pids; printf '%s\n' "${PIDS[@]}" >"$PIDFILE"
  say "Everything is still running. Go on by hand:"
  say "  export KLIO_POSTGRES__DSN='$KLIO_POSTGRES__DSN'"
  say "  $BIN/klio status -c $BUNDLE"
  say "  psql -h $WORK/sock -p $PGPORT -U postgres postgres"
  say "  curl http://127.0.0.1:$ADMIN/readyz"
  say "Stop it:"
  say "  kill \$(cat $PIDFILE); $( [ "$(id -u)" = 0 ] && echo 'runuser -u postgres -- ')$PGBIN/pg_ctl -D $WORK/pg stop; rm -rf $WORK"
  trap - EXIT
else
  say "Everything is stopped and $WORK is removed. 'make demo DEMO_ARGS=--keep' leaves it running."
fi
