# What a person types. `.ci/run` calls `make lint` and `make test`, so that a green machine and a green CI mean the same.
CARGO ?= cargo

# Programs installed for this tree come first, cargo-deny among them.
export PATH := $(CURDIR)/.tools/bin:$(PATH)

.PHONY: help tools build-tools test-tools lint-tools build test lint bench soak fuzz mutants demo collector docs clean

help:
	@echo 'make tools   install what is missing (PostgreSQL 15-18, nats-server, promtool, cargo-deny, ...); nothing is started'
	@echo 'make build   the programs, in target/debug'
	@echo 'make test    everything that can be tested on this machine'
	@echo 'make lint    formatting, clippy, licences and sources of dependencies'
	@echo 'make bench   the benchmarks of docs/benchmarks.md (release build)'
	@echo 'make soak    tests that kill at random moments, then the restore proof for ROUNDS random rounds from SEED: workload, kills, targets, comparison (default: 20, random); MOVES=a,b forces moves, LEG=file goes on where a run was broken off'
	@echo 'make fuzz    what parses foreign bytes, with CASES random ones from SEED (default: 20000, random)'
	@echo 'make mutants whether the tests notice when the program is wrong; results below target/mutants'
	@echo 'make demo    a narrated run of the whole on scratch directories'
	@echo 'make collector  docs/telemetry.md with a real OpenTelemetry Collector: otelcol (contrib) on PATH'
	@echo 'make docs    write the generated references below docs/'
	@echo 'make clean   build output and installed tools of this tree'

tools:
	@deploy/tools/install.sh

build-tools:
	@deploy/tools/install.sh --build

test-tools:
	@deploy/tools/install.sh --test

lint-tools:
	@deploy/tools/install.sh --lint

build: build-tools
	$(CARGO) build --workspace --bins

# The end-to-end tests start the programs of target/debug, which `cargo test` alone would not always build. One failure does not
# hide another: every test program runs. Seeds are fixed in .cargo/config.toml, so the same commit makes the same choices.
test: test-tools build
	@CARGO="$(CARGO)" deploy/tools/test.sh

# cargo deny's advisory check is left out: its database is a git repository that an offline machine cannot fetch.
lint: lint-tools
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) deny --log-level error check bans licenses sources

# The whole workspace, so that dependencies are those of the build before. Needs pgBackRest besides the usual tools.
bench:
	@deploy/tools/install.sh --bench
	$(CARGO) build --release --workspace --bins
	$(CARGO) build --release -p klio-server -p klio-sidecar --features klio-telemetry/bare --target-dir target/bare
	$(CARGO) bench --workspace --bench klio

# Debug programs: their assertions look harder. KLIO_BIN_DIR names others.
soak: test-tools build
	KLIO_TEST_SEED=$${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')} $(CARGO) test -p klio-tests --test klio -- kill
	$(CARGO) run --quiet -p klio-tests --bin klio-soak -- $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED)) $(if $(MOVES),--moves "$(MOVES)") $(if $(LEG),--leg "$(LEG)") $(SOAK_ARGS)

# What parses bytes of others, with any bytes: `make test` does it with a few hundred cases and a fixed seed.
fuzz:
	PROPTEST_RNG_SEED=$${SEED:-$$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')} PROPTEST_CASES=$${CASES:-20000} $(CARGO) test --workspace --lib -- no_bytes no_text bit_flip flipped_bit

# Whether the tests notice: calls that make things durable are left out, and cargo-mutants where it is installed. Hours; goes on where it was.
mutants: test-tools
	@deploy/tools/mutants.sh syncs
	@deploy/tools/mutants.sh units $(FILES)

demo: build-tools
	@deploy/demo.sh $(DEMO_ARGS)

# Not part of `test`: no registry that `tools` uses has the program.
collector: test-tools build
	$(CARGO) test -p klio-tests --test collector

docs: build
	@deploy/tools/docs.sh target/debug

clean:
	$(CARGO) clean
	rm -rf .tools
