"""The loader reads every format bit by bit, runs nothing, and answers every bad file with one line."""

import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.reference.weights import (
    TINY,
    Models,
    original_layout,
    random_models,
    schedule_buffers,
    tiny_config,
    write_ckpt,
    write_safetensors,
)
from sd import model_loader
from sd.config import SD15
from sd.model_loader import PREFIXES, TOKEN_TABLE, CheckpointError

ROOT = Path(__file__).resolve().parent.parent
SMALL = tiny_config(
    text={"vocab_size": 64, "layers": 1, "max_length": 7},
    unet={"channel_mult": (1, 2), "attention_levels": (0,)},
    vae={"ch_mult": (1, 2)},
)
"""Two levels and a short token table: what most of these tests load."""


@pytest.fixture(scope="module")
def models() -> Models:
    return random_models(SMALL)


@pytest.fixture
def tensors(models: Models) -> dict[str, torch.Tensor]:
    return original_layout(models)


def assert_same(loaded: Models, expected: Models, dtype: torch.dtype = torch.float32) -> None:
    for ours, theirs in zip(loaded, expected, strict=True):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for name, tensor in ours.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, state[name].to(dtype)), name


def error_of(path: Path, **options) -> str:
    """The loader's error, which is one line, begins with the file, and leaves nothing registered."""
    before = set(torch.serialization.get_safe_globals())  # torch keeps a set: the order is not stable
    with pytest.raises(CheckpointError) as caught:
        model_loader.load(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 700
    assert set(torch.serialization.get_safe_globals()) == before
    return message


# --- Formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["saved", "safetensors", "ckpt", "legacy"])
def test_round_trip_is_bit_exact(tmp_path, kind, dtype):
    expected = random_models(SMALL, dtype=dtype)
    path = tmp_path / "weights.ckpt"  # the content decides what it is
    if kind == "saved":
        model_loader.save(path, SMALL, *expected)
    elif kind == "safetensors":
        write_safetensors(path, expected, **schedule_buffers())
    else:
        write_ckpt(path, expected, legacy=kind == "legacy")
    config, *loaded = model_loader.load(path, dtype=dtype)
    assert_same(loaded, expected, dtype)
    assert config.unet == SMALL.unet
    assert (config == SMALL) == (kind == "saved")
    assert not any(p.requires_grad for m in loaded for p in m.parameters())
    assert not any(m.training for m in loaded)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_may_be_called_safetensors(tmp_path, models, legacy):
    path = tmp_path / "weights.safetensors"
    write_ckpt(path, models, legacy=legacy)
    assert_same(model_loader.load(path)[1:], models)


def test_without_the_state_dict_level(tmp_path, models, tensors):
    torch.save(tensors, tmp_path / "weights.ckpt")
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)


def test_without_the_text_model_level(tmp_path, models, tensors):
    save_file({name.replace("text_model.", ""): t for name, t in tensors.items()}, tmp_path / "weights.safetensors")
    assert_same(model_loader.load(tmp_path / "weights.safetensors")[1:], models)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion(tmp_path, models, dtype):
    write_ckpt(tmp_path / "weights.ckpt", models)
    assert_same(model_loader.load(tmp_path / "weights.ckpt", dtype=dtype)[1:], models, dtype)


def test_views_and_strides(tmp_path, models, tensors):
    stored = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors.items()}
    biases = torch.cat([t for t in tensors.values() if t.ndim == 1])
    offset = 0
    for name, t in tensors.items():
        if t.ndim == 1:
            stored[name] = biases[offset : offset + len(t)]
            offset += len(t)
    torch.save(stored, tmp_path / "weights.ckpt")
    config, *loaded = model_loader.load(tmp_path / "weights.ckpt")
    assert_same(loaded, models)
    assert all(p.is_contiguous() for m in loaded for p in m.parameters())
    model_loader.save(tmp_path / "again.safetensors", config, *loaded)
    assert_same(model_loader.load(tmp_path / "again.safetensors")[1:], models)


def test_leftovers_are_listed_at_debug_level(tmp_path, models, caplog):
    write_ckpt(tmp_path / "weights.ckpt", models)
    with caplog.at_level("DEBUG", logger="sd.model_loader"):
        model_loader.load(tmp_path / "weights.ckpt")
    assert "alphas_cumprod" in caplog.text
    assert "position_ids" in caplog.text


def test_the_original_names_and_shapes():
    lines = (ROOT / "tests/sd15_keys.tsv").read_text().splitlines()
    expected = {name: tuple(map(int, shape.split(","))) for name, shape in (line.split("\t") for line in lines)}
    meta = original_layout(model_loader.build(SD15))
    assert {name: tuple(t.shape) for name, t in meta.items()} == expected
    assert len(expected) == 1130
    assert replace(model_loader.infer_config(meta), name=SD15.name) == SD15


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": {"channel_mult": (1, 2, 3), "num_res_blocks": 3, "attention_levels": (1, 2)}},
        {"unet": {"transformer_depth": 2, "model_channels": 64, "attention_levels": (0, 3)}},
        {"text": {"width": 128, "heads": 2, "layers": 5, "max_length": 20}, "unet": {"context_dim": 128}},
        {"vae": {"ch": 64, "ch_mult": (1, 3), "num_res_blocks": 2, "z_channels": 3}, "unet": {"in_channels": 3}},
        {"unet": {"attention_levels": ()}},
    ],
)
def test_shapes_tell_the_configuration(changes):
    config = tiny_config(**changes)
    inferred = model_loader.infer_config(original_layout(model_loader.build(config)))
    assert replace(inferred, name=config.name, image_size=config.image_size) == config


# --- EMA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_ema_picks_the_averaged_unet(tmp_path, models, legacy):
    averaged = random_models(SMALL, seed=1)[1]
    write_ckpt(tmp_path / "weights.ckpt", models, ema=averaged, legacy=legacy)
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)
    assert_same(model_loader.load(tmp_path / "weights.ckpt", ema=True)[1:], (models[0], averaged, models[2]))


def test_ema_is_asked_of_a_file_without(tmp_path, models):
    write_ckpt(tmp_path / "weights.ckpt", models)
    assert "has no EMA weights" in error_of(tmp_path / "weights.ckpt", ema=True)


def test_a_missing_ema_tensor_is_named(tmp_path, models, tensors):
    save_file({**tensors, "model_ema.diffusion_modelout2bias": torch.zeros(4)}, tmp_path / "a.safetensors")
    assert "model_ema.diffusion_modeltime_embed0weight" in error_of(tmp_path / "a.safetensors", ema=True)


# --- Pickles run nothing ---------------------------------------------------------------------------------------------


class Payload:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def payloads(marker: Path) -> dict[str, Payload]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Payload(os.system, f"touch {marker}"),
        "builtins.eval": Payload(eval, code),
        "builtins.exec": Payload(exec, code),
        "subprocess.Popen": Payload(subprocess.Popen, ["touch", str(marker)]),
        "builtins.getattr": Payload(getattr, os, "system"),
    }


@pytest.mark.parametrize("name", ["posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen"])
@pytest.mark.parametrize("form", ["zip", "legacy", "raw 0", "raw 2", "raw 4"])
def test_a_payload_is_refused_by_name(tmp_path, tensors, name, form):
    marker = tmp_path / "executed"
    path = tmp_path / "weights.ckpt"
    content = {"state_dict": tensors, "extra": payloads(marker)[name]}
    if form.startswith("raw"):
        path.write_bytes(pickle.dumps(content["extra"], protocol=int(form[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert f"refuses to run {name}" in error_of(path)
    assert not marker.exists()
    with pytest.raises(CheckpointError):
        model_loader.read_state_dict(path)
    assert not marker.exists()


def test_the_payloads_would_run(tmp_path):
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(payloads(marker)["builtins.eval"]))
    assert marker.exists()


def test_classes_of_lightning_do_nothing(tmp_path, models, tensors, monkeypatch):
    """A class of that name that is there is not touched either."""
    ran = []
    module = type(sys)("pytorch_lightning")
    module.Callback = type(
        "Callback", (), {"__module__": "pytorch_lightning", "__setstate__": lambda *a: ran.append(a)}
    )
    monkeypatch.setitem(sys.modules, "pytorch_lightning", module)
    callback = module.Callback()
    callback.state = 1
    torch.save({"state_dict": tensors, "callback": callback}, tmp_path / "weights.ckpt")
    assert_same(model_loader.load(tmp_path / "weights.ckpt")[1:], models)
    assert not ran
    torch.load(tmp_path / "weights.ckpt", weights_only=False)
    assert ran


# --- Bad files -------------------------------------------------------------------------------------------------------

NOT_WEIGHTS = {
    b"": "empty",
    b"<!DOCTYPE html><html>": "web page",
    b"\n <html>": "web page",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:6ce0": "git lfs pull",
    b"\x80": "checkpoint",
    b"hello": "not a checkpoint",
    b"{}": "index",
    b'{"weight_map": 5}': "index",
    b'{"weight_map": {"a": "../../etc/passwd"}}': "outside its folder",
    b'{"weight_map": {"a": "nowhere.safetensors"}}': "no such file",
    b"PK\x03\x04": "damaged",
    struct.pack("<Q", 1 << 60) + b"{": "not a checkpoint",
    struct.pack("<Q", 2) + b"{}": "lacks",
}


@pytest.mark.parametrize("content", NOT_WEIGHTS, ids=range(len(NOT_WEIGHTS)))
def test_files_that_are_not_weights(tmp_path, content):
    (tmp_path / "weights.ckpt").write_bytes(content)
    assert NOT_WEIGHTS[content] in error_of(tmp_path / "weights.ckpt")


def test_paths_that_are_not_files(tmp_path):
    assert "no such file" in error_of(tmp_path / "absent.ckpt")
    assert "a folder" in error_of(tmp_path)
    assert "not a regular file" in error_of(Path("/dev/zero"))


def test_random_bytes(tmp_path):
    for seed in range(50):
        (tmp_path / "weights.ckpt").write_bytes(random.Random(seed).randbytes(4096))
        assert "checkpoint" in error_of(tmp_path / "weights.ckpt")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated(tmp_path, models, kind, share):
    path = tmp_path / "weights"
    write_safetensors(path, models) if kind == "safetensors" else write_ckpt(path, models, legacy=kind == "legacy")
    os.truncate(path, int(path.stat().st_size * share))
    assert "truncated or damaged" in error_of(path)


@pytest.mark.parametrize(
    ("name", "shape", "family"),
    [
        ("conditioner.embedders.0.transformer.text_model.x", (1,), "Stable Diffusion XL"),
        ("cond_stage_model.model.ln_final.weight", (1,), "Stable Diffusion 2"),
        ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", (1,), "LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", (1,), "LoRA"),
        ("down_blocks.0.resnets.0.conv1.weight", (1,), "diffusers layout"),
        ("control_model.input_blocks.0.0.weight", (1,), "ControlNet"),
        (PREFIXES["unet"] + "input_blocks.0.0.weight", (32, 9, 3, 3), "inpainting"),
        (PREFIXES["unet"] + "middle_block.1.transformer_blocks.0.attn2.to_k.weight", (128, 1024), "Stable Diffusion 2"),
    ],
)
def test_other_families_are_named(tmp_path, tensors, name, shape, family):
    save_file({**tensors, name: torch.zeros(shape)}, tmp_path / "weights.safetensors")
    assert family in error_of(tmp_path / "weights.safetensors")


def test_missing_and_misshapen_tensors_are_named(tmp_path, tensors):
    name = PREFIXES["vae"] + "decoder.conv_in.bias"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "a.safetensors")
    assert f"lacks 1 of {len(tensors)} tensors: {name}" in error_of(tmp_path / "a.safetensors")
    save_file({**tensors, name: torch.zeros(5)}, tmp_path / "b.safetensors")
    assert f"{name} is (5,), not (64,)" in error_of(tmp_path / "b.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(PREFIXES["vae"])}, tmp_path / "c.safetensors")
    assert "lacks first_stage_model." in error_of(tmp_path / "c.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_bad_weight_anywhere(tmp_path, tensors, value, dtype):
    generator = random.Random(int(dtype.itemsize))
    for name in generator.sample(sorted(tensors), 2):
        bad = tensors[name].to(dtype, copy=True)
        bad.view(-1)[generator.randrange(bad.numel())] = value
        save_file({**tensors, name: bad}, tmp_path / "weights.safetensors")
        assert f"{name} holds NaN or infinite" in error_of(tmp_path / "weights.safetensors")


def test_weights_beyond_fp16(tmp_path, tensors):
    name = PREFIXES["unet"] + "out.2.bias"
    save_file({**tensors, name: tensors[name] + 1e5}, tmp_path / "weights.safetensors")
    model_loader.load(tmp_path / "weights.safetensors", dtype=torch.bfloat16)
    assert "beyond the range of torch.float16" in error_of(tmp_path / "weights.safetensors", dtype=torch.float16)


@pytest.mark.parametrize(
    ("strange", "problem"),
    [
        (lambda t: t.to(torch.complex64), "refuses to run torch.ComplexFloatStorage"),
        (lambda t: t.to(torch.int64), "torch.int64"),
        (lambda t: t.to_sparse(), "refuses to run torch._utils._rebuild_sparse_tensor"),
        (lambda t: t.to("meta"), "refuses to run torch._utils._rebuild_meta"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "refuses to run"),
    ],
    ids=["complex", "integer", "sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_strange_tensors(tmp_path, tensors, strange, problem):
    name = PREFIXES["unet"] + "out.2.weight"
    torch.save({**tensors, name: strange(tensors[name])}, tmp_path / "weights.ckpt")
    assert problem in error_of(tmp_path / "weights.ckpt")


@pytest.mark.parametrize("legacy", [False, True])
def test_sizes_that_the_file_does_not_hold(tmp_path, legacy):
    """SD 1.5's 4.27 GB claimed by strides of 0."""
    meta = original_layout(model_loader.build(SD15))
    claimed = {name: torch.zeros(1).expand(t.shape) for name, t in meta.items()}
    torch.save(claimed, tmp_path / "weights.ckpt", _use_new_zipfile_serialization=not legacy)
    assert "claims 426" in error_of(tmp_path / "weights.ckpt")


@pytest.mark.parametrize(
    "config",
    [
        "",
        "5",
        "{}",
        "[" * 100_000,
        replace(SMALL, text=replace(SMALL.text, layers=1_000_000)).to_json(),
        replace(SMALL, text=replace(SMALL.text, vocab_size=1_000_000)).to_json(),
        replace(SMALL, text=replace(SMALL.text, heads=0)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, num_res_blocks=1_000_000)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, transformer_depth=1_000_000)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=())).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=("1", "2"))).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, channel_mult=(1,) * 100_000)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, model_channels=999_936)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, num_heads=7)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, norm_groups=5)).to_json(),
        replace(SMALL, unet=replace(SMALL.unet, in_channels=9)).to_json(),
        replace(SMALL, vae=replace(SMALL.vae, scale_factor=float("nan"))).to_json(),
        SMALL.to_json().replace("vocab_size", "vocabulary"),
    ],
    ids=range(18),
)
def test_absurd_configurations_fail_fast(tmp_path, tensors, config):
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"config": config})
    start = time.process_time()
    error_of(tmp_path / "weights.safetensors")
    assert time.process_time() - start < 5  # a guard against hanging, not a benchmark


# --- Saving ----------------------------------------------------------------------------------------------------------


def test_saving_over_the_mapped_file(tmp_path, models):
    path = tmp_path / "weights.safetensors"
    model_loader.save(path, SMALL, *models)
    config, *loaded = model_loader.load(path)
    model_loader.save(path, replace(config, image_size=128), *loaded)
    assert_same(loaded, models)
    config, *loaded = model_loader.load(path)
    assert_same(loaded, models)
    assert config.image_size == 128
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_changing_a_mapped_weight_leaves_the_file_alone(tmp_path, models):
    for path in (tmp_path / "weights.safetensors", tmp_path / "weights.ckpt"):
        write_safetensors(path, models) if path.suffix == ".safetensors" else write_ckpt(path, models)
        before = path.read_bytes()
        model_loader.load(path)[2].out[2].weight.add_(1)
        assert path.read_bytes() == before


def test_compact_token_table(tmp_path, models):
    ids = [3, 63, 5]
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models, token_ids=ids)
    _, clip, *rest = model_loader.load(tmp_path / "weights.safetensors")
    expected = torch.zeros_like(models[0].embeddings.token_embedding.weight)
    expected[ids] = models[0].embeddings.token_embedding.weight[ids]
    assert torch.equal(clip.embeddings.token_embedding.weight, expected)
    assert_same(rest, models[1:])
    stored, _ = model_loader.read_state_dict(tmp_path / "weights.safetensors")
    assert stored[TOKEN_TABLE].shape == (3, SMALL.text.width)


@pytest.mark.parametrize("ids", [[0, 0, 1], [0, 1, 64], [-1, 0, 1], [0, 1], [0.0, 1.0, 2.0], [[0, 1, 2]]])
def test_bad_token_ids(tmp_path, tensors, ids):
    rows = {TOKEN_TABLE: torch.zeros(3, 64), model_loader.TOKEN_IDS: torch.tensor(ids)}
    save_file({**tensors, **rows}, tmp_path / "weights.safetensors", metadata={"config": SMALL.to_json()})
    error_of(tmp_path / "weights.safetensors")


def test_split_checkpoint(tmp_path, models):
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models, max_bytes=1_000_000, token_ids=range(64))
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files[0].startswith("weights-00001-of-0000")
    assert files[-1] == "weights.safetensors.index.json"
    assert len(files) > 3
    assert all(p.stat().st_size < 1_100_000 for p in tmp_path.iterdir())
    config, *loaded = model_loader.load(tmp_path / files[-1])
    assert config == SMALL
    assert_same(loaded, models)
    index = json.loads((tmp_path / files[-1]).read_text())
    assert set(index["weight_map"].values()) == set(files[:-1])
    (tmp_path / files[1]).unlink()
    assert f"{files[1]}: no such file" in error_of(tmp_path / files[-1])


def test_saving_where_it_cannot_be_written(tmp_path, models):
    for path in (tmp_path / "absent" / "weights.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be written"):
            model_loader.save(path, SMALL, *models)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    code = (
        "import resource, signal; from tests.test_model_loader import SMALL, model_loader, random_models\n"
        "models = random_models(SMALL)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: model_loader.save('weights.safetensors', SMALL, *models)\n"
        "except model_loader.CheckpointError as error: print(error)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "cannot be written" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_has_the_usual_permissions(tmp_path, models):
    model_loader.save(tmp_path / "weights.safetensors", SMALL, *models)
    (tmp_path / "other").touch()
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_saving_changed_modules_is_refused(tmp_path, models):
    with pytest.raises(CheckpointError, match="differ from their configuration"):
        model_loader.save(tmp_path / "weights.safetensors", TINY, *models)
    assert list(tmp_path.iterdir()) == []


# --- Fuzzing ---------------------------------------------------------------------------------------------------------

FUZZED = tiny_config(
    text={"vocab_size": 16, "layers": 1, "max_length": 4},
    unet={"channel_mult": (1,), "attention_levels": ()},
    vae={"ch_mult": (1,)},
)
FUZZ_FORMATS = ("saved", "safetensors", "zip", "legacy")


def fuzz_seeds(folder: Path) -> dict[str, bytes]:
    """One small checkpoint of each format."""
    models = random_models(FUZZED, dtype=torch.float16)
    model_loader.save(folder / "saved", FUZZED, *models)
    write_safetensors(folder / "safetensors", models)
    write_ckpt(folder / "zip", models)
    write_ckpt(folder / "legacy", models, legacy=True)
    return {name: (folder / name).read_bytes() for name in FUZZ_FORMATS}


def mutated(data: bytes, rng: random.Random, structure: int) -> bytes:
    """Up to 8 changes, most of them in the first `structure` bytes: flips, cuts, splices, copies, digits."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = max(1, min(len(data), structure if rng.random() < 0.8 else len(data)))
        at, length = rng.randrange(end), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                other = rng.randrange(end)
                data[at:at] = data[other : other + length]
            case 4:
                data[at : at + length] = rng.choice((b"\0", b"\xff")) * length
            case 5:
                digits = [i for i in range(end) if 48 <= data[i] < 58] or [at]
                data[rng.choice(digits)] = rng.choice(b"0123456789")
        if not data:
            break
    return bytes(data[: rng.randrange(len(data))] if data and rng.random() < 0.05 else data)


def with_mutated_pickle(data: bytes, rng: random.Random) -> bytes:
    """Change the pickle in a zip file and keep its check sums right, so that the change is not noticed by them."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as changed:
        for info in source.infolist():
            record = source.read(info)
            if info.filename.endswith("data.pkl"):
                record = mutated(record, rng, len(record))
            changed.writestr(info.filename, record)
    return target.getvalue()


def mutant(name: str, data: bytes, rng: random.Random) -> bytes:
    if name == "zip":
        if rng.random() < 0.5:
            return with_mutated_pickle(data, rng)
        tail = len(data) - data.rindex(b"PK\x01\x02")
        return mutated(data[::-1], rng, 300 * tail)[::-1] if rng.random() < 0.3 else mutated(data, rng, len(data))
    header = 8 + int.from_bytes(data[:8], "little") if name != "legacy" else data.index(b"conv_out.bias") + 2000
    return mutated(data, rng, header)


def fuzz(count: int, seed: int, folder: Path) -> Counter:
    """Load `count` mutants. Anything but a model or a CheckpointError goes up; the slowest and the peak are checked."""
    seeds = fuzz_seeds(folder)
    for name in seeds:
        model_loader.load(folder / name)
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ends = Counter()
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        name = FUZZ_FORMATS[i % len(FUZZ_FORMATS)]
        path = folder / "mutant"
        path.write_bytes(mutant(name, seeds[name], rng))
        start = time.process_time()  # not the clock: other processes must not fail this guard against hanging
        ends[name, fuzz_one(path, i)] += 1
        seconds = time.process_time() - start
        assert seconds < 10, f"mutant {i} took {seconds:.0f} s"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start_memory
    assert grown < 300_000, f"memory grew by {grown} kB"
    return ends


def fuzz_one(path: Path, number: int) -> str:
    try:
        _, *models = model_loader.load(path)
    except CheckpointError:
        return "error"
    except BaseException as error:
        raise AssertionError(f"mutant {number}: {type(error).__name__}: {error}") from error
    assert all(p.isfinite().all() for model in models for p in model.parameters())
    return "model"


def run_fuzz(count: int, seed: int, folder: Path) -> str:
    """In another process: a crash is a failure, not the end of the tests."""
    code = (
        f"from pathlib import Path; from tests.test_model_loader import fuzz; print(fuzz({count}, {seed}, Path('.')))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    folder.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fuzzed_checkpoints(tmp_path):
    ends = run_fuzz(300, seed=0, folder=tmp_path)
    assert "error" in ends
    assert "model" in ends


@pytest.mark.full
def test_ten_thousand_fuzzed_checkpoints(tmp_path):
    with ThreadPoolExecutor(2) as processes:
        halves = [processes.submit(run_fuzz, 5_000, seed, tmp_path / str(seed)) for seed in (1, 2)]
    print([half.result() for half in halves])


# --- Full size -------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, torch
from sd import model_loader
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon")}
before = memory()
config, *models = model_loader.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]), ema=sys.argv[3] == "ema")
weights = sum(p.nbytes for m in models for p in m.parameters())
print(json.dumps({"weights": weights, "before": before, "after": memory()}))
"""


def measured(path: Path, dtype: str, ema: bool = False) -> dict:
    command = [sys.executable, "-c", MEASURE, str(path), dtype, "ema" if ema else "live"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_memory_at_full_size(tmp_path, kind):
    models = random_models(SD15)
    path = tmp_path / f"weights.{kind}"
    write_ckpt(path, models) if kind == "ckpt" else write_safetensors(path, models)
    assert_same(model_loader.load(path)[1:], models)
    del models
    mapped = measured(path, "float32")
    assert mapped["weights"] == 4 * 1_066_235_307
    assert mapped["after"]["VmHWM"] < 1.25 * mapped["weights"]
    half = measured(path, "float16")
    assert half["after"]["VmHWM"] - half["before"]["VmHWM"] < 1.25 * half["weights"]
    path.unlink()
