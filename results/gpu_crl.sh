#!/usr/bin/env bash
# The GPU figures, in calls of at most 10 minutes: tables of results/bench_*_gpu.csv; of results/tasks_gpu.csv, the paper's ten
# tasks; then a learning curve of ENV for as long as the call lasts; the same call again goes on with it. Results go to OUT.
#   bash results/gpu_crl.sh bench OUT
#   bash results/gpu_crl.sh tasks OUT
#   bash results/gpu_crl.sh curve OUT ENV [RUN_FOLDER_OF_AN_EARLIER_CALL]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
case "$1" in
bench)
    timeout 570 python3 results/bench_crl.py | tee "$2/bench.txt" || [ $? -eq 124 ]
    cp results/bench_*_gpu.csv "$2/"
    ;;
tasks)
    NUM_ENVS=512,4096 timeout 590 python3 results/bench_tasks.py paper | tee "$2/tasks.txt" || [ $? -eq 124 ]
    cp results/tasks_gpu.csv "$2/"
    ;;
curve)
    if [ -n "${4:-}" ]; then set -- "$1" "$2" "$3" --resume "$4"; else set -- "$1" "$2" "$3" --run_dir "$2/$3"; fi
    # SIGTERM finishes the chunk and saves; without the replay a checkpoint is a few MB
    timeout --signal TERM 540 python3 algorithms/crl.py --env "$3" --depth 16 --checkpoint_replay=false "${@:4}" ||
        { code=$?; [ $code -eq 124 ] || [ $code -eq 143 ]; }
    ;;
esac
