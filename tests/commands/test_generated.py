"""Any command line, prompts file and picture: pictures, or one line and exit code 2. No model is loaded."""

import contextlib
import io
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import strategies as st

from sd import inference
from sd.pictures import a1111
from sd.pictures.model import ModelChoice
from sd.pictures.parameters import PARAMETERS, UserError, flags
from tests.generated import NUMBERS, TEXTS, VALUES, likely, some, tried


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_checkpoint) -> Path:
    """Where a model would be loaded, this ends: what is wrong with the rest is known before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(tiny_checkpoint))

    def load(choice: ModelChoice, checkpoint: Path) -> None:
        raise UserError("would be drawn")

    monkeypatch.setattr(ModelChoice, "load", load)
    return tmp_path


def ends_in_a_line(*arguments: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = inference.main(list(arguments))
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) in ((0, 0), (2, 1)), (arguments, err.getvalue())
    assert "Traceback" not in err.getvalue()
    assert all(c.isprintable() or c == "\n" for c in err.getvalue()), "no terminal codes"
    assert len(lines[0] if lines else "") < 3000, "not told back at length"


# ---- the command line


OPTIONS = [option for option in vars(inference._parser())["_option_string_actions"] if option not in ("-h", "--help")]
LINES = {"--list-opts", "--list-samplers", "--version"}  # which print and leave
WORDS = (
    TEXTS | NUMBERS.map(str) | st.sampled_from(["", "-", "--", "nan", "../..", "/dev/null", "x:y:z", "a.png", "\udcff"])
)


@st.composite
def command_lines(draw) -> list[str]:
    line = ["--prompt", draw(TEXTS)] if draw(st.booleans()) else []
    for option in draw(
        st.lists(st.sampled_from([o for o in OPTIONS if o not in LINES]) | st.text(max_size=9), max_size=5)
    ):
        name = option.removeprefix("--").replace("-", "_")
        values = st.one_of(likely(name).map(str), WORDS) if name in PARAMETERS else WORDS
        line += [option, draw(values)] if draw(st.integers(0, 5)) else [option]
    return line


@some(150, 3000)
def test_any_command_line(examples):
    tried(lambda line: ends_in_a_line(*line) if line else None, examples, command_lines())


# ---- prompts files


@st.composite
def entries(draw) -> str:
    names = draw(st.lists(st.sampled_from([*PARAMETERS]) | st.text(max_size=6), max_size=5, unique=True))
    found = {name: draw(VALUES if name not in PARAMETERS else likely(name) | VALUES) for name in names}
    found = {"prompt": draw(TEXTS), **found} if draw(st.integers(0, 9)) else found
    return json.dumps(found, ensure_ascii=draw(st.booleans()))


FILES = st.one_of(
    st.lists(entries() | TEXTS, max_size=4).map("\n".join),
    st.lists(entries(), max_size=3).map(lambda found: f"[{', '.join(found)}]"),
    st.text(max_size=80),
)


@some(150, 4000)
def test_any_prompts_file(folder, examples):
    def read(text: str, ending: str, cut: int) -> None:
        file = folder / f"p{ending}"
        file.write_bytes(text.encode("utf-8", "surrogatepass")[: cut or None])
        ends_in_a_line("--prompts-file", str(file), "--out", "{index}.png")

    tried(read, examples, FILES, st.sampled_from([".txt", ".jsonl", ".json"]), st.sampled_from([0, 0, 0, 5, 40]))


# ---- pictures to draw again

RECORDED = (
    "checkpoint",
    "checkpoint_hash",
    "loras",
    "embeddings",
    "vae",
    "quantized",
    "ema",
    "batch",
    "device",
    "dtype",
)
RECORDED += ("opt", "control_hash", "init_image_hash", "mask_hash", "prediction", "parameters", "prompt_loras", "model")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@st.composite
def chunks(draw) -> bytes:
    """Text of a parameter, or of something else, as any of PNG's three kinds of texts."""
    name = draw(st.sampled_from([*PARAMETERS, *RECORDED]) | st.text(st.characters(max_codepoint=255), max_size=9))
    value = draw(likely(name) | VALUES if name in PARAMETERS else VALUES)
    text = json.dumps(value) if draw(st.integers(0, 4)) else draw(TEXTS)
    key, data = name.encode("latin-1", "replace")[:79], text.encode("utf-8", "replace")
    match draw(st.integers(0, 3)):
        case 0:
            return chunk(b"tEXt", key + b"\0" + data)
        case 1:
            return chunk(b"zTXt", key + b"\0\0" + zlib.compress(data))
        case 2:
            return chunk(b"iTXt", key + b"\0\1\0\0\0" + zlib.compress(data))
        case _:
            return chunk(b"iTXt", key + bytes(5) + data)


PROMPT = chunk(b"iTXt", b"prompt" + bytes(5) + b'"a fox"')


@some(150, 4000)
def test_any_picture(folder, examples):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(bytes(25) * 8)) + chunk(b"IEND", b"")

    def recall(texts: list[bytes], places: list[tuple[int, int]]) -> None:
        data = bytearray(head + PROMPT + b"".join(texts) + tail)
        for place, byte in places:
            data[place % len(data)] = byte
        (folder / "p.png").write_bytes(data)
        ends_in_a_line("--from-png", "p.png", "--out", "o.png")

    changes = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=2)
    tried(recall, examples, st.lists(chunks(), max_size=5), st.one_of(st.just([]), changes))


LABELS = (
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Model hash",
    "Denoising strength",
    "Clip skip",
)
LABELS += ("Hires upscale", "ENSD", "Lora hashes", "TI hashes", "Version", "Eta", "Mask blur", "\x1b[2J")


@st.composite
def foreign(draw) -> str:
    """As AUTOMATIC1111's web UI writes it, more or less."""
    labels = draw(st.lists(st.sampled_from(LABELS), max_size=8))
    likely_values = st.sampled_from(["20", "Euler a", "DPM++ 2M Karras", "512x512", "7.5", '"a: b, c: d"', '"'])
    fields = [f"{label}: {draw(likely_values | TEXTS | NUMBERS.map(str))}" for label in labels]
    negative = f"\nNegative prompt: {draw(TEXTS)}" if draw(st.booleans()) else ""
    return f"{draw(TEXTS)}{negative}\nSteps: {draw(NUMBERS)}, {', '.join(fields)}"


@some(150, 4000)
def test_any_text_of_another_program(folder, examples):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    tail = chunk(b"IDAT", zlib.compress(bytes(25) * 8)) + chunk(b"IEND", b"")

    def recall(text: str) -> None:
        with contextlib.suppress(ValueError):
            a1111.read(text)
        data = b"parameters" + bytes(5) + text.encode("utf-8", "replace")
        (folder / "p.png").write_bytes(head + chunk(b"iTXt", data) + tail)
        ends_in_a_line("--from-png", "p.png", "--out", "o.png")

    tried(recall, examples, foreign())


def test_every_parameter_is_reached():
    assert {one.option for one in flags()} <= {*OPTIONS}
    assert os.environ["SD_CKPT"]
