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
from sd.images import from_pil, to_pil
from sd.optimizations import OptimizationError
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.writing import write_whole

log = logging.getLogger("guide")

PROMPT, SEED, STEPS, SAMPLER = "a blue fox on a yellow background", 3, 25, "ddim"
VALUES = {"deepcache": "3", "tgate": "12", "guidance-interval": "0-0.6", "token-merging": "0.5", "vae-tiling": "16"}
LARGER = ("vae-tiling",)
"""Those that change only what is larger than a picture of the demo model."""
"""Those with which the approximate ones are drawn; the others have their own."""
TIMES = 20
THUMBNAIL = 64


def text_of(name: str) -> str:
    return f"{name}={VALUES[name]}" if name in VALUES else name


def command(name: str, dtype: str = "float32") -> str:
    """How to draw the same from the command line."""
    if name in LARGER:
        return f"python -m bench.guide --pictures {name}"
    line = f'python sd/inference.py --prompt "{PROMPT}" --seed {SEED} --steps {STEPS} --sampler {SAMPLER}'
    return f"{line} --dtype {dtype} --opt {text_of(name)}"


def draw(name: str, device: str = "cpu", larger: bool = False) -> tuple[Image.Image, StableDiffusion]:
    """The picture with this optimization, or the plain one for "none". Raises OptimizationError where it cannot run."""
    dtype = torch.float32 if device == "cpu" else torch.float16
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, device, dtype)
    optimizations.apply(pipe, "" if name == "none" else text_of(name))
    image = decoded(pipe) if larger else pipe.generate(PROMPT, seed=SEED, steps=STEPS, sampler=SAMPLER)[0]
    return image, pipe


@torch.inference_mode()
def decoded(pipe: StableDiffusion) -> Image.Image:
    """256x256 pixels of a sheet of the demo model's pictures, through the VAE and back."""
    with Image.open(common.ROOT / "data" / "demo" / "prompts.png") as sheet:
        part = from_pil(sheet.convert("RGB").crop((0, 0, 256, 256)), 256, 256)
    mean, _ = pipe.vae.encode(part.to(pipe.device, pipe.dtype))
    return to_pil(pipe.decode(mean * pipe.config.vae.scale_factor))[0]


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
    plain = {larger: draw("none", device, larger)[0] for larger in {name in LARGER for name in names}}
    for name in names:
        try:
            image, pipe = draw(name, device, name in LARGER)
        except OptimizationError as error:
            log.info("%s: %s", name, error)
            known.setdefault(name, {"error": str(error)})
            continue
        known[name] = keep(folder, name, image, plain[name in LARGER], facts_of(pipe, name))
        log.info("%s: %s dB", name, known[name]["psnr_db"])
    write_known(folder, known)


def facts_of(pipe: StableDiffusion, name: str) -> dict:
    """Where it was drawn; and what `explain` says, where the pages cannot ask for themselves."""
    environment = common.environment(pipe.device, pipe.dtype)
    facts = {key: environment[key] for key in ("device", "dtype", "torch")}
    if name in optimizations.catalog() and changes.needs_a_machine(name):
        rows = optimizations.explain(pipe).rows if name in changes.BY_THE_DEMO_MODEL else changes.on_shapes(name)
        facts["explain"] = [asdict(row) for row in rows if name in row.switches]
    return facts


def write_known(folder: Path, known: dict[str, dict]) -> None:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(known.items()))
    write_whole(folder / "pictures.json", f"{{\n{lines}\n}}\n".encode())
