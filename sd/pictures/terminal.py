"""Pictures in a terminal: by the protocols of kitty, iTerm2 and sixel, or as coloured half blocks anywhere else.

Which one a terminal has is told by its environment: to ask it would be to wait for its answer. $SD_PREVIEW names one.
"""

import base64
import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

ESCAPE = "\x1b"
COLUMNS = 32
"""Of text that a picture is wide; a row is about two columns high."""

SAVE, RESTORE = ESCAPE + "7", ESCAPE + "8"
"""The place of the cursor (DECSC and DECRC)."""

Draw = Callable[["Image.Image", int, int, int], str]
"""draw(picture, columns, rows, number) -> what to write; a terminal may replace what it shows by that number."""


def kind_of(environ: Mapping[str, str]) -> str:
    """kitty, iterm2, sixel or blocks."""
    if environ.get("SD_PREVIEW") in (*KINDS, "blocks"):
        return environ["SD_PREVIEW"]
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if environ.get("TMUX") or term.startswith("screen"):  # which passes no pictures through unasked
        return "blocks"
    if "kitty" in term or environ.get("KITTY_WINDOW_ID") or program == "ghostty" or "ghostty" in term:
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty", "vscode") or environ.get("LC_TERMINAL") == "iTerm2":
        return "iterm2" if program != "vscode" else "blocks"
    return "sixel" if "sixel" in term or term.startswith(("foot", "mlterm", "contour")) else "blocks"


def shown(
    image: "Image.Image", kind: str, columns: int = COLUMNS, colours: int = 2**24, number: int = 1
) -> tuple[str, int]:
    """What to write, and how many rows it takes. colours: 256 for terminals without more. number: that of another
    picture that is to stay where it is is another."""
    rows = max(1, round(columns * image.height / image.width / 2))
    if kind == "blocks":
        return _blocks(image, columns, rows, colours), rows
    # Room first, in case it scrolls; and terminals disagree about where a picture leaves the cursor.
    return "\n" * rows + again(rows) + SAVE + KINDS[kind](image, columns, rows, number) + RESTORE + "\n" * rows, rows


def again(rows: int) -> str:
    """Back to the first column of the row so many rows above."""
    return f"\r{ESCAPE}[{rows}A"


# ---- each kind


def _blocks(image: "Image.Image", columns: int, rows: int, colours: int = 2**24) -> str:
    """Two pixels a character: the upper half block in the colour of one over a background of the other's."""
    pixels = image.convert("RGB").resize((columns, 2 * rows)).load()
    code = _true_colour if colours > 256 else _palette_colour
    lines = []
    for row in range(rows):
        pairs = ((pixels[x, 2 * row], pixels[x, 2 * row + 1]) for x in range(columns))
        line = "".join(f"{ESCAPE}[{code(38, top)};{code(48, bottom)}m▀" for top, bottom in pairs)
        lines.append(f"{line}{ESCAPE}[0m\n")
    return "".join(lines)


def _true_colour(ground: int, rgb: tuple[int, int, int]) -> str:
    return f"{ground};2;{rgb[0]};{rgb[1]};{rgb[2]}"


def _palette_colour(ground: int, rgb: tuple[int, int, int]) -> str:
    """The nearest of the 6x6x6 colours of xterm's palette, which are 0, 95, 135, 175, 215 and 255."""
    red, green, blue = (0 if n < 48 else 1 if n < 115 else (n - 35) // 40 for n in rgb)
    return f"{ground};5;{16 + 36 * red + 6 * green + blue}"


def _png(image: "Image.Image") -> str:
    data = io.BytesIO()
    image.save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def _kitty(image: "Image.Image", columns: int, rows: int, number: int) -> str:
    """sw.kovidgoyal.net/kitty/graphics-protocol: a PNG in pieces of 4096 characters; `m` says that more follow.

    Placement 1 of a picture takes the place of the one before; q=2 keeps the terminal from answering.
    """
    data, size = _png(image), 4096
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    first = f"a=T,f=100,i={number},p=1,q=2,C=1,c={columns},r={rows},"
    written = []
    for number, piece in enumerate(pieces, start=1):
        written.append(f"{ESCAPE}_G{first if number == 1 else ''}m={int(number < len(pieces))};{piece}{ESCAPE}\\")
    return "".join(written)


def _iterm2(image: "Image.Image", columns: int, rows: int, number: int) -> str:
    """iterm2.com/documentation-images.html; width and height are those of characters."""
    how = f"inline=1;width={columns};height={rows};preserveAspectRatio=0"
    return f"{ESCAPE}]1337;File={how}:{_png(image)}\x07"


SIXEL_ROW, SIXEL_COLUMN = 20, 10
"""Pixels of a character: what terminals take for it where they are not asked."""


def _sixel(image: "Image.Image", columns: int, rows: int, number: int) -> str:
    """DEC's sixels: rows of six pixels, colour by colour; a character is 63 and the six bits of a column.

    It is no higher than its rows of text are.
    """
    height = rows * SIXEL_ROW // 6 * 6
    small = image.convert("RGB").resize((columns * SIXEL_COLUMN, height)).quantize(64)
    palette, pixels = small.getpalette(), small.load()
    parts = [f'{ESCAPE}P0;1q"1;1;{small.width};{small.height}']
    for index in sorted({index for _, index in small.getcolors()}):
        red, green, blue = (round(n * 100 / 255) for n in palette[3 * index : 3 * index + 3])
        parts.append(f"#{index};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        parts.append("$".join(_sixel_rows(pixels, small.width, top)) + "-")
    return "".join(parts) + f"{ESCAPE}\\"


def _sixel_rows(pixels, width: int, top: int) -> list[str]:
    """Of six rows, a line for each colour in them, with runs counted."""
    bits: dict[int, list[int]] = {}
    for x in range(width):
        for y in range(6):
            bits.setdefault(pixels[x, top + y], [0] * width)[x] |= 1 << y
    return [f"#{colour}" + _runs(row) for colour, row in bits.items()]


def _runs(row: list[int]) -> str:
    out, start = [], 0
    for x in range(1, len(row) + 1):
        if x == len(row) or row[x] != row[start]:
            count, character = x - start, chr(63 + row[start])
            out.append(f"!{count}{character}" if count > 3 else character * count)
            start = x
    return "".join(out)


KINDS: dict[str, Draw] = {"kitty": _kitty, "iterm2": _iterm2, "sixel": _sixel}
