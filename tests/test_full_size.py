"""The SD 1.5 configuration itself, with random weights in the original layout, in fp32 against diffusers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bench.reference import oracles
from bench.reference.numbers import noise, relative_error
from bench.reference.oracles import diffusers_pipeline
from bench.reference.weights import random_controlnet, random_models, write_ckpt
from sd import optimizations
from sd.config import SD15
from sd.pictures.png import read_parameters
from sd.pipeline import StableDiffusion
from tests.test_pipeline import assert_image_to_image_matches, detailed, differ, smooth_noise

pytestmark = pytest.mark.full

BOUND = 1e-5
PROGRAM = Path(__file__).resolve().parent.parent / "sd" / "inference.py"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """4.27 GB as `v1-5-pruned-emaonly.ckpt` holds them, with a pickled callback of lightning's beside them."""
    path = tmp_path_factory.mktemp("full") / "random.ckpt"
    write_ckpt(path, random_models(SD15, seed=0))
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def pipe(ckpt) -> StableDiffusion:
    return StableDiffusion.load(ckpt, device="cpu")


def test_the_configuration_is_recognized(pipe):
    assert (pipe.config.text, pipe.config.unet, pipe.config.vae) == (SD15.text, SD15.unet, SD15.vae)


@torch.no_grad()
def test_text_encoder(pipe):
    tokens = pipe.tokenizer(["", "a lighthouse in a storm, oil on canvas"])
    expected = oracles.transformers_clip(pipe.clip, SD15.text)(tokens).last_hidden_state
    assert relative_error(pipe.clip(tokens), expected) < BOUND


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "height", "width", "scale"),
    [(1, 32, 32, 1.0), (2, 32, 32, 1.0), (1, 32, 48, 1.0), (1, 32, 32, 3e-3)],
    ids=["plain", "batch of 2", "32x48", "variance near eps"],
)
def test_unet(pipe, batch, height, width, scale):
    x, context = scale * noise(batch, 4, height, width), noise(batch, 77, 768, seed=1)
    expected = oracles.diffusers_unet(pipe.unet, SD15.unet)(x, 500, encoder_hidden_states=context).sample
    actual = pipe.unet(x, torch.tensor(500), context)
    assert expected.std() > 1e-3
    assert relative_error(actual, expected) < BOUND


@torch.no_grad()
@pytest.mark.parametrize("names", ["none", "cpu"])
def test_controlnet(ckpt, tmp_path, names):
    save_file(random_controlnet(SD15, seed=1).state_dict(), path := tmp_path / "net.safetensors")
    pipe = StableDiffusion.load(ckpt, device="cpu")
    optimizations.apply(pipe, names)
    net = pipe.controlnets.loaded[pipe.add_control(path)]
    x, context, hint = noise(2, 4, 32, 32), noise(2, 77, 768, seed=1), noise(1, 3, 256, 256, seed=2).sigmoid()
    oracle = oracles.diffusers_controlnet(net, SD15.unet)
    down, middle = oracle(x, 500, context, hint.expand(2, -1, -1, -1), return_dict=False)
    for ours, theirs in zip(net(x, torch.tensor(500), context, net.seen(hint)), [*down, middle], strict=True):
        assert theirs.std() > 1e-3
        assert relative_error(ours, theirs) < (BOUND if names == "none" else 3 * BOUND)


def test_a_lora_is_merged_and_taken_out(pipe, tmp_path):
    """Rank 16 in every attention, as most files have it; in double precision beside what is written down of it."""
    names = [name for name, m in pipe.unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    tensors = {}
    for i, name in enumerate(names):
        rows, columns = pipe.unet.get_submodule(name).weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = noise(16, columns, seed=i) / columns**0.5
        tensors[f"{key}.lora_up.weight"] = 0.1 * noise(rows, 16, seed=i + 1)
        tensors[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "style.safetensors")
    before = {name: pipe.unet.get_submodule(name).weight.clone() for name in names}
    pipe.add_lora(tmp_path / "style.safetensors", 0.7)
    for name in names:
        key = f"lora_unet_{name.replace('.', '_')}"
        up, down = (tensors[f"{key}.lora_{part}.weight"].double() for part in ("up", "down"))
        expected = before[name].double() + 0.7 * 8 / 16 * up @ down
        assert relative_error(pipe.unet.get_submodule(name).weight.double(), expected) < 1e-6
    pipe.remove_loras()
    assert all(torch.equal(pipe.unet.get_submodule(name).weight, before[name]) for name in names)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["plain", "variance near eps"])
def test_vae(pipe, scale):
    oracle = oracles.diffusers_vae(pipe.vae, SD15.vae)
    images = scale * noise(1, 3, 256, 256).clamp(-1, 1)
    expected = oracle.encode(images).latent_dist
    mean, logvar = pipe.vae.encode(images)
    assert relative_error(mean, expected.mean) < BOUND
    assert relative_error(logvar, expected.logvar) < BOUND
    latents = scale * noise(1, 4, 32, 32)
    assert relative_error(pipe.vae.decode(latents), oracle.decode(latents).sample) < BOUND


def test_pipeline(pipe):
    arguments = {"height": 256, "width": 256}
    ours = pipe.generate("a lighthouse in a storm", "blurry", steps=2, seed=3, **arguments)[0]
    theirs = diffusers_pipeline(pipe, oracles.ddpm_scheduler())(
        "a lighthouse in a storm",
        negative_prompt="blurry",
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(3),
        **arguments,
    ).images[0]
    assert detailed(ours)
    assert differ(ours, theirs) <= 1


@pytest.mark.parametrize(("steps", "strength"), [(100, 0.01), (4, 0.5), (2, 1.0)])
def test_image_to_image(pipe, steps, strength):
    assert_image_to_image_matches(pipe, oracles.ddpm_scheduler(), smooth_noise(256, 256), steps, strength)


PEAK = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""Between us and the command, since Linux counts the peak of who starts a process as the process's own."""


def test_command_line_from_a_ckpt(ckpt, tmp_path):
    command = [sys.executable, PROGRAM, "--ckpt", ckpt, "--prompt", "a lighthouse", "--steps", "2", "--seed", "1"]
    command += ["--height", "256", "--width", "256", "--out", tmp_path / "a.png", "--opt", "none"]
    result = subprocess.run([sys.executable, "-c", PEAK, *map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert read_parameters(tmp_path / "a.png")["steps"] == 2
    peak = int(result.stdout.splitlines()[-1]) / 2**20
    print(f"\n{result.stdout}peak memory {peak:.2f} GiB")
    weights = sum(p.numel() * 4 for m in random_sizes() for p in m) / 2**30
    assert peak < 1.25 * weights + 1.5  # the activations of 256x256 and PyTorch itself come on top


def random_sizes():
    from sd.models import build

    return (list(model.parameters()) for model in build(SD15))
