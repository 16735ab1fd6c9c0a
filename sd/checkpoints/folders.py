"""Folders as diffusers writes them: model_index.json, and a folder for each model, with its configuration and weights.

Read, the tensors get the names and shapes of SD 1's layout. Of several files of weights one counts: whole before
split, fp32 before fp16, .safetensors before .bin, which is a pickle: what is in it does not run.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sd.checkpoints.diffusers_config import FILES, config_from, config_to
from sd.checkpoints.diffusers_names import of_today, text_names, unet_names, vae_names
from sd.checkpoints.errors import CheckpointError, damaged
from sd.checkpoints.files import Opened, open_checkpoint, small_json
from sd.checkpoints.layouts import PREFIXES
from sd.checkpoints.saving import save_sorted
from sd.checkpoints.sd2 import as_convolutions
from sd.checkpoints.shapes import check_config
from sd.config import Config
from sd.models import build

INDEX = "model_index.json"
FOLDERS = {"clip": "text_encoder", "unet": "unet", "vae": "vae"}
_STEMS = {"clip": ("model", "pytorch_model"), "unet": ("diffusion_pytorch_model",), "vae": ("diffusion_pytorch_model",)}
_LARGEST_JSON = 1 << 20

_OTHERS = {
    "text_encoder_2": "Stable Diffusion XL",
    "text_encoder_3": "Stable Diffusion 3",
    "transformer": "a model with a transformer in place of a UNet (Stable Diffusion 3, Flux)",
    "image_encoder": "a model that takes pictures as prompts (unCLIP, image variations)",
    "prior": "Kandinsky or Stable Cascade",
}


def open_folder(path: Path) -> Opened:
    """Read a folder; raises CheckpointError, without the path, for one of another family and what is damaged."""
    _check_index(_json(path / INDEX))
    said = {part: _json(path / file) for part, file in FILES.items()}
    with damaged("its configuration is bad"):
        config = config_from(said)
    opened = {part: _weights(path / folder, part) for part, folder in FOLDERS.items()}
    count = sum(len(one.tensors) for one in opened.values())
    check_config(config, count)
    tensors = _renamed({part: one.tensors for part, one in opened.items()}, config)
    return Opened(
        as_convolutions(tensors),
        opened["unet"].metadata,
        sum(one.size for one in opened.values()),
        all(one.mapped for one in opened.values()),
        config=config,
    )


def _check_index(index: Mapping[str, Any]) -> None:
    for part, family in _OTHERS.items():
        if isinstance(index.get(part), list) and index[part] != [None, None]:
            raise CheckpointError(f"this folder is of {family}; one of Stable Diffusion 1.x or 2.x is needed")
    if missing := [folder for folder in FOLDERS.values() if folder not in index]:
        raise CheckpointError(f"{INDEX} names no {' and no '.join(missing)}")


def _json(path: Path) -> Mapping[str, Any]:
    name = f"{path.parent.name}/{path.name}" if path.name != INDEX else INDEX
    try:
        content = small_json(path, _LARGEST_JSON)
    except FileNotFoundError as error:
        what = f"a folder without {name}, so no model as diffusers writes it"
        raise CheckpointError(f"{what}; name the .safetensors or .ckpt file in it, or another folder") from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is no JSON") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} is not an object")
    return content


def weight_files(folder: Path, part: str) -> list[Path]:
    """Those that may hold the weights of a part, best first, whether they are there or not."""
    names = []
    for ending in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in _STEMS[part]:
                split = [f"{stem}.{ending}.index{variant}.json", f"{stem}{variant}.{ending}.index.json"]
                names += [f"{stem}{variant}.{ending}", *split]
    return [folder / name for name in names]


def _weights(folder: Path, part: str) -> Opened:
    files = weight_files(folder, part)
    found = next((file for file in files if file.exists()), None)
    if found is None:
        raise CheckpointError(f"{folder.name}/ holds no weights ({files[0].name})")
    try:
        return open_checkpoint(found)
    except CheckpointError as error:
        raise CheckpointError(f"{folder.name}/{found.name}: {error}") from error


def names_of(config: Config) -> dict[str, dict[str, str]]:
    """Our names of each part's tensors -> diffusers'."""
    clip, unet, vae = build(config)
    return {"clip": text_names(clip), "unet": unet_names(unet), "vae": vae_names(vae)}


def _renamed(parts: Mapping[str, Mapping[str, Tensor]], config: Config) -> dict[str, Tensor]:
    """What is called otherwise keeps its name behind its folder's, and is told by that."""
    tensors = {}
    for part, names in names_of(config).items():
        ours = {theirs: PREFIXES[part] + name for name, theirs in names.items()}
        text_level = not any(name.startswith("text_model.") for name in parts[part])
        for name, tensor in parts[part].items():
            theirs = f"text_model.{name}" if part == "clip" and text_level else of_today(name)
            tensors[ours.get(theirs) or f"{FOLDERS[part]}/{name}"] = tensor
    return tensors


# ---- writing


def write_folder(path: Path, tensors: Mapping[str, Tensor], config: Config, data: Path) -> None:
    """Write a model into an empty folder. tensors: all of it, by the names and shapes of SD 1's layout.

    data: the folder that holds the tokenizer's vocabulary. What the JSON files cannot say of the configuration, the
    metadata of the UNet's file do.
    """
    said = {} if config_from(config_to(config)) == config else {"config": config.to_json()}
    for part, names in names_of(config).items():
        own = {theirs: tensors[PREFIXES[part] + name] for name, theirs in names.items()}
        own = {theirs: _matrix(theirs, tensor, config) for theirs, tensor in own.items()}
        file = path / FOLDERS[part] / f"{_STEMS[part][0]}.safetensors"
        file.parent.mkdir(parents=True)
        save_sorted(own, file, {"format": "pt", **(said if part == "unet" else {})})
    for part, content in config_to(config).items():
        _write_json(path / FILES[part], content)
    _write_json(path / INDEX, _index(config))
    _write_tokenizer(path / "tokenizer", config, data)


def _matrix(name: str, tensor: Tensor, config: Config) -> Tensor:
    """Where diffusers has a matrix in place of a convolution of 1x1: in the autoencoder's attention, and in SD 2."""
    linear = ".mid_block.attentions.0.to_" in name and tensor.ndim == 4
    projection = config.unet.linear_projections and (".proj_in." in name or ".proj_out." in name)
    return (tensor[:, :, 0, 0] if (linear or projection) and tensor.ndim == 4 else tensor).contiguous()


def _index(config: Config) -> dict[str, Any]:
    kind = "StableDiffusionInpaintPipeline" if config.unet.inpaints else "StableDiffusionPipeline"
    scheduler = config_to(config)["scheduler"]["_class_name"]
    return {
        "_class_name": kind,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_tokenizer(folder: Path, config: Config, data: Path) -> None:
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(data / name, folder / name)
    end = "<|endoftext|>"
    tokens = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end}
    tokens["pad_token"] = "!" if config.text.openclip else end
    _write_json(folder / "special_tokens_map.json", tokens)
    own = {"tokenizer_class": "CLIPTokenizer", "model_max_length": config.text.max_length, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", {**own, **tokens})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
