"""Products of short numbers against float64, on odd sizes, in each instruction set: with the numbers rounded as the
kernels round them, so that what is left is the error of their sums."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sd.kernels import dots
from sd.kernels.dots import Scale
from tests.kernels.support import error, numbers, terms

quick = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.usefixtures("every_set")
SUMS = 1e-6  # of fp32 sums
KINDS = ["bf16", "split", "int8"]
small = st.integers(1, 20)
channels = st.integers(1, 70)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def left(x: Tensor, kind: str, scale: Scale | None) -> Tensor:
    """What the kernels make of the left side, in float64."""
    if kind == "int8":
        # Two roundings of fp32, which may differ in what lies halfway.
        return ((x * scale.factor + scale.zero).clamp(0, 255).add(0.5).floor().double() - scale.zero) / scale.factor
    return bf16(x) if kind == "bf16" else bf16(x) + bf16(x - x.bfloat16().float())


def right(weight: Tensor, kind: str) -> Tensor:
    if kind != "int8":
        return left(weight, kind, None)
    scale = (weight.abs().flatten(1).amax(1).clamp(min=1e-12) / 127).view(-1, *[1] * (weight.ndim - 1))
    return (weight * (1 / scale)).round().double() * scale.double()


def scale_of(x: Tensor, kind: str) -> Scale | None:
    if kind != "int8":
        return None
    low, high = x.min().item(), x.max().item()
    factor = 255 / max(high - low, 1e-6)
    return Scale(factor, float(min(255, max(0, round(-low * factor)))))


def bound(kind: str) -> float:
    """split leaves out the product of both remainders, each 2^-9 of its number; int8 may round a half another way."""
    return {"bf16": SUMS, "split": 2e-5, "int8": 1e-3}[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 150), st.integers(1, 300), st.integers(1, 150), st.booleans(), st.booleans())
@quick
def test_linear(kind, rows, inner, columns, with_bias, with_residual):
    x, weight = numbers(rows, inner), numbers(columns, inner, seed=1)
    bias = numbers(columns, seed=2) if with_bias else None
    residual = numbers(rows, columns, seed=3) if with_residual else None
    scale = scale_of(x, kind)
    expected = left(x, kind, scale) @ right(weight, kind).t()
    for more in (bias, residual):
        expected = expected if more is None else expected + more
    panels = dots.pack(weight, kind, quantized=scale)
    y = dots.linear(dots.rows(x, kind, quantized=scale), panels, bias, residual)
    assert error(y, expected, terms(x, weight)) < bound(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(33, 5120, 40), (154, 768, 320), (70, 2560, 65)])
def test_linear_on_the_models_layers(kind, rows, inner, columns):
    x, weight = numbers(2, rows, inner), numbers(columns, inner, seed=1)
    scale = scale_of(x, kind)
    panels = dots.pack(weight, kind, quantized=scale)
    expected = left(x, kind, scale) @ right(weight, kind).t()
    assert error(dots.linear(dots.rows(x, kind, quantized=scale), panels), expected) < bound(kind)


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(4, 80), st.integers(1, 200), st.integers(8, 70))
@quick
def test_geglu(kind, rows, inner, columns):
    x, weight, bias = numbers(rows, inner), numbers(2 * columns, inner, seed=1) * inner**-0.5, numbers(2 * columns)
    scale = scale_of(x, kind)
    value, gate = F.linear(left(x, kind, scale), right(weight, kind), bias.double()).chunk(2, dim=-1)
    panels = dots.pack(weight, kind, geglu=True, quantized=scale)
    y = dots.linear(dots.rows(x, kind, quantized=scale), panels, bias)
    assert error(y, value * F.gelu(gate), value) < max(5e-6, 2 * bound(kind))


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 90))
@quick
def test_results_in_short_numbers(rows, inner, columns):
    x, weight = numbers(rows, inner), numbers(columns, inner, seed=1)
    a, panels = dots.rows(x, "bf16"), dots.pack(weight, "bf16")
    exact = dots.linear(a, panels)
    assert torch.equal(dots.linear(a, panels, out=torch.bfloat16), exact.bfloat16())
    scale = scale_of(exact, "int8")
    y = dots.linear(a, panels, out=torch.uint8, quantized=scale)
    expected = (exact * scale.factor + scale.zero).add(0.5).floor().clamp(0, 255)
    assert (y.float() - expected).abs().max() <= 1
    assert (y.float() != expected).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_weights_of_other_types(dtype, kind):
    x, weight = numbers(9, 50), numbers(30, 50, seed=1)
    weight[0, :6] = torch.tensor([0.0, -0.0, 6e-8, -3e-5, 6.1e-5, 65504.0])  # fp16's smallest, and its largest
    weight = weight.to(dtype)
    scale = scale_of(x, kind)
    a = dots.rows(x, kind, quantized=scale)
    y = dots.linear(a, dots.pack(weight, kind, quantized=scale))
    assert torch.equal(y, dots.linear(a, dots.pack(weight.float(), kind, quantized=scale)))


def norm_of(count: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(next(g for g in (4, 3, 2, 1) if count % g == 0), count)
    norm.weight.data, norm.bias.data = numbers(count, seed=8), numbers(count, seed=9)
    return norm.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@given(small, small, channels, st.integers(0, 20), channels, st.integers(1, 2), st.booleans(), st.booleans())
@quick
def test_convolution(kind, height, width, c_in, c_more, c_out, batch, normed, upsampled):
    x, weight = numbers(batch, c_in, height, width), numbers(c_out, c_in + c_more, 3, 3, seed=1)
    more = numbers(batch, c_more, height, width, seed=2) if c_more else None
    both = x if more is None else torch.cat([x, more], dim=1)
    norm = norm_of(c_in + c_more) if normed and height * width > 1 else None
    made = both if norm is None else F.silu(norm(both))
    large = F.interpolate(made, scale_factor=2.0) if upsampled else made
    scale = scale_of(made, kind)
    shift = numbers(batch, c_out, seed=3)
    expected = F.conv2d(left(large, kind, scale), right(weight, kind), padding=1) + shift[:, :, None, None]
    residual = numbers(*expected.shape, seed=4)
    grid = dots.grid(x, kind, more, norm, norm is not None, upsampled, scale)
    y = dots.conv(grid, dots.pack(weight, kind, quantized=scale), shift, residual)
    # A number that the norm made a little other may be rounded to the next one.
    loose = {"bf16": 1e-3, "split": 2e-5, "int8": 5e-3}[kind] if norm is not None else bound(kind)
    assert error(y, expected + residual, residual) < loose


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (7, 32), (2, 3)])
@pytest.mark.parametrize("moved", [False, True])
def test_convolution_of_every_second_position(kind, height, width, moved):
    x, weight = numbers(2, 40, height, width), numbers(24, 40, 3, 3, seed=1)
    scale = scale_of(x, kind)
    padded = F.pad(left(x, kind, scale), (0, 1, 0, 1) if moved else (1, 1, 1, 1))
    expected = F.conv2d(padded, right(weight, kind), stride=2)
    grid = dots.grid(x, kind, quantized=scale)
    y = dots.conv(grid, dots.pack(weight, kind, quantized=scale), stride=2, moved=moved)
    assert error(y, expected) < bound(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c_in", [36, 1920])
def test_pointwise_convolution(kind, c_in):
    x, weight = numbers(2, c_in, 5, 16), numbers(50, c_in, 1, 1, seed=1)
    scale = scale_of(x, kind)
    expected = F.conv2d(left(x, kind, scale), right(weight, kind))
    y = dots.conv(dots.grid(x, kind, quantized=scale), dots.pack(weight, kind, quantized=scale))
    assert error(y, expected) < bound(kind)


@given(st.integers(1, 40), st.integers(1, 200))
@quick
def test_layer_norm_before_a_product(rows, count):
    x, norm = numbers(rows, count) * 2 + 5, nn.LayerNorm(count)
    norm.weight.data, norm.bias.data = numbers(count, seed=1), numbers(count, seed=2)
    y = dots.rows(x, "bf16", norm)
    expected = F.layer_norm(x.double(), (count,), norm.weight.double(), norm.bias.double())
    assert not y[..., count:].any()
    assert error(y[..., :count].float(), expected) < 4e-3


@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 120), st.integers(1, 600), st.integers(1, 45))
@quick
def test_attention(batch, heads, queries, keys, half):
    q, k, v = (numbers(batch, n, heads, 2 * half, seed=n).bfloat16().transpose(1, 2) for n in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(dots.attention(q, k, v), expected) < 8e-3  # a number alone may be 4e-3 off


@pytest.mark.parametrize("size", [40, 80, 160, 512])
@pytest.mark.parametrize("scale", [1, 30])
def test_attention_of_sharp_scores(size, scale):
    q, k, v = (numbers(1, 2, 130, size, seed=s) for s in range(3))
    q, k, v = (q * scale).bfloat16(), k.bfloat16(), v.bfloat16()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert error(dots.attention(q, k, v), expected) < 5e-3


def test_no_number_is_lost_between_threads():
    """The same, whichever thread takes which part."""
    x, weight = numbers(700, 640), numbers(320, 640, seed=1)
    a, panels = dots.rows(x, "bf16"), dots.pack(weight, "bf16")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dots.linear(a, panels))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nan_and_infinity_stay():
    x, weight = numbers(40, 64), numbers(64, 64, seed=1)
    x[3, 5], x[7, 1] = float("nan"), float("inf")
    y = dots.linear(dots.rows(x, "bf16"), dots.pack(weight, "bf16"))
    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    assert y[8:].isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: dots.linear(dots.rows(numbers(4, 6), "bf16"), dots.pack(numbers(8, 70), "bf16")),
        lambda: dots.linear(numbers(4, 32), dots.pack(numbers(8, 32), "bf16")),
        lambda: dots.linear(dots.rows(numbers(4, 32), "bf16"), dots.pack(numbers(8, 32), "bf16"), numbers(7)),
        lambda: dots.linear(dots.rows(numbers(4, 32), "bf16"), dots.pack(numbers(8, 32), "bf16"), None, numbers(5, 8)),
        lambda: dots.linear(dots.rows(numbers(4, 32), "bf16"), dots.pack(numbers(8, 32), "bf16"), out=torch.uint8),
        lambda: dots.conv(dots.grid(numbers(1, 8, 4, 4), "bf16"), dots.pack(numbers(8, 9, 3, 3), "bf16")),
        lambda: dots.conv(dots.grid(numbers(1, 8, 4, 4), "split"), dots.pack(numbers(8, 8, 3, 3), "bf16")),
        lambda: dots.grid(numbers(1, 8, 4, 4), "bf16", numbers(1, 8, 4, 5)),
        lambda: dots.grid(numbers(1, 8, 4, 4), "bf16", norm=nn.GroupNorm(4, 12)),
        lambda: dots.grid(numbers(1, 8, 4, 4), "int8"),
        lambda: dots.rows(numbers(4, 8), "bf16", nn.LayerNorm(9)),
        lambda: dots.pack(numbers(8, 8), "int8"),
        lambda: dots.pack(numbers(7, 8), "bf16", geglu=True),
        lambda: dots.pack(numbers(8, 8, 5, 5), "bf16"),
        lambda: dots.pack(numbers(8, 8).double(), "bf16"),
        lambda: dots.attention(*[numbers(1, 2, 4, 7).bfloat16()] * 3),
        lambda: dots.attention(*[numbers(1, 2, 4, 8)] * 3),
        lambda: dots.attention(*(numbers(1, n, 4, 8).bfloat16() for n in (2, 1, 1))),
    ],
)
def test_what_does_not_fit(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert "\n" not in str(caught.value)
