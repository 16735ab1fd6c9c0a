"""Which optimizations there are, how a list of names is read, and how it is applied to a pipeline and taken back.

The registry is this folder: every file's `Optimization` objects, found when first asked for.
"""

import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sd.checkpoints.stamps import touch
from sd.kernels import native
from sd.nearest import is_it
from sd.optimizations.base import (
    Optimization,
    OptimizationError,
    Patch,
    Record,
    here,
    in_the_weights_mode,
    record_of,
)
from sd.optimizations.beside import reach
from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)

LARGE = 300_000_000  # parameters of a UNet from which preparing kernels and weights is paid back by one picture
OTHERWISE = 4.6  # gigabytes that SD 1.5 takes at 512x512 beside what Winograd's kernels take more than the weights


@cache
def catalog() -> Mapping[str, Optimization]:
    """All optimizations by name, in the order in which they are applied: by stage, then by name."""
    found: dict[str, Optimization] = {}
    for file in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = importlib.import_module(f"{__package__}.{file.name}")
        for one in vars(module).values():
            if isinstance(one, Optimization):
                assert found.setdefault(one.name, one) is one, f"two optimizations are called {one.name}"
    ordered = sorted(found.values(), key=lambda one: (one.stage, one.name))
    return MappingProxyType({one.name: one for one in ordered})


# ---- presets


def _none(pipe: StableDiffusion) -> tuple[str, ...]:
    return ()


def _original(pipe: StableDiffusion) -> tuple[str, ...]:
    return ("attention", "int8-weights")


def _exact(pipe: StableDiffusion) -> tuple[str, ...]:
    if pipe.device.type == "cpu":
        return _cpu(pipe)
    caches = ("packed-qkv", "kv-cache", "time-cache")
    if pipe.device.type != "cuda":
        return caches
    fused = ("fused-norm", "fused-layernorm", "fused-geglu", "fused-upsample")
    layout = ("attention", "channels-last", "pointwise-linear", "split-conv")
    return (*layout, *caches, *fused, "shared-halves", "cuda-graph", "async-noise")


def _cpu(pipe: StableDiffusion) -> tuple[str, ...]:
    kernels = ("winograd", "cpu-linear", "cpu-attention", "cpu-norm")
    around = ("kv-cache", "page-out", "keep-memory", "shared-halves")
    short = pipe.dtype != torch.float32 and not catalog()["cpu-bf16"].needs.why_not(pipe)
    return ("cpu-bf16", *kernels, *around) if short else (*kernels, *around)


def _fast(pipe: StableDiffusion) -> tuple[str, ...]:
    return (*_exact(pipe), "deepcache=3")


def _default(pipe: StableDiffusion) -> tuple[str, ...]:
    """Without a word from anybody: what is exact, for a model that is large enough to pay its preparation back; and on
    a CPU with AMX products of bf16 numbers, as on a GPU everything is in fp16, unless a dtype is asked for."""
    large = sum(weight.numel() for weight in pipe.unet.parameters()) >= LARGE
    if not large or getattr(pipe.unet, "quantization", None):
        return ()
    if pipe.device.type == "cpu" and not getattr(pipe, "dtype_is_asked_for", False) and short_by_default():
        return ("cpu-bf16", *(name for name in _cpu(pipe) if name != "cpu-bf16"))
    return {"cpu": _cpu, "cuda": _exact}.get(pipe.device.type, _none)(pipe)


def short_by_default() -> bool:
    """Whether this CPU multiplies bf16 numbers so much faster than fp32 that a large model is drawn with them.

    What that costs the picture: bench/README.md. The bounds that it had to hold on the demo model's 16 prompts were a
    median of 45 dB from fp32, and 40 for the worst.
    """
    return native.load() is not None and native.instruction_set() == "amx"


PRESETS: Mapping[str, Callable[[StableDiffusion], tuple[str, ...]]] = MappingProxyType(
    {"none": _none, "default": _default, "exact": _exact, "cpu": _cpu, "fast": _fast, "original": _original}
)
"""Of a pipeline, the names that each stands for; those that cannot run there are left out when it is applied."""


# ---- reading


@dataclass(frozen=True)
class Choice:
    """An optimization as it is named in a list. arguments: its value, read. preset: that which named it, or ""."""

    text: str
    optimization: Optimization
    arguments: tuple = ()
    preset: str = ""

    @property
    def name(self) -> str:
        return self.optimization.name


def _words(names: str | Iterable[str]) -> Iterator[str]:
    text = names if isinstance(names, str) else ",".join(names)
    return filter(None, (word.strip() for word in text.split(",")))


def read(text: str, preset: str = "") -> Choice:
    """`name` or `name=value`. Raises OptimizationError for a name that is none, or a value that it does not take."""
    name, given, value = text.partition("=")
    if name in PRESETS:
        raise OptimizationError(f"{name} is a preset and takes no value, so not {text!r}")
    if name not in catalog():
        near = is_it(name, [*catalog(), *PRESETS])
        raise OptimizationError(f"no optimization {name!r}{near or '; see --list-opts'}")
    one = catalog()[name]
    if not given:
        return Choice(text, one, (), preset)
    if one.value is None:
        raise OptimizationError(f"{name} takes no value, so not {text!r}")
    try:
        return Choice(text, one, (one.value(value),), preset)
    except ValueError as error:
        raise OptimizationError(
            f"{name}={value}: the value must be {error}{is_it(value, one.hint.split('|'))}"
        ) from error


def parse(names: str | Iterable[str], pipe: StableDiffusion, memory_budget: str | float | None = None) -> list[Choice]:
    """Names and presets -> what they stand for on this pipeline, in the order of application.

    Named twice, the last one counts; and a name that somebody wrote counts as written, whichever preset has it too.
    Raises OptimizationError for an unknown name or value.
    """
    chosen: dict[str, Choice] = {}
    bounds = (read(text, "the memory budget") for text in within(memory_budget))
    for choice in (*_read_all(names, pipe), *bounds):
        named = chosen.get(choice.name, choice)
        if not choice.preset or named.preset or not named.arguments:
            # A name that was typed without a value takes the budget's, and counts as typed all the same.
            chosen[choice.name] = choice if not choice.preset or named.preset else replace(choice, preset="")
    return [chosen[name] for name in catalog() if name in chosen]


def _read_all(names: str | Iterable[str], pipe: StableDiffusion) -> Iterator[Choice]:
    for word in _words(names):
        if word in PRESETS:
            yield from (read(text, preset=word) for text in PRESETS[word](pipe))
        else:
            yield read(word)


def check(names: str | Iterable[str]) -> None:
    """Raise OptimizationError for an unknown name or value; this needs no pipeline."""
    for word in _words(names):
        if word not in PRESETS:
            read(word)


# ---- what suits a pipeline


def default(pipe: StableDiffusion, memory_budget: str | float | None = None) -> str:
    """What `apply` applies when nothing is named: the command's, a notebook's and the service's choice alike.

    Exact optimizations for a large model, as SD 1.5, on a CPU in fp32 and on NVIDIA GPUs; "" for none.
    """
    return ",".join(choice.text for choice in _possible(parse("default", pipe, memory_budget), pipe)[0])


def within(budget: str | float | None) -> tuple[str, ...]:
    """The names that keep SD 1.5 at 512x512 within a budget on CPUs, "low" or in GB: 4.3 of them are its weights."""
    if budget is None:
        return ()
    try:
        gigabytes = 5.0 if budget == "low" else float(budget)
    except ValueError:
        gigabytes = 0.0
    if not 4.5 <= gigabytes < 1000:
        raise OptimizationError(f"the memory budget must be low, or gigabytes from 4.5 on, not {budget}")
    return f"winograd={max(0.0, gigabytes - OTHERWISE):.2f}", "page-out"


# ---- applying


@in_the_weights_mode
def apply(
    pipe: StableDiffusion, names: str | Iterable[str] = "default", memory_budget: str | float | None = None
) -> list[str]:
    """Apply optimizations, before the first picture or between two; returns what was applied, in order.

    names: a string as "exact,deepcache=3", or several names; a preset's that cannot run here are left out and told in
    one line of the log. memory_budget: "low" or gigabytes that SD 1.5 may take at 512x512 on a CPU in fp32.
    Raises OptimizationError if a named one cannot run here or beside another, or if the pipeline is optimized already.
    The pipeline is as it was then; but one that converts weights which no file holds stays applied, and recorded.
    """
    if pipe.optimizations:
        raise OptimizationError(f"this pipeline is optimized already: {', '.join(pipe.optimizations)}; undo that first")
    chosen, left_out = _possible(parse(names, pipe, memory_budget), pipe)
    record = record_of(pipe) or Record(pipe)
    applied: list[tuple[Choice, Patch]] = []
    for choice in chosen:
        patch = record.patch(choice.name)
        try:
            _apply_one(choice, patch)
        except BaseException as error:
            expected = isinstance(error, OptimizationError)
            undone = [patch] if expected and choice.preset else [*(other for _, other in applied), patch]
            _roll_back(pipe, record, undone, [*applied, (choice, patch)], error)
            if not (expected and choice.preset):
                raise
            left_out.append((choice, str(error).removeprefix(f"{choice.name} ")))
        else:
            applied.append((choice, patch))
    try:
        pipe.controlnets.prepare_with(pipe, partial(reach, record))
    except BaseException as error:
        pipe.controlnets.as_in_files()
        _roll_back(pipe, record, [patch for _, patch in applied], applied, error)
        raise
    if record.patches:
        pipe.record = record
    pipe.optimizations = [choice.text for choice, _ in applied]
    _tell(left_out)
    _tell_dtype(pipe, [choice for choice, _ in applied])
    return list(pipe.optimizations)


def _apply_one(choice: Choice, patch: Patch) -> None:
    if missing := choice.optimization.needs.why_not(patch.pipe):  # as those before it have left the pipeline
        raise OptimizationError(f"{choice.name} needs {choice.optimization.needs.text}; {missing}")
    one = choice.optimization
    one.function(patch, *choice.arguments)
    if not patch.changes:
        raise OptimizationError(f"{choice.name} finds nothing left to do in this pipeline, which is {here(patch.pipe)}")
    patch.finish()
    beside = one.function if one.beside is None else one.beside
    patch.again = (lambda other: beside(other, *choice.arguments)) if callable(beside) else beside


def _roll_back(
    pipe: StableDiffusion,
    record: Record,
    undone: list[Patch],
    applied: list[tuple[Choice, Patch]],
    error: BaseException,
) -> None:
    """Take these patches back, the last first. If one cannot be, what is left of `applied` is recorded, and told."""
    for patch in reversed(undone):
        try:
            record.undo([patch])
        except (ValueError, OSError) as lost:  # of the checkpoint's file too
            pipe.record = record
            pipe.optimizations = stays = [choice.text for choice, other in applied if other in record.patches]
            raise OptimizationError(f"{error}; {', '.join(stays)} stays applied: {lost}") from error


class _Future:
    """A pipeline as it will be in another dtype, for what needs look at."""

    def __init__(self, pipe: StableDiffusion, dtype: torch.dtype):
        self._pipe, self.dtype = pipe, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def _possible(choices: list[Choice], pipe: StableDiffusion) -> tuple[list[Choice], list[tuple[Choice, str]]]:
    """Those that can run here and beside each other, and those left out with the reason. What was typed is kept, or
    raises OptimizationError."""
    dtype = next((choice.optimization.dtype for choice in choices if choice.optimization.dtype), None)
    future = _Future(pipe, dtype) if dtype else pipe
    kept: list[Choice] = []
    left_out: list[tuple[Choice, str]] = []
    for choice in sorted(choices, key=lambda choice: bool(choice.preset)):  # what was typed comes first
        if reason := _why_not(choice, kept, future):
            if not choice.preset:
                raise OptimizationError(f"{choice.name} {reason}")
            left_out.append((choice, reason))
        else:
            kept.append(choice)
    order = list(catalog())
    return sorted(kept, key=lambda choice: order.index(choice.name)), left_out


def _why_not(choice: Choice, others: list[Choice], pipe: StableDiffusion) -> str:
    need = choice.optimization.needs
    if missing := need.why_not(pipe):
        return f"needs {need.text}; {missing}"
    conflicts = choice.optimization.conflicts
    for other in [other.name for other in others] + _loaded(pipe):
        if other in conflicts or choice.name in catalog()[other].conflicts:
            return f"cannot be combined with {other}"
    return ""


def _loaded(pipe: StableDiffusion) -> list[str]:
    """The optimization that a pipeline whose quantized layers came from a file has already."""
    done = getattr(pipe.unet, "quantization", None)
    return [done.switch] if done else []


@in_the_weights_mode
def undo(pipe: StableDiffusion) -> None:
    """Make an optimized pipeline the plain one again, bit for bit; it can be optimized anew.

    Weights that were converted or replaced are read from the checkpoint's file: what was written to them is lost.
    Raises OptimizationError, with the pipeline as it is, where such weights came from no file.
    """
    if record := record_of(pipe):
        record.undo()
        pipe.controlnets.as_in_files()
        del pipe.record
        pipe.optimizations = []


def _tell(left_out: list[tuple[Choice, str]]) -> None:
    """One line a preset; of the default, which nobody named, only when asked for."""
    for preset in dict.fromkeys(choice.preset for choice, _ in left_out):
        by_reason: dict[str, list[str]] = {}
        for choice, reason in left_out:
            if choice.preset == preset:
                by_reason.setdefault(reason, []).append(choice.name)
        told = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
        log.log(logging.DEBUG if preset == "default" else logging.INFO, "%s leaves out %s", preset, told)


def _tell_dtype(pipe: StableDiffusion, applied: list[Choice]) -> None:
    """Of the default on a CPU, in one line, which numbers are multiplied, and the choice that there is."""
    by_default = {choice.name for choice in applied if choice.preset == "default"}
    short = {choice.name for choice in applied} & {"cpu-bf16", "cpu-int8"}
    if "cpu-bf16" in by_default:
        log.info("products of bf16 numbers, which this CPU multiplies fastest (AMX); --dtype float32 is exact")
    elif "cpu-norm" in by_default and not short and not catalog()["cpu-bf16"].needs.why_not(pipe):
        log.info("in fp32, which is exact; --dtype bfloat16 is faster on this CPU, and takes less memory")


@in_the_weights_mode
def weights_changed(pipe: StableDiffusion) -> None:
    """Tell that weights were written to through `.data`, which nobody can notice: all that is derived is made again.

    What is written in place or loaded, under no_grad, is noticed without this.
    """
    for model in (pipe.clip, pipe.unet, pipe.vae, *pipe.controlnets.loaded.values()):
        touch(model.parameters())
