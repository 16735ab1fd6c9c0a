#!/usr/bin/env bash
# Everything to measure on one GPU: bench/gpu.sh OUTDIR [PART...]
#
# Without parts, all of them, the most valuable first. Each takes at most 9 minutes; one that needs longer stops, and
# goes on when called again. What is done is skipped. Results are small files in OUTDIR.
# The first part is always parity: whether the pictures are diffusers' own at all (OUTDIR/parity.csv). If they are not, or
# if that cannot be seen, the others are measured all the same, but the last line says so and the exit code is 1.
# SECONDS_LEFT=N starts no part after N seconds; PAIRS=N times N pictures a row (7), ROUNDS=N so many of each (7). PYTHON names the interpreter, BENCH_COMMIT the commit where there is no
# repository. SMALL=1 tries the script itself: tiny models on a CPU.
# It needs torch, triton, numpy, pillow, tqdm, tokenizers and safetensors; diffusers with transformers, torchao, rich
# and matplotlib are used where they are installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PARTS=(parity check ladder compiled diffusers batch8 candidates fidelity quantized roofline approximate
    quantized-compiled leave-one-out max-autotune)
[[ -x .venv/bin/python ]] && default=.venv/bin/python || default=python3
PYTHON=${PYTHON:-$default}
PART_SECONDS=${PART_SECONDS:-480}
UNFINISHED=75
kernels=attention,channels-last,pointwise-linear,split-conv,packed-qkv,kv-cache,time-cache
kernels+=,fused-norm,fused-layernorm,fused-geglu,fused-upsample,shared-halves
tiny=() few_pairs=() few_rounds=() few_steps=() tiny_check=()
if [[ ${SMALL:-} == 1 ]]; then
    tiny=(--device cpu --weights tiny --size 64)
    few_pairs=(--steps 3 --fidelity-steps 3 --pairs 1)
    few_rounds=(--steps 3 --rounds 1)
    few_steps=(--steps 3)
    tiny_check=(--tiny --device cpu)
fi

usage() {
    echo "usage: bench/gpu.sh OUTDIR [PART...]; parts: ${PARTS[*]}" >&2
    exit 2
}

has() { "$PYTHON" -c "import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))" "$@"; }

# Interrupts what outlasts its budget by a minute: rows that are done are on disk by then.
py() { timeout --signal=INT $((budget + 55)) "$PYTHON" "$@"; }

ladder() { py bench/ladder.py --out "$out" --budget "$budget" --pairs "${PAIRS:-7}" "$@" "${tiny[@]}" "${few_pairs[@]}"; }

parity() {
    if ! has diffusers transformers; then
        echo "parity cannot be seen: diffusers or transformers is not installed"
        return 1
    fi
    py bench/vs_diffusers.py --parity-only --out "$out" --size 512 "${tiny[@]}" "${few_steps[@]}"
}

versus_diffusers() {
    if ! has diffusers transformers; then
        echo "skipped: diffusers or transformers is not installed"
        return
    fi
    py bench/vs_diffusers.py --out "$out" --size 512 --pipeline --compiled --opts exact --rounds "${ROUNDS:-7}" "$@" \
        "${tiny[@]}" "${few_rounds[@]}"
}

roofline() { py bench/roofline.py --out "$out" "$@" "${tiny[@]}"; }

rooflines() {
    roofline && roofline --channels-last && roofline --channels-last --batch 8 &&
        roofline --model vae && roofline --model vae --channels-last && roofline --model text
}

run_part() {
    case $1 in
        parity) parity ;;
        check) py -m bench.gpu_probe "$out" --budget "$budget" "${tiny_check[@]}" ;;
        # The graph first: without it, the host is what takes the time, whatever the kernels take.
        ladder) ladder --name ladder --measure speed --base cuda-graph,async-noise --opts "$kernels" ;;
        compiled) ladder --name compiled --measure speed --mode alone --base exact \
            --without fused-norm,fused-layernorm,fused-geglu,split-conv --opts compile,compile=unet,loop-graph ;;
        diffusers) versus_diffusers ;;
        batch8) ladder --name batch8 --measure speed --mode alone --base exact --opts none --batch 8 --pairs 3 --no-naive ;;
        # Exact ones that are not in the preset: measured here, they may join it.
        candidates) ladder --name candidates --measure speed --mode alone --base exact \
            --opts cudnn-benchmark ;;
        fidelity) ladder --name ladder --base cuda-graph,async-noise --opts "$kernels" ;;
        quantized) ladder --name quantized --mode alone --base exact --without packed-qkv \
            --opts int8-weights,int8-dynamic,float8 ;;
        roofline) rooflines ;;
        approximate) ladder --name approximate --mode alone --base exact \
            --opts deepcache=3,guidance-interval=0-0.6,steps=20,steps=30,sampler=ddim ;;
        quantized-compiled) ladder --name quantized-compiled --measure speed --mode alone --base exact,compile \
            --without packed-qkv,fused-norm,fused-layernorm,fused-geglu,split-conv --opts int8-weights,int8-dynamic,float8 ;;
        leave-one-out) ladder --name leave-one-out --measure speed --mode leave-one-out --opts exact ;;
        max-autotune) versus_diffusers --compile-mode max-autotune --rounds 5 ;;
    esac
}

# Runs a part that is not done. One that failed or ran out of time goes on when called again.
guarded() {
    local part=$1 code
    if [[ -e $out/$part.done ]]; then
        echo "== $part: done already"
        return 0
    fi
    echo "== $part, from second $SECONDS"
    run_part "$part" 2>&1 | tee -a "$out/$part.log"
    code=${PIPESTATUS[0]}
    echo "== $part: exit code $code at second $SECONDS"
    if ((code == 0)); then
        touch "$out/$part.done"
    fi
    return "$code"
}

(($#)) || usage
out=$1
shift
(($#)) || set -- "${PARTS[@]}"
for part in "$@"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || usage
done
[[ " $* " == *" parity "* ]] || set -- parity "$@"
if [[ ${SMALL:-} != 1 ]] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: PyTorch sees no CUDA device; SMALL=1 tries the script without one" >&2
    exit 2
fi
mkdir -p "$out"

# The last word: nothing that was measured counts while parity is not there.
finish() {
    [[ -e $out/parity.done ]] && exit "$1"
    echo "gpu.sh: NO PARITY WITH DIFFUSERS on this machine, or it was not seen: $out/parity.log" >&2
    [[ -e $out/parity.log ]] && exit 1
    exit "$1"
}

worst=0
for part in "$@"; do
    left=$((${SECONDS_LEFT:-1000000} - SECONDS))
    if ((left < 20)); then
        echo "== $part: no time left"
        finish $UNFINISHED
    fi
    budget=$((left < PART_SECONDS ? left : PART_SECONDS))
    guarded "$part" || worst=$?
done
finish "$worst"
