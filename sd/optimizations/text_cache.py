"""Keys and values of the text, once a prompt in place of once a step.

Axes: B batch, C channels, S text tokens, N heads, D head size.
"""

from torch import Tensor

from sd.attention import merge_heads, split_heads
from sd.checkpoints.stamps import Stamp
from sd.optimizations.base import Patch, Stage, optimization
from sd.unet import BasicTransformerBlock, CrossAttention


class CachedCrossAttention(CrossAttention):
    """Attention to the text with keys and values that `TextKeys` keeps, by the shape of the context."""

    kernel = "keys and values once a prompt"
    keys_values: dict[tuple[int, ...], tuple[Tensor, Tensor]]

    def attended(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k, v = self.keys_values[tuple(context.shape)]
        return merge_heads(self.attend(q, k, v))

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
        self.seen: dict[tuple[int, ...], tuple[Tensor, Stamp]] = {}

    def refresh(self, context: Tensor) -> None:
        current = Stamp((context, *(layer.weight for a in self.attentions for layer in (a.to_k, a.to_v))))
        seen, seen_stamp = self.seen.get(tuple(context.shape), (None, None))
        if context is seen and current == seen_stamp:
            return
        for attention in self.attentions:
            attention.keep(context)
        # The context itself is kept alive: its identity must not pass on to another prompt's.
        self.seen[tuple(context.shape)] = context, current


@optimization("kv-cache", stage=Stage.REUSE, exact=True, summary="the text's keys and values once a prompt")
def kv_cache(patch: Patch) -> None:
    """Cross-attention's keys and values once a prompt in place of once a step: the text does not change. Exact.

    Helps: 32 small products a step. Hurts: nothing known; 8 MB a prompt in fp16.
    """
    blocks = [module for module in patch.unet.modules() if isinstance(module, BasicTransformerBlock)]
    attentions = [block.attn2 for block in blocks if type(block.attn2) is CrossAttention]
    for attention in attentions:
        patch.swap(attention, CachedCrossAttention, keys_values={})
        patch.seldom("once a prompt", attention.to_k, attention.to_v)
    if attentions:
        patch.before_predict(TextKeys(attentions).refresh)
