"""Quantization: the UNet's matrix products with 8-bit weights, four ways, each a function of a loaded pipeline.

    int8_weight_only   int8 weights, activations as they were; saves memory              torchao, any device
    int8_dynamic       int8 weights, activations to int8 row by row as they come         torchao, CPU and CUDA
    float8             the same in float8_e4m3                                           torchao, CUDA from sm89 on
    int8_static        int8 weights and activations, ranges calibrated beforehand        torch.ao.quantization, CPU

All are approximate and touch nothing but layers of `pipe.unet`; the models know nothing of them. 3x3 convolutions,
half of the work of SD 1.5, have no 8-bit kernel here and stay as they are. `save_quantized` and `load_quantized` keep
the result in a file; `quantize_filter.json` holds the layers that `bench/sensitivity.py` found not worth it.

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
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
import torch.ao.nn.quantized as nnq
import torch.nn.functional as F
from safetensors.torch import save_file
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

from sd.attention import merge_heads, split_heads
from sd.ddpm import spaced_timesteps
from sd.samplers import PictureNoise
from sd.unet import GEGLU, CrossAttention, FeedForward

if TYPE_CHECKING:
    from sd.pipeline import StableDiffusion

log = logging.getLogger(__name__)

SCHEMES = ("int8_weight_only", "int8_dynamic", "float8", "int8_static")
FILTER_FILE = Path(__file__).with_name("quantize_filter.json")
FILE_FORMAT = "sd-quantized-1"
INSTALL_TORCHAO = "quantization by torchao needs it: pip install torchao==0.18.0"
CALIBRATION_PROMPTS = ("a photograph of an astronaut riding a horse", "a bowl of fruit on a table, oil painting")

# Below this many features on either side a layer's quantization costs more than its matrix product.
MIN_FEATURES = 32


@dataclass(frozen=True)
class Quantization:
    """What was done to a UNet; kept as its attribute `quantization`. engine and reduce_range are int8_static's."""

    scheme: str
    layers: tuple[str, ...]
    engine: str = ""
    reduce_range: bool = False


# --- torchao: one call a scheme ---------------------------------------------------------------------------------------


def int8_weight_only(pipe: "StableDiffusion", layers: Collection[str] | None = None) -> None:
    """Keep the weights of Linear layers as int8, one scale a row, and widen them at each use. Approximate.

    Helps: memory, 3438 -> 2629 MB for SD 1.5's UNet in fp32 and 1719 -> 1450 MB in fp16; the convolutions stay.
    Hurts: time. Each call first writes the whole weight out in the activations' dtype and only then multiplies; reading
    weights is a small part of a step at this size, so there is nothing to win back. Compiling fuses the two.
    Measured on 2 cores with AVX2: 85 layers of SD 1.5 at 512x512 run at 0.31 to 1.04 of their speed, median 0.88; a
    picture at 256x256 at 0.97, and at 0.77 after the C++ kernels, which the quantized layers cannot use.

    layers: names of the UNet's Linear layers; None is `default_layers`. Raises ImportError without torchao,
    ValueError for layers that it cannot take.
    """
    _apply_torchao(pipe, "int8_weight_only", layers)


def int8_dynamic(pipe: "StableDiffusion", layers: Collection[str] | None = None) -> None:
    """Multiply int8 by int8 in the transformers' Linear layers; activations are rounded as they come. Approximate.

    Helps: on GPUs with int8 tensor cores, compiled, where the layers are large.
    Hurts: on CPUs without VNNI, where `torch._int_mm` has no kernel to speak of: 7 to 40 times slower than plain
    (table above), so take `int8_static` there. Needs no calibration. Not yet measured on a GPU.

    Arguments and errors as in `int8_weight_only`, and ValueError on devices other than CPU and CUDA.
    """
    if pipe.device.type not in ("cpu", "cuda"):
        raise ValueError(f"int8_dynamic runs on cpu and cuda, not on {pipe.device.type}; use int8_weight_only")
    if pipe.device.type == "cpu" and not has_vnni():
        log.warning("int8_dynamic is 7 to 40 times slower than fp32 on this CPU, which lacks VNNI; use int8_static")
    _apply_torchao(pipe, "int8_dynamic", layers)


def float8(pipe: "StableDiffusion", layers: Collection[str] | None = None) -> None:
    """Multiply float8_e4m3 by float8_e4m3 in the transformers' Linear layers, one scale a tensor. Approximate.

    Helps: compiled, on Ada and Hopper; these layers are 29% of a step. Hurts: in eager mode, where scaling the
    activations is more kernels a layer. Both are expectations: it has not been run yet.

    Arguments and errors as in `int8_weight_only`, and ValueError where there are no float8 matrix products.
    """
    _require_float8(pipe)
    _apply_torchao(pipe, "float8", layers)


def _require_float8(pipe: "StableDiffusion") -> None:
    on_cuda = pipe.device.type == "cuda"
    if not on_cuda or torch.cuda.get_device_capability(pipe.device) < (8, 9):
        found = torch.cuda.get_device_name(pipe.device) if on_cuda else f"device {pipe.device.type!r}"
        raise ValueError(
            "float8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper), and the model is on "
            f"{found}; use int8_dynamic on older GPUs, int8_static on CPUs"
        )


def _apply_torchao(pipe: "StableDiffusion", scheme: str, layers: Collection[str] | None) -> None:
    with _quiet_torchao():
        from torchao import quantization as tao
    configs = {
        "int8_weight_only": tao.Int8WeightOnlyConfig,
        "int8_dynamic": tao.Int8DynamicActivationInt8WeightConfig,
        "float8": tao.Float8DynamicActivationFloat8WeightConfig,
    }
    names = set(_chosen(pipe, scheme, layers))
    with _logged_size(pipe):
        # By default a config changes inductor's flags for everything in the process.
        config = configs[scheme](set_inductor_config=False)
        tao.quantize_(pipe.unet, config, filter_fn=lambda module, name: name in names)
        pipe.unet.quantization = Quantization(scheme, tuple(sorted(names)))


@contextmanager
def _quiet_torchao() -> Iterator[None]:
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
        raise ImportError(INSTALL_TORCHAO) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- static int8: torch.ao.quantization -------------------------------------------------------------------------------


class QuantizedCrossAttention(CrossAttention):
    """CrossAttention with its quantization points: int8 projections around attention in floating point."""

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

    def __init__(self, dim: int, inner: int):
        super().__init__(dim, inner)
        self.quant, self.dequant = QuantStub(), DeQuantStub()

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.dequant(self.proj(self.quant(x))).chunk(2, dim=-1)
        return value * F.gelu(gate)


class QuantizedFeedForward(FeedForward):
    """FeedForward with both of its matrix products in int8."""

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


def int8_static(
    pipe: "StableDiffusion",
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
    engine: the kernels, "x86" or "onednn". Raises ValueError unless the pipeline is in fp32 on the CPU.
    """
    _require_cpu_fp32(pipe, engine)
    names = _chosen(pipe, "int8_static", layers)
    reduce_range = not has_vnni()
    with _logged_size(pipe):
        plain = _prepare(pipe.unet, names, reduce_range)
        try:
            _calibrate(pipe, prompts, steps, size)
            with _engine(engine), _quiet_torch_ao():
                for name in names:
                    convert(pipe.unet.get_submodule(name), inplace=True)
        except BaseException:
            for name, module in plain.items():
                pipe.unet.set_submodule(name, module)
            raise
        pipe.unet.quantization = Quantization("int8_static", tuple(names), engine, reduce_range)


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


def _require_cpu_fp32(pipe: "StableDiffusion", engine: str) -> None:
    if pipe.device.type != "cpu" or pipe.dtype != torch.float32:
        found = f"{pipe.dtype} on {pipe.device.type}".removeprefix("torch.")
        raise ValueError(f"int8_static needs the model in float32 on the cpu, not {found}; use int8_dynamic or float8")
    engines = [name for name in ("x86", "onednn") if name in torch.backends.quantized.supported_engines]
    if engine not in engines:
        raise ValueError(f"no int8 engine {engine!r} here; there are: {', '.join(engines) or 'none'}")


def _prepare(unet: nn.Module, names: Sequence[str], reduce_range: bool) -> dict[str, nn.Module]:
    """Swap in the layers with quantization points and put observers on these; returns the plain layers."""
    plain = {name: unet.get_submodule(name) for name in names}
    for name, module in plain.items():
        twin = STATIC_TWINS[type(module)].of(module)
        for part in twin.modules():
            if isinstance(part, QuantStub | DeQuantStub | nn.Linear):
                part.qconfig = _qconfig(reduce_range and isinstance(part, QuantStub))
        with _quiet_torch_ao():
            prepare(twin, inplace=True)
        unet.set_submodule(name, twin)
    return plain


def _qconfig(reduce_range: bool) -> QConfig:
    """Only what enters a matrix product needs the reduced range; results go straight back to floating point."""
    activation = HistogramObserver.with_args(reduce_range=reduce_range)
    return QConfig(activation=activation, weight=default_per_channel_weight_observer)


@torch.no_grad()
def _calibrate(pipe: "StableDiffusion", prompts: Sequence[str], steps: int, size: int | None) -> None:
    if not prompts:
        raise ValueError("calibration needs at least one prompt")
    size = size or pipe.config.image_size
    pipe.config.check_size(size, size)
    side = size // pipe.config.vae.downsampling
    shape = (pipe.config.vae.z_channels, side, side)
    for seed, prompt in enumerate(prompts):
        noise = PictureNoise([seed], shape, pipe.device, pipe.dtype)
        context = pipe.encode_prompts([prompt], [""])
        pipe.sample(noise(), context, 7.5, "ddim", spaced_timesteps(steps), noise)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """The engine matters while weights are packed; the packed weights then call the right kernel by themselves."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


@contextmanager
def _quiet_torch_ao() -> Iterator[None]:
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


def default_layers(pipe: "StableDiffusion", scheme: str) -> list[str]:
    """The candidates but for those that `bench/sensitivity.py` measured to be not worth it for this model."""
    measured = json.loads(FILTER_FILE.read_text()) if FILTER_FILE.exists() else {}
    skip = measured.get(pipe.config.name, {}).get(scheme, {}).get("skip", [])
    return [name for name in candidates(pipe.unet, scheme) if name not in skip]


def _chosen(pipe: "StableDiffusion", scheme: str, layers: Collection[str] | None) -> list[str]:
    if done := getattr(pipe.unet, "quantization", None):
        raise ValueError(f"the UNet is quantized already, by {done.scheme}; load the model afresh")
    if layers is None:
        names = default_layers(pipe, scheme)
    else:
        names = list(layers)
        if unknown := set(names) - set(candidates(pipe.unet, scheme)):
            raise ValueError(f"{scheme} cannot take {', '.join(sorted(unknown))}")
    if not names:
        raise ValueError(f"{scheme} finds no layer to quantize in this UNet")
    return names


# --- memory -----------------------------------------------------------------------------------------------------------


def weight_bytes(pipe: "StableDiffusion") -> dict[str, int]:
    """Bytes of weights and buffers, by model: {"clip", "unet", "vae"}. Quantized ones count as they are stored."""
    return {name: _model_bytes(getattr(pipe, name)) for name in ("clip", "unet", "vae")}


def _model_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, nnq.Linear):
            tensors += _static_tensors(module).values()
    return sum(_tensor_bytes(tensor) for tensor in tensors)


def _tensor_bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors are made of several
        return sum(_tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@contextmanager
def _logged_size(pipe: "StableDiffusion") -> Iterator[None]:
    before = weight_bytes(pipe)["unet"]
    yield
    after = weight_bytes(pipe)["unet"]
    log.info("UNet weights %.0f MB -> %.0f MB", before / 1e6, after / 1e6)


# --- files ------------------------------------------------------------------------------------------------------------


def save_quantized(pipe: "StableDiffusion", path: str | os.PathLike) -> None:
    """Write the quantized layers, and only these, to a .safetensors file that `load_quantized` reads.

    It holds int8 or float8 data, scales and zero points; scheme, layers and the rest of the recipe are in its metadata
    as JSON. Raises ValueError if nothing is quantized.
    """
    done: Quantization | None = getattr(pipe.unet, "quantization", None)
    if done is None:
        raise ValueError("the UNet is not quantized: apply one of " + ", ".join(SCHEMES) + " before saving")
    if done.scheme == "int8_static":
        tensors, attributes = _flatten_static(pipe.unet, done.layers), {}
    else:
        tensors, attributes = _flatten_torchao(pipe.unet, done.layers)
    metadata = {
        "format": FILE_FORMAT,
        "quantization": json.dumps(asdict(done)),
        "base": json.dumps(_base(pipe)),
        "attributes": json.dumps(attributes),
    }
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    os.replace(temporary, path)


def load_quantized(pipe: "StableDiffusion", path: str | os.PathLike) -> None:
    """Put the layers of a file by `save_quantized` into a plain pipeline: no calibration, bit for bit the saved model.

    The pipeline must hold the weights and the dtype that the file was made from. Nothing in the file is executed.
    Raises FileNotFoundError, or ValueError for a file that does not fit the pipeline or the machine.
    """
    metadata, tensors = _read(path, pipe.device)
    with _readable(path):
        done = _quantization(json.loads(metadata["quantization"]))
        base, attributes = json.loads(metadata["base"]), dict(json.loads(metadata["attributes"]))
    _check_machine(pipe, done, path)
    _check_base(pipe, base, path)
    names = _chosen(pipe, done.scheme, done.layers)
    with _logged_size(pipe):
        with _readable(path):
            if done.scheme == "int8_static":
                new = _unflatten_static(pipe.unet, names, tensors, done.engine)
            else:
                new = _unflatten_torchao(pipe.unet, names, tensors, attributes)
        for name, module in new.items():
            pipe.unet.set_submodule(name, module)
        pipe.unet.quantization = done


@contextmanager
def _readable(path: str | os.PathLike) -> Iterator[None]:
    """Whatever goes wrong while taking a file's content apart is the file's fault."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _read(path: str | os.PathLike, device: torch.device) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no quantized weights at {path}")
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"{path} holds no quantized weights of format {FILE_FORMAT}; make it with save_quantized")
    return metadata, tensors


def _quantization(raw: dict) -> Quantization:
    done = Quantization(**{**raw, "layers": tuple(raw["layers"])})
    if done.scheme not in SCHEMES:
        raise ValueError(f"it names the scheme {done.scheme!r}, which is none of {', '.join(SCHEMES)}")
    return done


def _check_machine(pipe: "StableDiffusion", done: Quantization, path: str | os.PathLike) -> None:
    if done.scheme == "float8":
        _require_float8(pipe)
    if done.scheme == "int8_static":
        _require_cpu_fp32(pipe, done.engine)
        if not done.reduce_range and not has_vnni():
            raise ValueError(f"{path} was calibrated for a CPU with VNNI and would saturate here: calibrate anew")


def _base(pipe: "StableDiffusion") -> dict[str, str]:
    """What a file must find in the pipeline that it is loaded into; the last convolution stands for all weights."""
    last = pipe.unet.out[2].weight.detach().cpu().contiguous()
    digest = hashlib.sha256(last.view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"unet": json.dumps(asdict(pipe.config.unet)), "dtype": str(pipe.dtype), "weights": digest}


def _check_base(pipe: "StableDiffusion", saved: dict[str, str], path: str | os.PathLike) -> None:
    here = _base(pipe)
    if saved.get("unet") != here["unet"]:
        raise ValueError(f"{path} was made from a UNet of another configuration")
    if saved.get("dtype") != here["dtype"]:
        raise ValueError(f"{path} was made in {saved.get('dtype')}, and the model is in {here['dtype']}")
    if saved.get("weights") != here["weights"]:
        raise ValueError(f"{path} was made from another checkpoint than the one loaded")


def _flatten_torchao(unet: nn.Module, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _quiet_torchao():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    return flatten_tensor_state_dict({f"{name}.weight": unet.get_submodule(name).weight.data for name in names})


def _unflatten_torchao(
    unet: nn.Module, names: Sequence[str], tensors: dict[str, Tensor], attributes: dict[str, str]
) -> dict[str, nn.Module]:
    with _quiet_torchao():
        from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
    weights, _ = unflatten_tensor_state_dict(tensors, attributes)
    new = {}
    for name in names:
        plain, weight = unet.get_submodule(name), weights[f"{name}.weight"]
        if weight.shape != plain.weight.shape or weight.dtype != plain.weight.dtype:
            raise TypeError(f"{name}.weight is {list(weight.shape)}, {weight.dtype}")
        with torch.device("meta"):
            linear = nn.Linear(plain.in_features, plain.out_features, plain.bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = plain.bias
        new[name] = linear.train(plain.training)
    return new


def _flatten_static(unet: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    tensors = {}
    for name in names:
        for part_name, part in unet.get_submodule(name).named_modules(prefix=name):
            if isinstance(part, nnq.Linear | nnq.Quantize):
                tensors |= {f"{part_name}.{key}": tensor for key, tensor in _static_tensors(part).items()}
    return tensors


def _static_tensors(part: nn.Module) -> dict[str, Tensor]:
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


def _unflatten_static(
    unet: nn.Module, names: Sequence[str], tensors: dict[str, Tensor], engine: str
) -> dict[str, nn.Module]:
    new = {}
    for name in names:
        plain = unet.get_submodule(name)
        new[name] = twin = STATIC_TWINS[type(plain)].of(plain)
        for part_name, part in list(twin.named_modules()):
            if isinstance(part, nn.Linear | QuantStub | DeQuantStub):
                prefix = f"{name}.{part_name}."
                own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                with _engine(engine), _quiet_torch_ao():
                    twin.set_submodule(part_name, _static_part(part, own))
    return new


def _static_part(part: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """What `convert` makes of a module, from saved tensors in place of observed ranges."""
    if isinstance(part, DeQuantStub):
        return nnq.DeQuantize()
    scale, zero_point = tensors["scale"].item(), tensors["zero_point"].item()
    if isinstance(part, QuantStub):
        return nnq.Quantize(scale, zero_point, torch.quint8)
    data, bias = tensors["weight"], tensors.get("bias")
    if data.shape != part.weight.shape or data.dtype != torch.int8 or (bias is None) != (part.bias is None):
        raise TypeError(f"a weight is {list(data.shape)}, {data.dtype}, for a layer of {list(part.weight.shape)}")
    weight = torch._make_per_channel_quantized_tensor(data, tensors["weight_scale"], tensors["weight_zero_point"], 0)
    linear = nnq.Linear(part.in_features, part.out_features, bias_=bias is not None)
    linear.set_weight_bias(weight, bias)
    linear.scale, linear.zero_point = scale, zero_point
    return linear
