"""The type of weights and activations: fp16, bf16."""

import logging

import torch

from sd import gpus
from sd.optimizations.base import Need, OptimizationError, Patch, Stage, capability, here, optimization
from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)

AS_THE_PIPELINE = ""  # a ControlNet is read in the pipeline's dtype: nothing is left to do, or to say


def _cast(patch: Patch, dtype: torch.dtype) -> None:
    if patch.pipe.dtype == dtype:
        raise OptimizationError(f"{patch.name}: the pipeline is in {str(dtype).removeprefix('torch.')} already")
    for model in (patch.clip, patch.unet, patch.vae):
        patch.converts(model)
        model.to(dtype)
    patch.set(patch.pipe, "dtype", dtype)


@optimization(
    "fp16",
    stage=Stage.PRECISION,
    exact=False,
    summary="weights and activations in fp16",
    dtype=torch.float16,
    beside=AS_THE_PIPELINE,
)
def fp16(patch: Patch) -> None:
    """Weights and activations in fp16. Approximate; what CUDA devices start with.

    Helps: half the memory, and the tensor cores' full rate. Hurts: on CPUs, where it is far slower than fp32.
    """
    if patch.pipe.device.type == "cpu":
        log.warning("fp16 is many times slower than fp32 on a CPU")
    _cast(patch, torch.float16)


def _bf16_runs(pipe: StableDiffusion) -> str:
    return "" if gpus.enough("bf16", capability(pipe)) else f"this is {here(pipe)}, which would emulate it; use fp16"


@optimization(
    "bf16",
    stage=Stage.PRECISION,
    exact=False,
    summary="weights and activations in bf16",
    needs=Need(f"a CPU, or {gpus.needed('bf16')}", _bf16_runs),
    conflicts=("fp16",),
    dtype=torch.bfloat16,
    beside=AS_THE_PIPELINE,
)
def bf16(patch: Patch) -> None:
    """Weights and activations in bf16: the range of fp32, and 8 bits of precision where fp16 has 11. Approximate.

    Helps: as fp16 does, without its overflow; on CPUs with AMX or AVX512-BF16 (not measured here). Hurts: on other
    CPUs, where convolutions are 10 times slower than in fp32.
    """
    if patch.pipe.device.type == "cpu" and not has_bf16():
        log.warning("bf16 is up to 10 times slower than fp32 on this CPU, which has neither AMX nor AVX512-BF16")
    _cast(patch, torch.bfloat16)


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
