"""Files that claim or hold far more than any model or picture, or have no end: refused before they are read."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from sd.checkpoints import files
from sd.inference import main
from sd.pictures import prompts_file

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_checkpoint) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_CKPT", str(tiny_checkpoint))
    return tmp_path


@pytest.fixture
def error_of(capfd):
    def call(*arguments: str) -> str:
        capfd.readouterr()
        assert main(list(arguments)) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return call


# ---- files of weights


def header(path: str, content: bytes, size: int | None = None) -> None:
    """A safetensors file with this header, which may claim another size; what is not written takes no disk."""
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(content) if size is None else size) + content)
        file.truncate(8 + max(len(content), size or 0))


def index(path: str, weight_map: dict[str, str], size: int = 0) -> None:
    Path(path).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.truncate(path, max(size, Path(path).stat().st_size))


def tensors(count: int) -> bytes:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({f"t{i}": entry for i in range(count)}).encode()


MANY = "the index lists more than"
WEIGHTS = {
    "a header of 33 MB": (lambda: header("x", b'{"a":', 33 * MB), "its header of 33 MB is no model's"),
    "20,001 tensors": (lambda: header("x", tensors(files.MOST_TENSORS + 1)), "it lists 20001 tensors"),
    "an index of 20 GB": (lambda: index("x", {}, 20 << 30), "x is over 8 MB, which no model's is"),
    "20,001 names": (
        lambda: index("x", {f"t{i}": "f.safetensors" for i in range(20_001)}),
        MANY,
    ),
    "1,001 files": (
        lambda: index("x", {f"t{i}": f"{i}.safetensors" for i in range(1001)}),
        MANY,
    ),
}


@pytest.mark.parametrize(
    ("option", "kind"),
    [(option, kind) for option in ("--ckpt", "--lora", "--vae", "--inspect") for kind in WEIGHTS]
    + [("--embedding", kind) for kind in list(WEIGHTS)[:2]],  # which no index names
)
def test_weights(error_of, option, kind):
    make, message = WEIGHTS[kind]
    make()
    assert message in error_of(*([] if option == "--inspect" else ["--prompt", "x", "--steps", "1"]), option, "x")


def test_as_many_as_are_read(capfd):
    """The other side of the limit."""
    header("x", tensors(files.MOST_TENSORS))
    assert main(["--inspect", "x"]) == 0


def test_quantized_weights(error_of):
    header("x", b'{"a":', 33 * MB)
    assert "its header of 33 MB" in error_of("--prompt", "x", "--load-quantized", "x", "--device", "cpu")


# ---- pictures


def chunk(kind: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """One that may claim another length."""
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data) if length is None else length) + kind + data + crc


def png(*chunks: bytes) -> str:
    lines = zlib.compress(bytes(25) * 8)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    body = b"".join((head, *chunks, chunk(b"IDAT", lines), chunk(b"IEND")))
    Path("x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return "x.png"


BOMB = zlib.compress(bytes(64 * MB), 9)
PICTURES = {
    "a text of 95 MB": (lambda: png(chunk(b"tEXt", b"prompt\0x", 95 * MB)), "a chunk of 95 MB beside its pixels"),
    "2,001 texts": (lambda: png(*[chunk(b"tEXt", b"a\0b")] * 2001), "over 2000 chunks"),
    "70 MB of texts": (lambda: png(*[chunk(b"tEXt", bytes(15 * MB))] * 5), "with 75 MB beside its pixels"),
    "a text that unpacks to 64 MB": (
        lambda: png(chunk(b"zTXt", b"parameters\0\0" + BOMB)),
        "Decompressed data too large",
    ),
    "the same in iTXt": (lambda: png(chunk(b"iTXt", b"prompt\0\1\0\0\0" + BOMB)), "Decompressed data too large"),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("option", ["--from-png", "--init-image", "--mask"])
def test_pictures(error_of, kind, option):
    make, message = PICTURES[kind]
    make()
    beside = {"--from-png": [], "--init-image": ["--prompt", "x"], "--mask": ["--prompt", "x", "--init-image", "x.png"]}
    line = error_of(*beside[option], option, "x.png")
    assert message in line
    assert "x.png" in line


def test_a_picture_of_a_large_batch(error_of):
    said = {"prompt": "x", "steps": 1, "batch": [1023, 1024], "height": 512, "width": 512}
    png(*(chunk(b"iTXt", name.encode() + bytes(5) + json.dumps(value).encode()) for name, value in said.items()))
    assert "at once takes about" in error_of("--from-png", "x.png", "--device", "cpu")


# ---- prompts


def test_prompts_that_are_too_long(error_of, monkeypatch):
    monkeypatch.setattr(prompts_file, "LARGEST", MB)
    Path("p.txt").write_bytes(b"x " * MB)
    assert "p.txt is over 1 MB" in error_of("--prompts-file", "p.txt")
    assert "/dev/zero is over 1 MB" in error_of("--prompts-file", "/dev/zero")
    monkeypatch.undo()
    assert "prompt must be at most 1000000 characters" in error_of("--prompt", "x" * 1_000_001)


def test_millions_of_pictures_are_not_listed(error_of):
    """50 lines of a million pictures each: what is wrong with them is found all the same."""
    Path("p.jsonl").write_text('{"prompt": "x", "num_images": 1000000}\n' * 50 + '{"prompt": "x", "steps": 0}\n')
    assert "p.jsonl line 51: steps must be from 1" in error_of("--prompts-file", "p.jsonl")


# ---- what has no end

PIPES = """
import json, sys
from sd.inference import main
print(json.dumps([main(line) for line in json.loads(sys.argv[1])]))
"""


def test_pipes_and_devices(folder):
    """In a process of its own: where one is waited for, this ends after a while."""
    os.mkfifo("fifo")
    lines = [["--prompts-file", "fifo"]]
    for file in ("fifo", "/dev/zero"):
        lines += [["--from-png", file], ["--inspect", file]]
        named = ("--ckpt", "--vae", "--lora", "--embedding", "--init-image", "--load-quantized", "--control")
        lines += [["--prompt", "x", option, f"{file}:{file}" if option == "--control" else file] for option in named]
        lines += [["--prompt", "x", "--preview", "1", "--preview-decoder", file]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PIPES, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == [2] * len(lines), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == len(lines)
    assert "Traceback" not in done.stderr
    assert not any("Errno" in line for line in errors), errors


def test_prompts_out_of_a_process_stay(folder):
    """`<(...)` is a pipe, too, of which somebody holds the other end."""
    program = ROOT / "sd" / "inference.py"
    line = f'{sys.executable} {program} --prompts-file <(echo "a fox") --steps 1 --out a.png'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("a*.png"))) == 1
