"""LoRAs that prompts name, `<lora:name:0.8>` in the a1111 syntax: found in --lora-dir, merged for these pictures."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sd import prompts
from sd.nearest import there_are
from sd.pictures.parameters import UserError, shown
from sd.pictures.plan import Job
from sd.pictures.provenance import ProvenanceError, fingerprint

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")
RECORDED = "prompt_loras"

Named = tuple[tuple[str, float], ...]


def named(job: Job) -> Named:
    """Those of a picture's prompt, and their strengths; of one that is named twice, the last."""
    return tuple(dict(prompts.loras(job.prompt, job.prompt_syntax)).items())


def check(jobs: Iterable[Job], folder: Path | None) -> None:
    """That each file is there, before a model is loaded. Raises UserError."""
    for job in jobs:
        for name, _ in named(job):
            try:
                file_of(name, folder)
            except UserError as error:
                raise UserError(f"{job.where}: {error}" if job.where else str(error)) from None


def refuse(jobs: Iterable[Job]) -> None:
    """Where no folder is at hand. Raises UserError."""
    for job in jobs:
        for name, _ in named(job):
            text = f"the prompt names the LoRA {name}, which cannot be had here; draw it with sd/inference.py"
            raise UserError(f"{job.where}: {text}" if job.where else text)


def file_of(name: str, folder: Path | None) -> Path:
    """The file of a LoRA in the folder, by its name without an ending. Raises UserError."""
    if folder is None:
        raise UserError(f"the prompt names the LoRA {name}: --lora-dir says in which folder it is")
    if Path(name).name != name:
        raise UserError(f"{shown(name)} is no name of a LoRA")
    path = next((folder / f"{name}{ending}" for ending in ENDINGS if (folder / f"{name}{ending}").is_file()), None)
    if path is None:
        raise UserError(f"there is no LoRA {name} in {folder}{there_are(name, there(folder)[:20])}")
    return path


def there(folder: Path) -> list[str]:
    """The names of a folder's LoRAs."""
    return sorted({path.stem for path in folder.glob("*") if path.suffix in ENDINGS})


class PromptLoras:
    """Those that are merged for a picture's prompt now."""

    def __init__(self, pipe: "StableDiffusion", folder: Path | None):
        self.pipe, self.folder = pipe, folder
        self.merged: dict[str, float] = {}

    def use(self, job: Job) -> None:
        """Merge those of this picture, and take the others out. Raises UserError, CheckpointError or ValueError."""
        wanted = dict(named(job))
        self.take_out([name for name in self.merged if name not in wanted])
        for name, strength in wanted.items():
            if name not in self.merged:
                self.pipe.add_lora(file_of(name, self.folder), strength)
            elif self.merged[name] != strength:
                self.pipe.set_lora(name, strength)
            self.merged[name] = strength

    def take_out(self, names: Collection[str] | None = None) -> None:
        """These, or all. Raises CheckpointError, or ValueError where the UNet is quantized."""
        for name in list(self.merged) if names is None else names:
            self.pipe.remove_loras(name)
            del self.merged[name]

    def recorded(self, job: Job) -> dict[str, object]:
        """What the picture's file says of them: name and fingerprint."""
        found = [[name, fingerprint(file_of(name, self.folder))] for name, _ in named(job)]
        return {RECORDED: found} if found else {}


def check_again(jobs: Iterable[Job], said: Mapping[str, object], folder: Path | None) -> None:
    """That those which a picture was drawn with are those in the folder. Raises ProvenanceError or UserError."""
    recorded = said.get(RECORDED)
    wanted = {name for job in jobs for name, _ in named(job)}
    for name, digest in recorded if isinstance(recorded, list) else ():
        if name in wanted and fingerprint(file_of(str(name), folder)) != digest:
            raise ProvenanceError(f"the picture was drawn with another LoRA {name} ({digest}) than the one in {folder}")
