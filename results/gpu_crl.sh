#!/usr/bin/env bash
# The GPU figures of crl.py, in two calls of at most 10 minutes: tables of results/bench_*_gpu.csv, then a learning curve of
# ant_u_maze for as long as the call lasts; the same call again goes on with it. Results are copied to OUT.
#   bash results/gpu_crl.sh bench OUT
#   bash results/gpu_crl.sh curve OUT [RUN_FOLDER_OF_AN_EARLIER_CALL]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:${PYTHONPATH:-}"
case "$1" in
bench)
    timeout 570 python3 results/bench_crl.py | tee "$2/bench.txt"
    cp results/bench_*_gpu.csv "$2/"
    ;;
curve)
    if [ -n "${3:-}" ]; then set -- "$1" "$2" --resume "$3"; else set -- "$1" "$2" --run_dir "$2/ant_u_maze"; fi
    # SIGTERM finishes the chunk and saves; without the replay a checkpoint is a few MB
    timeout --signal TERM 540 python3 algorithms/crl.py --env ant_u_maze --depth 16 --checkpoint_replay=false "${@:3}" ||
        { code=$?; [ $code -eq 124 ] || [ $code -eq 143 ]; }
    ;;
esac
