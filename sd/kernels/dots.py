"""Products of bf16 and int8 numbers by the C++ kernels: weights in panels, what multiplies them, and attention.

A product takes its left side as `rows` or `grid` made it of fp32 numbers, in one of three types:

    bf16    one product, whose error is bf16's
    split   each number as two of bf16 and three products of them, whose error is near fp32's
    int8    (x * factor + zero) within 0 to 255, given as a `Scale`; the weights have a scale a column

Sums are fp32 or int32, and results fp32, bf16 or int8 again. Without AMX or AVX-512's dot products the same is done by
plain vectors, correct and slow.

Axes: B batch, C channels, H W grid, L positions, S keys, N heads, D head size.
"""

import ctypes
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sd.kernels import native

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}
TYPES = {"bf16": 1, "int8": 2, "split": 3}
DTYPES = {"bf16": torch.bfloat16, "int8": torch.uint8, "split": torch.bfloat16}
DEPTH = 1280  # most numbers of a linear layer's tap


class Scale(NamedTuple):
    """Of int8 numbers: x * factor + zero."""

    factor: float
    zero: float


class Sizes(NamedTuple):
    """columns: of a panel. block: bytes of 64 bytes of K. row: those bytes. spare: positions read beyond a grid."""

    columns: int
    block: int
    row: int
    spare: int


@functools.cache
def _sizes(library: ctypes.CDLL) -> Sizes:
    sizes = (ctypes.c_int64 * 4)()
    library.sd_dot_sizes(sizes)
    return Sizes(*sizes)


def sizes() -> Sizes:
    return _sizes(native._library())


def fast() -> bool:
    """Whether the processor multiplies bf16 numbers, in the instruction set that the kernels were built for."""
    name = native.instruction_set()
    return name == "amx" or (name == "avx512" and "avx512_bf16" in native.cpu_has())


def padded(channels: int, kind: str) -> int:
    """Channels of a row with the zeros to the end of a block."""
    block = sizes().row // (1 if kind == "int8" else 2)
    return -(-channels // block) * block


def _longs(*numbers: int) -> ctypes.Array:
    return (ctypes.c_int64 * len(numbers))(*numbers)


# ---- weights


@dataclass(frozen=True)
class Panels:
    """Weights in the layout that the products read: data, uint8. taps: 9 of a 3x3 convolution, or fewer parts of K.

    depth: numbers of a tap. scale, shift [columns]: of int8, what sums are multiplied by, and then what is added.
    """

    data: Tensor
    kind: str
    columns: int
    taps: int
    depth: int
    geglu: bool = False
    quantized: Scale | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def inner(self) -> int:
        """Numbers of K."""
        return self.taps * self.depth

    @property
    def tap_bytes(self) -> int:
        return padded(self.depth, self.kind) * (1 if self.kind == "int8" else 2) // sizes().row * sizes().block

    @property
    def panel_bytes(self) -> int:
        return self.taps * self.tap_bytes

    def groups(self) -> int:
        return -(-self.depth // (4 if self.kind == "int8" else 2))

    def offsets(self, a: list[int], remainder: int) -> ctypes.Array:
        """Where the taps are: a, bytes into a row of the left side; remainder, from a number to what it left."""
        b = [t * self.tap_bytes for t in range(self.taps)]
        if self.kind == "split":
            low = self.data.numel() // 2
            a, b = [*a, *(x + remainder for x in a), *a], [*b, *b, *(x + low for x in b)]
        return _longs(*a, *b)


def _code(weight: Tensor) -> int:
    if weight.dtype not in CODES:
        raise TypeError(f"weights of fp32, fp16 or bf16 are needed, not of {weight.dtype}")
    return CODES[weight.dtype]


def pack(weight: Tensor, kind: str, geglu: bool = False, quantized: Scale | None = None) -> Panels:
    """weight [N, K] or [N, C, 3, 3], or [N, C, 1, 1], of any of three types -> panels.

    geglu: the second half of the rows are gates of the first. quantized: of int8, what it multiplies.
    """
    weight = weight.detach()
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight.flatten(1)
    columns, inner = weight.shape[:2]
    if weight.ndim == 4 and weight.shape[2:] == (3, 3):
        weight = weight.contiguous()
        taps, depth, strides = 9, inner, _longs(weight.stride(0), 1, 9)
    elif weight.ndim == 2:
        whole = [n for n in range(-(-inner // DEPTH), 9) if inner % n == 0 and inner // n == padded(inner // n, kind)]
        taps = whole[0] if whole else 1
        depth = inner // taps
        strides = _longs(weight.stride(0), depth * weight.stride(1), weight.stride(1))
    else:
        raise ValueError(f"the weight of a linear layer or a 3x3 convolution is needed, not {list(weight.shape)}")
    if geglu and columns % 2:
        raise ValueError(f"GEGLU's weight needs an even number of rows, not {columns}")
    panels = Panels(torch.empty(0), kind, columns, taps, depth, geglu, quantized)
    count = -(-columns // 2 // (sizes().columns // 2)) if geglu else -(-columns // sizes().columns)
    one = count * panels.panel_bytes
    data = torch.empty(2 * one if kind == "split" else one, dtype=torch.uint8)
    factors = sums = scale = shift = None
    if kind == "int8":
        if quantized is None:
            raise ValueError("int8 weights need the scale of what they multiply")
        largest = weight.float().abs().flatten(1).amax(1).clamp(min=1e-12)
        factors, sums = 127 / largest, torch.empty(columns, dtype=torch.int32)
        scale = largest / 127 / quantized.factor
    arguments = strides, columns, taps, depth, 2 if kind == "int8" else 1, geglu
    for part in range(2 if kind == "split" else 1):
        native._call("sd_dot_pack", weight, _code(weight), *arguments, part, factors, data[part * one :], sums)
    if sums is not None:
        shift = -quantized.zero * sums * scale
    return Panels(data, kind, columns, taps, depth, geglu, quantized, scale, shift)


# ---- what multiplies them


@dataclass(frozen=True)
class Grid:
    """data [B, H + 2, W + 2, padded C] of a type, with a border of zeros; H and W are those within."""

    data: Tensor
    kind: str
    batch: int
    height: int
    width: int
    channels: int
    quantized: Scale | None = None

    @property
    def position(self) -> int:
        """Bytes from one to the next."""
        return padded(self.channels, self.kind) * {"bf16": 2, "int8": 1, "split": 4}[self.kind]


def _scale(kind: str, quantized: Scale | None) -> Scale:
    if (kind == "int8") != (quantized is not None):
        raise ValueError(f"a scale is for int8 numbers, and they need one: {kind}, {quantized}")
    return quantized or Scale(1.0, 0.0)


def rows(x: Tensor, kind: str, norm: nn.LayerNorm | None = None, quantized: Scale | None = None) -> Tensor:
    """x [..., C] in fp32 or bf16, after a LayerNorm if there is one -> the left side of `linear`, [..., padded C]."""
    if x.dtype not in (torch.float32, torch.bfloat16) or x.numel() == 0:
        raise TypeError(f"numbers in fp32 or bf16 are needed, not {x.dtype} {list(x.shape)}")
    flat, channels = native._rows(x), x.shape[-1]
    whole = padded(channels, kind)
    out = x.new_empty(*x.shape[:-1], whole * (2 if kind == "split" else 1), dtype=DTYPES[kind])
    affine = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    if norm is not None:
        native._shaped("the norm's weight", norm.weight, channels)
    scale = _scale(kind, quantized)
    source = flat, x.dtype == torch.bfloat16, flat.stride(0), len(flat), channels, whole
    native._call("sd_dot_rows", *source, *affine, TYPES[kind], *scale, out)
    return out


def grid(
    x: Tensor,
    kind: str,
    more: Tensor | None = None,
    norm: nn.GroupNorm | None = None,
    silu: bool = False,
    upsampled: bool = False,
    quantized: Scale | None = None,
) -> Grid:
    """x [B, C, H, W] in fp32, and the channels of `more` after its own -> the left side of `conv`.

    After a GroupNorm, with SiLU, and upsampled by two, as is said.
    """
    batch, channels, height, width = x.shape
    x = native._channels_last(x)
    added = 0
    if more is not None:
        added = more.shape[1]
        more = native._shaped("more", more, batch, added, height, width, layout=torch.channels_last)
    groups = 1
    affine: tuple = (None, None, 0.0)
    if norm is not None:
        groups, affine = norm.num_groups, (norm.weight, norm.bias, norm.eps)
        native._shaped("the norm's weight", norm.weight, channels + added)
        native._need_multiple("channels", channels + added, groups)
    scale = _scale(kind, quantized)
    high, wide = height << upsampled, width << upsampled
    made = Grid(x.new_empty(0), kind, batch, high, wide, channels + added, quantized)
    positions = batch * (high + 2) * (wide + 2)
    spare = sizes().spare and sizes().spare + 2 * (wide + 2) + 2
    data = torch.empty((positions + spare) * made.position, dtype=torch.uint8)
    source = x, channels, more, added, batch, height, width, upsampled, padded(channels + added, kind)
    native._call("sd_dot_grid", *source, groups, *affine, silu, TYPES[kind], *scale, data)
    return Grid(data, kind, batch, high, wide, channels + added, quantized)


# ---- products


def _product(
    panels: Panels,
    a: Tensor,
    lda: int,
    shape: tuple[int, ...],
    taps: list[int],
    remainder: int,
    grid_size: tuple[int, int],
    bias: Tensor | None,
    residual: Tensor | None,
    out: torch.dtype,
    quantized: Scale | None,
) -> Tensor:
    """shape: of the result but for its columns, the batch first where bias has one."""
    columns = panels.columns // (2 if panels.geglu else 1)
    count = 1
    for size in shape:
        count *= size
    if out == torch.uint8 and quantized is None:
        raise ValueError("int8 results need a scale")
    result = torch.empty(*shape, columns, dtype=out)
    residual = native._shaped("residual", residual, *result.shape)
    each = bias is not None and bias.ndim == 2 and len(bias) > 1
    if bias is not None:
        bias = native._shaped("bias", bias if bias.ndim == 2 else bias[None], shape[0] if each else 1, panels.columns)
    if panels.shift is not None:
        bias = panels.shift.view(1, -1) if bias is None else bias + panels.shift
    native._call(
        "sd_dot_product",
        2 if panels.kind == "int8" else 1,
        a,
        lda,
        count,
        *grid_size,
        panels.taps * (3 if panels.kind == "split" else 1),
        panels.groups(),
        panels.offsets(taps, remainder),
        panels.data,
        panels.panel_bytes,
        panels.columns,
        panels.scale,
        bias,
        panels.columns * each,
        count // shape[0],
        residual,
        result,
        {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}[out],
        panels.geglu,
        *(quantized or Scale(1.0, 0.0)),
    )
    return result


def linear(
    x: Tensor,
    panels: Panels,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: torch.dtype = torch.float32,
    quantized: Scale | None = None,
) -> Tensor:
    """x weight^T + bias + residual; with GEGLU's panels value * gelu(gate). x as `rows` makes it, or bf16 [..., K].

    bias [N], residual [..., N] in fp32 -> [..., N] in fp32 or bf16, or as uint8 scaled by `quantized`.
    """
    kind = panels.kind
    wide = panels.taps * panels.depth if panels.taps > 1 else padded(panels.depth, kind)
    if x.shape[-1] != wide * (2 if kind == "split" else 1) or x.dtype != DTYPES[kind]:
        raise ValueError(f"x is {list(x.shape)} of {x.dtype} and does not fit {panels.inner} numbers in {kind}")
    flat = native._rows(x)
    tap = panels.depth * x.element_size()
    taps = [t * tap for t in range(panels.taps)]
    remainder = wide * x.element_size()
    sides = flat.stride(0) * x.element_size(), tuple(x.shape[:-1]), taps, remainder, (0, 0)
    return _product(panels, flat, *sides, bias, residual, out, quantized)


def conv(
    x: Grid,
    panels: Panels,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: torch.dtype = torch.float32,
    stride: int = 1,
    moved: bool = False,
) -> Tensor:
    """3x3 convolution of a grid with the zeros around it, or 1x1 -> [B, C_out, H, W], channels-last.

    bias [C_out], or [B or 1, C_out] for one a picture; residual as the result, in fp32. stride 2 leaves out every
    second position; moved: the patches begin at the position itself, with zeros to the right and below alone.
    """
    if (panels.depth if panels.taps == 9 else panels.inner) != x.channels:
        raise ValueError(f"a grid of {x.channels} channels does not fit {panels.taps} times {panels.depth}")
    if panels.kind != x.kind or panels.quantized != x.quantized:
        raise ValueError(f"a grid in {x.kind} does not fit weights in {panels.kind}, or its scale does not")
    bytes_, remainder = x.position, padded(x.channels, x.kind) * 2
    high, wide = x.height, x.width
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    if panels.taps == 9:
        taps = [(i * (wide + 2) + j) * bytes_ for i in range(3) for j in range(3)]
    else:
        taps = [(wide + 3) * bytes_ + t * panels.depth * DTYPES[x.kind].itemsize for t in range(panels.taps)]
    if stride == 1:
        sides = x.data, bytes_, (x.batch, high, wide), taps, remainder, (high, wide)
    else:
        high, wide = ((side + 1 - moved) // 2 for side in (high, wide))
        data = torch.empty(x.batch * high * wide * 9 * bytes_, dtype=torch.uint8)
        native._call("sd_dot_patches", x.data, x.batch, x.height, x.width, bytes_, moved, data)
        sides = data, 9 * bytes_, (x.batch, high, wide), [t * bytes_ for t in range(9)], remainder, (0, 0)
    return _product(panels, *sides, bias, residual, out, None).permute(0, 3, 1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in bf16. q [B, N, L, D], k and v [B, N, S, D], D even -> [B, N, L, D]."""
    batch, heads, queries, size = q.shape
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != size:
        raise ValueError(f"q, k and v do not fit each other: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    native._need_multiple("the size of a head", size, 2)
    for tensor in (q, k, v):
        if tensor.dtype != torch.bfloat16 or tensor.numel() == 0:
            raise TypeError(f"numbers in bf16 are needed, not {tensor.dtype} {list(tensor.shape)}")
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    out = q.new_empty(batch, queries, heads, size)
    strides = _longs(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    native._call("sd_dot_attention", q, k, v, out, batch, heads, queries, k.shape[2], size, strides)
    return out.transpose(1, 2)
