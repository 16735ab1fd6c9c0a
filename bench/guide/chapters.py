"""What a person wrote of each optimization: chapters/NAME.md.

counted: 3                     the value with which its work is counted on the meta device, if it leaves any out
touches: conv3x3, GEGLU@64x64  the kinds of calls, and grids, in bench/roofline.py's names, which it makes faster

One sentence: what it is.

## Way        the data's way, in bench/guide/ways.py's language
## Roofline   what to expect, and why
## Hurts      more than the docstring says; may be missing
## Paper
## Exercise
## Answer
"""

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("chapters")
NEEDED = ("Way", "Roofline", "Paper", "Exercise", "Answer")
KNOWN = (*NEEDED, "Hurts")


@dataclass(frozen=True)
class Chapter:
    """sentence: what it is. sections: Markdown by heading. fields: what stands above it."""

    sentence: str
    sections: dict[str, str]
    fields: dict[str, str]

    @property
    def touches(self) -> list[str]:
        return [word.strip() for word in self.fields.get("touches", "").split(",") if word.strip()]


def read(name: str, folder: Path = FOLDER) -> Chapter:
    """Raises FileNotFoundError without a chapter, ValueError for one that lacks a section or has an unknown one."""
    head, *parts = re.split(r"^## (.+)\n", (folder / f"{name}.md").read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))
    if wrong := [*(set(NEEDED) - sections.keys()), *(sections.keys() - set(KNOWN))]:
        raise ValueError(f"{name}.md: sections missing or unknown: {', '.join(sorted(wrong))}")
    fields = dict(re.findall(r"^(counted|touches): (.+)$", head, re.MULTILINE))
    sentence = re.sub(r"^(counted|touches): .+$", "", head, flags=re.MULTILINE).strip()
    return Chapter(" ".join(sentence.split()), sections, fields)
