"""The Triton kernels against PyTorch in float64, on the CPU under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so the tests run in a process of their own, which the first
test here starts.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="fused kernels need Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_under_the_interpreter starts")

# One rounding to fp16 of a result is half a unit in the last place: 2**-11 of it at most, less on average.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2**-11}


@pytest.mark.skipif(INTERPRETED, reason="is the process itself")
def test_under_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def error(out: Tensor, reference: Tensor) -> float:
    assert out.shape == reference.shape
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def picture(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return noise(*shape, seed=seed, dtype=dtype).contiguous(memory_format=torch.channels_last)


def group_norm_module(groups: int, channels: int, eps: float, dtype: torch.dtype) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels, eps=eps)
    norm.load_state_dict({"weight": 1 + noise(channels, seed=1) / 10, "bias": noise(channels, seed=2) / 10})
    return norm.to(dtype).requires_grad_(False)


def in_fp64(norm: nn.Module, x: Tensor) -> Tensor:
    return type(norm).forward(norm.double(), x.double())


# ---- GroupNorm


@interpreted
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("way", ["whole", "split"])
@pytest.mark.parametrize(
    ("groups", "channels", "side"),
    [(32, 320, 8), (8, 24, 5), (4, 40, 17), (2, 192, 9)],
    ids=["SD 1.5's", "channels no power of two", "positions beyond a tile", "a group beyond a tile"],
)
def test_group_norm(groups, channels, side, way, dtype):
    from sd.kernels import gpu

    norm, x = group_norm_module(groups, channels, 1e-6, dtype), picture(2, channels, side, side, dtype=dtype)
    run = {"whole": gpu._group_norm_whole, "split": gpu._group_norm_split}[way]
    out = run(x, norm, silu=True, shift=None, bias=None)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, F.silu(in_fp64(norm, x))) < BOUNDS[dtype]


@interpreted
@pytest.mark.parametrize("way", ["whole", "split"])
@pytest.mark.parametrize("pictures", [1, 2], ids=["one shift for all", "a shift a picture"])
def test_group_norm_adds_the_shift_and_the_bias_first(way, pictures):
    from sd.kernels import gpu

    norm, x = group_norm_module(4, 24, 1e-5, torch.float32), picture(2, 24, 9, 7)
    row = noise(pictures, 100, seed=3)
    shift, bias = row[:, 10:34], noise(24, seed=4)  # a slice of a row, as the time table gives it
    run = {"whole": gpu._group_norm_whole, "split": gpu._group_norm_split}[way]
    reference = in_fp64(norm, x + shift[:, :, None, None] + bias[:, None, None])
    assert error(run(x, norm, silu=False, shift=shift, bias=bias), reference) < 1e-5


@interpreted
@pytest.mark.parametrize("way", ["whole", "split"])
def test_group_norm_far_from_zero(way):
    """A mean 1000 times the deviation: a variance from the sum of squares would have no digit right."""
    from sd.kernels import gpu

    norm, x = group_norm_module(4, 16, 1e-6, torch.float32), picture(1, 16, 40, 40) + 1000
    run = {"whole": gpu._group_norm_whole, "split": gpu._group_norm_split}[way]
    assert error(run(x, norm, silu=False, shift=None, bias=None), in_fp64(norm, x)) < 1e-4


@interpreted
@pytest.mark.parametrize("way", ["whole", "split"])
@pytest.mark.parametrize("eps", [1e-5, 1e-6, 1e-2])
def test_group_norm_uses_the_modules_eps(way, eps):
    from sd.kernels import gpu

    norm, x = group_norm_module(4, 16, eps, torch.float32), picture(1, 16, 8, 8) * eps**0.5
    run = {"whole": gpu._group_norm_whole, "split": gpu._group_norm_split}[way]
    assert error(run(x, norm, silu=False, shift=None, bias=None), in_fp64(norm, x)) < 1e-5


@interpreted
def test_group_norm_takes_any_layout_and_leaves_its_input_alone():
    from sd.kernels import gpu

    norm, x = group_norm_module(4, 16, 1e-5, torch.float32), noise(2, 16, 6, 10)
    before = x.clone()
    assert error(gpu.group_norm(x, norm), in_fp64(norm, x)) < 1e-5
    assert torch.equal(x, before)


@interpreted
def test_group_norm_picks_the_way_by_size():
    from sd.kernels import gpu

    for side, way in ((8, "_group_norm_whole"), (256, "_group_norm_split")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, way, lambda *args, way=way: way)
            norm = group_norm_module(4, 16, 1e-5, torch.float32)
            assert gpu.group_norm(picture(1, 16, side, side), norm) == way


# ---- the rest


@interpreted
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("biases", [1, 2])
def test_add_bias(biases, dtype):
    from sd.kernels import gpu

    x, residual = picture(2, 72, 5, 7, dtype=dtype), picture(2, 72, 5, 7, seed=1, dtype=dtype)
    added = [noise(72, seed=2 + i, dtype=dtype) for i in range(biases)]
    reference = x.double() + residual.double() + sum(added).double()[:, None, None]
    assert error(gpu.add_bias(x, residual, *added), reference) < 2 * BOUNDS[dtype]  # the sum is rounded here too


@interpreted
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("inner", [16, 48, 300])
def test_geglu(inner, biased, dtype):
    from sd.kernels import gpu

    x, bias = 3 * noise(2, 5, 2 * inner, dtype=dtype), noise(2 * inner, seed=1, dtype=dtype) if biased else None
    value, gate = (x.double() + (bias.double() if biased else 0)).chunk(2, dim=-1)
    assert error(gpu.geglu(x, bias), value * F.gelu(gate)) < BOUNDS[dtype]


@interpreted
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("rows", "depth", "inner"), [(128, 64, 64), (70, 40, 24)])
def test_geglu_with_its_product(rows, depth, inner, dtype):
    from sd.kernels.gpu_products import Tile, geglu_product

    x, weight = noise(2, rows // 2, depth, dtype=dtype), (noise(2 * inner, depth, seed=1) * 0.3).to(dtype)
    bias = noise(2 * inner, seed=2, dtype=dtype)
    for given in (bias, None):
        value, gate = F.linear(x.double(), weight.double(), given if given is None else given.double()).chunk(2, -1)
        assert error(geglu_product(x, weight, given, Tile(64, 16, 16)), value * F.gelu(gate)) < BOUNDS[dtype]


@interpreted
def test_gates_far_from_zero():
    """One row of x picks a column of gates: gelu of each, where an approximation of erf would be off the most."""
    from sd.kernels.gpu_products import Tile, geglu_product

    gates = torch.linspace(-6, 6, 16 * 8)
    weight = torch.stack([torch.ones(128), gates]).flatten()[:, None].expand(256, 16).contiguous()
    y = geglu_product(torch.eye(16)[:1].expand(2, 16), weight, None, Tile(16, 16, 16))
    expected = F.gelu(gates.double())
    assert ((y[0].double() - expected).abs() <= 2e-7 * gates.abs().clamp(min=1)).all()
    assert ((y[0].double() - expected).abs() <= 2e-2 * expected.abs() + 1e-12)[gates < -1].all()


@interpreted
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("batch", "channels", "height", "width", "out"), [(2, 64, 8, 8, 80), (1, 128, 3, 5, 32)])
def test_convolution_by_taps(batch, channels, height, width, out, dtype):
    from sd.kernels.gpu_products import Tile, conv3x3_split

    x, weight = picture(batch, channels, height, width, dtype=dtype), picture(out, channels, 3, 3, seed=1, dtype=dtype)
    bias = noise(out, seed=2, dtype=dtype)
    for given in (bias, None):
        expected = F.conv2d(x.double(), weight.double(), None if given is None else given.double(), padding=1)
        y = conv3x3_split(x, weight, given, Tile(64, 32, 32))
        assert error(y, expected) < BOUNDS[dtype]
        assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="no multiple of 48"):
        conv3x3_split(x, weight, None, Tile(64, 32, 48))


def layer_norm_module(channels: int, dtype: torch.dtype) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels)
    norm.load_state_dict({"weight": 1 + noise(channels, seed=1) / 10, "bias": noise(channels, seed=2) / 10})
    return norm.to(dtype).requires_grad_(False)


@interpreted
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("channels", [32, 320, 1280])
@pytest.mark.parametrize("added", [(), ("delta",), ("bias",), ("delta", "bias", "after")], ids="+".join)
def test_add_layer_norm(channels, added, dtype):
    from sd.kernels import gpu

    norm, x = layer_norm_module(channels, dtype), noise(2, 9, channels, seed=3, dtype=dtype)
    shapes = {"delta": x.shape, "bias": (channels,), "after": (channels,)}
    terms = {name: noise(*shapes[name], seed=i, dtype=dtype) for i, name in enumerate(added, start=4)}
    before = x.clone()
    total, y = gpu.add_layer_norm(x, norm, **terms)
    reference = x.double() + sum(terms[name].double() for name in added if name != "after")
    assert error(total, reference + (terms["after"].double() if "after" in added else 0)) < BOUNDS[dtype]
    assert error(y, in_fp64(norm, reference)) < BOUNDS[dtype]
    assert torch.equal(x, before)


@interpreted
@pytest.mark.parametrize("shape", [(2, 72, 5, 7), (1, 16, 9, 4), (1, 3, 1, 1)])
def test_upsample(shape):
    from sd.kernels import gpu

    x = noise(*shape)
    out = gpu.upsample(x)
    assert torch.equal(out, F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert out.is_contiguous(memory_format=torch.channels_last)


@interpreted
def test_accumulate_writes_to_the_total():
    from sd.kernels import gpu

    linear, h, total = nn.Linear(24, 40).requires_grad_(False), noise(2, 9, 24), noise(2, 9, 40, seed=1)
    expected = total.double() + h.double() @ linear.weight.double().t()
    out = gpu.accumulate(linear, h, total)
    assert out is total
    assert error(out, expected) < 1e-5


@interpreted
def test_no_picture_is_too_large_for_a_grid(monkeypatch):
    """Of a grid's second and third dimension CUDA takes 65,535 programs: the interpreter takes any."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: grids.append(grid)

    from sd.kernels import gpu

    for name in [name for name, one in vars(gpu).items() if hasattr(one, "fn") and name != "_silu"]:
        monkeypatch.setattr(gpu, name, Kernel())
    norm = torch.nn.GroupNorm(32, 128, device="meta")
    x = torch.empty(8, 128, 8192, 4096, device="meta", memory_format=torch.channels_last)
    gpu.group_norm(x, norm, silu=True)
    gpu.upsample(x)
    rows = torch.empty(2, 2**21, 320, device="meta")
    gpu.add_bias(x, x, norm.bias)
    gpu.geglu(torch.empty(2**22, 2560, device="meta"))
    gpu.add_layer_norm(rows, torch.nn.LayerNorm(320, device="meta"), rows)
    assert len(grids) >= 7
    for grid in grids:
        sizes = grid if isinstance(grid, tuple) else grid({})
        assert max(sizes[1:], default=1) < 2**16, grids
        assert sizes[0] < 2**31
