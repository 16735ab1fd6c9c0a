#!/usr/bin/env bash
# Draw in the container that modal_inference.py starts, or on any machine laid out alike:
#
#     modal_infer.sh --prompt "a lighthouse in a storm" --steps 30 --out storm.png
#
# All flags go to sd/inference.py, whose --help lists them. Where things are, if not where the container has them:
#     SD_ROOT     the folder that holds sd/ and data/          (/root)
#     SD_WEIGHTS  the folder that holds the checkpoints        ($SD_ROOT/weights)
#     SD_CKPT     the checkpoint                               ($SD_WEIGHTS/v1-5-pruned-emaonly.safetensors)
#     SD_PYTHON   the Python that has requirements.txt         (python)
set -euo pipefail

root="${SD_ROOT:-/root}"
weights="${SD_WEIGHTS:-$root/weights}"
# Read where it lies: a copy out of the volume would cost 4 GB of a paid GPU's time for each run.
export SD_CKPT="${SD_CKPT:-$weights/v1-5-pruned-emaonly.safetensors}"

exec "${SD_PYTHON:-python}" "$root/sd/inference.py" "$@"
