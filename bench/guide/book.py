"""All pages and drawings of the guide: by their names below docs/guide, what they hold."""

from pathlib import Path

from bench.guide import chapters, front, optimization_page, pictures, work
from sd.optimizations.registry import catalog

PRESETS = ("exact", "fast")
"""Of which there are pictures and pages too."""


def pages(drawn_in: Path) -> dict[str, str]:
    """drawn_in: the folder of the pictures that were drawn before."""
    drawn = pictures.read(drawn_in)
    names = list(catalog())
    pipe = work.plain()
    found = front.pages(drawn_in)
    for i, name in enumerate(names):
        around = (names[i - 1] if i else "", names[i + 1] if i + 1 < len(names) else "")
        chapter = chapters.read(name)
        text, drawing = optimization_page.page(catalog()[name], chapter, pipe, drawn, around)
        found[f"opts/{name}.md"] = text
        found[f"drawings/{name}.svg"] = drawing
    return found
