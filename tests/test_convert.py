"""Models from one layout to the other: diffusers reads what is written, and there and back is the same bytes."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bench.reference.oracles import SCHEDULE
from bench.reference.weights import TINY_SD2, ema_layout, original_layout, write_ckpt
from sd import model_loader
from sd.convert import main
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import assert_same
from tests.checkpoints.test_folders import SD1, write
from tests.test_pipeline import NEGATIVE, PROMPTS, detailed, differ
from tests.weights import random_models

CONFIGS = {
    "SD 1": replace(SD1, name="Stable Diffusion 1.x", image_size=512),
    "of another size": SD1,
    "v": replace(SD1, name="Stable Diffusion 1.x", image_size=512, prediction="v"),
    "SD 2": replace(TINY_SD2, name="Stable Diffusion 2.x", image_size=768, prediction="v"),
    "inpainting": replace(SD1, name="Stable Diffusion 1.x", unet=replace(SD1.unet, in_channels=9)),
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_bytes(there, name):
    config, models = CONFIGS[name], random_models(CONFIGS[name], seed=3)
    model_loader.save("given.safetensors", config, *models)
    steps = ["given.safetensors", "a.safetensors", "folder", "b.safetensors", "again", "c.safetensors"]
    for before, after in pairwise(steps):
        assert main([before, after]) == 0
        read, *loaded = model_loader.load(after)
        assert read == config
        assert_same(loaded, models)
    files = {path: (there / path).read_bytes() for path in ("a.safetensors", "b.safetensors", "c.safetensors")}
    assert len(set(files.values())) == 1
    assert contents(there / "folder") == contents(there / "again")
    assert {path.name for path in there.iterdir()} == set(steps)


@pytest.mark.parametrize("name", ["SD 1", "SD 2"])
def test_diffusers_draws_what_is_written(there, name):
    model_loader.save("given.safetensors", CONFIGS[name], *random_models(CONFIGS[name], seed=3))
    assert main(["given.safetensors", "folder"]) == 0
    theirs = StableDiffusionPipeline.from_pretrained("folder")
    assert theirs.tokenizer.pad_token == ("!" if name == "SD 2" else "<|endoftext|>")
    assert theirs.unet.config.sample_size == CONFIGS[name].image_size // 2
    prediction = theirs.scheduler.config.prediction_type
    theirs.scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, prediction_type=prediction)
    theirs.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48}
    (image,) = theirs(
        PROMPTS[0],
        negative_prompt=NEGATIVE,
        num_inference_steps=10,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(11),
        **size,
    ).images
    ours = StableDiffusion.load("given.safetensors", "cpu")
    (own,) = ours.generate(PROMPTS[0], NEGATIVE, 10, 7.5, 11, **size, sampler="ddim")
    assert detailed(own)
    assert differ(own, image) <= 1


def test_what_diffusers_wrote_comes_back(there):
    models = write(there / "theirs", SD1)
    assert main(["theirs", "a.safetensors"]) == 0
    assert_same(model_loader.load("a.safetensors")[1:], models)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_of_a_training_checkpoint_the_model_is_written(there, dtype):
    """Without optimizer, schedules and the other UNet; diffusers' folder of the averaged one."""
    models, averaged = random_models(SD1, seed=3), random_models(SD1, seed=4)[1]
    write_ckpt(there / "train.ckpt", models, ema=averaged)
    assert main(["train.ckpt", "plain.safetensors", "--dtype", dtype]) == 0
    assert main(["train.ckpt", "averaged", "--ema", "--dtype", dtype]) == 0
    kind = getattr(torch, dtype)
    assert load_file("plain.safetensors").keys() == original_layout(models).keys()
    assert_same(model_loader.load("plain.safetensors", dtype=kind)[1:], models, kind)
    assert_same(model_loader.load("averaged", dtype=kind)[1:], (models[0], averaged, models[2]), kind)


def test_types_stay_as_they_are_stored(there):
    tensors = original_layout(random_models(SD1, seed=3))
    kinds = {"cond": torch.bfloat16, "mode": torch.float8_e4m3fn, "firs": torch.float32}
    save_file({name: t.to(kinds[name[:4]]) for name, t in tensors.items()}, "mixed.safetensors")
    assert main(["mixed.safetensors", "a.safetensors"]) == 0
    written = load_file("a.safetensors")
    expected = {**kinds, "mode": torch.float16}
    assert {name[:4]: t.dtype for name, t in written.items()} == expected


def test_another_autoencoder(there):
    model_loader.save("a.safetensors", SD1, *random_models(SD1, seed=3))
    other = random_models(SD1, seed=4)
    model_loader.save("b.safetensors", SD1, *other)
    assert main(["a.safetensors", "c.safetensors", "--vae", "b.safetensors"]) == 0
    assert_same(model_loader.load("c.safetensors")[3:], other[2:])


def test_what_cannot_be_done(there, capsys):
    model_loader.save("a.safetensors", SD1, *random_models(SD1, seed=3))
    (there / "dir").mkdir()
    (there / "torn.safetensors").write_bytes((there / "a.safetensors").read_bytes()[:1000])
    before = contents(there)
    for line, said in {
        ("a.safetensors", "a.safetensors"): "is there already",
        ("a.safetensors", "b.ckpt"): "written as .safetensors",
        ("a.safetensors", "dir"): "not written over",
        ("a.safetensors", "no/b.safetensors"): "the folder that it would lie in",
        ("a.safetensors", "b.safetensors", "--ema"): "no EMA weights",
        ("torn.safetensors", "b.safetensors"): "truncated or damaged",
        ("torn.safetensors", "folder"): "truncated or damaged",
        ("none", "folder"): "no such file",
    }.items():
        assert main(list(line)) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert said in told
    assert contents(there) == before
    assert main(["a.safetensors", "a.safetensors", "--overwrite", "--dtype", "float16"]) == 0
    assert {t.dtype for t in load_file("a.safetensors").values()} == {torch.float16}


def test_the_averaged_of_sd2(there):
    config = CONFIGS["SD 2"]
    models, averaged = random_models(config, seed=3), random_models(config, seed=4)[1]
    model_loader.save("a.safetensors", config, *models)
    save_file({**load_file("a.safetensors"), **ema_layout(averaged)}, "train.safetensors",
              metadata={"config": config.to_json()})  # fmt: skip
    assert main(["train.safetensors", "folder", "--ema"]) == 0
    assert_same(model_loader.load("folder")[1:], (models[0], averaged, models[2]))
