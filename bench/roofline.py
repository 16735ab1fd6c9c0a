"""Where a step's time goes: for each kind of module and each resolution, the work, the floor and the time it took.

    python bench/roofline.py                       # the UNet, one guided step at 512x512
    python bench/roofline.py --model vae --trace out/vae.json

The floor of a call is the longer of two times: its floating-point operations at the rate of a large matrix product, and
its bytes (inputs, weights and outputs once each) at the rate of a large copy, both measured here first. "other" is what
no module or attention call covers: residual sums, concatenations, activations written as functions.
"""

import argparse
import contextlib
import functools
import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import common
from sd import clip, unet, vae
from sd.config import Config
from sd.models import build
from sd.pipeline import StableDiffusion, default_device

log = logging.getLogger("roofline")

LEAVES = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Embedding, clip.QuickGELU)
ATTENTION = (unet.CrossAttention, vae.AttnBlock, clip.SelfAttention)
BUSY_CYCLES = 600_000_000  # keeps a GPU busy for about 0.3 s while the host queues a whole forward pass behind it

Clock = float | torch.cuda.Event


# ---- recording


@dataclass
class Call:
    """One call of a leaf: what it is, on what grid, what it has to do, and the clocks around it."""

    kind: str
    grid: str
    flops: int
    bytes: int
    start: Clock
    end: Clock

    @property
    def seconds(self) -> float:
        """On CUDA the device must have been synchronized since."""
        if isinstance(self.start, torch.cuda.Event):
            return self.start.elapsed_time(self.end) / 1e3
        return self.end - self.start


@dataclass
class Recorder:
    """Notes every call of a leaf module and of attention; what runs between two of them is "other".

    On the meta device the work is right and the clocks mean nothing.
    """

    device: torch.device
    calls: list[Call] = field(default_factory=list)
    grid: str = ""
    since: Clock | None = None

    @contextlib.contextmanager
    def watching(self, *models: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for model in models:
                for name, module in model.named_modules():
                    self._watch(name, module, stack)
            yield

    def begin(self) -> None:
        self.since = self._now()

    def end(self) -> None:
        self._start()

    def _watch(self, name: str, module: nn.Module, stack: contextlib.ExitStack) -> None:
        stack.enter_context(_removing(module.register_forward_pre_hook(self._note_grid)))
        if isinstance(module, LEAVES):
            stack.enter_context(_removing(module.register_forward_pre_hook(self._start)))
        if isinstance(module, (*LEAVES, unet.GEGLU)):
            stop = functools.partial(self._stop, kind_of(name, module))
            stack.enter_context(_removing(module.register_forward_hook(stop)))
        if isinstance(module, ATTENTION):
            stack.enter_context(_attribute(module, "attend", functools.partial(self._attend, module.attend)))

    def _note_grid(self, module: nn.Module, inputs: tuple) -> None:
        """Linear layers see positions in a row: they belong to the grid that was seen last."""
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
            height, width = inputs[0].shape[-2:]
            self.grid = f"{height}x{width}"

    def _start(self, *_) -> None:
        self._add("other", 0, 0)

    def _stop(self, kind: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._add(kind, leaf_flops(module, output), leaf_bytes(module, inputs[0], output))

    def _attend(self, attend: Callable, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        self._start()
        output = attend(q, k, v, **options)
        kind = "self-attention" if q.shape[-2] == k.shape[-2] else "cross-attention"
        self._add(kind, 4 * q.numel() * k.shape[-2], sum(t.nbytes for t in (q, k, v, output)))
        return output

    def _add(self, kind: str, flops: int, size: int) -> None:
        now = self._now()
        self.calls.append(Call(kind, self.grid, flops, size, self.since, now))
        self.since = now

    def _now(self) -> Clock:
        """On CUDA an event, read when all is done, so that the device never waits for the host."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextlib.contextmanager
def _removing(handle: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _attribute(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """The instance's attribute for a while; the class's shows again afterwards."""
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


# ---- the work of a call


def kind_of(name: str, module: nn.Module) -> str:
    """What a module is called in the table; its name in the checkpoint tells what a linear layer is for."""
    if isinstance(module, nn.Conv2d):
        return f"conv{module.kernel_size[0]}x{module.kernel_size[1]}"
    if not isinstance(module, nn.Linear):
        return type(module).__name__
    if "emb" in name:
        return "time embedding"
    return "feed-forward" if ".ff." in name or ".mlp." in name else "attention proj"


def leaf_flops(module: nn.Module, output: Tensor) -> int:
    """Two per multiply-add of matrix products and convolutions; what else there is does not count."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        return 2 * output.numel() * module.weight[0].numel()
    return 0


def leaf_bytes(module: nn.Module, x: Tensor, output: Tensor) -> int:
    """Inputs, weights and outputs, once each."""
    if isinstance(module, unet.GEGLU):  # its projection is a leaf of its own; what is left reads value and gate
        return 3 * output.nbytes
    if isinstance(module, nn.Embedding):
        return 2 * output.nbytes
    return x.nbytes + output.nbytes + sum(p.nbytes for p in module.parameters(recurse=False))


# ---- the table


@dataclass
class Ceilings:
    """FLOP/s and bytes/s of the device, measured."""

    flops: float
    bytes: float

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> "Ceilings":
        return cls(common.matmul_ceiling(device, dtype), common.copy_ceiling(device))


@dataclass
class Line:
    """All calls of one kind on one grid. `floor_ms` is what their work takes at the ceilings."""

    kind: str
    grid: str
    calls: int
    gflop: float
    mbytes: float
    floor_ms: float
    measured_ms: float
    of_floor: float
    bound: str
    share: float


def table_of(calls: Sequence[Call], seconds: Sequence[float], ceilings: Ceilings) -> list[Line]:
    """Calls and the time that each took -> one line for each kind and grid, the slowest first."""
    groups: dict[tuple[str, str], list[tuple[Call, float]]] = {}
    for call, took in zip(calls, seconds, strict=True):
        groups.setdefault((call.kind, call.grid), []).append((call, took))
    lines = [_line(group, ceilings, sum(seconds)) for group in groups.values()]
    return sorted(lines, key=lambda line: -line.measured_ms)


def _line(group: Sequence[tuple[Call, float]], ceilings: Ceilings, total: float) -> Line:
    calls, seconds = zip(*group, strict=True)
    compute = [call.flops / ceilings.flops for call in calls]
    memory = [call.bytes / ceilings.bytes for call in calls]
    floor, took = sum(map(max, compute, memory)), sum(seconds)
    return Line(
        kind=calls[0].kind,
        grid=calls[0].grid,
        calls=len(calls),
        gflop=sum(call.flops for call in calls) / 1e9,
        mbytes=sum(call.bytes for call in calls) / 1e6,
        floor_ms=1e3 * floor,
        measured_ms=1e3 * took,
        of_floor=floor / took if took else 0.0,
        bound="" if floor == 0 else "compute" if sum(compute) > sum(memory) else "memory",
        share=took / total if total else 0.0,
    )


# ---- measuring


def forward_of(pipe: StableDiffusion, model: str, size: int, batch: int) -> Callable[[], Tensor]:
    """One call of a model: `unet` with guidance (two latents a picture), `vae` decoding, or `text`."""
    config, side = pipe.config, size // pipe.config.vae.downsampling
    random = functools.partial(torch.randn, device=pipe.device, dtype=pipe.dtype)
    if model == "vae":
        z = random(batch, config.vae.z_channels, side, side)
        return lambda: pipe.vae.decode(z)
    tokens = torch.zeros(2 * batch, config.text.max_length, dtype=torch.int64, device=pipe.device)
    if model == "text":
        return lambda: pipe.clip(tokens)
    x = random(2 * batch, config.unet.in_channels, side, side)
    context = random(2 * batch, config.text.max_length, config.unet.context_dim)
    t = torch.tensor(981, device=pipe.device)
    return lambda: pipe.unet(x, t, context)


@torch.inference_mode()
def record_once(pipe: StableDiffusion, forward: Callable[[], Tensor]) -> list[Call]:
    """Every call of one forward pass."""
    recorder = Recorder(pipe.device)
    with recorder.watching(pipe.clip, pipe.unet, pipe.vae):
        if pipe.device.type == "cuda":
            torch.cuda._sleep(BUSY_CYCLES)
        recorder.begin()
        forward()
        recorder.end()
    common.synchronize(pipe.device)
    return recorder.calls


def record(pipe: StableDiffusion, forward: Callable[[], Tensor], repeats: int) -> tuple[list[Call], list[float]]:
    """Every call of a forward pass, and the median of the seconds that it took in several, after one to warm up."""
    record_once(pipe, forward)
    runs = [record_once(pipe, forward) for _ in range(repeats)]
    seconds = ([call.seconds for call in run] for run in runs)
    return runs[0], [statistics.median(times) for times in zip(*seconds, strict=True)]


def work_of(config: Config, model: str, size: int, batch: int = 1) -> list[Call]:
    """The calls of a model without running it: on the meta device."""
    pipe = StableDiffusion(config, *build(config))
    return record_once(pipe, forward_of(pipe, model, size, batch))


def write_trace(forward: Callable[[], Tensor], path: Path) -> None:
    """A profile of one forward pass, for chrome://tracing or ui.perfetto.dev."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        forward()
    profile.export_chrome_trace(str(path))
    log.info("wrote %s", path)


# ---- output


def print_lines(lines: Sequence[Line], title: str) -> None:
    shown = [
        {
            "kind": line.kind,
            "grid": line.grid,
            "calls": str(line.calls),
            "GFLOP": f"{line.gflop:.1f}",
            "MB": f"{line.mbytes:.0f}",
            "floor ms": f"{line.floor_ms:.3f}",
            "measured ms": f"{line.measured_ms:.3f}",
            "of the floor": f"{line.of_floor:.0%}" if line.floor_ms else "",
            "bound by": line.bound,
            "share": f"{line.share:.1%}",
        }
        for line in lines
    ]
    common.print_table(title, shown)


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """Measured time as bars, the floor within them."""
    if not importlib.util.find_spec("matplotlib"):
        log.warning("no plot: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines if line.share > 0.005][::-1]
    names = [f"{line.kind} {line.grid}" for line in lines]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.25 * len(lines)))
    axes.barh(names, [line.measured_ms for line in lines], color="tab:gray", label="measured")
    colors = ["tab:blue" if line.bound == "compute" else "tab:orange" for line in lines]
    axes.barh(names, [line.floor_ms for line in lines], color=colors, height=0.4)
    axes.set(xlabel="ms; the floor in blue where compute bounds it, in orange where memory does")
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    description, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=("unet", "vae", "text"), default="unet", help="(%(default)s)")
    parser.add_argument("--weights", default="random", metavar="FILE", help="a checkpoint, or SD 1.5 at random")
    parser.add_argument("--device", help="cuda or cpu (the best there is)")
    parser.add_argument("--dtype", choices=common.DTYPES, help="(float16 on CUDA, else float32)")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at a time (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="convolutions in NHWC")
    parser.add_argument("--out", type=Path, default=Path("out/roofline"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a profiler trace of one pass")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(argv)
    device = torch.device(args.device) if args.device else default_device()
    dtype = common.DTYPES[args.dtype] if args.dtype else common.default_dtype(device)
    pipe = common.load_pipeline(args.weights, device, dtype)
    if args.channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    forward = forward_of(pipe, args.model, args.size, args.batch)
    ceilings = Ceilings.of(device, dtype)
    lines = table_of(*record(pipe, forward, args.repeats), ceilings)
    report(lines, ceilings, args, common.environment(device, dtype))
    if args.trace:
        write_trace(forward, args.trace)
    return 0


def report(lines: Sequence[Line], ceilings: Ceilings, args: argparse.Namespace, environment: dict) -> None:
    name = args.model + "-nhwc" * args.channels_last
    layout = "channels-last" if args.channels_last else "contiguous"
    title = f"{args.model} {args.size}x{args.size}, batch {args.batch}, {layout}, {environment['dtype']}"
    title = f"{title}, {environment['device']}: {ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bytes / 1e9:.4g} GB/s"
    held = {"model": args.model, "size": args.size, "batch": args.batch, "layout": layout}
    measured = {"ceiling_tflops": ceilings.flops / 1e12, "ceiling_gbytes": ceilings.bytes / 1e9}
    rows = [held | asdict(line) | measured for line in lines]
    args.out.mkdir(parents=True, exist_ok=True)
    cells = [{column: common.cell(value) for column, value in row.items()} | environment for row in rows]
    common.write_csv(args.out / f"roofline-{name}-{args.size}-b{args.batch}.csv", cells)
    print_lines(lines, title)
    total = sum(line.measured_ms for line in lines)
    print(
        f"{sum(line.gflop for line in lines):.1f} GFLOP, {total:.2f} ms; floor {sum(x.floor_ms for x in lines):.2f} ms"
    )
    plot(lines, args.out / f"roofline-{name}-{args.size}-b{args.batch}.png", title)


if __name__ == "__main__":
    sys.exit(main())
