"""Files of an autoencoder alone, for --vae: however its tensors are called, by the names and shapes of SD 1's layout.

original   encoder.down.0.block.0.conv1.weight, with first_stage_model. before it or not; also a whole checkpoint
diffusers  encoder.down_blocks.0.resnets.0.conv1.weight: a file, or a folder with its config.json; a whole folder
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from sd.checkpoints.diffusers_config import scale_of
from sd.checkpoints.diffusers_names import of_today, vae_names
from sd.checkpoints.errors import CheckpointError, damaged, some
from sd.checkpoints.files import Opened, open_checkpoint, small_json
from sd.checkpoints.folders import INDEX, weight_files
from sd.checkpoints.layouts import PREFIXES, refuse_other_families
from sd.checkpoints.sd2 import as_convolutions
from sd.vae import VAE

_PREFIX = PREFIXES["vae"]


def open_vae(path: Path, vae: VAE, scale: float) -> Opened:
    """Read an autoencoder that is to fit this one. Raises CheckpointError, without the path, if there is none.

    scale: the factor of the latents that the UNet knows; a config.json that says another is refused.
    """
    file = vae_file(path)
    opened = open_checkpoint(file)
    if file.parent.joinpath("config.json").is_file() and not _original(opened.tensors):
        _check_scale(file.parent / "config.json", scale)
    tensors = with_usual_attention(_named(opened.tensors, vae))
    return replace(opened, tensors=as_convolutions(tensors))


def vae_file(path: Path) -> Path:
    """The file of weights: itself, or that of a folder."""
    if not path.is_dir():
        return path
    folder = path / "vae" if (path / INDEX).exists() else path
    found = next((file for file in weight_files(folder, "vae") if file.exists()), None)
    if found is None:
        raise CheckpointError("a folder without an autoencoder's weights (diffusion_pytorch_model.safetensors)")
    return found


def _original(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix(_PREFIX).startswith("encoder.down.") for name in tensors)


def _named(tensors: Mapping[str, Tensor], vae: VAE) -> dict[str, Tensor]:
    if any(name.startswith(_PREFIX) for name in tensors):
        return dict(tensors)
    if _original(tensors):
        return {_PREFIX + name: tensor for name, tensor in tensors.items()}
    if any(name.startswith("encoder.down_blocks.") for name in tensors):
        ours = {theirs: name for name, theirs in vae_names(vae).items()}
        return {_PREFIX + ours.get(of_today(name), name): tensor for name, tensor in tensors.items()}
    if any(re.match(r"(taesd_)?(decoder|encoder)\.?(layers\.)?\d+\.|\d+\.", name) for name in tensors):
        raise CheckpointError("this is TAESD, which previews: name it with --preview-decoder")
    refuse_other_families(tensors)
    raise CheckpointError(f"holds no autoencoder: {some(tensors) or 'it is empty'}")


_SPELLED = {"to_q": "q", "query": "q", "to_k": "k", "key": "k", "to_v": "v", "value": "v"}
_SPELLED |= {"to_out.0": "proj_out", "proj_attn": "proj_out"}
_ATTENTION = re.compile(rf"(.*\.mid\.attn_1\.)({'|'.join(map(re.escape, _SPELLED))})\.(weight|bias)")


def with_usual_attention(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converters left diffusers' names of the attention's layers, those of today or those of 2022, in the original."""
    return {_usual(name): tensor for name, tensor in tensors.items()}


def _usual(name: str) -> str:
    match = _ATTENTION.fullmatch(name)
    return f"{match[1]}{_SPELLED[match[2]]}.{match[3]}" if match else name


def _check_scale(path: Path, scale: float) -> None:
    with damaged("its config.json is damaged"):
        said = small_json(path)
        found = scale_of(said) if isinstance(said, dict) else scale
    if found != scale:
        raise CheckpointError(f"its latents are scaled by {found}, those of this model's UNet by {scale}")
