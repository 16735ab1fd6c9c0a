"""Weights in 16 bits."""

import pytest
import torch

from sd.optimizations import OptimizationError
from tests.optimizations.support import DRAW


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@torch.inference_mode()
def test_dtypes(make, name):
    pipe, dtype = make(name), {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    assert pipe.dtype == dtype
    assert all(p.dtype == dtype for m in (pipe.clip, pipe.unet, pipe.vae) for p in m.parameters())
    assert pipe.generate("a cat", **DRAW)


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_says_when_the_cpu_lacks_it(make, monkeypatch, caplog, supported):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    make("bf16")
    assert ("10 times slower" in caplog.text) is not supported


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_what_is_so_already_is_not_applied(loaded, name, dtype):
    with pytest.raises(OptimizationError, match=f"{name}: the pipeline is in"):
        loaded(name, dtype=dtype)
