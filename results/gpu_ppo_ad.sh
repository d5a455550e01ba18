#!/usr/bin/env bash
# The paper's comparison on a GPU, in calls of at most 10 minutes: plain PPO, then PPO with achievement distillation, each for
# SECONDS_EACH (280); the same call again goes on with both. Settings, metrics and figures of the runs go to OUT. Run folders,
# with checkpoints of some GB, stay in runs/gpu.
#   bash results/gpu_ppo_ad.sh OUT [FLAG...]                          one seed, craftax_classic_pixels, a million steps
#   bash results/gpu_ppo_ad.sh OUT --num_seeds 3 --dtype bfloat16
#   SECONDS_EACH=590 ONLY=distilled bash results/gpu_ppo_ad.sh OUT
#   bash results/gpu_ppo_ad.sh OUT --env crafter
# Afterwards: python results/figures.py publish NAME runs/gpu/plain (or OUT/plain)
set -euo pipefail
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
for what in ${ONLY:-plain distilled}; do
    folder=runs/gpu/$what
    distill=$([ "$what" = distilled ] && echo true || echo false)
    if [ -e "$folder/config.json" ]; then
        flags=(--resume "$folder")
    else
        flags=(--run_dir "$folder" --env craftax_classic_pixels --distill="$distill" "$@")
    fi
    # SIGTERM finishes the rollout and saves
    timeout --signal TERM --kill-after 60 "${SECONDS_EACH:-280}" python3 algorithms/ppo_ad.py "${flags[@]}" ||
        { code=$?; [ $code -eq 124 ] || [ $code -eq 143 ]; }
    mkdir -p "$out/$what"
    find "$folder" -maxdepth 1 -type f -exec cp {} "$out/$what/" \;
done
