"""Memory on CPUs: weights back to their file while not needed, and freed memory kept."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sd.checkpoints.mapped import mapped
from sd.checkpoints.mapped import page_out as page_out_tensor
from sd.kernels import allocator
from sd.optimizations.base import CPU, Need, Patch, Stage, optimization
from sd.pipeline import StableDiffusion


def _first(release: Sequence[Tensor], call: Callable) -> Callable:
    def released(*inputs: Any, **named: Any) -> Any:
        for weight in release:
            page_out_tensor(weight)
        return call(*inputs, **named)

    return released


def _then(call: Callable, release: Sequence[Tensor]) -> Callable:
    def called(*inputs: Any, **named: Any) -> Any:
        result = call(*inputs, **named)
        for weight in release:
            page_out_tensor(weight)
        return result

    return called


def _weights_mapped(pipe: StableDiffusion) -> str:
    if missing := CPU.why_not(pipe):
        return missing
    weights = [next(model.parameters()) for model in (pipe.clip, pipe.unet, pipe.vae)]
    return "" if mapped(weights) else "these are not: no file holds them in this dtype"


@optimization(
    "page-out",
    stage=Stage.MEMORY,
    exact=True,
    summary="weights back to their file while not needed",
    needs=Need("a CPU, and weights that are mapped from a file", _weights_mapped),
)
def page_out(patch: Patch) -> None:
    """Weights that the next stage does not need go back to the file that they are mapped from. Exact.

    Helps: memory, by the text encoder's and the VAE's weights while denoising and the UNet's while decoding, if the
    checkpoint is in fp32. Hurts: the next picture, which finds them in the system's cache (0.3 s), or reads them from
    the disk if something else took the room (seconds).
    """
    unused_by_unet = mapped([*patch.clip.parameters(), *patch.vae.parameters()])
    unused_by_vae = mapped(patch.unet.parameters())
    if not unused_by_unet and not unused_by_vae:  # another switch has replaced them
        return
    patch.around("encode", lambda encode: _then(encode, unused_by_unet))
    patch.around("decode", lambda decode: _first(unused_by_vae, decode))


GLIBC = Need(
    "a CPU, on Linux with glibc",
    lambda pipe: CPU.why_not(pipe) or ("" if allocator.supported() else "the C library here is another"),
)


@optimization("keep-memory", stage=Stage.MEMORY, exact=True, summary="freed memory is used again at once", needs=GLIBC)
def keep_memory(patch: Patch) -> None:
    """Freed memory stays with the process while a picture is drawn, in place of going to the system and back. Exact.

    Helps: CPUs, where the system clears every page before its first use, gigabytes a step. Hurts: the memory of other
    programs, until the picture is done.
    """
    patch.around("generate", allocator.freed_memory_kept())
