"""Prompts that change over the steps, in the a1111 syntax.

    [from:to:0.4]   from in the first 0.4 of the steps, then to; [from:to:12] in the first 12
    [to:0.4]        nothing, then to;  [from::0.4]  from, then nothing
    [a|b|c]         a, b, c, a, ... one a step

They may stand in each other, and hold brackets that weigh. Steps are those of the whole schedule: a picture that starts
from another one is drawn by the last of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Part = Callable[[int, int], str]
"""Its text at a step, counted from 0, of so many."""

_TOKEN = re.compile(r"\\.|[()\[\]:|]|[^\\()\[\]:|]+|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*")
MOST_NESTED = 100


def over_steps(text: str, steps: int, syntax: str | None = "a1111") -> list[str]:
    """What a prompt is at each of so many steps: of other syntaxes, and without such brackets, always itself.

    Brackets that are not in pairs are left as they are. Raises ValueError for more than 100 in each other.
    """
    if syntax != "a1111" or "[" not in text:
        return [text] * steps
    reader = _Reader(text)
    part = reader.sequence("")
    return [part(step, steps) for step in range(steps)] if reader.changes else [text] * steps


class _Reader:
    def __init__(self, text: str):
        self.tokens = _TOKEN.findall(text)
        self.place = 0
        self.depth = 0
        self.changes = False

    def sequence(self, until: str) -> Part:
        """What follows, up to a token in `until` or the end."""
        parts: list[Part] = []
        while self.place < len(self.tokens) and self.tokens[self.place] not in (until or ("",)):
            parts.append(self._one())
        return lambda step, steps: "".join(part(step, steps) for part in parts)

    def _one(self) -> Part:
        token = self.tokens[self.place]
        self.place += 1
        if token not in ("[", "("):
            return lambda step, steps: token
        self.depth += 1
        if self.depth > MOST_NESTED:
            raise ValueError(f"over {MOST_NESTED} brackets stand in each other in a prompt")
        part = self._square() if token == "[" else self._round()
        self.depth -= 1
        return part

    def _round(self) -> Part:
        inner = self.sequence(")")
        closed = self._closed(")")
        return lambda step, steps: f"({inner(step, steps)}{closed}"

    def _closed(self, bracket: str) -> str:
        """The bracket, if it comes now."""
        if self.place < len(self.tokens) and self.tokens[self.place] == bracket:
            self.place += 1
            return bracket
        return ""

    def _square(self) -> Part:
        parts, between = [self.sequence(":|]")], []
        while self.place < len(self.tokens) and self.tokens[self.place] in (":", "|"):
            between.append(self.tokens[self.place])
            self.place += 1
            start = self.place
            parts.append(self.sequence(":|]"))
        last = "".join(self.tokens[start : self.place]) if between else ""
        closed = self._closed("]")
        if closed and between and set(between) == {"|"}:
            self.changes = True
            return lambda step, steps: parts[step % len(parts)](step, steps)
        if closed and 1 <= len(between) <= 2 and set(between) == {":"} and _NUMBER.fullmatch(last):
            self.changes = True
            return _changing(parts[:-1], last)
        return _as_written(parts, between, closed)


def _changing(parts: list[Part], when: str) -> Part:
    """The first of two parts, or nothing, up to a step or a share of the steps; then the other."""
    *first, then = parts
    at, is_share = float(when), "." in when

    def text(step: int, steps: int) -> str:
        border = int(min(at * steps if is_share else at, steps))  # a number of 400 digits is infinite
        if step >= border:
            return then(step, steps)
        return first[0](step, steps) if first else ""

    return text


def _as_written(parts: list[Part], between: list[str], closed: str) -> Part:
    def text(step: int, steps: int) -> str:
        words = [part(step, steps) for part in parts]
        return "[" + "".join(w + mark for w, mark in zip(words, [*between, closed], strict=True))

    return text
