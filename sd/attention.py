"""Attention: the one function that every model here calls, a reference to read, and the choice of a backend.

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

Attend = Callable[..., Tensor]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, spelled out (Vaswani et al. 2017, equation 1).

    q [B, N, L, D], k and v [B, N, S, D] -> [B, N, L, D]. It holds all L x S scores in memory: 1 GiB a head pair at
    512x512 in fp32 with guidance. To read and to compare with.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """The same by PyTorch's fused kernels, which pick the fastest backend that takes these inputs.

    q [B, N, L, D], k and v [B, N, S, D] -> [B, N, L, D].
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, N*D] -> [B, N, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, N, L, D] -> [B, L, N*D]."""
    return x.transpose(1, 2).flatten(2)


# ---- which backend runs

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
FLASH_MAX_HEAD = 256


class AttentionError(ValueError):
    """A backend was asked for that cannot run here; the message names the module and the reason."""


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
    first = next(m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    return first.weight.shape[0] // getattr(module, "heads", 1)


def use_backend(model: nn.Module, choice: str, prefix: str = "") -> None:
    """Set `attend` of every attention module in model.

    choice: "naive", "auto", a name in BACKENDS, or several as "flash+math": each module takes the first that can run
    its head size, which is tried at once on small inputs. Raises AttentionError for a module that none can run.
    """
    weight = next(model.parameters())
    chip = Chip.of(weight.device)
    for path, module in attention_modules(model):
        if choice == "naive":
            module.attend = naive_attention
        elif choice == "auto":
            module.attend = partial(auto_attention, chip=chip)
        else:
            name = _first_that_runs(choice.split("+"), prefix + path, head_size(module), weight)
            module.attend = partial(forced_attention, backend=BACKENDS[name])


def _first_that_runs(names: Sequence[str], path: str, head_size: int, weight: Tensor) -> str:
    reasons = {name: why_not(name, head_size, weight.device, weight.dtype) for name in names}
    if usable := [name for name, reason in reasons.items() if not reason]:
        return usable[0]
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise AttentionError(f"no such attention for {path}, whose head size is {head_size} ({told})")


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
