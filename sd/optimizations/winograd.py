"""3x3 convolutions by Winograd's algorithm (Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks").

F(m x m, 3 x 3) makes an m x m tile of the output from a patch of (m + 2) x (m + 2) of the input:

    Y = A^T [ (G g G^T) * (B^T d B) ] A

where d is the patch, g the 3x3 kernel, and * multiplies number by number. Over all channels and tiles each of the
(m + 2)^2 numbers becomes a matrix product [tiles, C_in] x [C_in, C_out]. F(4x4) so multiplies 36 times for 16 outputs
where the direct way takes 144: a quarter; F(2x2) takes 16 for 4, four ninths. The kernels' transform G g G^T is made
once a model, and is larger than the kernel: 4 times in F(4x4), 16/9 times in F(2x2). So F(4x4) of every layer of
SD 1.5 would take 8.7 GB; `plan` spends a budget of memory where a byte saves the most time.

After a nearest-neighbour upsampling by two, each patch repeats rows: a b b c c d. The third row of F(4x4)'s B^T,
0 4 -4 -1 1 0, then gives 0, as F(2x2)'s does, and so for columns: 25 products are left of 36, 9 of 16. The C++ kernels
leave these out, and read the small grid without ever making the large one.

Rounding: relative 1e-6 to 5e-6 a layer in fp32 (the direct way: 3e-7 to 1e-6). Larger tiles would round far worse.

Axes: B batch, C channels, H W grid, T tiles, N = n * n numbers of a patch, n = m + 2.
"""

import functools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd import unet, vae
from sd.checkpoints.mapped import mapped, page_out
from sd.checkpoints.stamps import Stamp
from sd.kernels import native
from sd.models import build
from sd.optimizations.base import CPU_FP32, Patch, Stage, optimization

log = logging.getLogger(__name__)

# The transforms by m, as in the paper; every number is exact in fp32.
INPUT = {  # B^T [n, n]
    2: [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    4: [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
}
KERNEL = {  # G [n, 3]
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}
OUTPUT = {  # A^T [m, n]
    2: [[1, 1, 1, 0], [0, 1, -1, -1]],
    4: [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
}
WORKSPACE = 64_000_000  # numbers that a call's patches and products may take


@functools.cache
def matrices(m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """B^T [n, n], G [n, 3] and A^T [m, n]."""
    return tuple(torch.tensor(table[m], dtype=torch.float64).to(dtype) for table in (INPUT, KERNEL, OUTPUT))


def transform_kernel(weight: Tensor, m: int) -> Tensor:
    """weight [C_out, C_in, 3, 3] -> G g G^T as [N, C_in, C_out], computed in float64."""
    _, g, _ = matrices(m, torch.float64)
    parts = [  # by output channels, so that the float64 numbers take little memory
        torch.einsum("ia,ocab,jb->ijco", g, part.double(), g).flatten(0, 1).to(weight.dtype)
        for part in weight.detach().split(64)
    ]
    return torch.cat(parts, dim=2)


def winograd_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """The convolution with padding 1: x [B, C_in, H, W], kernel from `transform_kernel` -> [B, C_out, H, W].

    Best with channels innermost in memory, as the result has them. Some rows of tiles at a time.
    """
    height, width = x.shape[-2:]
    down, across = -(-height // m), -(-width // m)
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, m * across - width + 1, 1, m * down - height + 1))
    y = x.new_empty(x.shape[0], m * down, m * across, kernel.shape[2])
    per_row = x.shape[0] * across * kernel.shape[0] * (kernel.shape[1] + kernel.shape[2])
    rows = max(1, WORKSPACE // per_row)
    for top in range(0, down, rows):
        bottom = min(top + rows, down)
        y[:, m * top : m * bottom] = _tile_rows(x[:, m * top : m * bottom + 2], kernel, bias, m)
    return y[:, :height, :width].permute(0, 3, 1, 2)


def _tile_rows(x: Tensor, kernel: Tensor, bias: Tensor | None, m: int) -> Tensor:
    """Whole tiles: x [B, m * rows + 2, m * columns + 2, C_in] -> [B, m * rows, m * columns, C_out]."""
    n = m + 2
    b, _, a = matrices(m, x.dtype)
    patches = x.unfold(1, n, m).unfold(2, n, m)  # [B, rows, columns, C_in, n, n]
    batch, rows, columns, channels = patches.shape[:4]
    d = patches.permute(4, 5, 0, 1, 2, 3).reshape(n, n, -1)
    d = b @ (b @ d.flatten(1)).view(n, n, -1)
    products = torch.bmm(d.view(n * n, -1, channels), kernel)
    y = a @ (a @ products.view(n, -1)).view(m, n, -1)  # [m, m, T * C_out]
    y = y.view(m, m, batch, rows, columns, -1).permute(2, 3, 0, 4, 1, 5)
    y = y.reshape(batch, m * rows, m * columns, -1)
    return y if bias is None else y.add_(bias)


# ---- which algorithm, where


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the direct convolution and of the products, bytes/s of memory: 2 cores with AVX2."""

    direct: float = 150e9
    products: float = 107e9
    memory: float = 12e9


NATIVE = Rates(direct=160e9, products=180e9, memory=15e9)  # of sd/kernels/cpp, with AVX2
NATIVE_512 = Rates(direct=500e9, products=400e9, memory=20e9)  # with AVX-512: Zen 5, 2 cores


def native_rates() -> Rates:
    """Those of the instruction set that the kernels are built for."""
    return NATIVE_512 if native.instruction_set() in ("avx512", "amx") else NATIVE


def seconds(m: int, positions: int, c_in: int, c_out: int, rates: Rates) -> float:
    """What a convolution onto so many positions should take, by F(m x m), or directly for m = 0."""
    if m == 0:
        return 18 * positions * c_in * c_out / rates.direct
    n2 = (m + 2) ** 2
    tiles = -(-positions // m**2)
    moved = 4 * n2 * (2 * tiles * (c_in + c_out) + c_in * c_out)
    return 2 * n2 * tiles * c_in * c_out / rates.products + moved / rates.memory


@dataclass(frozen=True)
class Use:
    """A layer, the positions of its output over the whole batch, how often it runs in a picture, and how many bytes of
    its weights can go back to the file that they are mapped from."""

    layer: nn.Conv2d
    positions: int
    calls: int
    replaced: int = 0

    @property
    def kept(self) -> bool:
        return self.calls > 1

    def seconds(self, m: int, rates: Rates) -> float:
        return self.calls * seconds(m, self.positions, self.layer.in_channels, self.layer.out_channels, rates)

    def bytes(self, m: int) -> int:
        """What F(m x m) takes more than the direct way: nothing where the kernel is made anew for its one call."""
        if m == 0 or not self.kept:
            return 0
        return 4 * (m + 2) ** 2 * self.layer.in_channels * self.layer.out_channels - self.replaced


def plan(uses: Iterable[Use], budget: int, rates: Rates) -> dict[nn.Conv2d, int]:
    """m for each layer, 0 for the direct way, whose transformed kernels take no more than `budget` bytes in all.

    The choices that save the most time a byte come first; so a layer gets F(2x2), and F(4x4) if that much is left.
    """
    uses = list(uses)
    chosen = {use.layer: 0 for use in uses}
    choices = [(use, m) for use in uses for m in (2, 4)]
    saved = {choice: choice[0].seconds(0, rates) - choice[0].seconds(choice[1], rates) for choice in choices}
    for use, m in sorted(choices, key=lambda choice: -saved[choice] / max(1, choice[0].bytes(choice[1]))):
        before = chosen[use.layer]
        more = use.bytes(m) - use.bytes(before)
        if saved[use, m] > saved.get((use, before), 0) and more <= budget:
            chosen[use.layer] = m
            budget -= more
    return chosen


def is_winograd(layer: nn.Module) -> bool:
    """Whether it is a 3x3 convolution of stride 1 that keeps the grid, with enough channels to be worth it."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and (layer.stride, layer.padding, layer.dilation, layer.groups) == ((1, 1), (1, 1), (1, 1), 1)
        and layer.in_channels % 8 == 0
    )


SMALL_GRID = 256  # positions


class WinogradConv(nn.Conv2d):
    """A 3x3 convolution with F(m x m), where that is faster than the direct way on the grid at hand.

    native: whether the C++ kernels do it. upsampled: whether its input is upsampled first. kept: whether the
    transformed kernel is kept for the next call.
    """

    m: int
    rates: Rates
    native: bool
    upsampled: bool
    kept: bool
    transformed_kernel: Tensor
    kernel_stamp: Stamp | None

    @property
    def kernel(self) -> str:
        way = f"Winograd F({self.m}x{self.m}) where faster" if self.m else "direct"
        return f"{way}, {'C++' if self.native else 'PyTorch'}{', upsampling within' if self.upsampled else ''}"

    def forward(self, x: Tensor) -> Tensor:
        return self.added(x)

    def added(self, x: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """The convolution plus shift [B or 1, C_out] plus residual [B, C_out, H, W]."""
        fast = self.faster(x)
        if fast and self.native:
            bias = self.bias if shift is None else self.bias + shift
            options = {"upsampled": self.upsampled, "m": self.m}
            return native.winograd(x, self.transformed(), self.out_channels, bias, residual, **options)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest") if self.upsampled else x
        y = winograd_conv(x, self.transformed(), self.bias, self.m) if fast else self.direct(x)
        y = y if shift is None else y + shift[:, :, None, None]
        return y if residual is None else y + residual

    def direct(self, x: Tensor) -> Tensor:
        """On small grids as a product with the weights as they are, which oneDNN would first bring into its layout."""
        if not self.native or x.shape[2] * x.shape[3] > SMALL_GRID or not native.readable(x, self.weight):
            return super().forward(x)
        return native.conv3x3(x, self.weight, self.bias)

    def faster(self, x: Tensor) -> bool:
        positions = x.shape[0] * x.shape[2] * x.shape[3] * (4 if self.upsampled else 1)
        channels = self.in_channels, self.out_channels
        return (
            self.m > 0
            and native.readable(x, self.weight)
            and seconds(self.m, positions, *channels, self.rates) < seconds(0, positions, *channels, self.rates)
        )

    def transformed(self) -> Tensor:
        """The kernel, made when first needed and again after the weights changed."""
        if not self.kept:
            return self._transform()
        if Stamp((self.weight,)) != self.kernel_stamp:
            self.transformed_kernel = self._transform()
            self.kernel_stamp = Stamp((self.weight,))
            for weight in mapped([self.weight]):
                page_out(weight)
        return self.transformed_kernel

    def _transform(self) -> Tensor:
        if not self.native:
            return transform_kernel(self.weight, self.m)
        return native.winograd_kernel(self.weight, matrices(self.m, torch.float64)[1], self.upsampled)


class WinogradUpsample(unet.Upsample):
    """Upsampling within the convolution: the larger grid is never in memory. The VAE's is the same module."""

    kernel = "within its convolution"

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


UPSAMPLES = (unet.Upsample, vae.Upsample)
"""Modules whose convolution can do the upsampling before it."""


def grids(model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    """(name, positions) of the Winograd layers in a call of `model`, which lives on the meta device."""
    seen: list[tuple[str, int]] = []
    for name, layer in model.named_modules():
        if is_winograd(layer):
            layer.register_forward_hook(lambda _, x, y, name=name: seen.append((name, y[:, 0].numel())))
    with torch.no_grad():
        model(*inputs)
    return iter(seen)


STEPS = 20  # calls of the UNet for one of the VAE's decoder, to weigh their layers


def _uses(patch: Patch) -> Iterator[Use]:
    twin, inputs = patch.twin()  # on the meta device, where nothing is computed
    for name, positions in grids(twin, inputs):
        if is_winograd(layer := patch.unet.get_submodule(name)):  # and no other switch's
            yield _use(layer, positions, STEPS)
    if not hasattr(patch.vae, "decoder"):
        return
    config = patch.pipe.config
    for name, positions in grids(build(config)[2].decoder, (inputs[0][:1, : config.vae.z_channels],)):
        if is_winograd(layer := patch.vae.decoder.get_submodule(name)):
            yield _use(layer, positions, 1)


def _use(layer: nn.Conv2d, positions: int, calls: int) -> Use:
    return Use(layer, positions, calls, layer.weight.nbytes if mapped([layer.weight]) else 0)


# ---- the switch


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 <= size < 1000:
        raise ValueError("gigabytes, as 2.5")
    return size


@optimization(
    "winograd",
    stage=Stage.LAYERS,
    exact=True,
    summary="3x3 convolutions with a quarter of the multiplications",
    needs=CPU_FP32,
    conflicts=("compile",),
    value=_gigabytes,
    hint="GB",
)
def winograd(patch: Patch, gigabytes: float = 3.4) -> None:
    """3x3 convolutions with a quarter of the multiplications, by Winograd's F(4x4,3x3). Exact.

    gigabytes: what the UNet's and the VAE's transformed kernels may take beside the weights, and a ControlNet's in
    proportion to its size; F(2x2,3x3) or the direct way where they would
    take more. Helps: convolutions, half of a step on CPUs. Hurts: memory; where there is no C++ compiler, PyTorch's
    own operations do it, and gain less.
    """
    in_cpp = native.load() is not None
    rates = native_rates() if in_cpp else Rates()
    uses = list(_uses(patch))
    chosen = plan(uses, int(gigabytes * patch.share * 1e9), rates)
    upsampled = {module.conv for kind in UPSAMPLES for module in patch.modules(kind, patch.unet, patch.vae)}
    for use in uses:
        layer = use.layer
        takes = in_cpp and layer.in_channels % native.vector() == 0
        own = {"m": chosen[layer], "rates": rates, "native": takes, "kept": use.kept, "kernel_stamp": None}
        patch.swap(layer, WinogradConv, upsampled=layer in upsampled, **own)
    for kind in UPSAMPLES:
        for module in patch.modules(kind, patch.unet, patch.vae):
            if isinstance(module.conv, WinogradConv):
                patch.swap(module, WinogradUpsample)
