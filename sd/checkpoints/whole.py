"""Models by the names and shapes of SD 1's layout, whatever layout their files have."""

from dataclasses import replace
from pathlib import Path

from sd.checkpoints import sd2
from sd.checkpoints.files import Opened, open_checkpoint
from sd.checkpoints.folders import INDEX, open_folder
from sd.checkpoints.vae_files import with_usual_attention


def open_model(path: Path) -> Opened:
    """Read a checkpoint or a folder of any family that this program draws with.

    Raises CheckpointError without the path.
    """
    if path.is_dir():
        return open_folder(path)
    if path.name == INDEX:
        return open_folder(path.parent)
    opened = open_checkpoint(path)
    tensors = opened.tensors
    marks = sd2.marks(tensors)
    if sd2.OPENCLIP_MARK in marks:
        tensors = sd2.as_sd1(tensors)
    return replace(opened, tensors=sd2.as_convolutions(with_usual_attention(tensors)), marks=marks)


def open_controlnet(path: Path) -> Opened:
    """Read a ControlNet of any of these families. Raises CheckpointError without the path."""
    opened = open_checkpoint(path)
    return replace(opened, tensors=sd2.as_convolutions(opened.tensors))
