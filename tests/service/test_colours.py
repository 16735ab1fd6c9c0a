"""The page's colours by WCAG 2's formula: of a label with its field in it, axe-core cannot judge the contrast."""

import re

import pytest

from sd.service.form import FOLDER

TEXTS = [
    *((text, paper) for text in ("ink", "quiet", "accent") for paper in ("card", "paper")),
    ("on-accent", "accent"),
    ("error", "error-paper"),
]
SHAPES = [("field", "card"), ("accent", "card"), ("accent", "paper")]
"""Borders of fields, and what shows where the keyboard is."""


def schemes() -> dict[str, dict[str, str]]:
    """The colours of each scheme by name; the dark one stands behind its media query."""
    blocks = re.findall(r":root \{(.*?)\}", (FOLDER / "page.css").read_text(), re.DOTALL)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", block)) for block in blocks]
    return dict(zip(("light", "dark"), found, strict=True))


def luminance(colour: str) -> float:
    """Of `#rgb` or `#rrggbb`, 0 for black and 1 for white (WCAG 2.2, relative luminance)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_the_formula():
    assert contrast("#fff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.01), "a little too faint"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_shapes_can_be_seen(scheme):
    colours = schemes()[scheme]
    faint = {pair: contrast(*(colours[name] for name in pair)) for pair in (*TEXTS, *SHAPES)}
    assert [pair for pair in TEXTS if faint[pair] < 4.5] == []
    assert [pair for pair in SHAPES if faint[pair] < 3] == []
