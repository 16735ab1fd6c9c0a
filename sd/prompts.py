"""Prompts: which words count how much, and how more of them than the text encoder reads become one context.

    plain     a prompt is its text; what the encoder cannot read is cut off, and told
    weights   (text:1.3) counts 1.3 times, BREAK begins a new chunk, and a long prompt is read in chunks
    a1111     beside these (text) counts 1.1 times, [text] 1 / 1.1, nested ones multiply; <lora:name:0.8> is no text

A backslash makes a bracket a character: \\( \\) \\[ \\]. Weights are those of AUTOMATIC1111's web UI: the context of a
token is multiplied by its weight, then all of its chunk's by one factor, so that its mean is what it was, unless it is
next to nothing, as that of the demo model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd.nearest import there_are

if TYPE_CHECKING:
    from torch import Tensor

    from sd.embeddings import Words
    from sd.tokenizer import Tokenizer

SYNTAXES = ("weights", "a1111", "plain")
COMMA_WITHIN = 20  # a chunk ends at a comma, if one is among its last so many tokens, and what comes next is none
LARGEST = 10.0
STEP = 1.1

Piece = tuple[str, float]
"""Text, and how much it counts."""

BREAK = ("BREAK", -1.0)
"""What stands between pieces for the end of a chunk."""

# ---- text to pieces


def parse(text: str, syntax: str = "weights") -> list[Piece]:
    """The pieces of a prompt, with BREAK between those of different chunks; neighbours of one weight are one piece.

    Raises ValueError for a syntax that is none, brackets without their other half where that means something, and
    weights that are no number from -10 to 10.
    """
    if syntax not in SYNTAXES:
        raise ValueError(f"no prompt syntax {syntax!r}{there_are(syntax, SYNTAXES)}")
    if syntax == "plain":
        return [(text, 1.0)]
    pieces = _a1111(_LORA.sub("", text)) if syntax == "a1111" else _weights(text)
    return list(_joined(piece for whole in pieces for piece in _broken(*whole)))


_LORA = re.compile(r"<lora:([^:<>]+)(?::([^:<>]*))?>")


def loras(text: str, syntax: str | None) -> list[tuple[str, float]]:
    """The LoRAs that a prompt names in the a1111 syntax, `<lora:name:0.8>`, and their strengths. Raises ValueError."""
    found = []
    for name, number in _LORA.findall(text) if syntax == "a1111" else ():
        if number and not _NUMBER.fullmatch(number.strip()):
            raise ValueError(f"the strength of the LoRA {_shown(name)} in a prompt must be a number, not {number!r}")
        found.append((name.strip(), _checked(float(number)) if number else 1.0))
    return found


_WEIGHTED = re.compile(r"(?<!\\)\(((?:\\.|[^()\\])*?):\s*([^():\s]+)\s*\)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def _weights(text: str) -> Iterator[Piece]:
    """`(text:number)` alone; any other bracket is a character."""
    end = 0
    for match in _WEIGHTED.finditer(text):
        if not _NUMBER.fullmatch(match[2]):
            continue
        yield _unescaped(text[end : match.start()]), 1.0
        yield _unescaped(match[1]), _weight(match[2])
        end = match.end()
    yield _unescaped(text[end:]), 1.0


_TOKEN = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|\\|:")


def _a1111(text: str) -> list[Piece]:
    """A stack of open brackets; what closes one multiplies all pieces since."""
    pieces: list[Piece] = []
    opened: list[tuple[str, int]] = []

    def close(bracket: str, factor: float) -> None:
        if not opened or opened[-1][0] != bracket:
            raise ValueError(
                f"a bracket is closed that is not open in the prompt {_shown(text)}; write \\{_OTHER[bracket]}"
            )
        _, start = opened.pop()
        pieces[start:] = [(words, weight * factor) for words, weight in pieces[start:]]

    for token in _TOKEN.findall(text):
        if token in ("(", "["):
            opened.append((token, len(pieces)))
        elif token == ")":
            close("(", STEP)
        elif token == "]":
            close("[", 1 / STEP)
        elif token[0] == ":" and token[-1] == ")" and opened and opened[-1][0] == "(":
            close("(", _weight(token[1:-1].strip()))
        else:
            pieces.append((token[1:] if token[0] == "\\" and len(token) == 2 else token, 1.0))
    if opened:
        raise ValueError(
            f"the bracket {opened[-1][0]} is not closed in the prompt {_shown(text)}; write \\{opened[-1][0]}"
        )
    return [(words, _checked(weight)) for words, weight in pieces]


_OTHER = {"(": ")", "[": "]"}


def _unescaped(text: str) -> str:
    return re.sub(r"\\([()\[\]])", r"\1", text)


def _weight(text: str) -> float:
    return _checked(float(text))


def _checked(weight: float) -> float:
    if not (math.isfinite(weight) and abs(weight) <= LARGEST):
        raise ValueError(f"a weight in a prompt must be from -{LARGEST:g} to {LARGEST:g}, not {weight:g}")
    return weight


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _broken(text: str, weight: float) -> Iterator[Piece]:
    """A piece in parts, with BREAK between them, where the word stands alone in capitals."""
    for i, part in enumerate(re.split(r"\s*\bBREAK\b\s*", text)):
        if i:
            yield BREAK
        yield part, weight


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    last: Piece | None = None
    for piece in pieces:
        if not piece[0]:
            continue
        if last is not None and piece is not BREAK and last is not BREAK and piece[1] == last[1]:
            last = last[0] + piece[0], last[1]
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


# ---- pieces to tokens


@dataclass(frozen=True)
class Tokens:
    """A prompt as the encoder reads it: ids and weights of each chunk, its start and ends among them."""

    ids: list[list[int]]
    weights: list[list[float]]

    @property
    def weighted(self) -> bool:
        return any(weight != 1.0 for row in self.weights for weight in row)


def tokenize(
    text: str, tokenizer: Tokenizer, syntax: str = "weights", length: int = 77, words: Words | None = None
) -> Tokens:
    """In chunks of `length`: 75 tokens between start and end, padded with ends. Raises ValueError as `parse` does.

    words: learned ones, whose vectors stay in one chunk. In the plain syntax there is one, and what is over is told.
    """
    most = length - 2
    comma = tokenizer.encode(",")[1]
    chunks: list[list[tuple[int, float]]] = [[]]
    for piece in parse(text, syntax):
        if piece is BREAK:
            chunks.append([])
            continue
        spelled, weight = piece
        groups = words.groups(spelled, tokenizer) if words else ([id] for id in tokenizer.encode(spelled)[1:-1])
        for group in groups:
            if len(chunks[-1]) + len(group) > most:
                carried = [] if group == [comma] else _carried(chunks[-1], comma, most - len(group))
                chunks.append(carried)
            chunks[-1] += [(token, weight) for token in group]
    start, end, pad = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
    ids = [[start, *(token for token, _ in chunk), end, *[pad] * (most - len(chunk))] for chunk in chunks]
    weights = [[1.0, *(weight for _, weight in chunk), *[1.0] * (most + 1 - len(chunk))] for chunk in chunks]
    return Tokens(ids, weights)


def cut(text: str, tokenizer: Tokenizer, length: int, words: Words) -> list[int]:
    """The plain syntax with learned words: one chunk, and what is over is told."""
    ids = (token for group in words.groups(text, tokenizer) for token in group)
    return tokenizer.fit([tokenizer.start_id, *ids, tokenizer.end_id], length)


def _carried(full: list[tuple[int, float]], comma: int, room: int) -> list[tuple[int, float]]:
    """What of a full chunk belongs to the next: the words after its last comma, where that is near its end.

    Nothing, where they are more than `room`: what comes after them must fit too.
    """
    places = [i for i, (token, _) in enumerate(full) if token == comma]
    count = len(full) - places[-1] - 1 if places else 0
    if not places or count >= COMMA_WITHIN or count > room:
        return []
    carried = full[places[-1] + 1 :]
    del full[places[-1] + 1 :]
    return carried


def padded(prompts: Sequence[Tokens], tokenizer: Tokenizer) -> list[Tokens]:
    """All with as many chunks as the longest: empty ones at the end."""
    most, length = max(len(one.ids) for one in prompts), len(prompts[0].ids[0])
    empty = [tokenizer.start_id, tokenizer.end_id, *[tokenizer.pad_id] * (length - 2)]
    missing = [most - len(one.ids) for one in prompts]
    return [
        Tokens(one.ids + [empty] * count, one.weights + [[1.0] * length] * count)
        for one, count in zip(prompts, missing, strict=True)
    ]


NO_MEAN = 0.02
"""Of the deviation. SD 1.5's contexts have a mean of a tenth of it; a mean of nothing cannot be given back."""


def weighted(context: Tensor, weights: Tensor) -> Tensor:
    """A chunk's context [S, C] times weights [S], then times what gives it the mean it had, if it had one."""
    scaled = context * weights[:, None].to(context)
    before, after = context.float().mean(), scaled.float().mean()
    if min(abs(before), abs(after)) < NO_MEAN * context.float().std():
        return scaled
    return scaled * (before / after).to(context)
