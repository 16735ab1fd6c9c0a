"""An autoencoder from a file of its own, by all the names that such files have."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from bench.reference.numbers import pixels
from bench.reference.oracles import diffusers_vae
from bench.reference.weights import original_layout
from sd import inference, model_loader
from sd.pipeline import StableDiffusion
from tests.checkpoints.common import SMALL
from tests.weights import random_models, shallow_pipeline

PREFIX = "first_stage_model."


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("c") / "model.safetensors"
    model_loader.save(path, SMALL, *random_models(SMALL))
    return path


@pytest.fixture(scope="module")
def other():
    """Another model's, whose autoencoder is to be used."""
    return random_models(SMALL, seed=7)


def bare(other):
    return {name.removeprefix(PREFIX): t for name, t in original_layout(other).items() if name.startswith(PREFIX)}


def old(tensors, names):
    for now, then in names.items():
        tensors = {name.replace(now, then): t for name, t in tensors.items()}
    return tensors


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
LEFT = {"attn_1.q.": "attn_1.to_q.", "attn_1.k.": "attn_1.to_k.", "attn_1.v.": "attn_1.to_v.",
        "attn_1.proj_out.": "attn_1.to_out.0."}  # fmt: skip
SPELLED = {
    "original": bare,
    "with its prefix": lambda other: {PREFIX + name: t for name, t in bare(other).items()},
    "a whole checkpoint": original_layout,
    "with a loss": lambda other: {**bare(other), "loss.logvar": torch.zeros(1)},
    "diffusers": lambda other: diffusers_vae(other[2], SMALL.vae).state_dict(),
    "diffusers of 2022": lambda other: old(diffusers_vae(other[2], SMALL.vae).state_dict(), OLD),
    "half converted": lambda other: old(bare(other), LEFT),
}


@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling(checkpoint, other, tmp_path, name, caplog):
    tensors = {key: t.contiguous() for key, t in SPELLED[name](other).items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "vae.ckpt")
    for path in (tmp_path / "vae.safetensors", tmp_path / "vae.ckpt"):
        pipe = StableDiffusion.load(checkpoint, "cpu", vae=path)
        for key, tensor in other[2].state_dict().items():
            assert torch.equal(pipe.vae.state_dict()[key], tensor), key
        assert not torch.equal(pipe.unet.out[2].weight, other[1].out[2].weight)
        read = model_loader.read_weights(pipe.source, pipe.config, "vae", ["decoder.conv_in.weight"])
        assert torch.equal(read["decoder.conv_in.weight"], pipe.vae.decoder.conv_in.weight)
    assert not caplog.text


def test_a_checkpoint_with_half_converted_names(other, tmp_path):
    save_file(old(original_layout(other), LEFT), tmp_path / "m.safetensors")
    _, _, _, vae = model_loader.load(tmp_path / "m.safetensors")
    assert torch.equal(vae.decoder.mid.attn_1.q.weight, other[2].decoder.mid.attn_1.q.weight)


def test_folders_and_their_scale(checkpoint, other, tmp_path):
    diffusers_vae(other[2], SMALL.vae).save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    for path in (tmp_path, tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        pipe = StableDiffusion.load(checkpoint, "cpu", vae=path)
        assert torch.equal(pipe.vae.decoder.conv_in.weight, other[2].decoder.conv_in.weight)
    said = tmp_path / "vae" / "config.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), "scaling_factor": 0.13025}))
    with pytest.raises(
        model_loader.CheckpointError, match=r"scaled by 0\.13025, those of this model.s UNet by 0\.18215"
    ):
        StableDiffusion.load(checkpoint, "cpu", vae=tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (lambda other: AutoencoderTiny().state_dict(), "TAESD"),
        (lambda other: {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, "LoRA"),
        (lambda other: {"x": torch.zeros(2)}, "holds no autoencoder: x"),
        (lambda other: {k: t for k, t in bare(other).items() if "conv_out" not in k}, "lacks 4 of"),
        (lambda other: {k: t[:1] for k, t in bare(other).items()}, "another shape"),
        (lambda other: {k: t * float("nan") for k, t in bare(other).items()}, "NaN"),
    ],
)
def test_what_is_none(checkpoint, other, tmp_path, tensors, said):
    save_file({k: t.contiguous() for k, t in tensors(other).items()}, tmp_path / "vae.safetensors")
    with pytest.raises(model_loader.CheckpointError) as caught:
        StableDiffusion.load(checkpoint, "cpu", vae=tmp_path / "vae.safetensors")
    assert str(caught.value).startswith(str(tmp_path / "vae.safetensors"))
    assert said in str(caught.value)


def test_the_command_draws_with_it_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipe, checkpoint = shallow_pipeline(), tmp_path / "model.safetensors"
    pipe.save(checkpoint)
    save_file(bare((pipe.clip, pipe.unet, random_models(pipe.config, seed=7)[2])), tmp_path / "vae.safetensors")
    line = ["--prompt", "x", "--steps", "1", "--seed", "1", "--height", "16", "--width", "16", "--device", "cpu"]
    line += ["--opt", "", "--ckpt", str(checkpoint)]
    assert inference.main([*line, "--out", "plain.png"]) == 0
    assert inference.main([*line, "--vae", "vae.safetensors", "--out", "a.png"]) == 0
    again = ["--from-png", "a.png", "--ckpt", str(checkpoint)]
    assert inference.main([*again, "--out", "b.png"]) == 0
    a, b, plain = (pixels(Image.open(f"{name}.png")) for name in ("a", "b", "plain"))
    assert (a == b).all()
    assert (a != plain).any()
    (tmp_path / "vae.safetensors").unlink()
    capsys.readouterr()
    assert inference.main([*again, "--out", "c.png"]) == 2
    assert "name it with --vae" in capsys.readouterr().err
    assert inference.main([*line, "--vae", "none.safetensors"]) == 2
    assert "--vae: there is no file none.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_upcast(other, tmp_path, dtype):
    tensors = {name: t.to(dtype) for name, t in original_layout(other).items()}
    save_file(tensors, tmp_path / "m.safetensors")
    _, _, unet, _ = model_loader.load(tmp_path / "m.safetensors")
    assert torch.equal(unet.out[2].weight, other[1].out[2].weight.to(dtype).float())
    save_file({**tensors, "scaled_fp8": torch.zeros(2).to(dtype)}, tmp_path / "s.safetensors")
    with pytest.raises(model_loader.CheckpointError, match="scales beside them"):
        model_loader.load(tmp_path / "s.safetensors")
