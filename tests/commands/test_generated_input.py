"""Command lines, prompts files and pictures that nobody thought of: each is a run that begins, or one line and exit 2.

All of the command but the drawing: as soon as the model would be read, a run counts as begun.
"""

import contextlib
import io
import json
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from PIL import Image

from sd import inference
from sd.pictures.formats import encoded
from sd.pictures.model import ModelChoice
from sd.pictures.parameters import PARAMETERS
from sd.pictures.png import to_png
from tests.generated import NUMBERS, TEXTS, VALUES, likely, some, tried

SOURCE = "source.png"


class BegunError(BaseException):
    """Nothing is to catch it."""


def _begin(*_: object) -> None:
    raise BegunError


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory, tiny_checkpoint) -> Path:
    """One for all inputs, which write nothing."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.effect_noise((64, 64), 50).save(folder / SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SD_CKPT", str(tiny_checkpoint))
        patch.setattr(ModelChoice, "load", _begin)
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
        yield folder


def ends_well(*line: str) -> None:
    """A run that begins, an answer, or 2 with one line that a terminal does not obey."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            code = inference.main(list(line))
        except BegunError:
            return
        except SystemExit as leaving:  # --help
            code = leaving.code
    lines = errors.getvalue().splitlines()
    assert code in (0, 2), lines
    assert code == 0 or (lines[-1].startswith("error: ") and len(lines[-1]) < 2000), lines
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:] or code == 0
    assert all(line.isprintable() for line in lines), lines


# ---- the command line

OPTIONS = ["--" + name.replace("_", "-") for name, one in PARAMETERS.items() if one.flag] + ["--prompt", "-n", "-s"]
OTHERS = [
    *("--prompts-file", "--from-png", "--ckpt", "--device", "--dtype", "--opt", "--attention", "--lora", "--lora-dir"),
    *("--embedding", "--vae", "--prediction", "--ema", "--load-quantized", "--save-quantized", "--explain", "--fast"),
    *("--batch-size", "--out", "--overwrite", "--preview", "--preview-file", "--preview-decoder", "--save-steps"),
    *("--show", "--list-opts", "--list-samplers", "--version", "--x", "-z", "--"),
]
WORDS = st.one_of(
    TEXTS,
    NUMBERS.map(str),
    st.sampled_from(
        [
            *(
                "cpu",
                "cuda:99",
                "meta",
                "float16",
                "int8",
                "default",
                "deepcache=0",
                "deepcache=3,compile",
                "exact",
                "eps",
            ),
            *(SOURCE, ".", "/", "/dev/null", "absent.png", "a.png", "{seed}.png", "{x}.png", "{", "-", "a/b.webp", "~"),
            *(f"{SOURCE}:0.5", f"{SOURCE}:", ":", "canny", "karras", "euler_a", "-1", "1e9", "nan", "0,0,0,0", ""),
        ]
    ),
)


def _typed(text: str) -> bool:
    """What a shell can pass: no zero byte; half a character comes as Python decodes a byte that is no UTF-8."""
    return "\0" not in text


@st.composite
def command_lines(draw) -> list[str]:
    line = ["--prompt", draw(TEXTS.filter(_typed))] if draw(st.integers(0, 9)) else []
    for option in draw(st.lists(st.sampled_from([*OPTIONS, *OPTIONS, *OTHERS]), max_size=4)):
        name = option.removeprefix("--").replace("-", "_")
        value = likely(name, SOURCE).map(str) | WORDS if name in PARAMETERS else WORDS
        line += [option] if not draw(st.integers(0, 9)) else [option, draw(value.filter(_typed))]
    return line


@some(100, 1500)
def test_command_lines(examples):
    tried(lambda line: ends_well(*line), examples, command_lines().filter(bool))


# ---- prompts files


@st.composite
def entries(draw) -> object:
    names = draw(st.lists(st.sampled_from([*PARAMETERS]) | st.text(max_size=20), max_size=5, unique=True))
    found = {name: draw(likely(name, SOURCE) | VALUES if name in PARAMETERS else VALUES) for name in names}
    return draw(st.sampled_from([{"prompt": "x", **found}] * 8 + [found, [found]])) if found else draw(VALUES)


@st.composite
def prompts_files(draw) -> bytes:
    """Lines of JSON, an array of them, text; some cut, some with other bytes in them."""
    items = draw(st.lists(entries(), max_size=3))
    text = json.dumps(items) if draw(st.booleans()) else "\n".join(map(json.dumps, items))
    data = (text if draw(st.integers(0, 4)) else draw(TEXTS)).encode("utf-8", "surrogatepass")
    if not draw(st.integers(0, 4)):
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=4)) + data[place + draw(st.integers(0, 9)) :]
    return data


@some(100, 1500)
def test_prompts_files(folder, examples):
    def drawn(data: bytes, name: str) -> None:
        (folder / name).write_bytes(data)
        ends_well("--prompts-file", name)

    tried(drawn, examples, prompts_files(), st.sampled_from(["p.jsonl", "p.json", "p.txt"]))


# ---- pictures

FACTS = [
    "model",
    "checkpoint",
    "checkpoint_hash",
    "ema",
    "prediction",
    "loras",
    "embeddings",
    "vae",
    "quantized",
    "opt",
]
FACTS += ["dtype", "device", "torch", "batch", "init_image_hash", "mask_hash", "control_hash", "parameters", "\x1b[2J"]
FILES = st.lists(st.lists(st.sampled_from([SOURCE, "x", "", "\0", "/", 1.0, None, "a" * 300]), max_size=4), max_size=3)


@st.composite
def records(draw) -> dict[str, object]:
    """What a picture may say of itself."""
    found = draw(entries().filter(lambda one: isinstance(one, dict)))
    for name in draw(st.lists(st.sampled_from(FACTS), max_size=4, unique=True)):
        found[name] = draw(FILES | VALUES | st.sampled_from([[0, 1], [3, 2], [0, 10**9], "cpu", "float16", "none"]))
    return {name: value for name, value in found.items() if 0 < len(name.encode("utf-8", "replace")) < 80}


@some(100, 1500)
def test_what_pictures_say_of_themselves(folder, examples):
    image = Image.new("RGB", (8, 8))

    def drawn(record: dict[str, object], ending: str) -> None:
        try:
            data = encoded(image, ending, record)
        except (ValueError, TypeError, UnicodeError, AttributeError):  # what this program would not write either
            return
        (folder / f"p{ending}").write_bytes(data)
        ends_well("--from-png", f"p{ending}", "--device", "cpu")

    tried(drawn, examples, records(), st.sampled_from([".png", ".png", ".jpg", ".webp"]))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@st.composite
def chunks(draw) -> bytes:
    """A PNG with chunks of any kind and content before its pixels, their check sums right."""
    kinds = st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"IHDR", b"IDAT", b"IEND", b"acTL", b"iCCP", b"tRNS"])
    key = st.sampled_from([b"prompt", b"steps", b"parameters", b"loras", b"batch", b""])
    value = (
        st.binary(max_size=40)
        | VALUES.map(lambda v: json.dumps(v).encode())
        | TEXTS.map(lambda text: zlib.compress(text.encode("utf-8", "replace")))
    )
    marks = st.sampled_from([b"\0", b"\0\0", b"\0\0\0\0\0", b"\0\1\0\0\0", b""])
    data = to_png(Image.new("RGB", (8, 8)), {"prompt": "x"} if draw(st.booleans()) else {})
    for _ in range(draw(st.integers(1, 3))):
        data = data[:33] + chunk(draw(kinds), draw(key) + draw(marks) + draw(value)) + data[33:]
    for place, byte in draw(st.lists(st.tuples(st.integers(8, len(data) - 1), st.integers(0, 255)), max_size=1)):
        data = data[:place] + bytes([byte]) + data[place + 1 :]
    return data


@some(100, 1500)
def test_any_chunks(folder, examples):
    def drawn(data: bytes) -> None:
        (folder / "p.png").write_bytes(data)
        ends_well("--from-png", "p.png")
        ends_well("--prompt", "x", "--init-image", "p.png", "--mask", "p.png")

    tried(drawn, examples, chunks())


# ---- what AUTOMATIC1111's web UI writes

NAMES = ["Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "Eta", "Hires upscale", "Model"]
NAMES += ["Denoising strength", "Lora hashes", "Negative prompt", "Version", "Mask blur", "\x1b[2J"]
THEIRS = st.one_of(
    *(NUMBERS.map(str), TEXTS, st.sampled_from(["512x768", "0x0", "9" * 5000 + "x1", "DPM++ 2M", "Euler a", "Karras"])),
    st.sampled_from(['"a, b: c"', '"', "²", "١٢", "9" * 5000, "1_0", "Infinity", "0x10"]),
)


@some(100, 1500)
def test_what_other_programs_say(folder, examples):
    from PIL.PngImagePlugin import PngInfo

    def drawn(prompt: str, negative: str, said: list[tuple[str, str]]) -> None:
        text = f"{prompt}\nNegative prompt: {negative}\nSteps: 20, " + ", ".join(f"{n}: {v}" for n, v in said)
        info = PngInfo()
        info.add_itxt("parameters", text.encode("utf-8", "replace").decode())
        Image.new("RGB", (8, 8)).save(folder / "theirs.png", pnginfo=info)
        ends_well("--from-png", "theirs.png")

    tried(drawn, examples, TEXTS, TEXTS, st.lists(st.tuples(st.sampled_from(NAMES), THEIRS), max_size=6))
