"""Which kernel attends: the choice of a backend for `attend` of every attention module, and a report of what ran.

Axes: B batch, N heads, L queries, S keys and values, D head size.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd.attention import Attend, naive_attention
from sd.optimizations.base import OptimizationError, Patch, Stage, optimization
from sd.pipeline import StableDiffusion

# ---- which backend runs

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
FLASH_MAX_HEAD = 256


@dataclass(frozen=True)
class Chip:
    """What the choice of a backend depends on besides the shapes. capability: (8, 0) is an A100, (9, 0) an H100."""

    type: str
    capability: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, device: torch.device) -> "Chip":
        return cls(device.type, torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0))


def backend_for(chip: Chip, dtype: torch.dtype, head_size: int) -> str:
    """The name in BACKENDS of the one that suits these inputs: what `attention=auto` runs.

    Flash takes head sizes up to 256 in 16 bits from sm80 on, and older cards have the memory-efficient kernels. A
    larger head (the VAE's 512) is one head only, whose scores fit into memory. A CPU's flash kernel takes every size.

    Measured on an H100 (bench/results/h100/probe, 512x512 at batch 2): cuDNN beats flash at self-attention, 156 us for
    276 at 4096 positions and 18 for 30 at 1024, and is within 2 us of it elsewhere; for the VAE the memory-efficient
    kernel takes 347 us and plain arithmetic 965.
    """
    hopper, half = chip.capability[0] == 9, dtype in (torch.float16, torch.bfloat16)
    if chip.type == "cpu":
        return "flash"
    if chip.type != "cuda":
        return "math"
    if head_size > FLASH_MAX_HEAD:
        return "efficient" if hopper and half else "math"
    if chip.capability < (8, 0) or not half:
        return "efficient"
    return "cudnn" if hopper else "flash"


def forced_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, *, backend: SDPBackend) -> Tensor:
    """`attention` by this backend and no other: it raises RuntimeError rather than fall back.

    The fused ones want the head's numbers side by side, which they are not in the VAE unless it is in channels-last.
    """
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def auto_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, *, chip: Chip) -> Tensor:
    """`attention` by the backend that `backend_for` names."""
    name = backend_for(chip, q.dtype, q.shape[-1])
    return forced_attention(q, k, v, causal, backend=BACKENDS[name])


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules, by name, that call `self.attend(q, k, v, causal=...)`."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "attend"))


def head_size(module: nn.Module) -> int:
    """D of a module that attends: its first projection's width over its heads, of which the VAE has one."""
    first = next(m for m in module.modules() if hasattr(m, "out_features") or hasattr(m, "out_channels"))
    width = first.out_channels if isinstance(first, nn.Conv2d) else first.out_features
    return width // getattr(module, "heads", 1)


def backend_of(choice: str, path: str, module: nn.Module, weight: Tensor) -> tuple[str, Attend]:
    """What `attention=choice` runs in a module: the backend's name and the function for its `attend`.

    choice: "naive", "auto", a name in BACKENDS, or several as "flash+math": the first that can run its head size,
    which is tried at once on small inputs. Raises OptimizationError for a module that none can run.
    """
    if choice == "naive":
        return "naive", naive_attention
    chip, size = Chip.of(weight.device), head_size(module)
    if choice == "auto":
        return backend_for(chip, weight.dtype, size), partial(auto_attention, chip=chip)
    name = _first_that_runs(choice.split("+"), path, size, weight)
    return name, partial(forced_attention, backend=BACKENDS[name])


def _first_that_runs(names: Sequence[str], path: str, head_size: int, weight: Tensor) -> str:
    reasons = {name: why_not(name, head_size, weight.device, weight.dtype) for name in names}
    if usable := [name for name, reason in reasons.items() if not reason]:
        return usable[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise OptimizationError(f"no such attention for {path}, whose head size is {head_size} ({told})")


@cache
def why_not(backend: str, head_size: int, device: torch.device, dtype: torch.dtype) -> str:
    """Empty if the backend can run this head size here, else PyTorch's reason."""
    q = torch.zeros(1, 1, 16, head_size, device=device, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            forced_attention(q, q, q, backend=BACKENDS[backend])
        except RuntimeError as error:
            return _reason(error, [str(warning.message) for warning in caught])
    return ""


def _reason(error: RuntimeError, warned: Sequence[str]) -> str:
    """PyTorch warns of why each backend was not used, and then raises an error that says nothing of it."""
    useful = [text.split(" (Triggered")[0] for text in warned if "not used because" not in text]
    return " ".join(dict.fromkeys(useful)) or str(error).splitlines()[0]


# ---- the switches


def _use(patch: Patch, choice: str) -> None:
    for part, model in patch.record.parts().items():
        weight = next(model.parameters())
        for path, module in attention_modules(model):
            name, attend = backend_of(choice, f"{part}.{path}", module, weight)
            patch.set(module, "attend", attend, label=name)


@optimization(
    "naive",
    stage=Stage.ATTENTION,
    exact=True,
    summary="attention spelled out: the reference",
    conflicts=("attention", "cpu-attention"),
)
def naive(patch: Patch) -> None:
    """Attention spelled out, with all scores in memory. Exact, and slow: what the other backends are compared with.

    Helps: reading and comparing. Hurts: memory and time.
    """
    _use(patch, "naive")


def _choice(text: str) -> str:
    if text not in ("auto", "naive") and not set(text.split("+")) <= set(BACKENDS):
        raise ValueError(f"auto, naive, or some of {', '.join(BACKENDS)} joined by +")
    return text


@optimization(
    "attention",
    stage=Stage.ATTENTION,
    exact=True,
    summary="attention backend by head size and device, or as named",
    conflicts=("cpu-attention",),
    value=_choice,
    hint="auto|flash|math|efficient|cudnn|flash+math",
)
def attention(patch: Patch, choice: str = "auto") -> None:
    """The attention backend: flash, math, efficient, cudnn, several as flash+math, or auto. Exact.

    auto takes flash attention for head sizes up to 256 in fp16 or bf16 from sm80 on, memory-efficient kernels on older
    cards, plain arithmetic for larger heads (the VAE's 512), and cuDNN where it was measured faster. A named backend
    that cannot run is an error. Helps: where PyTorch's own choice is not the fastest. Hurts: a wrong choice, anywhere.
    """
    _use(patch, choice)


# ---- which backend ran

OPERATORS = {
    "flash": ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    "efficient": ("_scaled_dot_product_efficient_attention",),
    "cudnn": ("_scaled_dot_product_cudnn_attention",),
    "math": ("_scaled_dot_product_attention_math",),
}


@dataclass(frozen=True)
class AttentionRun:
    """One row of a report: the module, its q [B, N, L, D], the S keys, and the backend that ran."""

    module: str
    q: tuple[int, ...]
    keys: int
    backend: str


def record_attention(model: nn.Module, call: Callable[[], object], prefix: str = "") -> list[AttentionRun]:
    """Run `call`, which runs the model, and report what each attention module ran, as the profiler saw it.

    What runs inside a compiled or captured call is not seen.
    """
    runs: list[AttentionRun] = []
    modules = list(attention_modules(model))
    own = {path: vars(module).get("attend") for path, module in modules}
    for path, module in modules:
        module.attend = partial(_recorded, runs, prefix + path, module.attend)
    try:
        call()
    finally:
        for path, module in modules:
            del module.attend
            if own[path] is not None:
                module.attend = own[path]
    return runs


def _recorded(
    runs: list[AttentionRun], path: str, attend: Attend, q: Tensor, k: Tensor, v: Tensor, **options
) -> Tensor:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        out = attend(q, k, v, **options)
    ran = {event.name.removeprefix("aten::") for event in profiler.events()}
    backend = next((name for name, operators in OPERATORS.items() if ran.intersection(operators)), "naive")
    runs.append(AttentionRun(path, tuple(q.shape), k.shape[-2], backend))
    return out


def attention_report(pipe: StableDiffusion, height: int = 512, width: int = 512, batch: int = 2) -> list[AttentionRun]:
    """Which backend each attention module runs: a call of the text encoder, of the UNet and of the VAE's decoder."""
    config, scale = pipe.config, pipe.config.vae.downsampling
    x = torch.randn(batch, config.vae.z_channels, height // scale, width // scale).to(pipe.device, pipe.dtype)
    tokens = torch.zeros(batch, config.text.max_length, dtype=torch.int64, device=pipe.device)
    with torch.inference_mode():
        context = pipe.clip(tokens)
        calls = {
            "clip": (pipe.clip, lambda: pipe.clip(tokens)),
            "unet": (pipe.unet, lambda: pipe.unet(x, torch.tensor(1, device=pipe.device), context)),
            "vae": (pipe.vae, lambda: pipe.vae.decode(x[:1])),
        }
        return [run for name, (model, call) in calls.items() for run in record_attention(model, call, f"{name}.")]
