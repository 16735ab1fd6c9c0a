"""make("kv-cache", ...) and loaded("fp16", ...): small pipelines, without a file and from one."""

import pytest

from bench.reference.weights import TINY
from sd.pipeline import StableDiffusion
from sd.tokenizer import Tokenizer
from tests.optimizations.support import fresh, with_optimizations
from tests.weights import random_models


@pytest.fixture(scope="session")
def models():
    return random_models(TINY)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer()


@pytest.fixture
def make(tokenizer):
    """make("kv-cache", ...) -> a pipeline of its own weights, from no file, with these optimizations."""
    return lambda *names: with_optimizations(fresh(tokenizer), *names)


@pytest.fixture
def loaded(tiny_checkpoint, tokenizer):
    """loaded("fp16", ...) -> a pipeline whose weights are a file's."""

    def loaded(*names: str, **options) -> StableDiffusion:
        pipe = StableDiffusion.load(tiny_checkpoint, "cpu", **options)
        pipe.tokenizer = tokenizer
        return with_optimizations(pipe, *names)

    return loaded
