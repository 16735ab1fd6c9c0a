"""What of this server's own a request may name: LoRAs of a folder, and optimizations beside those that always run.

Names are compared with what is offered. No path and no other optimization comes from a client.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd.pictures import loras
from sd.pictures.parameters import UserError, shown
from sd.pictures.plan import Job

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion


@dataclass(frozen=True)
class Offers:
    """lora_dir: the folder of the LoRAs that prompts may name. opts: optimizations as `--opt` writes them."""

    lora_dir: Path | None = None
    opts: tuple[str, ...] = ()

    def loras(self) -> list[str]:
        """Their names, as `<lora:name:0.8>` has them."""
        return loras.there(self.lora_dir) if self.lora_dir else []

    def check_loras(self, jobs: Iterable[Job]) -> None:
        """That all that the prompts name are offered; no error says where the folder is. Raises UserError."""
        if self.lora_dir is None:
            loras.refuse(jobs)
            return
        for name in (name for job in jobs for name, _ in loras.named(job)):
            if name not in (offered := self.loras()):
                raise UserError(f"there is no LoRA {shown(name)} here; there are {', '.join(offered[:20]) or 'none'}")

    def chosen(self, value: object) -> tuple[str, ...]:
        """The `opt` of a request, names with commas between, in the order of the offer. Raises ValueError."""
        if not isinstance(value, str):
            raise ValueError(f"opt must be text, not {shown(value)}")
        names = {name.strip() for name in value.split(",")} - {""}
        for name in sorted(names - set(self.opts)):
            raise ValueError(f"no opt {shown(name)} here; there are {', '.join(self.opts) or 'none'}")
        return tuple(name for name in self.opts if name in names)


class Switcher:
    """A pipeline's optimizations, and those that a request has beside them. Only the thread that draws uses it."""

    def __init__(self, pipe: "StableDiffusion"):
        self.pipe = pipe
        self._always = tuple(getattr(pipe, "optimizations", ()))
        self._now: tuple[str, ...] | None = ()

    def runs(self, chosen: Sequence[str]) -> bool:
        """Whether these do now, and no others beside those that always do."""
        return tuple(chosen) == self._now

    def use(self, chosen: Sequence[str]) -> None:
        """From now on these run beside those that always do. Raises OptimizationError, and the next call starts anew.

        All is taken back and applied again, as their order asks for: that takes as long as it took at the start.
        """
        from sd import optimizations

        if self.runs(chosen):
            return
        self._now = None
        optimizations.undo(self.pipe)
        optimizations.apply(self.pipe, [*self._always, *chosen])
        self._now = tuple(chosen)

    def try_all(self, offered: Iterable[str]) -> None:
        """Each alone, at the start: what cannot run here is told before a client asks. Raises OptimizationError."""
        for name in offered:
            self.use((name,))
        self.use(())
