"""Which model draws, and what makes it fast: one choice for the command, the service and Modal.

torch is imported by what needs it, when it is called: the choice is made, and wrong ones refused, without it.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd.config import DTYPES, PREDICTIONS, dtype_name
from sd.nearest import there_are
from sd.pictures.parameters import UserError

if TYPE_CHECKING:
    import torch

    from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)

DEVICES = ("cuda", "cuda:0", "mps", "cpu")
SHORT = ("cpu-bf16", "cpu-int8")  # the optimizations that pack short numbers from the weights


def add_model_options(add: Callable[..., object]) -> None:
    """The options of a `ModelChoice` that say which model; add: the `add_argument` of a parser or a group."""
    add("--ckpt", type=Path, metavar="FILE", help=".safetensors, .ckpt or a folder ($SD_CKPT, then those in data/)")
    add("--vae", type=Path, metavar="FILE", help="take the autoencoder from this file or folder")
    add(
        "--lora",
        action="append",
        metavar="FILE[:WEIGHT]",
        help="merge a LoRA into the weights, at a strength (1); repeat it for several",
    )
    add(
        "--embedding",
        action="append",
        metavar="FILE[:WORD]",
        help="learned words (textual inversion), spelled as the file says or as WORD; repeat it for several",
    )
    add("--lora-dir", type=Path, metavar="DIR", help="where <lora:name:0.8> of --prompt-syntax a1111 is looked for")
    add("--ema", action="store_true", help="use the averaged weights of a file that holds both")
    add("--prediction", choices=PREDICTIONS, help="what the UNet was trained for (what the file says, else eps)")
    add("--device", help="cuda, mps or cpu (the best there is)")
    add("--dtype", type=dtype_name, choices=DTYPES, help="(float16 on CUDA, bfloat16 on a CPU with AMX, else float32)")
    add("--load-quantized", type=Path, metavar="FILE", help="weights that --save-quantized wrote")


def add_speed_options(add: Callable[..., object]) -> None:
    """Those that say how fast."""
    add(
        "--opt",
        metavar="NAMES",
        help="optimizations, comma-separated; --list-opts names them, none is the plain model (default: what suits "
        "the model and the machine)",
    )
    add(
        "--attention",
        metavar="BACKEND",
        help="naive, auto, flash, efficient, cudnn or math: attention=BACKEND beside --opt",
    )
    add("--memory-budget", metavar="GB", help="on CPUs, in fp32: about what SD 1.5 may take at 512x512, or low: 5 (8)")


@dataclass(frozen=True)
class ModelChoice:
    """The weights, where and in which dtype they run, and the optimizations. None: what suits.

    opt: names for `optimizations.apply`; None is "default", "" the plain model. attention: one more of these names.
    """

    ckpt: Path | None = None
    vae: Path | None = None
    lora: Sequence[str] | None = None
    embedding: Sequence[str] | None = None
    lora_dir: Path | None = None
    ema: bool = False
    prediction: str | None = None
    device: str | None = None
    dtype: str | None = None
    load_quantized: Path | None = None
    opt: str | None = None
    attention: str | None = None
    memory_budget: str | None = None

    def checkpoint(self, recorded: Mapping[str, object] | None = None) -> Path:
        """The weights' file; where none is chosen, the one that a picture was drawn with, by what its PNG says.

        Raises FileNotFoundError or ProvenanceError, which say what to do.
        """
        from sd.pictures.provenance import checkpoint_again
        from sd.pipeline import DATA, find_checkpoint

        if self.ckpt or not (recorded and recorded.get("checkpoint_hash")):
            return self.ckpt or find_checkpoint()
        name = Path(str(recorded.get("checkpoint"))).name
        return checkpoint_again(name, recorded["checkpoint_hash"], (find_checkpoint(), DATA / name))

    def load(self, checkpoint: Path) -> "StableDiffusion":
        """The pipeline as it will draw: loaded, and optimized. Raises UserError, ValueError or OSError."""
        pipe = self.load_plain(checkpoint)
        self.optimize(pipe)
        return pipe

    def load_plain(self, checkpoint: Path) -> "StableDiffusion":
        """The same without optimizations, but for weights that are loaded quantized."""
        from sd.pipeline import StableDiffusion

        device = check_device(self.device)
        dtype = self._dtype_to_load(checkpoint)
        pipe = StableDiffusion.load(checkpoint, device, dtype, self.ema, self.prediction, self.vae)
        pipe.dtype_is_asked_for = self.dtype is not None
        for path, weight in self.loras():
            pipe.add_lora(path, weight)
        for path, word in self.embeddings():
            words = pipe.add_embedding(path, word)
            log.info("%s: %s", path.name, ", ".join(words))
        if self.load_quantized:
            from sd.optimizations.quantized_files import load_quantized

            load_quantized(pipe, self.load_quantized)
        return pipe

    def loras(self) -> list[tuple[Path, float]]:
        """The files and strengths of --lora. Raises UserError for what is not there, or no strength."""
        return [_lora(text) for text in self.lora or ()]

    def embeddings(self) -> list[tuple[Path, str | None]]:
        """The files and words of --embedding. Raises UserError for what is not there."""
        return [_embedding(text) for text in self.embedding or ()]

    def check_files(self) -> None:
        """Raises UserError for a LoRA, an embedding or an autoencoder that is not there."""
        self.loras()
        self.embeddings()
        if self.ckpt and not self.ckpt.exists():
            raise UserError(f"--ckpt: there is no file {self.ckpt}")
        if self.vae and not self.vae.exists():
            raise UserError(f"--vae: there is no file {self.vae}")
        if self.lora_dir and not self.lora_dir.is_dir():
            raise UserError(f"--lora-dir: there is no folder {self.lora_dir}")

    def _dtype_to_load(self, checkpoint: Path) -> "torch.dtype | None":
        """The one that is asked for; but where short numbers will be packed from the weights, the file's own, so that
        they stay mapped and take no memory."""
        import torch

        from sd import model_loader
        from sd.optimizations import registry

        dtype = self.dtype and getattr(torch, self.dtype)
        if not self._on_cpu():
            return dtype
        if self.dtype == "float16":
            log.warning("float16 is many times slower than float32 on a CPU: leave --dtype out")
        if self.load_quantized:
            from sd.optimizations.quantized_files import scheme_of

            packed = scheme_of(self.load_quantized) == "cpu_int8"
            return model_loader.stored(checkpoint).dtype if packed else dtype
        by_default = self.opt is None and dtype is None and registry.short_by_default()
        if self._packs_short_numbers():
            return model_loader.stored(checkpoint).dtype
        if by_default and (kept := model_loader.stored(checkpoint)).numbers >= registry.LARGE:
            return kept.dtype
        return dtype

    def _on_cpu(self) -> bool:
        from sd.pipeline import default_device

        return (check_device(self.device) or default_device()).type == "cpu"

    def _packs_short_numbers(self) -> bool:
        return not _words(self.names()).isdisjoint(SHORT)

    def optimize(self, pipe: "StableDiffusion") -> None:
        """Apply what is chosen. Raises OptimizationError for what cannot run here."""
        from sd import optimizations

        optimizations.apply(pipe, self.names(), memory_budget=self.memory_budget)

    def names(self) -> str:
        """The optimizations, as `optimizations.apply` takes them."""
        names = ["default" if self.opt is None else self.opt, self.attention and f"attention={self.attention}"]
        text = ",".join(filter(None, names))
        if self.dtype == "bfloat16" and self._on_cpu() and _left_to_presets(text) and _has_short_products():
            return f"cpu-bf16,{text}"
        return text

    def recorded_loras(self) -> list[list] | None:
        """As a picture's PNG says them: name, fingerprint, strength; None for none."""
        from sd.pictures.provenance import fingerprint

        return [[path.name, fingerprint(path), weight] for path, weight in self.loras()] or None

    def recorded_embeddings(self) -> list[list] | None:
        """The same of learned words: name, fingerprint, word or None."""
        from sd.pictures.provenance import fingerprint

        return [[path.name, fingerprint(path), word] for path, word in self.embeddings()] or None

    def recorded_vae(self) -> list | None:
        """The same of an autoencoder from its own file: name, fingerprint."""
        from sd.pictures.provenance import fingerprint

        return [self.vae.name, fingerprint(self.vae)] if self.vae else None

    def recorded_files(self) -> dict[str, list | None]:
        """All of these by the names that they have in a PNG."""
        return {
            "loras": self.recorded_loras(),
            "embeddings": self.recorded_embeddings(),
            "vae": self.recorded_vae(),
        }

    def same(self, checkpoint: Path) -> dict[str, object]:
        """What a picture's file must say of the model, to be one of this run's."""
        from sd.pictures.provenance import fingerprint

        return {"checkpoint_hash": fingerprint(checkpoint), **self.recorded_files()}

    def facts(self, pipe: "StableDiffusion", checkpoint: Path) -> dict[str, object]:
        """What a picture's PNG says of the model and the machine; --from-png reads it."""
        from sd.pictures.provenance import fingerprint

        running = facts_of(pipe)
        known = {
            "model": running.pop("model"),
            "checkpoint": checkpoint.name,
            "checkpoint_hash": fingerprint(checkpoint),
            "ema": self.ema,
            "prediction": pipe.config.prediction if pipe.config.prediction != "eps" else None,
            **self.recorded_files(),
            "quantized": self.load_quantized and self.load_quantized.name,
            **running,
        }
        return {name: value for name, value in known.items() if value is not None}


def _lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:WEIGHT`, where a file may have a colon in its name."""
    path, _, number = text.rpartition(":")
    try:
        found = (Path(path), float(number)) if path and not Path(text).is_file() else (Path(text), 1.0)
    except ValueError:
        found = Path(text), 1.0
    if not math.isfinite(found[1]):
        raise UserError(f"--lora: a strength must be a finite number, not {number}")
    if not found[0].is_file():
        raise UserError(f"--lora: there is no file {found[0]}")
    return found


def _embedding(text: str) -> tuple[Path, str | None]:
    """`FILE` or `FILE:WORD`, where a file may have a colon in its name."""
    path, _, word = text.rpartition(":")
    found = (Path(path), word) if path and word and not Path(text).is_file() else (Path(text), None)
    if not found[0].is_file():
        raise UserError(f"--embedding: there is no file {found[0]}")
    return found


def _words(names: str) -> set[str]:
    """The names in a list, without their values."""
    return {word.strip().partition("=")[0] for word in names.split(",")}


def _left_to_presets(names: str) -> bool:
    """Whether a preset says what runs, and nothing is named that cpu-bf16 cannot stand beside."""
    from sd.optimizations import catalog

    others = {*SHORT, *catalog()["cpu-bf16"].conflicts}
    return not _words(names).isdisjoint({"default", "cpu", "exact", "fast"}) and _words(names).isdisjoint(others)


def _has_short_products() -> bool:
    """Whether bf16 means products of it in C++ here, or the plain model in it. Raises UserError where both are slow."""
    from sd.optimizations.dot_layers import why_not_here
    from sd.optimizations.precision import has_bf16

    if not why_not_here():
        return True
    if has_bf16():
        return False
    slow = "bfloat16 is up to 10 times slower than float32 on this CPU, which has neither AMX nor AVX512-BF16"
    raise UserError(f"{slow}: leave --dtype out")


def facts_of(pipe: "StableDiffusion") -> dict[str, object]:
    """What a pipeline tells of itself. opt: what was applied, whatever was asked for."""
    import torch

    return {
        "model": pipe.config.name,
        "opt": ",".join(getattr(pipe, "optimizations", [])),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": str(pipe.device),
        "torch": torch.__version__,
    }


def check_device(name: str | None) -> "torch.device | None":
    """None for the default, else a torch.device that is really there."""
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # there are devices that hold no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        if "device string" in why:  # all that torch knows of, which is a long list
            raise UserError(f"--device: no device {name!r}{there_are(name, DEVICES)}") from None
        raise UserError(f"--device: {name!r} cannot be used here ({why})") from error
    return device
