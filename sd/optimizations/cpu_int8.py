"""Static int8 on CPUs: the UNet's products of int8 numbers, 3x3 convolutions included, with ranges known beforehand.

QuantStub marks where numbers become int8, torch.ao.quantization's observers watch them over a few steps, and `convert`
makes a scale and a zero point of what they saw. From then on the quantization is a part of the norm or the activation
before a product, and the dequantization, DeQuantStub's part, of the product itself (sd/kernels/dots.py).

What stays in bf16 was chosen by the relative error of the noise over ten steps of four prompts of the demo model, with
MinMaxObserver, in thousandths:

    all in bf16                                           5.0
    all in int8 but the first and the last convolution   20.4
      and but the 1x1 convolutions of residual blocks    14.0    which read what no norm has bounded
      and but those that change the grid's size          13.9
      and but the feed-forwards' second layers           10.5    which read value * gelu(gate), with a few large numbers
      and but the last output block                       9.0
      and but the transformers' last projections          9.9    in place of that
    any other kind in bf16 in place of these, at best    19.5
    HistogramObserver, which leaves the largest out      25.3

So the first four stay, 17% of the arithmetic. Prompts of the calibration unlike those that are drawn make 18.1
of 13.9, more steps change nothing.
"""

import warnings
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

from sd.ddpm import spaced_timesteps
from sd.kernels.dots import Scale
from sd.optimizations.base import OptimizationError, Patch, Stage, optimization
from sd.optimizations.dot_layers import (
    BESIDE_NONE,
    SHORT,
    DotConv,
    DotGEGLU,
    DotLinear,
    DotSelfAttention,
    Packed,
    put_in,
)
from sd.optimizations.quantization import Quantization
from sd.pipeline import StableDiffusion
from sd.samplers import PictureNoise
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
    note the ranges. layers: names of modules of the UNet; None is all that `candidates` finds. Helps: a product of int8
    takes half the time of one of bf16. Hurts: the picture; and the start, by the steps that are drawn.
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
    """The products that are worth it, by the name of their module."""
    within = {id(layer) for module in unet.modules() for layer in _inside(module)}
    last = f"output_blocks.{len(unet.output_blocks) - 1}."
    for name, module in unet.named_modules():
        is_product = isinstance(module, DotLinear | DotConv | DotGEGLU | DotSelfAttention)
        if is_product and id(module) not in within and not name.startswith(last) and not _stays(name, module):
            yield name, module.packed


def _inside(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers whose work another module does."""
    return module.packed.layers if isinstance(module, DotGEGLU | DotSelfAttention) else ()


def _stays(name: str, module: nn.Module) -> bool:
    """What the module's docstring says; and the text's keys and values, which are computed once a prompt."""
    first_or_last = isinstance(module, DotConv) and min(module.in_channels, module.out_channels) < 32
    unbounded = name.endswith(("skip_connection", ".op", ".conv", "ff.net.2"))
    return first_or_last or unbounded or name.endswith(("attn2.to_k", "attn2.to_v"))


def calibrated(
    pipe: StableDiffusion, marked: dict[str, Packed], prompts: Sequence[str], steps: int, size: int | None
) -> dict[str, Scale]:
    """How the left side of each product is to be scaled, from what it was over some steps of some prompts."""
    if not prompts:
        raise OptimizationError("calibration needs at least one prompt")
    stubs = nn.ModuleList(QuantStub() for _ in marked)
    stubs.qconfig = QConfig(MinMaxObserver, default_per_channel_weight_observer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated|.*quant_min and quant_max")
        prepare(stubs, inplace=True)
        try:
            for stub, packed in zip(stubs, marked.values(), strict=True):
                packed.observe = _shown_to(stub)
            _draw(pipe, prompts, steps, size)
        finally:
            for packed in marked.values():
                packed.observe = None
        convert(stubs, inplace=True)
    points = zip(marked, stubs, strict=True)
    return {name: Scale(1 / stub.scale.item(), float(stub.zero_point.item())) for name, stub in points}


def _shown_to(stub: nn.Module) -> Callable[[Tensor], object]:
    """Its extremes are all that the observer looks at."""
    return lambda x: stub(torch.stack(torch.aminmax(x)))


@torch.no_grad()
def _draw(pipe: StableDiffusion, prompts: Sequence[str], steps: int, size: int | None) -> None:
    size = size or pipe.config.image_size
    pipe.config.check_size(size, size)
    side = size // pipe.config.vae.downsampling
    shape = (pipe.config.vae.z_channels, side, side)
    for seed, prompt in enumerate(prompts):
        noise = PictureNoise([seed], shape, pipe.device, pipe.dtype)
        context = pipe.encode_prompts([prompt], [""])
        pipe.sample(noise(), context, 7.5, "ddim", spaced_timesteps(steps), noise)
