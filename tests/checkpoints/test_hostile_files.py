"""Files that are no LoRA, learned word or ControlNet, or damaged ones, or ones that would run something: each is one
line that names the file, nothing runs, and the pipeline is as it was."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bench.reference.numbers import noise
from bench.reference.weights import random_controlnet
from sd import inference
from sd.checkpoints.errors import CheckpointError
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import registered
from tests.checkpoints.test_checkpoint_files import NOT_WEIGHTS
from tests.checkpoints.test_pickles import Payload, payloads
from tests.weights import SHALLOW, shallow_pipeline

LORA = "lora_unet_middle_block_0_in_layers_2"


@dataclass(frozen=True)
class Kind:
    """tensors(): of a file that opens. option: of the command, for a file."""

    tensors: Callable[[], dict[str, Tensor]]
    add: Callable[[StableDiffusion, Path], object]
    option: Callable[[Path], list[str]]


def _lora() -> dict[str, Tensor]:
    width = 2 * SHALLOW.unet.model_channels
    return {f"{LORA}.lora_down.weight": noise(4, width, 3, 3), f"{LORA}.lora_up.weight": noise(width, 4, 1, 1)}


def _control() -> dict[str, Tensor]:
    return {f"control_model.{name}": tensor for name, tensor in random_controlnet(SHALLOW).state_dict().items()}


KINDS = {
    "LoRA": Kind(_lora, StableDiffusion.add_lora, lambda path: ["--lora", f"{path}"]),
    "word": Kind(
        lambda: {"<toy>": noise(2, SHALLOW.text.width)},
        lambda pipe, path: pipe.add_embedding(path, "<toy>"),
        lambda path: ["--embedding", f"{path}"],
    ),
    "ControlNet": Kind(
        _control, StableDiffusion.add_control, lambda path: ["--control", f"{path}:{path.parent / 'hint.png'}"]
    ),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    """Nothing that is refused changes it, so that one serves them all."""
    return shallow_pipeline()


@pytest.fixture
def refused(pipe, capfd):
    """refused(kind, path) -> the error's text."""

    def refused(kind: Kind, path: Path) -> str:
        before = registered()
        with pytest.raises(CheckpointError) as caught:
            kind.add(pipe, path)
        message = str(caught.value)
        assert message.startswith(str(path))
        assert message.isprintable()
        assert len(message) < 700
        assert registered() == before
        assert (pipe.loras.merged, pipe.words.words, pipe.controlnets.files) == ({}, {}, {})
        assert capfd.readouterr() == ("", "")
        return message

    return refused


@each_kind
@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "pickle"])
def test_what_all_these_are_made_from_opens(kind, tmp_path, write):
    write(kind.tensors(), path := tmp_path / "good")
    kind.add(pipe := shallow_pipeline(), path)
    assert pipe.loras.merged or pipe.words.words or pipe.controlnets.files


@each_kind
@pytest.mark.parametrize("content", NOT_WEIGHTS, ids=range(len(NOT_WEIGHTS)))
def test_what_is_no_file_of_weights(kind, refused, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    message = refused(kind, tmp_path / "file")
    split = content.startswith(b"{")  # which a learned word never is
    holds_nothing = content.endswith(b"{}") and not split
    assert NOT_WEIGHTS[content] in message or holds_nothing or (split and kind is KINDS["word"])


@each_kind
def test_paths_that_are_not_files(kind, refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in ((tmp_path / "absent", "no such file"), (tmp_path, "a folder")):
        assert words in refused(kind, path)
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        assert "not a regular file" in refused(kind, path)


@each_kind
@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen"])
@pytest.mark.parametrize("form", ["zip", "legacy", "raw 0", "raw 2", "raw 4"])
def test_a_payload_is_refused_by_name(kind, refused, tmp_path, name, form):
    payload = payloads(marker := tmp_path / "executed")[name]
    path = tmp_path / "file"
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps(payload, protocol=int(form[-1])))
    else:
        torch.save({**kind.tensors(), "extra": payload}, path, _use_new_zipfile_serialization=form == "zip")
    assert f"refuses to run {name}" in refused(kind, path)
    assert not marker.exists()


def last(tensors: dict[str, Tensor], change: Callable[[Tensor], object]) -> dict[str, object]:
    name = list(tensors)[-1]
    return {**tensors, name: change(tensors[name])}


STRANGE: dict[str, Callable[[Tensor], object]] = {
    "complex": lambda t: t.to(torch.complex64),
    "integer": lambda t: t.to(torch.int64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "more than the file holds": lambda t: t.flatten()[:1].expand(1 << 40).unflatten(0, (1 << 20, 1 << 20)),
    "rows that are not there": lambda t: t[:1].expand(1 << 40, *t.shape[1:]),
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "infinite": lambda t: torch.full_like(t, torch.inf),
    "empty": lambda t: t[:0],
    "no axes": lambda t: t.sum(),
    "more axes": lambda t: t[None, None],
    "text": lambda t: "a",
    "a list": lambda t: [1.0],
    "nothing": lambda t: None,
    "a call": lambda t: Payload(print, "it ran"),
}


@each_kind
@pytest.mark.parametrize("change", STRANGE.values(), ids=STRANGE)
@pytest.mark.filterwarnings("ignore")
def test_strange_tensors(kind, refused, tmp_path, change):
    torch.save(last(kind.tensors(), change), tmp_path / "file")
    refused(kind, tmp_path / "file")


LAYER = [torch.zeros(()), torch.zeros(1), torch.zeros(2, 2), torch.zeros(1, 1, 1, 1, 1, 1), torch.zeros(0)]


@pytest.mark.parametrize(
    "names",
    [
        ["lora_up.weight", "lora_down.weight"],
        ["lora_up.weight", "lora_mid.weight", "lora_down.weight"],
        ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"],
        ["lokr_w1", "lokr_w2"],
        ["lokr_w1", "lokr_t2", "lokr_w2_a", "lokr_w2_b"],
        ["diff"],
    ],
    ids=", ".join,
)
def test_layers_of_strange_shapes(refused, tmp_path, names):
    """Each tensor of a layer, and its alpha and magnitude, in turn of a shape that means nothing."""
    for strange in range(len(LAYER)):
        for i in range(len(names)):
            shapes = {f"{LORA}.{name}": LAYER[(strange + (i == j)) % len(LAYER)] for j, name in enumerate(names)}
            torch.save(shapes, tmp_path / "file")
            refused(KINDS["LoRA"], tmp_path / "file")
    for name in ("alpha", "dora_scale"):
        for value in (torch.zeros(2), torch.zeros(0), torch.tensor(torch.inf), torch.zeros(3, 3)):
            torch.save({**_lora(), f"{LORA}.{name}": value}, tmp_path / "file")
            refused(KINDS["LoRA"], tmp_path / "file")


def headed(header: object, rest: bytes = b"") -> bytes:
    """A .safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def entry(begin: int, end: int, shape: tuple[int, ...] = (1,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "longer than the file": struct.pack("<Q", 500) + b"{}",
    "no JSON": headed(b"{nothing"),
    "a list": headed([1, 2]),
    "deep": headed(b'{"a":' * 20_000),
    "beyond the end": headed({"a": entry(0, 4000)}, b"1234"),
    "before its beginning": headed({"a": entry(8, 4)}, b"12345678"),
    "another size": headed({"a": entry(0, 4, (3,))}, b"1234"),
    "a huge shape": headed({"a": entry(0, 4, (1 << 62, 1 << 62))}, b"1234"),
    "overlapping": headed({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
    "a hole": headed({"a": entry(4, 8)}, b"12345678"),
    "no such type": headed({"a": entry(0, 4, dtype="Q7")}, b"1234"),
    "a name with a terminal's codes": headed({"a\x1b[2J\nb": entry(0, 4)}, b"1234"),
    "a long name": headed({"a" * 100_000: entry(0, 4)}, b"1234"),
    "metadata of numbers": headed({"__metadata__": {"a": 1}, "a": entry(0, 4)}, b"1234"),
}


@each_kind
@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie(kind, refused, tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    refused(kind, tmp_path / "file")


@each_kind
@pytest.mark.parametrize("write", [save_file, torch.save], ids=["safetensors", "pickle"])
def test_files_that_are_cut_off(kind, refused, tmp_path, write):
    write(kind.tensors(), path := tmp_path / "file")
    whole = path.read_bytes()
    for length in (1, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(kind, path)


@each_kind
def test_random_bytes(kind, refused, tmp_path):
    for seed in range(20):
        (tmp_path / "file").write_bytes(random.Random(seed).randbytes(4096))
        refused(kind, tmp_path / "file")


@each_kind
@pytest.mark.parametrize("content", ["a payload", "a web page", "nothing"])
def test_the_command_says_it_in_one_line(kind, tmp_path, shallow_checkpoint, capfd, content):
    marker, path = tmp_path / "executed", tmp_path / "file.pt"
    path.write_bytes({"a web page": b"<!DOCTYPE html>", "nothing": b""}.get(content, b""))
    if content == "a payload":
        torch.save({**kind.tensors(), "extra": payloads(marker)["posix.system"]}, path)
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "hint.png")
    line = ["--prompt", "a", "--ckpt", str(shallow_checkpoint), "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert inference.main([*line, *kind.option(path)]) == 2
    out, err = capfd.readouterr()
    assert str(path) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == ""
    assert not marker.exists()
    assert not (tmp_path / "a.png").exists()
