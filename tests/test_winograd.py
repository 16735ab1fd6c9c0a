"""Winograd convolutions and the C++ kernels against float64, over sizes that are no whole tiles, vectors or panels."""

import ctypes
import itertools
import logging
import mmap
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bench import cpu_builds, cpu_profile
from bench.load import resident
from bench.reference.weights import TINY, random_models
from sd import cpu, cpu_kernels, memory, optimizations, optimize, unet, vae, winograd
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


# ---- the C++ kernels


def native_conv(x: Tensor, weight: Tensor, m: int, *more: Tensor | None, upsampled: bool = False) -> Tensor:
    kernel = cpu_kernels.winograd_kernel(weight, winograd.matrices(m, torch.float64)[1], upsampled)
    return cpu_kernels.winograd(x, kernel, weight.shape[0], *more, upsampled=upsampled, m=m)


@no_compiler
@pytest.mark.parametrize("m", [2, 4])
@given(sides, sides, st.integers(1, 12), few, st.integers(1, 3), st.booleans(), st.booleans())
@quick
def test_native_at_any_size(m, height, width, vectors, c_out, batch, upsampled, channels_last):
    x, weight = numbers(batch, 8 * vectors, height, width), numbers(c_out, 8 * vectors, 3, 3, seed=1)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    shift = numbers(batch, c_out, seed=2)
    residual = numbers(batch, c_out, height << upsampled, width << upsampled, seed=3)
    large = F.interpolate(x, scale_factor=2.0) if upsampled else x
    expected = F.conv2d(large.double(), weight.double(), padding=1) + shift[:, :, None, None].double() + residual
    assert error(native_conv(x, weight, m, shift, residual, upsampled=upsampled), expected) < BOUND


@no_compiler
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(("c_in", "c_out", "side"), [(320, 320, 16), (2560, 48, 8), (1280, 1280, 8), (128, 3, 65)])
def test_native_on_the_models_layers(m, c_in, c_out, side):
    x, weight = numbers(1, c_in, side, side), numbers(c_out, c_in, 3, 3, seed=1)
    assert error(native_conv(x, weight, m), F.conv2d(x.double(), weight.double(), padding=1)) < BOUND


@no_compiler
@given(st.integers(1, 900), st.integers(1, 1000), st.integers(1, 70), st.booleans(), st.booleans())
@quick
def test_linear(rows, k, n, with_bias, with_residual):
    x, weight = numbers(rows, k), numbers(n, k, seed=1)
    bias = numbers(n, seed=2) if with_bias else None
    residual = numbers(rows, n, seed=3) if with_residual else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = expected if residual is None else expected + residual.double()
    assert error(cpu_kernels.linear(x, weight, bias, residual), expected) < 2e-6


@no_compiler
def test_linear_reads_rows_apart_and_weights_in_any_layout():
    x, weight = numbers(50, 4, 96)[:, 1, :64], numbers(64, 24, seed=1).t()
    assert error(cpu_kernels.linear(x, weight), x.double() @ weight.double().t()) < 2e-6


@no_compiler
@given(st.integers(1, 900), st.integers(1, 400), st.integers(1, 20))
@quick
def test_geglu(rows, k, eights):
    x, weight, bias = numbers(rows, k), numbers(16 * eights, k, seed=1) * k**-0.5, numbers(16 * eights, seed=2)
    value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    assert error(cpu_kernels.geglu(x, weight, bias), value * F.gelu(gate)) < 5e-6


@no_compiler
@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17), st.integers(1, 3))
@quick
def test_patches(batch, channels, height, width, stride):
    x = numbers(batch, channels, height, width)
    patches = cpu_kernels.patches(x, stride)
    assert torch.equal(patches.flatten(1, 2), F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2))


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
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 120), st.integers(1, 600), st.integers(1, 90))
@quick
def test_attention(batch, heads, queries, keys, size):
    q, k, v = (numbers(batch, n, heads, size, seed=n).transpose(1, 2) for n in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(cpu_kernels.attention(q, k, v), expected) < 5e-6


@no_compiler
@pytest.mark.parametrize("size", [40, 80, 160, 512])
@pytest.mark.parametrize("scale", [1, 30])
def test_attention_of_sharp_scores(size, scale):
    q, k, v = (numbers(1, 2, 130, size, seed=s) for s in range(3))
    q = q * scale
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(cpu_kernels.attention(q, k, v), expected) < BOUND


@no_compiler
@given(st.integers(1, 2), st.integers(1, 8), sides, sides, st.sampled_from([1, 4, 8]), st.booleans())
@quick
def test_group_norm(batch, vectors, height, width, groups, silu):
    channels = 8 * vectors
    x, weight, bias = numbers(batch, channels, height, width) * 3 + 20, numbers(channels), numbers(channels, seed=1)
    flat = x.double().reshape(batch, groups, -1)
    normal = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    expected = normal.view(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    expected = F.silu(expected) if silu else expected
    # Where the variance is near eps, x * scale + shift cancels: PyTorch's own rounds as much then.
    plain = torch.group_norm(x, groups, weight, bias, 1e-6)
    bound = max(BOUND, 2 * error(F.silu(plain) if silu else plain, expected))
    assert error(cpu_kernels.group_norm(x, groups, weight, bias, 1e-6, silu), expected) < bound


@no_compiler
def test_layer_norm():
    x, weight, bias = numbers(3, 50, 72) * 2 + 5, numbers(72), numbers(72, seed=1)
    expected = F.layer_norm(x.double(), (72,), weight.double(), bias.double())
    assert error(cpu_kernels.layer_norm(x, weight, bias, 1e-5), expected) < 2e-6


@no_compiler
def test_nan_stays_nan():
    x, weight = numbers(1, 8, 8, 8), numbers(8, 8, 3, 3)
    x[0, 0, 3, 3] = float("nan")
    assert native_conv(x, weight, 4).isnan().any()
    assert cpu_kernels.group_norm(x, 4, weight[0, :, 0, 0], weight[1, :, 0, 0], 1e-5, True).isnan().any()


# ---- building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """The kernels as in a new process, with an empty cache folder."""
    monkeypatch.setenv("SD_CACHE", str(tmp_path / "cache"))
    cpu_kernels.load.cache_clear()
    yield tmp_path / "cache"
    cpu_kernels.load.cache_clear()


@no_compiler
def test_build_once(fresh, caplog):
    with caplog.at_level(logging.INFO):
        assert cpu_kernels.load() is not None
        cpu_kernels.load.cache_clear()
        assert cpu_kernels.load() is not None
    assert caplog.text.count("built the CPU kernels") == 1
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def without_compiler(monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")


def test_no_compiler(fresh, monkeypatch, caplog):
    without_compiler(monkeypatch)
    assert cpu_kernels.load() is None
    assert "no C++ compiler" in caplog.text


@no_compiler
def test_a_source_that_does_not_compile(fresh, monkeypatch, tmp_path, caplog):
    (tmp_path / "broken.cpp").write_text("#error no such instructions\n")
    monkeypatch.setattr(cpu_kernels, "SOURCE", tmp_path / "broken.cpp")
    assert cpu_kernels.load() is None
    assert "could not be built" in caplog.text
    assert not list(fresh.iterdir())


def test_a_cache_folder_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SD_CACHE", str(tmp_path / "file"))
    assert cpu_kernels.load() is None


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
    assert memory.mapped([own, from_file]) == [from_file]
    for tensor in (from_file, own, own[5:9]):
        memory.page_out(tensor)
    assert torch.equal(from_file, own)
    own[4321] = from_file[4321] = 7
    memory.page_out(from_file)
    assert torch.equal(from_file, own)


def test_paged_out_weights_leave_the_process(tmp_path):
    path, size = tmp_path / "zeros", 64 << 20
    with path.open("wb") as file:
        file.write(bytes(size))
        os.fsync(file.fileno())  # the system drops only pages that are on the disk
    from_file = torch.from_file(str(path), shared=False, size=size // 4)
    assert from_file.sum() == 0
    before = resident()["VmRSS"]
    memory.page_out(from_file)
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
    assert optimizations.within(budget) == names
    assert optimize.parse(f"cpu,{names}", "cpu")


@pytest.mark.parametrize("budget", ["", "x", "3", "nan", "-8"])
def test_memory_budget_refuses(budget):
    with pytest.raises(optimizations.OptimizationError, match="memory budget must be low"):
        optimizations.within(budget)


# ---- the profile


@no_compiler
def test_profile_counts_the_operations_of_the_direct_way(monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_call", cpu_kernels._call)
    clock = cpu_profile.Clock()
    cpu_kernels.linear(numbers(6, 16), numbers(32, 16))
    cpu_kernels.attention(*(numbers(1, 2, 24, 8) for _ in range(3)))
    native_conv(numbers(1, 8, 8, 8), numbers(16, 8, 3, 3), 4)
    assert clock.flops["sd_linear 6 x 16 x 32"] == 2 * 6 * 16 * 32
    assert clock.flops["sd_attention 24 x 24, heads of 8"] == 4 * 2 * 24 * 24 * 8
    assert clock.flops["sd_winograd F(4x4) at 8x8"] == 2 * 9 * 8 * 8 * 8 * 16
    assert set(clock.calls.values()) == {1}


@no_compiler
def test_a_build_beside_another(monkeypatch):
    for name in ("SOURCE", "load"):
        monkeypatch.setattr(cpu_kernels, name, getattr(cpu_kernels, name))  # is put back afterwards
    builds = [cpu_builds.build(cpu_kernels.SOURCE)] * 2
    for case in (cpu_builds.linear(6, 16, 32), cpu_builds.attention(24, 24, 8), cpu_builds.convolution(4, 8, 8, 16)):
        row = cpu_builds.compare(builds, case, rounds=3)
        assert row["kernel"] == case.label
        assert float(row["speed-up"].split()[0]) > 0


def test_a_source_that_cannot_be_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpu_kernels, "SOURCE", cpu_kernels.SOURCE)
    (tmp_path / "other.cpp").write_text("no C++")
    for name in ("other.cpp", "missing.cpp"):
        assert cpu_builds.main([str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
