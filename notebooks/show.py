"""Pictures beside each other, and plots of one size, for the notebooks."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from PIL import Image, ImageDraw, ImageFont

WIDTH = 512  # pixels that a picture in a notebook has at most
DPI = 80
TITLE = 16


def grid(images: Sequence[Image.Image], titles: Sequence[object] = (), columns: int = 4) -> Image.Image:
    """Pictures in rows of `columns`, each with its title above it; larger ones than fit are made smaller."""
    columns = min(columns, len(images))
    side = min(WIDTH // columns, max(image.width for image in images))
    above = TITLE if titles else 0
    cells = [image.convert("RGB").resize((side, round(side * image.height / image.width))) for image in images]
    height = max(cell.height for cell in cells) + above
    whole = Image.new("RGB", (columns * side, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(whole)
    for i, cell in enumerate(cells):
        left, top = i % columns * side, i // columns * height
        whole.paste(cell, (left, top + above))
        if i < len(titles):
            draw.text((left + 3, top + 1), str(titles[i]), fill="black", font=ImageFont.load_default(size=11))
    return whole


def enlarged(image: Image.Image, times: int) -> Image.Image:
    """Each pixel as a square."""
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def axes(title: str = "", x: str = "", y: str = "", height: float = 2.6, columns: int = 1) -> Axes:
    """Of a plot as wide as the pictures; height in inches of 80 pixels. columns: an array of so many of them."""
    _, found = plt.subplots(1, columns, figsize=(6.2, height), dpi=DPI, layout="constrained")
    for one in [found] if columns == 1 else found:
        one.set(title=title, xlabel=x, ylabel=y)
        one.spines[["top", "right"]].set_visible(False)
    return found
