"""What the tests of checkpoints share: small models, and what is the same of all that loads and all that does not."""

from pathlib import Path

import pytest
import torch
import torch.distributed.tensor  # registers its own when something first imports it: now

from bench.reference.weights import Models, tiny_config
from sd import model_loader
from sd.checkpoints.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
SMALL = tiny_config(
    text={"vocab_size": 64, "layers": 1, "max_length": 7},
    unet={"channel_mult": (1, 2), "attention_levels": (0,)},
    vae={"ch_mult": (1, 2)},
)
"""Two levels and a short token table: what most of these tests load."""


def assert_same(loaded: Models, expected: Models, dtype: torch.dtype = torch.float32) -> None:
    for ours, theirs in zip(loaded, expected, strict=True):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for name, tensor in ours.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, state[name].to(dtype)), name


def registered() -> set:
    """What torch's unpickler takes for safe: a set, whose order is not stable."""
    return set(torch.serialization.get_safe_globals())


def error_of(path: Path, **options) -> str:
    """The loader's error, which is one line, begins with the file, and leaves nothing registered."""
    before = registered()
    with pytest.raises(CheckpointError) as caught:
        model_loader.load(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 700
    assert registered() == before
    return message
