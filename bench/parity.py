"""Whether ours and diffusers draw the same picture, given the same weights and noise and a sampler that draws none.

The noise is drawn in fp32 on the CPU and rounded before either sees it: what `torch.randn` draws in half precision is
another sequence in some versions of PyTorch, and then two programs that are both right draw different pictures.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import common
from bench.reference.numbers import noise, relative_error
from sd.config import Config
from sd.pipeline import StableDiffusion

log = logging.getLogger("parity")

PROMPT = "a lighthouse in a storm"
SEED = 7
SCALE = 7.5
TIMESTEP = 481
# Four times the largest that was measured on a CPU, or more (torch 2.13; a tiny random model over 50 steps, the demo
# model over 20, SD 1.5's shapes over 10, in fp16 over 1). Latents 1.4e-6 in fp32, 0.0041 in fp16, 0.031 in bf16; bytes
# of pictures, some of which round the other way, 6.6e-5, 0.0033, 0.018. A step is equal to the bit there; its bounds
# are four times what rounding did to the plain step on an H100, 0.0022 in fp16, and eight times that in bf16, which has
# 3 bits less. Other noise made a picture differ by 0.57.
BOUNDS = {
    torch.float32: {"step": 1e-5, "latents": 1e-4, "picture": 1e-3},
    torch.float16: {"step": 0.009, "latents": 0.016, "picture": 0.013},
    torch.bfloat16: {"step": 0.07, "latents": 0.12, "picture": 0.07},
}


class Mismatch(Exception):
    """Ours and diffusers differ by more than rounding; the message is for the user."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn: pixels a side, DDIM steps (0: one call of the UNet alone), pictures at a time."""

    size: int
    steps: int
    batch: int


def check(pipe: StableDiffusion, drawn: Drawn, out: Path) -> None:
    """Compare the plain pipeline with diffusers, and add a line each part to parity.csv in the folder.

    Raises Mismatch if an error is over its bound or not a number.
    """
    bounds, wrong = BOUNDS[pipe.dtype], []
    dtype = str(pipe.dtype).removeprefix("torch.")
    for part, error in errors(pipe, drawn).items():
        passed = error <= bounds[part]
        log.info("parity, %s, %s: relative error %.2g, bound %.2g", dtype, part, error, bounds[part])
        line = {"part": part, "size": drawn.size, "steps": drawn.steps, "batch": drawn.batch}
        line |= {"relative_error": common.cell(error), "bound": bounds[part], "passed": int(passed)}
        environment = common.environment(pipe.device, pipe.dtype) | {"diffusers": common.version("diffusers")}
        common.append_csv(out / "parity.csv", line | environment)
        if not passed:
            wrong.append(f"{part} differs by {error:.2g}, more than {bounds[part]:.2g}")
    if wrong:
        raise Mismatch(f"no parity with diffusers in {dtype} on {common.device_name(pipe.device)}: {', '.join(wrong)}")


@torch.inference_mode()
def errors(pipe: StableDiffusion, drawn: Drawn) -> dict[str, float]:
    """Relative errors beside diffusers: of the UNet's output, and of the last latents and the picture's bytes."""
    from bench.reference.oracles import ddim_scheduler, diffusers_pipeline

    theirs = diffusers_pipeline(pipe, ddim_scheduler())
    with common.full_precision():
        inputs = step_inputs(pipe, drawn.size, drawn.batch)
        found = {"step": relative_error(pipe.unet(*inputs), their_step(theirs.unet, *inputs))}
        if drawn.steps:
            last: list[Tensor] = []
            picture = our_picture(pipe, drawn, on_step=lambda _step, _steps, x: last.append(x))
            latents = their_picture(theirs, pipe.config, drawn, output_type="latent")
            found["latents"] = relative_error(last[-1], latents)
            found["picture"] = relative_error(picture, their_picture(theirs, pipe.config, drawn))
    return found


def step_inputs(pipe: StableDiffusion, size: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context of a guided step, in the pipeline's dtype and on its device."""
    config, side = pipe.config, size // pipe.config.vae.downsampling
    x = noise(2 * batch, config.unet.in_channels, side, side, seed=SEED)
    context = noise(2 * batch, config.text.max_length, config.unet.context_dim, seed=SEED + 1)
    return (
        x.to(pipe.device, pipe.dtype),
        torch.tensor(TIMESTEP, device=pipe.device),
        context.to(pipe.device, pipe.dtype),
    )


def their_step(unet, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    return unet(x, t, encoder_hidden_states=context, return_dict=False)[0]


def first_latents(config: Config, drawn: Drawn, dtype: torch.dtype) -> Tensor:
    """[B, z, h, w] on the CPU: fp32 noise, rounded to the dtype."""
    side = drawn.size // config.vae.downsampling
    return noise(drawn.batch, config.vae.z_channels, side, side, seed=SEED).to(dtype)


def our_picture(pipe: StableDiffusion, drawn: Drawn, **options) -> Tensor:
    """-> bytes [B, H, W, 3] as fp32."""
    images = pipe.generate(
        [PROMPT] * drawn.batch,
        steps=drawn.steps,
        cfg_scale=SCALE,
        seed=SEED,
        height=drawn.size,
        width=drawn.size,
        sampler="ddim",
        latents=first_latents(pipe.config, drawn, pipe.dtype),
        **options,
    )
    return _bytes(images)


def their_picture(theirs, config: Config, drawn: Drawn, output_type: str = "pil") -> Tensor:
    """-> bytes [B, H, W, 3] as fp32, or latents [B, z, h, w]. diffusers multiplies the noise by its scheduler's 1."""
    result = theirs(
        [PROMPT] * drawn.batch,
        num_inference_steps=drawn.steps,
        guidance_scale=SCALE,
        height=drawn.size,
        width=drawn.size,
        latents=first_latents(config, drawn, theirs.unet.dtype),
        output_type=output_type,
    )
    return result.images if output_type == "latent" else _bytes(result.images)


def _bytes(images: list) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).float()
