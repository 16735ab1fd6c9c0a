"""Right files with wrong tensors, and diffusers' folders of any settings: opened, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from sd import model_loader
from sd.checkpoints.errors import CheckpointError
from sd.inspection import inspect
from sd.pipeline import StableDiffusion
from tests.checkpoints.test_folders import SD1, write
from tests.checkpoints.test_hostile_files import KINDS
from tests.generated import VALUES, some, tried
from tests.weights import shallow_pipeline


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return shallow_pipeline()


def one_line(call) -> None:
    """A CheckpointError of one printable line, or ValueError for a word or name that is taken, or nothing."""
    said = "nothing"
    try:
        call()
    except ValueError as error:
        said = str(error)
    assert said.isprintable()
    assert 0 < len(said) < 1000


@pytest.fixture
def anything(pipe, tmp_path):
    """Each way in which a file of weights is opened; what a file changed is taken back."""

    def call(path: Path) -> None:
        one_line(lambda: inspect(path))
        one_line(lambda: model_loader.load(path))
        for kind in KINDS.values():
            one_line(lambda kind=kind: kind.add(pipe, path))
        pipe.remove_loras()
        pipe.remove_embeddings()
        pipe.remove_controls()

    return call


# ---- tensors

NAMES = st.sampled_from(
    [
        "model.diffusion_model.out.2.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.ids",
        "first_stage_model.decoder.conv_in.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q.lora_up.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q.alpha",
        "control_model.input_hint_block.0.weight",
        "emb_params",
        "<toy>",
        "unet:0:up",
        "v_pred",
        "scaled_fp8",
    ]
) | st.text(max_size=12)
METADATA = st.dictionaries(
    st.sampled_from(["config", "format", "modelspec.prediction_type", "modelspec.architecture", "ss_tag_frequency"])
    | st.text(max_size=8),
    st.text(max_size=30) | VALUES.map(json.dumps) | VALUES,
    max_size=4,
)


@some(40, 1000)
def test_a_right_file_with_wrong_tensors(anything, tmp_path, pipe, examples):
    """A LoRA, a word or a ControlNet of which a few tensors have other names, shapes, types or numbers."""
    right = [kind.tensors() for kind in KINDS.values()]
    dtypes = st.sampled_from(
        [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
    )
    shapes = st.lists(st.integers(0, 6), max_size=5)

    def opened(which: int, changes: list, metadata: dict) -> None:
        tensors = dict(right[which])
        for place, name, shape, dtype, number in changes:
            old = sorted(tensors)[place % len(tensors)]
            tensors.pop(old)
            tensors[name or old] = torch.full(shape, number).to(dtype)
        said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        save_file(tensors, tmp_path / "a.safetensors", metadata={k: v for k, v in said.items() if k.isprintable()})
        anything(tmp_path / "a.safetensors")

    numbers = st.sampled_from([0.0, 1.0, 1e30, float("nan"), float("inf")])
    change = st.tuples(st.integers(0, 900), st.just("") | NAMES.filter(str.isprintable), shapes, dtypes, numbers)
    tried(opened, examples, st.integers(0, 2), st.lists(change, min_size=1, max_size=3), METADATA)


# ---- diffusers' folders


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("generated") / "model"
    write(path, SD1)
    return path


SETTINGS = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json")
SETTINGS += ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json")


@some(12, 200)
def test_any_settings_of_a_folder(model, tmp_path, examples):
    copy = shutil.copytree(model, tmp_path / "copy")
    texts = {name: (copy / name).read_text() for name in SETTINGS if (copy / name).exists()}
    keys = {name: [*json.loads(text)] for name, text in texts.items()}

    def opened(name: str, place: int, value: object, how: int) -> None:
        said = json.loads(texts[name])
        key = keys[name][place % len(keys[name])]
        said |= {key: value} if how < 6 else {}
        text = json.dumps(said) if how < 8 else json.dumps(value) if how == 8 else texts[name][: place % 200]
        if how == 7:
            said.pop(key, None)
            text = json.dumps(said)
        (copy / name).write_text(text)
        one_line(lambda: model_loader.load(copy))
        one_line(lambda: inspect(copy))
        (copy / name).write_text(texts[name])

    numbers = st.integers(-2, 70) | st.lists(st.integers(0, 64), max_size=3)
    tried(opened, examples, st.sampled_from([*texts]), st.integers(0, 99), numbers | VALUES, st.integers(0, 9))


def test_what_is_generated_from_is_right(model):
    """Else all would be refused for the same reason."""
    assert model_loader.load(model)
    with pytest.raises(CheckpointError):
        model_loader.load(model / "unet")
