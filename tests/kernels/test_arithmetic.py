"""The fp32 kernels against float64, over sizes that are no whole tiles or vectors, in each instruction set."""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sd.kernels import native
from tests.kernels.support import G, error, native_conv, numbers, terms

BOUND = 1e-5
quick = settings(max_examples=25, deadline=None)
sides = st.integers(1, 23)
few = st.integers(1, 40)
pytestmark = pytest.mark.usefixtures("every_set")


def test_the_set(every_set):
    assert native.instruction_set() == (every_set if every_set in native.SETS else native.sets()[-1])


@pytest.mark.parametrize("m", [2, 4])
@given(sides, sides, st.integers(1, 12), few, st.integers(1, 3), st.booleans(), st.booleans())
@quick
def test_winograd_at_any_size(m, height, width, vectors, c_out, batch, upsampled, channels_last):
    channels = native.vector() * vectors
    x, weight = numbers(batch, channels, height, width), numbers(c_out, channels, 3, 3, seed=1)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    shift = numbers(batch, c_out, seed=2)
    residual = numbers(batch, c_out, height << upsampled, width << upsampled, seed=3)
    large = F.interpolate(x, scale_factor=2.0) if upsampled else x
    expected = F.conv2d(large.double(), weight.double(), padding=1) + shift[:, :, None, None].double() + residual
    assert error(native_conv(x, weight, m, shift, residual, upsampled=upsampled), expected, residual) < BOUND


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize(("c_in", "c_out", "side"), [(320, 320, 16), (2560, 48, 8), (1280, 1280, 8), (128, 3, 65)])
def test_winograd_on_the_models_layers(m, c_in, c_out, side):
    x, weight = numbers(1, c_in, side, side), numbers(c_out, c_in, 3, 3, seed=1)
    assert error(native_conv(x, weight, m), F.conv2d(x.double(), weight.double(), padding=1)) < BOUND


@given(st.integers(1, 900), st.integers(1, 1000), st.integers(1, 70), st.booleans(), st.booleans())
@quick
def test_linear(rows, k, n, with_bias, with_residual):
    x, weight = numbers(rows, k), numbers(n, k, seed=1)
    bias = numbers(n, seed=2) if with_bias else None
    residual = numbers(rows, n, seed=3) if with_residual else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    expected = expected if residual is None else expected + residual.double()
    assert error(native.linear(x, weight, bias, residual), expected, terms(x, weight)) < 2e-6


def test_linear_reads_rows_apart_and_weights_in_any_layout():
    x, weight = numbers(50, 4, 96)[:, 1, :64], numbers(64, 24, seed=1).t()
    assert error(native.linear(x, weight), x.double() @ weight.double().t()) < 2e-6


@given(st.integers(1, 900), st.integers(1, 400), st.integers(1, 20))
@quick
def test_geglu(rows, k, panels):
    columns = native.panel() * panels
    x, weight, bias = numbers(rows, k), numbers(columns, k, seed=1) * k**-0.5, numbers(columns, seed=2)
    value, gate = F.linear(x.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    assert error(native.geglu(x, weight, bias), value * F.gelu(gate), value) < 5e-6


@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17), st.integers(1, 3))
@quick
def test_patches(batch, channels, height, width, stride):
    x = numbers(batch, channels, height, width)
    patches = native.patches(x, stride)
    assert torch.equal(patches.flatten(1, 2), F.unfold(x, 3, padding=1, stride=stride).transpose(1, 2))


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 120), st.integers(1, 600), st.integers(1, 90))
@quick
def test_attention(batch, heads, queries, keys, size):
    q, k, v = (numbers(batch, n, heads, size, seed=n).transpose(1, 2) for n in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(native.attention(q, k, v), expected) < 5e-6


@pytest.mark.parametrize("size", [40, 80, 160, 512])
@pytest.mark.parametrize("scale", [1, 30])
def test_attention_of_sharp_scores(size, scale):
    q, k, v = (numbers(1, 2, 130, size, seed=s) for s in range(3))
    q = q * scale
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(native.attention(q, k, v), expected) < BOUND


@given(st.integers(1, 2), st.integers(1, 8), sides, sides, st.sampled_from([1, 4, 8]), st.booleans())
@quick
def test_group_norm(batch, vectors, height, width, groups, silu):
    channels = math.lcm(native.vector(), groups) * vectors
    x, weight, bias = numbers(batch, channels, height, width) * 3 + 20, numbers(channels), numbers(channels, seed=1)
    flat = x.double().reshape(batch, groups, -1)
    scale = 1 / (flat.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    gain = weight.double()[:, None, None]
    expected = ((flat - flat.mean(-1, keepdim=True)) * scale).view(x.shape) * gain + bias.double()[:, None, None]
    expected = F.silu(expected) if silu else expected
    # x * factor + summand: factor and summand are rounded, and cancel where the variance is small beside the mean.
    rounding = 2**-23 * ((flat * scale).view(x.shape) * gain).norm() / expected.norm()
    assert error(native.group_norm(x, groups, weight, bias, 1e-6, silu), expected) < BOUND + 1.1 * rounding


@given(st.integers(1, 70), st.integers(1, 200))
@quick
def test_layer_norm(rows, vectors):
    channels = native.vector() * vectors
    x, weight, bias = numbers(rows, channels) * 2 + 5, numbers(channels), numbers(channels, seed=1)
    expected = F.layer_norm(x.double(), (channels,), weight.double(), bias.double())
    assert error(native.layer_norm(x, weight, bias, 1e-5), expected) < 2e-6


def test_nan_stays_nan():
    x, weight = numbers(1, 16, 8, 8), numbers(16, 16, 3, 3)
    x[0, 0, 3, 3] = float("nan")
    assert native_conv(x, weight, 4).isnan().any()
    assert native.group_norm(x, 4, weight[0, :, 0, 0], weight[1, :, 0, 0], 1e-5, True).isnan().any()


# ---- what is refused


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.linear(numbers(4, 6), numbers(8, 7)),
        lambda: native.linear(numbers(4, 6), numbers(8, 6), numbers(7)),
        lambda: native.linear(numbers(4, 6), numbers(8, 6), None, numbers(5, 8)),
        lambda: native.geglu(numbers(4, 6), numbers(native.panel() + 2, 6), numbers(native.panel() + 2)),
        lambda: native.attention(numbers(1, 2, 4, 8), numbers(1, 1, 4, 8), numbers(1, 1, 4, 8)),
        lambda: native.attention(numbers(1, 2, 4, 8), numbers(1, 2, 4, 8), numbers(1, 2, 5, 8)),
        lambda: native_conv(numbers(1, native.vector() + 1, 8, 8), numbers(8, native.vector() + 1, 3, 3), 4),
        lambda: native_conv(numbers(1, 16, 8, 8), numbers(8, 8, 3, 3), 4),
        lambda: native_conv(numbers(1, 8, 8, 8), numbers(8, 8, 3, 3), 4, numbers(2, 8)),
        lambda: native_conv(numbers(1, 8, 8, 8), numbers(8, 8, 3, 3), 4, None, numbers(1, 8, 8, 9)),
        lambda: native.winograd_kernel(numbers(8, 8, 1, 1), G[4], False),
        lambda: native.group_norm(numbers(1, native.vector() + 1, 4, 4), 1, numbers(9), numbers(9), 1e-5),
        lambda: native.group_norm(numbers(1, 16, 4, 4), 3, numbers(16), numbers(16), 1e-5),
        lambda: native.layer_norm(numbers(3, 16), numbers(8), numbers(16), 1e-5),
    ],
)
def test_shapes_that_do_not_fit(call):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.linear(numbers(4, 6).double(), numbers(8, 6)),
        lambda: native.linear(numbers(4, 6), numbers(8, 6).half()),
        lambda: native.linear(numbers(4, 6), torch.empty(8, 6, device="meta")),
        lambda: native.linear(numbers(0, 6), numbers(8, 6)),
        lambda: native.winograd_kernel(numbers(8, 8, 3, 3), G[4].float(), False),
    ],
)
def test_what_is_no_memory_of_fp32(call):
    with pytest.raises(ctypes.ArgumentError):
        call()
