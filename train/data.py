"""Chunks of pictures and captions, drawn ahead by worker processes, and the pool on the device that batches come from.

Axes: N pictures of a chunk, B batch, L tokens, H W pixels.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sd.tokenizer import Tokenizer
from train.captions import Bank
from train.presets import DiffusionTraining, VAETraining
from train.state import write_atomically

# draw(n, seed) -> n pairs of a picture, uint8 [H, W, 3], and its caption. The same seed must give the same pairs.
Draw = Callable[[int, int], Iterable[tuple[np.ndarray, str]]]
Chunk = tuple[np.ndarray, np.ndarray]
Place = Callable[[Chunk], tuple[Tensor, ...]]  # a chunk to what batches are made of, on the device, N rows each

LAST_CHUNK = 2**31  # further than any run gets


class Chunks(Dataset):
    """Chunk k is a function of k and the seed alone, so that a resumed run sees what it would have seen.

    Item k: pictures, uint8 [N, 3, H, W], and token ids of their captions, int32 [N, L].
    """

    def __init__(self, draw: Draw, size: int, length: int, seed: int):
        self.draw = draw
        self.size = size
        self.length = length
        self.seed = seed
        self.tokenizer = Tokenizer()

    def __len__(self) -> int:
        return LAST_CHUNK

    def __getitem__(self, k: int) -> Chunk:
        pictures, captions = zip(*self.draw(self.size, self.seed + k), strict=True)
        tokens = self.tokenizer(captions, self.length).numpy().astype(np.int32)
        return np.stack(pictures).transpose(0, 3, 1, 2), tokens


def stream(chunks: Chunks, first: int, workers: int) -> Iterator[Chunk]:
    """Chunks first, first + 1, ..., in order, drawn ahead by `workers` processes (0: by this one, when asked)."""
    # Arrays go through pipes; tensors would need shared memory, of which containers often have only 64 MB.
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=range(first, LAST_CHUNK),
        num_workers=workers,
        collate_fn=_as_it_is,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def _as_it_is(chunk: Chunk) -> Chunk:
    return chunk


class Pool:
    """The latest `slots` chunks, on the device; batches are drawn at random from all of them.

    After step s of training it has taken `slots + s // every` chunks, so it can be rebuilt for any step: chunk k lies
    in slot k modulo `slots`.
    """

    def __init__(
        self, chunks: Chunks, place: Place, settings: VAETraining | DiffusionTraining, step: int, workers: int
    ):
        self.place = place
        self.slots = settings.pool_chunks
        self.every = settings.refresh_every
        self.taken = step // self.every
        self.stream = stream(chunks, self.taken, workers)
        self.parts: tuple[Tensor, ...] = ()
        for _ in range(self.slots):
            self._take()

    def advance(self, step: int) -> None:
        """Take the chunks that are due at `step`."""
        while self.taken < self.slots + step // self.every:
            self._take()

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        count = self.parts[0].shape[0]
        rows = torch.randint(count, (size,), generator=generator, device=generator.device)
        return tuple(part[rows] for part in self.parts)

    def _take(self) -> None:
        placed = self.place(next(self.stream))
        size = placed[0].shape[0]
        if not self.parts:
            self.parts = tuple(part.new_empty((self.slots * size, *part.shape[1:])) for part in placed)
        start = self.taken % self.slots * size
        for part, new in zip(self.parts, placed, strict=True):
            part[start : start + size] = new
        self.taken += 1


class TokensSeen:
    """Which ids of the vocabulary captions have used: the rows of the token table that are worth keeping."""

    def __init__(self, vocab_size: int):
        self.seen = np.zeros(vocab_size, dtype=bool)

    def add(self, tokens: np.ndarray) -> None:
        self.seen[tokens] = True

    def ids(self) -> list[int]:
        return np.flatnonzero(self.seen).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"ids": torch.tensor(self.ids())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen[state["ids"].numpy()] = True


def kept_bank(folder: Path, render: Callable[[], Bank]) -> Bank:
    """The bank of drawings in `folder`, rendered if it is not there; mapped, so that processes share its memory."""
    pictures, keys = folder / "bank.npy", folder / "bank.json"
    if not keys.exists():
        bank = render()
        write_atomically(pictures, lambda temporary: np.save(temporary, bank.pictures))
        write_atomically(keys, lambda temporary: temporary.write_text(json.dumps(list(bank.rows))))
    rows = {tuple(key): row for row, key in enumerate(json.loads(keys.read_text()))}
    return Bank(np.load(pictures, mmap_mode="r"), rows)


def to_pixels(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> fp32 in [-1, 1], channels last in memory, which is what convolutions on a GPU prefer."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
