"""One matrix for the projections that share an input.

Axes: B batch, C channels, S text tokens, N heads, D head size.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from sd.attention import merge_heads, split_heads
from sd.checkpoints.stamps import address
from sd.optimizations.base import Patch, Stage, optimization, product_of
from sd.unet import BasicTransformerBlock, CrossAttention


class Packed:
    """The weights of some Linear layers without bias, stacked in one matrix of which theirs become views.

    So a weight that is written to, or loaded into, changes the matrix; for one that was replaced it is made again.
    """

    def __init__(self, layers: Iterable[nn.Linear]):
        self.layers = tuple(layers)
        self.product = product_of(self.layers[0])
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
        return self.product(x, self.weight).chunk(len(self.layers), dim=-1)


class PackedSelfAttention(CrossAttention):
    """q, k and v of one input by one product."""

    kernel = "one product for q, k, v"
    packed: Packed

    def attended(self, x: Tensor, context: None = None) -> Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.packed(x))
        return merge_heads(self.attend(q, k, v))


class PackedCrossAttention(CrossAttention):
    """k and v of the text by one product."""

    kernel = "one product for k, v"
    packed: Packed

    def attended(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.packed(context))
        return merge_heads(self.attend(q, k, v))


@optimization("packed-qkv", stage=Stage.REUSE, exact=True, summary="q, k and v as one product")
def packed_qkv(patch: Patch) -> None:
    """Query, key and value of self-attention as one product, key and value of cross-attention as another. Exact.

    Helps: small products, which leave a large chip idle. Hurts: nothing known; the weights keep their names as views.
    Beside kv-cache, which projects the text once a prompt, self-attention alone is packed.
    """
    packs = [pack for pack in _packs(patch.unet) if _can_be_packed(pack[1], pack[3])]
    layers = {f"{path}.{name}": getattr(attention, name) for path, attention, _, names in packs for name in names}
    if packs:
        patch.converts(patch.unet, [f"{path}.weight" for path in layers], back=lambda: _unpack(layers.values()))
    for _, attention, kind, names in packs:
        packed = Packed(getattr(attention, name) for name in names)
        patch.swap(attention, kind, packed=packed)
        patch.within(*packed.layers)
        patch.before_predict(packed.refresh)


def _packs(unet: nn.Module) -> Iterator[tuple[str, CrossAttention, type[CrossAttention], tuple[str, ...]]]:
    """The attentions of the UNet: path, module, the class for it, and the projections that it packs."""
    for path, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock):
            yield f"{path}.attn1", block.attn1, PackedSelfAttention, ("to_q", "to_k", "to_v")
            yield f"{path}.attn2", block.attn2, PackedCrossAttention, ("to_k", "to_v")


def _can_be_packed(attention: CrossAttention, names: tuple[str, ...]) -> bool:
    """Another switch's attention projects in its own way, and some layers are no product of a weight."""
    return type(attention) is CrossAttention and all(product_of(getattr(attention, name)) for name in names)


def _unpack(layers: Iterable[nn.Linear]) -> None:
    """Give each layer a weight of its own again."""
    for layer in layers:
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
