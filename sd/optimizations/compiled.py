"""torch.compile of the UNet's blocks, or of the UNet as a whole, and of the VAE's decoder."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from sd.optimizations.base import Patch, Stage, one_of, optimization
from sd.pipeline import StableDiffusion
from sd.unet import ResBlock, SpatialTransformer

COMPILE_TARGETS = ("blocks", "unet", "max-autotune")


@optimization(
    "compile",
    stage=Stage.COMPILATION,
    exact=True,
    summary="torch.compile of the UNet's blocks and the VAE",
    value=one_of(*COMPILE_TARGETS),
    hint="|".join(COMPILE_TARGETS),
)
def compile_models(patch: Patch, target: str = "blocks") -> None:
    """torch.compile: by default each kind of residual block and transformer once; `unet` as a whole. Exact.

    Helps: whatever stands between matrix products becomes one kernel; `max-autotune` also tries several kernels for
    each product. Hurts: the first call, by a minute or more, and every new picture size again; the cache on disk
    (TORCHINDUCTOR_CACHE_DIR) shortens that for the next process.
    """
    import torch._dynamo

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "sd" / "inductor"))
    # SD 1.5 has 18 shapes of blocks behind two forwards, more than the 8 at which PyTorch gives up.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(64, getattr(torch._dynamo.config, limit)))
    # Without the compiler's own CUDA graphs, which it leaves out silently where it must: cuda-graph makes them.
    options = {"mode": "max-autotune-no-cudagraphs"} if target == "max-autotune" else {}
    compiled = functools.partial(torch.compile, dynamic=False, **options)
    for module in _compiled_modules(patch.unet, target):
        patch.around(module, compiled)
    patch.around("decode", compiled)
    patch.around("generate", lambda generate: _reporting(patch.pipe, generate))


def _compiled_modules(unet: nn.Module, target: str) -> list[nn.Module]:
    if target != "blocks":
        return [unet]
    return [m for m in unet.modules() if isinstance(m, (ResBlock, SpatialTransformer))]


def compile_seconds() -> float:
    """Seconds that torch.compile has spent in this process."""
    import torch._dynamo.utils as utils

    return sum(utils.compilation_time_metrics.get("_compile.compile_inner", ()))


def _reporting(pipe: StableDiffusion, generate: Callable) -> Callable:
    @functools.wraps(generate)
    def generate_and_report(*args: Any, **kwargs: Any) -> Any:
        before = compile_seconds()
        images = generate(*args, **kwargs)
        pipe.times["compile"] = compile_seconds() - before
        return images

    return generate_and_report
