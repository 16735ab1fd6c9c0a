"""LoRAs, learned words, ControlNets, autoencoders and indices that nobody thought of: added, or refused in one line.

Headers of any content over any bytes, pickles of anything, and whole files with a few bytes changed.
"""

import contextlib
import io
import json
import random
import struct
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from bench.reference.numbers import noise
from sd.checkpoints.errors import CheckpointError, naming
from sd.checkpoints.vae_files import open_vae
from sd.checkpoints.whole import open_model
from sd.inspection import inspect
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import registered
from tests.checkpoints.test_fuzzed_checkpoints import mutated, with_mutated_pickle
from tests.checkpoints.test_hostile_files import KINDS, LORA
from tests.generated import VALUES, some, tried
from tests.weights import shallow_pipeline

ADD = {name: kind.add for name, kind in KINDS.items()}
ADD["autoencoder"] = lambda pipe, path: open_vae(path, pipe.vae, pipe.config.vae.scale_factor)
ADD["model"] = lambda pipe, path: open_model(path)
ADD["inspect"] = lambda pipe, path: inspect(path)


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return shallow_pipeline()


def one_line(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 700


def ends_well(pipe: StableDiffusion, kind: str, path: Path) -> None:
    """Added, and taken out again; or an error of one line, and nothing has changed."""
    safe = registered()
    weights = pipe.unet.middle_block[0].in_layers[2].weight
    before, said = weights.clone(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with naming(path):
                ADD[kind](pipe, path)
            pipe.remove_loras()
            pipe.remove_embeddings()
            pipe.remove_controls()
        except CheckpointError as refused:
            one_line(str(refused))
    assert (pipe.loras.merged, pipe.words.words, pipe.controlnets.files) == ({}, {}, {})
    assert torch.equal(pipe.unet.middle_block[0].in_layers[2].weight, before)
    assert registered() == safe


NAMES = st.sampled_from(
    [
        *(f"{LORA}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "lora_mid.weight")),
        *(f"{LORA}.{end}" for end in ("hada_w1_a", "hada_w1_b", "lokr_w1", "lokr_w2", "diff", "x", "")),
        *("emb_params", "<toy>", "string_to_param", "clip_l", "control_model.input_blocks.0.0.weight", "difference"),
        *("encoder.down.0.block.0.conv1.weight", "decoder.1.weight", "__metadata__", "scaled_fp8", "a\x1b[2J"),
    ]
)
SHAPES = st.sampled_from([[], [0], [1], [1, 1], [4, 64], [64, 4], [1, 4, 1, 1], [1 << 62, 4], [-1], [1.5], "x", None])
OFFSETS = st.sampled_from([[0, 0], [0, 4], [4, 0], [0, 1 << 62], [-4, 0], [0.0, 4.0], [0], "x"])
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "X", 1]), "shape": SHAPES},
    optional={"data_offsets": OFFSETS, "more": VALUES},
)
HEADERS = st.dictionaries(NAMES | st.text(max_size=9), ENTRIES | VALUES, max_size=4)


@some(100, 1500)
def test_any_header(pipe, tmp_path, examples):
    def added(header: object, data: bytes, more: int, kind: str) -> None:
        text = json.dumps(header).encode()
        (tmp_path / "file").write_bytes(struct.pack("<q", max(0, len(text) + more)) + text + data)
        ends_well(pipe, kind, tmp_path / "file")

    lengths = st.sampled_from([0] * 9 + [-1, 1, 1 << 20, 1 << 40])
    tried(added, examples, HEADERS, st.binary(max_size=16), lengths, st.sampled_from(list(ADD)))


TENSORS = st.sampled_from(
    [
        *(torch.zeros(()), torch.ones(1), torch.ones(4, 64), torch.ones(64, 4), torch.ones(2, 2, 1, 1), torch.zeros(0)),
        *(torch.ones(2, 64), torch.full((2, 64), torch.nan), torch.ones(2, dtype=torch.int64)),
        torch.ones(1).to("meta"),
    ]
)
CONTENTS = st.recursive(
    TENSORS | st.none() | st.integers() | st.text(max_size=9),
    lambda inner: st.dictionaries(NAMES | st.text(max_size=9), inner, max_size=4) | st.lists(inner, max_size=2),
    max_leaves=8,
)


@some(100, 1500)
def test_any_pickle(pipe, tmp_path, examples):
    def added(content: object, zipped: bool, kind: str) -> None:
        torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=zipped)
        ends_well(pipe, kind, tmp_path / "file")

    tried(added, examples, CONTENTS, st.booleans(), st.sampled_from(list(ADD)))


@some(100, 1500)
def test_whole_files_with_a_few_bytes_changed(pipe, tmp_path, examples):
    whole = {name: KINDS[name].tensors() for name in ("LoRA", "word")}
    whole["LoRA"][f"{LORA}.alpha"] = noise(1)[0]

    def added(kind: str, form: str, seed: int) -> None:
        rng, file = random.Random(seed), io.BytesIO()
        if form == "safetensors":
            data = save(whole[kind], {"ss_tag_frequency": "{}", "modelspec.title": "x"})
            data = mutated(data, rng, 8 + int.from_bytes(data[:8], "little"))
        else:
            torch.save(whole[kind], file, _use_new_zipfile_serialization=form == "zip")
            data = file.getvalue()
            data = with_mutated_pickle(data, rng) if form == "zip" else mutated(data, rng, 2000)
        (tmp_path / "file").write_bytes(data)
        ends_well(pipe, kind, tmp_path / "file")
        ends_well(pipe, "inspect", tmp_path / "file")

    forms = st.sampled_from(["safetensors", "zip", "legacy"])
    tried(added, examples, st.sampled_from(list(whole)), forms, st.integers(0, 10**9))


@some(100, 1000)
def test_any_index(pipe, tmp_path, examples):
    (tmp_path / "part.safetensors").write_bytes(save(KINDS["word"].tensors()))
    files = st.sampled_from(["part.safetensors", "absent", "..", ".", "/dev/zero", "a/b", "", "\0", "file"]) | VALUES
    maps = st.dictionaries(NAMES, files, max_size=4) | VALUES
    indices = st.fixed_dictionaries({}, optional={"weight_map": maps, "metadata": VALUES, "x": VALUES}) | VALUES

    def added(index: object, kind: str) -> None:
        (tmp_path / "file").write_text(json.dumps(index))
        ends_well(pipe, kind, tmp_path / "file")

    tried(added, examples, indices, st.sampled_from(list(ADD)))
