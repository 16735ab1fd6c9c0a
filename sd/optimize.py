"""Every optimization, by name, in the order in which they are applied.

Each is a function of a loaded pipeline, applied before its first call: it swaps modules' classes or wraps a method of
this pipeline alone, and leaves the parameters under their names. Without any, the pipeline is the plain one. Exact ones
stay in the pipeline's dtype and no further from the fp32 plain model than 1.5 times what the plain model in that dtype
is (in fp32: within a relative 1e-4); all others are approximate.

    optimize.apply(pipe, optimize.parse("exact,deepcache=3", pipe.device))

The families live in modules of their own, imported when chosen; short ones are here.
"""

import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from sd.attention import AttentionRun
    from sd.pipeline import StableDiffusion

Pipe: TypeAlias = "StableDiffusion"
log = logging.getLogger(__name__)


class OptimizationError(ValueError):
    """An optimization that is unknown, cannot run here, or not beside another; the message is for the user."""


@dataclass(frozen=True)
class Optimization:
    """name: as --opt takes it. exact: see the module. needs: a key of NEEDS. apply(pipe[, value]) changes the pipeline.

    summary: one line. gain: measured, and on what. conflicts: names that cannot stand beside this one.
    value: reads what follows `name=`, raising ValueError; None if it takes no value. hint: how a value looks.
    """

    name: str
    exact: bool
    needs: str
    apply: Callable[..., None]
    summary: str
    conflicts: tuple[str, ...] = ()
    value: Callable[[str], Any] | None = None
    hint: str = ""
    gain: str = "not measured yet"


# ---- what an optimization may need


def _capability(pipe: Pipe) -> tuple[int, int]:
    return torch.cuda.get_device_capability(pipe.device) if pipe.device.type == "cuda" else (0, 0)


def _half(pipe: Pipe) -> bool:
    return pipe.dtype in (torch.float16, torch.bfloat16)


def _triton_runs(pipe: Pipe) -> bool:
    return _capability(pipe) >= (8, 0) or os.environ.get("TRITON_INTERPRET") == "1"


def _onednn_runs() -> bool:
    from sd.onednn import available

    return available()


def _glibc() -> bool:
    from sd.kernels.allocator import supported

    return supported()


ANYTHING = "any device"
CPU = "a CPU"
CPU_FP32 = "a CPU, in fp32"
ONEDNN = "an x86 CPU, in fp32"
GLIBC = "a CPU, on Linux with glibc"
NVIDIA = "an NVIDIA GPU"
SM80 = "an NVIDIA GPU with sm80 or newer"
SM89 = "an NVIDIA GPU with sm89 or newer, in fp16 or bf16"

NEEDS: dict[str, Callable[[Pipe], bool]] = {
    ANYTHING: lambda pipe: True,
    CPU: lambda pipe: pipe.device.type == "cpu",
    CPU_FP32: lambda pipe: pipe.device.type == "cpu" and pipe.dtype == torch.float32,
    ONEDNN: lambda pipe: pipe.device.type == "cpu" and pipe.dtype == torch.float32 and _onednn_runs(),
    GLIBC: lambda pipe: pipe.device.type == "cpu" and _glibc(),
    NVIDIA: lambda pipe: pipe.device.type == "cuda",
    SM80: _triton_runs,
    SM89: lambda pipe: _capability(pipe) >= (8, 9) and _half(pipe),
}


# ---- helpers


def _swap(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another forward: a subclass of its class with the same parameters."""
    module.__class__ = kind


def _modules(kind: type[nn.Module], *models: nn.Module) -> Iterator[Any]:
    return (m for model in models for m in model.modules() if type(m) is kind)


def _wrap(owner: Any, method: str, wrapper: Callable) -> None:
    """Replace this one object's method by wrapper(the method that it had)."""
    setattr(owner, method, wrapper(getattr(owner, method)))


class Progress:
    """Which step of which picture is running."""

    def __init__(self, pipe: Pipe):
        self.step, self.steps, self.guided = 0, 1, False
        self.listeners: list[Callable[[int], None]] = []
        _wrap(pipe, "sample", self._counted)

    def _counted(self, sample: Callable) -> Callable:
        def counted(x, context, cfg_scale, sampler, timesteps, noise, on_step=None):
            self.steps, self.guided = len(timesteps), cfg_scale != 1
            self._begin(0)

            def finished(step: int, steps: int, latents: Tensor) -> None:
                self._begin(step)
                if on_step:
                    on_step(step, steps, latents)

            try:
                return sample(x, context, cfg_scale, sampler, timesteps, noise, finished)
            finally:
                self.guided = False
                self._begin(0)

        return counted

    def _begin(self, step: int) -> None:
        self.step = step
        for listener in self.listeners:
            listener(step)


# ---- weights' dtype


def _cast(pipe: Pipe, dtype: torch.dtype) -> None:
    for model in (pipe.clip, pipe.unet, pipe.vae):
        model.to(dtype)
    pipe.dtype = dtype


def fp16(pipe: Pipe) -> None:
    """Weights and activations in fp16. Approximate; what CUDA devices start with.

    Helps: half the memory, and the tensor cores' full rate. Hurts: on CPUs, where it is far slower than fp32.
    """
    _cast(pipe, torch.float16)


def bf16(pipe: Pipe) -> None:
    """Weights and activations in bf16: the range of fp32, and 8 bits of precision where fp16 has 11. Approximate.

    Helps: as fp16 does, without its overflow; on CPUs with AMX or AVX512-BF16 (not measured here). Hurts: on other
    CPUs, where convolutions are 10 times slower than in fp32.
    """
    if pipe.device.type == "cpu" and not has_bf16():
        log.warning("bf16 is up to 10 times slower than fp32 on this CPU, which has neither AMX nor AVX512-BF16")
    _cast(pipe, torch.bfloat16)


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---- attention


def naive(pipe: Pipe) -> None:
    """Attention spelled out, with all scores in memory. Exact, and slow: what the other backends are compared with."""
    attention(pipe, "naive")


def attention(pipe: Pipe, choice: str = "auto") -> None:
    """The attention backend: flash, math, efficient, cudnn, several as flash+math, or auto. Exact.

    auto takes flash attention for head sizes up to 256 in fp16 or bf16 from sm80 on, memory-efficient kernels on older
    cards, plain arithmetic for larger heads (the VAE's 512), and cuDNN where it was measured faster. A named backend
    that cannot run is an error. Helps: where PyTorch's own choice is not the fastest. Hurts: a wrong choice, anywhere.
    """
    from sd.attention import AttentionError, use_backend

    try:
        for name, model in _parts(pipe):
            use_backend(model, choice, f"{name}.")
    except AttentionError as error:
        raise OptimizationError(str(error)) from error


def attention_choice(text: str) -> str:
    from sd.attention import BACKENDS

    if text not in ("auto", "naive") and not set(text.split("+")) <= set(BACKENDS):
        raise ValueError(f"auto, naive, or some of {', '.join(BACKENDS)} joined by +")
    return text


def attention_report(pipe: Pipe, height: int = 512, width: int = 512, batch: int = 2) -> "list[AttentionRun]":
    """Which backend each attention module runs: a call of the text encoder, of the UNet and of the VAE's decoder."""
    from sd.attention import record_attention

    config, scale = pipe.config, pipe.config.vae.downsampling
    x = torch.randn(batch, config.vae.z_channels, height // scale, width // scale).to(pipe.device, pipe.dtype)
    tokens = torch.zeros(batch, config.text.max_length, dtype=torch.int64, device=pipe.device)
    with torch.inference_mode():
        context = pipe.clip(tokens)
        calls = {
            "clip": lambda: pipe.clip(tokens),
            "unet": lambda: pipe.unet(x, torch.tensor(1, device=pipe.device), context),
            "vae": lambda: pipe.vae.decode(x[:1]),
        }
        return [run for name, model in _parts(pipe) for run in record_attention(model, calls[name], f"{name}.")]


def _parts(pipe: Pipe) -> tuple[tuple[str, nn.Module], ...]:
    return ("clip", pipe.clip), ("unet", pipe.unet), ("vae", pipe.vae)


# ---- layout, projections, caches


def channels_last(pipe: Pipe) -> None:
    """Convolution weights, and so all activations, with the channels innermost in memory. Exact.

    Helps: tensor cores read this layout and cuDNN otherwise converts to it and back; a transformer's reshape between
    grid and sequence becomes free. Hurts: on some CPUs at some sizes.
    """
    for model in (pipe.unet, pipe.vae):
        model.to(memory_format=torch.channels_last)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution as a matrix product over positions."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        y = F.linear(rows.reshape(-1, self.in_channels), self.weight.flatten(1), self.bias)
        return y.unflatten(0, rows.shape[:3]).permute(0, 3, 1, 2)


def pointwise_linear(pipe: Pipe) -> None:
    """1x1 convolutions as matrix products, whose bias costs no extra pass. Exact; wants channels-last.

    Helps: a product of this shape has better kernels than a convolution. Hurts: without channels-last, where each
    activation is copied into that layout first.
    """
    for conv in _modules(nn.Conv2d, pipe.unet, pipe.vae):
        if conv.kernel_size == (1, 1):
            _swap(conv, PointwiseConv)


def packed_qkv(pipe: Pipe) -> None:
    """Query, key and value of self-attention as one product, key and value of cross-attention as another. Exact.

    Helps: small products, which leave a large chip idle. Hurts: nothing known; the weights keep their names as views.
    """
    from sd.cache import pack_projections

    pack_projections(pipe.unet)


def kv_cache(pipe: Pipe) -> None:
    """Cross-attention's keys and values once a prompt in place of once a step: the text does not change. Exact.

    Helps: 32 small products a step. Hurts: nothing known; 2 MB a prompt.
    """
    from sd.cache import cache_text_keys

    cache_text_keys(pipe.unet)


def time_cache(pipe: Pipe) -> None:
    """What each residual block adds at each of the 1000 timesteps, once a model, as a table. Exact.

    Helps: some 60 small kernels a step. Hurts: a single picture on a CPU, where the table costs half a second; 40 MB.
    """
    from sd.cache import cache_times

    cache_times(pipe.unet)


def prepacked(pipe: Pipe) -> None:
    """Large weights in the layout that oneDNN computes with, once a model in place of once a call. Exact.

    Helps: CPUs, the more the smaller the picture. Hurts: memory, 2.1 GB for SD 1.5.
    """
    from sd.onednn import prepack

    for model in (pipe.unet, pipe.vae, pipe.clip):
        prepack(model)


# ---- C++ kernels on a CPU: sd/winograd.py and sd/cpu.py


def winograd(pipe: Pipe, gigabytes: float = 3.4) -> None:
    """3x3 convolutions with a quarter of the multiplications, by Winograd's F(4x4,3x3). Exact.

    gigabytes: what the transformed kernels may take beside the weights; F(2x2,3x3) or the direct way where they would
    take more. Helps: convolutions, half of a step on CPUs. Hurts: memory; where there is no C++ compiler, PyTorch's
    own operations do it, and gain less.
    """
    from sd.winograd import apply

    apply(pipe, int(gigabytes * 1e9))


def cpu_linear(pipe: Pipe) -> None:
    """Linear layers, 1x1 and strided convolutions by the C++ kernels, GEGLU's gate within its product. Exact.

    Helps: GEGLU, whose projection is the largest activation. Hurts: CPUs without AVX2, for which nothing is tuned.
    """
    from sd import cpu
    from sd.kernels import native as cpu_kernels

    if cpu_kernels.load():
        cpu.fast_linear(pipe.unet, pipe.vae)


def cpu_attention(pipe: Pipe) -> None:
    """Attention by the C++ kernels, without a causal mask: the UNet's and the VAE's. Exact.

    Helps: heads of 40 and many positions. Hurts: CPUs without AVX2, for which nothing is tuned.
    """
    from sd import cpu
    from sd.kernels import native as cpu_kernels

    if cpu_kernels.load():
        cpu.use_fast_attention(pipe.unet, pipe.vae)


def cpu_norm(pipe: Pipe) -> None:
    """Norms by the C++ kernels, SiLU within; Winograd convolutions add timestep and residual themselves. Exact.

    Helps: each was a pass over memory. Hurts: without channels-last, where each activation is copied first.
    """
    from sd import cpu
    from sd.kernels import native as cpu_kernels

    if cpu_kernels.load():
        cpu.fast_norms(pipe.unet, pipe.vae)


def page_out(pipe: Pipe) -> None:
    """Weights that the next stage does not need go back to the file that they are mapped from. Exact.

    Helps: memory, by the text encoder's and the VAE's weights while denoising and the UNet's while decoding, if the
    checkpoint is in fp32. Hurts: the next picture, which finds them in the system's cache (0.3 s), or reads them from
    the disk if something else took the room (seconds).
    """
    from sd.checkpoints.mapped import mapped, page_out

    unused_by_unet = mapped([*pipe.clip.parameters(), *pipe.vae.parameters()])
    unused_by_vae = mapped(pipe.unet.parameters())

    def encode_and_release(encode: Callable) -> Callable:
        def encode_prompts(*args) -> Tensor:
            context = encode(*args)
            for weight in unused_by_unet:
                page_out(weight)
            return context

        return encode_prompts

    def release_and_decode(decode: Callable) -> Callable:
        def decode_released(latents: Tensor) -> Tensor:
            for weight in unused_by_vae:
                page_out(weight)
            return decode(latents)

        return decode_released

    _wrap(pipe, "encode_prompts", encode_and_release)
    _wrap(pipe.vae, "decode", release_and_decode)


def keep_memory(pipe: Pipe) -> None:
    """Freed memory stays with the process while a picture is drawn, in place of going to the system and back. Exact.

    Helps: CPUs, where the system clears every page before its first use, gigabytes a step. Hurts: the memory of other
    programs, until the picture is done.
    """
    from sd.kernels.allocator import freed_memory_kept

    _wrap(pipe, "generate", freed_memory_kept())


# ---- fused kernels


def _kernels():
    try:
        from sd import fused
    except ImportError as error:
        raise OptimizationError("fused kernels need Triton: pip install triton") from error
    return fused


def fused_norm(pipe: Pipe) -> None:
    """GroupNorm, SiLU, the timestep's shift and the convolutions' biases in Triton kernels on channels-last. Exact.

    Helps: each was a pass over memory of its own. Hurts: without channels-last, where each activation is copied first.
    """
    _kernels().fuse_norms(pipe.unet, pipe.vae)


def fused_layernorm(pipe: Pipe) -> None:
    """LayerNorm of the transformer blocks in one Triton kernel with the residual and the biases before it. Exact.

    Helps: fewer passes over memory, and products that do not add their bias themselves, at which cuBLAS is slow.
    Hurts: without channels-last, where each activation is copied first.
    """
    _kernels().fuse_transformers(pipe.unet)


def fused_geglu(pipe: Pipe) -> None:
    """The feed-forward's value * gelu(gate) in one Triton kernel, with the projection's bias. Exact.

    Helps: the largest activations of the UNet, read once in place of twice. Hurts: nothing known.
    """
    _kernels().fuse_geglu(pipe.unet)


def fused_upsample(pipe: Pipe) -> None:
    """Nearest-neighbour upsampling by a Triton kernel that moves 16 bytes at a time. Exact, to the bit.

    Helps: the VAE, whose pictures are large. Hurts: without channels-last, where each activation is copied first.
    """
    _kernels().fuse_upsampling(pipe.unet, pipe.vae)


# ---- quantization: sd/quantize.py, which imports torchao


def _quantization(function: str) -> Callable[[Pipe], None]:
    def quantize(pipe: Pipe) -> None:
        from sd import quantize as family

        try:
            getattr(family, function)(pipe)
        except (ImportError, ValueError) as error:
            raise OptimizationError(str(error)) from error

    return quantize


# ---- fewer passes


def shared_halves(pipe: Pipe) -> None:
    """Both halves of guidance see the same latents: up to the first text, one half is computed for both. Exact.

    Helps: saves the first residual block and the first, largest self-attention of one half, 2% of a step's arithmetic.
    Hurts: nothing known; without guidance it does nothing.
    """
    from sd.cache import share_halves

    halves = share_halves(pipe.unet)

    def sampling(sample: Callable) -> Callable:
        def sample_sharing(x, context, cfg_scale, *others, **options):
            halves.alike = cfg_scale != 1
            try:
                return sample(x, context, cfg_scale, *others, **options)
            finally:
                halves.alike = False

        return sample_sharing

    _wrap(pipe, "sample", sampling)


def deepcache(pipe: Pipe, interval: int = 3) -> None:
    """The deep levels of the UNet at every N-th step only; in between, their last features serve again. Approximate.

    Helps: a step in between costs a tenth. Hurts: detail, the more the fewer steps there are.
    """
    from sd.cache import cache_deep_features

    Progress(pipe).listeners.append(cache_deep_features(pipe.unet, interval).start_step)


class GuidanceInterval:
    """Outside of the interval the conditional half alone runs, and stands for both (Kynkaanniemi et al. 2024).

    uncond + scale * (cond - uncond) is cond then, up to rounding, so the sampler needs not know.
    """

    def __init__(self, pipe: Pipe, low: float, high: float):
        from sd.cache import refresh_before_calls

        self.low, self.high = low, high
        self.progress = Progress(pipe)
        self.context: Tensor | None = None
        self.unet = pipe.unet
        self.halves = getattr(pipe.unet, "halves", None)
        self.others = list(getattr(pipe.unet, "refreshers", ()))
        refresh_before_calls(pipe.unet, self._halve)
        _wrap(pipe.unet, "forward", self._forward)

    def _halve(self, context: Tensor) -> None:
        if context.shape[0] % 2 == 1:  # not of two halves
            return
        if context is not self.context:
            self.context, self.conditional = context, context.chunk(2)[1]
        for refresh in self.others:
            refresh(self.conditional)

    def _forward(self, predict: Callable) -> Callable:
        def forward(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
            inside = self.low <= self.progress.step / self.progress.steps < self.high
            if inside or not self.progress.guided:
                return predict(x, t, context)
            with self._no_halves():
                eps = predict(x.chunk(2)[1], t, self.conditional)
            return torch.cat([eps, eps])

        return forward

    @contextmanager
    def _no_halves(self) -> Iterator[None]:
        """Tell shared-halves that this batch is not two halves alike."""
        if self.halves:
            self.halves.alike = False
        yield
        if self.halves:
            self.halves.alike = True


def guidance_interval(pipe: Pipe, interval: tuple[float, float] = (0.0, 0.6)) -> None:
    """Classifier-free guidance only in a part of the steps, given as fractions; elsewhere half the work. Approximate.

    Helps: late steps, where guidance changes little. Hurts: early ones, where it decides what is drawn; at batch 1 a
    large GPU is not twice as fast on half the work.
    """
    GuidanceInterval(pipe, *interval)


# ---- compilation, algorithms, graphs

COMPILE_TARGETS = ("blocks", "unet", "max-autotune")


def compile_models(pipe: Pipe, target: str = "blocks") -> None:
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
    for module in _compiled_modules(pipe, target):
        module.forward = torch.compile(module.forward, dynamic=False, **options)
    pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False, **options)
    _wrap(pipe, "generate", lambda generate: _report_compile_seconds(pipe, generate))


def _compiled_modules(pipe: Pipe, target: str) -> list[nn.Module]:
    from sd.unet import ResBlock, SpatialTransformer

    if target != "blocks":
        return [pipe.unet]
    return [m for m in pipe.unet.modules() if isinstance(m, (ResBlock, SpatialTransformer))]


def compile_target(text: str) -> str:
    if text not in COMPILE_TARGETS:
        raise ValueError(f"one of {', '.join(COMPILE_TARGETS)}")
    return text


def compile_seconds() -> float:
    """Seconds that torch.compile has spent in this process."""
    import torch._dynamo.utils as utils

    return sum(utils.compilation_time_metrics.get("_compile.compile_inner", ()))


def _report_compile_seconds(pipe: Pipe, generate: Callable) -> Callable:
    @functools.wraps(generate)
    def generate_and_report(*args, **kwargs):
        before = compile_seconds()
        images = generate(*args, **kwargs)
        pipe.times["compile"] = compile_seconds() - before
        return images

    return generate_and_report


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cudnn_benchmark(pipe: Pipe) -> None:
    """cuDNN tries its convolution algorithms on the first call of each shape and keeps the fastest. Exact.

    Helps: convolutions, half of the work. Hurts: the first picture of each size, by about a second.
    """

    def trying(function: Callable) -> Callable:
        def call(*inputs: Tensor) -> Tensor:
            with _cudnn_benchmark():
                return function(*inputs)

        return call

    _wrap(pipe.unet, "forward", trying)
    _wrap(pipe.vae, "decode", trying)


def cuda_graph(pipe: Pipe) -> None:
    """The text encoder, a UNet call and the VAE's decoder as one CUDA graph each. Exact.

    Helps: at small batches, where the host launches some 900 kernels a step slower than they run. Hurts: the first
    picture of each size, by a second, and memory: a graph keeps its activations.
    """
    from sd.graphs import Graphed

    deep, halves = getattr(pipe.unet, "deep", None), getattr(pipe.unet, "halves", None)
    state = lambda: (deep and deep.reuse, halves and halves.alike)  # noqa: E731
    pipe.unet.forward = Graphed(pipe.unet.forward, pipe.unet, state=state)
    _graph_text_and_vae(pipe)


def loop_graph(pipe: Pipe) -> None:
    """All steps with guidance and sampler as a single CUDA graph; text encoder and VAE as one each. Exact.

    Helps: as cuda-graph does, and the sampler's arithmetic too; the host only launches once. Hurts: every new number of
    steps, sampler or guidance scale is recorded anew, for a second or more; progress shows at the end only.
    """
    from sd.graphs import GraphedLoop

    pipe.sample = GraphedLoop(pipe)
    _graph_text_and_vae(pipe)


def _graph_text_and_vae(pipe: Pipe) -> None:
    from sd.graphs import Graphed

    pipe.clip.forward = Graphed(pipe.clip.forward, pipe.clip)
    pipe.vae.decode = Graphed(pipe.vae.decode, pipe.vae)


def async_noise(pipe: Pipe) -> None:
    """Noise goes to the device from pinned memory, so that the host does not wait for each step of DDPM. Exact.

    Helps: samplers that draw noise, on a GPU. Hurts: nothing known.
    """
    from sd.graphs import AsyncNoise
    from sd.samplers import PictureNoise

    def sampling(sample: Callable) -> Callable:
        def sample_async(x, context, cfg_scale, sampler, timesteps, noise, on_step=None):
            # Within loop-graph the noise is drawn already.
            noise = AsyncNoise(noise) if isinstance(noise, PictureNoise) else noise
            return sample(x, context, cfg_scale, sampler, timesteps, noise, on_step)

        return sample_async

    _wrap(pipe, "sample", sampling)


def vae_tiling(pipe: Pipe, tile: int = 64) -> None:
    """Pictures larger than a tile are decoded in tiles that overlap by a quarter. Approximate: norms see a tile each.

    Helps: memory, which grows with the picture otherwise. Hurts: time, by the overlap.
    """
    from sd.tiling import decode_in_tiles

    _wrap(pipe.vae, "decode", lambda decode: lambda latents: decode_in_tiles(decode, latents, tile, tile // 4))


# ---- the registry


def _at_least(minimum: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise ValueError(f"a whole number from {minimum} on")
        return int(text)

    return read


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < 1000:
        raise ValueError("gigabytes, as 2.5")
    return size


def _fractions(text: str) -> tuple[float, float]:
    low, _, high = text.partition("-")
    try:
        interval = float(low), float(high)
    except ValueError:
        interval = 1.0, 0.0
    if not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError("two fractions of the steps, as 0.0-0.6")
    return interval


# Of a UNet step, each on top of those above it in the README's ladder: H100, 512x512, fp16, bench/gpu_probe.py.
H100_STEP = {
    "attention": "none over PyTorch's own choice, which is cuDNN there too",
    "channels-last": "12.7 to 10.2 ms",
    "pointwise-linear": "10.2 to 10.0 ms",
    "packed-qkv": "10.0 to 9.6 ms with the two caches",
    "kv-cache": "10.0 to 9.6 ms with packed-qkv and time-cache",
    "time-cache": "10.0 to 9.6 ms with packed-qkv and kv-cache",
    "fused-norm": "9.6 to 6.7 ms, and the VAE 27 to 9 ms",
    "fused-layernorm": "6.7 to 6.4 ms",
    "fused-geglu": "6.4 to 6.0 ms",
    "cudnn-benchmark": "none",
    "cuda-graph": "41.6 to 12.7 ms on a slow host, 18 to 12.7 on a faster one",
    "loop-graph": "none over cuda-graph",
}
# A picture of two steps at 256x256 beside the plain one, each with those above it: bench/results/cpu2/ladder.
CPU_PICTURE = {
    "winograd": "2.05x",
    "cpu-linear": "2.05x to 2.20x",
    "cpu-attention": "2.20x to 2.14x, its step 2.16x to 2.28x",
    "cpu-norm": "2.14x to 2.41x",
    "kv-cache": "2.41x to 2.53x",
    "keep-memory": "2.53x to 2.60x",
    "shared-halves": "2.60x to 2.49x, within the noise",
}
MEASURED = {"H100 step": H100_STEP, "CPU picture": CPU_PICTURE}
GAINS = {
    **{
        name: "; ".join(f"{gains[name]} ({what})" for what, gains in MEASURED.items() if name in gains)
        for name in H100_STEP | CPU_PICTURE
    },
    "prepacked": "1.4x alone, 1.2x after channels-last (CPU step at 256x256)",
    "page-out": "1.0 GB while denoising, 1.4 GB while decoding (SD 1.5 in fp32 on a CPU)",
    "int8-weights": "none: 0.97x (CPU picture), 0.77x after the cpu preset; UNet weights 3438 to 2629 MB",
    "int8-static": "1.07x alone (CPU picture); the demo model's at 32 dB from plain, 23 without its filter",
}
_WEIGHTS_CHANGE = ("packed-qkv",)
QUANTIZED = {
    "int8_weight_only": "int8-weights",
    "int8_dynamic": "int8-dynamic",
    "float8": "float8",
    "int8_static": "int8-static",
}
"""The schemes of sd.quantize by their names here."""

_ALL = (
    Optimization("naive", True, ANYTHING, naive, "attention spelled out: the reference", ("attention",)),
    Optimization(
        "attention",
        True,
        ANYTHING,
        attention,
        "attention backend by head size and device, or as named",
        value=attention_choice,
        hint="auto|flash|math|efficient|cudnn|flash+math",
    ),
    Optimization("fp16", False, ANYTHING, fp16, "weights and activations in fp16", ("bf16",)),
    Optimization("bf16", False, ANYTHING, bf16, "weights and activations in bf16"),
    Optimization(
        "int8-weights",
        False,
        ANYTHING,
        _quantization("int8_weight_only"),
        "int8 weights of linear layers",
        ("int8-dynamic", "float8", "int8-static", *_WEIGHTS_CHANGE),
    ),
    Optimization(
        "int8-dynamic",
        False,
        ANYTHING,
        _quantization("int8_dynamic"),
        "int8 weights, and activations as they come",
        ("float8", "int8-static", *_WEIGHTS_CHANGE),
    ),
    Optimization(
        "float8",
        False,
        SM89,
        _quantization("float8"),
        "float8 weights and activations of large linear layers",
        ("int8-static", *_WEIGHTS_CHANGE),
    ),
    Optimization(
        "int8-static",
        False,
        CPU,
        _quantization("int8_static"),
        "int8 attention and feed-forward, calibrated",
        ("kv-cache", "fused-geglu", "fused-layernorm", "compile", *_WEIGHTS_CHANGE),
    ),
    Optimization("channels-last", True, ANYTHING, channels_last, "channels innermost in memory"),
    Optimization("pointwise-linear", True, ANYTHING, pointwise_linear, "1x1 convolutions as matrix products"),
    Optimization(
        "winograd",
        True,
        CPU_FP32,
        winograd,
        "3x3 convolutions with a quarter of the multiplications",
        ("compile",),
        value=_gigabytes,
        hint="GB",
    ),
    Optimization("cpu-linear", True, CPU_FP32, cpu_linear, "linear layers in C++, with GEGLU", ("compile",)),
    Optimization("cpu-attention", True, CPU_FP32, cpu_attention, "attention in C++", ("compile",)),
    Optimization("cpu-norm", True, CPU_FP32, cpu_norm, "norms with SiLU in C++", ("compile",)),
    Optimization("page-out", True, CPU, page_out, "weights back to their file while not needed"),
    Optimization("packed-qkv", True, ANYTHING, packed_qkv, "q, k and v as one product"),
    Optimization("kv-cache", True, ANYTHING, kv_cache, "the text's keys and values once a prompt"),
    Optimization("time-cache", True, ANYTHING, time_cache, "timestep embeddings from a table"),
    Optimization("prepacked", True, ONEDNN, prepacked, "large weights in oneDNN's layout", ("compile",)),
    Optimization("fused-norm", True, SM80, fused_norm, "GroupNorm, SiLU and biases in one kernel"),
    Optimization("fused-layernorm", True, SM80, fused_layernorm, "residual and LayerNorm in one kernel"),
    Optimization("fused-geglu", True, SM80, fused_geglu, "GEGLU's gate in one kernel"),
    Optimization("fused-upsample", True, SM80, fused_upsample, "upsampling at the memory's speed"),
    Optimization("keep-memory", True, GLIBC, keep_memory, "freed memory is used again at once"),
    Optimization("shared-halves", True, ANYTHING, shared_halves, "what precedes the text, once for both halves"),
    Optimization(
        "deepcache",
        False,
        ANYTHING,
        deepcache,
        "deep levels of the UNet at every N-th step only",
        value=_at_least(1),
        hint="N",
    ),
    Optimization(
        "compile",
        True,
        ANYTHING,
        compile_models,
        "torch.compile of the UNet's blocks and the VAE",
        value=compile_target,
        hint="|".join(COMPILE_TARGETS),
    ),
    Optimization("cudnn-benchmark", True, NVIDIA, cudnn_benchmark, "cuDNN's fastest algorithm by trial"),
    Optimization("cuda-graph", True, NVIDIA, cuda_graph, "a UNet call as one launch", ("loop-graph",)),
    Optimization(
        "guidance-interval",
        False,
        ANYTHING,
        guidance_interval,
        "guidance in a part of the steps only",
        value=_fractions,
        hint="LOW-HIGH",
    ),
    Optimization("async-noise", True, ANYTHING, async_noise, "noise copied without waiting"),
    Optimization("loop-graph", True, NVIDIA, loop_graph, "all steps as one launch"),
    Optimization(
        "vae-tiling",
        False,
        ANYTHING,
        vae_tiling,
        "large pictures decoded in tiles",
        value=_at_least(16),
        hint="LATENTS",
    ),
)

REGISTRY: dict[str, Optimization] = {
    optimization.name: replace(optimization, gain=GAINS.get(optimization.name, optimization.gain))
    for optimization in _ALL
}


# ---- presets


def _exact(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        fused = ("fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample")
        caches = ("packed-qkv", "kv-cache", "time-cache")
        layout = ("attention", "channels-last", "pointwise-linear")
        return (*layout, *caches, *fused, "cuda-graph", "async-noise")
    return _cpu(device)


def _cpu(device: torch.device) -> tuple[str, ...]:
    from sd.kernels.allocator import supported

    kept = ("keep-memory",) if supported() else ()
    return ("winograd", "cpu-linear", "cpu-attention", "cpu-norm", "kv-cache", "page-out", *kept, "shared-halves")


def _fast(device: torch.device) -> tuple[str, ...]:
    return (*_exact(device), "deepcache=3")


PRESETS: dict[str, tuple[str, ...] | Callable[[torch.device], tuple[str, ...]]] = {
    "none": (),
    "original": ("attention", "int8-weights"),
    "exact": _exact,
    "cpu": _cpu,
    "fast": _fast,
}


def parse(text: str, device: str | torch.device) -> list[str]:
    """Names and presets joined by commas, with values as `deepcache=3` -> optimizations in the order of application.

    Named twice, the last one counts. Raises OptimizationError for an unknown name or value.
    """
    chosen: dict[str, str] = {}
    for word in filter(None, (word.strip() for word in text.split(","))):
        for item in _expand(word, torch.device(device)):
            chosen[item.partition("=")[0]] = item
    for item in chosen.values():
        _read(item)
    return [chosen[name] for name in REGISTRY if name in chosen]


def _expand(word: str, device: torch.device) -> Sequence[str]:
    if word not in PRESETS:
        return (word,)
    preset = PRESETS[word]
    return preset(device) if callable(preset) else preset


def _read(item: str) -> tuple[Optimization, tuple]:
    """`name` or `name=value` -> the optimization, and the arguments of `apply` after the pipeline."""
    name, given, text = item.partition("=")
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, [*REGISTRY, *PRESETS], n=1)
        hint = f"is it {near[0]!r}?" if near else "see --list-opts"
        raise OptimizationError(f"no optimization {name!r}; {hint}")
    optimization = REGISTRY[name]
    if not given:
        return optimization, ()
    if optimization.value is None:
        raise OptimizationError(f"{name} takes no value, so not {item!r}")
    try:
        return optimization, (optimization.value(text),)
    except ValueError as error:
        raise OptimizationError(f"{name}={text}: the value must be {error}") from error


def apply(pipe: Pipe, names: Sequence[str]) -> list[str]:
    """Apply optimizations (`name` or `name=value`) in the registry's order; returns them in that order.

    Once a pipeline, before its first call. Raises OptimizationError, with the pipeline still plain, if one cannot run
    on its device or beside another; or halfway, if one finds out itself.
    """
    if getattr(pipe, "optimizations", None):
        raise OptimizationError(f"this pipeline is optimized already: {', '.join(pipe.optimizations)}")
    items = {item.partition("=")[0]: item for item in names}
    read = {name: _read(item) for name, item in items.items()}
    for name, (optimization, _) in read.items():
        if not NEEDS[optimization.needs](pipe):
            raise OptimizationError(f"{name} needs {optimization.needs}; this is {_here(pipe)}")
    _check_conflicts([*items, *_loaded_quantized(pipe)])
    order = [name for name in REGISTRY if name in items]
    for name in order:
        optimization, arguments = read[name]
        optimization.apply(pipe, *arguments)
    pipe.optimizations = [items[name] for name in order]
    return pipe.optimizations


def _check_conflicts(names: Sequence[str]) -> None:
    for name in names:
        if other := next((other for other in REGISTRY[name].conflicts if other in names), None):
            raise OptimizationError(f"{name} and {other} cannot be combined")


def _loaded_quantized(pipe: Pipe) -> list[str]:
    """The optimization that a pipeline whose quantized layers came from a file has already."""
    done = getattr(pipe.unet, "quantization", None)
    return [QUANTIZED[done.scheme]] if done else []


def _here(pipe: Pipe) -> str:
    device = pipe.device.type
    if device == "cuda":
        major, minor = _capability(pipe)
        device = f"{torch.cuda.get_device_name(pipe.device)} (sm{major}{minor})"
    return f"{device} in {str(pipe.dtype).removeprefix('torch.')}"
