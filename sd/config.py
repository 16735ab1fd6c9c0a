"""What a Stable Diffusion 1.x model is made of, as numbers.

Three frozen dataclasses describe the three networks and `Config` holds them together. The defaults are
SD 1.5 (`v1-inference.yaml` of CompVis/stable-diffusion); any narrower model is another `Config`.
"""

import json
from dataclasses import asdict, dataclass, field, fields


@dataclass(frozen=True)
class TextConfig:
    """CLIP's text encoder (Radford et al. 2021, ViT-L/14).

    openclip: SD 2's instead (ViT-H/14 of OpenCLIP), which has the exact GELU, and padding of zeros. `layers` are those
    that are used: SD 2 was trained without the last of 24.
    """

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    max_length: int = 77
    openclip: bool = False


@dataclass(frozen=True)
class UNetConfig:
    """The noise predictor (Rombach et al. 2022).

    `channel_mult` has one entry a level: level i is `model_channels * channel_mult[i]` wide and works on the latents
    halved i times. `attention_levels` says which of them carry spatial transformers; the middle block always does.
    There are `num_heads` at every level, or, where head_channels is not 0, as many as have so many channels each
    (SD 2). linear_projections: in a file the transformers' 1x1 convolutions are matrices (SD 2).
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: int = 8
    head_channels: int = 0
    transformer_depth: int = 1
    context_dim: int = 768
    norm_groups: int = 32
    linear_projections: bool = False

    @property
    def inpaints(self) -> bool:
        """Whether it takes a mask and the latents of what stays after the noisy ones: 4 + 1 + 4 channels for 4."""
        return self.in_channels == 2 * self.out_channels + 1

    def heads(self, channels: int) -> int:
        """Of an attention at a level of so many channels."""
        return channels // self.head_channels if self.head_channels else self.num_heads

    @property
    def downsampling(self) -> int:
        """How many latent pixels become one at the lowest level; latents must be divisible by it."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pictures and latents (`kl-f8`)."""

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 4
    norm_groups: int = 32
    scale_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Side of the square of picture pixels that one latent stands for."""
        return 2 ** (len(self.ch_mult) - 1)


DTYPES = ("float32", "float16", "bfloat16")
"""What weights can be in, as torch calls it."""


def dtype_name(text: str) -> str:
    """As torch calls it: fp16, bf16 and fp32 are what everybody says."""
    return {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(text, text)


PREDICTIONS = ("eps", "v")


@dataclass(frozen=True)
class Config:
    """A whole model. `image_size` is the side in pixels that it was trained at, and draws by default.

    prediction: what the UNet says of noisy latents: "eps", the noise in them, or "v" (Salimans and Ho 2022).
    """

    text: TextConfig = field(default_factory=TextConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    image_size: int = 512
    name: str = "Stable Diffusion 1.5"
    prediction: str = "eps"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"no prediction {self.prediction!r}; there are {', '.join(PREDICTIONS)}")

    @property
    def size_multiple(self) -> int:
        """Pixels that height and width must be multiples of: 64 for SD 1.5."""
        return self.vae.downsampling * self.unet.downsampling

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, naming the nearest sizes that work, unless the UNet can halve both to its lowest level."""
        m = self.size_multiple
        if height >= m and width >= m and height % m == 0 and width % m == 0:
            return
        nearest = [sorted({max(m, side // m * m), max(m, -(-side // m) * m)}) for side in (height, width)]
        names = ("height", "width")
        hints = ", ".join(f"{n} {' or '.join(map(str, s))}" for n, s in zip(names, nearest, strict=True))
        raise ValueError(
            f"{height}x{width} (height x width) is not a multiple of {m} pixels each way; nearest: {hints}"
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Inverse of `to_json`. Raises ValueError on unknown or missing fields, or fields of another type."""
        raw = json.loads(text)
        parts = {"text": TextConfig, "unet": UNetConfig, "vae": VAEConfig}
        if not isinstance(raw, dict) or not all(isinstance(raw.get(part), dict) for part in parts):
            raise ValueError("the configuration needs objects named text, unet and vae")
        built = {part: _build(kind, raw[part]) for part, kind in parts.items()}
        return _build(cls, {**raw, **built})


def _build(kind: type, values: dict):
    expected = {f.name: f for f in fields(kind)}
    if unknown := set(values) - set(expected):
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    built = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    for name in expected:
        _check_number(kind, name, getattr(built, name))
    return built


def _check_number(kind: type, name: str, value) -> None:
    """A configuration comes from a file: refuse what would hang or fill the memory before anything is built from it."""
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, (bool, int, float)) and not 0 <= number <= 1_000_000:
            raise ValueError(f"{kind.__name__}.{name} is {value}")
    default = getattr(kind, name, None)
    if default is not None and type(value) is not type(default):
        raise ValueError(f"{kind.__name__}.{name} is {value!r}, not a {type(default).__name__}")


SD15 = Config()
