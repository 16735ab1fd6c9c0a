"""Winograd convolutions and the modules of the C++ kernels against float64, over sizes that are no whole tiles."""

import ctypes
import itertools
import mmap
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.load import resident
from bench.reference.weights import TINY, random_models
from sd import cpu, inference, optimize, unet, vae, winograd
from sd.checkpoints.mapped import mapped, page_out
from sd.jobs import UserError
from sd.kernels import native as cpu_kernels
from sd.winograd import NATIVE, Rates, Use, WinogradConv

BOUND = 1e-5
no_compiler = pytest.mark.skipif(not cpu_kernels.compiler(), reason="there is no C++ compiler")
quick = settings(max_examples=25, deadline=None)
sides = st.integers(1, 23)
few = st.integers(1, 40)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    assert reference.dtype == torch.float64
    return ((out.double() - reference).norm() / reference.norm().clamp(min=1e-30)).item()


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
    x, weight = numbers(batch, c_in, height, width).double(), numbers(c_out, c_in, 3, 3, seed=1).double()
    bias = numbers(c_out, seed=2).double() if with_bias else None
    y = winograd.winograd_conv(x, winograd.transform_kernel(weight, m), bias, m)
    assert error(y, F.conv2d(x, weight, bias, padding=1)) < 1e-12


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("workspace", [1, 10**9])
def test_tile_rows_at_once_do_not_matter(m, workspace, monkeypatch):
    monkeypatch.setattr(winograd, "WORKSPACE", workspace)
    x, weight = numbers(2, 320, 17, 18), numbers(64, 320, 3, 3, seed=1)
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


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=no_compiler)])
@pytest.mark.parametrize(("m", "kept"), [(0, True), (2, True), (4, True), (4, False)])
@torch.no_grad()
def test_a_layer_in_every_way(m, kept, native):
    always = Rates(direct=1.0)
    conv = nn.Conv2d(16, 24, 3, padding=1)
    reference = nn.Conv2d(16, 24, 3, padding=1, dtype=torch.float64)
    reference.load_state_dict(conv.state_dict())
    winograd.use_winograd({conv: m}, always, native, kept)
    x, shift, residual = numbers(2, 16, 9, 10), numbers(2, 24, seed=1), numbers(2, 24, 9, 10, seed=2)
    assert error(conv(x), reference(x.double())) < BOUND
    expected = reference(x.double()) + shift[:, :, None, None].double() + residual
    assert error(conv.run(x, shift, residual), expected) < BOUND
    conv.weight.mul_(2)
    assert (
        error(conv(x) - conv.bias[:, None, None], 2 * (reference(x.double()) - reference.bias[:, None, None])) < BOUND
    )


def test_small_grids_go_the_direct_way():
    conv = nn.utils.skip_init(nn.Conv2d, 1280, 1280, 3, padding=1)
    winograd.use_winograd({conv: 4}, NATIVE, True)
    assert not conv.faster(torch.empty(2, 1280, 4, 4))
    assert conv.faster(torch.empty(2, 1280, 64, 64))


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=no_compiler)])
@pytest.mark.parametrize("kind", [unet.Upsample, vae.Upsample])
@torch.no_grad()
def test_upsampling_within(kind, native):
    module = kind(32)
    reference = kind(32).double()
    reference.load_state_dict(module.state_dict())
    winograd.use_winograd({module.conv: 4}, Rates(direct=1.0), native)
    winograd.upsample_within(module)
    x = numbers(2, 32, 5, 7)
    assert error(module(x), reference(x.double())) < BOUND


# ---- modules


@no_compiler
@pytest.mark.parametrize(("channels", "stride", "padding"), [(4, 1, 1), (48, 2, 1), (48, 1, 1), (48, 2, 0)])
def test_convolutions_as_products_of_patches(channels, stride, padding):
    """Strided ones and those with few channels; the rest stays what it was."""
    layer = torch.nn.Conv2d(channels, 20, 3, stride, padding)
    holder, x = torch.nn.ModuleList([layer]), numbers(2, channels, 9, 12)
    expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), stride, padding)
    cpu.fast_linear(holder)
    assert (type(layer) is cpu.FastPatches) == (padding == 1 and (stride == 2 or channels == 4))
    assert error(layer(x), expected) < 2e-6


@no_compiler
@torch.no_grad()
def test_whole_models_against_float64():
    _, net, auto = random_models(TINY)
    _, net64, auto64 = random_models(TINY)
    net64.double(), auto64.double()
    for model in (net, auto):
        chosen = {m: 4 for m in model.modules() if winograd.is_winograd(m)}
        winograd.use_winograd(chosen, Rates(direct=1.0), True)
        winograd.upsample_within(model)
    for swap in (cpu.fast_linear, cpu.use_fast_attention, cpu.fast_norms):
        swap(net, auto)
    assert any(isinstance(m, WinogradConv) for m in net.modules())
    x, context = numbers(2, 4, 8, 16), numbers(2, 77, 64, seed=1)
    expected = net64(x.double(), torch.tensor(500), context.double())
    assert error(net(x, torch.tensor(500), context), expected) < BOUND
    assert error(auto.decode(x[:1]), auto64.decode(x[:1].double())) < BOUND


# ---- memory


def test_page_out_loses_nothing(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(numbers(1 << 20).numpy().tobytes())
    from_file = torch.from_file(str(path), shared=False, size=1 << 20)
    own = from_file.clone()
    assert mapped([own, from_file]) == [from_file]
    for tensor in (from_file, own, own[5:9]):
        page_out(tensor)
    assert torch.equal(from_file, own)
    own[4321] = from_file[4321] = 7
    page_out(from_file)
    assert torch.equal(from_file, own)


def test_paged_out_weights_leave_the_process(tmp_path):
    path, size = tmp_path / "zeros", 64 << 20
    with path.open("wb") as file:
        file.write(bytes(size))
        os.fsync(file.fileno())  # the system drops only pages that are on the disk
    from_file = torch.from_file(str(path), shared=False, size=size // 4)
    assert from_file.sum() == 0
    before = resident()["VmRSS"]
    page_out(from_file)
    assert resident()["VmRSS"] < before - 0.9 * size
    assert in_the_systems_cache(from_file)


def in_the_systems_cache(tensor: Tensor) -> bool:
    """Whether all pages of a mapped tensor would be found without reading the file."""
    found = (ctypes.c_ubyte * (tensor.nbytes // mmap.PAGESIZE))()
    result = ctypes.CDLL(None).mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), found)
    return result == 0 and all(page & 1 for page in found)


@pytest.mark.parametrize(
    ("budget", "names"),
    [("low", "winograd=0.40,page-out"), ("8", "winograd=3.40,page-out"), ("4.5", "winograd=0.00,page-out")],
)
def test_memory_budget(budget, names):
    assert inference.memory_options(budget) == names
    assert optimize.parse(f"cpu,{names}", "cpu")


@pytest.mark.parametrize("budget", ["", "x", "3", "nan", "-8"])
def test_memory_budget_refuses(budget):
    with pytest.raises(UserError, match="--memory-budget must be low"):
        inference.memory_options(budget)
