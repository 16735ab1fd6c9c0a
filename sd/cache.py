"""Optimizations that compute something once and use it again.

    packed-qkv     one matrix for the projections that share an input      exact
    kv-cache       keys and values of the text, once a prompt              exact
    time-cache     embeddings of the timesteps, once a model               exact
    shared-halves  what precedes the text, once for both guidance halves   exact
    deepcache      features of the deep levels, once every N steps         approximate

What is derived from weights or from the text lives in memory that stays where it is, and is brought up to date before
each call of the UNet: outside of anything compiled or captured, so that both see changed weights and prompts.
Axes: B batch, C channels, S text tokens, N heads, D head size, E all channels that residual blocks add a timestep to.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.attention import merge_heads, split_heads
from sd.ddpm import TRAIN_STEPS
from sd.unet import CrossAttention, ResBlock, SpatialTransformer, UNet, timestep_embedding


def address(tensor: Tensor) -> int:
    """Where a tensor's numbers are. Subclasses (quantized weights) have no address of their own: they are replaced."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def stamp(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Differs once a tensor was replaced or written to; those stamped must stay alive meanwhile.

    Inference tensors do not count their changes: whoever writes to one must not expect it to be seen.
    """
    return tuple((address(t), -1 if t.is_inference() else t._version) for t in tensors)


Refresh = Callable[[Tensor], None]


def refresh_before_calls(unet: UNet, refresh: Refresh) -> None:
    """Have `refresh(context)` run before each call of the UNet; in the order of registration."""
    if not hasattr(unet, "refreshers"):
        unet.refreshers = []
        unet.register_forward_pre_hook(lambda unet, inputs: refresh_all(unet, inputs[2]))
    unet.refreshers.append(refresh)


def refresh_all(unet: nn.Module, context: Tensor) -> None:
    """Bring everything derived up to date, for what runs parts of the UNet without calling it."""
    # Not in inference mode: what is kept is written to again, by calls in any mode.
    with torch.inference_mode(False), torch.no_grad():
        for refresh in getattr(unet, "refreshers", ()):
            refresh(context)


# ---- one matrix for the projections that share an input


class Packed:
    """The weights of some Linear layers without bias, stacked in one matrix of which theirs become views.

    So a weight that is written to, or loaded into, changes the matrix; for one that was replaced it is made again.
    """

    def __init__(self, layers: Iterable[nn.Linear]):
        self.layers = tuple(layers)
        self.weight = self._stack()

    def _stack(self) -> Tensor:
        weight = torch.cat([layer.weight.detach() for layer in self.layers])
        rows = [layer.out_features for layer in self.layers]
        for layer, view in zip(self.layers, weight.split(rows), strict=True):
            layer.weight = nn.Parameter(view, requires_grad=False)
        return weight

    def refresh(self, context: Tensor) -> None:
        offset = 0
        for layer in self.layers:
            if address(layer.weight) != self.weight.data_ptr() + offset:
                self.weight = self._stack()
                return
            offset += layer.weight.nbytes

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight).chunk(len(self.layers), dim=-1)


class PackedSelfAttention(CrossAttention):
    packed: Packed

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.packed(x))
        return self.to_out(merge_heads(self.attend(q, k, v)))


class PackedCrossAttention(CrossAttention):
    packed: Packed

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.packed(context))
        return self.to_out(merge_heads(self.attend(q, k, v)))


def pack_projections(unet: UNet) -> None:
    for attention in _attentions(unet, "attn1"):
        _pack(unet, attention, PackedSelfAttention, (attention.to_q, attention.to_k, attention.to_v))
    for attention in _attentions(unet, "attn2"):
        _pack(unet, attention, PackedCrossAttention, (attention.to_k, attention.to_v))


def _pack(unet: UNet, attention: CrossAttention, kind: type, layers: tuple[nn.Linear, ...]) -> None:
    attention.__class__ = kind
    attention.packed = Packed(layers)
    refresh_before_calls(unet, attention.packed.refresh)


def _attentions(unet: UNet, name: str) -> list[CrossAttention]:
    return [m for path, m in unet.named_modules() if path.endswith(name) and isinstance(m, CrossAttention)]


# ---- keys and values of the text


class CachedCrossAttention(CrossAttention):
    """Attention to the text with keys and values that `TextKeys` keeps, by the shape of the context."""

    keys_values: dict[tuple[int, ...], tuple[Tensor, Tensor]]

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k, v = self.keys_values[tuple(context.shape)]
        return self.to_out(merge_heads(self.attend(q, k, v)))

    def keep(self, context: Tensor) -> None:
        """Compute k and v [B, N, S, D] of context [B, S, C] into their place."""
        shape = tuple(context.shape)
        new = [split_heads(project(context), self.heads).contiguous() for project in (self.to_k, self.to_v)]
        old = self.keys_values.get(shape)
        if old is None or old[0].dtype != new[0].dtype:
            self.keys_values[shape] = new[0], new[1]
        else:
            for kept, value in zip(old, new, strict=True):
                kept.copy_(value)


class TextKeys:
    """Sees to it that the cross-attentions' keys and values are those of the context in use.

    The samplers pass one context tensor, the same object, at every step; another object is another prompt.
    """

    def __init__(self, attentions: list[CachedCrossAttention]):
        self.attentions = attentions
        self.seen: dict[tuple[int, ...], tuple[Tensor, tuple]] = {}

    def refresh(self, context: Tensor) -> None:
        current = stamp((context, *(layer.weight for a in self.attentions for layer in (a.to_k, a.to_v))))
        seen, seen_stamp = self.seen.get(tuple(context.shape), (None, ()))
        if context is seen and current == seen_stamp:
            return
        for attention in self.attentions:
            attention.keep(context)
        # The context itself is kept alive: its identity must not pass on to another prompt's.
        self.seen[tuple(context.shape)] = context, current


def cache_text_keys(unet: UNet) -> None:
    attentions = _attentions(unet, "attn2")
    for attention in attentions:
        attention.__class__ = CachedCrossAttention
        attention.keys_values = {}
    refresh_before_calls(unet, TextKeys(attentions).refresh)


# ---- a UNet whose forward is cut into stages, so that a cache can stand for one of them


class StagedUNet(UNet):
    """The plain forward, with `time_table` in place of the timestep's embedding and `deep` of the levels, if set."""

    time_table: "TimeTable | None" = None
    deep: "DeepFeatures | None" = None

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        emb = self._embed(t, x)
        if self.deep is not None:
            return self.out(self.deep(self, x, emb, context))
        skips: list[Tensor] = []
        x = self.down(x, emb, context, skips, 0, len(self.input_blocks))
        x = self.middle_block(x, emb, context)
        return self.out(self.up(x, emb, context, skips, 0, len(self.output_blocks)))

    def _embed(self, t: Tensor, x: Tensor) -> Tensor:
        if self.time_table is not None:
            return self.time_table(t)
        return self.time_embed(timestep_embedding(t.expand(x.shape[0]), self.model_channels).to(x.dtype))

    def down(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], start: int, stop: int) -> Tensor:
        """Input blocks start to stop - 1; their outputs are appended to skips."""
        for block in self.input_blocks[start:stop]:
            x = block(x, emb, context)
            skips.append(x)
        return x

    def up(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], start: int, stop: int) -> Tensor:
        """Output blocks start to stop - 1; each takes the last of skips away."""
        for block in self.output_blocks[start:stop]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return x


# ---- embeddings of the timesteps


class TimeSlice(nn.Sequential):
    """A residual block's `emb_layers` that takes its part of a row that holds the results for all blocks."""

    start: int
    stop: int

    def forward(self, emb: Tensor) -> Tensor:
        return emb[:, self.start : self.stop]


class TimeTable:
    """What every residual block adds at every timestep: 1000 rows of E numbers, 40 MB for SD 1.5 in fp16."""

    def __init__(self, unet: UNet):
        self.model_channels = unet.model_channels
        self.time_embed = unet.time_embed
        self.blocks = [m.emb_layers for m in unet.modules() if isinstance(m, ResBlock)]
        self.rows: Tensor | None = None
        self.stamp: tuple = ()

    def __call__(self, t: Tensor) -> Tensor:
        """Timesteps t [] or [B] -> [1 or B, E]. Those between the integers are computed."""
        if t.is_floating_point():
            return self._compute(t.reshape(-1))
        return self.rows.index_select(0, t.reshape(-1))  # not rows[t], which makes the host wait for t's value

    def refresh(self, context: Tensor) -> None:
        current = stamp(p for part in (self.time_embed, *self.blocks) for p in part.parameters())
        if current == self.stamp:
            return
        rows = self._compute(torch.arange(TRAIN_STEPS, device=self.time_embed[0].weight.device))
        self.rows = rows if self.rows is None else self.rows.copy_(rows)
        self.stamp = current

    def _compute(self, t: Tensor) -> Tensor:
        sinusoids = timestep_embedding(t, self.model_channels).to(self.time_embed[0].weight.dtype)
        emb = self.time_embed(sinusoids)
        return torch.cat([nn.Sequential.forward(block, emb) for block in self.blocks], dim=1)


def cache_times(unet: UNet) -> None:
    unet.__class__ = StagedUNet
    table = unet.time_table = TimeTable(unet)
    start = 0
    for layers in table.blocks:
        layers.__class__ = TimeSlice
        layers.start, layers.stop = start, start + layers[1].out_features
        start = layers.stop
    refresh_before_calls(unet, table.refresh)


# ---- what the two halves of guidance have in common


class SharedHalves:
    """Both halves of guidance see the same latents, and differ only from the first cross-attention on.

    Up to there each module runs on the first half of the batch, and its result stands for both. `alike` says whether
    the halves of the next call are alike: whoever doubles the latents sets it.
    """

    def __init__(self) -> None:
        self.alike = False

    def share(self, module: nn.Module) -> None:
        """All inputs of this module must have the batch as their first axis, or one row for all of it."""
        module.forward = self._shared(module.forward)

    def _shared(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def on_one_half(*inputs: Tensor) -> Tensor:
            if not self.alike:
                return forward(*inputs)
            y = forward(*(x[: max(1, x.shape[0] // 2)] for x in inputs))
            return torch.cat([y, y])

        return on_one_half


def share_halves(unet: UNet) -> SharedHalves:
    unet.halves = SharedHalves()
    for module in _before_the_text(unet):
        unet.halves.share(module)
    return unet.halves


def _before_the_text(unet: UNet) -> Iterator[nn.Module]:
    """The layers before the first transformer, and its first self-attention."""
    for layer in (layer for block in unet.input_blocks for layer in block):
        if isinstance(layer, SpatialTransformer):
            yield layer.transformer_blocks[0].attn1
            return
        yield layer


# ---- features of the deep levels


class DeepFeatures:
    """Runs the deep levels only at every `interval`-th step (Ma et al. 2023, "DeepCache").

    In between it runs the `SHALLOW` outermost blocks on each side, which see the new latents, and gives them what the
    deep levels made of earlier ones. `reuse` says which the next call does: whoever counts the steps sets it.
    """

    SHALLOW = 1

    def __init__(self, interval: int):
        self.interval = interval
        self.reuse = False
        self.features: dict[tuple[int, ...], Tensor] = {}

    def start_step(self, step: int) -> None:
        self.reuse = step % self.interval != 0

    def __call__(self, unet: StagedUNet, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Latents x to the last output block's features."""
        shape, border = tuple(x.shape), len(unet.output_blocks) - self.SHALLOW
        skips: list[Tensor] = []
        x = unet.down(x, emb, context, skips, 0, self.SHALLOW)
        if not (self.reuse and shape in self.features):
            self.features[shape] = self._deep(unet, x, emb, context, list(skips), border)
        return unet.up(self.features[shape], emb, context, skips, border, len(unet.output_blocks))

    def _deep(
        self, unet: StagedUNet, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor], border: int
    ) -> Tensor:
        x = unet.down(x, emb, context, skips, self.SHALLOW, len(unet.input_blocks))
        x = unet.middle_block(x, emb, context)
        return unet.up(x, emb, context, skips, 0, border)


def cache_deep_features(unet: UNet, interval: int) -> DeepFeatures:
    unet.__class__ = StagedUNet
    unet.deep = DeepFeatures(interval)
    return unet.deep
