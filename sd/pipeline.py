"""From a prompt to a picture: prompt -> tokens -> context -> sampler over the UNet -> latents -> VAE -> picture."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from sd import model_loader, samplers, schedules
from sd.checkpoints.stamps import Stamp
from sd.clip import CLIP
from sd.config import Config
from sd.controlnet import Control
from sd.controls import ControlNets
from sd.ddpm import predict_x0
from sd.edits import (
    Edit,
    edit,
    edit_pairs,
    larger_size,
    other_side,
    outpainted_size,
    outpainting,
    same_shape,
    sides,
    upright,
)
from sd.embeddings import Words
from sd.guidance import Call, Conditions, Guided, from_velocity
from sd.images import to_pil
from sd.lora import Loras
from sd.nearest import there_are
from sd.noise import PictureNoise
from sd.prompt_steps import over_steps
from sd.prompts import cut, loras, padded, tokenize, weighted
from sd.request import broadcast, check_ranges, finite, given_latents, if_given, pictures, read_dtype, whole
from sd.samplers import Sampler
from sd.schedules import Schedule
from sd.start import Blend, Start, for_inpainting, from_picture
from sd.tiles import in_tiles
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
        self.tokenizer = tokenizer or Tokenizer(pad=0 if config.text.openclip else None)
        self.source = source
        weight = next(unet.parameters())
        self.device = weight.device
        self.dtype = weight.dtype
        self.dtype_is_asked_for = False
        self.times: dict[str, float] = {}
        self.call = Call()
        self.optimizations: list[str] = []
        self.loras = Loras()
        self.words = Words(config.text.vocab_size)
        self.controlnets = ControlNets()
        self._loaded: dict[str, Stamp] = {}

    @classmethod
    def load(
        cls,
        ckpt: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        ema: bool = False,
        prediction: str | None = None,
        vae: str | os.PathLike | None = None,
    ) -> "StableDiffusion":
        """Load a checkpoint of Stable Diffusion 1.x or 2.x; `find_checkpoint` names the default.

        .safetensors or .ckpt in the original layout, or a folder as diffusers writes it. dtype, also by its name,
        defaults to fp16 on CUDA and fp32 elsewhere. prediction: "eps" or "v", where the file does not say what its UNet
        was trained for. vae: a file or folder that holds the autoencoder to use. Raises FileNotFoundError, ValueError
        or model_loader.CheckpointError.
        """
        device = torch.device(device) if device is not None else default_device()
        usual = torch.float16 if device.type == "cuda" else torch.float32
        asked_for, dtype = dtype is not None, usual if dtype is None else read_dtype(dtype)
        path = Path(ckpt or find_checkpoint())
        if path == DEMO_CHECKPOINT:
            log.info(DEMO_NOTICE)
        with torch.inference_mode(False):  # so that what is written to the weights can be noticed
            config, *models = model_loader.load(
                path, ema=ema, device=device, dtype=dtype, prediction=prediction, vae=vae
            )
        pipe = cls(config, *models, source=model_loader.Source.of(path, ema, dtype, vae))
        pipe.dtype_is_asked_for = asked_for
        pipe.note_loaded()
        return pipe

    def note_loaded(self, names: Collection[str] | None = None) -> None:
        """These parameters, `unet.out.2.bias`, or all, are now as the file of `source` has them."""
        self._loaded |= self._stamps(names)

    def as_loaded(self, names: Collection[str]) -> bool:
        """Whether these parameters are still what was read: then the file has them too."""
        return all(now == self._loaded.get(name) for name, now in self._stamps(names).items())

    def loaded_names(self) -> set[str]:
        """All parameters that are still what was read."""
        return {name for name, now in self._stamps().items() if now == self._loaded.get(name)}

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
        loaded = self.loaded_names()
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

    def add_embedding(self, path: str | os.PathLike, word: str | None = None) -> list[str]:
        """Take up the learned words of a file (textual inversion); returns how they are spelled in prompts.

        AUTOMATIC1111's and diffusers' files. word: what to call the file's only one; None is its own name, or the
        file's. Raises model_loader.CheckpointError for what is no such file, or is for another text encoder, and
        ValueError for a word that is there already.
        """
        return self.words.add(path, word, self.config.text.width)

    def remove_embeddings(self, word: str | None = None) -> None:
        """Forget this learned word or all: it is text again."""
        if word is not None and word not in self.words.words:
            raise ValueError(f"no learned word {word!r}{there_are(word, self.words.words)}")
        self.words.forget(list(self.words.words) if word is None else [word])

    def add_control(self, path: str | os.PathLike) -> str:
        """Load a ControlNet's file; returns the name by which a `Control` is one of it, for `generate`.

        The original layout, diffusers', fp16, and files of differences to SD 1.5's weights. Optimizations reach it,
        also those that come later. Raises model_loader.CheckpointError for a file that is none, or for another UNet.
        """
        return self.controlnets.add(self, os.fspath(path))

    def remove_controls(self, name: str | None = None) -> None:
        """Let this one or all go, and their memory."""
        self.controlnets.remove(name)

    def save(self, path: str | os.PathLike) -> None:
        """Write the weights in the original layout as .safetensors, with the configuration in the metadata."""
        model_loader.save(path, self.config, self.clip, self.unet, self.vae)

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = "",
        steps: int = 50,
        cfg_scale: float = 7.5,
        seed: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        sampler: str = "ddpm",
        init_image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float = 0.8,
        schedule: str | None = None,
        eta: float | None = None,
        s_noise: float | None = None,
        solver_order: int | None = None,
        prompt_syntax: str | None = None,
        clip_skip: int | None = None,
        mask: Image.Image | Sequence[Image.Image] | None = None,
        mask_blur: float = 0.0,
        mask_invert: bool = False,
        mask_padding: int | None = None,
        outpaint: str | Sequence[int] | None = None,
        hires: float | None = None,
        hires_strength: float = 0.5,
        control: Sequence[Control] | None = None,
        control_preprocess: Sequence[str] | str | None = None,
        latents: Tensor | None = None,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt and seed; a single prompt or seed serves all the others.

        seed: None draws one; an integer for several prompts means seed, seed + 1, ...
        height, width: pixels, multiples of `config.size_multiple`; None is the size that the model was trained at, or
            init_image's shape at about that area. Of init_image's shape one of them is enough.
        init_image: start from this picture or file, or one for each, noised by `strength`, over 0 to 1: at 1 to the
            first level of noise, in which next to nothing of it is left.
        mask: of init_image, white where it is drawn anew; elsewhere its own pixels stay. mask_blur: over so many pixels
            one becomes the other. mask_invert: black is drawn anew. mask_padding: only the masked part is drawn, with
            so many pixels around it, and put back into init_image, which keeps its size.
        outpaint: pixels that init_image grows by to the left, top, right and bottom, as numbers or `64,0,64,0`.
        hires: draw the picture again so many times as large, noised by `hires_strength`; the VAE works in tiles.
        control: ControlNets with what they are shown, how much that counts, and when. control_preprocess: what makes
            hints of their pictures, one of sd/hints.py for all or for each; None takes them as they are.
        sampler, schedule: names of samplers.SAMPLERS and schedules.SCHEDULES, also as `DPM++ 2M Karras`; a schedule of
            None is the sampler's own. eta, s_noise, solver_order: what it takes beside, None for its own.
        prompt_syntax: "weights", in which (text:1.3) counts 1.3 times, "a1111" or "plain" (sd/prompts.py); None is the
            first. clip_skip: the text is read from this layer from the end; None is the last.
        latents: start from this noise of variance 1, [B, z, height / 8, width / 8], in place of the seed's. It is
            not changed.
        on_step(step, steps, latents) is called after each step of each batch.

        All is one batch, but pictures whose prompts have another number of chunks: those are one of their own.
        Each picture's `info` holds the parameters that make it again. Raises ValueError for values out of range.
        """
        prompts, negatives, seeds = broadcast(prompt, negative_prompt, seed)
        steps, cfg_scale, strength = whole("steps", steps), finite("cfg_scale", cfg_scale), finite("strength", strength)
        mask_blur, hires_strength = finite("mask_blur", mask_blur), finite("hires_strength", hires_strength)
        height, width, mask_padding = if_given(whole, height=height, width=width, mask_padding=mask_padding)
        clip_skip, solver_order = if_given(whole, clip_skip=clip_skip, solver_order=solver_order)
        eta, s_noise, hires = if_given(finite, eta=eta, s_noise=s_noise, hires=hires)
        check_ranges(strength, hires_strength, hires, clip_skip, self.config.text.layers)
        edits, height, width = self._edits(
            len(prompts), init_image, mask, mask_invert, mask_blur, mask_padding, outpaint, height, width
        )
        if latents is not None and edits:
            raise ValueError("latents are the noise of a picture that starts from none: give them without init_image")
        self.controlnets.check(control or (), control_preprocess)
        if hires and (mask is not None or outpaint):
            raise ValueError("hires draws all of a picture again: it cannot be given with a mask or outpaint")
        asked_for = {"eta": eta, "s_noise": s_noise, "solver_order": solver_order}
        chosen, named = samplers.choose(sampler, asked_for), samplers.schedule_of(sampler, schedule)
        levels = schedules.make(named, steps)
        if latents is not None and latents.shape[:1] != (len(prompts),):
            raise ValueError(f"latents are {list(latents.shape)}, for {len(prompts)} pictures")
        self.times = {}
        with self._timed("text"):
            own = self._alike(prompts, negatives, cfg_scale, steps, prompt_syntax)
            texts = [([prompts[i] for i in places], [negatives[i] for i in places]) for places in own]
            conditions = [self._conditions(*one, cfg_scale, steps, prompt_syntax, clip_skip) for one in texts]
        found: dict[int, Image.Image] = {}
        for places, told in zip(own, conditions, strict=True):
            draw = partial(self._draw, conditions=told, sampler=chosen, levels=levels, on_step=on_step)
            draw = partial(draw, seeds=[seeds[i] for i in places], control=control or (), preprocess=control_preprocess)
            over = [edits[i] for i in places] if len(edits) > 1 else edits
            start = None if latents is None else latents[places]
            drawn = draw(over, height, width, strength=strength, latents=start)
            if hires:
                larger = [Edit(image) for image in drawn]
                size = larger_size(height, width, hires, self.config.size_multiple)
                tile = self.config.image_size // self._downsampling
                drawn = draw(larger, *size, strength=hires_strength, tile=tile)
            found |= zip(places, drawn, strict=True)
        images = [found[i] for i in range(len(prompts))]
        shared = {"steps": steps, "cfg_scale": cfg_scale, "sampler": chosen.name, "height": height, "width": width}
        shared |= dict(chosen.options)
        where_given = {
            "schedule": named if schedule or named != chosen.method.schedule else None,
            "prompt_syntax": prompt_syntax,
            "clip_skip": clip_skip,
            "strength": strength if edits else None,
            "outpaint": outpaint and ",".join(map(str, sides(outpaint))),
            "mask_blur": mask_blur if mask is not None or outpaint else None,
            "mask_invert": mask_invert or None,
            "mask_padding": mask_padding if mask is not None else None,
            "hires": hires,
            "hires_strength": hires_strength if hires else None,
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
        skip = (clip_skip or 1) - 1
        if syntax == "plain" and not self.words:
            return self._contexts(self.tokenizer(texts, length), skip)
        if syntax == "plain":
            return self._contexts(torch.tensor([cut(t, self.tokenizer, length, self.words) for t in texts]), skip)
        read = [tokenize(text, self.tokenizer, syntax or "weights", length, self.words) for text in texts]
        read = padded(read, self.tokenizer)
        ids = torch.tensor([row for one in read for row in one.ids], dtype=torch.long)
        context = self._contexts(ids, skip)
        if any(one.weighted for one in read):
            weights = torch.tensor([row for one in read for row in one.weights])
            chunks = zip(context, weights, strict=True)
            context = torch.stack([weighted(c, w) if w.ne(1).any() else c for c, w in chunks])
        return context.unflatten(0, (len(texts), -1)).flatten(1, 2)

    def _contexts(self, ids: Tensor, skip: int) -> Tensor:
        """Ids [B, L] -> contexts [B, L, C]."""
        ids = ids.to(self.device)
        if (learned := self.words.used(ids)) is not None:
            return self.clip(ids, skip, learned)
        return self.clip(ids, skip) if skip else self.clip(ids)

    def sample(
        self,
        x: Tensor,
        conditions: Conditions,
        sampler: Sampler,
        schedule: Schedule,
        noise: PictureNoise,
        on_step: OnStep | None = None,
        blend: Blend | None = None,
    ) -> Tensor:
        """Denoise x [B, z, h, w] from the schedule's first level on -> clean latents of that shape, still scaled."""
        with self.call.sampling(schedule.timesteps, guided=conditions.scale != 1) as start_step:
            answers = Guided(self.unet, conditions, self.call)
            denoise = answers if self.config.prediction == "eps" else from_velocity(answers, schedule.abar_at)
            self.call.predicted = lambda: self._clean(answers, schedule)
            for i, x in enumerate(sampler(denoise, x, schedule, noise), start=1):  # noqa: B020
                start_step(i)
                if blend:
                    blend(i, x)
                if on_step:
                    on_step(i, len(schedule), x)
        return x

    def _clean(self, answers: Guided, schedule: Schedule) -> Tensor:
        """The clean latents that the latest prediction comes to."""
        x, predicted, t = answers.latest
        latest = lambda x, t: predicted  # noqa: E731
        eps = latest if self.config.prediction == "eps" else from_velocity(latest, schedule.abar_at)
        return predict_x0(x, eps(x, t), schedule.abar_at(t))

    def decode(self, x: Tensor, tile: int | None = None) -> Tensor:
        """Scaled latents [B, z, h, w] -> pictures [B, 3, H, W], about [-1, 1]; in tiles of so many latents.

        SD 1.5's VAE can overflow in fp16, which draws a black picture: then it is run again in fp32.
        """
        latents = x / self.config.vae.scale_factor
        images = _in_tiles(self.vae.decode, latents.to(self.dtype), tile)
        if images.isfinite().all():
            return images
        if self.dtype in (torch.float32, torch.float64):
            raise ValueError("the VAE's output is not finite: the weights or the latents hold NaN or infinity")
        log.warning("the VAE overflowed in %s; decoding again in fp32", self.dtype)
        return _in_tiles(self._vae_in_fp32().decode, latents, tile)

    def _vae_in_fp32(self) -> VAE:
        with torch.device("meta"):
            vae = VAE(self.config.vae)
        vae.load_state_dict({name: weight.float() for name, weight in self.vae.state_dict().items()}, assign=True)
        return vae

    def chunks(
        self, prompt: str, negative_prompt: str, cfg_scale: float, steps: int, syntax: str | None = None
    ) -> tuple[int, ...]:
        """How many chunks a picture's prompts have at each step: the longer of them, at scale 1 the prompt alone.

        Where these differ, pictures cannot share a batch: the shorter would see empty chunks, which change it.
        """
        texts = [prompt] if cfg_scale == 1 else [prompt, negative_prompt]
        by_step = list(zip(*(over_steps(text, steps, syntax) for text in texts), strict=True))
        counts = {forms: max(map(partial(self._count, syntax), forms)) for forms in dict.fromkeys(by_step)}
        return tuple(counts[forms] for forms in by_step)

    def _count(self, syntax: str | None, text: str) -> int:
        if syntax == "plain":
            return 1
        return len(tokenize(text, self.tokenizer, syntax or "weights", self.config.text.max_length, self.words).ids)

    def _alike(
        self, prompts: Sequence[str], negatives: Sequence[str], cfg_scale: float, steps: int, syntax: str | None
    ) -> list[list[int]]:
        """The places of pictures that can share a batch, together."""
        found: dict[tuple[int, ...], list[int]] = {}
        for place, texts in enumerate(zip(prompts, negatives, strict=True)):
            found.setdefault(self.chunks(*texts, cfg_scale, steps, syntax), []).append(place)
        return list(found.values())

    def _conditions(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str],
        cfg_scale: float,
        steps: int,
        syntax: str | None,
        clip_skip: int | None,
    ) -> Conditions:
        """The context, or one for each step where a prompt says what it is at which."""
        for name, _ in (one for prompt in prompts for one in loras(prompt, syntax)):
            if name not in self.loras.merged:
                raise ValueError(f"a prompt names the LoRA {name}, which is not merged: add_lora first")
        texts = [over_steps(text, steps, syntax) for text in (*negatives, *prompts)]
        count = len(prompts)

        def context(forms: Sequence[str]) -> Tensor:
            negatives = forms[:count] if cfg_scale != 1 else None
            return self.encode_prompts(forms[count:], negatives, syntax, clip_skip)

        by_step = list(zip(*texts, strict=True))
        contexts = {forms: context(forms) for forms in dict.fromkeys(by_step)}
        if len(contexts) == 1:
            return Conditions(*contexts.values(), cfg_scale)
        return Conditions(contexts[by_step[0]], cfg_scale, tuple(contexts[forms] for forms in by_step))

    def _edits(
        self,
        count: int,
        image: Image.Image | Sequence[Image.Image] | None,
        mask: Image.Image | Sequence[Image.Image] | None,
        invert: bool,
        blur: float,
        padding: int | None,
        outpaint: str | Sequence[int] | None,
        height: int | None,
        width: int | None,
    ) -> tuple[list[Edit], int, int]:
        """What is drawn over, one for each picture or for all, and the size to draw at."""
        images, masks = pictures(image, count, "init_image"), pictures(mask, count, "mask")
        if masks and not images:
            raise ValueError("a mask says which part of a picture is drawn anew: give init_image too")
        if outpaint and not images:
            raise ValueError("outpaint says how a picture grows: give init_image too")
        if outpaint and padding is not None:
            raise ValueError("mask_padding draws a part of a picture, and outpaint what is around it: give one of them")
        if outpaint and len({one.size for one in images}) > 1:
            raise ValueError("pictures that grow together must be of one size")
        padding = padding if masks else None  # of which it says how much is drawn
        side, multiple = self.config.image_size, self.config.size_multiple
        shape = natural = (side, side)
        if images and outpaint:
            shape = natural = outpainted_size(images[0], sides(outpaint), multiple)
        elif images and padding is None:
            shape, natural = upright(images[0]), same_shape(images[0], side, multiple)
        room = natural if height is None and width is None else None
        if height is None and width is None:
            height, width = natural
        elif images and (height is None or width is None):
            height, width = other_side(height, width, shape, multiple)
        height, width = (side if length is None else length for length in (height, width))
        self.config.check_size(height, width)
        pairs = edit_pairs(images, masks)
        if outpaint:
            return [outpainting(i, sides(outpaint), room, m, invert, blur) for i, m in pairs], height, width
        return [edit(i, height, width, m, invert, blur, padding) for i, m in pairs], height, width

    def _draw(
        self,
        edits: Sequence[Edit],
        height: int,
        width: int,
        *,
        strength: float,
        conditions: Conditions,
        sampler: Sampler,
        levels: Schedule,
        seeds: Sequence[int],
        on_step: OnStep | None,
        control: Sequence[Control],
        preprocess: Sequence[str] | str | None,
        latents: Tensor | None = None,
        tile: int | None = None,
    ) -> list[Image.Image]:
        """Pictures over edits, or of noise where there are none; the VAE works in tiles of so many latents."""
        shape = (self.config.vae.z_channels, height // self._downsampling, width // self._downsampling)
        noise = PictureNoise(seeds, shape, self.device, torch.promote_types(self.dtype, torch.float32))
        if edits:
            levels = levels.last(max(1, int(len(levels) * strength)))
        with self._timed("encode") if edits or self._inpaints else nullcontext():
            start = self._start(edits, height, width, noise, levels, strength, latents, tile)
        conditions = replace(conditions, by_step=conditions.by_step[-len(levels) :], beside=start.beside)
        if control:
            with self._timed("control"):
                residuals = self.controlnets.residuals(self, control, preprocess, edits, shape[1:])
            conditions = replace(conditions, residuals=residuals)
        with self._timed("denoise"):
            x = self.sample(start.x, conditions, sampler, levels, noise, on_step, start.blend)
        with self._timed("decode"):
            images = to_pil(self.decode(x, tile))
        if edits:
            edits = edits * len(images) if len(edits) == 1 else edits
            images = [one.finished(image) for one, image in zip(edits, images, strict=True)]
        return images

    def _start(
        self,
        edits: Sequence[Edit],
        height: int,
        width: int,
        noise: PictureNoise,
        levels: Schedule,
        strength: float,
        latents: Tensor | None,
        tile: int | None,
    ) -> Start:
        encode = partial(self._encoded, noise=noise, tile=tile)
        if not edits:
            first = noise if latents is None else lambda: given_latents(latents, noise)
            if not self._inpaints:
                return Start(first())
            return for_inpainting(torch.zeros(1, 3, height, width), None, encode, first, levels, 1.0)
        pixels = torch.cat([one.pixels(height, width) for one in edits])
        masks = [one.pixel_mask(height, width) for one in edits]
        mask = None if masks[0] is None else torch.cat(masks)
        begin = for_inpainting if self._inpaints else from_picture
        return begin(pixels, mask, encode, noise, levels, strength)

    def _encoded(self, pixels: Tensor, noise: PictureNoise, tile: int | None) -> Tensor:
        """Pictures [1 or B, 3, H, W] -> scaled latents [B, z, h, w] in noise's dtype."""
        encode = self.vae.encode
        if tile:
            step = self._downsampling
            whole = in_tiles(lambda x: torch.cat(encode(x), 1), pixels, tile * step, tile * step // 4, step)
            encode = lambda x: whole.chunk(2, 1)  # noqa: E731
        mean, logvar = (part.to(noise.dtype) for part in encode(pixels.to(self.device, self.dtype)))
        return (mean + (logvar / 2).exp() * noise()) * self.config.vae.scale_factor

    @property
    def _inpaints(self) -> bool:
        """Whether the UNet is told of a mask beside the latents."""
        return self.config.unet.inpaints

    @property
    def _downsampling(self) -> int:
        return self.config.vae.downsampling

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self._synchronize()
        start = time.perf_counter()
        yield
        self._synchronize()
        self.times[stage] = self.times.get(stage, 0.0) + time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _in_tiles(decode: Callable[[Tensor], Tensor], latents: Tensor, tile: int | None) -> Tensor:
    return decode(latents) if tile is None else in_tiles(decode, latents, tile, tile // 4)
