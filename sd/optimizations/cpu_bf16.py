"""Products of bf16 numbers on CPUs that multiply them faster than fp32, and fp32 between them."""

import torch

from sd.optimizations.base import Patch, Stage, optimization
from sd.optimizations.dot_layers import BESIDE_NONE, SHORT, put_in


@optimization(
    "cpu-bf16",
    stage=Stage.PRECISION,
    exact=False,
    summary="products of bf16 numbers in C++, fp32 between them",
    needs=SHORT,
    conflicts=(*BESIDE_NONE, "cpu-int8"),
    dtype=torch.float32,
)
def cpu_bf16(patch: Patch) -> None:
    """Convolutions, linear layers and attention of the UNet and the VAE with bf16 numbers and fp32 sums, by AMX or
    AVX-512; the residual stream, norms, softmax, the timestep's layers and the sampler in fp32. Approximate, and nearer
    to fp32 than a model that is in bf16 as a whole.

    Weights may be in any type. They are packed when they first run, and left where they are: mapped from their file
    they take no memory then. Helps: CPUs of servers since 2022. Hurts: others, which multiply fp32 faster.
    """
    put_in(patch)
