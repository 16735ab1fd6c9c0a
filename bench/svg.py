"""Drawings as SVG, by hand: the same input gives the same bytes, and no library is needed.

A drawing has a white ground, so that it can be read on light and on dark pages.
"""

import base64
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

INK, SOFT, LINE, PALE = "#24292f", "#57606a", "#d0d7de", "#f6f8fa"
BLUE, ORANGE, GREEN, RED, GREY = "#0969da", "#bc4c00", "#1a7f37", "#cf222e", "#8c959f"
LIGHT_BLUE, LIGHT_ORANGE, LIGHT_GREEN, LIGHT_RED = "#ddf4ff", "#fff1e5", "#dafbe1", "#ffebe9"
FONT = "ui-sans-serif, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"
WIDE = frozenset("mwMW@%")
NARROW = frozenset("iljtfrI.,:;'|()[] ")


def width_of(text: str, size: float = 13) -> float:
    """About how many pixels a line takes: which font shows it, nobody here knows, so that this is on the wide side."""
    return size * sum(0.92 if c in WIDE else 0.36 if c in NARROW else 0.63 for c in text)


def number(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Drawing:
    """Shapes over a white ground of width x height pixels, in their order. title: read aloud by screen readers."""

    width: float
    height: float
    title: str
    shapes: list[str] = field(default_factory=list)

    def shape(self, name: str, content: str = "", **attributes: object) -> None:
        """Attributes by their names, _ for -; numbers as coordinates."""
        words = [
            f"{key.replace('_', '-')}={quoteattr(number(value) if isinstance(value, int | float) else str(value))}"
            for key, value in attributes.items()
        ]
        start = " ".join((f"<{name}", *words))
        self.shapes.append(f"{start}>{content}</{name}>" if content else f"{start}/>")

    def box(self, x: float, y: float, width: float, height: float, **style: object) -> None:
        self.shape("rect", x=x, y=y, width=width, height=height, **style)

    def line(self, *points: tuple[float, float], color: str = SOFT, width: float = 1.5, **style: object) -> None:
        path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.shape("polyline", points=path, fill="none", stroke=color, stroke_width=width, **style)

    def arrow(self, x: float, y: float, to: float, color: str = SOFT) -> None:
        """From left to right."""
        self.line((x, y), (to - 5, y), color=color)
        self.shape(
            "polygon",
            points=f"{number(to)},{number(y)} {number(to - 7)},{number(y - 4)} {number(to - 7)},{number(y + 4)}",
            fill=color,
        )

    def text(self, x: float, y: float, text: str, size: float = 13, color: str = INK, **style: object) -> None:
        """y is the line that the letters stand on."""
        self.shape("text", escape(text), x=x, y=y, font_size=size, fill=color, **style)

    def picture(self, x: float, y: float, width: float, height: float, webp: bytes) -> None:
        data = "data:image/webp;base64," + base64.b64encode(webp).decode("ascii")
        self.shape("image", x=x, y=y, width=width, height=height, href=data)

    def __str__(self) -> str:
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {number(self.width)} {number(self.height)}"'
        )
        ground = f'<rect {size} rx="6" fill="#ffffff"/>'
        lines = (f'{head} role="img" font-family="{FONT}">', f"<title>{escape(self.title)}</title>", ground)
        return "\n".join((*lines, *self.shapes, "</svg>", ""))
