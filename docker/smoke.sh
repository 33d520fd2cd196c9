#!/usr/bin/env bash
# Build the CPU image and run the quickstart and two processes in it, for those who have docker or podman:
#   docker/smoke.sh [IMAGE]
# With IMAGE, such as celltron:cuda, nothing is built and that one is tried (on its CPU).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

engine=$(command -v docker || command -v podman) || {
    echo "neither docker nor podman is on the PATH; install one to try the image" >&2
    exit 2
}
image=${1:-celltron:smoke}
if [[ $# -eq 0 ]]; then
    "$engine" build --file docker/cpu.Dockerfile --tag "$image" .
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# As whoever runs this, so that what is written to the folder is theirs. To bash before 4.4 an empty array is an unset one.
in_image() {
    local options=()
    if [[ "$(basename "$engine")" == podman ]]; then options=(--userns=keep-id); fi
    "$engine" run --rm --init --user "$(id -u):$(id -g)" --env HOME=/tmp ${options[@]+"${options[@]}"} \
        --volume "$folder:/data" --workdir /data "$@"
}

in_image "$image" --version
in_image --entrypoint python "$image" /opt/celltron/recipes/quickstart.py --out quickstart
in_image --entrypoint torchrun "$image" --standalone --nproc-per-node=2 -m celltron.cli.main train \
    --config /opt/celltron/recipes/configs/geneformer_tiny.yaml --data quickstart/cells.store --out two_processes \
    --device cpu --max-steps 4 schedule.warmup_steps=2
in_image "$image" verify two_processes
test -s "$folder/quickstart/summary.json"
echo "$image works"
