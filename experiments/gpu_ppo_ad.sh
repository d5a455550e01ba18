#!/usr/bin/env bash
# The paper's comparison on a GPU, in calls of at most 10 minutes: plain PPO, then PPO with achievement distillation, each for
# SECONDS_EACH (200); the same call again goes on with both. Settings, metrics and figures of the runs go to OUT. Run folders,
# with two checkpoints of about 2 GB each, stay in RUNS (runs/gpu).
#   bash experiments/gpu_ppo_ad.sh OUT [FLAG...]                 seed 0, craftax_classic_pixels, a million steps
#   RUNS=runs/gpu1 bash experiments/gpu_ppo_ad.sh OUT --seed 1 --dtype bfloat16
#   RUNS=runs/crafter bash experiments/gpu_ppo_ad.sh OUT --env crafter
#   SECONDS_EACH=450 ONLY=distilled bash experiments/gpu_ppo_ad.sh OUT
# Afterwards: python experiments/runs.py publish NAME runs/gpu/plain (or OUT/plain)
set -euo pipefail
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
for what in ${ONLY:-plain distilled}; do
    folder=${RUNS:-runs/gpu}/$what
    distill=$([ "$what" = distilled ] && echo true || echo false)
    if [ -e "$folder/config.json" ]; then
        flags=(--resume "$folder" "$@")
    else
        flags=(--run_dir "$folder" --env craftax_classic_pixels --distill="$distill" --checkpoint_every 50000 "$@")
    fi
    # SIGTERM finishes the rollout, perhaps with an auxiliary phase and an evaluation, and saves
    timeout --signal TERM --kill-after 60 "${SECONDS_EACH:-200}" python3 algorithms/ppo_ad.py "${flags[@]}" ||
        { code=$?; [ $code -eq 124 ] || [ $code -eq 137 ] || [ $code -eq 143 ]; }
    mkdir -p "$out/$what"
    find "$folder" -maxdepth 1 -type f -exec cp {} "$out/$what/" \;
done
