#!/usr/bin/env bash
# The GPU figures, in calls of at most 10 minutes; results go to OUT.
#   bash experiments/gpu_crl.sh bench OUT     bench_depth, bench_scripts and bench_envs of results/ (batch 512; 512 copies)
#   bash experiments/gpu_crl.sh update OUT    bench_update: ways to compute a gradient step, kernels counted
#   bash experiments/gpu_crl.sh ratios OUT    bench_ratios: the designs against others
#   bash experiments/gpu_crl.sh tasks OUT     tasks_gpu.csv, the paper's ten tasks
#   bash experiments/gpu_crl.sh curve OUT ENV DEPTH [RUN_FOLDER_OF_AN_EARLIER_CALL]
# curve: learning for as long as the call lasts; with its run folder, the next call goes on. Afterwards:
#   python experiments/runs.py publish ENV_depth_DEPTH OUT/ENV_DEPTH
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
case "$1" in
bench)
    timeout 570 python3 experiments/bench.py | tee "$2/bench.txt" || [ $? -eq 124 ]
    cp results/bench_*_gpu.csv "$2/"
    ;;
update | ratios)
    timeout 570 python3 "results/bench_$1.py" | tee "$2/$1.txt" || [ $? -eq 124 ]
    cp results/bench_*_gpu.csv "$2/"
    ;;
tasks)
    NUM_ENVS=512,4096 timeout 590 python3 experiments/bench_tasks.py paper | tee "$2/tasks.txt" || [ $? -eq 124 ]
    cp results/tasks_gpu.csv "$2/"
    ;;
curve)
    if [ -n "${5:-}" ]; then where=(--resume "$5"); else where=(--run_dir "$2/$3_$4" --env "$3" --depth "$4" --checkpoint_replay=false); fi
    # SIGTERM finishes the chunk and saves; without the replay a checkpoint is a few MB
    timeout --signal TERM 540 python3 algorithms/crl.py "${where[@]}" || { code=$?; [ $code -eq 124 ] || [ $code -eq 143 ]; }
    ;;
esac
