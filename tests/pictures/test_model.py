"""Which model, and which optimizations: the same choice for the command, the service and Modal."""

from pathlib import Path

import pytest
import torch

from bench.reference.numbers import noise
from sd import optimizations
from sd.kernels import dots, native
from sd.model_loader import Stored, stored
from sd.optimizations import precision, registry
from sd.pictures.model import ModelChoice, facts_of
from sd.pictures.parameters import UserError
from sd.pipeline import StableDiffusion
from tests.weights import tiny_pipeline


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


def test_bfloat16_on_a_cpu_is_bf16_products(tiny_checkpoint, monkeypatch):
    """From weights in their own type, which stay mapped; what is recorded draws the same again."""
    if native.load() is None:
        pytest.skip(native.why_not())
    monkeypatch.setattr(dots, "fast", lambda: True)
    for names in ("default", "cpu", "exact", "fast"):
        assert ModelChoice(dtype="bfloat16", device="cpu", opt=names).names() == f"cpu-bf16,{names}"
    for names in ("none", "exact, attention=math", "cpu,fp16"):  # and no switch that nobody typed is refused
        assert ModelChoice(dtype="bfloat16", device="cpu", opt=names).names() == names
    assert "cpu-bf16" not in ModelChoice(dtype="bfloat16", device="cpu", attention="math").names()
    assert ModelChoice(dtype="bfloat16", device="cpu", opt="cpu-int8,cpu").names() == "cpu-int8,cpu"
    pipe = ModelChoice(dtype="bfloat16", device="cpu").load(tiny_checkpoint)
    assert pipe.optimizations == ["cpu-bf16"]
    recorded = facts_of(pipe)
    again = ModelChoice(dtype=recorded["dtype"], opt=recorded["opt"], device="cpu").load(tiny_checkpoint)
    x, t, context = noise(2, 4, 8, 8), torch.tensor(3), noise(2, 77, 64)
    assert torch.equal(again.unet(x, t, context), pipe.unet(x, t, context))


def test_bfloat16_where_no_cpu_is_fast_at_it(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(dots, "fast", lambda: False)
    monkeypatch.setattr(precision, "has_bf16", lambda: False)
    with pytest.raises(UserError, match="slower than float32 on this CPU"):
        ModelChoice(dtype="bfloat16", device="cpu").load(tiny_checkpoint)
    pipe = ModelChoice(dtype="bfloat16", device="cpu", opt="none").load(tiny_checkpoint)
    assert pipe.dtype == torch.bfloat16
    monkeypatch.setattr(precision, "has_bf16", lambda: True)  # and no compiler, say
    assert ModelChoice(dtype="bfloat16", device="cpu").load(tiny_checkpoint).dtype == torch.bfloat16


def test_weights_are_loaded_as_they_are_stored_where_short_numbers_are_packed(tmp_path, monkeypatch):
    if native.load() is None:
        pytest.skip(native.why_not())
    monkeypatch.setattr(dots, "fast", lambda: True)
    monkeypatch.setattr(registry, "short_by_default", lambda: True)
    monkeypatch.setattr(registry, "LARGE", 1)
    pipe = tiny_pipeline(torch.float16)
    pipe.save(tmp_path / "half.safetensors")
    assert stored(tmp_path / "half.safetensors") == Stored(
        torch.float16, sum(weight.numel() for weight in pipe.unet.parameters())
    )
    for choice in (ModelChoice(device="cpu"), ModelChoice(device="cpu", opt="cpu-bf16")):
        assert choice.load_plain(tmp_path / "half.safetensors").dtype == torch.float16
        fast = choice.load(tmp_path / "half.safetensors")
        assert fast.optimizations[0] == "cpu-bf16"
        assert fast.dtype == torch.float32
    assert ModelChoice(device="cpu", opt="none").load(tmp_path / "half.safetensors").dtype == torch.float32


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
