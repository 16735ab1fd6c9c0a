"""make("kv-cache", ...) and loaded("fp16", ...): small pipelines, without a file and from one."""

import pytest

from sd.config import Config
from sd.kernels import dots, native
from sd.optimizations import dot_layers
from sd.pipeline import StableDiffusion
from sd.tokenizer import Tokenizer
from tests.optimizations.support import with_optimizations
from tests.weights import SHALLOW, random_models


@pytest.fixture(scope="session")
def models():
    return random_models(SHALLOW)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()


@pytest.fixture
def make(tokenizer):
    """make("kv-cache", ...) -> a pipeline of its own weights, from no file, with these optimizations."""

    def make(*names: str, config: Config = SHALLOW) -> StableDiffusion:
        return with_optimizations(StableDiffusion(config, *random_models(config), tokenizer=tokenizer), *names)

    return make


@pytest.fixture
def as_if_there_were_amx(monkeypatch):
    """Short numbers are multiplied fast, and the VAE's too: by other instructions, which do the same on any CPU."""
    if native.load() is None:
        pytest.skip(native.why_not())
    monkeypatch.setattr(dots, "fast", lambda: True)
    monkeypatch.setattr(dot_layers, "with_vae", lambda: True)


@pytest.fixture
def loaded(shallow_checkpoint):
    """loaded("fp16", ...) -> a pipeline whose weights are a file's."""

    def loaded(*names: str, **options) -> StableDiffusion:
        return with_optimizations(StableDiffusion.load(shallow_checkpoint, "cpu", **options), *names)

    return loaded
