"""CUDA graphs: the kernels of a call are recorded once and launched together, so that the host no longer holds them up.

A graph reads its inputs and the weights from where they were when it was recorded. So inputs are copied to their place
before each replay, weights written to in place are seen, and one that was replaced makes the graphs be recorded again.
"""

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sd.checkpoints.stamps import address
from sd.guidance import Conditions
from sd.noise import PictureNoise
from sd.optimizations.base import NVIDIA, OptimizationError, Patch, Record, Stage, each, optimization, record_of
from sd.samplers import Sampler
from sd.schedules import Schedule
from sd.start import Blend

MAX_GRAPHS = 16  # a module; the oldest goes
WARM_UP_CALLS = 2  # libraries choose algorithms, allocate workspaces and compile in these


@dataclass(frozen=True)
class Recording:
    """What a capture leaves: write to `inputs`, call `replay`, read `output`."""

    inputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    output: Any


def record(function: Callable, inputs: Sequence[Tensor], pool: Any = None) -> Recording:
    """Capture function(*inputs) as a CUDA graph, after calls that warm it up on a stream of their own."""
    with torch.inference_mode(False):  # they are written to by calls in any mode
        places = tuple(t.clone() for t in inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function(*places)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = function(*places)
    return Recording(places, graph.replay, output)


def addresses(module: nn.Module) -> tuple[int, ...]:
    return tuple(address(p) for p in module.parameters())


@dataclass
class Recordings:
    """The graphs of one function that reads the weights of `module`, by what else they depend on."""

    module: nn.Module
    captures: int = 0
    kept: dict[Hashable, Recording] = field(default_factory=dict)
    weights: tuple[int, ...] = ()

    def get(self, key: Hashable, function: Callable, inputs: Sequence[Tensor]) -> Recording:
        """The recording for this key, made now if there is none or if a weight has moved."""
        weights = addresses(self.module)
        if weights != self.weights:
            self.kept.clear()
            self.weights = weights
        if key not in self.kept:
            if len(self.kept) >= MAX_GRAPHS:
                self.kept.pop(next(iter(self.kept)))
            self.kept[key] = record(function, inputs)
            self.captures += 1
        return self.kept[key]


def _shapes(tensors: Sequence[Tensor]) -> tuple:
    return tuple((t.shape, t.dtype, t.stride()) for t in tensors)


class Graphed:
    """A function of tensors as a CUDA graph for each shape; what it returns, also several tensors, is the caller's own.

    key() is whatever else decides what the function does, such as the phase of a cache.
    """

    def __init__(self, function: Callable[..., Tensor], module: nn.Module, key: Callable[[], Hashable] = lambda: None):
        self.function = function
        self.key = key
        self.recordings = Recordings(module)

    def __call__(self, *inputs: Tensor) -> Tensor:
        if not all(isinstance(value, Tensor) for value in inputs):  # the text encoder without its last layers
            return self.function(*inputs)
        recording = self.recordings.get((_shapes(inputs), self.key()), self.function, inputs)
        for place, value in zip(recording.inputs, inputs, strict=True):
            place.copy_(value)
        recording.replay()
        return each(torch.clone, recording.output)


# ---- noise without waiting


class AsyncNoise:
    """A PictureNoise that copies to the device from pinned memory: the host draws the next while the device works."""

    def __init__(self, noise: PictureNoise):
        self.on_host = copy.copy(noise)  # shares the generators
        self.on_host.device = torch.device("cpu")
        self.device, self.dtype = noise.device, noise.dtype

    def __call__(self) -> Tensor:
        return self._pinned(self.on_host()).to(self.device, non_blocking=True)

    def draw(self, count: int, like: Tensor) -> Tensor:
        """The next `count` draws, copied at once: [count, B, C, H, W]. `like` has the shape of one, for none at all."""
        if count == 0:
            return like.new_empty(0, *like.shape)
        return self._pinned(torch.stack([self.on_host() for _ in range(count)])).to(self.device, non_blocking=True)

    def _pinned(self, noise: Tensor) -> Tensor:
        return noise.pin_memory() if self.device.type == "cuda" else noise


class Drawn:
    """Noise that was drawn before, handed out in order."""

    def __init__(self, draws: Tensor):
        self.draws = iter(draws.unbind(0))

    def __call__(self) -> Tensor:
        return next(self.draws)


def count_draws(sampler: Sampler, schedule: Schedule) -> int:
    """How often a sampler asks for noise on the way down a schedule."""
    count = 0

    def noise() -> Tensor:
        nonlocal count
        count += 1
        return torch.zeros(1, 1, 1, 1)

    for _ in sampler(lambda x, t: x, torch.zeros(1, 1, 1, 1), schedule, noise):
        pass
    return count


# ---- the whole loop


class GraphedLoop:
    """A pipeline's `sample` as one CUDA graph: all steps, guidance and the sampler's arithmetic.

    A graph holds for one sampler, schedule, guidance scale and shape. `on_step` is called for all the steps
    once the picture is done: a graph does not stop to report. Prompts that change over the steps are drawn step by
    step.
    """

    def __init__(self, sample: Callable[..., Tensor], done: Record):
        self.sample = sample
        self.done = done
        self.recordings = Recordings(done.pipe.unet)

    def __call__(
        self,
        x: Tensor,
        conditions: Conditions,
        sampler: Sampler,
        schedule: Schedule,
        noise: PictureNoise,
        on_step: Callable[[int, int, Tensor], None] | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        if conditions.by_step:  # what is derived from the text is brought up to date between calls
            return self.sample(x, conditions, sampler, schedule, noise, on_step, blend)
        told = [name for name in ("context", "beside") if getattr(conditions, name) is not None]
        hints = [one.hint for one in conditions.residuals]
        kept = ("clean", "noise", "mask") if blend else ()

        def loop(x: Tensor, draws: Tensor, *given: Tensor) -> list[Tensor]:
            steps: list[Tensor] = []
            rest = iter(given)
            here = replace(conditions, **{name: next(rest) for name in told})
            here = replace(here, residuals=tuple(replace(one, hint=next(rest)) for one in conditions.residuals))
            keep = blend and replace(blend, **{name: next(rest) for name in kept})
            self.sample(x, here, sampler, schedule, Drawn(draws), lambda i, n, x: steps.append(x), keep)
            return steps

        given = [getattr(conditions, name) for name in told] + hints + [getattr(blend, name) for name in kept]
        inputs = (x, AsyncNoise(noise).draw(count_draws(sampler, schedule), x), *given)
        beside = filter(None, (record_of(one.network) for one in conditions.residuals))
        for done in (self.done, *beside):  # first, since weights that are packed anew move
            done.refresh(conditions.context)
        others = tuple((o.network, addresses(o.network), o.weight, o.start, o.end) for o in conditions.residuals)
        key = (_shapes(inputs), *told, others, conditions.scale, sampler, schedule, blend and blend.schedule)
        recording = self.recordings.get(key, loop, inputs)
        for place, value in zip(recording.inputs, inputs, strict=True):
            place.copy_(value)
        recording.replay()
        steps = [x.clone() for x in (recording.output if on_step else recording.output[-1:])]
        if on_step:
            for i, x in enumerate(steps, start=1):
                on_step(i, len(schedule), x)
        return steps[-1]


# ---- the switches


@contextmanager
def _trying_algorithms() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _refuse_what_waits(patch: Patch) -> None:
    """torchao's int8 layers print each input to see what it is (torchao 0.18, `safe_int_mm`), unless they are compiled:
    that waits for the GPU, and cannot be captured."""
    quantization = getattr(patch.unet, "quantization", None)
    compiled = any(other.name == "compile" for other in patch.record.patches)
    if quantization and quantization.switch == "int8-dynamic" and not compiled:
        raise OptimizationError(f"{patch.name} cannot be combined with int8-dynamic, unless with compile too")


@optimization(
    "cudnn-benchmark",
    stage=Stage.CAPTURE,
    exact=True,
    summary="cuDNN's fastest algorithm by trial",
    needs=NVIDIA,
)
def cudnn_benchmark(patch: Patch) -> None:
    """cuDNN tries its convolution algorithms on the first call of each shape and keeps the fastest. Exact.

    Helps: convolutions, half of the work. Hurts: the first picture of each size, by about a second.
    """
    for seam in ("predict", "decode"):
        patch.around(seam, _trying_algorithms())


@optimization(
    "cuda-graph",
    stage=Stage.CAPTURE,
    exact=True,
    summary="a UNet call as one launch",
    needs=NVIDIA,
    conflicts=("loop-graph",),
)
def cuda_graph(patch: Patch) -> None:
    """The text encoder, a UNet call and the VAE's decoder as one CUDA graph each. Exact.

    Helps: at small batches, where the host launches some 900 kernels a step slower than they run. Hurts: the first
    picture of each size, by a second, and memory: a graph keeps its activations.
    """
    _refuse_what_waits(patch)
    patch.around("predict", lambda predict: Graphed(predict, patch.unet, patch.record.key))
    _graph_text_and_vae(patch)


@optimization("loop-graph", stage=Stage.LOOP, exact=True, summary="all steps as one launch", needs=NVIDIA)
def loop_graph(patch: Patch) -> None:
    """All steps with guidance and sampler as a single CUDA graph; text encoder and VAE as one each. Exact.

    Helps: as cuda-graph does, and the sampler's arithmetic too; the host only launches once. Hurts: every new number of
    steps, sampler or guidance scale is recorded anew, for a second or more; progress shows at the end only.
    """
    _refuse_what_waits(patch)
    patch.around("sample", lambda sample: GraphedLoop(sample, patch.record))
    _graph_text_and_vae(patch)


def _graph_text_and_vae(patch: Patch) -> None:
    patch.around("text", lambda forward: Graphed(forward, patch.clip))
    patch.around("decode", lambda decode: Graphed(decode, patch.vae))


@optimization("async-noise", stage=Stage.NOISE, exact=True, summary="noise copied without waiting")
def async_noise(patch: Patch) -> None:
    """Noise goes to the device from pinned memory, so that the host does not wait for each step of DDPM. Exact.

    Helps: samplers that draw noise, on a GPU. Hurts: nothing known.
    """

    def sampling(sample: Callable) -> Callable:
        def sample_async(x, conditions, sampler, schedule, noise, on_step=None, blend=None):
            # Within loop-graph the noise is drawn already.
            noise = AsyncNoise(noise) if isinstance(noise, PictureNoise) else noise
            return sample(x, conditions, sampler, schedule, noise, on_step, blend)

        return sample_async

    patch.around("sample", sampling)
