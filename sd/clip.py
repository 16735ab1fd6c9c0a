"""CLIP's text encoder: token ids to the context that the UNet attends to.

Module names are those of the checkpoint under `cond_stage_model.transformer.text_model`.
Axes: B batch, L tokens, C width.
"""

import torch
from torch import Tensor, nn

from sd.attention import attention, merge_heads, split_heads
from sd.config import TextConfig


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation that OpenAI trained CLIP with. The exact GELU gives other pictures."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.Module):
    attend = staticmethod(attention)

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(self.attend(q, k, v, causal=True)))


class MLP(nn.Module):
    def __init__(self, width: int, act: nn.Module):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = act
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width)
        self.self_attn = SelfAttention(cfg.width, cfg.heads)
        self.layer_norm2 = nn.LayerNorm(cfg.width)
        self.mlp = MLP(cfg.width, nn.GELU() if cfg.openclip else QuickGELU())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.width)
        self.position_embedding = nn.Embedding(cfg.max_length, cfg.width)

    def forward(self, tokens: Tensor, learned: Tensor | None = None) -> Tensor:
        positions = self.position_embedding.weight[: tokens.shape[1]]
        if learned is None:
            return self.token_embedding(tokens) + positions
        beyond = tokens - self.token_embedding.num_embeddings
        known = self.token_embedding(tokens.where(beyond < 0, 0))
        return torch.where((beyond < 0)[..., None], known, learned.to(known)[beyond.clamp(min=0)]) + positions


class Encoder(nn.Module):
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(cfg.layers))

    def forward(self, x: Tensor, skip: int = 0) -> Tensor:
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return x


class CLIP(nn.Module):
    """The text encoder. Attention is causal and sees the padding: SD was trained without a padding mask."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.width)

    def forward(self, tokens: Tensor, skip: int = 0, learned: Tensor | None = None) -> Tensor:
        """Token ids [B, L], L <= 77 -> context [B, L, C]; without the last `skip` layers.

        learned: vectors [n, C] of words that are not in the table; their ids follow its last one.
        """
        return self.final_layer_norm(self.encoder(self.embeddings(tokens, learned), skip))
