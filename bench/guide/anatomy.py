"""Drawings of what the model is: its text, its UNet, its numbers."""

from bench.guide import work
from bench.svg import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT_BLUE,
    LIGHT_GREEN,
    LIGHT_ORANGE,
    ORANGE,
    PALE,
    SOFT,
    Drawing,
    width_of,
)
from sd.config import SD15
from sd.tokenizer import Tokenizer

PROMPT = "a blue fox on a yellow background"


def text() -> Drawing:
    """A prompt, its tokens and what becomes of them."""
    drawing = Drawing(860, 168, "A prompt becomes 77 tokens, and those 77 rows of 768 numbers")
    ids = Tokenizer().encode(PROMPT)
    words = ["start", *PROMPT.split(), "end", f"end, {77 - len(ids)} times more"]
    drawing.text(16, 28, f'"{PROMPT}"', 14, font_weight="bold")
    x = 16.0
    for word, number in zip(words, [*ids, ids[-1]], strict=True):
        width = max(width_of(word, 12), width_of(str(number), 12)) + 18
        drawing.box(x, 46, width, 26, rx=4, fill=PALE, stroke=GREY)
        drawing.text(x + width / 2, 63, word, 12, text_anchor="middle")
        drawing.text(x + width / 2, 90, str(number), 12, SOFT, text_anchor="middle")
        drawing.line((x + width / 2, 96), (x + width / 2, 116), color=SOFT)
        x += width + 8
    drawing.box(16, 116, x - 24, 34, rx=4, fill=LIGHT_BLUE, stroke=BLUE)
    drawing.text(28, 138, "the text encoder, 12 layers: each token looks at those before it; out come [77, 768]", 12)
    return drawing


def unet() -> Drawing:
    """The way down, the middle and the way up: grid, channels and work of each level."""
    config = SD15.unet
    gflop: dict[str, float] = {}
    for call in work.step_calls():
        gflop[call.grid] = gflop.get(call.grid, 0.0) + call.flops / 2e9
    drawing = Drawing(860, 312, "The UNet: four grids, down and up again, with the text at three of them")
    drawing.text(16, 26, drawing.title, 14, font_weight="bold")
    for level, mult in enumerate(config.channel_mult):
        side, channels = 64 >> level, config.model_channels * mult
        _level(drawing, level, f"{side} x {side}, {channels} channels", level in config.attention_levels)
        drawing.text(430, 44 + 56 * level + 36, f"{gflop[f'{side}x{side}']:.0f} GFLOP", 11, SOFT, text_anchor="middle")
    drawing.box(340, 272, 180, 30, rx=4, fill=LIGHT_ORANGE, stroke=ORANGE)
    drawing.text(430, 291, "middle: 8 x 8, text", 12, text_anchor="middle")
    drawing.line((214, 252), (214, 287), (340, 287), color=SOFT)
    drawing.line((520, 287), (646, 287), (646, 252), color=SOFT)
    return drawing


def _level(drawing: Drawing, level: int, label: str, text_here: bool) -> None:
    y, inset = 44 + 56 * level, 14 * level
    fill, edge = (LIGHT_ORANGE, ORANGE) if text_here else (PALE, GREY)
    blocks = "residual blocks, transformers with text" if text_here else "residual blocks"
    for x, count in ((16 + inset, 2), (844 - 310 - inset, 3)):
        drawing.box(x, y, 310, 40, rx=4, fill=fill, stroke=edge)
        drawing.text(x + 155, y + 17, label, 12, text_anchor="middle", font_weight="bold")
        drawing.text(x + 155, y + 33, f"{count} {blocks}", 11, SOFT, text_anchor="middle")
    drawing.arrow(330 + inset, y + 20, 530 - inset, GREEN)
    drawing.text(430, y + 14, "skip connections", 11, GREEN, text_anchor="middle")


def bits() -> Drawing:
    """How each type spends its bits."""
    types = (("fp32", 8, 23), ("fp16", 5, 10), ("bf16", 8, 7), ("float8 e4m3", 4, 3), ("int8", 0, 7))
    drawing = Drawing(860, 44 + 34 * len(types), "Sign, exponent (how large) and fraction (how exact)")
    drawing.text(16, 24, drawing.title, 14, font_weight="bold")
    for row, (name, exponent, fraction) in enumerate(types):
        y, x = 40 + 34 * row, 120
        drawing.text(16, y + 17, name, 12)
        for kind, count in enumerate((1, exponent, fraction)):
            fill, edge = ((PALE, GREY), (LIGHT_ORANGE, ORANGE), (LIGHT_GREEN, GREEN))[kind]
            for _ in range(count):
                drawing.box(x, y, 16, 24, fill=fill, stroke=edge)
                x += 18
        drawing.text(x + 8, y + 17, _range(name), 11, INK)
    return drawing


def _range(name: str) -> str:
    told = {
        "fp32": "",
        "fp16": "up to 65504; neighbours 0.1% apart",
        "bf16": "up to 3e38; neighbours 0.8% apart",
        "float8 e4m3": "up to 448; neighbours 12% apart",
        "int8": "255 even steps; a scale beside it says how wide",
    }
    return told[name]
