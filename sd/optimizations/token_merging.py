"""Self-attention over fewer tokens: similar ones merged before it, and parted after (Bolya and Hoffman 2023, "Token
Merging for Fast Stable Diffusion").

Axes: B batch, C channels, H W grid, L = H*W tokens; D destinations, S = L - D sources, of which R are merged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.optimizations.base import Patch, Stage, optimization
from sd.unet import Downsample, SpatialTransformer, Upsample


def partition(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions on a grid of 2 x 2 or more: the sources [S], the destinations [D], and where each position is in those
    two, one after the other, [L].

    The first of each 2x2 block is a destination; the last row and column of an odd grid are sources.
    """
    chosen = torch.zeros(height, width, dtype=torch.int64, device=device)
    chosen[: height // 2 * 2 : 2, : width // 2 * 2 : 2].fill_(1)
    chosen = chosen.flatten()
    positions, before = torch.arange(height * width, device=device), chosen.cumsum(0) - chosen
    count = (height // 2) * (width // 2)
    # Not by a mask, whose size the host would wait for.
    place = torch.where(chosen == 1, height * width - count + before, positions - before)
    order = torch.empty_like(positions).scatter_(0, place, positions)
    return order[:-count], order[-count:], place


@dataclass(frozen=True)
class Matching:
    """Which tokens of each row are merged.

    left [B, S - R]: positions of the sources that are not. merged [B, R]: of those that are, `into` [B, R] of the
    destinations [D]. parted [B, L]: for each position, which of the L - R tokens stands for it.
    """

    left: Tensor
    merged: Tensor
    into: Tensor
    destinations: Tensor
    parted: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L - R, C]: the sources left, then the destinations, each the mean of what it has taken."""
        means = x.index_select(1, self.destinations).scatter_reduce(
            1, _wide(self.into, x), x.gather(1, _wide(self.merged, x)), "mean"
        )
        return torch.cat([x.gather(1, _wide(self.left, x)), means], dim=1)

    def part(self, y: Tensor) -> Tensor:
        """[B, L - R, C] -> [B, L, C]: what was merged gets its destination's result."""
        return y.gather(1, _wide(self.parted, y))


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


def match(tokens: Tensor, grid: tuple[int, int], ratio: float) -> Matching:
    """Bipartite soft matching: of tokens [B, L, C], the ratio * L sources that are most like a destination.

    At most all the sources, which are 3/4 of an even grid. Likeness is the cosine.
    """
    sources, destinations, inverse = partition(*grid, tokens.device)
    unit = F.normalize(tokens, dim=-1)
    scores = unit.index_select(1, sources) @ unit.index_select(1, destinations).transpose(1, 2)
    likeness, nearest = scores.max(dim=-1)
    order = likeness.argsort(dim=-1, descending=True, stable=True)
    count = min(int(tokens.shape[1] * ratio), len(sources))
    merged, left = order[:, :count], order[:, count:]
    into = nearest.gather(1, merged)

    rest = torch.arange(tokens.shape[1] - count, device=tokens.device).expand(len(tokens), -1)
    places = torch.cat([left.shape[1] + into, rest[:, : left.shape[1]]], dim=1)  # in the order of likeness
    places = torch.empty_like(order).scatter_(1, order, places)
    parted = torch.cat([places, rest[:, left.shape[1] :]], dim=1).index_select(1, inverse)
    return Matching(sources[left], sources[merged], into, destinations, parted)


class Merging:
    """One transformer's: the grid that it was called with, and what its block was, which likeness is measured on."""

    def __init__(self, ratio: float):
        self.ratio = ratio
        self.grid = 0, 0
        self.tokens: Tensor | None = None

    def around_transformer(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def transformer(x: Tensor, context: Tensor) -> Tensor:
            self.grid = x.shape[-2], x.shape[-1]
            return forward(x, context)

        return transformer

    def around_block(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def block(x: Tensor, context: Tensor, *bias: Tensor | None) -> Tensor:
            # A fused block is given the bias of the layer before it apart.
            self.tokens = sum((b for b in bias if b is not None), start=x)
            return forward(x, context, *bias)

        return block

    def around_attention(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attention(x: Tensor) -> Tensor:
            # shared-halves gives it the first half of what the block was given.
            matching = match(self.tokens[: len(x)], self.grid, self.ratio)
            self.tokens = None
            return matching.part(forward(matching.merge(x)))

        return attention


def finest(unet: nn.Module) -> Iterator[SpatialTransformer]:
    """The transformers at the latents' own resolution: before the first downsampling and after the last upsampling,
    if there is a way up, as a ControlNet has none."""
    up = getattr(unet, "output_blocks", ())
    for blocks, border in ((unet.input_blocks, Downsample), (reversed(up), Upsample)):
        for block in blocks:
            if any(isinstance(layer, border) for layer in block):
                break
            yield from (layer for layer in block if isinstance(layer, SpatialTransformer))


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 0.75:
        raise ValueError("a fraction of the tokens over 0, up to 0.75")
    return ratio


# By its name after packed-qkv, which gives self-attentions their class; and before shared-halves, which wraps this.
@optimization(
    "token-merging",
    stage=Stage.REUSE,
    exact=False,
    summary="similar tokens merged for the largest self-attentions",
    value=_ratio,
    hint="RATIO",
)
def token_merging(patch: Patch, ratio: float = 0.5) -> None:
    """A fraction of the tokens merged into similar ones before self-attention at the finest level, and parted after it
    (Bolya and Hoffman 2023). Approximate.

    Destinations are the first of each 2x2 block. The paper draws one of the four at random at each call, which looks a
    little better; but here a picture is its seed's, in any batch, and a captured graph cannot draw.

    Helps: large pictures, where self-attention is most of the work: at 0.5 a quarter of the scores is left. Hurts: fine
    detail, the more the higher the ratio; and small pictures, where matching costs more than it saves. On a GPU means
    are summed in no fixed order, so that one seed's pictures are the same up to rounding.
    """
    for transformer in finest(patch.unet):
        merging = Merging(ratio)
        patch.around(transformer, merging.around_transformer)
        for block in transformer.transformer_blocks:
            patch.around(block, merging.around_block)
            patch.around(block.attn1, merging.around_attention)
            own = getattr(block.attn1, "kernel", "")
            patch.set(block.attn1, "kernel", f"{own}, {ratio:.0%} of the tokens merged".removeprefix(", "))
