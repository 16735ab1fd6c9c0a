"""From a prompt to a picture: prompt -> tokens -> context -> sampler over the UNet -> latents -> VAE -> picture."""

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sd import model_loader, samplers, schedules
from sd.checkpoints.stamps import Stamp
from sd.clip import CLIP
from sd.config import Config
from sd.ddpm import add_noise
from sd.edits import Blend, latent_mask, mask_of, pasted
from sd.guidance import Call, Guided
from sd.images import from_pil, to_pil
from sd.lora import Loras
from sd.noise import PictureNoise
from sd.prompts import padded, tokenize, weighted
from sd.samplers import Sampler
from sd.schedules import Schedule
from sd.tokenizer import Tokenizer
from sd.unet import UNet
from sd.vae import VAE

if TYPE_CHECKING:
    from sd.optimizations import Explanation

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, Tensor], None]

DATA = Path(__file__).resolve().parent.parent / "data"
DEMO_CHECKPOINT = DATA / "demo" / "sd-demo.safetensors.index.json"
GET_WEIGHTS = (
    "no weights: run `python sd/download.py`, which fetches SD 1.5 into data/ (4.3 GB), "
    "or name a Stable Diffusion 1.x checkpoint with --ckpt or SD_CKPT"
)
DEMO_NOTICE = (
    "demo model: 128x128 drawings of some 1,100 things, in colours and on backgrounds ('a blue fox on a yellow "
    "background'); for Stable Diffusion 1.5 run python sd/download.py (4.3 GB)"
)


def find_checkpoint() -> Path:
    """The weights to use when none are named: $SD_CKPT, SD 1.5 in data/, else the demo model in data/demo/.

    Raises FileNotFoundError, saying how to get weights, if there are none of these.
    """
    if named := os.environ.get("SD_CKPT"):
        return Path(named)
    names = ("v1-5-pruned-emaonly.safetensors", "v1-5-pruned-emaonly.ckpt")
    for path in (*(DATA / name for name in names), DEMO_CHECKPOINT):
        if path.exists():
            return path
    raise FileNotFoundError(GET_WEIGHTS)


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class StableDiffusion:
    """Text encoder, UNet and VAE with everything between a prompt and a picture.

    `pipe.clip(tokens)`, `pipe.unet(x, t, context)`, `pipe.vae.encode(images)` and `pipe.vae.decode(latents)` are the
    modules themselves. `pipe.times` holds the seconds of each stage of the latest `generate`, `pipe.optimizations` the
    names of what sd.optimizations has applied, `pipe.call` where in a picture the UNet is called, `pipe.source` the
    file that the weights were loaded from, None if they were not, `pipe.dtype_is_asked_for` whether somebody wants the
    dtype that it is in.
    """

    def __init__(
        self,
        config: Config,
        clip: CLIP,
        unet: UNet,
        vae: VAE,
        tokenizer: Tokenizer | None = None,
        source: model_loader.Source | None = None,
    ):
        self.config = config
        self.clip = clip
        self.unet = unet
        self.vae = vae
        self.tokenizer = tokenizer or Tokenizer()
        self.source = source
        weight = next(unet.parameters())
        self.device = weight.device
        self.dtype = weight.dtype
        self.dtype_is_asked_for = False
        self.times: dict[str, float] = {}
        self.call = Call()
        self.optimizations: list[str] = []
        self.loras = Loras()
        self._loaded: dict[str, Stamp] = {}

    @classmethod
    def load(
        cls,
        ckpt: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        ema: bool = False,
    ) -> "StableDiffusion":
        """Load a checkpoint in the original layout, .safetensors or .ckpt; `find_checkpoint` names the default.

        dtype defaults to fp16 on CUDA and fp32 elsewhere. Raises FileNotFoundError or model_loader.CheckpointError.
        """
        device = torch.device(device) if device is not None else default_device()
        asked_for, dtype = dtype is not None, dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        path = Path(ckpt or find_checkpoint())
        if path == DEMO_CHECKPOINT:
            log.info(DEMO_NOTICE)
        with torch.inference_mode(False):  # so that what is written to the weights can be noticed
            config, clip, unet, vae = model_loader.load(path, ema=ema, device=device, dtype=dtype)
        pipe = cls(config, clip, unet, vae, source=model_loader.Source.of(path, ema, dtype))
        pipe.dtype_is_asked_for = asked_for
        pipe.note_loaded()
        return pipe

    def note_loaded(self, names: Collection[str] | None = None) -> None:
        """These parameters, `unet.out.2.bias`, or all, are now as the file of `source` has them."""
        self._loaded |= self._stamps(names)

    def as_loaded(self, names: Collection[str]) -> bool:
        """Whether these parameters are still what was read: then the file has them too."""
        return all(now == self._loaded.get(name) for name, now in self._stamps(names).items())

    def _stamps(self, names: Collection[str] | None = None) -> dict[str, Stamp]:
        """Of each parameter, or of these, what changes when it is written to or replaced."""
        parts = {"clip": self.clip, "unet": self.unet, "vae": self.vae}
        weights = {f"{p}.{name}": w for p, model in parts.items() for name, w in model.named_parameters()}
        return {name: Stamp([weights[name]]) for name in (weights if names is None else names)}

    def explain(self) -> "Explanation":
        """What runs in each module, and which optimization put it there: print it."""
        from sd.optimizations import explain  # the models and this file know no optimization

        return explain(self)

    def to(self, device: str | torch.device) -> "StableDiffusion":
        """Move the models to another device; returns the pipeline itself, as `torch.nn.Module.to` does.

        Raises ValueError for an optimized one: optimizations hold tensors of their own, and suit one device.
        """
        if applied := getattr(self, "optimizations", []):
            raise ValueError(f"the pipeline is optimized ({', '.join(applied)}): move it first, then optimize it")
        loaded = [name for name in self._loaded if self.as_loaded([name])]
        for model in (self.clip, self.unet, self.vae):
            model.to(device)
        self.device = torch.device(device)
        self.note_loaded(loaded)
        return self

    def add_lora(self, path: str | os.PathLike, weight: float = 1.0) -> str:
        """Merge a LoRA's file into the weights at a strength; returns the name by which it can be changed.

        LoRA, LoCon, LoHa, LoKr and DoRA, as kohya's trainer, diffusers, PEFT and the first ones wrote them. Speed stays
        what it was. Optimizations may be on or come later. Raises model_loader.CheckpointError for a file that fits
        nothing here, and ValueError where the UNet is quantized, or a file of that name is merged already.
        """
        return self.loras.add(self, os.fspath(path), weight)

    def set_lora(self, name: str, weight: float) -> None:
        """Another strength for a LoRA; it is merged anew from the checkpoint's weights."""
        self.loras.set(self, name, weight)

    def remove_loras(self, name: str | None = None) -> None:
        """Take this one or all out again: the weights are the checkpoint's, bit for bit."""
        self.loras.remove(self, name)

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights in the original layout as .safetensors, with the configuration in the metadata."""
        model_loader.save(path, self.config, self.clip, self.unet, self.vae)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        steps: int = 50,
        cfg_scale: float = 7.5,
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "ddpm",
        init_image: Image.Image | None = None,
        strength: float = 0.8,
        schedule: str | None = None,
        eta: float | None = None,
        s_noise: float | None = None,
        solver_order: int | None = None,
        prompt_syntax: str | None = None,
        clip_skip: int | None = None,
        mask: Image.Image | None = None,
        mask_blur: float = 0.0,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt and seed; a single prompt or seed serves all the others.

        seed: None draws one; an integer for several prompts means seed, seed + 1, ...
        height, width: pixels, multiples of `config.size_multiple`; None is the size that the model was trained at, or
            init_image's shape at about that area.
        init_image: start from this picture, noised by `strength` (over 0, up to 1: none of it is left).
        mask: of init_image, white where it is drawn anew; elsewhere its own pixels stay. mask_blur: over so many pixels
            one becomes the other.
        sampler, schedule: names of samplers.SAMPLERS and schedules.SCHEDULES, also as `DPM++ 2M Karras`; a schedule of
            None is the sampler's own. eta, s_noise, solver_order: what it takes beside, None for its own.
        prompt_syntax: "weights", in which (text:1.3) counts 1.3 times, "a1111" or "plain" (sd/prompts.py); None is the
            first. clip_skip: the text is read from this layer from the end; None is the last.
        latents: start from this noise of variance 1, [B, z, height / 8, width / 8], in place of the seed's. It is
            not changed.
        on_step(step, steps, latents) is called after each step.

        Each picture's `info` holds the parameters that make it again. Raises ValueError for values out of range.
        """
        prompts, negatives, seeds = _broadcast(prompt, negative_prompt, seed)
        height, width = self._size(height, width, init_image)
        _check(cfg_scale, strength, clip_skip, self.config.text.layers)
        if mask is not None and init_image is None:
            raise ValueError("a mask says which part of a picture is drawn anew: give init_image too")
        asked_for = {"eta": eta, "s_noise": s_noise, "solver_order": solver_order}
        chosen, named = samplers.choose(sampler, asked_for), samplers.schedule_of(sampler, schedule)
        levels = schedules.make(named, steps)
        shape = (self.config.vae.z_channels, height // self._downsampling, width // self._downsampling)
        noise = PictureNoise(seeds, shape, self.device, torch.promote_types(self.dtype, torch.float32))
        with self._timed("text"):
            context = self.encode_prompts(prompts, negatives if cfg_scale != 1 else None, prompt_syntax, clip_skip)
        blend = None
        if init_image is None:
            x = _given(latents, (len(prompts), *shape), noise) if latents is not None else noise()
        else:
            levels = levels.last(max(1, int(steps * strength)))
            with self._timed("encode"):
                x, blend = self._from_image(init_image, height, width, noise, levels, mask, strength)
        with self._timed("denoise"):
            x = self.sample(x, context, cfg_scale, chosen, levels, noise, on_step, blend)
        with self._timed("decode"):
            images = to_pil(self.decode(x))
        if mask is not None:
            images = pasted(images, init_image, mask, mask_blur)
        size = {"height": height, "width": width}
        shared = {"steps": steps, "cfg_scale": cfg_scale, "sampler": chosen.name, **size, **dict(chosen.options)}
        where_given = {
            "schedule": named if schedule or named != chosen.method.schedule else None,
            "prompt_syntax": prompt_syntax,
            "clip_skip": clip_skip,
            "strength": None if init_image is None else strength,
            "mask_blur": None if mask is None else mask_blur,
        }
        shared |= {name: value for name, value in where_given.items() if value is not None}
        for image, *own in zip(images, prompts, negatives, seeds, strict=True):
            image.info.update(zip(("prompt", "negative_prompt", "seed"), own, strict=True), **shared)
        return images

    def encode_prompts(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str] | None,
        syntax: str | None = None,
        clip_skip: int | None = None,
    ) -> Tensor:
        """-> context [2B, S, C], the negative prompts' half first, or [B, S, C] if negatives is None.

        syntax: of sd/prompts.py, None is "weights"; S is 77 times as many as the longest prompt has chunks. clip_skip:
        the context is that of this layer from the end, None is the last. Raises ValueError for brackets and weights
        that make no sense.
        """
        texts, length = [*(negatives or []), *prompts], self.config.text.max_length
        skip = [] if clip_skip in (None, 1) else [clip_skip - 1]
        if syntax == "plain":
            return self.clip(self.tokenizer(texts, length).to(self.device), *skip)
        read = [tokenize(text, self.tokenizer, syntax or "weights", length) for text in texts]
        read = padded(read, self.tokenizer)
        ids = torch.tensor([row for one in read for row in one.ids], dtype=torch.long)
        context = self.clip(ids.to(self.device), *skip).unflatten(0, (len(texts), -1)).flatten(1, 2)
        if not any(one.weighted for one in read):
            return context
        weights = [torch.tensor(one.weights).flatten() for one in read]
        return torch.stack([weighted(c, w) if w.ne(1).any() else c for c, w in zip(context, weights, strict=True)])

    def sample(
        self,
        x: Tensor,
        context: Tensor,
        cfg_scale: float,
        sampler: Sampler,
        schedule: Schedule,
        noise: PictureNoise,
        on_step: OnStep | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        """Denoise x [B, z, h, w] from the schedule's first level on -> clean latents of that shape, still scaled."""
        with self.call.sampling(schedule.timesteps, guided=cfg_scale != 1) as start_step:
            denoise = Guided(self.unet, context, cfg_scale, self.call)
            for i, x in enumerate(sampler(denoise, x, schedule, noise), start=1):  # noqa: B020
                start_step(i)
                if blend:
                    blend(i, x)
                if on_step:
                    on_step(i, len(schedule), x)
        return x

    def decode(self, x: Tensor) -> Tensor:
        """Scaled latents [B, z, h, w] -> pictures [B, 3, H, W], about [-1, 1].

        SD 1.5's VAE can overflow in fp16, which draws a black picture: then it is run again in fp32.
        """
        latents = x / self.config.vae.scale_factor
        images = self.vae.decode(latents.to(self.dtype))
        if images.isfinite().all():
            return images
        if self.dtype in (torch.float32, torch.float64):
            raise ValueError("the VAE's output is not finite: the weights or the latents hold NaN or infinity")
        log.warning("the VAE overflowed in %s; decoding again in fp32", self.dtype)
        return self._vae_in_fp32().decode(latents)

    def _vae_in_fp32(self) -> VAE:
        with torch.device("meta"):
            vae = VAE(self.config.vae)
        vae.load_state_dict({name: weight.float() for name, weight in self.vae.state_dict().items()}, assign=True)
        return vae

    def _from_image(
        self,
        image: Image.Image,
        height: int,
        width: int,
        noise: PictureNoise,
        levels: Schedule,
        mask: Image.Image | None,
        strength: float,
    ) -> tuple[Tensor, Blend | None]:
        """The picture's latents at the first level, [B, z, h, w], and what keeps those that a mask leaves.

        First the posterior's noise is drawn, then the level's. Of a part that is drawn anew as a whole nothing is left.
        """
        pixels = from_pil(image, height, width).to(self.device, self.dtype)
        mean, logvar = (part.to(noise.dtype) for part in self.vae.encode(pixels))
        clean = (mean + (logvar / 2).exp() * noise()) * self.config.vae.scale_factor
        fresh = noise()
        noised = add_noise(clean, fresh, levels.abars[0])
        if mask is None:
            return noised, None
        repainted = latent_mask(mask_of(mask, height, width), self._downsampling).to(clean)
        return fresh if strength == 1 else noised, Blend(levels, clean, fresh, repainted)

    @property
    def _downsampling(self) -> int:
        return self.config.vae.downsampling

    def _size(self, height: int | None, width: int | None, init_image: Image.Image | None) -> tuple[int, int]:
        side = self.config.image_size
        natural = (side, side) if init_image is None else _same_shape(init_image, side, self.config.size_multiple)
        height = natural[0] if height is None else height
        width = natural[1] if width is None else width
        self.config.check_size(height, width)
        return height, width

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.times[stage] = time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _same_shape(image: Image.Image, side: int, multiple: int) -> tuple[int, int]:
    """Height and width near image's aspect ratio, near side x side pixels in all, multiples of `multiple`."""
    width, height = image.size
    if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # lying on its side
        width, height = height, width
    scale = side / math.sqrt(width * height)
    fit = [max(multiple, round(length * scale / multiple) * multiple) for length in (height, width)]
    return fit[0], fit[1]


def _broadcast(prompt, negative_prompt, seed) -> tuple[list[str], list[str], list[int]]:
    """Lists of one length. An integer seed counts up; prompts repeat."""
    columns = [[value] if isinstance(value, str) else list(value) for value in (prompt, negative_prompt)]
    given_seeds = list(seed) if isinstance(seed, Sequence) else None
    if not columns[0]:
        raise ValueError("generate needs at least one prompt")
    count = max(len(column) for column in (*columns, given_seeds or [0]))
    if given_seeds is None:
        first = secrets.randbelow(2**32) if seed is None else seed
        given_seeds = [first + i for i in range(count)]
    columns = [column * count if len(column) == 1 else column for column in (*columns, given_seeds)]
    if lengths := {len(column) for column in columns} - {count}:
        raise ValueError(f"prompts, negative prompts and seeds differ in number: {count} and {lengths.pop()}")
    if bad := [s for s in columns[2] if not 0 <= s < 2**63]:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, not {bad[0]}")
    return columns[0], columns[1], columns[2]


def _check(cfg_scale: float, strength: float, clip_skip: int | None = None, layers: int = 12) -> None:
    if clip_skip is not None and not 1 <= clip_skip <= layers:
        raise ValueError(f"clip_skip must be from 1 to {layers}, not {clip_skip}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be a finite number, not {cfg_scale}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be over 0 and at most 1, not {strength}")


def _given(latents: Tensor, shape: tuple[int, ...], noise: PictureNoise) -> Tensor:
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents are {list(latents.shape)}, not {list(shape)}")
    return latents.to(noise.device, noise.dtype)
