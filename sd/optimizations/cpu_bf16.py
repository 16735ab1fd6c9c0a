"""Products of bf16 numbers on CPUs that multiply them faster than fp32, and fp32 between them."""

from collections.abc import Iterator

import torch
from torch import nn

from sd.kernels import dots, native
from sd.optimizations.base import CPU, Need, Patch, Stage, assign, optimization
from sd.optimizations.dot_layers import (
    BLOCKS,
    DotAttnBlock,
    DotConv,
    DotGEGLU,
    DotHead,
    DotLinear,
    DotSelfAttention,
    DotTransformerBlock,
    Packed,
    dot_attention,
)
from sd.pipeline import StableDiffusion
from sd.unet import CrossAttention
from sd.vae import AttnBlock, Downsample


def _why_not(pipe: StableDiffusion) -> str:
    if missing := CPU.why_not(pipe) or native.why_not():
        return missing
    return "" if dots.fast() else f"this one has neither ({native.instruction_set()}): fp32 is faster here"


SHORT = Need("a CPU with AMX or AVX512-BF16, and a C++ compiler", _why_not)


@optimization(
    "cpu-bf16",
    stage=Stage.PRECISION,
    exact=False,
    summary="products of bf16 numbers in C++, fp32 between them",
    needs=SHORT,
    conflicts=(
        *("fp16", "bf16", "compile", "channels-last", "pointwise-linear", "prepacked"),
        *("winograd", "cpu-linear", "cpu-attention", "cpu-norm", "attention", "naive", "packed-qkv"),
        *("int8-weights", "int8-dynamic", "int8-static", "float8"),
    ),
    dtype=torch.float32,
)
def cpu_bf16(patch: Patch) -> None:
    """Convolutions, linear layers and attention of the UNet and the VAE with bf16 numbers and fp32 sums, by AMX or
    AVX-512; the residual stream, norms, softmax, the timestep's layers and the sampler in fp32. Approximate, and nearer
    to fp32 than a model that is in bf16 as a whole.

    Weights may be in any type. They are packed when they first run, and left where they are: mapped from their file
    they take no memory then. Helps: CPUs of servers since 2022. Hurts: others, which multiply fp32 faster.
    """
    layers = dict(_layers(patch))
    for layer, kind in layers.items():
        own = {"moved": False} if kind is DotConv else {"out": torch.float32}
        patch.swap(layer, kind, packed=Packed((layer,)), **own)
    for plain, fast in BLOCKS.items():
        for module in patch.modules(plain, patch.unet, patch.vae):
            patch.swap(module, fast)
            if plain is Downsample:
                patch.set(module.conv, "moved", True)
    for block in patch.modules(DotTransformerBlock, patch.unet):
        _attention(patch, block.attn1, block.attn2)
        gate = block.ff.net[0]
        patch.swap(gate, DotGEGLU, packed=Packed((gate.proj,), geglu=True))
        patch.within(gate.proj)
    for module in patch.modules(AttnBlock, patch.vae):
        projections = module.q, module.k, module.v
        patch.swap(module, DotAttnBlock, packed=Packed(projections), last=Packed((module.proj_out,)))
        patch.set(module, "attend", dot_attention, label="C++ bf16")
        patch.within(*projections, module.proj_out)
    patch.swap(patch.unet.out, DotHead)
    _all_else_in_fp32(patch, {id(layer.weight) for layer in layers})


def _layers(patch: Patch) -> Iterator[tuple[nn.Module, type[nn.Module]]]:
    """The products: of the UNet all but the timestep's, of the VAE all but those from four channels to four."""
    for path, layer in [*patch.unet.named_modules(), *patch.vae.named_modules()]:
        if type(layer) is nn.Linear and "time_embed" not in path and "emb_layers" not in path:
            yield layer, DotLinear
        elif type(layer) is nn.Conv2d and "quant_conv" not in path:
            yield layer, DotConv


def _attention(patch: Patch, to_itself: CrossAttention, to_text: CrossAttention) -> None:
    for module in (to_itself, to_text):
        patch.set(module, "attend", dot_attention, label="C++ bf16")
    projections = to_itself.to_q, to_itself.to_k, to_itself.to_v
    patch.swap(to_itself, DotSelfAttention, packed=Packed(projections))
    patch.within(*projections)
    for layer in (to_text.to_q, to_text.to_k, to_text.to_v):
        patch.set(layer, "out", torch.bfloat16)


def _all_else_in_fp32(patch: Patch, packed: set[int]) -> None:
    """Parameters but those that are packed: norms, biases, the timestep's layers, the text encoder."""
    for model in (patch.clip, patch.unet, patch.vae):
        others = {
            name: weight
            for name, weight in model.named_parameters()
            if id(weight) not in packed and weight.dtype != torch.float32
        }
        if others:
            patch.converts(model, others, back=lambda model=model, others=others: assign(model, others))
            assign(model, {name: weight.detach().float() for name, weight in others.items()})
    patch.set(patch.pipe, "dtype", torch.float32)
