"""What every benchmark here shares: models, clocks, ceilings, memory, and the CSV files that hold the results."""

import contextlib
import csv
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sd.config import SD15, Config
from sd.kernels import native
from sd.models import build
from sd.pipeline import StableDiffusion
from sd.unet import UNet

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


# ---- models


def random_pipeline(
    config: Config = SD15, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> StableDiffusion:
    """A pipeline of random weights, filled in place on the device: seconds for SD 1.5, and never two copies.

    Speed does not depend on the weights' values, as long as they are neither zero nor overflow.
    """
    models = build(config)
    generator = torch.Generator(device).manual_seed(seed)
    for model in models:
        model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        _fill(model, generator)
    return StableDiffusion(config, *models)


def _fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the variance of what flows through them; gains of norms are 1, biases small."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0, 0.02, generator=generator)
        else:
            weight.fill_(1)


def load_pipeline(weights: str, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """`random` is SD 1.5's configuration with random weights, `tiny` a small one's; else a checkpoint's path."""
    if weights == "random":
        return random_pipeline(SD15, device, dtype)
    if weights == "tiny":
        from bench.reference.weights import TINY

        return random_pipeline(TINY, device, dtype)
    return StableDiffusion.load(weights, device=device, dtype=dtype)


def clone_pipeline(pipe: StableDiffusion) -> StableDiffusion:
    """A plain pipeline over the same weights in memory.

    An optimization that replaces weights replaces the clone's alone: the modules and parameters are its own.
    """
    models = build(pipe.config)
    for model, source in zip(models, (pipe.clip, pipe.unet, pipe.vae), strict=True):
        model.load_state_dict(source.state_dict(), strict=True, assign=True)
        model.eval().requires_grad_(False)
    return StableDiffusion(pipe.config, *models, tokenizer=pipe.tokenizer)


def _storages(pipe: StableDiffusion) -> dict[int, int]:
    """Address and bytes of every piece of memory that holds weights."""
    tensors = [t for model in (pipe.clip, pipe.unet, pipe.vae) for t in model.state_dict().values()]
    plain = [t.untyped_storage() for t in tensors if type(t) is Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in plain}


def shared_bytes(pipe: StableDiffusion, other: StableDiffusion) -> int:
    """Bytes of weights that both pipelines use from the same memory."""
    theirs = _storages(other)
    return sum(size for address, size in _storages(pipe).items() if address in theirs)


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32: without this, convolutions on CUDA round their inputs to TF32's 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


# ---- clocks


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def interleave(calls: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
    """What each call gave in each round; the order turns round every time, so that a drift hits all alike."""
    results: list[list[T]] = [[] for _ in calls]
    for i in range(rounds):
        order = range(len(calls)) if i % 2 == 0 else reversed(range(len(calls)))
        for j in order:
            results[j].append(calls[j]())
    return results


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


# ---- the device's ceilings


def matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 10) -> float:
    """FLOP/s of a large square matrix product on random data, by this PyTorch on this device: what MFU divides by."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = _median_seconds(lambda: a @ b, device, repeats)
    return 2 * size**3 / seconds


def copy_ceiling(device: torch.device, megabytes: int | None = None, repeats: int = 10) -> float:
    """Bytes/s of a large copy within the device's memory, bytes read plus bytes written."""
    megabytes = megabytes or (2048 if device.type == "cuda" else 256)
    source = torch.randn(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), device, repeats)


def _median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        call()
    return statistics.median(timed(call, device) for _ in range(repeats))


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in a call; best on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def unet_flops(config: Config, height: int, width: int, batch: int = 1) -> int:
    """FLOPs of one UNet call on latents of a picture of height x width pixels: 803.3e9 for SD 1.5 at 512x512."""
    scale = config.vae.downsampling
    with torch.device("meta"):
        unet = UNet(config.unet)
        x = torch.empty(batch, config.unet.in_channels, height // scale, width // scale)
        context = torch.empty(batch, config.text.max_length, config.unet.context_dim)
        return count_flops(lambda: unet(x, torch.empty(batch, dtype=torch.int64), context))


# ---- memory


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used, so that the next measurement starts from a known floor."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


class MemoryMeter:
    """The most memory that a call holds above what was held when the meter was made.

    On CUDA the allocator's reserved memory, which also counts the private pools of CUDA graphs; on Linux the resident
    set; elsewhere NaN.
    """

    def __init__(self, device: torch.device):
        self.device = device
        free_memory(device)
        self.floor = torch.cuda.memory_reserved(device) if device.type == "cuda" else _resident("VmRSS")

    def peak(self, call: Callable[[], object]) -> float:
        free_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            synchronize(self.device)
            return torch.cuda.max_memory_reserved(self.device) - self.floor
        if not _reset_resident_peak():
            return float("nan")
        call()
        return _resident("VmHWM") - self.floor


def _resident(field: str) -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(field)), float("nan"))


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# ---- what the numbers were measured with


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """The columns that stand in every row of every CSV file here."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": version("triton"),
    }


def commit() -> str:
    """The commit that runs, with a + if files differ from it; BENCH_COMMIT names it where there is no repository."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    head = _git("rev-parse", "--short=10", "HEAD")
    return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no")) if head else "unknown"


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return " ".join([name, *multiplying_flags()])


def multiplying_flags() -> list[str]:
    """What of this CPU's flags says how it multiplies, where that is more than AVX2: avx512_bf16, say."""
    wanted = ("avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return [flag for flag in wanted if flag in native.cpu_has()]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---- CSV files


def append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row, and the header if the file is new. Raises ValueError if the file's columns are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        header = path.read_text().splitlines()[0].split(",")
        if header != list(row):
            raise ValueError(f"{path} has other columns; move it away: {sorted(set(header) ^ set(row))}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def read_csv(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file by these rows, all at once. Rows may lack columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def cell(value: float | int | str) -> str:
    """A value as it stands in a CSV file: numbers with five significant digits, more than any of them deserves."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A table on the terminal: by rich if it is there, in plain columns if not."""
    columns = list(rows[0]) if rows else []
    if not importlib.util.find_spec("rich"):
        _print_plain(title, columns, rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    Console(width=None if console.is_terminal else 250).print(table)


def _print_plain(title: str, columns: list[str], rows: Sequence[Mapping[str, str]]) -> None:
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    print(title)
    for cells in ({c: c for c in columns}, *rows):
        print("  ".join(cells[c].ljust(w) for c, w in widths.items()).rstrip())
