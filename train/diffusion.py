"""Stage two: text encoder and UNet, trained together to predict the noise in cached latents.

Axes: B batch, C latent channels, h w latents, L tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sd.clip import CLIP
from sd.config import Config
from sd.unet import ResBlock, SpatialTransformer, UNet
from sd.vae import VAE
from train.autoencoder import DrawBatch, encode
from train.data import Chunk, TokensSeen
from train.losses import NoiseLoss, stratified_timesteps
from train.presets import DiffusionTraining
from train.state import EMA, Stage, adamw


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, for torch.compile, EMA and the optimizer."""

    def __init__(self, config: Config):
        super().__init__()
        self.clip = CLIP(config.text)
        self.unet = UNet(config.unet)
        initialize(self.clip, self.unet)

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Noisy latents [B, C, h, w], timesteps [B], token ids [B, L] -> predicted noise [B, C, h, w]."""
        return self.unet(x, t, self.clip(tokens))


@torch.no_grad()
def initialize(clip: CLIP, unet: UNet) -> None:
    """Embeddings as small as CLIP's; every residual branch of the UNet, and its output, begins at zero, as in SD."""
    nn.init.normal_(clip.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(clip.embeddings.position_embedding.weight, std=0.01)
    outputs = [unet.out[2]]
    outputs += [m.out_layers[3] for m in unet.modules() if isinstance(m, ResBlock)]
    outputs += [m.proj_out for m in unet.modules() if isinstance(m, SpatialTransformer)]
    for layer in outputs:
        layer.weight.zero_()
        layer.bias.zero_()


def new_stage(config: Config, settings: DiffusionTraining, weight_decay: float, generator: torch.Generator) -> Stage:
    model = Denoiser(config).to(generator.device, memory_format=torch.channels_last)
    return Stage(
        model=model,
        ema=EMA(model, settings.ema),
        optimizer=adamw(model, settings.lr, weight_decay),
        generator=generator,
        batch=settings.batch,
        extra={"tokens": TokensSeen(config.text.vocab_size)},
    )


class LatentPlacer:
    """Pictures and tokens of a chunk -> scaled latents, fp16 [N, C, h, w], and tokens, int32 [N, L], on the device."""

    def __init__(self, vae: VAE, scale: float, seen: TokensSeen, device: torch.device, autocast: Callable[[], Any]):
        self.vae = vae
        self.scale = scale
        self.seen = seen
        self.device = device
        self.autocast = autocast

    def __call__(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        pictures, tokens = chunk
        self.seen.add(tokens)
        latents = encode(self.vae, torch.from_numpy(pictures).to(self.device), self.autocast) * self.scale
        return latents.half().contiguous(), torch.from_numpy(tokens).to(self.device)


class DiffusionLoss:
    """`empty` [1, L] are the ids of the caption ""."""

    def __init__(self, settings: DiffusionTraining, empty: Tensor, batch: DrawBatch, autocast: Callable[[], Any]):
        self.dropout = settings.caption_dropout
        self.empty = empty
        self.batch = batch
        self.noise_loss = NoiseLoss(settings.snr_gamma, empty.device)
        self.autocast = autocast

    def __call__(self, model: nn.Module, stage: Stage) -> tuple[Tensor, Tensor]:
        """-> what to minimize, twice: it is also what to report."""
        latents, tokens = self.batch(stage.batch, stage.generator)
        latents = latents.float()
        noise = torch.randn(latents.shape, generator=stage.generator, device=latents.device)
        t = stratified_timesteps(stage.batch, stage.generator)
        noisy = self.noise_loss.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            predicted = model(noisy, t, self._drop(tokens, stage.generator))
        loss = self.noise_loss(predicted, noise, t)
        return loss, loss.detach()

    def _drop(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Some captions [B, L] become the empty one: the network learns to draw without a prompt too, for guidance."""
        dropped = torch.rand(len(tokens), generator=generator, device=tokens.device) < self.dropout
        return torch.where(dropped[:, None], self.empty, tokens).long()
