#!/usr/bin/env bash
# Do the tests notice when the program is wrong? Changes one thing at a time in a copy of the tree and runs the tests that should notice.
#
#   mutants.sh syncs           each call that makes something durable is left out in turn; tests/tests/klio/faults/syscalls.rs must fail
#   mutants.sh units [FILE...] cargo-mutants on the files below where promises P1 to P13 rest on them (or on these of them); each with
#                              the unit tests of its own module; SHARD=K/N in the environment: every N-th mutant only, beginning with K
#
# Results: target/mutants/syncs.txt and target/mutants/units/. What is in there is not run again, so a run that was broken off goes on
# where it was; remove a line, or all, to run it again. Ends with 1 when anything survived.
# What must stay true: the tree itself is never changed; a mutant that does not compile or does not apply is an error, not "noticed".
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
OUT="$ROOT/target/mutants"
TREE="$OUT/tree"

# name|file|what is there|what is put there|test of tests/tests/klio/faults/syscalls.rs
SYNCS='
journal|storage/src/disk/real.rs|self.0.sync_data()|Ok(())|a_commit_returns_after_the_journal_was_synced
file|storage/src/disk/real.rs|self.0.sync_all()|Ok(())|every_name_in_both_tiers_is_durable
directory|storage/src/disk/real.rs|File::open(path)?.sync_all()|File::open(path).map(drop)|every_name_in_both_tiers_is_durable
restored-files|sidecar/src/restore/finish.rs|Ok(rustix::fs::syncfs(&place)?)|Ok(drop(place))|a_restore_is_on_disk_before_it_can_be_started
restored-control|sidecar/src/restore/finish.rs|        file.sync_all()?;|        drop(file);|a_restore_is_on_disk_before_it_can_be_started
restored-content|sidecar/src/restore/finish.rs|file.write_all(content).and_then(\|()\| file.sync_all())|file.write_all(content)|a_restore_is_on_disk_before_it_can_be_started
restored-directory|sidecar/src/restore/finish.rs|File::open(directory).and_then(\|directory\| directory.sync_all())|File::open(directory).map(drop)|a_restore_is_on_disk_before_it_can_be_started
fetched-file|sidecar/src/wal_source/place.rs|self.file.sync_all().map_err(|Ok(()).map_err(|a_restore_is_on_disk_before_it_can_be_started
fetched-directory|sidecar/src/wal_source/place.rs|File::open(directory).and_then(\|directory\| directory.sync_all())|File::open(directory)|a_restore_is_on_disk_before_it_can_be_started
'

# file|package|unit tests that must notice
UNITS='
server/src/registry.rs|klio-server|registry::
server/src/receive/compare.rs|klio-server|receive::
server/src/receive/session.rs|klio-server|receive::
server/src/quota.rs|klio-server|quota::
server/src/base/positions.rs|klio-server|base::
server/src/base/holdings.rs|klio-server|base::
server/src/base/commit.rs|klio-server|base::
server/src/consumer/worker.rs|klio-server|consumer::
server/src/maintenance/worker/orphans.rs|klio-server|maintenance::
server/src/maintenance/worker/prune.rs|klio-server|maintenance::
server/src/maintenance/worker/verify.rs|klio-server|maintenance::
server/src/clock.rs|klio-server|clock::
server/src/access/auth.rs|klio-server|access::
server/src/access/roles.rs|klio-server|access::
sidecar/src/streamer/plan.rs|klio-sidecar|streamer::
sidecar/src/streamer/choice.rs|klio-sidecar|streamer::
sidecar/src/streamer/flow.rs|klio-sidecar|streamer::
sidecar/src/restore/settings.rs|klio-sidecar|restore::
sidecar/src/restore/target.rs|klio-sidecar|restore::
sidecar/src/restore/finish.rs|klio-sidecar|restore::
sidecar/src/restore/wal.rs|klio-sidecar|restore::
sidecar/src/restore/time.rs|klio-sidecar|restore::
sidecar/src/wal_source/place.rs|klio-sidecar|wal_source::
sidecar/src/cli/wal_fetch.rs|klio-sidecar|cli::
storage/src/wal/overlap.rs|klio-storage|wal::
storage/src/wal/seam.rs|klio-storage|wal::
storage/src/wal/journal.rs|klio-storage|wal::
storage/src/catalog/retention/rules.rs|klio-storage|catalog::
storage/src/generations.rs|klio-storage|generations::
'

say() { printf 'mutants: %s\n' "$*"; }

# The committed files and what is changed in the work tree, with this tree's tools.
copy_tree() {
    rm -rf "$TREE"
    mkdir -p "$TREE"
    (cd "$ROOT" && git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - 2>/dev/null) | tar -x -C "$TREE"
    ln -sfn "$ROOT/.tools" "$TREE/.tools"
}

# change FILE FROM TO: exactly one place, or an error.
change() {
    python3 - "$@" <<'PY'
import sys
path, old, new = sys.argv[1:]
text = open(path).read()
# Unit tests at the end of a file may say the same.
code, mark, tests = text.partition("#[cfg(test)]")
if code.count(old) != 1:
    sys.exit(f"mutants: error: {path} has {code.count(old)} times: {old}")
open(path, "w").write(code.replace(old, new) + mark + tests)
PY
}

syncs() {
    local results="$OUT/syncs.txt" survived=0 line name file old new test
    mkdir -p "$OUT"
    touch "$results"
    export CARGO_TARGET_DIR="$OUT/target"
    # The bar stands between columns, and with a backslash for itself.
    while IFS= read -r line; do
        [ -n "$line" ] || continue
        line="${line//\\|/$'\x01'}"
        IFS='|' read -r name file old new test <<<"$line"
        old="${old//$'\x01'/|}" new="${new//$'\x01'/|}"
        grep -q "^$name " "$results" && continue
        say "$name: $file without $old"
        copy_tree
        change "$TREE/$file" "$old" "$new"
        (cd "$TREE" && cargo build --workspace --bins --quiet &&
            cargo test -p klio-tests --test klio --no-run --quiet)
        if (cd "$TREE" && cargo test -p klio-tests --test klio "$test" >"$OUT/$name.log" 2>&1); then
            echo "$name SURVIVED" >>"$results"
        elif grep -q "^test .*::$test .*FAILED" "$OUT/$name.log"; then
            echo "$name noticed" >>"$results"
        else
            say "error: $name: the test did not run; see $OUT/$name.log"
            return 1
        fi
    done <<<"$SYNCS"
    cat "$results"
    ! grep -q SURVIVED "$results" || survived=1
    return $survived
}

units() {
    local bad=0 file package filter place
    command -v cargo-mutants >/dev/null || { say "error: no cargo-mutants; hint: cargo install cargo-mutants --locked"; return 1; }
    # One tree and one target directory for all files, so that each mutant costs one incremental build.
    copy_tree
    export CARGO_TARGET_DIR="$OUT/target" CARGO_PROFILE_DEV_DEBUG=0
    while IFS='|' read -r file package filter; do
        [ -n "$file" ] || continue
        [ $# = 0 ] || [[ " $* " == *" $file "* ]] || continue
        place="$OUT/units/${file//\//_}"
        [ ! -e "$place/done" ] || { say "$file: done before"; continue; }
        mkdir -p "$place"
        say "$file"
        # Goes on with what an earlier run left, mutant by mutant.
        (cd "$TREE" && cargo mutants --in-place --iterate ${SHARD:+--shard "$SHARD"} --no-shuffle --colors never --output "$place" \
            --package "$package" --file "$file" -- --lib "$filter") || true
        if [ -f "$place/mutants.out/outcomes.json" ] && ! [ -s "$place/mutants.out/missed.txt" ]; then
            [ -n "${SHARD:-}" ] || touch "$place/done"
        else
            bad=1
        fi
        printf '%s: caught %s, missed %s, unviable %s, timeout %s\n' "$file" \
            $(for list in caught missed unviable timeout; do wc -l <"$place/mutants.out/$list.txt"; done) | tee -a "$OUT/units.txt"
        sed 's/^/  missed: /' "$place/mutants.out/missed.txt"
    done <<<"$UNITS"
    return $bad
}

case "${1:-}" in
    syncs) syncs ;;
    units) shift; units "$@" ;;
    *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
