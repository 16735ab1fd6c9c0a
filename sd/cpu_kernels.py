"""The C++ kernels of cpu_kernels.cpp: built on first use, kept in a cache folder, and called on tensors.

What a step does on a CPU is bounded by multiplications, of which two cores with AVX2 do 200 billion a second at best,
and PyTorch's libraries 45 to 140: the shapes are odd (a head of 40, rows of 320), and each pass beside a product, an
activation or a residual, reads and writes memory again. Here is one small product loop with such passes built in.

The source needs no header of PyTorch's and is called through ctypes, so it builds in 3 seconds with any g++ or clang++,
where a `torch.utils.cpp_extension` takes 40 and wants ninja. It shares PyTorch's OpenMP threads. Without a compiler
`load` says so once in the log, and those who call fall back to PyTorch.

Axes: B batch, C channels, H W grid, L positions, S keys, N heads, D head size. All tensors are fp32.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-march=native", "-fopenmp", "-fPIC", "-Wno-psabi")
BUILD_SECONDS = 60
PANEL = 16  # as in the source


# ---- building


def cache_folder() -> Path:
    """$SD_CACHE, or .cache/sd at home."""
    return Path(os.environ.get("SD_CACHE") or Path.home() / ".cache" / "sd")


def compiler() -> str | None:
    """$CXX, g++ or clang++, whichever is there."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _cpu() -> str:
    """The instructions of this processor: what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _library(cxx: str) -> Path:
    """Where the build is kept: under a name that changes with the source, the compiler, the flags and the CPU."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=BUILD_SECONDS).stdout
    told = "\0".join((SOURCE.read_text(), version, *FLAGS, _cpu(), *_openmp()))
    return cache_folder() / f"cpu_kernels-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"


def _openmp() -> list[str]:
    """The OpenMP library that PyTorch brings, since a second one would have threads of its own that spin."""
    return [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))[:1]] or ["-lgomp"]


def _build(cxx: str, library: Path) -> None:
    """Compile beside the library and rename: several processes may do so at once."""
    started = time.perf_counter()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made, target = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
        run([cxx, *FLAGS, "-c", str(SOURCE), "-o", str(made)])
        run([cxx, "-shared", str(made), *_openmp(), "-o", str(target)])
        target.replace(library)
    log.info("built the CPU kernels in %.1f s: %s", time.perf_counter() - started, library)


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library, built if it is not there yet; None, with a line in the log, where that cannot be."""
    cxx = compiler()
    if cxx is None:
        log.warning("no C++ compiler: the CPU kernels are left out (apt-get install g++)")
        return None
    try:
        library = _library(cxx)
        if not library.exists():
            _build(cxx, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[:1]
        log.warning("the CPU kernels could not be built and are left out: %s", *reason or [error])
        return None


# ---- calling


def readable(*tensors: Tensor) -> bool:
    """Whether the kernels can read these: fp32 on the CPU, of no subclass (quantized weights are one)."""
    kinds = (Tensor, nn.Parameter)
    return all(type(t) in kinds and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def _converted(argument: Tensor | int | float | ctypes.Array | None) -> object:
    """A tensor as its address, an integer as int64_t, which serves for int as well."""
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def _call(name: str, *arguments: Tensor | int | float | ctypes.Array | None) -> None:
    """The last argument of each function is the number of threads: PyTorch's."""
    getattr(load(), name)(*map(_converted, (*arguments, torch.get_num_threads())))


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C], a view where memory allows."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x weight^T + bias + residual. x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N]."""
    rows, weight = _rows(x), weight.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    residual = None if residual is None else residual.contiguous()
    sizes = rows.shape[0], rows.shape[1], weight.shape[0]
    _call("sd_linear", rows, rows.stride(0), weight, bias, residual, out, *sizes)
    return out


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """value * gelu(gate), the halves of x weight^T + bias. x [..., K], weight [2N, K], N divisible by 8 -> [..., N]."""
    rows, weight = _rows(x), weight.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.shape[0] // 2)
    _call("sd_geglu", rows, rows.stride(0), weight, bias, out, rows.shape[0], rows.shape[1], out.shape[-1])
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q [B, N, L, D], k and v [B, N, S, D] -> [B, N, L, D]."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, queries, size = q.shape
    out = q.new_empty(batch, queries, heads, size)
    strides = (ctypes.c_int64 * 9)(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    _call("sd_attention", q, k, v, out, batch, heads, queries, k.shape[2], size, strides)
    return out.transpose(1, 2)


def patches(x: Tensor, stride: int = 1) -> Tensor:
    """x [B, C, H, W] -> its 3x3 patches around every stride-th position, with zeros beyond the edges.

    [B, H / stride, W / stride, 9 C], rounded up: a row's product with weights [C_out, C, 3, 3] is the convolution.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, -(-height // stride), -(-width // stride), 9 * channels)
    _call("sd_patches", x, batch, height, width, channels, stride, out)
    return out


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """3x3 convolution with padding 1, as a product of patches with the weights as they are.

    x [B, C_in, H, W], weight [C_out, C_in, 3, 3] -> [B, C_out, H / stride, W / stride], channels-last.
    """
    return linear(patches(x, stride), weight.flatten(1), bias).permute(0, 3, 1, 2)


def winograd(
    x: Tensor,
    kernel: Tensor,
    out_channels: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    upsampled: bool = False,
    m: int = 4,
) -> Tensor:
    """3x3 convolution with padding 1 of x [B, C, H, W], or of x upsampled by 2 -> channels-last result.

    kernel: from `winograd_kernel`, made with the same `upsampled` and the G of m. bias: [out_channels], or
    [B, out_channels] for one a picture. residual: shaped as the result.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    height, width = height << upsampled, width << upsampled
    out = torch.empty(batch, out_channels, height, width, dtype=x.dtype, memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    stride = out_channels if bias is not None and bias.ndim == 2 and bias.shape[0] > 1 else 0
    sizes = batch, height, width, channels, upsampled
    _call("sd_winograd", x, *sizes, kernel, out_channels, bias, stride, residual, out, m)
    return out


def winograd_kernel(weight: Tensor, g: Tensor, upsampled: bool) -> Tensor:
    """G g G^T of weight [C_out, C_in, 3, 3], with g [n, 3] in fp64, in the layout that `winograd` takes."""
    out_channels, channels = weight.shape[:2]
    n = len(g)
    kernel = weight.new_empty((n - upsampled) ** 2, -(-out_channels // PANEL), channels, PANEL)
    strides = (ctypes.c_int64 * 4)(*weight.stride())
    left_out = 2 if upsampled else -1
    _call("sd_winograd_kernel", weight, strides, channels, out_channels, n, g, left_out, kernel)
    return kernel


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, in_place: bool = False
) -> Tensor:
    """Group normalization of x [B, C, H, W], C divisible by 8, and SiLU in the same pass -> channels-last.

    in_place: x may be overwritten.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
    sizes = x.shape[0], x.shape[2] * x.shape[3], x.shape[1], groups
    _call("sd_group_norm", x, out, *sizes, weight, bias, eps, silu)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalization over the last axis of x [..., C], C divisible by 8."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("sd_layer_norm", x, out, x.numel() // x.shape[-1], x.shape[-1], weight, bias, eps)
    return out
