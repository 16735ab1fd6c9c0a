"""Picture files of each kind, read by Pillow and as AUTOMATIC1111's web UI writes and reads them."""

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd.pictures import a1111
from sd.pictures.formats import ENDINGS, encoded, read_foreign, read_parameters
from sd.pictures.model import ModelChoice
from sd.pictures.parameters import checked
from sd.pictures.run import Run, recalled
from sd.prompts import BREAK, parse
from sd.tokenizer import Tokenizer

SAID = {
    "prompt": "a (red:1.3) fox, naïve [sic] 狐",
    "negative_prompt": 'blurry, "odd"',
    "steps": 20,
    "cfg_scale": 7.0,
    "seed": 2**40,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "width": 512,
    "height": 768,
    "clip_skip": 2,
    "checkpoint": "v1-5-pruned.safetensors",
    "batch": [0, 1],
}
TOKENIZER = Tokenizer()
THEIRS = """a ((red)) fox, <hat>
second line
Negative prompt: blurry, (bad hands:1.2)
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 1234567890, Size: 512x768, Model hash: cc6cb27103, \
Model: v1-5, Denoising strength: 0.5, Clip skip: 2, Hires upscale: 2, Hires upscaler: Latent, \
TI hashes: "a: b1, c: d2", Version: v1.9.4"""


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((64, 64))


@pytest.mark.parametrize("ending", [*ENDINGS, ".JPG"])
def test_each_kind_says_how_it_was_drawn(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    file.write_bytes(encoded(picture(), ending, SAID))
    assert read_parameters(file) == SAID
    with Image.open(file) as image:
        assert image.format == ENDINGS[ending.lower()]
        assert np.abs(np.asarray(image, dtype=float) - np.asarray(picture(), dtype=float)).mean() < 12
        text = image.info["parameters"] if ending == ".png" else image.getexif().get_ifd(0x8769)[0x9286]
    shown = text if isinstance(text, str) else text.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert shown.splitlines() == [
        r"a (red:1.3) fox, naïve \[sic\] 狐",
        'Negative prompt: blurry, "odd"',
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.0, Seed: 1099511627776, Clip skip: 2, "
        "Size: 512x768, Model: v1-5-pruned",
    ]


def test_a_prompt_that_exif_does_not_hold():
    long = {"prompt": "a fox " * 10_000}
    assert encoded(picture(), ".png", long)
    with pytest.raises(ValueError, match="does not fit into a JPEG file: write a PNG"):
        encoded(picture(), ".jpg", long)


def test_what_the_web_ui_writes_is_read():
    known, unknown = a1111.read(THEIRS)
    assert known == {
        "prompt": "a ((red)) fox, <hat>\nsecond line",
        "negative_prompt": "blurry, (bad hands:1.2)",
        "prompt_syntax": "a1111",
        "steps": 20,
        "sampler": "DPM++ 2M Karras",
        "cfg_scale": 7.5,
        "seed": 1234567890,
        "width": 512,
        "height": 768,
        "clip_skip": 2,
        "hires": 2,
        "hires_strength": 0.5,
    }
    assert unknown == {
        "Model hash": "cc6cb27103",
        "Model": "v1-5",
        "Hires upscaler": "Latent",
        "TI hashes": '"a: b1, c: d2"',
        "Version": "v1.9.4",
    }


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "jpeg in the other byte order"])
def test_their_pictures_are_drawn_again(tmp_path, caplog, kind):
    """As their program saves them: a text chunk, or a UserComment, whose byte order differs by program."""
    from PIL.PngImagePlugin import PngInfo

    file = tmp_path / f"theirs.{kind.split()[0]}"
    chunk, exif = PngInfo(), Image.Exif()
    chunk.add_text("parameters", THEIRS)
    order = "utf-16-le" if "other" in kind else "utf-16-be"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + THEIRS.encode(order)
    picture().save(file, **({"pnginfo": chunk} if kind == "png" else {"exif": exif}))
    run, _, _ = recalled(Run(from_png=file), ModelChoice())
    assert run.prompt == ["a ((red)) fox, <hat>\nsecond line"]
    chosen = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 20, "seed": 1234567890, "hires": 2.0}
    assert chosen.items() <= run.parameters.items()
    assert "not taken over: Model hash cc6cb27103, Model v1-5, Hires upscaler Latent" in caplog.text


@pytest.mark.parametrize("text", ["", "a fox", "workflow: {}"])
def test_other_pictures_are_refused(tmp_path, text):
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    chunk.add_text("parameters", text)
    picture().save(tmp_path / "a.png", pnginfo=chunk)
    picture().save(tmp_path / "b.jpg")
    for name in ("a.png", "b.jpg"):
        with pytest.raises(ValueError, match="holds no parameters of a picture drawn by this program, or by"):
            read_foreign(tmp_path / name)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=40)


@given(texts, texts, st.integers(0, 2**63 - 1), st.sampled_from(["euler_a", "dpmpp_3m_sde", "ddim"]))
@settings(deadline=None, max_examples=80)
def test_what_is_written_is_read(prompt, negative, seed, sampler):
    said = {"prompt": prompt.strip(), "negative_prompt": negative.strip(), "seed": seed, "sampler": sampler}
    known, unknown = a1111.read(a1111.written(said | {"prompt_syntax": "a1111", "steps": 3, "width": 8, "height": 64}))
    wanted = {"prompt": prompt.strip(), "seed": seed, "steps": 3, "width": 8, "height": 64}
    assert wanted.items() <= known.items()
    assert known.get("negative_prompt", "") == negative.strip()
    assert not unknown


words = st.lists(st.sampled_from(["BREAK", "BREAKFAST", "a fox", " ", "\\", "(", ")", "[b]"]), max_size=9).map("".join)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("Uniform", "linspace"), ("DDIM", "leading"), ("Karras", "karras"), ("SGM Uniform", "sgm_uniform")],
)
def test_schedules_by_their_names(theirs, ours):
    text = a1111.written({"prompt": "a fox", "sampler": "euler", "schedule": ours})
    assert f"Schedule type: {theirs}" in text
    known, _ = a1111.read(text)
    assert checked("", {"schedule": known["schedule"]}) == {"schedule": ours}


@given(texts | words)
@settings(deadline=None, max_examples=80)
def test_brackets_and_breaks_that_are_characters_stay_characters(prompt):
    """In their syntax the text says what it says in ours."""
    text = a1111.written({"prompt": prompt, "prompt_syntax": "plain"}).partition("\n")[0]
    pieces = parse(text, "a1111")
    assert BREAK not in pieces
    assert all(weight == 1 for _, weight in pieces)
    assert TOKENIZER.encode("".join(words for words, _ in pieces)) == TOKENIZER.encode(prompt)


PARTS = [
    "BREAK",
    "BREAKFAST",
    "a red fox",
    " ",
    ",",
    "(a:1.2)",
    "(BREAK:0.5)",
    "(b BREAK c:1.2)",
    "(AK:1)",
    "BRE",
    "[d]",
    "\\",
]


@given(st.lists(st.sampled_from(PARTS), max_size=9).map("".join))
@settings(deadline=None, max_examples=200)
@example("a red fox BREAK a house")
@example("BRE(AK:1) BREAK BREAK")
def test_breaks_and_weights_stay(prompt):
    text = a1111.written({"prompt": prompt, "prompt_syntax": "weights"}).partition("\n")[0]

    def read(text, syntax):  # blanks beside BREAK are nothing
        return [(TOKENIZER.encode(words), weight) for words, weight in parse(text, syntax) if words.strip()]

    assert read(text, "a1111") == read(prompt, "weights")


def test_json_of_another_kind_in_a_jpeg(tmp_path):
    exif = Image.Exif()
    for content in ("[1, 2]", json.dumps({"steps": 3}), "[" * 10_000, "a fox"):
        exif[0x010E] = content
        picture().save(tmp_path / "a.jpg", exif=exif)
        with pytest.raises(ValueError, match="holds no parameters"):
            read_parameters(tmp_path / "a.jpg")
