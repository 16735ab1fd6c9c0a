"""Winograd convolutions and the modules of the C++ kernels against float64, over sizes that are no whole tiles."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.reference.numbers import noise, relative_error
from sd import unet, vae
from sd.kernels import native
from sd.optimizations import cpu, winograd
from sd.optimizations.base import added
from sd.optimizations.winograd import NATIVE, Rates, Use, WinogradConv, WinogradUpsample

BOUND = 1e-5
no_compiler = pytest.mark.skipif(not native.compiler(), reason="there is no C++ compiler")
quick = settings(max_examples=25, deadline=None)
sides = st.integers(1, 23)
few = st.integers(1, 40)


def error(out: Tensor, reference: Tensor) -> float:
    assert reference.dtype == torch.float64
    return relative_error(out, reference)


def as_winograd(conv: nn.Conv2d, m: int, rates: Rates, in_cpp: bool, **options: bool) -> None:
    """Swap one layer as the switch does."""
    conv.__class__ = WinogradConv
    state = {
        "m": m,
        "rates": rates,
        "native": in_cpp,
        "kept": True,
        "upsampled": False,
        "kernel_stamp": None,
        **options,
    }
    for name, value in state.items():
        setattr(conv, name, value)


# ---- the algorithm


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_are_winograds(m):
    """One dimension: m outputs of a filter of 3, for unit inputs and unit kernels, exactly."""
    b, g, a = winograd.matrices(m, torch.float64)
    for d, kernel in itertools.product(torch.eye(m + 2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)):
        direct = torch.stack([d[i : i + 3] @ kernel for i in range(m)])
        assert torch.allclose(a @ ((g @ kernel) * (b @ d)), direct, atol=1e-14)


@pytest.mark.parametrize("m", [2, 4])
@given(sides, sides, few, few, st.integers(1, 3), st.booleans())
@quick
def test_any_size_in_float64(m, height, width, c_in, c_out, batch, with_bias):
    x, weight = noise(batch, c_in, height, width).double(), noise(c_out, c_in, 3, 3, seed=1).double()
    bias = noise(c_out, seed=2).double() if with_bias else None
    y = winograd.winograd_conv(x, winograd.transform_kernel(weight, m), bias, m)
    assert error(y, F.conv2d(x, weight, bias, padding=1)) < 1e-12


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("workspace", [1, 10**9])
def test_tile_rows_at_once_do_not_matter(m, workspace, monkeypatch):
    monkeypatch.setattr(winograd, "WORKSPACE", workspace)
    x, weight = noise(2, 320, 17, 18), noise(64, 320, 3, 3, seed=1)
    y = winograd.winograd_conv(x, winograd.transform_kernel(weight, m), None, m)
    assert error(y, F.conv2d(x.double(), weight.double(), padding=1)) < BOUND


# ---- which algorithm, where


def layers(*channels: tuple[int, int]) -> list[nn.Conv2d]:
    with torch.device("meta"):
        return [nn.Conv2d(a, b, 3, padding=1) for a, b in channels]


def test_plan_keeps_the_budget_and_spends_it_where_it_saves_most():
    wide, narrow = layers((1280, 1280), (320, 320))
    uses = [Use(wide, 2 * 16 * 16, 20), Use(narrow, 2 * 64 * 64, 20)]
    assert set(winograd.plan(uses, 10**10, NATIVE).values()) == {4}
    assert winograd.plan(uses, 0, NATIVE) == {wide: 0, narrow: 0}
    assert winograd.plan(uses, uses[1].bytes(4), NATIVE) == {wide: 0, narrow: 4}
    for budget in (10**7, 10**8, 2 * 10**8, 10**9):
        chosen = winograd.plan(uses, budget, NATIVE)
        assert sum(use.bytes(chosen[use.layer]) for use in uses) <= budget


def test_kernels_for_a_single_call_take_nothing():
    layer, other = layers((512, 512), (512, 512))
    chosen = winograd.plan([Use(layer, 64 * 64, 1), Use(other, 64 * 64, 2)], 0, NATIVE)
    assert chosen == {layer: 4, other: 0}


def test_weights_that_go_back_to_their_file_are_credited():
    (layer,) = layers((1280, 1280))
    use = Use(layer, 512, 20, replaced=4 * layer.weight.numel())
    assert use.bytes(4) == 3 * 4 * layer.weight.numel()


def test_only_what_it_is_for_is_swapped():
    assert winograd.is_winograd(nn.Conv2d(8, 3, 3, padding=1))
    for other in (nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1)):
        assert not winograd.is_winograd(other)
    assert not winograd.is_winograd(nn.Conv2d(8, 8, 3))


@pytest.mark.parametrize("in_cpp", [False, pytest.param(True, marks=no_compiler)])
@pytest.mark.parametrize(("m", "kept"), [(0, True), (2, True), (4, True), (4, False)])
@torch.no_grad()
def test_a_layer_in_every_way(m, kept, in_cpp):
    always = Rates(direct=1.0)
    conv = nn.Conv2d(16, 24, 3, padding=1)
    reference = nn.Conv2d(16, 24, 3, padding=1, dtype=torch.float64)
    reference.load_state_dict(conv.state_dict())
    as_winograd(conv, m, always, in_cpp, kept=kept)
    x, shift, residual = noise(2, 16, 9, 10), noise(2, 24, seed=1), noise(2, 24, 9, 10, seed=2)
    assert error(conv(x), reference(x.double())) < BOUND
    expected = reference(x.double()) + shift[:, :, None, None].double() + residual
    assert error(added(conv, x, shift, residual), expected) < BOUND
    conv.weight.mul_(2)
    assert (
        error(conv(x) - conv.bias[:, None, None], 2 * (reference(x.double()) - reference.bias[:, None, None])) < BOUND
    )


def test_small_grids_go_the_direct_way():
    conv = nn.utils.skip_init(nn.Conv2d, 1280, 1280, 3, padding=1)
    as_winograd(conv, 4, NATIVE, True)
    assert not conv.faster(torch.empty(2, 1280, 4, 4))
    assert conv.faster(torch.empty(2, 1280, 64, 64))


@pytest.mark.parametrize("in_cpp", [False, pytest.param(True, marks=no_compiler)])
@pytest.mark.parametrize("kind", [unet.Upsample, vae.Upsample])
@torch.no_grad()
def test_upsampling_within(kind, in_cpp):
    module = kind(32)
    reference = kind(32).double()
    reference.load_state_dict(module.state_dict())
    as_winograd(module.conv, 4, Rates(direct=1.0), in_cpp, upsampled=True)
    module.__class__ = WinogradUpsample
    x = noise(2, 32, 5, 7)
    assert error(module(x), reference(x.double())) < BOUND


# ---- modules


@no_compiler
@pytest.mark.parametrize(("channels", "stride", "padding"), [(4, 1, 1), (48, 2, 1), (48, 1, 1), (48, 2, 0)])
def test_convolutions_as_products_of_patches(channels, stride, padding):
    """Strided ones and those with few channels; the rest stays what it was."""
    layer = torch.nn.Conv2d(channels, 20, 3, stride, padding)
    x = noise(2, channels, 9, 12)
    expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, padding)
    suits = cpu.suits_patches(layer)
    assert suits == (padding == 1 and (stride == 2 or channels == 4))
    layer.__class__ = cpu.FastPatches if suits else type(layer)
    assert error(layer(x), expected) < 2e-6


@no_compiler
@torch.no_grad()
def test_whole_models_against_float64(make, monkeypatch):
    monkeypatch.setattr(winograd, "native_rates", lambda: Rates(direct=1.0))  # everywhere, whatever is faster
    fast = make("winograd", "cpu-linear", "cpu-attention", "cpu-norm")
    plain = make()
    net64, auto64 = plain.unet.double(), plain.vae.double()
    assert {m.m for m in fast.unet.modules() if isinstance(m, WinogradConv)} == {2, 4}
    x, context = noise(2, 4, 8, 16), noise(2, 77, 64, seed=1)
    expected = net64(x.double(), torch.tensor(500), context.double())
    assert error(fast.unet(x, torch.tensor(500), context), expected) < BOUND
    assert error(fast.vae.decode(x[:1]), auto64.decode(x[:1].double())) < BOUND


@torch.no_grad()
def test_the_budget_bounds_what_the_kernels_take(make, monkeypatch):
    monkeypatch.setattr(winograd, "native_rates", lambda: Rates(direct=1.0))
    monkeypatch.setattr(winograd, "Rates", lambda: Rates(direct=1.0))
    for gigabytes in ("0", "0.005", "1"):
        unet_ = make(f"winograd={gigabytes}").unet
        kept = [m for m in unet_.modules() if isinstance(m, WinogradConv) and m.m]
        taken = sum(4 * (m.m + 2) ** 2 * m.in_channels * m.out_channels for m in kept)
        assert taken <= float(gigabytes) * 1e9
        assert bool(kept) == (gigabytes != "0")
