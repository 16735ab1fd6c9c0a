"""Quantization: the UNet's matrix products with 8-bit weights, four ways.

    int8_weight_only   int8 weights, activations as they were; saves memory              torchao, any device
    int8_dynamic       int8 weights, activations to int8 row by row as they come         torchao, CPU and CUDA
    float8             the same in float8_e4m3                                           torchao, CUDA from sm89 on
    int8_static        int8 weights and activations, ranges calibrated beforehand        torch.ao.quantization, CPU

All are approximate and touch nothing but layers of `pipe.unet`; the models know nothing of them. 3x3 convolutions,
half of the work of SD 1.5, have no 8-bit kernel here and stay as they are. `save_quantized` and `load_quantized` keep
the result in a file (quantized_files.py); `quantize_filter.json` holds the layers that `bench/sensitivity.py` found not
worth it.

Speed of single layers of SD 1.5 at 512x512 with guidance, fp32 = 1, and the relative error of their output on normal
random numbers; 2 cores with AVX2 and no VNNI, torch 2.13, torchao 0.18, best of 3 to 5 calls:

    rows x in x out       weight_only   dynamic   static (x86)   static (onednn)
    8192 x 320 x 320         0.93          -          1.8             2.3
    8192 x 320 x 2560        0.73          -          1.2             1.0
    8192 x 1280 x 320        0.90          -          1.7             1.8
    2048 x 640 x 5120        0.81          -          1.3             1.2
    512 x 1280 x 1280        0.95        0.02         1.6             2.0
    512 x 1280 x 10240       0.70          -          1.2             1.8
    154 x 768 x 1280         0.90        0.05         2.5             2.5
    error                    0.4%        0.9%         2.1%            2.1%

`python bench/sensitivity.py` measures every layer anew, with the rounding around it, on the machine that it runs on;
`bench/results/cpu2/sensitivity.csv` is what it wrote here.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    HistogramObserver,
    QConfig,
    QuantStub,
    convert,
    default_per_channel_weight_observer,
    prepare,
)

from sd import gpus
from sd.attention import merge_heads, split_heads
from sd.guidance import Conditions
from sd.noise import PictureNoise
from sd.optimizations.base import (
    ANYTHING,
    CPU,
    Need,
    Optimization,
    OptimizationError,
    Patch,
    Record,
    Stage,
    capability,
    here,
    in_the_weights_mode,
    optimization,
    record_of,
)
from sd.pipeline import StableDiffusion
from sd.samplers import choose
from sd.schedules import leading
from sd.unet import GEGLU, CrossAttention, FeedForward

log = logging.getLogger(__name__)

SWITCHES = {
    "int8_weight_only": "int8-weights",
    "int8_dynamic": "int8-dynamic",
    "float8": "float8",
    "int8_static": "int8-static",
    "cpu_int8": "cpu-int8",
}
"""The schemes, by the names of their switches. The last one has a file of its own, cpu_int8.py."""

FILTER_FILE = Path(__file__).with_name("quantize_filter.json")
INSTALL_TORCHAO = "quantization by torchao needs it: pip install torchao==0.18.0"
CALIBRATION_PROMPTS = ("a photograph of an astronaut riding a horse", "a bowl of fruit on a table, oil painting")

# Below this many features on either side a layer's quantization costs more than its matrix product.
MIN_FEATURES = 32


@dataclass(frozen=True)
class Quantization:
    """What was done to a UNet; kept as its attribute `quantization`. engine and reduce_range are int8_static's.

    weights: a digest of the plain weights of all these layers, which a file of the quantized ones is tied to.
    """

    scheme: str
    layers: tuple[str, ...]
    engine: str = ""
    reduce_range: bool = False
    weights: str = ""

    @property
    def switch(self) -> str:
        return SWITCHES[self.scheme]


def digest(unet: nn.Module, names: Collection[str], dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the parameters of these modules, by name: 1 GB a second. dtype: in which they count."""
    hashed = hashlib.sha256()
    for name in sorted(names):
        for own, weight in unet.get_submodule(name).named_parameters(prefix=name):
            numbers = weight.detach().to("cpu", dtype or weight.dtype).contiguous()
            hashed.update(f"{own} {list(numbers.shape)} {numbers.dtype}".encode())
            hashed.update(numbers.flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


@in_the_weights_mode
def quantize(pipe: StableDiffusion, scheme: str, layers: Collection[str] | None = None, **options: Any) -> None:
    """Quantize some layers of a plain pipeline's UNet, before `apply` and for `undo`, as the scheme's switch does all.

    scheme: a key of SWITCHES. layers: names of modules of the UNet; None is `default_layers`. options: int8_static's.
    Raises OptimizationError for what the scheme cannot take, or where it cannot run.
    """
    switch = SCHEMES[scheme]
    if missing := switch.needs.why_not(pipe):
        raise OptimizationError(f"{switch.name} needs {switch.needs.text}; {missing}")
    check_plain(pipe)
    record = record_of(pipe) or Record(pipe)
    patch = record.patch(switch.name)
    try:
        switch.function(patch, layers, **options)
    except BaseException:
        record.undo([patch])
        raise
    patch.finish()
    pipe.record = record


def check_plain(pipe: StableDiffusion) -> None:
    """Raise OptimizationError if optimizations were applied: they build on the layers that are there."""
    if pipe.optimizations:
        raise OptimizationError(f"quantize first: this pipeline has {', '.join(pipe.optimizations)}; undo that")


# --- torchao: one call a scheme ---------------------------------------------------------------------------------------


def _int8_dynamic_runs(pipe: StableDiffusion) -> str:
    return "" if pipe.device.type in ("cpu", "cuda") else f"this is {here(pipe)}; use int8-weights"


def _float8_runs(pipe: StableDiffusion) -> str:
    if capability(pipe) >= gpus.ADA and pipe.dtype in (torch.float16, torch.bfloat16):
        return ""
    return f"this is {here(pipe)}; use int8-dynamic on older GPUs, int8-static on CPUs"


@optimization(
    "int8-weights",
    stage=Stage.QUANTIZATION,
    exact=False,
    summary="int8 weights of linear layers",
    needs=ANYTHING,
    conflicts=("int8-dynamic", "float8", "int8-static", "packed-qkv"),
)
def int8_weight_only(patch: Patch, layers: Collection[str] | None = None) -> None:
    """Keep the weights of Linear layers as int8, one scale a row, and widen them at each use. Approximate.

    Helps: memory, 3438 -> 2629 MB for SD 1.5's UNet in fp32 and 1719 -> 1450 MB in fp16; the convolutions stay.
    Hurts: time. Each call first writes the whole weight out in the activations' dtype and only then multiplies; reading
    weights is a small part of a step at this size, so there is nothing to win back. Compiling fuses the two.
    Measured on 2 cores with AVX2: 85 layers of SD 1.5 at 512x512 run at 0.31 to 1.04 of their speed, median 0.88; a
    picture at 256x256 at 0.97, and at 0.77 after the C++ kernels, which the quantized layers cannot use.

    layers: names of the UNet's Linear layers; None is `default_layers`. Raises OptimizationError without torchao, and
    for layers that it cannot take.
    """
    _apply_torchao(patch, "int8_weight_only", layers)


@optimization(
    "int8-dynamic",
    stage=Stage.QUANTIZATION,
    exact=False,
    summary="int8 weights, and activations as they come",
    needs=Need("a CPU or an NVIDIA GPU", _int8_dynamic_runs),
    conflicts=("float8", "int8-static", "packed-qkv"),
)
def int8_dynamic(patch: Patch, layers: Collection[str] | None = None) -> None:
    """Multiply int8 by int8 in the transformers' Linear layers; activations are rounded as they come. Approximate.

    Helps: on GPUs with int8 tensor cores, compiled, where the layers are large.
    Hurts: on CPUs without VNNI, where `torch._int_mm` has no kernel to speak of: 7 to 40 times slower than plain
    (table above), so take int8-static there. Needs no calibration. On a GPU it cannot be captured by cuda-graph unless
    it is compiled, and has not been measured there.

    Arguments and errors as in `int8_weight_only`.
    """
    if patch.pipe.device.type == "cpu" and not has_vnni():
        log.warning("int8-dynamic is 7 to 40 times slower than fp32 on this CPU, which lacks VNNI; use int8-static")
    _apply_torchao(patch, "int8_dynamic", layers)


FLOAT8 = Need(f"{gpus.needed('float8')}, in fp16 or bf16", _float8_runs)


@optimization(
    "float8",
    stage=Stage.QUANTIZATION,
    exact=False,
    summary="float8 weights and activations of large linear layers",
    needs=FLOAT8,
    conflicts=("int8-static", "packed-qkv"),
)
def float8(patch: Patch, layers: Collection[str] | None = None) -> None:
    """Multiply float8_e4m3 by float8_e4m3 in the transformers' Linear layers, one scale a tensor. Approximate.

    Helps: compiled, on Ada and Hopper, it is expected to: these layers are 29% of a step. Hurts: in eager mode, where
    scaling the activations is more kernels a layer; an H100's step takes 10.8 ms for 5.6 with the exact preset.

    Arguments and errors as in `int8_weight_only`.
    """
    _apply_torchao(patch, "float8", layers)


def _apply_torchao(patch: Patch, scheme: str, layers: Collection[str] | None) -> None:
    with quiet_torchao():
        from torchao import quantization as tao
    unet = patch.unet
    configs = {
        "int8_weight_only": tao.Int8WeightOnlyConfig,
        "int8_dynamic": tao.Int8DynamicActivationInt8WeightConfig,
        "float8": tao.Float8DynamicActivationFloat8WeightConfig,
    }
    names = set(chosen_layers(patch.pipe, scheme, layers, unet))
    done = Quantization(scheme, tuple(sorted(names)), weights=digest(unet, names))
    with logged_size(unet):
        patch.converts(unet, [f"{name}.weight" for name in done.layers])
        for name in names:
            patch.touch(unet.get_submodule(name))
        # By default a config changes inductor's flags for everything in the process.
        config = configs[scheme](set_inductor_config=False)
        tao.quantize_(unet, config, filter_fn=lambda module, name: name in names)
    patch.set(unet, "quantization", done)


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """Import torchao without its remarks on extensions it did not find; a missing torchao says how to get it."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ModuleNotFoundError as error:
        raise OptimizationError(INSTALL_TORCHAO) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- static int8: torch.ao.quantization -------------------------------------------------------------------------------


class QuantizedCrossAttention(CrossAttention):
    """CrossAttention with its quantization points: int8 projections around attention in floating point."""

    kernel = "int8 projections"

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__(dim, context_dim, heads)
        self.quant_x, self.quant_context, self.quant_out = QuantStub(), QuantStub(), QuantStub()
        self.dequant = DeQuantStub()

    @classmethod
    def of(cls, plain: CrossAttention) -> "QuantizedCrossAttention":
        """The same layer around the same weights; plain itself is left as it is."""
        module = _sharing_weights(cls, plain, plain.to_q.in_features, plain.to_k.in_features, plain.heads)
        module.attend = plain.attend
        return module

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x [B, L, C], context [B, S, context_dim] -> [B, L, C], all in floating point."""
        x_int8 = self.quant_x(x)
        context_int8 = x_int8 if context is None else self.quant_context(context)
        q = split_heads(self.dequant(self.to_q(x_int8)), self.heads)
        k = split_heads(self.dequant(self.to_k(context_int8)), self.heads)
        v = split_heads(self.dequant(self.to_v(context_int8)), self.heads)
        out = self.quant_out(merge_heads(self.attend(q, k, v)))
        return self.dequant(self.to_out(out))


class QuantizedGEGLU(GEGLU):
    """GEGLU with an int8 projection and the gate in floating point."""

    kernel = "int8 projection"

    def __init__(self, dim: int, inner: int):
        super().__init__(dim, inner)
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.dequant(self.proj(self.quant(x))).chunk(2, dim=-1)
        return value * F.gelu(gate)


class QuantizedFeedForward(FeedForward):
    """FeedForward with both of its matrix products in int8."""

    kernel = "int8 products"

    def __init__(self, dim: int):
        super().__init__(dim)
        self.net[0] = QuantizedGEGLU(dim, 4 * dim)
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    @classmethod
    def of(cls, plain: FeedForward) -> "QuantizedFeedForward":
        """The same layer around the same weights; plain itself is left as it is."""
        return _sharing_weights(cls, plain, plain.net[2].out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequant(self.net[2](self.quant(self.net[0](x))))


STATIC_TWINS = {CrossAttention: QuantizedCrossAttention, FeedForward: QuantizedFeedForward}


def _sharing_weights(cls: type[nn.Module], plain: nn.Module, *args: int) -> nn.Module:
    with torch.device("meta"):
        module = cls(*args)
    module.load_state_dict(plain.state_dict(), assign=True)
    return module.train(plain.training)


@optimization(
    "int8-static",
    stage=Stage.QUANTIZATION,
    exact=False,
    summary="int8 attention and feed-forward, calibrated",
    needs=CPU,
    conflicts=("compile", "fused-geglu", "fused-layernorm", "fp16", "bf16"),
    beside="its ranges are found without a control",
)
def int8_static(
    patch: Patch,
    layers: Collection[str] | None = None,
    prompts: Sequence[str] = CALIBRATION_PROMPTS,
    steps: int = 4,
    size: int | None = None,
    engine: str = "x86",
) -> None:
    """Run the transformers' attention projections and feed-forwards in int8 on the CPU, ranges known beforehand.

    The pipeline first samples `steps` steps of each prompt at size x size pixels (None: the trained size) while
    observers note every range; then the layers are swapped for packed int8 ones. Approximate.

    Helps: CPUs, which have fast int8 kernels: SD 1.5's 48 attention and feed-forward modules at 512x512 run 1.05 to
    2.3 times as fast without VNNI, median 1.5, and a picture at 256x256 1.07 times.
    Hurts: the picture, because activations share one scale a tensor, and without VNNI have 7 bits (`has_vnni`); and the
    start, as calibration costs several times `steps` guided steps a prompt: keep its result with `save_quantized`.

    layers: names of CrossAttention and FeedForward modules of the UNet; None is `default_layers`.
    engine: the kernels, "x86" or "onednn". Raises OptimizationError unless the pipeline is in fp32.
    """
    require_cpu_fp32(patch.pipe, engine)
    unet = patch.unet
    names = chosen_layers(patch.pipe, "int8_static", layers)
    done = Quantization("int8_static", tuple(names), engine, not has_vnni(), digest(unet, names))
    with logged_size(unet):
        plain = _prepare(unet, names, done.reduce_range)
        try:
            calibrate(patch.pipe, prompts, steps, size)
            with engine_set(engine), quiet_torch_ao():
                converted = {name: convert(unet.get_submodule(name), inplace=True) for name in names}
        finally:
            for name, module in plain.items():
                unet.set_submodule(name, module)
        for name, module in converted.items():
            patch.replace(unet, name, module)
    patch.set(unet, "quantization", done)


@cache
def has_vnni() -> bool:
    """Whether the CPU adds int8 products up in 32 bits.

    Without VNNI, AVX2 adds pairs of them in 16 bits, which saturate: 8-bit activations then cost 11 to 28% of error
    where 7-bit ones (reduce_range) cost 2%.
    """
    # In AVX2's newer form of VNNI the kernels of engine x86 do not believe, so only AVX-512's and AMX's count.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith(("AVX512_VNNI", "AMX")):
        return True
    return capability.startswith("AVX512") and bool(torch.cpu._is_vnni_supported())


def require_cpu_fp32(pipe: StableDiffusion, engine: str) -> None:
    if pipe.device.type != "cpu" or pipe.dtype != torch.float32:
        raise OptimizationError(f"int8-static needs a CPU, in fp32; this is {here(pipe)}; use int8-dynamic or float8")
    engines = [name for name in ("x86", "onednn") if name in torch.backends.quantized.supported_engines]
    if engine not in engines:
        raise OptimizationError(f"no int8 engine {engine!r} here; there are: {', '.join(engines) or 'none'}")


def _prepare(unet: nn.Module, names: Sequence[str], reduce_range: bool) -> dict[str, nn.Module]:
    """Swap in the layers with quantization points and put observers on these; returns the plain layers."""
    plain = {name: unet.get_submodule(name) for name in names}
    for name, module in plain.items():
        twin = STATIC_TWINS[type(module)].of(module)
        for part in twin.modules():
            if isinstance(part, QuantStub | DeQuantStub | nn.Linear):
                part.qconfig = _qconfig(reduce_range and isinstance(part, QuantStub))
        with quiet_torch_ao():
            prepare(twin, inplace=True)
        unet.set_submodule(name, twin)
    return plain


def _qconfig(reduce_range: bool) -> QConfig:
    """Only what enters a matrix product needs the reduced range; results go straight back to floating point."""
    activation = HistogramObserver.with_args(reduce_range=reduce_range)
    return QConfig(activation=activation, weight=default_per_channel_weight_observer)


@torch.no_grad()
def calibrate(pipe: StableDiffusion, prompts: Sequence[str], steps: int, size: int | None) -> None:
    """Draw some DDIM steps of each prompt at size x size pixels (None: the trained size), for observers to see."""
    if not prompts:
        raise OptimizationError("calibration needs at least one prompt")
    size = size or pipe.config.image_size
    pipe.config.check_size(size, size)
    side = size // pipe.config.vae.downsampling
    shape = (pipe.config.vae.z_channels, side, side)
    for seed, prompt in enumerate(prompts):
        noise = PictureNoise([seed], shape, pipe.device, pipe.dtype)
        x, channels = noise(), pipe.config.unet.in_channels - shape[0]
        beside = x.new_zeros(1, channels, side, side) if channels else None
        conditions = Conditions(pipe.encode_prompts([prompt], [""]), 7.5, beside=beside)
        pipe.sample(x, conditions, choose("ddim"), leading(steps), noise)


@contextmanager
def engine_set(name: str) -> Iterator[None]:
    """The engine matters while weights are packed; the packed weights then call the right kernel by themselves."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def quiet_torch_ao() -> Iterator[None]:
    """torch.ao.quantization works in torch 2.13 and says at every turn that it will go."""
    expected = (
        r"torch\.ao\.quantization is deprecated",
        r"torch\.quantize_per_tensor, .* are deprecated",
        "Please use quant_min and quant_max",
        "must run observer before",  # self-attention has no context, so that its quant_context is never used
    )
    with warnings.catch_warnings():
        for message in expected:
            warnings.filterwarnings("ignore", message=message)
        yield


# --- which layers -----------------------------------------------------------------------------------------------------


def candidates(unet: nn.Module, scheme: str) -> list[str]:
    """Names of the modules of the UNet that the scheme can quantize, large enough to bother."""
    return [name for name, module in unet.named_modules() if _can_take(scheme, name, module)]


def _can_take(scheme: str, name: str, module: nn.Module) -> bool:
    if scheme == "int8_static":
        return _is_plain_block(module) and all(_is_large(part) for part in _linears(module))
    if not isinstance(module, nn.Linear) or not _is_large(module):
        return False
    if scheme == "int8_weight_only":
        return True
    # torchao takes one scale a tensor of 128 x 128 for one of its scales a block, and fails when it multiplies.
    if scheme == "float8" and module.weight.shape == (128, 128):
        return False
    # The kernels take sides that are multiples of 16, and more rows than the time embedding has: one a picture.
    return ".transformer_blocks." in name and module.in_features % 16 == 0 and module.out_features % 16 == 0


def _is_plain_block(module: nn.Module) -> bool:
    """Attention or feed-forward as sd.unet has them, not another optimization's replacement."""
    if type(module) is FeedForward:
        return type(module.net[0]) is GEGLU
    return type(module) is CrossAttention


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _is_large(linear: nn.Linear) -> bool:
    return min(linear.in_features, linear.out_features) >= MIN_FEATURES


def default_layers(pipe: StableDiffusion, scheme: str, unet: nn.Module | None = None) -> list[str]:
    """The candidates but for those that `bench/sensitivity.py` measured to be not worth it for this model."""
    measured = json.loads(FILTER_FILE.read_text()) if FILTER_FILE.exists() else {}
    skip = measured.get(pipe.config.name, {}).get(scheme, {}).get("skip", [])
    return [name for name in candidates(unet or pipe.unet, scheme) if name not in skip]


def chosen_layers(
    pipe: StableDiffusion, scheme: str, layers: Collection[str] | None, unet: nn.Module | None = None
) -> list[str]:
    """Of the pipeline's UNet, or of a ControlNet, whose layers have the same names."""
    unet = unet or pipe.unet
    if done := getattr(unet, "quantization", None):
        raise OptimizationError(f"the UNet is quantized already, by {done.switch}; undo that first")
    if layers is None:
        names = default_layers(pipe, scheme, unet)
    else:
        names = list(layers)
        if unknown := set(names) - set(candidates(unet, scheme)):
            raise OptimizationError(f"{scheme} cannot take {', '.join(sorted(unknown))}")
    if not names:
        raise OptimizationError(f"{scheme} finds no layer to quantize in this UNet")
    return names


# --- memory -----------------------------------------------------------------------------------------------------------


def weight_bytes(pipe: StableDiffusion) -> dict[str, int]:
    """Bytes of weights and buffers, by model: {"clip", "unet", "vae"}. Quantized ones count as they are stored."""
    return {name: _model_bytes(getattr(pipe, name)) for name in ("clip", "unet", "vae")}


def _model_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, nnq.Linear):
            tensors += static_tensors(module).values()
    return sum(_tensor_bytes(tensor) for tensor in tensors)


def _tensor_bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors are made of several
        return sum(_tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@contextmanager
def logged_size(model: nn.Module) -> Iterator[None]:
    before = _model_bytes(model)
    yield
    log.info("%s weights %.0f MB -> %.0f MB", type(model).__name__, before / 1e6, _model_bytes(model) / 1e6)


def static_tensors(part: nn.Module) -> dict[str, Tensor]:
    """A packed layer or a quantization point as plain tensors, exactly."""
    if isinstance(part, nnq.Quantize):
        return {"scale": part.scale, "zero_point": part.zero_point}
    weight, bias = part._weight_bias()
    tensors = {
        "weight": weight.int_repr(),
        "weight_scale": weight.q_per_channel_scales(),
        "weight_zero_point": weight.q_per_channel_zero_points(),
        "scale": torch.tensor(part.scale, dtype=torch.float64),
        "zero_point": torch.tensor(part.zero_point),
    }
    return tensors if bias is None else {**tensors, "bias": bias}


SCHEMES: dict[str, Optimization] = {
    "int8_weight_only": int8_weight_only,
    "int8_dynamic": int8_dynamic,
    "float8": float8,
    "int8_static": int8_static,
}
"""The switches by scheme."""
