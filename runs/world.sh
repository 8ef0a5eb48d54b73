#!/bin/sh
# Train the small default model on the synthetic world, from nothing: runs/world.sh [SEED ...] (default: 1 2 3).
#
# About half an hour a seed on one CPU core; several seeds may run at once. Each makes runs/world/SEED/world-base, trained in
# ordinary prompts alone, and runs/world/SEED/world-mixed, trained by every method. A stopped run resumes.
#
# To ship the model of seed 2 with kvgraph (its logs go to runs/shipped/), and to publish what the models can do:
#   runs/world.sh --ship 2
#   python -m benchmarks.world kvgraph/demo/model runs/world/[13]/world-mixed \
#     --before runs/world/2/world-base runs/world/[13]/world-base --out benchmarks/results/world.json --card
set -eu
cd "$(dirname "$0")/.."
KVGRAPH=${KVGRAPH:-.venv/bin/kvgraph}
export OMP_NUM_THREADS=1

if [ "${1-}" = --ship ]; then
    seed=${2:?give the seed whose model to ship}
    cp "runs/world/$seed/world-mixed"/* kvgraph/demo/model/ # beside its card, README.md
    for stage in world-1hop world-2hop world-base world-mixed; do
        cp "runs/world/$seed/$stage.run/config.json" "runs/shipped/$stage.config.json"
        cp "runs/world/$seed/$stage.run/log.jsonl" "runs/shipped/$stage.log.jsonl"
    done
    exit
fi

for seed in ${*:-1 2 3}; do
    out=runs/world/$seed
    mkdir -p "$out"
    before=
    for stage in world-1hop world-2hop world-base world-mixed; do
        if [ ! -d "$out/$stage" ]; then
            "$KVGRAPH" train --recipe "$stage" ${before:+--model "$before"} --seed "$seed" --out "$out/$stage.run"
            # The last one as it ships: 16 bits a weight, so that the table is the shipped model's.
            [ "$stage" = world-mixed ] && dtype=bfloat16 || dtype=float32
            "$KVGRAPH" train export "$out/$stage.run" "$out/$stage" --dtype $dtype
        fi
        before=$out/$stage
    done
done
