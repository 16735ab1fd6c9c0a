"""What a training run must remember to go on where it stopped, and how it learns when to stop."""

import math
import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` a file under a temporary name, then rename it: a killed run leaves the old file or the new one."""
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


class EMA:
    """A copy of `model` whose weights are an exponential moving average of its own.

    The decay grows as (1 + step) / (10 + step) to its final value, so that the average forgets the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels but no norm, bias or embedding.

    Rows of an embedding that no caption uses get no gradient: decay is all that they would get.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
    plain = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def learning_rate(step: int, progress: float, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine down to 1% of the peak as progress goes from 0 to 1."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * min(1.0, (step + 1) / warmup) * cosine


@dataclass
class Clock:
    """Seconds over all calls of one run, and when this call has to stop.

    `limit` is what this call may take and `after` what is planned for later calls. `reserve` is kept back at the end of
    each call, for the last state, grid and export.
    """

    limit: float
    reserve: float
    after: float = 0.0
    started: float = field(default_factory=time.monotonic)
    elapsed_before: float = 0.0

    def resume(self, elapsed: float) -> None:
        """Count on from `elapsed` seconds, if the clock does not show more already."""
        self.elapsed_before = max(self.elapsed_before, elapsed - self.in_call)

    @property
    def in_call(self) -> float:
        return time.monotonic() - self.started

    @property
    def elapsed(self) -> float:
        return self.elapsed_before + self.in_call

    @property
    def end(self) -> float:
        """What `elapsed` will be when training ends for good: after the last of the planned calls."""
        return self.elapsed_before + self.limit - self.reserve + max(0.0, self.after - self.reserve)

    def stop(self) -> bool:
        return self.in_call >= self.limit - self.reserve


PLAIN = ("step", "batch", "lr_scale", "done", "losses", "recent")  # attributes of a stage that are saved as they are


@dataclass
class Stage:
    """One model in training: everything that its next step depends on.

    `generator` draws all of its noise; `extra` holds what else a stage needs (a critic, say), by name, each with
    state_dict and load_state_dict.
    """

    model: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    batch: int
    extra: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    lr_scale: float = 1.0
    done: bool = False
    losses: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds in the run, mean loss
    recent: list[float] = field(default_factory=list)  # losses that the next entry will average

    def save(self, path: Path, elapsed: float) -> None:
        state = {name: getattr(self, name) for name in PLAIN} | {
            "elapsed": elapsed,
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "extra": {name: part.state_dict() for name, part in self.extra.items()},
        }
        write_atomically(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> float:
        """Continue from a file that `save` wrote; returns the seconds that the run had taken."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for name, part in self.extra.items():
            part.load_state_dict(state["extra"][name])
        for name in PLAIN:
            setattr(self, name, state[name])
        return state["elapsed"]


def read_losses(path: Path) -> list[tuple[int, float, float]]:
    """The loss log of a stage's state: (step, seconds in the run, loss); the weights are not read."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["losses"]
