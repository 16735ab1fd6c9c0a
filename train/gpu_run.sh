#!/usr/bin/env bash
# Train the demo model on a GPU in one or more calls, each of a limited time, and collect the small results.
#
#   train/gpu_run.sh OUTDIR SECONDS [AFTER]
#
# SECONDS is what this call may take in all. AFTER is what later calls will add: the learning rate falls over all of
# them. Each call goes on from train/runs/demo. OUTDIR gets at most 8 files of at most 16 MiB. Two calls of 9 minutes:
#
#   train/gpu_run.sh out 540 540
#   train/gpu_run.sh out 540
set -euo pipefail
cd "$(dirname "$0")/.."
out=$1 seconds=$2 after=${3:-0}
run=train/runs/demo
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

if [[ ! -e $run ]]; then # half a minute that shows what is broken here, before it costs the whole call
    options=(--preset tiny --everyday --workers 2 --vae-steps 25 --diffusion-steps 25)
    rm -rf train/runs/preflight
    python3 train/train.py --run train/runs/preflight "${options[@]}"
    rm -r train/runs/preflight
fi

collect() {
    mkdir -p "$out"
    for file in export/*.safetensors export/*.json samples.png reconstructions.png loss.png report.json train.log; do
        cp $run/$file "$out"/ || true
    done
}
trap collect EXIT

limit=$((seconds - SECONDS - 15)) # 15 s to import Python's modules and to collect
python3 train/train.py --run $run --preset demo --compile --time-limit $limit --time-after "$after"
