"""Which model, and which optimizations: the same choice for the command, the service and Modal."""

from pathlib import Path

import pytest
import torch

from sd import optimizations
from sd.optimizations import registry
from sd.pictures.model import ModelChoice, facts_of
from sd.pipeline import StableDiffusion


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ({}, "default"),
        ({"attention": "math"}, "default,attention=math"),
        ({"opt": "exact", "attention": "math"}, "exact,attention=math"),
        ({"opt": ""}, ""),
        ({"opt": "none"}, "none"),
    ],
)
def test_the_names_that_are_applied(choice, names):
    assert ModelChoice(**choice).names() == names


def test_what_is_not_named_is_the_librarys_default(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(registry, "LARGE", 1)
    choice = ModelChoice(ckpt=tiny_checkpoint, device="cpu")
    expected = optimizations.default(StableDiffusion.load(tiny_checkpoint, "cpu"))
    assert "kv-cache" in expected
    assert ",".join(choice.load(tiny_checkpoint).optimizations) == expected


def test_the_facts_say_what_was_applied_not_what_was_asked_for(tiny_checkpoint):
    choice = ModelChoice(ckpt=tiny_checkpoint, device="cpu", opt="cpu")
    pipe = choice.load_plain(choice.checkpoint())
    assert choice.facts(pipe, tiny_checkpoint)["opt"] == ""
    pipe.optimizations = ["time-cache"]
    facts = choice.facts(pipe, tiny_checkpoint)
    assert facts["opt"] == "time-cache"
    assert (facts["checkpoint"], facts["ema"], facts["dtype"]) == (tiny_checkpoint.name, False, "float32")
    assert "quantized" not in facts
    assert facts_of(pipe).items() <= facts.items()


def test_the_checkpoint_of_a_picture_only_where_none_is_named(tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("SD_CKPT", str(tiny_checkpoint))
    recorded = {"checkpoint": "other.ckpt", "checkpoint_hash": "0" * 12}
    assert ModelChoice(ckpt=Path("mine.ckpt")).checkpoint(recorded) == Path("mine.ckpt")
    assert ModelChoice().checkpoint({}) == tiny_checkpoint
    with pytest.raises(ValueError, match=r"other\.ckpt .* --ckpt"):
        ModelChoice().checkpoint(recorded)


def test_a_pipeline_moves_as_a_whole_unless_it_is_optimized(tiny_checkpoint):
    pipe = StableDiffusion.load(tiny_checkpoint, "cpu")
    pipe.times["text"] = 1.0
    assert pipe.to("meta") is pipe
    assert pipe.device == torch.device("meta")
    weights = [weight for model in (pipe.clip, pipe.unet, pipe.vae) for weight in model.parameters()]
    assert {weight.device.type for weight in weights} == {"meta"}
    assert pipe.times == {"text": 1.0}
    pipe = StableDiffusion.load(tiny_checkpoint, "cpu")
    optimizations.apply(pipe, "kv-cache")
    with pytest.raises(ValueError, match="optimized \\(kv-cache\\): move it first"):
        pipe.to("meta")
    assert pipe.device == torch.device("cpu")
