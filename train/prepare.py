"""Make the demo model's data: fetch the drawings, choose the concepts, write one archive and one manifest.

    python train/prepare.py --out train/build

Needs npm to fetch (once: the packages are kept in the output folder's cache) and `resvg-py` to rasterize. Nothing that
it writes is part of this repository; NOTICE says whose drawings they are. The same packages give the same bytes.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

if not __package__:  # run as a script: find `train`, and let train/ itself shadow nothing
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy import ndarray
from PIL import Image
from tqdm import tqdm

from train import concepts
from train.checkers import dominant_colour
from train.colours import COLOURS, HUES, NEUTRALS, ONE_HUE, Surface, find_surface, recolour

LIMIT_BYTES = 20 * 2**20  # of the archive
MARGIN = 1 / 32  # of the frame, free on every side of a drawing
MIN_COLOURS = 4  # hues that a drawing must take convincingly to count as recolourable
ONE_HUE_OF_MAIN = 0.40  # in place of ONE_HUE for what concepts.MAIN_COLOUR names
STYLES = ("3d", "flat")


@dataclass(frozen=True)
class Package:
    """A pinned npm package; `integrity` is the registry's own checksum of the tarball."""

    name: str
    version: str
    integrity: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball in `cache`, packed by npm if it is not there; ValueError if its checksum is another."""
    path = cache / package.tarball
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(cache), f"{package.name}@{package.version}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise ValueError(f"{path} is not {package.name}@{package.version}: delete it and fetch it again")
    return path


def read_members(tarball: Path, wanted: Iterable[str] | None = None, suffix: str = "") -> dict[str, bytes]:
    """Files of a package by their path inside it: those in `wanted`, or all that end in `suffix`."""
    chosen = None if wanted is None else {f"package/{name}" for name in wanted}
    with tarfile.open(tarball) as tar:
        members = [m for m in tar if m.isfile() and (m.name in chosen if chosen else m.name.endswith(suffix))]
        return {m.name.removeprefix("package/"): tar.extractfile(m).read() for m in members}


def plain_codepoint(codepoint: str) -> str:
    """'2764-FE0F' -> '2764': sources differ in whether they write the variation selector."""
    return codepoint.lower().replace("-fe0f", "")


@dataclass(frozen=True)
class Sources:
    """What the three packages hold: drawings by plain code point, emojibase's entries and the names of its groups."""

    webp: dict[str, bytes]
    svg: dict[str, str]
    entries: list[dict]
    groups: dict[str, dict[str, str]]


def open_sources(cache: Path) -> Sources:
    drawings = read_members(fetch(FLUENT, cache), suffix=".webp")
    noto = read_members(fetch(NOTO, cache), ["icons.json", "chars.json"])
    words = read_members(fetch(EMOJIBASE, cache), ["en/data.json", "meta/groups.json"])
    icons, chars = json.loads(noto["icons.json"]), json.loads(noto["chars.json"])
    return Sources(
        webp={plain_codepoint(Path(name).stem): data for name, data in drawings.items()},
        svg={plain_codepoint(point): svg for point, name in chars.items() if (svg := _svg(icons, name))},
        entries=json.loads(words["en/data.json"]),
        groups=json.loads(words["meta/groups.json"]),
    )


def _svg(icons: dict, name: str) -> str | None:
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def choose(sources: Sources) -> list[dict]:
    """The concepts, in emojibase's order: manifest entries without what pictures tell. The 3d drawing must exist."""
    chosen = []
    for entry in sorted(sources.entries, key=lambda e: e.get("order", 0)):
        point = plain_codepoint(entry["hexcode"])
        subgroup = sources.groups["subgroups"].get(str(entry.get("subgroup")), "")
        if "group" in entry and point in sources.webp and concepts.keep(entry, subgroup):
            chosen.append(_describe(entry, point, sources.groups["groups"][str(entry["group"])]))
    _check_names(chosen)
    taken = {name for concept in chosen for name in (concept["name"], *concept["aliases"])}
    for number, concept in enumerate(chosen):
        concept |= {"id": number, "tags": [tag for tag in concept["tags"] if tag not in taken][:4]}
    return chosen


def _describe(entry: dict, point: str, group: str) -> dict:
    name, *aliases = concepts.names_of(entry["label"])
    tags = [tag.lower() for tag in entry.get("tags", [])]
    return {
        "codepoint": point,
        "name": name,
        "article": concepts.article(name),
        "aliases": aliases,
        "tags": [tag for tag in tags if tag.isascii() and len(tag) > 2 and not concepts.has_colour_word(tag)],
        "group": group,
        "everyday": name in concepts.EVERYDAY,
    }


def _check_names(chosen: list[dict]) -> None:
    names = [name for concept in chosen for name in (concept["name"], *concept["aliases"])]
    twice = sorted({name for name in names if names.count(name) > 1})
    missing = sorted(concepts.EVERYDAY - {concept["name"] for concept in chosen})
    if twice or missing:
        raise ValueError(f"train/concepts.py: names used twice {twice}, everyday names of no concept {missing}")


def frame(drawing: Image.Image, size: int) -> Image.Image:
    """The drawing's visible part, as large as the margins let it be, in the middle of a clear square."""
    box = drawing.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    part = drawing.crop(box)
    scale = size * (1 - 2 * MARGIN) / max(part.size)
    part = part.resize([max(1, round(side * scale)) for side in part.size], Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(part, [(size - side) // 2 for side in part.size])
    return canvas


def rasterize(svg: str, size: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise SystemExit("rasterizing needs resvg-py: pip install -r requirements-train.txt") from error
    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, skip_system_fonts=True)))


def encode(picture: Image.Image, style: str) -> bytes:
    """WebP, without loss for the style that is drawn by default; the flat one is large areas that survive it."""
    buffer = io.BytesIO()
    options = {"lossless": True, "quality": 80, "method": 4} if style == "3d" else {"quality": 94, "method": 4}
    picture.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def on(background: int, rgba: ndarray) -> ndarray:
    """The picture over a gray of 0..255: uint8 [H, W, 3]."""
    alpha = rgba[..., 3:] / np.float32(255)
    return (rgba[..., :3] * alpha + background * (1 - alpha)).round().astype(np.uint8)


def colour_facts(rgba: ndarray, one_hue: float = ONE_HUE) -> dict:
    """The surface that takes colours, and those that an independent checker then sees, on two backgrounds."""
    natural = {"natural": dominant_colour(on(0 if rgba[..., :3].mean() > 250 else 128, rgba))}
    surface = find_surface(rgba, one_hue)
    if surface is None:
        return natural | {"surface": None, "colours": []}
    surface = Surface(*(value if value is None else round(float(value), 3) for value in vars(surface).values()))
    small = rgba[::3, ::3]  # enough pixels to vote, at a ninth of the time
    colours = [colour for colour in COLOURS if _convinces(recolour(small, surface, colour), colour)]
    enough = len(set(colours) & set(HUES)) >= MIN_COLOURS
    return natural | {"surface": vars(surface), "colours": colours if enough else []}


def _convinces(rgba: ndarray, colour: str) -> bool:
    backgrounds = (0, 255) if colour == "gray" else (128, 0 if colour == "white" else 255)
    return all(dominant_colour(on(background, rgba)) == colour for background in backgrounds)


def draw(size: int, job: tuple[str, bytes | str, float]) -> tuple[bytes, dict]:
    """One drawing: its entry of the archive and what the manifest says of its colours."""
    style, source, one_hue = job
    drawing = (
        Image.open(io.BytesIO(source)).convert("RGBA") if style == "3d" else rasterize(source, size).convert("RGBA")
    )
    data = encode(frame(drawing, size), style)
    return data, colour_facts(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")), one_hue)


def draw_all(concepts_: list[dict], sources: Sources, size: int) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the archive's entries; what is learned of colours goes into the concepts."""
    found = {"3d": sources.webp, "flat": sources.svg}
    jobs = [(concept, style) for concept in concepts_ for style in STYLES if concept["codepoint"] in found[style]]
    work = [(style, found[style][concept["codepoint"]], _one_hue(concept["name"])) for concept, style in jobs]
    with Pool() as pool:
        results = tqdm(
            pool.imap(partial(draw, size), work, chunksize=8), total=len(work), desc="drawing", mininterval=5
        )
        for (concept, style), (data, facts) in zip(jobs, results, strict=True):
            concept.setdefault("styles", {})[style] = facts
            yield f"{style}/{concept['id']:04d}.webp", data


def _one_hue(name: str) -> float:
    return ONE_HUE_OF_MAIN if name in concepts.MAIN_COLOUR else ONE_HUE


def finish(concept: dict) -> dict:
    """Add what holds for the concept: it is recolourable if its 3d drawing is and its name lets it be."""
    for facts in concept["styles"].values():
        facts["colours"] = concepts.may_take(concept["name"], concept["group"], facts["colours"], NEUTRALS)
    facts = concept["styles"]["3d"]
    hue = facts["surface"] and facts["surface"]["hue"]
    return concept | {"recolourable": bool(facts["colours"]), "dominant_hue": hue}


def write(path: Path, data: bytes) -> None:
    """Write all of it or nothing."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def zipped(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """A zip of the entries, stored, with one fixed time stamp: a function of the entries alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def prepare(out: Path, size: int) -> dict:
    """Write data.zip and manifest.json into `out`; returns the manifest."""
    out.mkdir(parents=True, exist_ok=True)
    sources = open_sources(out / "cache")
    chosen = choose(sources)
    data = zipped(draw_all(chosen, sources, size))
    if len(data) > LIMIT_BYTES:
        raise ValueError(f"the archive has {len(data):,} bytes, more than {LIMIT_BYTES:,}")
    packages = [f"{package.name}@{package.version}" for package in (FLUENT, NOTO, EMOJIBASE)]
    manifest = {
        "size": size,
        "packages": packages,
        "sha256": hashlib.sha256(data).hexdigest(),
        "concepts": [finish(concept) for concept in chosen],
    }
    write(out / "data.zip", data)
    write(out / "manifest.json", (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("train/build"), help="folder to write to (%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels (%(default)s)")
    args = parser.parse_args()
    try:
        manifest = prepare(args.out, args.size)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"prepare: {error}")
    recolourable = sum(concept["recolourable"] for concept in manifest["concepts"])
    print(f"{len(manifest['concepts'])} concepts, {recolourable} recolourable, sha256 {manifest['sha256']}")


if __name__ == "__main__":
    main()
