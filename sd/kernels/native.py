"""The C++ kernels of cpp/: built on first use, kept in a cache folder, and called on tensors.

What a step does on a CPU is bounded by multiplications, of which two cores with AVX2 do 200 billion a second at best,
and PyTorch's libraries 45 to 140: the shapes are odd (a head of 40, rows of 320), and each pass beside a product, an
activation or a residual, reads and writes memory again. Here is one small product loop with such passes built in.

It is built for the best instruction set (`SETS`) that this CPU has, or for the one that SD_CPU_ISA names.

The sources need no header of PyTorch's and are called through ctypes, so they build in 3 seconds with any g++ or
clang++, where a `torch.utils.cpp_extension` takes 40 and wants ninja. They share PyTorch's OpenMP threads. Where they
cannot run, `load` is None and `why_not` says why.

A build is kept as kernels-KEY-DIGEST.so: KEY is of all that it was made from, DIGEST the SHA-256 of its own bytes. It
is synced and renamed into place, and loaded only while it is what its name says; a damaged one is built again.

Axes: B batch, C channels, H W grid, L positions, S keys, N heads, D head size. All tensors are fp32.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC")
FLAGS += ("-falign-loops=64", "-fvisibility=hidden", "-Wno-psabi")
BUILD_SECONDS = 60


@functools.cache
def cpu_has() -> frozenset[str]:
    """The flags of this CPU as the system lists them: {"avx2", "fma", ...}; none where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


@dataclass(frozen=True)
class InstructionSet:
    """What the sources are compiled for. needs: what /proc/cpuinfo lists where a CPU has it. flags: the compiler's."""

    needs: frozenset[str]
    flags: tuple[str, ...]


AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
AMX = AVX512 | {"amx_tile", "amx_bf16", "amx_int8", "avx512_bf16"}
WITHOUT_AMX = tuple(f"-mno-{flag.replace('_', '-')}" for flag in sorted(cpu_has()) if flag.startswith("amx"))
SETS = {
    "generic": InstructionSet(frozenset(), ()),
    "avx2": InstructionSet(AVX2, ("-march=x86-64-v3", "-mtune=native")),
    "avx512": InstructionSet(AVX512, ("-march=native", *WITHOUT_AMX)),
    "amx": InstructionSet(AMX, ("-march=native",)),
}
"""The sets by name, each better than the one before it. generic is whatever a compiler makes of vectors of four."""


# ---- building


class NotBuilt(Exception):
    """One line: why there is no library."""


class NotGranted(NotBuilt):
    """The CPU has it, and the system does not let a process use it, as in some containers."""


REFUSED: set[str] = set()
"""Instruction sets that the system has refused this process."""


def cache_folder() -> Path:
    """$SD_CACHE, or .cache/sd at home."""
    return Path(os.environ.get("SD_CACHE") or Path.home() / ".cache" / "sd")


def compiler() -> str | None:
    """$CXX, g++ or clang++, whichever is there."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _added_flags() -> list[str]:
    """$SD_CXXFLAGS, for a sanitizer or a debugger; they are the linker's as well."""
    return shlex.split(os.environ.get("SD_CXXFLAGS", ""))


def _flags() -> list[str]:
    """The compiler's for every source: FLAGS, the instruction set's, and those that were added."""
    name = wanted_set()
    return [*FLAGS, *SETS[name].flags, f'-DSD_SET="{name}"', *_added_flags()]


def _cpu() -> list[str]:
    """The model and the instructions of this processor: what -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    told = ("vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features")
    return sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in told})


def _openmp() -> list[str]:
    """The OpenMP library that PyTorch brings, since a second one would have threads of its own that spin."""
    return [str(path) for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))[:1]] or ["-lgomp"]


def _key(cxx: str) -> str:
    """16 digits that change with any source, the compiler, its flags, the CPU and the OpenMP library."""
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True, timeout=BUILD_SECONDS).stdout
    made_from = hashlib.sha256("\0".join((cxx, version, *_flags(), *_cpu(), *_openmp())).encode())
    for source in sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cpp")):
        made_from.update(f"\0{source.name}\0{hashlib.sha256(source.read_bytes()).hexdigest()}".encode())
    return made_from.hexdigest()[:16]


def _compile(cxx: str, folder: Path) -> Path:
    """Every source to an object of its own, at once, and one library in folder. Raises NotBuilt."""
    sources, flags = sorted(SOURCES.glob("*.cpp")), _flags()
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [cxx, *flags, "-c", str(source), "-o", str(made)] for source, made in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = folder / "kernels.so"
    _run([cxx, "-shared", *map(str, objects), *_added_flags(), *_openmp(), "-o", str(library)])
    return library


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"{command[0]} ended with {result.returncode}"]
        raise NotBuilt(next((line for line in lines if "error" in line), lines[0]))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _kept(key: str) -> Path | None:
    """The library of this key, if one is there that is what its name says. Damaged ones are removed."""
    for path in sorted(cache_folder().glob(f"kernels-{key}-*.so")):
        if path.name == f"kernels-{key}-{_digest(path)}.so":
            return path
        log.info("damaged, and built again: %s", path)
        path.unlink(missing_ok=True)
    return None


def _keep(made: Path, key: str) -> None:
    """Copy a library into the cache folder, whole and synced or not at all. Several processes may do so at once."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file, part = tempfile.mkstemp(prefix=".kernels-", suffix=".part", dir=folder)
    try:
        with open(file, "wb") as to:
            to.write(made.read_bytes())
            to.flush()
            os.fsync(to.fileno())
        shutil.copymode(made, part)  # mkstemp's is readable by its owner alone, and a folder may be shared
        os.replace(part, folder / f"kernels-{key}-{_digest(made)}.so")
    finally:
        Path(part).unlink(missing_ok=True)


def _built(cxx: str, key: str) -> ctypes.CDLL:
    """Built by this process, or by another that wants the same at the same time."""
    with _alone():
        if (library := _found(key)) is not None:  # another process has built it meanwhile
            return _opened(library)
        return _build(cxx, key)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time builds what all of them want. Where a folder takes no locks, each does."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on Windows

            cache_folder().mkdir(parents=True, exist_ok=True)
            folder = os.open(cache_folder(), os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def _build(cxx: str, key: str) -> ctypes.CDLL:
    """Build, keep, and open what was kept; where nothing can be kept, what was built, for this process alone."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sd-kernels-") as folder:
        made = _compile(cxx, Path(folder))
        log.info("built the CPU kernels in %.1f s", time.perf_counter() - started)
        try:
            _keep(made, key)
        except OSError as error:
            log.warning("the CPU kernels are built anew by every process: cannot write to the cache folder: %s", error)
            return _opened(made)
    if (library := _kept(key)) is None:
        raise NotBuilt(f"the library does not read back as it was written to {cache_folder()}: is the disk sound?")
    return _opened(library)


def _found(key: str) -> Path | None:
    """`_kept`, where a folder that cannot be read holds nothing."""
    try:
        return _kept(key)
    except OSError:
        return None


def sets() -> list[str]:
    """The names of the instruction sets that this CPU has and the system grants, as far as is known, the best last."""
    return [name for name, isa in SETS.items() if isa.needs <= cpu_has() and name not in REFUSED]


def wanted_set() -> str:
    """$SD_CPU_ISA, or the best that there is. Raises NotBuilt for one that this CPU does not have."""
    name = os.environ.get("SD_CPU_ISA", "").strip().lower() or sets()[-1]
    if name not in SETS:
        raise NotBuilt(f"SD_CPU_ISA is {name!r} and must be one of {', '.join(SETS)}")
    if lacking := sorted(SETS[name].needs - cpu_has()):
        raise NotBuilt(f"SD_CPU_ISA={name}, and this CPU has no {lacking[0]}; it has {', '.join(sets())}")
    return name


@functools.cache
def attempt() -> tuple[ctypes.CDLL | None, str]:
    """The library, built if it is not there yet, and why not: one of them. Once a process; cache_clear() forgets."""
    cxx = compiler()
    if cxx is None:
        return None, "no C++ compiler (apt-get install g++)"
    try:
        key = _key(cxx)
        library = _found(key)
        return (_opened(library) if library else _built(cxx, key)), ""
    except NotGranted as error:
        if os.environ.get("SD_CPU_ISA") or len(sets()) == 1:
            return None, str(error)
        log.info("%s", str(error).partition(";")[0])
        REFUSED.add(wanted_set())
        return attempt.__wrapped__()
    except (NotBuilt, OSError, subprocess.SubprocessError) as error:
        return None, " ".join(f"the C++ kernels are left out: {error}".split())


def load() -> ctypes.CDLL | None:
    """The library, built if it is not there yet; None where that cannot be, see `why_not`."""
    return attempt()[0]


def why_not() -> str:
    """Why the kernels do not run here, in one line: "no C++ compiler (apt-get install g++)", say. "" if they do."""
    return attempt()[1]


# ---- calling


def readable(*tensors: Tensor) -> bool:
    """Whether the kernels can read these: fp32 on the CPU, of no subclass (quantized weights are one)."""
    kinds = (Tensor, nn.Parameter)
    return all(type(t) in kinds and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


class _Pointer:
    """A tensor as its address, if the kernels can read it; None as null."""

    dtype = torch.float32

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p | None:
        if tensor is None:
            return None
        if tensor.numel() == 0:
            raise ValueError("a tensor is empty")
        if tensor.dtype != cls.dtype or tensor.device.type != "cpu":
            raise TypeError(f"a tensor of {cls.dtype} on the cpu is needed, not of {tensor.dtype} on {tensor.device}")
        return ctypes.c_void_p(tensor.data_ptr())


class _Double(_Pointer):
    dtype = torch.float64


class _Any(_Pointer):
    """Of a dtype that another argument tells."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p | None:
        if tensor is not None and tensor.device.type != "cpu":
            raise TypeError(f"a tensor on the cpu is needed, not on {tensor.device}")
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


_P, _L, _I, _F, _S = _Pointer, ctypes.c_int64, ctypes.c_int, ctypes.c_float, ctypes.POINTER(ctypes.c_int64)

# The arguments of each function as its source has them; the last is the number of threads.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "sd_linear": (_P, _L, _P, _P, _P, _P, _L, _L, _L, _I),
    "sd_geglu": (_P, _L, _P, _P, _P, _L, _L, _L, _I),
    "sd_patches": (_P, _L, _L, _L, _L, _L, _P, _I),
    "sd_attention": (_P, _P, _P, _P, _L, _L, _L, _L, _L, _S, _I),
    "sd_winograd": (_P, _L, _L, _L, _L, _I, _P, _L, _P, _L, _P, _P, _I, _I),
    "sd_winograd_kernel": (_P, _S, _L, _L, _I, _Double, _I, _P, _I),
    "sd_group_norm": (_P, _P, _L, _L, _L, _L, _P, _P, _F, _I, _I),
    "sd_layer_norm": (_P, _P, _L, _L, _P, _P, _F, _I),
    "sd_dot_sizes": (_S,),
    "sd_dot_pack": (_Any, _I, _S, _L, _L, _L, _I, _I, _I, _P, _Any, _Any, _I),
    "sd_dot_product": (
        _I,
        _Any,
        _L,
        _L,
        _L,
        _L,
        _L,
        _L,
        _S,
        _Any,
        _L,
        _L,
        _P,
        _P,
        _L,
        _L,
        _P,
        _Any,
        _I,
        _I,
        _F,
        _F,
        _I,
    ),
    "sd_dot_rows": (_Any, _I, _L, _L, _L, _L, _P, _P, _F, _I, _F, _F, _Any, _I),
    "sd_dot_grid": (_P, _L, _P, _L, _L, _L, _L, _I, _L, _L, _P, _P, _F, _I, _I, _F, _F, _Any, _I),
    "sd_dot_patches": (_Any, _L, _L, _L, _L, _I, _Any, _I),
    "sd_dot_attention": (_Any, _Any, _Any, _Any, _L, _L, _L, _L, _L, _S, _I),
}

SIZES = {"sd_vector": ctypes.c_int64, "sd_panel": ctypes.c_int64, "sd_set": ctypes.c_char_p, "sd_ready": ctypes.c_int}


def _opened(path: Path) -> ctypes.CDLL:
    """The library at path, its functions with their types. Raises NotBuilt."""
    try:
        library = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
        for name, kind in SIZES.items():
            getattr(library, name).restype = kind
    except (OSError, AttributeError) as error:
        raise NotBuilt(f"the library cannot be loaded: {error}") from error
    if "sd_ready" in SIZES and not library.sd_ready():
        raise NotGranted("the system does not let a process use AMX; SD_CPU_ISA=avx512 does without")
    return library


def _library() -> ctypes.CDLL:
    if (library := load()) is None:
        raise RuntimeError(f"the C++ kernels do not run here: {why_not()}")
    return library


def vector() -> int:
    """Numbers in a vector: the channels of norms, and of what `winograd` convolves, must be a multiple of it."""
    return _library().sd_vector()


def panel() -> int:
    """Columns of a panel: the rows of GEGLU's weights must be a multiple of it."""
    return _library().sd_panel()


def instruction_set() -> str:
    """The name in `SETS` of what the kernels were built for."""
    return _library().sd_set().decode()


def _call(name: str, *arguments: Tensor | int | float | ctypes.Array | None) -> None:
    getattr(_library(), name)(*arguments, torch.get_num_threads())


def _shaped(
    what: str, tensor: Tensor | None, *shape: int, layout: torch.memory_format = torch.contiguous_format
) -> Tensor | None:
    """The tensor, in this layout. ValueError if it has another shape: a kernel reads what it is told is there."""
    if tensor is None:
        return None
    if tensor.shape != shape:
        raise ValueError(f"{what} is {list(tensor.shape)} and must be {list(shape)}")
    return tensor.contiguous(memory_format=layout)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _need_multiple(what: str, count: int, of: int) -> None:
    if count % of:
        raise ValueError(f"{what} must be a multiple of {of}, not {count}")


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> [rows, C], a view where memory allows."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x weight^T + bias + residual. x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N]."""
    rows, columns = _rows(x), weight.shape[0]
    out = x.new_empty(*x.shape[:-1], columns)
    weight, bias = _shaped("weight", weight, columns, x.shape[-1]), _shaped("bias", bias, columns)
    residual = _shaped("residual", residual, *out.shape)
    _call("sd_linear", rows, rows.stride(0), weight, bias, residual, out, rows.shape[0], rows.shape[1], columns)
    return out


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """value * gelu(gate), the halves of x weight^T + bias.

    x [..., K], weight [2N, K], bias [2N] -> [..., N]; 2N must be a multiple of `panel`.
    """
    rows, columns = _rows(x), weight.shape[0]
    _need_multiple("rows of GEGLU's weight", columns, panel())
    out = x.new_empty(*x.shape[:-1], columns // 2)
    weight, bias = _shaped("weight", weight, columns, x.shape[-1]), _shaped("bias", bias, columns)
    _call("sd_geglu", rows, rows.stride(0), weight, bias, out, rows.shape[0], rows.shape[1], out.shape[-1])
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v. q [B, N, L, D], k and v [B, N, S, D] -> [B, N, L, D]."""
    batch, heads, queries, size = q.shape
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != size:
        raise ValueError(f"q, k and v do not fit each other: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(batch, queries, heads, size)
    strides = (ctypes.c_int64 * 9)(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    _call("sd_attention", q, k, v, out, batch, heads, queries, k.shape[2], size, strides)
    return out.transpose(1, 2)


def patches(x: Tensor, stride: int = 1) -> Tensor:
    """x [B, C, H, W] -> its 3x3 patches around every stride-th position, with zeros beyond the edges.

    [B, H / stride, W / stride, 9 C], rounded up: a row's product with weights [C_out, C, 3, 3] is the convolution.
    """
    batch, channels, height, width = x.shape
    x = _channels_last(x)
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

    C must be a multiple of `vector`. kernel: from `winograd_kernel`, made with the same `upsampled` and the G of m, 2
    or 4. bias: [out_channels], or [B or 1, out_channels] for one a picture. residual: shaped as the result.
    """
    batch, channels, height, width = x.shape
    x = _channels_last(x)
    height, width = height << upsampled, width << upsampled
    _need_multiple("channels", channels, vector())
    numbers, panels = (m + 2 - upsampled) ** 2, -(-out_channels // panel())
    kernel = _shaped("kernel", kernel, numbers, panels, channels, panel())
    shape = batch, out_channels, height, width
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    residual = _shaped("residual", residual, *shape, layout=torch.channels_last)
    each = bias is not None and bias.ndim == 2 and bias.shape[0] > 1
    bias = None if bias is None else _shaped("bias", bias.view(-1, out_channels), batch if each else 1, out_channels)
    sizes = batch, height, width, channels, upsampled
    _call("sd_winograd", x, *sizes, kernel, out_channels, bias, out_channels * each, residual, out, m)
    return out


def winograd_kernel(weight: Tensor, g: Tensor, upsampled: bool) -> Tensor:
    """G g G^T of weight [C_out, C_in, 3, 3], with g [n, 3] in fp64, in the layout that `winograd` takes."""
    out_channels, channels = weight.shape[:2]
    n = len(g)
    if weight.shape[2:] != (3, 3):
        raise ValueError(f"the weight of a 3x3 convolution is needed, not {list(weight.shape)}")
    kernel = weight.new_empty((n - upsampled) ** 2, -(-out_channels // panel()), channels, panel())
    strides = (ctypes.c_int64 * 4)(*weight.stride())
    left_out = 2 if upsampled else -1
    _call("sd_winograd_kernel", weight, strides, channels, out_channels, n, _shaped("g", g, n, 3), left_out, kernel)
    return kernel


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, in_place: bool = False
) -> Tensor:
    """Group normalization of x [B, C, H, W], C a multiple of `vector`, and SiLU in the same pass -> channels-last.

    in_place: x may be overwritten.
    """
    batch, channels, height, width = x.shape
    _need_multiple("channels", channels, vector())
    _need_multiple("channels", channels, groups)
    x = _channels_last(x)
    out = x if in_place else torch.empty_like(x, memory_format=torch.channels_last)
    weight, bias = _shaped("weight", weight, channels), _shaped("bias", bias, channels)
    _call("sd_group_norm", x, out, batch, height * width, channels, groups, weight, bias, eps, silu)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalization over the last axis of x [..., C], C a multiple of `vector`."""
    channels, x = x.shape[-1], x.contiguous()
    _need_multiple("channels", channels, vector())
    out = torch.empty_like(x)
    weight, bias = _shaped("weight", weight, channels), _shaped("bias", bias, channels)
    _call("sd_layer_norm", x, out, x.numel() // channels, channels, weight, bias, eps)
    return out
