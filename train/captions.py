"""What the demo model learns from: scenes drawn at random, their captions and their pictures, and what is held out.

A `Scene` says what is in a picture. `Sampler.scene` draws one, `caption` puts it into words, `render` paints it from a
`Bank` of drawings in memory. Training and evaluation share all three; only evaluation asks for what is held out.

Axes: N drawings, H W pixels. Pictures are uint8; RGBA has straight alpha in `Data` and premultiplied alpha in `Bank`.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy import ndarray
from numpy.random import Generator
from PIL import Image, ImageDraw

from train.colours import COLOURS, FILL, HUES, Surface, recolour
from train.concepts import article, has_colour_word, indefinite

STYLES = ("3d", "flat")
SHAPES = ("circle", "square", "triangle", "rectangle", "oval")
SHAPE_COLOURS = (*HUES, "brown", "black", "gray")
BACKGROUNDS = COLOURS
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLAIN = "white"  # the background where a caption names none

# Share of each kind of scene in training.
MIX = {"plain": 0.35, "colour": 0.25, "background": 0.15, "colour and background": 0.10, "shapes": 0.08, "pair": 0.07}
FLAT_SHARE = 0.25
EVERYDAY_WEIGHT = 4.0  # how much more often an everyday concept is drawn than another


# --- the archive ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concept:
    """One entry of the manifest. `surfaces` and `colours` are by style; see train/colours.py."""

    id: int
    codepoint: str
    name: str
    article: str
    aliases: tuple[str, ...]
    tags: tuple[str, ...]
    group: str
    everyday: bool
    natural: str
    surfaces: dict[str, Surface | None] = field(compare=False)
    colours: dict[str, tuple[str, ...]] = field(compare=False)

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(self.surfaces)

    @property
    def recolourable(self) -> bool:
        return bool(self.colours["3d"])


@dataclass(frozen=True)
class Data:
    """Concepts and their drawings. `drawings[style][k]` belongs to `concepts[k]`: uint8 [N, H, W, 4], straight alpha.

    Where a concept has no drawing in a style, its row is clear.
    """

    concepts: list[Concept]
    drawings: dict[str, ndarray]

    @property
    def size(self) -> int:
        return self.drawings["3d"].shape[1]

    @cached_property
    def by_name(self) -> dict[str, int]:
        """Row of every name and alias."""
        rows = {alias: row for row, concept in enumerate(self.concepts) for alias in concept.aliases}
        return rows | {concept.name: row for row, concept in enumerate(self.concepts)}


def parse_concept(entry: dict) -> Concept:
    """A concept from its entry of manifest.json."""
    styles = entry["styles"]
    plain = {key: entry[key] for key in ("id", "codepoint", "name", "article", "group", "everyday")}
    return Concept(
        **plain,
        aliases=tuple(entry["aliases"]),
        tags=tuple(entry["tags"]),
        natural=styles["3d"]["natural"],
        surfaces={style: facts["surface"] and Surface(**facts["surface"]) for style, facts in styles.items()},
        colours={style: tuple(facts["colours"]) for style, facts in styles.items()},
    )


def load(folder: str | Path, everyday: bool = False) -> Data:
    """What train/prepare.py wrote into `folder`; only the everyday concepts if asked."""
    folder = Path(folder)
    if not (folder / "manifest.json").exists():
        raise FileNotFoundError(f"{folder} holds no data: run python train/prepare.py --out {folder}")
    manifest = json.loads((folder / "manifest.json").read_text())
    concepts = [parse_concept(entry) for entry in manifest["concepts"] if entry["everyday"] or not everyday]
    size = manifest["size"]
    drawings = {style: np.zeros((len(concepts), size, size, 4), np.uint8) for style in STYLES}
    with zipfile.ZipFile(folder / "data.zip") as archive:
        for row, concept in enumerate(concepts):
            for style in concept.styles:
                entry = archive.read(f"{style}/{concept.id:04d}.webp")
                drawings[style][row] = Image.open(io.BytesIO(entry)).convert("RGBA")
    return Data(concepts, drawings)


# --- held out: functions of names alone, so that they are the same on every machine and in every version -------------


def fraction(*words: str) -> float:
    """A number in [0, 1) that is a hash of the words."""
    digest = hashlib.sha256("|".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@cache
def _least(kind: str, codepoint: str, choices: tuple[str, ...]) -> str | None:
    """The choice whose hash is the smallest."""
    return min(choices, key=lambda choice: fraction(kind, codepoint, choice), default=None)


def held_out_colour(concept: Concept) -> str | None:
    """The hue that a recolourable concept never has in training; not the one it naturally has."""
    choices = (hue for hue in HUES if hue in concept.colours["3d"] and hue != concept.natural)
    return _least("colour", concept.codepoint, tuple(choices))


def held_out_background(concept: Concept) -> str:
    """The background colour that a concept never stands on in training."""
    return _least("background", concept.codepoint, tuple(colour for colour in BACKGROUNDS if colour != PLAIN))


def held_out_shape(shape: str, colour: str) -> bool:
    """Whether no such shape is ever drawn in training: 20% of the pairs."""
    return (shape, colour) in _HELD_SHAPES


def held_out_relation(first: str, relation: str, second: str) -> bool:
    """Whether two things never stand so in training: 10% of the triples. 'x left of y' is 'y right of x'."""
    if relation in ("right of", "below"):
        first, relation, second = second, INVERSE[relation], first
    return fraction("relation", first, relation, second) < 0.10


_RANKED_SHAPES = sorted(((s, c) for s in SHAPES for c in SHAPE_COLOURS), key=lambda pair: fraction("shape", *pair))
_HELD_SHAPES = frozenset(_RANKED_SHAPES[: len(_RANKED_SHAPES) // 5])
SEEN_SHAPES = tuple(_RANKED_SHAPES[len(_HELD_SHAPES) :])


# --- scenes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """A concept (its row in Data) in a style, or a flat shape; `colour` is None for a concept as it was drawn."""

    concept: int | None = None
    style: str = "3d"
    shape: str | None = None
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """One thing, or two, the first in `relation` to the second, before one colour."""

    things: tuple[Thing, ...]
    background: str = PLAIN
    relation: str | None = None


def thing_key(data: Data, thing: Thing) -> str:
    """The thing's name in the hashes of relations."""
    return thing.shape or data.concepts[thing.concept].codepoint


def is_held_out(data: Data, scene: Scene) -> bool:
    """Whether any combination in the scene is kept from training."""
    for thing in scene.things:
        if thing.shape and held_out_shape(thing.shape, thing.colour):
            return True
        if thing.concept is not None and _held_out_concept(data.concepts[thing.concept], thing, scene.background):
            return True
    if scene.relation is None:
        return False
    first, second = (thing_key(data, thing) for thing in scene.things)
    return held_out_relation(first, scene.relation, second)


def _held_out_concept(concept: Concept, thing: Thing, background: str) -> bool:
    return background == held_out_background(concept) or (
        thing.colour is not None and thing.colour == held_out_colour(concept)
    )


def held_out_scenes(data: Data) -> dict[str, list[Scene]]:
    """Everything of one thing that training never shows, in the 3d style: for evaluation."""
    rows = range(len(data.concepts))
    held = {row: held_out_colour(data.concepts[row]) for row in rows}
    return {
        "colour": [Scene((Thing(row, colour=colour),)) for row, colour in held.items() if colour],
        "background": [Scene((Thing(row),), held_out_background(data.concepts[row])) for row in rows],
        "shape": [Scene((Thing(shape=s, colour=c),)) for s, c in sorted(_HELD_SHAPES)],
    }


class Sampler:
    """Draws scenes of the training set."""

    def __init__(self, data: Data):
        self.data = data
        weights = np.array([EVERYDAY_WEIGHT if c.everyday else 1.0 for c in data.concepts])
        self.all = self._rows(weights)
        self.recolourable = self._rows(weights * [c.recolourable for c in data.concepts])
        self.everyday = self._rows(np.array([float(c.everyday) for c in data.concepts]))
        self.kinds = {"plain": self._plain, "colour": self._colour, "background": self._background}
        self.kinds |= {"colour and background": self._colour_background, "shapes": self._shapes, "pair": self._pair}
        self.limits = np.cumsum([MIX[kind] for kind in self.kinds])

    @staticmethod
    def _rows(weights: ndarray) -> ndarray:
        """Cumulative distribution over rows; `searchsorted` of a uniform number draws from it."""
        return np.cumsum(weights / max(weights.sum(), 1e-9))

    def scene(self, rng: Generator) -> Scene:
        """A scene in which nothing is held out."""
        kind = list(self.kinds.values())[int(np.searchsorted(self.limits, rng.random() * self.limits[-1]))]
        while True:
            scene = kind(rng)
            if scene is not None and not is_held_out(self.data, scene):
                return scene

    def _concept(self, rng: Generator, rows: ndarray) -> Thing:
        row = min(int(np.searchsorted(rows, rng.random(), side="right")), len(rows) - 1)
        flat = rng.random() < FLAT_SHARE and "flat" in self.data.concepts[row].styles
        return Thing(row, "flat" if flat else "3d")

    def _coloured(self, rng: Generator) -> Thing | None:
        thing = self._concept(rng, self.recolourable)
        colours = self.data.concepts[thing.concept].colours[thing.style]
        return replace(thing, colour=_pick(rng, colours)) if colours else None

    def _plain(self, rng: Generator) -> Scene:
        return Scene((self._concept(rng, self.all),))

    def _colour(self, rng: Generator) -> Scene | None:
        thing = self._coloured(rng)
        return Scene((thing,)) if thing and thing.colour != PLAIN else None

    def _background(self, rng: Generator) -> Scene:
        return Scene((self._concept(rng, self.all),), _pick(rng, BACKGROUNDS))

    def _colour_background(self, rng: Generator) -> Scene | None:
        thing = self._coloured(rng)
        background = _pick(rng, BACKGROUNDS)
        return Scene((thing,), background) if thing and thing.colour != background else None

    def _shape(self, rng: Generator) -> Thing:
        shape, colour = _pick(rng, SEEN_SHAPES)
        return Thing(shape=shape, colour=colour)

    def _shapes(self, rng: Generator) -> Scene | None:
        background = PLAIN if rng.random() < 0.6 else _pick(rng, BACKGROUNDS)
        things = tuple(self._shape(rng) for _ in range(1 + (rng.random() < 0.6)))
        if background in [thing.colour for thing in things]:
            return None
        return Scene(things, background, _pick(rng, RELATIONS) if len(things) == 2 else None)

    def _pair(self, rng: Generator) -> Scene | None:
        first, second = (replace(self._concept(rng, self.everyday), style="3d") for _ in range(2))
        return None if first == second else Scene((first, second), relation=_pick(rng, RELATIONS))


def _pick(rng: Generator, choices: Sequence):
    return choices[int(rng.random() * len(choices))]


# --- captions ------------------------------------------------------------------------------------------------------

MEDIA = {"3d": ("a picture of", "an image of", "an icon of", "a 3d picture of"), "flat": ("a drawing of", "an icon of")}


def noun_phrase(name: str, article: str, colour: str | None = None) -> str:
    """('fox', 'a', 'orange') -> 'an orange fox'; ('grapes', '', 'red') -> 'red grapes'."""
    phrase = f"{colour} {name}" if colour else name
    return f"{indefinite(phrase)} {phrase}" if article in ("a", "an") else phrase


def describe(data: Data, thing: Thing, rng: Generator | None = None) -> str:
    """The thing as a noun phrase; with a generator sometimes by an alias, or without its article."""
    if thing.shape:
        return noun_phrase(thing.shape, "a", thing.colour)
    concept = data.concepts[thing.concept]
    names = [concept.name]
    if rng is not None and rng.random() < 0.3:
        names += [alias for alias in concept.aliases if not (thing.colour and has_colour_word(alias))]
    name = names[-1] if len(names) == 1 else _pick(rng, names[1:])
    bare = rng is not None and rng.random() < 0.15
    return noun_phrase(name, "" if bare else _article(concept, name), thing.colour)


def _article(concept: Concept, name: str) -> str:
    if name == concept.name:
        return concept.article
    return article(name)


def caption(data: Data, scene: Scene, rng: Generator | None = None) -> str:
    """The scene in words: the plainest ones, or, with a generator, one of the ways in which people put it."""
    words = [describe(data, thing, rng) for thing in scene.things]
    style = scene.things[0].style
    roll = rng.random() if rng is not None else 0.0
    text = words[0]
    if scene.relation:
        the_way = {"left of": "to the left of", "right of": "to the right of"}.get(scene.relation, scene.relation)
        text = f"{words[0]} {the_way if roll > 0.7 else scene.relation} {words[1]}"
    elif rng is not None and scene.things[0].shape is None:
        text = _frame(data, scene, text, style, rng)
    if scene.background != PLAIN or (roll > 0.97 and rng is not None):
        text += (
            f", {scene.background} background" if roll > 0.9 else f" on {noun_phrase(scene.background, 'a')} background"
        )
    return text + _style_suffix(scene, style, rng)


def _frame(data: Data, scene: Scene, text: str, style: str, rng: Generator) -> str:
    """Sometimes 'a picture of ...', sometimes a tag after a comma."""
    roll = rng.random()
    thing = scene.things[0]
    tags = data.concepts[thing.concept].tags
    if roll < 0.12:
        return f"{_pick(rng, MEDIA[style])} {text}"
    if roll < 0.20 and tags and thing.colour is None and scene.background == PLAIN:
        return f"{text}, {_pick(rng, tags)}"
    return text


def _style_suffix(scene: Scene, style: str, rng: Generator | None) -> str:
    """Flat drawings always say so: a prompt without a style means the 3d ones."""
    if style == "flat":
        return ", flat style"
    named = rng is not None and scene.things[0].shape is None and rng.random() < 0.08
    return ", 3d style" if named else ""


# --- pictures ------------------------------------------------------------------------------------------------------


def premultiply(rgba: ndarray) -> ndarray:
    """Straight to premultiplied alpha, uint8: what may be resized and blended without fringes at the edges."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return np.concatenate([(rgba[..., :3] * alpha + 127) // 255, alpha], axis=-1).astype(np.uint8)


@dataclass(frozen=True)
class Bank:
    """Every drawing in every colour it takes, rendered once: uint8 [N, H, W, 4], premultiplied alpha."""

    pictures: ndarray
    rows: dict[tuple[int, str, str | None], int]  # (concept's row, style, colour or None) -> row of `pictures`

    def __getitem__(self, thing: Thing) -> ndarray:
        return self.pictures[self.rows[thing.concept, thing.style, thing.colour]]


_shared: Data  # the data in the processes of `render_bank`, inherited at fork: nothing is pickled


def render_bank(data: Data, styles: Sequence[str] = STYLES, processes: int = 1) -> Bank:
    """Render the bank, in `processes` processes. About 20 ms a drawing and colour; 64 KB each at 128x128."""
    global _shared
    _shared = data
    jobs = [(row, style) for style in styles for row, concept in enumerate(data.concepts) if style in concept.styles]
    keys = [(row, style, colour) for row, style in jobs for colour in (None, *data.concepts[row].colours[style])]
    pictures = np.empty((len(keys), data.size, data.size, 4), np.uint8)
    start = 0
    for rendered in _map(_render_colours, jobs, processes):
        pictures[start : start + len(rendered)] = rendered
        start += len(rendered)
    return Bank(pictures, {key: number for number, key in enumerate(keys)})


def _map(function, jobs: Sequence, processes: int) -> Iterator:
    if processes <= 1:
        yield from map(function, jobs)
        return
    with get_context("fork").Pool(processes) as pool:
        yield from pool.imap(function, jobs, chunksize=8)


def _render_colours(job: tuple[int, str]) -> ndarray:
    row, style = job
    concept, drawing = _shared.concepts[row], _shared.drawings[style][row]
    colours = [recolour(drawing, concept.surfaces[style], colour) for colour in concept.colours[style]]
    return premultiply(np.stack([drawing, *colours]))


def render(bank: Bank, scene: Scene, rng: Generator | None = None) -> ndarray:
    """The picture of a scene: uint8 [H, W, 3]. With a generator, sizes and places vary a little.

    Nothing is ever mirrored: text and left hands would be wrong, and one way to look makes crisper pictures.
    """
    size = bank.pictures.shape[1]
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = FILL[scene.background]
    for thing, (side, x, y) in zip(scene.things, _places(scene, size, rng), strict=True):
        sprite = draw_shape(thing, side) if thing.shape else _resize(bank[thing], side)
        blend(picture, sprite, x, y)
    return picture


def _resize(premultiplied: ndarray, side: int) -> ndarray:
    if side == premultiplied.shape[0]:
        return premultiplied
    # To Pillow "RGBa" is premultiplied already, so that it does not do it again.
    image = Image.frombuffer("RGBa", premultiplied.shape[1::-1], premultiplied.tobytes(), "raw", "RGBa", 0, 1)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def blend(picture: ndarray, sprite: ndarray, x: int, y: int) -> None:
    """Lay a premultiplied sprite, uint8 [h, w, 4], onto the picture in place, its upper left corner at (x, y)."""
    h, w = sprite.shape[:2]
    part = picture[y : y + h, x : x + w]
    behind = part * (255 - sprite[..., 3:].astype(np.uint16)) + 127
    part[:] = np.minimum(sprite[..., :3] + behind // 255, 255)


def _places(scene: Scene, size: int, rng: Generator | None) -> list[tuple[int, int, int]]:
    """Side and upper left corner, in pixels, of each thing."""
    uniform = (lambda low, high: rng.uniform(low, high)) if rng is not None else (lambda low, high: (low + high) / 2)
    if scene.relation is None:
        low = 0.45 if scene.things[0].shape else 0.86
        side = round(size * uniform(low, 1.0 if rng is not None else 2 - low))
        side = min(side, size)
        slack = min((size - side) / 2, size * 0.04)
        return [(side, *(round((size - side) / 2 + uniform(-slack, slack)) for _ in range(2)))]
    sides = [round(size * uniform(0.40, 0.48)) for _ in scene.things]
    along = [
        round(size * middle - side / 2 + size * uniform(-0.01, 0.01))
        for middle, side in zip((0.26, 0.74), sides, strict=True)
    ]
    across = [round((size - side) / 2 + size * uniform(-0.05, 0.05)) for side in sides]
    if scene.relation in ("right of", "below"):
        along = [size - a - side for a, side in zip(along, sides, strict=True)]
    vertical = scene.relation in ("above", "below")
    return [(s, *((b, a) if vertical else (a, b))) for s, a, b in zip(sides, along, across, strict=True)]


_OVERSAMPLE = 4


def draw_shape(thing: Thing, side: int) -> ndarray:
    """A flat shape that fills most of a square, premultiplied uint8 [side, side, 4], with smooth edges."""
    big = side * _OVERSAMPLE
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    low, high = big * 0.06, big * 0.94
    flat = (low, big * 0.28, high, big * 0.72)
    if thing.shape == "triangle":
        draw.polygon([(big / 2, low), (high, high), (low, high)], fill=255)
    elif thing.shape in ("circle", "oval"):
        draw.ellipse((low, low, high, high) if thing.shape == "circle" else flat, fill=255)
    else:
        draw.rectangle((low, low, high, high) if thing.shape == "square" else flat, fill=255)
    alpha = np.asarray(mask.resize((side, side), Image.Resampling.BOX))[..., None]
    colour = np.broadcast_to(np.array(FILL[thing.colour], np.uint8), (side, side, 3))
    return premultiply(np.concatenate([colour, alpha], axis=-1))


# --- the training set ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    picture: ndarray  # uint8 [H, W, 3]
    caption: str
    scene: Scene


class Dataset:
    """Samples without end; the n-th is a function of the data, the seed and n alone, in whichever process."""

    def __init__(self, data: Data, bank: Bank):
        self.data = data
        self.bank = bank
        self.sampler = Sampler(data)

    def sample(self, seed: int, n: int) -> Sample:
        rng = np.random.default_rng((seed, n))
        scene = self.sampler.scene(rng)
        return Sample(render(self.bank, scene, rng), caption(self.data, scene, rng), scene)

    def draw(self, count: int, seed: int) -> Iterator[tuple[ndarray, str]]:
        """`count` pairs of picture and caption: what the trainer asks for."""
        samples = (self.sample(seed, n) for n in range(count))
        return ((sample.picture, sample.caption) for sample in samples)


def open_dataset(folder: str | Path, everyday: bool = False, processes: int = 1) -> Dataset:
    """Load the archive and render the bank: seconds to a minute, and up to 1 GB; forked workers share it."""
    data = load(folder, everyday)
    return Dataset(data, render_bank(data, processes=processes))
