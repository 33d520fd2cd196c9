#!/usr/bin/env bash
# What CI runs, by hand: ci/run.sh lint | types | layering | test | all. Further arguments go to the tool.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${VIRTUAL_ENV:-}" && -x .venv/bin/python ]]; then
    export PATH="$PWD/.venv/bin:$PATH"
fi

run() {
    printf '+ %s\n' "$*" >&2
    "$@"
}

lint() {
    run ruff check "$@" .
}

types() {
    mkdir -p build/types/celltron
    ln -sfn "$PWD/recipes" build/types/celltron/recipes
    run mypy "$@"
}

layering() {
    run python -m pytest -q --noconftest "$@" tests/layering
}

# The packages', cells without PyTorch in their process, and a part of the others that takes as long as the rest.
tests_beside() {
    local failed=0
    run python -m pytest -q -p no:cacheprovider sub-packages/celltron-core sub-packages/celltron-cells || failed=1
    run python -m pytest -q -p no:cacheprovider sub-packages/celltron-models sub-packages/celltron-train || failed=1
    run python -m pytest -q -p no:cacheprovider tests/equivalence tests/golden tests/kill tests/launch tests/plan || failed=1
    return "$failed"
}

tests() {
    export HF_HUB_OFFLINE=1 # no test may need a network
    if [[ $# -gt 0 ]]; then
        run python -m pytest -q "$@"
        return
    fi
    # Two at a time, since most machines have two cores.
    local beside failed=0
    mkdir -p build
    tests_beside >build/tests_beside.log 2>&1 &
    beside=$!
    run python -m pytest -q tests --ignore tests/equivalence --ignore tests/golden --ignore tests/kill \
        --ignore tests/launch --ignore tests/plan || failed=1
    wait "$beside" || failed=1
    cat build/tests_beside.log
    run python -m pytest -q --doctest-modules -o consider_namespace_packages=true src recipes sub-packages/*/src || failed=1
    return "$failed"
}

stage="${1:-}"
shift || true
case "$stage" in
    lint) lint "$@" ;;
    types) types "$@" ;;
    layering) layering "$@" ;;
    test) tests "$@" ;;
    all)
        lint
        types
        layering
        tests "$@"
        ;;
    *)
        echo "usage: ci/run.sh lint | types | layering | test | all [arguments for the tool]" >&2
        exit 2
        ;;
esac
