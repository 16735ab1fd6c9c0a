"""Models that predict v, beside diffusers; how a file says so, and how a person does."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from bench.reference.numbers import pixels, relative_error
from bench.reference.oracles import SCHEDULE
from sd import inference, optimizations
from sd.pictures.png import read_parameters
from sd.pipeline import StableDiffusion
from tests.optimizations.stand_in import install
from tests.test_pictures_by_sampler import by_diffusers
from tests.test_pipeline import NEGATIVE, PROMPTS, SMALL, detailed, differ
from tests.weights import random_models, shallow_pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Without a configuration, as others write it."""
    folder = tmp_path_factory.mktemp("v")
    shallow_pipeline().save(folder / "a.safetensors")
    save_file(load_file(folder / "a.safetensors"), folder / "plain.safetensors")
    return folder / "plain.safetensors"


def test_a_picture_against_diffusers():
    pipe = StableDiffusion(replace(SMALL, prediction="v"), *random_models(SMALL, seed=3))
    (ours,) = pipe.generate(PROMPTS[0], NEGATIVE, 20, 7.5, 11, 32, 48, "ddim")
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, prediction_type="v_prediction")
    theirs = by_diffusers(pipe, scheduler)
    assert detailed(ours)
    assert differ(ours, theirs) <= 1


@pytest.mark.parametrize("names", ["loop-graph", "cuda-graph,async-noise", "kv-cache,shared-halves"])
def test_beside_optimizations(checkpoint, monkeypatch, names):
    install(monkeypatch)
    plain, fast, eps = (StableDiffusion.load(checkpoint, "cpu", prediction=p) for p in ("v", "v", "eps"))
    optimizations.apply(fast, names)
    a, b, c = (p.generate("x", steps=4, seed=1, height=16, width=16)[0] for p in (plain, fast, eps))
    assert differ(a, b) <= 1
    assert abs(pixels(a) - pixels(c)).mean() > 5


def test_previews_show_what_v_comes_to(checkpoint):
    pipe, seen = StableDiffusion.load(checkpoint, "cpu", prediction="v"), []
    keep = lambda i, n, x: seen.append((x.clone(), pipe.call.predicted()))  # noqa: E731
    pipe.generate("x", steps=4, seed=1, height=16, width=16, sampler="euler", on_step=keep)
    assert relative_error(*seen[-1]) < 1e-5


@pytest.mark.parametrize(
    ("tensors", "metadata", "prediction"),
    [
        ({}, {}, "eps"),
        ({"v_pred": torch.zeros(0)}, {}, "v"),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, {}, "v"),
        ({}, {"modelspec.prediction_type": "v"}, "v"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "eps"),
    ],
)
def test_a_file_says_what_it_predicts(checkpoint, tmp_path, caplog, tensors, metadata, prediction):
    save_file({**load_file(checkpoint), **tensors}, tmp_path / "b.safetensors", metadata=metadata)
    pipe = StableDiffusion.load(tmp_path / "b.safetensors", "cpu")
    assert pipe.config.prediction == prediction
    assert ("--schedule ztsnr" in caplog.text) == ("ztsnr" in tensors)
    assert "no part of the model" not in caplog.text
    pipe.save(tmp_path / "c.safetensors")
    assert StableDiffusion.load(tmp_path / "c.safetensors", "cpu").config.prediction == prediction


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = [
        "--prompt",
        "x",
        "--steps",
        "2",
        "--seed",
        "1",
        "--ckpt",
        str(checkpoint),
        "--height",
        "16",
        "--width",
        "16",
    ]
    assert inference.main([*line, "--out", "eps.png"]) == 0
    assert inference.main([*line, "--prediction", "v", "--out", "v.png"]) == 0
    assert "prediction" not in read_parameters("eps.png")
    assert read_parameters("v.png")["prediction"] == "v"
    assert inference.main(["--from-png", "v.png", "--ckpt", str(checkpoint), "--out", "again.png"]) == 0
    assert (tmp_path / "v.png").read_bytes() == (tmp_path / "again.png").read_bytes() != b""
    with pytest.raises(ValueError, match="no prediction 'x0'; there are eps, v"):
        StableDiffusion.load(checkpoint, "cpu", prediction="x0")
