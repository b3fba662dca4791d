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

# The figures, each beside its floor in the same run.
bench:
    cargo bench --bench cycle

# The long runs: 100,000 random fleets, 1,000 kills, an hour of fuzzing, a million strangers, and a minute
# under siege.
soak:
    ORCHESTRATOR_TEST_CASES=100000 cargo test --release --test properties
    ORCHESTRATOR_TORTURE_KILLS=1000 cargo test --release --test torture
    ORCHESTRATOR_TEST_FUZZ_SECONDS=900 cargo test --release --test fuzz -- --test-threads 1 --skip stranger
    ORCHESTRATOR_TEST_FUZZ_CASES=1000000 cargo test --release --test fuzz stranger -- --nocapture
    cargo test --release --test siege -- --ignored --nocapture

# The contract, by buf's rules and against the released ones. Needs npm.
lint-proto:
    npm ci --silent --prefix .ci
    .ci/node_modules/.bin/buf lint proto
    for released in proto/released/*.binpb; do .ci/node_modules/.bin/buf breaking proto --against "$released"; done

# The dashboard's scripts, and JavaScript and TypeScript elsewhere: types and lints. Needs npm.
lint-scripts:
    npm ci --silent --prefix .ci
    .ci/node_modules/.bin/tsc -p src/web/dashboard/jsconfig.json
    .ci/node_modules/.bin/biome lint --error-on-warnings src/web/dashboard tests/dashboard examples/node

# Licenses, advisories and sources of the dependencies. Needs cargo-deny.
deny:
    cargo deny check
