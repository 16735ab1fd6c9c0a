"""What training minimizes: reconstruction, KL divergence and a small critic for the VAE, weighted noise for the UNet.

Axes: B batch, C channels, H W pixels or latents.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.schedules import alphas_cumprod


def gradient_loss(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels, at full size, a half, a quarter, ...

    L1 alone settles for blurred edges; this makes an edge in the wrong place, or a soft one, expensive.
    """
    error, total = a - b, a.new_zeros(())  # differences are linear: those of the error are the error of those
    for _ in range(scales):
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        error = F.avg_pool2d(error, 2)
    return total / scales


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of pictures [B, C, H, W] in [-1, 1] (Wang et al. 2004), in a square window; 1 is equal."""
    mean_a, mean_b = (F.avg_pool2d(x, window, 1) for x in (a, b))
    var_a = F.avg_pool2d(a * a, window, 1) - mean_a**2
    var_b = F.avg_pool2d(b * b, window, 1) - mean_b**2
    covariance = F.avg_pool2d(a * b, window, 1) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the pictures' range is 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean()


def reconstruction_loss(output: Tensor, target: Tensor, gradient_weight: float, ssim_weight: float) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] -> []. Call it in fp32: SSIM subtracts squares of nearly equal numbers."""
    l1 = (output - target).abs().mean()
    return l1 + gradient_weight * gradient_loss(output, target) + ssim_weight * (1 - ssim(output, target))


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over elements of KL(N(mean, exp(logvar)) || N(0, 1)), in nats."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()


class PatchCritic(nn.Sequential):
    """Scores overlapping patches of 46 pixels as real or decoded: [B, 3, H, W] -> [B, 1, h, w] (Isola et al. 2017)."""

    def __init__(self, width: int = 48):
        super().__init__(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),
            nn.GroupNorm(8, 4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 4, padding=1),
        )


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss: real patches should score above 1, decoded ones below -1."""
    return (F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean()) / 2


def scaled_gradient(loss: Tensor, reference: Tensor, at: Tensor, ratio: float) -> Tensor:
    """Gradient of `loss` with respect to `at`, scaled to `ratio` times the norm of the reference's gradient there.

    So balanced at the decoded picture, a critic pulls no harder than it may, whatever it scores.
    """
    gradient = torch.autograd.grad(loss, at)[0]
    size = torch.autograd.grad(reference, at, retain_graph=True)[0].norm()
    return gradient * (ratio * size / gradient.norm().clamp(min=1e-12))


class NoiseLoss:
    """Mean squared error of the predicted noise, weighted by min(SNR, gamma) / SNR (Hang et al. 2023).

    Nearly clean latents, with a high signal-to-noise ratio, would otherwise claim most of the network.
    """

    def __init__(self, gamma: float, device: torch.device):
        abar = torch.tensor(alphas_cumprod(), dtype=torch.float64)
        snr = abar / (1 - abar)
        self.signal = abar.sqrt().float().to(device)
        self.sigma = (1 - abar).sqrt().float().to(device)
        self.weight = (snr.clamp(max=gamma) / snr).float().to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents and noise [B, C, H, W], timesteps t [B] -> latents as they look at timestep t."""
        return self.signal[t][:, None, None, None] * latents + self.sigma[t][:, None, None, None] * noise

    def __call__(self, predicted: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        return (self.weight[t] * error).mean()


def stratified_timesteps(batch: int, generator: torch.Generator, steps: int = 1000) -> Tensor:
    """[batch] timesteps, each uniform, together spread evenly (Kingma et al. 2021): the loss varies less by batch."""
    offset = torch.rand((), generator=generator, device=generator.device)
    place = (torch.arange(batch, device=generator.device) / batch + offset) % 1
    return (place * steps).long().clamp(max=steps - 1)
