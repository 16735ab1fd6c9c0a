"""Attention: the one function that every model here calls, and a reference to read.

Axes: B batch, N heads, L queries, S keys and values, D head size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[..., Tensor]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, spelled out (Vaswani et al. 2017, equation 1).

    q [B, N, L, D], k and v [B, N, S, D] -> [B, N, L, D]. It holds all L x S scores in memory: 1 GiB a head pair at
    512x512 in fp32 with guidance. To read and to compare with.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(dim=-1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """The same by PyTorch's fused kernels, which pick the fastest backend that takes these inputs.

    q [B, N, L, D], k and v [B, N, S, D] -> [B, N, L, D].
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, L, N*D] -> [B, N, L, D], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, N, L, D] -> [B, L, N*D]."""
    return x.transpose(1, 2).flatten(2)
