#!/usr/bin/env bash
# PEARL and CoCOA side by side on a GPU, in calls of at most 10 minutes: each for SECONDS_EACH (140) on each of FAMILIES
# (half_cheetah_vel half_cheetah_dir) with PEARL's published settings; the same call again goes on with all of them. Settings,
# metrics and figures of the runs go to OUT. Run folders, with two checkpoints of up to 1 GB each, stay in RUNS (runs/gpu).
#   bash experiments/gpu_cocoa.sh OUT [FLAG...]
#   FAMILIES=half_cheetah_vel SECONDS_EACH=280 bash experiments/gpu_cocoa.sh OUT --seed 1
# Wall-clock per million gradient steps: in OUT/*/metrics.csv, (seconds - compile_seconds) / gradient_steps.
# Afterwards: python experiments/runs.py publish NAME OUT/half_cheetah_vel_cocoa
# and, where the run folders are: python experiments/probe_embedding.py runs/gpu/half_cheetah_vel_cocoa
set -euo pipefail
out=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
for family in ${FAMILIES:-half_cheetah_vel half_cheetah_dir}; do
    for what in ${ONLY:-pearl cocoa}; do
        folder=${RUNS:-runs/gpu}/${family}_$what
        contrastive=$([ "$what" = cocoa ] && echo true || echo false)
        if [ -e "$folder/config.json" ]; then
            flags=(--resume "$folder" "$@")
        else
            flags=(--run_dir "$folder" --env "$family" --contrastive="$contrastive" "$@")
        fi
        # SIGTERM finishes the iteration, saves and exits
        timeout --signal TERM --kill-after 60 "${SECONDS_EACH:-140}" python3 algorithms/cocoa.py "${flags[@]}" ||
            { code=$?; [ $code -eq 124 ] || [ $code -eq 137 ] || [ $code -eq 143 ]; }
        mkdir -p "$out/${family}_$what"
        find "$folder" -maxdepth 1 -type f -exec cp {} "$out/${family}_$what/" \;
    done
done
