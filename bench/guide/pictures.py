"""What each optimization does to a picture: drawn by the demo model, and kept in docs/guide/pictures.

These are measurements: `python -m bench.guide --pictures` makes them, on the machine that it runs on, of what can run
there. pictures.json says of each how far it is from the plain one, where it was drawn, and what `explain` said.
"""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench import common
from bench.gallery import sheet
from bench.guide import changes
from bench.reference.numbers import pixels, psnr
from sd import optimizations
from sd.optimizations import OptimizationError
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.writing import write_whole

log = logging.getLogger("guide")

PROMPT, SEED, STEPS, SAMPLER = "a blue fox on a yellow background", 3, 25, "ddim"
VALUES = {"deepcache": "3", "tgate": "12", "guidance-interval": "0-0.6", "token-merging": "0.5", "vae-tiling": "16"}
SIZES = {"vae-tiling": 256}
"""Those with which the approximate ones are drawn; the others have their own."""
TIMES = 20
THUMBNAIL = 64


def text_of(name: str) -> str:
    return f"{name}={VALUES[name]}" if name in VALUES else name


def command(name: str, dtype: str = "float32") -> str:
    """How to draw the same from the command line."""
    line = f'python sd/inference.py --prompt "{PROMPT}" --seed {SEED} --steps {STEPS} --sampler {SAMPLER}'
    line += f" --height {SIZES[name]} --width {SIZES[name]}" if name in SIZES else ""
    return f"{line} --dtype {dtype} --opt {text_of(name)}"


def draw(name: str, device: str = "cpu", size: int | None = None) -> tuple[Image.Image, StableDiffusion]:
    """The picture with this optimization, or the plain one for "none". Raises OptimizationError where it cannot run."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, device, dtype)
    optimizations.apply(pipe, "" if name == "none" else text_of(name))
    image = pipe.generate(PROMPT, seed=SEED, steps=STEPS, sampler=SAMPLER, height=size, width=size)[0]
    return image, pipe


def difference(image: Image.Image, plain: Image.Image) -> Image.Image:
    """The distance of each colour of each pixel, TIMES times."""
    far = np.abs(pixels(image) - pixels(plain)) * TIMES
    return Image.fromarray(far.clip(0, 255).astype(np.uint8))


def keep(folder: Path, name: str, image: Image.Image, plain: Image.Image, facts: dict) -> dict:
    """Write the sheet and the small picture; -> what pictures.json says of it."""
    decibels = psnr(np.asarray(image), np.asarray(plain))
    tiles = [("plain", plain), (name, image), (f"difference x {TIMES}", difference(image, plain))]
    write_whole(folder / f"{name}.webp", webp(sheet(tiles)))
    return {
        "opt": text_of(name),
        "psnr_db": None if decibels == float("inf") else round(decibels, 1),
        "largest": int(np.abs(pixels(image) - pixels(plain)).max()),
        **facts,
    }


def webp(image: Image.Image, quality: int = 88) -> bytes:
    out = io.BytesIO()
    image.save(out, format="WEBP", quality=quality, method=6)
    return out.getvalue()


def thumbnail(folder: Path, name: str) -> bytes:
    """The optimized picture of a sheet, small."""
    with Image.open(folder / f"{name}.webp") as whole:
        return _thumbnail(whole, whole.width)


def _thumbnail(whole: Image.Image, width: int) -> bytes:
    side = (width - 12) // 3
    return webp(whole.convert("RGB").crop((side + 6, 0, 2 * side + 6, side)).resize((THUMBNAIL, THUMBNAIL)), 80)


def read(folder: Path) -> dict[str, dict]:
    path = folder / "pictures.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(folder: Path, names: Sequence[str], device: str = "cpu") -> None:
    """Draw these; what cannot run here stays as it was drawn elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    known = read(folder)
    plain = {size: draw("none", device, size)[0] for size in {SIZES.get(name) for name in names}}
    for name in names:
        size = SIZES.get(name)
        try:
            image, pipe = draw(name, device, size)
        except OptimizationError as error:
            log.info("%s: %s", name, error)
            known.setdefault(name, {"error": str(error)})
            continue
        known[name] = keep(folder, name, image, plain[size], facts_of(pipe, name))
        log.info("%s: %s dB", name, known[name]["psnr_db"])
    write_known(folder, known)


def facts_of(pipe: StableDiffusion, name: str) -> dict:
    """Where it was drawn; and what `explain` says, where the pages cannot ask for themselves."""
    environment = common.environment(pipe.device, pipe.dtype)
    facts = {key: environment[key] for key in ("device", "dtype", "torch")}
    if name in optimizations.catalog() and changes.needs_a_machine(name):
        rows = optimizations.explain(pipe).rows if name in changes.QUANTIZED else changes.on_shapes(name)
        facts["explain"] = [asdict(row) for row in rows if name in row.switches]
    return facts


def write_known(folder: Path, known: dict[str, dict]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(known.items()))
    write_whole(folder / "pictures.json", f"{{\n{lines}\n}}\n".encode())
