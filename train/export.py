"""What a run leaves for others: the checkpoint that the pipeline loads, and a report in numbers."""

import json
import platform
import subprocess
from copy import deepcopy
from pathlib import Path

import torch

from sd import model_loader
from sd.pipeline import StableDiffusion
from train.state import write_atomically

EXPORT_NAME = "sd-demo.safetensors"
EXPORT_BYTES = 15_500_000  # a file; git hosts and code review like small ones


def export_checkpoint(pipe: StableDiffusion, token_ids: list[int], folder: Path) -> int:
    """Write the models in fp16, of the token table only the rows in use, in files of 15.5 MB; returns bytes in all."""
    folder.mkdir(exist_ok=True)
    modules = [deepcopy(module).cpu().half() for module in (pipe.clip, pipe.unet, pipe.vae)]
    path = folder / EXPORT_NAME
    model_loader.save(path, pipe.config, *modules, token_ids=token_ids, max_bytes=EXPORT_BYTES)
    return sum(file.stat().st_size for file in folder.glob(f"{path.stem}*"))


def machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(Path(__file__).parent),
    }


def commit(folder: Path) -> str:
    """The commit that `folder` is at, with a + if files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parameter_counts(pipe: StableDiffusion, tokens: int) -> dict[str, int]:
    """Of each model, counting only `tokens` rows of the token table."""
    counts = {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("clip", "unet", "vae")}
    counts["clip"] -= (pipe.config.text.vocab_size - tokens) * pipe.config.text.width
    return counts | {"total": sum(counts.values())}


def write_report(report: dict[str, object], path: Path) -> None:
    text = json.dumps(report, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_report(path: Path) -> dict[str, object]:
    return json.loads(path.read_text()) if path.exists() else {}
