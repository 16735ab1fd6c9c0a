"""One run that shows what the optimizations do on a GPU: `python -m bench.gpu_probe OUTDIR --budget 270`.

The most valuable sections come first; each is guarded, and its results are on disk as soon as it is done:
probe.json (everything), probe.txt (what was printed), kernels-*.txt (profiles). Random weights of SD 1.5's shapes.
Without --budget left, what remains is skipped. `--tiny --device cpu` tries the script itself in a minute.
"""

import argparse
import itertools
import json
import re
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from bench.reference.numbers import relative_error
from bench.reference.weights import TINY
from sd import optimizations
from sd.config import SD15, Config
from sd.optimizations.attention import BACKENDS, attention_modules, forced_attention, why_not
from sd.optimizations.compiled import compile_seconds
from sd.pipeline import StableDiffusion

PROMPT = "a lighthouse in a storm"
TIMESTEPS = (981, 501, 1)
GRAPH = ("cuda-graph", "async-noise")
LAYOUT = ("channels-last",)
CACHES = ("packed-qkv", "kv-cache", "time-cache")
FUSED = ("fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample")
HAND = (*LAYOUT, "pointwise-linear", *CACHES, *FUSED)
AUTO = "attention"

BEST = (*HAND, *GRAPH)
LADDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("plain", ()),
    ("graph", GRAPH),
    ("+ channels-last", (*LAYOUT, *GRAPH)),
    ("+ pointwise-linear", (*LAYOUT, "pointwise-linear", *GRAPH)),
    ("+ caches", (*LAYOUT, "pointwise-linear", *CACHES, *GRAPH)),
    ("+ fused-norm", (*LAYOUT, "pointwise-linear", *CACHES, "fused-norm", *GRAPH)),
    ("+ fused-layernorm", (*LAYOUT, "pointwise-linear", *CACHES, "fused-norm", "fused-layernorm", *GRAPH)),
    ("+ fused-geglu", (*LAYOUT, "pointwise-linear", *CACHES, *FUSED[:3], *GRAPH)),
    ("+ fused-upsample", BEST),
    ("+ attention", (*BEST, AUTO)),
    ("+ cudnn-benchmark", (*BEST, "cudnn-benchmark")),
    ("loop-graph", (*HAND, "loop-graph")),
    ("no graph", HAND),
)
COMPILED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("compile", (*LAYOUT, *CACHES, "compile", *GRAPH)),
    ("compile, fused-norm", (*LAYOUT, "pointwise-linear", *CACHES, "fused-norm", "compile", *GRAPH)),
    ("compile=unet", (*LAYOUT, *CACHES, "compile=unet", *GRAPH)),
)


# ---- what is measured on, and where results go


@dataclass
class Probe:
    device: torch.device
    dtype: torch.dtype
    config: Config
    steps: int
    out: Path
    budget: float
    started: float = field(default_factory=time.perf_counter)
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plain = common.random_pipeline(self.config, self.device, self.dtype)
        side = self.config.image_size // self.config.vae.downsampling
        generator = torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(self.device, self.dtype)  # noqa: E731
        self.x = draw(2, self.config.unet.in_channels, side, side)
        self.context = draw(2, self.config.text.max_length, self.config.unet.context_dim)
        self.latents = draw(1, self.config.vae.z_channels, side, side)
        self.timesteps = [torch.tensor(t, device=self.device) for t in TIMESTEPS]

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def say(self, text: str) -> None:
        line = f"[{self.elapsed():6.1f} s] {text}"
        print(line, flush=True)
        with (self.out / "probe.txt").open("a") as file:
            file.write(line + "\n")

    def keep(self, section: str, row: dict[str, Any]) -> None:
        """Add a row to a section's results, print it, and write everything to disk."""
        self.results.setdefault(section, []).append(row)
        self.say(f"{section}: " + "  ".join(f"{k} {common.cell(v)}" for k, v in row.items()))
        temporary = self.out / "probe.part"
        temporary.write_text(json.dumps(self.results, indent=1, default=str))
        temporary.replace(self.out / "probe.json")

    def guarded(self, section: str, label: str, call: Callable[[], None], reserve: float = 0) -> None:
        """Run one piece, if its `reserve` of seconds is left; an error is printed, and ends this piece alone."""
        if self.elapsed() + reserve > self.budget:
            self.say(f"{section}: {label} skipped, the budget of {self.budget:.0f} s is used up")
            return
        try:
            call()
        except Exception as error:
            self.say(f"{section}: {label} FAILED: {type(error).__name__}: {error}")
            (self.out / "errors.txt").open("a").write(f"--- {section}: {label}\n{traceback.format_exc()}\n")
        finally:
            common.free_memory(self.device)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


# ---- clocks


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 20, warm_up: int = 3) -> float:
    """Median time of a call."""
    for _ in range(warm_up):
        call()
    if device.type != "cuda":
        return 1e3 * statistics.median(common.timed(call, device) for _ in range(min(repeats, 3)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def microseconds(call: Callable[[], object], device: torch.device, inner: int = 10) -> float:
    """Time of a small call without the host's part: `inner` of them in one CUDA graph."""
    if device.type != "cuda":
        return 1e3 * milliseconds(call, device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return 1e3 * milliseconds(graph.replay, device, repeats=9) / inner


# ---- sections: whole models


class Reference:
    """The fp32 plain model's outputs, and how far the plain model in the probe's dtype is from them."""

    def __init__(self, probe: Probe):
        exact = common.clone_pipeline(probe.plain)
        for model in (exact.unet, exact.vae):
            model.float()
        with common.full_precision():
            self.eps, self.picture = outputs(exact, probe, torch.float32)
        eps, picture = outputs(probe.plain, probe, probe.dtype)
        self.plain_unet = max(relative_error(a, b) for a, b in zip(eps, self.eps, strict=True))
        self.plain_vae = relative_error(picture, self.picture)

    def ratios(self, pipe: StableDiffusion, probe: Probe) -> dict[str, float]:
        """Errors of a pipeline, and as multiples of the plain one's: exact means 1.5 at most."""
        eps, picture = outputs(pipe, probe, probe.dtype)
        unet = max(relative_error(a, b) for a, b in zip(eps, self.eps, strict=True))
        vae = relative_error(picture, self.picture)
        tiny = 1e-12
        return {
            "unet_error": unet,
            "unet_ratio": unet / max(self.plain_unet, tiny),
            "vae_error": vae,
            "vae_ratio": vae / max(self.plain_vae, tiny),
        }


@torch.inference_mode()
def outputs(pipe: StableDiffusion, probe: Probe, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    x, context, latents = (t.to(dtype) for t in (probe.x, probe.context, probe.latents))
    return [pipe.unet(x, t, context) for t in probe.timesteps], pipe.vae.decode(latents)


def build(probe: Probe, names: Sequence[str]) -> StableDiffusion:
    pipe = common.clone_pipeline(probe.plain)
    optimizations.apply(pipe, names)
    return pipe


@torch.inference_mode()
def step_times(pipe: StableDiffusion, probe: Probe) -> dict[str, float]:
    """Milliseconds of a UNet call at batch 2, and of a decode; seconds until the first call is done."""
    first = common.timed(lambda: pipe.unet(probe.x, probe.timesteps[0], probe.context), probe.device)
    call = lambda: pipe.unet(probe.x, probe.timesteps[1], probe.context)  # noqa: E731
    return {
        "first_s": first,
        "step_ms": milliseconds(call, probe.device),
        "sustained_ms": sustained(call, probe),
        "decode_ms": milliseconds(lambda: pipe.vae.decode(probe.latents), probe.device, repeats=7, warm_up=2),
    }


def sustained(call: Callable[[], object], probe: Probe) -> float:
    """Milliseconds of a call among as many as a picture has: a GPU lowers its clock under load."""
    calls = 2 * probe.steps
    return 1e3 / calls * common.timed(lambda: [call() for _ in range(calls)], probe.device)


def picture_times(pipe: StableDiffusion, probe: Probe, sampler: str, repeats: int = 5) -> dict[str, float]:
    """Seconds from prompt to bytes, median; and those of its stages in the last one."""
    draw = lambda: pipe.generate(PROMPT, steps=probe.steps, sampler=sampler, seed=repeats)  # noqa: E731
    first = common.timed(draw, probe.device)
    seconds = [common.timed(draw, probe.device) for _ in range(repeats if probe.cuda else 1)]
    stages = {f"{stage}_ms": 1e3 * s for stage, s in pipe.times.items()}
    return {"first_s": first, "picture_s": statistics.median(seconds), "fastest_s": min(seconds), **stages}


def measure(probe: Probe, reference: Reference, section: str, label: str, names: Sequence[str]) -> None:
    """A row of errors and step times, one of pictures with each sampler."""
    pipe = build(probe, names)
    torch.cuda.reset_peak_memory_stats() if probe.cuda else None
    row = {"label": label, **step_times(pipe, probe), **reference.ratios(pipe, probe)}
    if probe.cuda:
        row["peak_gb"] = torch.cuda.max_memory_reserved() / 2**30
    probe.keep(section, {**row, "names": ",".join(pipe.optimizations)})
    for sampler in ("ddim", "ddpm"):
        probe.keep("pictures", {"label": label, "sampler": sampler, **picture_times(pipe, probe, sampler)})


def best_first(probe: Probe, reference: Reference) -> None:
    """The hand-built path, with PyTorch's choice of attention and with ours, and its profile."""
    for label, names in (("hand", BEST), ("hand, attention", (*BEST, AUTO))):
        names = possible(probe, names)
        probe.guarded("best", label, lambda label=label, names=names: measure(probe, reference, "best", label, names))
        probe.guarded("best", "profile", lambda label=label, names=names: profile(probe, label, names))


def ladder(probe: Probe, reference: Reference) -> None:
    for label, names in LADDER:
        names = possible(probe, names)
        probe.guarded(
            "ladder", label, lambda label=label, names=names: measure(probe, reference, "ladder", label, names), 8
        )


def compiled(probe: Probe, reference: Reference) -> None:
    for label, names in COMPILED:
        names = possible(probe, names)
        run = lambda label=label, names=names: measure(probe, reference, "compiled", label, names)  # noqa: E731
        probe.guarded("compiled", label, run, 60)
        probe.guarded("compiled", label, lambda label=label, names=names: compiler_report(probe, label, names))


def compiler_report(probe: Probe, label: str, names: Sequence[str]) -> None:
    from torch._dynamo.utils import counters

    kept = {family: dict(counts) for family, counts in counters.items() if family in ("stats", "graph_break")}
    probe.keep("compiler", {"label": label, "seconds": compile_seconds(), "counters": json.dumps(kept)})
    torch._dynamo.reset()
    counters.clear()


def possible(probe: Probe, names: Sequence[str]) -> list[str]:
    """Without those that this device cannot run, so that the script can be tried on a CPU."""
    entries = {name: optimizations.catalog()[name.partition("=")[0]] for name in names}
    return [name for name, entry in entries.items() if not entry.needs.why_not(probe.plain)]


# ---- sections: what a step consists of

KERNEL_KINDS = (
    ("ours", r"_norm_whole_group|_channel_moments|_merge_moments|_scale_shift|_add_bias|_geglu|_add_layer_norm"),
    ("compiled", r"^triton_"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("convolution", r"conv|fprop|wgrad|dgrad|implicit"),
    ("product", r"gemm|nvjet|cutlass|splitK|gemv"),
    ("layout", r"nchwToNhwc|nhwcToNchw|transpose"),
    ("norm", r"[Nn]orm|[Mm]oments|ComputeInternalGradients|FusedParams"),
    ("copy", r"[Cc]opy|[Cc]at|memcpy|memset"),
)


def kernel_kind(name: str) -> str:
    return next((kind for kind, pattern in KERNEL_KINDS if re.search(pattern, name)), "elementwise")


@torch.inference_mode()
def profile(probe: Probe, label: str, names: Sequence[str], calls: int = 3) -> None:
    """Kernels of a step by time: kinds in probe.json, all of them in kernels-LABEL.txt."""
    pipe = build(probe, names)
    call = lambda: pipe.unet(probe.x, probe.timesteps[0], probe.context)  # noqa: E731
    decode = lambda: pipe.vae.decode(probe.latents)  # noqa: E731
    for part, run in (("step", call), ("decode", decode)):
        for _ in range(3):
            run()
        events = kernel_events(run, probe, calls)
        kinds: Counter[str] = Counter()
        for name, (_, us) in events.items():
            kinds[kernel_kind(name)] += us
        total = {"label": label, "part": part, "kernels": sum(n for n, _ in events.values())}
        probe.keep("kinds_us", {**total, "sum": sum(kinds.values()), **dict(kinds.most_common())})
        write_kernels(probe.out / f"kernels-{part}-{re.sub('[^a-z]+', '-', label.lower())}.txt", events)


def kernel_events(run: Callable[[], object], probe: Probe, calls: int) -> dict[str, tuple[float, float]]:
    """Kernel name -> how often, and how many microseconds in all, per call."""
    kind = torch.profiler.ProfilerActivity.CUDA if probe.cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(calls):
            run()
        common.synchronize(probe.device)
    attribute = "self_device_time_total" if probe.cuda else "self_cpu_time_total"
    return {e.key: (e.count / calls, getattr(e, attribute) / calls) for e in profiler.key_averages()}


def write_kernels(path: Path, events: dict[str, tuple[float, float]]) -> None:
    rows = sorted(events.items(), key=lambda item: -item[1][1])
    lines = [f"{us:10.1f} us  {count:6.1f} x  {kernel_kind(name):12} {name[:180]}" for name, (count, us) in rows]
    path.write_text("\n".join(lines) + "\n")


# ---- sections: single operations at the UNet's shapes


@dataclass(frozen=True)
class Operation:
    """A layer of the UNet with the shape of its input; layers that are alike count as one."""

    kind: str
    shape: tuple[int, ...]
    out: int
    kernel: int = 1
    stride: int = 1


@torch.inference_mode()
def operations(probe: Probe) -> Counter[Operation]:
    """How often each occurs in one UNet call, found by running it."""
    found: Counter[Operation] = Counter()
    handles = [m.register_forward_hook(_noting(found)) for m in probe.plain.unet.modules() if _operation_of(m)]
    probe.plain.unet(probe.x, probe.timesteps[0], probe.context)
    for handle in handles:
        handle.remove()
    return found


def _operation_of(module: nn.Module) -> str:
    kinds = {nn.Conv2d: "conv", nn.Linear: "linear", nn.GroupNorm: "group_norm", nn.LayerNorm: "layer_norm"}
    return kinds.get(type(module), "")


def _noting(found: Counter[Operation]) -> Callable:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        conv = (module.kernel_size[0], module.stride[0]) if isinstance(module, nn.Conv2d) else (1, 1)
        width = output.shape[-1] if isinstance(module, (nn.Linear, nn.LayerNorm)) else output.shape[1]
        found[Operation(_operation_of(module), tuple(inputs[0].shape), width, *conv)] += 1

    return hook


def of_kind(probe: Probe, kind: str) -> Iterator[tuple[Operation, int]]:
    return ((op, n) for op, n in operations(probe).items() if op.kind == kind)


def randn(probe: Probe, *shape: int) -> Tensor:
    return torch.randn(shape, device=probe.device).to(probe.dtype)


@torch.inference_mode()
def convolutions(probe: Probe, reference: Reference) -> None:
    """cuDNN's heuristics, its benchmark of 10 plans, and of all, in channels-last; TFLOP/s and the share of a step."""
    for op, count in of_kind(probe, "conv"):
        probe.guarded("conv", str(op), lambda op=op, count=count: convolution(probe, op, count), 2)


def convolution(probe: Probe, op: Operation, count: int) -> None:
    x = randn(probe, *op.shape).contiguous(memory_format=torch.channels_last)
    w = randn(probe, op.out, op.shape[1], op.kernel, op.kernel).contiguous(memory_format=torch.channels_last)
    run = lambda: F.conv2d(x, w, None, op.stride, op.kernel // 2)  # noqa: E731
    flops = 2 * op.shape[1] * op.kernel**2 * run().numel()
    row: dict[str, Any] = {"shape": op.shape, "out": op.out, "kernel": op.kernel, "stride": op.stride, "count": count}
    for label, benchmark, limit in (("heuristic", False, 10), ("ten", True, 10), ("all", True, 0)):
        before = torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = benchmark, limit
        try:
            row[f"{label}_us"] = microseconds(run, probe.device)
        finally:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = before
    row["tflops"] = flops / row["ten_us"] / 1e6
    probe.keep("conv", {**row, "step_us": count * row["ten_us"]})


@torch.inference_mode()
def linears(probe: Probe, reference: Reference) -> None:
    """With and without the bias, as a 1x1 convolution without one, and added to what is there."""
    for op, count in of_kind(probe, "linear"):
        probe.guarded("linear", str(op), lambda op=op, count=count: linear(probe, op, count), 1)


def linear(probe: Probe, op: Operation, count: int) -> None:
    x, w, b = randn(probe, *op.shape).flatten(0, -2), randn(probe, op.out, op.shape[-1]), randn(probe, op.out)
    grid, kernel = x[None, :, None].permute(0, 3, 1, 2), w[:, :, None, None]
    total = randn(probe, x.shape[0], op.out)
    ways = {
        "bias": lambda: F.linear(x, w, b),
        "plain": lambda: F.linear(x, w),
        "conv": lambda: F.conv2d(grid, kernel),
        "added": lambda: total.addmm_(x, w.t()),
    }
    times = {f"{way}_us": microseconds(run, probe.device) for way, run in ways.items()}
    flops = 2 * x.numel() * op.out
    row = {"shape": op.shape, "out": op.out, "count": count, **times, "tflops": flops / times["plain_us"] / 1e6}
    probe.keep("linear", {**row, "step_us": count * times["plain_us"]})


@torch.inference_mode()
def attentions(probe: Probe, reference: Reference) -> None:
    """Every backend at every shape of the UNet and the VAE, reading q, k, v as the packed projection leaves them."""
    for label, (batch, heads, queries, keys, size) in attention_shapes(probe).items():
        for name in BACKENDS:
            shape = batch, heads, queries, keys, size
            run = lambda label=label, shape=shape, name=name: one_attention(probe, label, shape, name)  # noqa: E731
            probe.guarded("attention", f"{label} {name}", run, 1)


def attention_shapes(probe: Probe) -> dict[str, tuple[int, int, int, int, int]]:
    shapes: dict[str, tuple[int, int, int, int, int]] = {}
    heads, tokens = probe.config.unet.num_heads, probe.config.text.max_length
    side = probe.x.shape[-1]
    for level, mult in enumerate(probe.config.unet.channel_mult):
        queries, size = (side >> level) ** 2, probe.config.unet.model_channels * mult // heads
        shapes[f"self {queries}"] = (2, heads, queries, queries, size)
        shapes[f"cross {queries}"] = (2, heads, queries, tokens, size)
    shapes["vae"] = (1, 1, side**2, side**2, probe.config.vae.ch * probe.config.vae.ch_mult[-1])
    return shapes


def one_attention(probe: Probe, label: str, shape: tuple[int, int, int, int, int], name: str) -> None:
    batch, heads, queries, keys, size = shape
    if reason := why_not(name, size, probe.device, probe.dtype):
        probe.say(f"attention: {label} {name}: {reason[:200]}")
        return
    if label.startswith("self"):
        packed = randn(probe, batch, queries, 3 * heads * size)
        q, k, v = (t.unflatten(-1, (heads, size)).transpose(1, 2) for t in packed.chunk(3, dim=-1))
    else:
        q = randn(probe, batch, queries, heads, size).transpose(1, 2)
        k, v = (randn(probe, batch, heads, keys, size) for _ in range(2))
    call = lambda: forced_attention(q, k, v, backend=BACKENDS[name])  # noqa: E731
    error = relative_error(call(), forced_attention(*(t.float() for t in (q, k, v)), backend=BACKENDS["math"]))
    us = microseconds(call, probe.device)
    flops = 4 * batch * heads * queries * keys * size
    probe.keep(
        "attention",
        {"shape": label, "size": size, "backend": name, "us": us, "tflops": flops / us / 1e6, "error": error},
    )


@torch.inference_mode()
def norms(probe: Probe, reference: Reference) -> None:
    """GroupNorm + SiLU: PyTorch's kernels, and both ways of ours with several sizes of program."""
    for op, count in of_kind(probe, "group_norm"):
        probe.guarded("norm", str(op), lambda op=op, count=count: one_norm(probe, op, count), 2)


def one_norm(probe: Probe, op: Operation, count: int) -> None:
    from sd.kernels import gpu

    batch, channels, *_ = op.shape
    x = randn(probe, *op.shape).contiguous(memory_format=torch.channels_last)
    norm = nn.GroupNorm(probe.config.unet.norm_groups, channels, device=probe.device, dtype=probe.dtype)
    row: dict[str, Any] = {
        "shape": op.shape,
        "count": count,
        "eager_us": microseconds(lambda: F.silu(norm(x)), probe.device),
    }
    for warps in (4, 8, 16, 32):
        if x.numel() // batch // norm.num_groups <= 1024 * warps * 4:
            with patched(gpu, "_warps", lambda elements, warps=warps: warps):
                run = lambda: gpu._group_norm_whole(x, norm, True, None, None)  # noqa: E731
                row[f"whole{warps}_us"] = microseconds(run, probe.device)
    for rows in (32, 64, 128):
        with patched(gpu, "MOMENTS_TILE", {"BLOCK_L": rows, "BLOCK_C": 64}):
            run = lambda: gpu._group_norm_split(x, norm, True, None, None)  # noqa: E731
            row[f"split{rows}_us"] = microseconds(run, probe.device)
    fastest = min(value for key, value in row.items() if key.startswith(("whole", "split")))
    probe.keep("norm", {**row, "gb_s": 2 * x.nbytes / fastest / 1e3, "step_us": count * fastest})


@contextmanager
def patched(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@torch.inference_mode()
def pointwise(probe: Probe, reference: Reference) -> None:
    """GEGLU and residual + LayerNorm: PyTorch's kernels and ours."""
    from sd.kernels import gpu

    for op, count in of_kind(probe, "layer_norm"):
        if op.shape[1] < 16:
            continue
        channels = op.shape[-1]
        x, delta, wide = randn(probe, *op.shape), randn(probe, *op.shape), randn(probe, *op.shape[:-1], 8 * channels)
        norm = nn.LayerNorm(channels, device=probe.device, dtype=probe.dtype)
        times = {
            "add_norm_eager": lambda x=x, d=delta, norm=norm: norm(x + d),
            "add_norm_ours": lambda x=x, d=delta, norm=norm: gpu.add_layer_norm(x, norm, d),
            "geglu_eager": lambda w=wide: w.chunk(2, dim=-1)[0] * F.gelu(w.chunk(2, dim=-1)[1]),
            "geglu_ours": lambda w=wide: gpu.geglu(w),
            **{f"geglu_{m}x{c}": tiled_geglu(wide, m, c) for m, c in ((4, 256), (16, 128), (4, 512), (16, 256))},
        }
        row: dict[str, Any] = {"shape": op.shape, "count": count}
        row |= {f"{name}_us": microseconds(run, probe.device) for name, run in times.items()}
        row["add_norm_gb_s"] = 4 * x.nbytes / row["add_norm_ours_us"] / 1e3
        probe.keep("pointwise", {**row, "geglu_gb_s": 1.5 * wide.nbytes / row["geglu_ours_us"] / 1e3})


def tiled_geglu(x: Tensor, rows: int, columns: int) -> Callable[[], Tensor]:
    from sd.kernels import gpu

    def run() -> Tensor:
        with patched(gpu, "GEGLU_TILE", {"BLOCK_M": rows, "BLOCK_C": columns}):
            return gpu.geglu(x)

    return run


def ceilings(probe: Probe, reference: Reference) -> None:
    size = None if probe.cuda else 256
    flops = common.matmul_ceiling(probe.device, probe.dtype, size)
    copied = common.copy_ceiling(probe.device, None if probe.cuda else 16)
    attends = sum(1 for _ in attention_modules(probe.plain.unet))
    probe.keep("ceilings", {"tflops": flops / 1e12, "gb_s": copied / 1e9, "attention_modules": attends})


SECTIONS: dict[str, Callable[[Probe, Reference], None]] = {
    "ceilings": ceilings,
    "best": best_first,
    "attention": attentions,
    "norms": norms,
    "pointwise": pointwise,
    "convolutions": convolutions,
    "linears": linears,
    "ladder": ladder,
    "compiled": compiled,
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_probe", description="What the optimizations do on a GPU.")
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    parser.add_argument(
        "--budget", type=float, default=270, metavar="SECONDS", help="start nothing after these (%(default)s)"
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="(%(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    config, steps = (TINY, 2) if args.tiny else (SD15, 50)
    probe = Probe(device, common.default_dtype(device), config, steps, args.out, args.budget)
    probe.keep("environment", common.environment(device, probe.dtype))
    reference = Reference(probe)
    probe.keep("plain", {"unet_error": reference.plain_unet, "vae_error": reference.plain_vae})
    for name in args.sections.split(","):
        probe.guarded(name, "section", lambda name=name: SECTIONS[name](probe, reference))
    probe.say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
