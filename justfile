# Daily work. `just` lists what there is.

_list:
    @just --list --unsorted

# The service and 28 simulated subsystems, live on the terminal.
demo:
    cargo run -- demo

# The tests, as the README has them.
test:
    cargo test

# What must hold before a commit: formatting, lints, docs, tests, and that tests notice changes of what it changes.
check: && mutants
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo clippy --package peak -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
    cargo test

# Mutation tests of what differs from a revision, in this checkout, which is restored after each. Needs cargo-mutants.
mutants revision="HEAD":
    git diff {{ revision }} > target/mutants.diff
    cargo mutants --in-place --in-diff target/mutants.diff --output target

# The manual pages and completions of the release build, and the changelog of the package, in target/share.
share:
    cargo build --release --locked
    rm -rf target/share
    mkdir -p target/share/man
    target/release/orchestrator man target/share/man
    gzip --best --no-name < CHANGELOG.md > target/share/changelog.gz
    for shell in bash zsh fish; do target/release/orchestrator completions $shell > target/share/orchestrator.$shell; done

# The Debian package, in target/debian. Needs cargo-deb.
deb: share
    cargo deb --no-build --locked

# Builds, checks and signs what a release consists of, in target/dist. The key is one of SSH. Needs cargo-deb.
release key="~/.ssh/id_ed25519":
    deploy/release {{ key }}

# The figures, each beside its floor in the same run.
bench:
    cargo bench --bench cycle

# The long runs: 100,000 random fleets, 1,000 kills, an hour of fuzzing, a million strangers, and a minute
# under siege.
soak:
    ORCHESTRATOR_TEST_CASES=100000 cargo test --release --test properties
    ORCHESTRATOR_TORTURE_KILLS=1000 cargo test --release --test outside torture::
    ORCHESTRATOR_TEST_FUZZ_SECONDS=900 cargo test --release --test outside fuzz:: -- --test-threads 1 --skip stranger
    ORCHESTRATOR_TEST_FUZZ_CASES=1000000 cargo test --release --test outside fuzz::no_stranger -- --nocapture
    cargo test --release --test outside siege:: -- --ignored --nocapture

# The contract, by buf's rules and against the released ones. Needs npm.
lint-proto:
    npm ci --silent --prefix .ci
    .ci/node_modules/.bin/buf lint proto
    .ci/node_modules/.bin/buf lint clients/node/dreamnet/proto
    for released in proto/released/*.binpb; do .ci/node_modules/.bin/buf breaking proto --against "$released"; done

# The dashboard's scripts, and JavaScript and TypeScript elsewhere: types and lints. Needs npm.
lint-scripts:
    npm ci --silent --prefix .ci
    .ci/node_modules/.bin/tsc -p src/web/dashboard/jsconfig.json
    .ci/node_modules/.bin/biome lint --error-on-warnings src/web/dashboard tests/dashboard examples/node clients/node

# Licenses, advisories and sources of the dependencies. Needs cargo-deny.
deny:
    cargo deny check
