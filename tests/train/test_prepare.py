"""The data of the demo model on synthetic drawings: no network, no archive."""

import base64
import hashlib
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from train import captions, checkers, concepts, prepare
from train.captions import Concept, Data, Dataset, Scene, Thing
from train.colours import COLOURS, FILL, HUES, NEUTRALS, from_oklch, recolour, to_oklch

SIZE = 128
NAMES = ("fox", "apple", "elephant", "grapes", "unicorn", "owl", "car", "umbrella", "red apple", "hat")


def drawing(rgb: tuple[int, int, int], inset: int = 16) -> np.ndarray:
    """A shaded ball with an eye: uint8 [SIZE, SIZE, 4], straight alpha."""
    image = Image.new("RGBA", (SIZE, SIZE))
    draw = ImageDraw.Draw(image)
    for step in range(12):
        shade = tuple(min(255, round(channel * (0.75 + 0.03 * step))) for channel in rgb)
        edge = inset + 2 * step
        draw.ellipse((edge, edge, SIZE - edge, SIZE - edge), fill=(*shade, 255))
    draw.ellipse((50, 50, 58, 58), fill=(10, 10, 12, 255))
    return np.asarray(image)


def concept(number: int, name: str, pictures: dict[str, np.ndarray]) -> Concept:
    facts = {style: prepare.colour_facts(picture) for style, picture in pictures.items()}
    entry = {
        "id": number,
        "codepoint": f"1f{number:03x}",
        "name": name,
        "article": concepts.article(name),
        "aliases": [f"little {name}"],
        "tags": ["thing"],
        "group": "objects",
        "everyday": True,
        "styles": facts,
    }
    return captions.parse_concept(prepare.finish(entry))


@pytest.fixture(scope="module")
def data() -> Data:
    rgbs = [
        FILL[("orange", "red", "gray", "purple", "pink", "brown", "blue", "green", "red", "yellow")[k]]
        for k in range(10)
    ]
    drawings = {"3d": np.stack([drawing(rgb) for rgb in rgbs]), "flat": np.stack([drawing(rgb, 28) for rgb in rgbs])}
    rows = [
        concept(k, name, {style: pictures[k] for style, pictures in drawings.items()}) for k, name in enumerate(NAMES)
    ]
    return Data(rows, drawings)


@pytest.fixture(scope="module")
def dataset(data: Data) -> Dataset:
    return Dataset(data, captions.render_bank(data))


def over(background: str, rgba: np.ndarray) -> np.ndarray:
    picture = np.empty((*rgba.shape[:2], 3), np.uint8)
    picture[:] = FILL[background]
    captions.blend(picture, captions.premultiply(rgba), 0, 0)
    return picture


# --- names and grammar


@pytest.mark.parametrize(
    ("name", "article"),
    [
        ("fox", "a"),
        ("apple", "an"),
        ("unicorn", "a"),
        ("ufo", "a"),
        ("hourglass", "an"),
        ("x-ray", "an"),
        ("umbrella", "an"),
        ("grapes", ""),
        ("octopus", "an"),
        ("bus", "a"),
        ("glasses", ""),
        ("glass of milk", "a"),
        ("bowl of noodles", "a"),
        ("sushi", ""),
        ("santa claus", ""),
        ("two hearts", ""),
        ("dress", "a"),
    ],
)
def test_articles(name: str, article: str):
    assert concepts.article(name) == article


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (("fox", "a", "orange"), "an orange fox"),
        (("apple", "an", "green"), "a green apple"),
        (("apple", "an"), "an apple"),
        (("grapes", "", "orange"), "orange grapes"),
    ],
)
def test_a_colour_changes_the_article(words: tuple[str, ...], phrase: str):
    assert captions.noun_phrase(*words) == phrase


def test_plainest_captions(data: Data):
    row = data.by_name["fox"]
    cases = {
        "a fox": Scene((Thing(row),)),
        "a blue fox on a yellow background": Scene((Thing(row, colour="blue"),), "yellow"),
        "a fox on an orange background, flat style": Scene((Thing(row, "flat"),), "orange"),
        "an apple left of a fox": Scene((Thing(data.by_name["apple"]), Thing(row)), relation="left of"),
        "a blue circle above a red square": Scene(
            (Thing(shape="circle", colour="blue"), Thing(shape="square", colour="red")), relation="above"
        ),
    }
    for text, scene in cases.items():
        assert captions.caption(data, scene) == text


def test_captions_are_grammatical_and_name_what_is_drawn(dataset: Dataset):
    for n in range(500):
        rng = np.random.default_rng(n)
        scene = dataset.sampler.scene(rng)
        text = captions.caption(dataset.data, scene, rng)
        words = text.replace(",", "").split()
        for article, word in itertools.pairwise(words):
            if article in ("a", "an"):
                assert article == concepts.indefinite(word), text
        assert all(thing.colour is None or thing.colour in words for thing in scene.things), text
        assert scene.background == captions.PLAIN or scene.background in words, text
        assert text.endswith("flat style") == (scene.things[0].style == "flat"), text


@pytest.mark.parametrize(
    ("label", "subgroup", "kept"),
    [
        ("fox", "animal-mammal", True),
        ("man health worker", "person-role", False),
        ("person: beard", "person", False),
        ("one o’clock", "time", False),
        ("Aries", "zodiac", False),
        ("paperclip", "office", False),
        ("recycling symbol", "other-symbol", True),
        ("family", "person-symbol", True),
        ("woman dancing", "person-activity", True),
    ],
)
def test_which_emoji_are_concepts(label: str, subgroup: str, kept: bool):
    assert concepts.keep({"label": label}, subgroup) is kept


def test_one_name_means_one_concept():
    names = [name for label in concepts.NAMES for name in concepts.names_of(label)]
    assert len(names) == len(set(names))


# --- held out


def test_held_out_combinations_are_never_sampled(dataset: Dataset):
    data = dataset.data
    colours, backgrounds, shapes = set(), set(), set()
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        scene = dataset.sampler.scene(rng)
        for thing in scene.things:
            colours.add((thing.concept, thing.colour))
            backgrounds.add((thing.concept, scene.background))
            shapes.add((thing.shape, thing.colour))
        if scene.relation:
            first, second = (captions.thing_key(data, thing) for thing in scene.things)
            assert not captions.held_out_relation(first, scene.relation, second)
            assert not captions.held_out_relation(second, captions.INVERSE[scene.relation], first)
    for row, concept in enumerate(data.concepts):
        assert (row, captions.held_out_colour(concept)) not in colours - {(row, None)}
        assert (row, captions.held_out_background(concept)) not in backgrounds
        seen = {colour for other, colour in colours if other == row} - {None}
        assert len(seen) >= len(concept.colours["3d"]) - 1, "every other colour is seen"
    assert not any(captions.held_out_shape(*pair) for pair in shapes if pair[0])
    assert len(shapes - {(None, colour) for _, colour in shapes}) == len(captions.SEEN_SHAPES)


def test_hold_outs_do_not_depend_on_the_run(data: Data):
    assert captions.fraction("colour", "1f98a", "blue") == 0.6051375336239163
    assert sum(captions.held_out_shape(s, c) for s in captions.SHAPES for c in captions.SHAPE_COLOURS) == 10
    scenes = captions.held_out_scenes(data)
    assert all(captions.is_held_out(data, scene) for kind in scenes.values() for scene in kind)
    assert len(scenes["background"]) == len(data.concepts)


def test_natural_colour_is_not_the_one_held_out(data: Data):
    pairs = [(captions.held_out_colour(concept), concept.natural) for concept in data.concepts]
    assert sum(None not in pair for pair in pairs) > len(pairs) / 2
    assert all(held_out != natural for held_out, natural in pairs if held_out)


def test_a_name_with_a_colour_takes_no_other(data: Data):
    assert not data.concepts[data.by_name["red apple"]].recolourable
    assert data.concepts[data.by_name["apple"]].recolourable


def test_people_take_no_colour_and_faces_only_hues():
    assert concepts.may_take("baby", "people-body", COLOURS, NEUTRALS) == []
    assert concepts.may_take("black cat", "animals-nature", COLOURS, NEUTRALS) == []
    assert concepts.may_take("happy face", "smileys-emotion", COLOURS, NEUTRALS) == list(HUES)
    assert concepts.may_take("fox", "animals-nature", COLOURS, NEUTRALS) == list(COLOURS)


# --- colours


def test_oklch_round_trip():
    rgb = np.random.default_rng(0).integers(0, 256, (4096, 3), dtype=np.uint8)
    assert np.abs(from_oklch(*to_oklch(rgb)).astype(int) - rgb).max() <= 1


def test_oklab_of_pure_red_is_the_published_one():
    lightness, chroma, hue = (float(part[0]) for part in to_oklch(np.array([[255, 0, 0]], np.uint8)))
    assert (lightness, chroma, hue) == pytest.approx((0.62796, 0.25768, 29.234), rel=1e-4)


@pytest.mark.parametrize("colour", COLOURS)
def test_recolouring_is_seen_by_the_checker(data: Data, colour: str):
    for k, concept in enumerate(data.concepts):
        surface = concept.surfaces["3d"]
        assert surface is not None
        changed = recolour(data.drawings["3d"][k], surface, colour)
        background = "gray" if colour in ("white", "black") else "white"
        assert checkers.dominant_colour(over(background, changed)) == colour, concept.name
        assert np.array_equal(changed[..., 3], data.drawings["3d"][k][..., 3])


def test_recolouring_keeps_the_shading_and_the_eye(data: Data):
    original = data.drawings["3d"][0]
    changed = recolour(original, data.concepts[0].surfaces["3d"], "blue")
    assert np.abs(changed[54, 54, :3].astype(int) - original[54, 54, :3]).max() < 12
    centre, edge = to_oklch(changed[[90, 111], [64, 64], :3])[0]
    assert centre > edge + 0.05


# --- checkers


def test_checkers_are_right_on_composed_pictures(dataset: Dataset):
    right = {"colour": [], "background": [], "shape": []}
    for n in range(600):
        sample = dataset.sample(1, n)
        scene, picture = sample.scene, sample.picture
        right["background"].append(checkers.background_colour(picture) == scene.background)
        if scene.things[0].shape:
            found = [(shape, colour) for shape, colour, _ in checkers.find_shapes(picture)]
            right["shape"].append(sorted(found) == sorted((t.shape, t.colour) for t in scene.things))
        elif scene.things[0].colour and scene.things[0].colour != scene.background:
            right["colour"].append(checkers.dominant_colour(picture) == scene.things[0].colour)
    for kind, results in right.items():
        assert len(results) > 30
        assert np.mean(results) >= 0.97, kind


def test_relations_are_where_they_are_said_to_be(dataset: Dataset):
    for relation in captions.RELATIONS:
        things = (Thing(shape="circle", colour="red"), Thing(shape="square", colour="blue"))
        picture = captions.render(dataset.bank, Scene(things, relation=relation), np.random.default_rng(3))
        centres = {shape: centre for shape, _, centre in checkers.find_shapes(picture)}
        assert checkers.relation(centres["circle"], centres["square"]) == relation


# --- pictures


def test_samples_are_functions_of_seed_and_number(dataset: Dataset):
    first = [(picture.tobytes(), text) for picture, text in dataset.draw(40, 7)]
    again = [(picture.tobytes(), text) for picture, text in Dataset(dataset.data, dataset.bank).draw(40, 7)]
    other = [(picture.tobytes(), text) for picture, text in dataset.draw(40, 8)]
    assert first == again
    assert first != other


def test_blending_is_that_of_pillow():
    rgba = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    expected = Image.new("RGBA", (32, 32), (*FILL["yellow"], 255))
    expected.alpha_composite(Image.fromarray(rgba))
    assert np.abs(over("yellow", rgba).astype(int) - np.asarray(expected)[..., :3]).max() <= 2


def test_no_fringe_around_a_resized_drawing(dataset: Dataset):
    """Clear pixels are black under their alpha: blended carelessly they would darken the edge on white."""
    white = np.full((SIZE, SIZE, 4), 255, np.uint8)
    white[:, :32] = 0
    picture = np.full((SIZE, SIZE, 3), 255, np.uint8)
    resized = captions._resize(captions.premultiply(white), 100)
    captions.blend(picture, resized, 0, 0)
    assert picture.min() >= 253
    black = np.zeros((SIZE, SIZE, 3), np.uint8)
    captions.blend(black, resized, 0, 0)
    assert (black > 250).mean() == pytest.approx(75 * 100 / SIZE**2, rel=0.05)  # three quarters of 100 x 100 are white


def test_the_bank_is_the_same_from_several_processes(data: Data, dataset: Dataset):
    bank = captions.render_bank(data, processes=2)
    assert bank.rows == dataset.bank.rows
    assert np.array_equal(bank.pictures, dataset.bank.pictures)


# --- the archive


def test_archive_is_read_back_and_has_the_same_bytes_twice(tmp_path: Path):
    pictures = {"3d": drawing(FILL["orange"]), "flat": drawing(FILL["orange"], 28)}
    entries = [(f"{style}/0003.webp", prepare.encode(Image.fromarray(p), style)) for style, p in pictures.items()]
    archive = prepare.zipped(entries)
    assert archive == prepare.zipped(entries)
    facts = {"name": "fox", "article": "a", "aliases": [], "tags": [], "group": "animals", "everyday": True}
    styles = {style: prepare.colour_facts(picture) for style, picture in pictures.items()}
    manifest = {"size": SIZE, "concepts": [facts | {"id": 3, "codepoint": "1f98a", "styles": styles}]}
    (tmp_path / "data.zip").write_bytes(archive)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data = captions.load(tmp_path)
    alpha = pictures["3d"][..., 3:] > 0
    assert np.array_equal(data.drawings["3d"][0] * alpha, pictures["3d"] * alpha), "the 3d style is stored without loss"
    assert data.drawings["flat"].shape == (1, SIZE, SIZE, 4)
    assert data.concepts[0].natural == "orange"


def test_drawings_fill_the_frame_and_keep_their_shape():
    image = Image.new("RGBA", (256, 256))
    ImageDraw.Draw(image).rectangle((10, 100, 109, 149), fill="red")
    box = prepare.frame(image, 128).getchannel("A").getbbox()
    assert box == (4, 34, 124, 94)


def test_a_package_with_another_checksum_is_refused(tmp_path: Path):
    package = prepare.Package("@some/thing", "1.0.0", "sha512-" + base64.b64encode(bytes(64)).decode())
    (tmp_path / "some-thing-1.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not @some/thing@1\.0\.0"):
        prepare.fetch(package, tmp_path)
    good = "sha512-" + base64.b64encode(hashlib.sha512(b"something else").digest()).decode()
    assert prepare.fetch(prepare.Package("@some/thing", "1.0.0", good), tmp_path).exists()


def test_a_missing_archive_says_what_to_run(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"python train/prepare\.py"):
        captions.load(tmp_path)


def test_lossless_encoding_keeps_every_visible_pixel():
    picture = drawing(FILL["green"])
    decoded = np.asarray(Image.open(io.BytesIO(prepare.encode(Image.fromarray(picture), "3d"))).convert("RGBA"))
    assert np.array_equal(decoded[picture[..., 3] > 0], picture[picture[..., 3] > 0])
    assert set(HUES) < set(COLOURS)
