"""The training loop of either stage: one guarded step after the other, until the stage or the call ends."""

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.state import Clock, Stage, learning_rate

log = logging.getLogger(__name__)

# loss(model, stage) -> what to run backward from, and the loss to report. `model` is stage.model, perhaps compiled.
Loss = Callable[[nn.Module, Stage], tuple[Tensor, Tensor]]
Progress = Callable[[int], float]  # step -> share of the stage that is done

LOG_EVERY = 20  # steps that one entry of the loss log averages
MAX_GRADIENT_NORM = 1.0
BAD_STEPS_IN_A_ROW = 10  # after so many the weights are suspected, not the batch
MOST_RELOADS = 5


@dataclass
class Every:
    """An action that is due every so many seconds."""

    seconds: float
    act: Callable[[], None]
    last: float = field(default_factory=time.monotonic)

    def __call__(self) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.act()
            self.last = time.monotonic()


def compile_model(model: nn.Module, loss: Loss, stage: Stage) -> nn.Module:
    """torch.compile, tried with one forward and backward pass; if that fails, `model` itself and a loud log entry."""
    compiled = torch.compile(model, dynamic=False)
    drawn, start = stage.generator.get_state(), time.monotonic()
    try:
        loss(compiled, stage)[0].backward()
    except Exception:
        log.exception("torch.compile FAILED: this run goes on without it, perhaps at half the speed")
        compiled = model
    else:
        log.info("compiled in %.0f s", time.monotonic() - start)
    model.zero_grad(set_to_none=True)
    stage.generator.set_state(drawn)
    return compiled


class Trainer:
    """Steps one stage, keeps its state on disk, and survives bad batches and batches that are too large."""

    def __init__(self, stage: Stage, loss: Loss, path: Path, clock: Clock, peak_lr: float, warmup: int):
        self.stage = stage
        self.loss = loss
        self.path = path
        self.clock = clock
        self.peak_lr = peak_lr
        self.warmup = warmup
        self.callee = stage.model
        self.bad_in_a_row = 0
        self.skipped = 0
        self.reloads = 0
        self.samples = 0
        self.seconds = 0.0

    @property
    def samples_per_second(self) -> float:
        """Of this call's steps, without starting up and compiling."""
        return self.samples / self.seconds if self.seconds else 0.0

    def compile(self) -> None:
        self.callee = compile_model(self.stage.model, self.loss, self.stage)

    def run(self, progress: Progress, regular: list[Every], before_step: Callable[[int], None]) -> None:
        """Train until progress(step) reaches 1 (the stage is done) or the call's time is up, then save."""
        start = time.monotonic()
        with _bar(type(self.stage.model).__name__) as bar:
            while (share := progress(self.stage.step)) < 1 and not self.clock.stop():
                before_step(self.stage.step)
                self.step(share)
                bar.n = round(100 * share, 1)
                bar.set_postfix_str(self._status(), refresh=False)
                bar.update(0)
                self.seconds = time.monotonic() - start
                for action in regular:
                    action()
        self.stage.done = progress(self.stage.step) >= 1
        self.save()
        log.info("%s; stage done: %s", self._status(), self.stage.done)

    def step(self, share: float) -> None:
        """One optimizer step at a share of the stage; skipped if its gradient is not finite."""
        stage = self.stage
        for group in stage.optimizer.param_groups:
            group["lr"] = learning_rate(stage.step, share, self.warmup, self.peak_lr) * stage.lr_scale
        try:
            loss = self._backward()
        except torch.OutOfMemoryError:
            self._halve_batch()
            return
        norm = nn.utils.clip_grad_norm_(stage.model.parameters(), MAX_GRADIENT_NORM)
        if math.isfinite(loss) and torch.isfinite(norm):
            stage.optimizer.step()
            stage.ema.update(stage.model, stage.step)
            self._record(loss)
        else:
            self._skip(loss)
        stage.optimizer.zero_grad(set_to_none=True)

    def save(self) -> None:
        self.stage.save(self.path, self.clock.elapsed)

    def _backward(self) -> float:
        objective, reported = self.loss(self.callee, self.stage)
        objective.backward()
        return reported.item()

    def _record(self, loss: float) -> None:
        stage = self.stage
        self.bad_in_a_row = 0
        self.samples += stage.batch
        stage.step += 1
        stage.recent.append(loss)
        if len(stage.recent) == LOG_EVERY:
            stage.losses.append((stage.step, self.clock.elapsed, sum(stage.recent) / LOG_EVERY))
            stage.recent.clear()

    def _skip(self, loss: float) -> None:
        self.skipped += 1
        self.bad_in_a_row += 1
        log.warning("step %d: loss %s or its gradient is not finite; skipped", self.stage.step, loss)
        if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
            self._reload()

    def _reload(self) -> None:
        """Back to the last state on disk, with half the learning rate and other noise."""
        self.reloads += 1
        if self.reloads > MOST_RELOADS or not self.path.exists():
            raise FloatingPointError(f"training diverged at step {self.stage.step}; lower the learning rate")
        self.stage.load(self.path)
        self.stage.lr_scale *= 0.5**self.reloads
        self.stage.generator.manual_seed(self.stage.generator.initial_seed() + self.reloads)
        self.bad_in_a_row = 0
        log.error("went back to step %d with the learning rate times %g", self.stage.step, self.stage.lr_scale)

    def _halve_batch(self) -> None:
        """The gradients of half a step are dropped; memory is given back before the next one asks for it."""
        if self.stage.batch == 1:
            raise RuntimeError("out of memory with a batch of one picture")
        self.stage.batch //= 2
        self.stage.model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        log.error("out of memory: batches of %d from here on", self.stage.batch)

    def _status(self) -> str:
        loss = f"{self.stage.losses[-1][2]:.4f}" if self.stage.losses else "-"
        return f"step {self.stage.step}, loss {loss}, {self.samples_per_second:.0f} samples/s"


def _bar(name: str) -> tqdm:
    on_terminal = sys.stderr.isatty()
    return tqdm(total=100, desc=name, unit="%", mininterval=0.1 if on_terminal else 15, bar_format=_BAR, ascii=True)


_BAR = "{desc}: {percentage:3.0f}% |{bar:20}| {elapsed}{postfix}"
