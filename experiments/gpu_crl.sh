#!/usr/bin/env bash
# The GPU figures, in calls of at most 10 minutes; results go to OUT.
#   bash experiments/gpu_crl.sh bench OUT     bench_depth, bench_scripts and bench_envs of results/ (batch 512; 512 copies)
#   bash experiments/gpu_crl.sh update OUT    bench_update: ways to compute a gradient step, kernels counted
#   bash experiments/gpu_crl.sh ratios OUT    bench_ratios: the designs against others
#   bash experiments/gpu_crl.sh tasks OUT     tasks_gpu.csv, the paper's ten tasks
#   bash experiments/gpu_crl.sh curve OUT ENV DEPTH [FLAG...]
# curve: learning for SECONDS_EACH (540), in OUT/ENV_depth_DEPTH; the same call again goes on. Where OUT is a new folder at each
# call, FROM=RUN_FOLDER names a copy of the last call's run folder, which is copied to OUT first. Afterwards:
#   python experiments/runs.py publish ENV_depth_DEPTH OUT/ENV_depth_DEPTH
set -euo pipefail
out=$(realpath "$2")
from=${FROM:+$(realpath "$FROM")}
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
case "$1" in
bench)
    timeout 570 python3 experiments/bench.py | tee "$out/bench.txt" || [ $? -eq 124 ]
    cp results/bench_*_gpu.csv "$out/"
    ;;
update | ratios)
    timeout 570 python3 "experiments/bench_$1.py" | tee "$out/$1.txt" || [ $? -eq 124 ]
    cp results/bench_*_gpu.csv "$out/"
    ;;
tasks)
    NUM_ENVS=512,4096 timeout 590 python3 experiments/bench_tasks.py paper | tee "$out/tasks.txt" || [ $? -eq 124 ]
    cp results/tasks_gpu.csv "$out/"
    ;;
curve)
    folder=$out/$3_depth_$4
    [ -z "$from" ] || [ -e "$folder" ] || cp -r "$from" "$folder"
    if [ -e "$folder/config.json" ]; then
        flags=(--resume "$folder" "${@:5}")
    else
        flags=(--run_dir "$folder" --env "$3" --depth "$4" --checkpoint_replay=false "${@:5}")
    fi
    # SIGTERM finishes the chunk and saves; without the replay a checkpoint is a few MB
    timeout --signal TERM --kill-after 60 "${SECONDS_EACH:-540}" python3 algorithms/crl.py "${flags[@]}" ||
        { code=$?; [ $code -eq 124 ] || [ $code -eq 137 ] || [ $code -eq 143 ]; }
    ;;
esac
