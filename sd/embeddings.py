"""Learned words (textual inversion, Gal et al. 2022): vectors that stand for a word of the prompt.

A word of n vectors takes n places of the 75 of a chunk. Their ids follow the vocabulary's, and the text encoder is
given their vectors beside the ids; its own table of tokens is not touched.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd.checkpoints.embedding import read_embeddings
from sd.tokenizer import Tokenizer

LONGEST = 75


@dataclass(frozen=True)
class Word:
    """vectors [n, C]; path: the file that holds it."""

    vectors: Tensor
    path: Path


class Words:
    """The learned words of one pipeline, by their spelling.

    In a prompt they are found whatever their case, the longest first, but not within other words.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.words: dict[str, Word] = {}

    def __bool__(self) -> bool:
        return bool(self.words)

    def add(self, path: str | os.PathLike, word: str | None, width: int) -> list[str]:
        """Read a file; returns its words. word: what to call the file's only one, in place of its own name.

        Raises CheckpointError for what is no such file, or one for another text encoder than one of this width, and
        ValueError for a word that is taken, empty, or cannot be renamed.
        """
        found = read_embeddings(path, width)
        if word is not None:
            if len(found) > 1:
                raise ValueError(f"{path} holds {len(found)} words ({', '.join(found)}): they keep their names")
            found = {word: next(iter(found.values()))}
        self.learn(found, Path(path))
        return list(found)

    def learn(self, found: Mapping[str, Tensor], path: Path) -> None:
        """Take up words with their vectors. Raises ValueError, with nothing changed."""
        new = {}
        for word, vectors in found.items():
            if not word.strip():
                raise ValueError(f"{word!r} cannot be a word of a prompt")
            if taken := next((name for name in {**self.words, **new} if _key(name) == _key(word)), None):
                raise ValueError(f"{word} is a learned word already" + (f", as {taken}" if taken != word else ""))
            if len(vectors) > LONGEST:
                raise ValueError(f"{word} has {len(vectors)} vectors, over {LONGEST}")
            new[word] = Word(vectors, path)
        self.words |= new

    def forget(self, words: Iterable[str]) -> None:
        for word in list(words):
            del self.words[word]

    def vectors(self) -> Tensor:
        """Of all words, [n, C]: the ids from vocab_size on, in order."""
        return torch.cat([one.vectors for one in self.words.values()])

    def used(self, ids: Tensor) -> Tensor | None:
        """The vectors, if one of the ids is of a learned word."""
        return self.vectors().to(ids.device) if self.words and (ids >= self.vocab_size).any() else None

    def groups(self, text: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
        """The ids of a text, one by one; in the place of a learned word the ids of its vectors, together."""
        ids, number = {}, self.vocab_size
        for word, one in self.words.items():
            ids[_key(word)] = list(range(number, number + len(one.vectors)))
            number += len(one.vectors)
        for part in self._pattern().split(text):
            group = ids.get(_key(part))
            yield from [group] if group else ([token] for token in tokenizer.encode(part)[1:-1])

    def _pattern(self) -> re.Pattern:
        """Any of the words, in a group, so that splitting keeps it."""
        longest_first = sorted(self.words, key=lambda word: -len(word))
        return re.compile("(" + "|".join(map(_spelled, longest_first)) + ")", re.IGNORECASE)


def _key(word: str) -> str:
    return " ".join(word.lower().split())


def _spelled(word: str) -> str:
    """A pattern that finds a word where it stands alone: no letter or digit goes on from its ends."""
    spelled = r"\s+".join(map(re.escape, word.split()))
    before, after = (
        (r"(?<![^\W_])" if word.strip()[0].isalnum() else ""),
        (r"(?![^\W_])" if word.strip()[-1].isalnum() else ""),
    )
    return before + spelled + after
