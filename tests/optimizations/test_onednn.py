"""Weights in oneDNN's layout."""

import pytest
import torch

from bench.reference.numbers import relative_error
from sd.optimizations import OptimizationError, onednn
from tests.optimizations.support import CHANGES, EXACT_ON_CPU, KERNELS, assert_same, inputs

pytestmark = pytest.mark.skipif(not onednn.supported(), reason="this PyTorch has no oneDNN")


@pytest.fixture
def few_weights(monkeypatch):
    monkeypatch.setattr(onednn, "MIN_WEIGHTS", 0)


@pytest.mark.parametrize("rest", [False, True], ids=["alone", "with the rest"])
@torch.inference_mode()
def test_prepacked(make, few_weights, rest):
    fast = make("prepacked", *(name for name in EXACT_ON_CPU if rest and name not in (*KERNELS, "naive")))
    assert any(isinstance(m, onednn.PrepackedConv) for m in fast.unet.modules())
    assert any(isinstance(m, onednn.PrepackedLinear) for m in fast.unet.modules())
    assert_same(fast, make(), 1e-5)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_prepacked_sees_changed_weights(make, few_weights, change):
    fast, plain, given = make("prepacked"), make(), inputs()
    fast.unet(*given)
    change(fast.unet)
    change(plain.unet)
    assert relative_error(fast.unet(*given), plain.unet(*given)) < 1e-5


def test_prepacked_takes_large_layers_only(make):
    with pytest.raises(OptimizationError, match="prepacked finds nothing left to do"):
        make("prepacked")
