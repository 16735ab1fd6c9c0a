"""Stage one: the VAE. Afterwards its latents are centred, and the scale is measured that gives them unit variance.

Axes: B batch, C latent channels, H W pixels.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.config import Config
from sd.vae import VAE
from train.data import to_pixels
from train.loop import Progress
from train.losses import PatchCritic, critic_loss, kl_loss, reconstruction_loss, scaled_gradient
from train.presets import VAETraining
from train.state import EMA, Stage, adamw, write_atomically

log = logging.getLogger(__name__)

DrawBatch = Callable[[int, torch.Generator], tuple[Tensor, ...]]  # Pool.batch


class Autoencoder(nn.Module):
    """Encode, sample the posterior, decode: the whole pass in one module, for torch.compile."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures [B, 3, H, W], noise [B, C, H/8, W/8] -> pictures again, mean and log-variance."""
        mean, logvar = self.vae.encode(pixels)
        return self.vae.decode(mean + (logvar / 2).exp() * noise), mean, logvar


def new_stage(config: Config, settings: VAETraining, weight_decay: float, generator: torch.Generator) -> Stage:
    device = generator.device
    model = Autoencoder(VAE(config.vae)).to(device, memory_format=torch.channels_last)
    critic = PatchCritic().to(device, memory_format=torch.channels_last)
    return Stage(
        model=model,
        ema=EMA(model, settings.ema),
        optimizer=adamw(model, settings.lr, weight_decay),
        generator=generator,
        batch=settings.batch,
        extra={"critic": critic, "critic_optimizer": adamw(critic, settings.critic_lr, 0.0)},
    )


class VAELoss:
    """Reconstruction + KL, and late in the stage a critic that tells pictures from decoded ones."""

    def __init__(
        self, config: Config, settings: VAETraining, batch: DrawBatch, progress: Progress, autocast: Callable[[], Any]
    ):
        self.config = config.vae
        self.settings = settings
        self.batch = batch
        self.progress = progress
        self.autocast = autocast

    def __call__(self, model: nn.Module, stage: Stage) -> tuple[Tensor, Tensor]:
        """-> what to minimize, and the reconstruction's part of it, to report."""
        cfg = self.settings
        pixels = to_pixels(self.batch(stage.batch, stage.generator)[0])
        with self.autocast():
            output, mean, logvar = model(pixels, self._noise(pixels, stage.generator))
        output = output.float()
        error = reconstruction_loss(output, pixels, cfg.gradient_weight, cfg.ssim_weight)
        objective = error + cfg.kl_weight * kl_loss(mean.float(), logvar.float())
        if self.progress(stage.step) >= cfg.adversarial_from:
            objective = objective + self._adversarial(stage, output, pixels, error)
        return objective, error.detach()

    def _noise(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        batch, _, height, width = pixels.shape
        factor = self.config.downsampling
        shape = (batch, self.config.z_channels, height // factor, width // factor)
        return torch.randn(shape, generator=generator, device=pixels.device)

    def _adversarial(self, stage: Stage, output: Tensor, pixels: Tensor, error: Tensor) -> Tensor:
        """Train the critic a step, then return a term whose gradient at the picture is the critic's, in measure."""
        critic = stage.extra["critic"]
        self._train_critic(critic, stage.extra["critic_optimizer"], output.detach(), pixels)
        critic.requires_grad_(False)
        with self.autocast():
            score = -critic(output).float().mean()
        pull = scaled_gradient(score, error, output, self.settings.adversarial_ratio)
        critic.requires_grad_(True)
        return (output * pull).sum()

    def _train_critic(self, critic: nn.Module, optimizer: torch.optim.Optimizer, fake: Tensor, real: Tensor) -> None:
        with self.autocast():
            loss = critic_loss(critic, real, fake)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def encode(vae: VAE, pictures: Tensor, autocast: Callable[[], Any]) -> Tensor:
    """uint8 pictures [B, 3, H, W] -> means of their latents [B, C, H/8, W/8], fp32, not scaled."""
    with autocast():
        return vae.encode(to_pixels(pictures))[0].float()


@torch.no_grad()
def centre_latents(vae: VAE, mean: Tensor) -> None:
    """Change the VAE so that its latents lose their mean [C]: the 1x1 convolutions beside them absorb it exactly.

    Noise has mean zero, and diffusion starts from it.
    """
    mean = mean.to(vae.quant_conv.bias)
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean


def finish(vae: VAE, config: Config, pictures: Tensor, autocast: Callable[[], Any]) -> Config:
    """Centre the latents, and return the configuration with the scale that gives them unit variance.

    Both are measured on `pictures`, uint8 [B, 3, H, W].
    """
    latents = torch.cat([encode(vae, part, autocast) for part in pictures.split(256)])
    mean = latents.mean(dim=(0, 2, 3))
    centre_latents(vae, mean)
    std = (latents - mean[:, None, None]).std().item()
    log.info("latents: mean %s, standard deviation %.3f", [round(m, 2) for m in mean.tolist()], std)
    return replace(config, vae=replace(config.vae, scale_factor=1 / std))


@torch.no_grad()
def reconstruct(vae: VAE, pictures: Tensor) -> tuple[Tensor, float]:
    """uint8 pictures [B, 3, H, W] -> decoded means of their latents, in [-1, 1], and the PSNR in dB over all of them.

    In fp32, clamped and rounded to bytes, as a user gets them.
    """
    pixels = to_pixels(pictures)
    output = vae.decode(vae.encode(pixels)[0]).clamp(-1, 1)
    error = (((output + 1) * 127.5).round() - pictures.float()) / 255
    return output, -10 * error.square().mean().log10().item()


def save(path: Path, vae: VAE, config: Config, elapsed: float) -> None:
    """A finished autoencoder; `elapsed` is when diffusion began, in seconds of the run."""
    state = {"vae": vae.state_dict(), "config": config.to_json(), "elapsed": elapsed}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load(path: Path, device: torch.device) -> tuple[VAE, Config, float]:
    state = torch.load(path, map_location="cpu", weights_only=True)
    config = Config.from_json(state["config"])
    vae = VAE(config.vae)
    vae.load_state_dict(state["vae"])
    return vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), config, state["elapsed"]
