"""What is trained and how long each part gets, as numbers: `demo` for one large GPU, `tiny` for the tests on a CPU."""

from dataclasses import dataclass, field

from sd.config import Config, TextConfig, UNetConfig, VAEConfig


@dataclass(frozen=True)
class VAETraining:
    """The autoencoder. Losses are means over elements, so the weights do not depend on the picture's size."""

    batch: int = 128
    lr: float = 8e-4
    warmup: int = 200  # steps
    ema: float = 0.998
    pool_chunks: int = 64  # chunks of pictures kept on the device
    refresh_every: int = 8  # steps between replacing the oldest chunk by a new one
    gradient_weight: float = 1.0  # differences of neighbouring pixels, at three scales: edges
    ssim_weight: float = 0.2
    kl_weight: float = 3e-4
    adversarial_from: float = 0.7  # share of the stage after which a critic joins in; 1: never
    critic_lr: float = 3e-4
    adversarial_ratio: float = 0.2  # size of the critic's gradient relative to the reconstruction's


@dataclass(frozen=True)
class DiffusionTraining:
    """Text encoder and UNet, together."""

    batch: int = 512
    lr: float = 8e-4
    warmup: int = 500  # steps
    ema: float = 0.9993
    snr_gamma: float = 5.0
    caption_dropout: float = 0.1  # share of captions that become "", for guidance
    pool_chunks: int = 384  # chunks whose latents are kept on the device
    refresh_every: int = 6  # steps between replacing the oldest chunk by a new one


@dataclass(frozen=True)
class Preset:
    model: Config
    vae: VAETraining = field(default_factory=VAETraining)
    diffusion: DiffusionTraining = field(default_factory=DiffusionTraining)
    chunk: int = 256  # pictures that are drawn, and encoded, together
    vae_share: float = 0.24  # of the total time
    weight_decay: float = 0.01
    save_seconds: float = 90.0  # between states on disk
    sample_seconds: float = 240.0  # between sample grids
    finish_seconds: float = 25.0  # kept back at the end of a call for the last state, grid and export
    sample_steps: int = 25
    cfg_scale: float = 4.0


DEMO_MODEL = Config(
    text=TextConfig(width=192, layers=4, heads=6, max_length=32),
    unet=UNetConfig(
        in_channels=8,
        out_channels=8,
        model_channels=128,
        channel_mult=(1, 1),
        num_res_blocks=2,
        attention_levels=(0, 1),
        num_heads=4,
        context_dim=192,
    ),
    vae=VAEConfig(ch=32, ch_mult=(1, 2, 3, 3), num_res_blocks=1, z_channels=8, norm_groups=8),
    image_size=128,
    name="emoji demo",
)

TINY_MODEL = Config(
    text=TextConfig(width=16, layers=1, heads=2, max_length=16),
    unet=UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        attention_levels=(1,),
        num_heads=2,
        context_dim=16,
        norm_groups=8,
    ),
    vae=VAEConfig(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4),
    image_size=32,
    name="tiny test model",
)

PRESETS = {
    "demo": Preset(model=DEMO_MODEL),
    "tiny": Preset(
        model=TINY_MODEL,
        vae=VAETraining(batch=8, lr=3e-3, warmup=2, ema=0.9, pool_chunks=4, kl_weight=1e-5),
        diffusion=DiffusionTraining(batch=16, lr=3e-3, warmup=2, ema=0.9, pool_chunks=4),
        chunk=16,
        save_seconds=60.0,
        sample_seconds=3600.0,
        finish_seconds=1.0,
        sample_steps=3,
    ),
}
