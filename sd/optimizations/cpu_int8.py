"""Static int8 on CPUs: the UNet's products of int8 numbers, 3x3 convolutions included, with ranges known beforehand.

QuantStub marks where numbers become int8, torch.ao.quantization's observers watch them over a few steps, and `convert`
makes a scale and a zero point of what they saw. From then on the quantization is a part of the norm or the activation
before a product, and the dequantization, DeQuantStub's part, of the product itself (sd/kernels/dots.py).

What stays in bf16, by the relative error of the noise over ten steps of four prompts of the demo model, in thousandths,
and the share of the arithmetic that is int8 (`python bench/int8_kinds.py`; Zen 5):

    all                                                5.0      0%
    the first and the last convolution                23.9    100%
      and the 1x1 convolutions of residual blocks     15.0     98%    which read what no norm has bounded
      and those that change the grid's size           14.8     94%
      and the feed-forwards' second layers            10.9     85%    which read value * gelu(gate): a few are large
      and the last output block                        9.4     71%
    any other kind alone                      23.0 to 23.8

Observers of extremes are used: torch.ao's HistogramObserver cuts the largest numbers off, which the last steps need.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    MinMaxObserver,
    QConfig,
    QuantStub,
    convert,
    default_per_channel_weight_observer,
    prepare,
)

from sd.kernels.dots import Scale
from sd.optimizations.base import OptimizationError, Patch, Stage, optimization
from sd.optimizations.dot_layers import (
    BESIDE_NONE,
    SHORT,
    DotConv,
    DotGEGLU,
    DotSelfAttention,
    Packed,
    Product,
    put_in,
)
from sd.optimizations.quantization import Quantization, calibrate, quiet_torch_ao
from sd.pipeline import StableDiffusion
from sd.unet import UNet

PROMPTS = (
    "a photograph of an astronaut riding a horse",
    "a bowl of fruit on a table, oil painting",
    "a red house on a green hill",
    "a drawing of a blue bird on a yellow background",
)


@optimization(
    "cpu-int8",
    stage=Stage.QUANTIZATION,
    exact=False,
    summary="products of int8 numbers in C++, calibrated",
    needs=SHORT,
    conflicts=(*BESIDE_NONE, "cpu-bf16"),
    dtype=torch.float32,
    beside=put_in,
)
def cpu_int8(
    patch: Patch,
    prompts: Sequence[str] = PROMPTS,
    steps: int = 5,
    size: int | None = None,
    layers: Collection[str] | None = None,
) -> None:
    """cpu-bf16, with most of the UNet's products in int8: one scale a column of the weights, one range a tensor of the
    activations. Approximate.

    The pipeline first draws `steps` steps of each prompt at size x size pixels (None: the trained size) while observers
    note the ranges. layers: names of modules of the UNet; None is all that `candidates` finds. A ControlNet does not
    run then, and has cpu-bf16. Helps: a product of int8 takes half the time of one of bf16. Hurts: the picture; and the
    start, by the steps that are drawn.
    """
    put_in(patch)
    found = dict(candidates(patch.unet))
    if unknown := set(layers or ()) - found.keys():
        raise OptimizationError(f"cpu-int8 cannot take {', '.join(sorted(unknown))}")
    marked = {name: packed for name, packed in found.items() if layers is None or name in layers}
    scales = calibrated(patch.pipe, marked, prompts, steps, size)
    for name, scale in scales.items():
        marked[name].quantize(scale)
    patch.set(patch.unet, "quantization", Quantization("cpu_int8", tuple(scales)))


def put_in_with(patch: Patch, scales: Mapping[str, Scale]) -> None:
    """The same with ranges that are known already. Raises KeyError for a product that is none."""
    put_in(patch)
    found = dict(candidates(patch.unet))
    for name, scale in scales.items():
        found[name].quantize(scale)


def scales_of(unet: UNet) -> dict[str, Scale]:
    """How the left sides of the products in int8 are scaled."""
    return {name: packed.quantized for name, packed in candidates(unet) if packed.quantized is not None}


def candidates(unet: UNet) -> Iterator[tuple[str, Packed]]:
    """The products that are quantized, by the name of their module: all but those that this file's docstring names."""
    last = f"output_blocks.{len(unet.output_blocks) - 1}."
    for name, packed in products(unet):
        if not name.startswith(last) and not name.endswith(("skip_connection", ".op", ".conv", "ff.net.2")):
            yield name, packed


def products(unet: UNet) -> Iterator[tuple[str, Packed]]:
    """All but the first and the last convolution, and the text's keys and values, which are computed once a prompt."""
    within = {id(layer) for module in unet.modules() for layer in _inside(module)}
    for name, module in unet.named_modules():
        if not isinstance(module, Product | DotSelfAttention) or id(module) in within:
            continue
        first_or_last = isinstance(module, DotConv) and min(module.in_channels, module.out_channels) < 32
        if not first_or_last and not name.endswith(("attn2.to_k", "attn2.to_v")):
            yield name, module.packed


def _inside(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers whose work another module does."""
    return module.packed.layers if isinstance(module, DotGEGLU | DotSelfAttention) else ()


def calibrated(
    pipe: StableDiffusion, marked: dict[str, Packed], prompts: Sequence[str], steps: int, size: int | None
) -> dict[str, Scale]:
    """How the left side of each product is to be scaled, from what it was over some steps of some prompts."""
    stubs = nn.ModuleList(QuantStub() for _ in marked)
    stubs.qconfig = QConfig(MinMaxObserver, default_per_channel_weight_observer)
    with quiet_torch_ao():
        prepare(stubs, inplace=True)
        try:
            for stub, packed in zip(stubs, marked.values(), strict=True):
                packed.observe = _shown_to(stub)
            calibrate(pipe, prompts, steps, size)
        finally:
            for packed in marked.values():
                packed.observe = None
        convert(stubs, inplace=True)
    points = zip(marked, stubs, strict=True)
    return {name: Scale(1 / stub.scale.item(), float(stub.zero_point.item())) for name, stub in points}


def _shown_to(stub: nn.Module) -> Callable[[Tensor], object]:
    """Its extremes are all that the observer looks at."""
    return lambda x: stub(torch.stack(torch.aminmax(x)))
