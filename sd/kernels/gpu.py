"""Triton kernels for channels-last activations: what stands between two matrix products, in one pass each.

Between its matrix products a UNet only moves memory: normalize, scale, activate, add. PyTorch does each of these in a
pass of its own; a kernel here does in one pass what stands between two products. All arithmetic is in fp32, rounded
once at the end, so that the results are nearer to the fp32 model than those of the plain modules in fp16.

They run on NVIDIA GPUs, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before the import).
Axes: B batch, L = H*W positions, C channels, G groups of a GroupNorm, M rows of a matrix.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

# ---- GroupNorm, with SiLU after it and a shift of each channel before it


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _norm_whole_group(
    x_ptr, y_ptr, gain_ptr, offset_ptr, shift_ptr, bias_ptr, positions, channels, groups, shift_stride, eps,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: one group of one picture, all positions, held in registers between the two passes."""
    b, g = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_C)
    channel = g * SIZE + columns
    inside = (rows < positions)[:, None] & (columns < SIZE)[None, :]
    where = b.to(tl.int64) * positions * channels + rows[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        x += tl.load(shift_ptr + b * shift_stride + channel, mask=columns < SIZE, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        x += tl.load(bias_ptr + channel, mask=columns < SIZE, other=0.0).to(tl.float32)[None, :]
    count = positions * SIZE
    mean = tl.sum(tl.sum(tl.where(inside, x, 0.0), 1), 0) / count
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(tl.sum(centered * centered, 1), 0) / count
    gain = tl.load(gain_ptr + channel, mask=columns < SIZE, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + channel, mask=columns < SIZE, other=0.0).to(tl.float32)
    y = centered * tl.rsqrt(variance + eps) * gain[None, :] + offset[None, :]
    if SILU:
        y = _silu(y)
    tl.store(y_ptr + where, y, mask=inside)


@triton.jit
def _channel_moments(
    x_ptr, mean_ptr, square_ptr, positions, channels, chunk,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: some channels of `chunk` positions of one picture -> their mean and summed squared deviation.

    Sums are taken of the differences from the chunk's first position: where the mean is far from zero, the sum of
    squares less the square of the sum would lose all its digits. Each thread adds up its own; one reduction ends it.
    """
    b, part = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = part * chunk
    stop = tl.minimum(start + chunk, positions)
    base = x_ptr + b.to(tl.int64) * positions * channels
    pivot = tl.load(base + start.to(tl.int64) * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    sums = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    for first in range(start, stop, BLOCK_L):
        rows = first + tl.arange(0, BLOCK_L)
        inside = (rows < stop)[:, None] & (channel < channels)[None, :]
        x = tl.load(base + rows.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        difference = tl.where(inside, x.to(tl.float32) - pivot[None, :], 0.0)
        sums += difference
        squares += difference * difference
    count = (stop - start).to(tl.float32)
    total = tl.sum(sums, 0)
    out = (b * tl.num_programs(1) + part) * channels + channel
    tl.store(mean_ptr + out, pivot + total / count, mask=channel < channels)
    tl.store(square_ptr + out, tl.sum(squares, 0) - total * total / count, mask=channel < channels)


@triton.jit
def _merge_moments(
    mean_ptr, square_ptr, scale_out, shift_out, gain_ptr, offset_ptr, shift_ptr, bias_ptr,
    positions, channels, chunk, parts, shift_stride, eps,
    SIZE: tl.constexpr, SHIFT: tl.constexpr, BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the chunks' moments of one group of one picture -> factor and summand of each of its channels.

    A shift of a channel moves its mean and leaves its deviations alone, so it costs nothing here.
    """
    b, g = tl.program_id(0), tl.program_id(1)
    part, columns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    channel = g * SIZE + columns
    inside = (part < parts)[:, None] & (columns < SIZE)[None, :]
    moved = tl.zeros([BLOCK_C], tl.float32)
    if SHIFT:
        moved += tl.load(shift_ptr + b * shift_stride + channel, mask=columns < SIZE, other=0.0).to(tl.float32)
    if BIAS:
        moved += tl.load(bias_ptr + channel, mask=columns < SIZE, other=0.0).to(tl.float32)
    where = (b * parts + part[:, None]) * channels + channel[None, :]
    means = tl.load(mean_ptr + where, mask=inside, other=0.0) + moved[None, :]
    squares = tl.load(square_ptr + where, mask=inside, other=0.0)
    weight = tl.where(inside, tl.minimum(positions - part * chunk, chunk)[:, None].to(tl.float32), 0.0)
    count = positions * SIZE
    mean = tl.sum(tl.sum(means * weight, 1), 0) / count
    variance = tl.sum(tl.sum(squares + weight * (means - mean) * (means - mean), 1), 0) / count
    gain = tl.load(gain_ptr + channel, mask=columns < SIZE, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + channel, mask=columns < SIZE, other=0.0).to(tl.float32)
    scale = tl.rsqrt(variance + eps) * gain
    tl.store(scale_out + b * channels + channel, scale, mask=columns < SIZE)
    tl.store(shift_out + b * channels + channel, (moved - mean) * scale + offset, mask=columns < SIZE)


@triton.jit
def _scale_shift(
    x_ptr, y_ptr, scale_ptr, shift_ptr, positions, channels,
    SILU: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: a tile of positions and channels, x * scale + shift of its channel, then SiLU."""
    b = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < positions)[:, None] & (channel < channels)[None, :]
    where = b.to(tl.int64) * positions * channels + rows.to(tl.int64)[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + b * channels + channel, mask=channel < channels, other=0.0)
    shift = tl.load(shift_ptr + b * channels + channel, mask=channel < channels, other=0.0)
    y = x * scale[None, :] + shift[None, :]
    if SILU:
        y = _silu(y)
    tl.store(y_ptr + where, y, mask=inside)


WHOLE_GROUP = 32768  # elements that one program can hold in registers
PARTS = 512  # chunks of a large picture: enough programs to fill the chip, few enough to merge
TILE = {"BLOCK_L": 32, "BLOCK_C": 64}
MOMENTS_TILE = {"BLOCK_L": 128, "BLOCK_C": 64}


def group_norm(
    x: Tensor, norm: nn.GroupNorm, silu: bool = False, shift: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """norm(x + shift + bias), then SiLU if asked for; x [B, C, H, W], shift [B or 1, C], bias [C], in channels-last.

    shift is the timestep's embedding, bias that of the convolution before. x of another layout is copied first.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    positions, size = x.shape[2] * x.shape[3], norm.num_channels // norm.num_groups
    if triton.next_power_of_2(positions) * triton.next_power_of_2(size) <= WHOLE_GROUP:
        return _group_norm_whole(x, norm, silu, shift, bias)
    return _group_norm_split(x, norm, silu, shift, bias)


def _shift_arguments(x: Tensor, shift: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Pointers that stand for what is missing, and the stride from one picture's shift to the next: 0 if all share."""
    if shift is not None and shift.stride(-1) != 1:
        shift = shift.contiguous()
    stride = shift.stride(0) if shift is not None and shift.shape[0] > 1 else 0
    return (x if shift is None else shift), (x if bias is None else bias), stride


def _group_norm_whole(x: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None, bias: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    size = channels // norm.num_groups
    block_l, block_c = triton.next_power_of_2(height * width), triton.next_power_of_2(size)
    shift_ptr, bias_ptr, stride = _shift_arguments(x, shift, bias)
    y = torch.empty_like(x)
    _norm_whole_group[(batch, norm.num_groups)](
        x, y, norm.weight, norm.bias, shift_ptr, bias_ptr, height * width, channels, norm.num_groups, stride, norm.eps,
        SIZE=size, SHIFT=shift is not None, BIAS=bias is not None, SILU=silu, BLOCK_L=block_l, BLOCK_C=block_c,
        num_warps=_warps(block_l * block_c),
    )  # fmt: skip
    return y


def _warps(elements: int) -> int:
    return min(16, max(4, elements // 2048))


def _group_norm_split(x: Tensor, norm: nn.GroupNorm, silu: bool, shift: Tensor | None, bias: Tensor | None) -> Tensor:
    batch, channels, height, width = x.shape
    positions, size = height * width, channels // norm.num_groups
    chunk = max(MOMENTS_TILE["BLOCK_L"], triton.cdiv(positions, PARTS))
    parts, columns = triton.cdiv(positions, chunk), triton.cdiv(channels, MOMENTS_TILE["BLOCK_C"])
    means, squares = x.new_empty(2, batch, parts, channels, dtype=torch.float32)
    _channel_moments[(batch, parts, columns)](
        x, means, squares, positions, channels, chunk, **MOMENTS_TILE, num_warps=4
    )  # fmt: skip
    scale, offset = x.new_empty(2, batch, channels, dtype=torch.float32)
    shift_ptr, bias_ptr, stride = _shift_arguments(x, shift, bias)
    _merge_moments[(batch, norm.num_groups)](
        means, squares, scale, offset, norm.weight, norm.bias, shift_ptr, bias_ptr,
        positions, channels, chunk, parts, stride, norm.eps, SIZE=size, SHIFT=shift is not None, BIAS=bias is not None,
        BLOCK_P=triton.next_power_of_2(parts), BLOCK_C=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    y = torch.empty_like(x)
    # Positions first: of the other two dimensions CUDA takes no more than 65,535.
    grid = triton.cdiv(positions, TILE["BLOCK_L"]), triton.cdiv(channels, TILE["BLOCK_C"]), batch
    _scale_shift[grid](x, y, scale, offset, positions, channels, SILU=silu, **TILE, num_warps=4)
    return y


# ---- what follows a matrix product: residual and bias
#
# cuBLAS takes up to half as long again for a product that adds its bias itself (H100, 8192 x 320 x 320: 11.7 us for
# 7.2), and PyTorch adds a convolution's in a pass of its own. The kernels here read the result next anyway.


@triton.jit
def _add_bias_kernel(
    x_ptr, residual_ptr, bias_ptr, bias2_ptr, y_ptr, rows, channels,
    BIAS2: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    where = row.to(tl.int64)[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + where, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if BIAS2:
        x += tl.load(bias2_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + where, x, mask=inside)


def add_bias(x: Tensor, residual: Tensor, bias: Tensor, bias2: Tensor | None = None) -> Tensor:
    """x + residual + bias + bias2; x and residual [B, C, H, W] in channels-last, the biases [C]."""
    x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    y, channels = torch.empty_like(x), x.shape[1]
    rows = x.numel() // channels
    grid = triton.cdiv(rows, TILE["BLOCK_L"]), triton.cdiv(channels, TILE["BLOCK_C"])
    _add_bias_kernel[grid](
        x, residual, bias, bias if bias2 is None else bias2, y, rows, channels, BIAS2=bias2 is not None, **TILE,
        num_warps=4,
    )  # fmt: skip
    return y


# ---- GEGLU


@triton.jit
def _geglu_kernel(
    x_ptr, bias_ptr, y_ptr, rows, inner, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < inner)[None, :]
    where = row.to(tl.int64)[:, None] * (2 * inner) + column[None, :]
    value = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + where + inner, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias_ptr + column, mask=column < inner, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + inner + column, mask=column < inner, other=0.0).to(tl.float32)[None, :]
    y = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y_ptr + row.to(tl.int64)[:, None] * inner + column[None, :], y, mask=inside)


GEGLU_TILE = {"BLOCK_M": 8, "BLOCK_C": 256}


def geglu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """value * gelu(gate), exact, of x + bias: x [..., 2I], values first, bias [2I] -> [..., I]."""
    x = x.contiguous()
    rows, inner = x.numel() // x.shape[-1], x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], inner)
    grid = triton.cdiv(rows, GEGLU_TILE["BLOCK_M"]), triton.cdiv(inner, GEGLU_TILE["BLOCK_C"])
    _geglu_kernel[grid](
        x, x if bias is None else bias, y, rows, inner, BIAS=bias is not None, **GEGLU_TILE, num_warps=4
    )  # fmt: skip
    return y


# ---- LayerNorm, with the residual connection before it


@triton.jit
def _add_layer_norm_kernel(
    x_ptr, delta_ptr, bias_ptr, after_ptr, sum_ptr, y_ptr, gain_ptr, offset_ptr, rows, channels, eps,
    DELTA: tl.constexpr, BIAS: tl.constexpr, AFTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    where = row.to(tl.int64)[:, None] * channels + channel[None, :]
    x = tl.load(x_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if DELTA:
        x += tl.load(delta_ptr + where, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    total = x
    if AFTER:
        total += tl.load(after_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if DELTA or BIAS or AFTER:
        tl.store(sum_ptr + where, total, mask=inside)
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / channels
    centered = tl.where(inside, x - mean[:, None], 0.0)
    variance = tl.sum(centered * centered, 1) / channels
    gain = tl.load(gain_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32)
    y = centered * tl.rsqrt(variance + eps)[:, None] * gain[None, :] + offset[None, :]
    tl.store(y_ptr + where, y, mask=inside)


def add_layer_norm(
    x: Tensor, norm: nn.LayerNorm, delta: Tensor | None = None, bias: Tensor | None = None, after: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> total + after, and norm(total), where total = x + delta + bias; x and delta [..., C], bias and after [C].

    `after` is the bias of a product that will be added to the total later. The first is x itself if nothing is added.
    """
    x = x.contiguous()
    delta = None if delta is None else delta.contiguous()
    plain = delta is None and bias is None and after is None
    total, y, channels = x if plain else torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    rows, block_c = x.numel() // channels, triton.next_power_of_2(channels)
    block_m = max(1, 2048 // block_c)
    delta_ptr, bias_ptr, after_ptr = (x if t is None else t for t in (delta, bias, after))
    _add_layer_norm_kernel[(triton.cdiv(rows, block_m),)](
        x, delta_ptr, bias_ptr, after_ptr, total, y, norm.weight, norm.bias, rows, channels, norm.eps,
        DELTA=delta is not None, BIAS=bias is not None, AFTER=after is not None,
        BLOCK_M=block_m, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return total, y


def accumulate(linear: nn.Linear, h: Tensor, total: Tensor) -> Tensor:
    """total + linear(h) without its bias; written to total, if the product can add to it."""
    if type(linear.weight) is not nn.Parameter:  # quantized
        return total + F.linear(h, linear.weight)
    total.flatten(0, -2).addmm_(h.flatten(0, -2), linear.weight.t())
    return total


# ---- upsampling


@triton.jit
def _upsample_kernel(x_ptr, y_ptr, rows, width, channels, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    first = (row // width) * 4 * width + (row % width) * 2  # the upper left of the four that it becomes
    where = first.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(y_ptr + where, x, mask=inside)
    tl.store(y_ptr + where + channels, x, mask=inside)
    tl.store(y_ptr + where + 2 * width * channels, x, mask=inside)
    tl.store(y_ptr + where + (2 * width + 1) * channels, x, mask=inside)


def upsample(x: Tensor) -> Tensor:
    """Every position four times: [B, C, H, W] -> [B, C, 2H, 2W] in channels-last."""
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    shape = batch, channels, 2 * height, 2 * width
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    rows = batch * height * width
    grid = triton.cdiv(rows, TILE["BLOCK_L"]), triton.cdiv(channels, TILE["BLOCK_C"])
    _upsample_kernel[grid](x, y, rows, width, channels, **TILE, num_warps=4)
    return y
