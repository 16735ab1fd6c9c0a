"""Triton matrix products that finish their result before they write it, or that fill a chip which few rows leave idle.

    geglu_product   value * gelu(gate) of one projection: neither half is ever written to memory
    conv3x3_split   a 3x3 convolution of a small grid, its depth divided among the multiprocessors

Sums are in fp32, rounded once. They run on NVIDIA GPUs (geglu_product on those with TMA, sm90), and on CPU tensors
under Triton's interpreter. What they take beside cuBLAS and cuDNN: bench/gpu_products.py.
Axes: B batch, C channels, O channels out, H W grid, M rows of a matrix, I columns of a result, K depth of a product.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth that one program multiplies at a time, its warps, and how many loads are under way."""

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3

    def options(self) -> dict[str, int]:
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return blocks | {"num_warps": self.warps, "num_stages": self.stages}


# ---- GEGLU


@triton.jit
def _gelu(x):
    """x times the normal distribution's integral up to x, exact to 1.5e-7 (Abramowitz and Stegun 7.1.26).

    A fifth of erf's instructions, of which a tile of two products has as many as its products take time. The small side
    is computed and the large one is 1 less that, so that nothing cancels.
    """
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * tail * tl.exp(-z * z)
    return x * tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def _geglu_product_kernel(
    x, weight, y, bias_ptr, rows, inner, depth,
    BIAS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile of values and the same tile of gates, from the same rows of x; all three by descriptors.

    Programs go through GROUP tiles of rows before the next tile of columns, so that both stay in the L2 cache.
    """
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(inner, BLOCK_N)
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    group = tl.minimum(down - first, GROUP)
    m = (first + program % (GROUP * across) % group) * BLOCK_M
    n = program % (GROUP * across) // group * BLOCK_N
    value = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        left = x.load([m, k])
        value = tl.dot(left, weight.load([n, k]).T, value, input_precision="ieee")
        gate = tl.dot(left, weight.load([inner + n, k]).T, gate, input_precision="ieee")
    if BIAS:
        columns = n + tl.arange(0, BLOCK_N)
        value += tl.load(bias_ptr + columns, mask=columns < inner, other=0.0).to(tl.float32)[None, :]
        gate += tl.load(bias_ptr + inner + columns, mask=columns < inner, other=0.0).to(tl.float32)[None, :]
    y.store([m, n], (value * _gelu(gate)).to(y.dtype))


GEGLU_TILE = Tile(128, 64, 64, warps=8, stages=3)
GEGLU_ROWS = 2048


def geglu_pays(x: Tensor) -> bool:
    """Whether geglu_product is faster than cuBLAS and a pass for the gate, for x [..., K].

    An H100, fp16: 42 us for 55 at 8192 rows of 320 numbers, 32 for 36 at 2048 of 640, 34 for 31 at 512 of 1280.
    """
    return x.element_size() == 2 and x.numel() // x.shape[-1] >= GEGLU_ROWS


def geglu_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile = GEGLU_TILE) -> Tensor:
    """value * gelu(gate) of x @ weight.T + bias: x [..., K], weight [2I, K], values first, bias [2I] -> [..., I].

    Rows of x and of the weight start at multiples of 16 bytes, which TMA asks for: K and I are multiples of 8 in fp16.
    """
    flat = x.reshape(-1, x.shape[-1])
    (rows, depth), inner = flat.shape, weight.shape[0] // 2
    y = x.new_empty(*x.shape[:-1], inner)
    _geglu_product_kernel[(triton.cdiv(rows, tile.m) * triton.cdiv(inner, tile.n),)](
        _described(flat, tile.m, tile.k), _described(weight, tile.n, tile.k),
        _described(y.view(rows, inner), tile.m, tile.n), weight if bias is None else bias, rows, inner, depth,
        BIAS=bias is not None, GROUP=8, **tile.options(),
    )  # fmt: skip
    return y


def _described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The matrix for TMA, in blocks; what a block reads outside of it is 0, and what it writes there is not written."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


# ---- 3x3 convolutions of a small grid
#
# At 8x8 a convolution of SD's has 128 rows: the 40 programs that cuDNN makes of it leave two thirds of an H100 idle,
# while 29 MB of weights have to come from memory. Here each tap of the kernel is programs of its own. Their sums are
# added up in the order of the taps, so that a result does not change from run to run.


@triton.jit
def _conv_taps_kernel(
    x_ptr, weight_ptr, part_ptr, height, width, rows, channels, out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tap of the kernel, for a tile of rows and columns."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, k = tl.program_id(2), tl.arange(0, BLOCK_K)
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = m // width % height + down, m % width + right
    inside = (m < rows) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    x = x_ptr + (m + down * width + right)[:, None] * channels + k[None, :]
    weight = weight_ptr + n[None, :].to(tl.int64) * (9 * channels) + tap * channels + k[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, channels, BLOCK_K):
        left = tl.load(x, mask=inside[:, None], other=0.0)
        kernel = tl.load(weight, mask=(n < out)[None, :], other=0.0)
        sums = tl.dot(left, kernel, sums, input_precision="ieee")
        x += BLOCK_K
        weight += BLOCK_K
    where = (tap * rows + m)[:, None] * out + n[None, :]
    tl.store(part_ptr + where, sums, mask=(m < rows)[:, None] & (n < out)[None, :])


@triton.jit
def _add_taps_kernel(part_ptr, bias_ptr, y_ptr, count, out, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = where < count
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(9):
        total += tl.load(part_ptr + tap * count + where, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + where % out, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + where, total, mask=inside)


CONV_TILE = Tile(64, 64, 64, warps=4, stages=4)
CONV_ROWS = 128


def conv_pays(x: Tensor) -> bool:
    """Whether conv3x3_split is faster than cuDNN for x [B, C, H, W].

    An H100, fp16, 1280 channels out: 18.5 us for 23.4 of 1280 at 8x8, 31.0 for 34.5 of 2560; 45 for 32 at 16x16.
    """
    return x.element_size() == 2 and x.shape[0] * x.shape[2] * x.shape[3] <= CONV_ROWS


def conv3x3_split(x: Tensor, weight: Tensor, bias: Tensor | None = None, tile: Tile = CONV_TILE) -> Tensor:
    """A 3x3 convolution of stride 1 with a border of zeros; x [B, C, H, W] and weight [O, C, 3, 3] in channels-last.

    What is in another layout is copied first. Raises ValueError unless C is a multiple of the tile's depth.
    """
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    batch, channels, height, width = x.shape
    if channels % tile.k:
        raise ValueError(f"{channels} channels are no multiple of {tile.k}")
    rows, out = batch * height * width, weight.shape[0]
    sums = x.new_empty(9, rows, out, dtype=torch.float32)
    _conv_taps_kernel[(triton.cdiv(rows, tile.m), triton.cdiv(out, tile.n), 9)](
        x, weight, sums, height, width, rows, channels, out, **tile.options()
    )
    y = torch.empty((batch, out, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    count = rows * out
    _add_taps_kernel[(triton.cdiv(count, 512),)](
        sums, x if bias is None else bias, y, count, out, BIAS=bias is not None, BLOCK=512, num_warps=4
    )
    return y
