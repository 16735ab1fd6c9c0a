"""Pictures of what the program does, by the demo model: `python bench/gallery.py` writes docs/gallery.md and sheets.

A section is a function that draws a sheet; what stands above it says how to draw it oneself.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image, ImageDraw, ImageFont

from bench.common import ROOT
from sd.pipeline import DEMO_CHECKPOINT, StableDiffusion
from sd.previews import Previews
from sd.samplers import SAMPLERS
from sd.writing import write_whole, written_whole

log = logging.getLogger("gallery")

Tile = tuple[str, Image.Image]
"""What stands below a picture, and the picture."""

FOX = "a blue fox on a yellow background"
SEED = 3
OWN_SCHEDULE = ("plms", "lcm", "tcd")
LABEL, GAP, ACROSS = 16, 6, 8


@dataclass(frozen=True)
class Section:
    """name: of the sheet's file. text: Markdown. draw(pipe): the tiles."""

    name: str
    title: str
    text: str
    draw: Callable[[StableDiffusion], Iterator[Tile]]


def fast(pipe: StableDiffusion, prompt: str = FOX, **options: object) -> Image.Image:
    return pipe.generate(prompt, **{"sampler": "dpmpp_2m", "schedule": "karras", "steps": 20, "seed": SEED, **options})[
        0
    ]


# ---- the sections


def samplers(steps: int) -> Callable[[StableDiffusion], Iterator[Tile]]:
    def tiles(pipe: StableDiffusion) -> Iterator[Tile]:
        for name in SAMPLERS:
            schedule = None if name in OWN_SCHEDULE else "karras"
            yield name, pipe.generate(FOX, sampler=name, schedule=schedule, steps=steps, seed=SEED)[0]

    return tiles


def fox_and_mask(pipe: StableDiffusion) -> tuple[Image.Image, Image.Image]:
    """A fox, and a mask of its upper half."""
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((8, 4, 120, 72), fill=255)
    return fast(pipe), mask


def inpainting(pipe: StableDiffusion) -> Iterator[Tile]:
    fox, mask = fox_and_mask(pipe)
    yield "the picture", fox
    yield "the mask", mask.convert("RGB")
    shared = {"init_image": fox, "mask": mask, "mask_blur": 4, "strength": 1.0}
    for colour in ("red", "green", "purple"):
        yield f"a {colour} fox", fast(pipe, f"a {colour} fox on a yellow background", **shared)
    yield "inverted", fast(pipe, "a red fox on a yellow background", **shared, mask_invert=True)


def outpainting(pipe: StableDiffusion) -> Iterator[Tile]:
    apple = fast(pipe, "a red apple on a blue background").resize((64, 64), Image.Resampling.LANCZOS)
    yield "the picture", apple
    for sides in ("32,32,32,32", "64,0,0,64", "0,64,64,0"):
        yield sides, fast(pipe, "a red apple on a blue background", init_image=apple, outpaint=sides, mask_blur=4)


def hires(pipe: StableDiffusion) -> Iterator[Tile]:
    for prompt in ("a red heart", "a sunflower"):
        yield prompt, fast(pipe, prompt)
        yield "--hires 1.5, 0.3", fast(pipe, prompt, hires=1.5, hires_strength=0.3)


def weights(pipe: StableDiffusion) -> Iterator[Tile]:
    for weight in (0.5, 0.75, 1.0, 1.25, 1.5):
        yield f"(blue:{weight})", fast(pipe, f"a (blue:{weight}) fox on a yellow background")
    for weight in (1.5, 2, 3):
        yield f"(all of it:{weight})", fast(pipe, f"({FOX}:{weight})")


def over_steps(pipe: StableDiffusion) -> Iterator[Tile]:
    for share in (0, 0.1, 0.2, 0.3, 0.5, 0.75, 1):
        prompt = f"a [red apple:blue fox:{float(share)}] on a yellow background"
        yield f"[apple:fox:{share}]", fast(pipe, prompt, prompt_syntax="a1111")
    yield "[apple|fox]", fast(pipe, "a [red apple|blue fox] on a yellow background", prompt_syntax="a1111")


def previews(pipe: StableDiffusion) -> Iterator[Tile]:
    show, seen = Previews(pipe), []
    keep = lambda step, steps, x: seen.append((step, show(x)[0]))  # noqa: E731
    image = fast(pipe, on_step=keep)
    for step, small in seen:
        if step in (1, 2, 4, 7, 11, 15, 20):
            yield f"step {step}", small.resize(image.size, Image.Resampling.NEAREST)
    yield "the picture", image


SECTIONS = (
    Section(
        "samplers-10",
        "Samplers, 10 steps",
        '`--prompt "a blue fox on a yellow background" --seed 3 --schedule karras --steps 10 --sampler ...` '
        "([docs/samplers.md](samplers.md)); plms, lcm and tcd on their own schedules; the latter two are made for "
        "distilled models, which this one is not.",
        samplers(10),
    ),
    Section("samplers-20", "Samplers, 20 steps", "The same with `--steps 20`.", samplers(20)),
    Section(
        "inpainting",
        "A part drawn anew",
        "`--init-image fox.png --mask mask.png --mask-blur 4 --strength 1 --fast` ([docs/edits.md](edits.md)): the "
        "demo model was not trained for masks, and is held to the picture by blending.",
        inpainting,
    ),
    Section(
        "outpainting",
        "A picture that grows",
        "`--init-image apple.png --outpaint LEFT,TOP,RIGHT,BOTTOM --mask-blur 4 --fast`.",
        outpainting,
    ),
    Section(
        "hires",
        "Larger",
        "`--hires 1.5 --hires-strength 0.3 --fast`: the demo model knows 128 pixels only: more of either undoes the "
        "picture.",
        hires,
    ),
    Section(
        "weights",
        "Weights",
        '`--prompt "a (blue:1.3) fox on a yellow background" --seed 3 --fast` ([docs/prompts.md](prompts.md)). The '
        "demo model reads a prompt from the padding after it, whose weights are 1: a word's change next to nothing.",
        weights,
    ),
    Section(
        "over-steps",
        "Prompts over the steps",
        '`--prompt "a [red apple:blue fox:0.3] on a yellow background" --prompt-syntax a1111 --seed 3 --fast`.',
        over_steps,
    ),
    Section(
        "previews",
        "While it forms",
        "`--preview 1 --preview-file now.png --fast` ([docs/previews.md](previews.md)): a latent a pixel.",
        previews,
    ),
)

HEAD = """# Gallery

All by the demo model, which draws 128x128 in a second, and by one command: `python bench/gallery.py`.
"""


# ---- sheets


def sheet(tiles: Sequence[Tile]) -> Image.Image:
    """The pictures in rows, with their labels below."""
    width, height = (max(getattr(image, side) for _, image in tiles) for side in ("width", "height"))
    across = min(ACROSS, len(tiles))
    rows = -(-len(tiles) // across)
    whole = Image.new("RGB", (across * (width + GAP) - GAP, rows * (height + LABEL + GAP) - GAP), "white")
    draw, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for i, (label, image) in enumerate(tiles):
        x, y = i % across * (width + GAP), i // across * (height + LABEL + GAP)
        whole.paste(image, (x + (width - image.width) // 2, y + (height - image.height) // 2))
        draw.text((x + width / 2, y + height + LABEL / 2), label, "black", font, anchor="mm")
    return whole


def write(out: Path, names: Sequence[str]) -> None:
    """The sheets of these sections (none: all), and gallery.md of all of them."""
    pipe = StableDiffusion.load(DEMO_CHECKPOINT, "cpu")
    folder = out / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for section in SECTIONS:
        if names and section.name not in names:
            continue
        with torch.inference_mode(), written_whole(folder / f"{section.name}.webp") as part:
            sheet(list(section.draw(pipe))).save(part, format="WEBP", quality=90, method=6)
        log.info("%s", section.name)
    parts = (f"\n## {one.title}\n\n{one.text}\n\n![{one.title}](gallery/{one.name}.webp)\n" for one in SECTIONS)
    write_whole(out / "gallery.md", (HEAD + "".join(parts)).encode())


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [section.name for section in SECTIONS]
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(names)} (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIR", help="(docs)")
    args = parser.parse_args(argv)
    if unknown := set(args.sections) - set(names):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    write(args.out, args.sections)
    return 0


if __name__ == "__main__":
    sys.exit(main())
