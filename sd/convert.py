"""Convert a model between the original layout and diffusers', in another dtype, without what only training needs.

    python -m sd.convert v1-5-pruned.ckpt v1-5.safetensors --dtype float16
    python -m sd.convert v1-5.safetensors v1-5-folder
    python -m sd.convert v1-5-folder back.safetensors

OUT is a file if it ends in .safetensors, else a folder as diffusers reads it. Only the model is written: text encoder,
UNet and VAE; with --ema the averaged UNet. The same model becomes the same bytes, so there and back is where it was.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    # Python has put sd/ itself first, where config.py and images.py could shadow other packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors import SafetensorError

from sd import model_loader
from sd.checkpoints.errors import CheckpointError, StrPath, naming
from sd.checkpoints.folders import write_folder
from sd.checkpoints.layouts import PREFIXES
from sd.checkpoints.saving import write_model
from sd.checkpoints.shrinking import on_bus_error
from sd.config import DTYPES, PREDICTIONS, Config, dtype_name
from sd.printable import Printable, printable

DATA = Path(__file__).resolve().parent.parent / "data"


def convert(
    source: StrPath,
    target: StrPath,
    *,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    vae: StrPath | None = None,
    prediction: str | None = None,
    overwrite: bool = False,
) -> Config:
    """Write the model in source, a file or a folder, to target; returns its configuration.

    target: a name that ends in .safetensors, or a folder's. dtype: None keeps each tensor's, but makes fp8 fp16. ema:
    take the averaged UNet. vae: take the autoencoder from this file or folder. prediction: "eps" or "v", where source
    does not say it. overwrite: in the place of a file that is there; a folder is never replaced.

    Raises CheckpointError for what cannot be read or written, with nothing changed.
    """
    target = Path(target)
    _check_target(Path(source), target, overwrite)
    config, states = model_loader.read(source, ema=ema, dtype=dtype, prediction=prediction, vae=vae)
    tensors = {PREFIXES[part] + name: t for part, state in states.items() for name, t in state.items()}
    with naming(target):
        if target.suffix == ".safetensors":
            write_model(target, config, tensors)
        else:
            _write_folder(target, config, tensors)
    return config


def _check_target(source: Path, target: Path, overwrite: bool) -> None:
    with naming(target):
        if target.suffix in (".ckpt", ".pt", ".bin", ".json"):
            raise CheckpointError("models are written as .safetensors, or as a folder: name one")
        if target.is_dir():
            raise CheckpointError("a folder that is there is not written over; name a new one")
        if os.path.lexists(target) and not overwrite:
            raise CheckpointError("is there already; name another file, or give --overwrite")
        if not target.absolute().parent.is_dir():
            raise CheckpointError("the folder that it would lie in is not there")


def _write_folder(target: Path, config: Config, tensors: dict[str, torch.Tensor]) -> None:
    """Under another name beside it first, so that a folder is whole or not there."""
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", dir=target.absolute().parent))
        try:
            part.chmod(0o777 & ~_umask())
            write_folder(part, tensors, config, DATA)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be written ({error})") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _leave_at_once(message: str) -> NoReturn:
    """Where IN became shorter while it was read. What was written so far stays beside OUT under a hidden name."""
    os.write(2, printable(f"error: {message}\n").encode())
    os._exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m sd.convert", description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", metavar="IN", type=Path, help=".safetensors, .ckpt, an index, or a diffusers folder")
    parser.add_argument("target", metavar="OUT", type=Path, help="a .safetensors file, or the name of a new folder")
    parser.add_argument("--dtype", type=dtype_name, choices=DTYPES, help="of all weights (as they are stored)")
    parser.add_argument("--ema", action="store_true", help="write the averaged UNet of a file that holds both")
    parser.add_argument("--vae", type=Path, metavar="FILE", help="take the autoencoder from this file or folder")
    parser.add_argument(
        "--prediction", choices=PREDICTIONS, help="what the UNet was trained for, where IN does not say"
    )
    parser.add_argument("--overwrite", action="store_true", help="write in the place of a file that is there")
    args = vars(parser.parse_args(argv))
    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    dtype = args.pop("dtype")
    try:
        config = convert(args["source"], args["target"], dtype=dtype and getattr(torch, dtype),
                         **{name: args[name] for name in ("ema", "vae", "prediction", "overwrite")})  # fmt: skip
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args['target']}: {config.name}, predicts {config.prediction}")
    return 0


if __name__ == "__main__":
    on_bus_error(_leave_at_once)
    sys.exit(main())
