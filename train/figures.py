"""Pictures of a run: contact sheets of samples, reconstructions, and the loss curve."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from train.state import write_atomically

# The same list for every run, nothing picked by hand: two rows of plain concepts, one of combinations that training
# sees, and one of combinations that train/captions.py holds out.
SAMPLE_PROMPTS = (
    "a red apple",
    "a cat",
    "a dog",
    "a fox",
    "a house",
    "a car",
    "a rocket",
    "a tree",
    "a rose",
    "a guitar",
    "a pizza",
    "a smiley",
    "a blue fox on a yellow background",
    "a green cat on a pink background",
    "a purple elephant",
    "a green bird",
    "a red circle left of a green square",
    "a cat left of a dog",
    "a pink fox",
    "a blue cat on a yellow background",
    "a yellow rose",
    "a dog on a green background",
    "a blue triangle above a yellow circle",
    "a bird above a tree",
)


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int) -> Image.Image:
    """Pictures of one size in rows, each with its caption under it, cut to what fits."""
    font = ImageFont.load_default(10)
    width, height = pictures[0].size
    cell, line = (width + 4, height + 18), 14
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * cell[0], i // columns * cell[1]
        sheet.paste(picture, (x + 2, y + 2))
        draw.text((x + 2, y + height + 18 - line), fit(caption, font, width), fill="black", font=font)
    return sheet


def fit(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, cut so that it is at most `width` pixels wide."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def save_picture(picture: Image.Image, path: Path) -> None:
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def loss_curve(losses: dict[str, Sequence[tuple[int, float, float]]], path: Path) -> None:
    """One panel for each stage: (step, seconds, loss) against the step, with a running mean."""
    figure = Figure(figsize=(5 * len(losses), 3.5), layout="constrained")
    panels = figure.subplots(1, len(losses), squeeze=False)[0]
    for panel, (name, entries) in zip(panels, losses.items(), strict=True):
        steps, values = [e[0] for e in entries], [e[2] for e in entries]
        panel.plot(steps, values, color="0.8", linewidth=0.8)
        panel.plot(steps, running_mean(values), color="C0")
        panel.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))


def running_mean(values: Sequence[float], weight: float = 0.95) -> list[float]:
    """Exponential mean that starts at the first value."""
    means: list[float] = []
    for value in values:
        means.append(weight * means[-1] + (1 - weight) * value if means else value)
    return means
