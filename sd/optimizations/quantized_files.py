"""Quantized layers in a file: calibrated once, loaded as they were, and tied to the weights that they are made from."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import safetensors
import torch
import torch.ao.nn.quantized as nnq
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub, QuantStub

from sd.checkpoints.files import check_header
from sd.kernels.dots import Scale
from sd.optimizations.base import Record, in_the_weights_mode, record_of
from sd.optimizations.cpu_int8 import put_in_with, scales_of
from sd.optimizations.dot_layers import SHORT, put_in
from sd.optimizations.quantization import (
    FLOAT8,
    STATIC_TWINS,
    SWITCHES,
    Quantization,
    check_plain,
    chosen_layers,
    digest,
    engine_set,
    has_vnni,
    logged_size,
    quiet_torch_ao,
    quiet_torchao,
    require_cpu_fp32,
    static_tensors,
)
from sd.pipeline import StableDiffusion
from sd.writing import written_whole

FILE_FORMAT = "sd-quantized-2"


def save_quantized(pipe: StableDiffusion, path: str | os.PathLike) -> None:
    """Write the quantized layers, and only these, to a .safetensors file that `load_quantized` reads.

    It holds int8 or float8 data, scales and zero points; scheme, layers and the rest of the recipe are in its metadata
    as JSON. Raises ValueError if nothing is quantized.
    """
    done: Quantization | None = getattr(pipe.unet, "quantization", None)
    if done is None:
        raise ValueError("the UNet is not quantized: apply one of " + ", ".join(SWITCHES.values()) + " before saving")
    if done.scheme == "cpu_int8":
        # The ranges alone: the weights are where they were, and are rounded again when they are packed.
        done = replace(done, weights=_digest(pipe, done))
        scales = scales_of(pipe.unet).items()
        tensors, attributes = {name: torch.tensor(scale, dtype=torch.float64) for name, scale in scales}, {}
    elif done.scheme == "int8_static":
        tensors, attributes = _flatten_static(pipe.unet, done.layers), {}
    else:
        tensors, attributes = _flatten_torchao(pipe.unet, done.layers)
    metadata = {
        "format": FILE_FORMAT,
        "quantization": json.dumps(asdict(done)),
        "base": json.dumps(_base(pipe)),
        "attributes": json.dumps(attributes),
    }
    with written_whole(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)


@in_the_weights_mode
def load_quantized(pipe: StableDiffusion, path: str | os.PathLike) -> None:
    """Put the layers of a file by `save_quantized` into a plain pipeline: no calibration, bit for bit the saved model.

    The pipeline must hold the weights and the dtype that the file was made from. Nothing in the file is executed.
    Raises FileNotFoundError, or ValueError for a file that does not fit the pipeline or the machine.
    """
    check_plain(pipe)
    metadata, tensors = _read(path, pipe.device)
    with _readable(path):
        done = _quantization(json.loads(metadata["quantization"]))
        base, attributes = json.loads(metadata["base"]), dict(json.loads(metadata["attributes"]))
    _check_machine(pipe, done, path)
    if done.scheme != "cpu_int8":  # whose weights may be of any type
        _check_base(pipe, base, path)
    names = done.layers if done.scheme == "cpu_int8" else chosen_layers(pipe, done.scheme, done.layers)
    if done.weights != _digest(pipe, done):
        raise ValueError(f"{path} was made from other weights than those loaded: another checkpoint, or a changed one")
    record = record_of(pipe) or Record(pipe)
    patch = record.patch(done.switch)
    try:
        with logged_size(pipe.unet):
            with _readable(path):
                if done.scheme == "cpu_int8":
                    patch.again = put_in
                    put_in_with(patch, {name: Scale(*tensors[name].tolist()) for name in names})
                    new = {}
                elif done.scheme == "int8_static":
                    new = _unflatten_static(pipe.unet, names, tensors, done.engine)
                else:
                    new = _unflatten_torchao(pipe.unet, names, tensors, attributes)
            for name, module in new.items():
                patch.replace(pipe.unet, name, module)
        patch.set(pipe.unet, "quantization", done)
    except BaseException:
        record.undo([patch])
        raise
    patch.finish()
    pipe.record = record


def _digest(pipe: StableDiffusion, done: Quantization) -> str:
    """Of the weights that a file is tied to; where they may be of any type, of their numbers."""
    return digest(pipe.unet, done.layers, torch.float32 if done.scheme == "cpu_int8" else None)


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
    check_header(Path(path))
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != FILE_FORMAT:
        raise ValueError(f"{path} holds no quantized weights of format {FILE_FORMAT}; make it with save_quantized")
    return metadata, tensors


def scheme_of(path: str | os.PathLike) -> str:
    """The scheme of a file by `save_quantized`. Raises as `load_quantized` does."""
    metadata, _ = _read(path, torch.device("cpu"))
    with _readable(path):
        return _quantization(json.loads(metadata["quantization"])).scheme


def _quantization(raw: dict) -> Quantization:
    done = Quantization(**{**raw, "layers": tuple(raw["layers"])})
    if done.scheme not in SWITCHES:
        raise ValueError(f"it names the scheme {done.scheme!r}, which is none of {', '.join(SWITCHES)}")
    return done


def _check_machine(pipe: StableDiffusion, done: Quantization, path: str | os.PathLike) -> None:
    if done.scheme == "float8" and (missing := FLOAT8.why_not(pipe)):
        raise ValueError(f"{path} needs {FLOAT8.text}; {missing}")
    if done.scheme == "cpu_int8" and (missing := SHORT.why_not(pipe)):
        raise ValueError(f"{path} needs {SHORT.text}; {missing}")
    if done.scheme == "int8_static":
        require_cpu_fp32(pipe, done.engine)
        if not done.reduce_range and not has_vnni():
            raise ValueError(f"{path} was calibrated for a CPU with VNNI and would saturate here: calibrate anew")


def _base(pipe: StableDiffusion) -> dict[str, str]:
    """What a file must find in the pipeline that it is loaded into, beside the weights."""
    return {"unet": json.dumps(asdict(pipe.config.unet)), "dtype": str(pipe.dtype)}


def _check_base(pipe: StableDiffusion, saved: dict[str, str], path: str | os.PathLike) -> None:
    here = _base(pipe)
    if saved.get("unet") != here["unet"]:
        raise ValueError(f"{path} was made from a UNet of another configuration")
    if saved.get("dtype") != here["dtype"]:
        raise ValueError(f"{path} was made in {saved.get('dtype')}, and the model is in {here['dtype']}")


def _flatten_torchao(unet: nn.Module, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    with quiet_torchao():
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    return flatten_tensor_state_dict({f"{name}.weight": unet.get_submodule(name).weight.data for name in names})


def _unflatten_torchao(
    unet: nn.Module, names: Sequence[str], tensors: dict[str, Tensor], attributes: dict[str, str]
) -> dict[str, nn.Module]:
    with quiet_torchao():
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
                tensors |= {f"{part_name}.{key}": tensor for key, tensor in static_tensors(part).items()}
    return tensors


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
                with engine_set(engine), quiet_torch_ao():
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
