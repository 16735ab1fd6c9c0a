"""Small pipelines with optimizations, and calls of them."""

import torch
from torch import Tensor, nn

from bench.reference.numbers import noise, relative_error
from bench.reference.weights import Models
from sd import optimizations
from sd.config import Config
from sd.pipeline import StableDiffusion
from sd.tokenizer import Tokenizer
from tests.weights import SHALLOW, Copier

CPU = torch.device("cpu")
KERNELS = ("winograd", "cpu-linear", "cpu-attention", "cpu-norm")
EXACT_ON_CPU = (
    *KERNELS,
    "naive",
    "attention",
    "channels-last",
    "pointwise-linear",
    "packed-qkv",
    "kv-cache",
    "time-cache",
    "shared-halves",
    "async-noise",
    "keep-memory",
)
"""Exact switches that find something to do in a small model on a CPU."""

DRAW = {"steps": 4, "height": 16, "width": 16, "seed": 3}


def fresh(models: Models, tokenizer: Tokenizer | None = None, config: Config = SHALLOW) -> StableDiffusion:
    """A plain pipeline with copies of these weights, that came from no file."""
    return StableDiffusion(config, *Copier(models)(), tokenizer=tokenizer)


def with_optimizations(pipe: StableDiffusion, *names: str) -> StableDiffusion:
    optimizations.apply(pipe, names)
    return pipe


def inputs(batch: int = 2, side: int = 8, t: int = 541, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context of a call of a UNet."""
    return noise(batch, 4, side, side, seed=seed), torch.tensor(t), noise(batch, 77, 64, seed=seed + 1)


def assert_same(fast: StableDiffusion, plain: StableDiffusion, bound: float) -> None:
    """The three networks give the same within a relative bound, change no input, and have the same state dict."""
    for batch, side, t in ((2, 8, 541), (1, 8, 1), (2, 16, 981), (2, 8, 21)):
        given = inputs(batch, side, t)
        kept = [tensor.clone() for tensor in given]
        assert relative_error(fast.unet(*given), plain.unet(*given)) <= bound
        assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    latents, tokens = noise(1, 4, 8, 8), torch.arange(154).view(2, 77)
    assert relative_error(fast.vae.decode(latents), plain.vae.decode(latents)) <= bound
    assert relative_error(fast.clip(tokens), plain.clip(tokens)) <= bound
    for a, b in ((fast.unet, plain.unet), (fast.vae, plain.vae), (fast.clip, plain.clip)):
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def change_in_place(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(1.1)


def replace(model: nn.Module) -> None:
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def load(model: nn.Module) -> None:
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})


CHANGES = (change_in_place, replace, load)
"""The ways in which somebody else's code writes weights."""
