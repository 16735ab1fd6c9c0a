"""`--control FILE:PICTURE[:WEIGHT[:START-END]]`: read, checked, drawn with, recorded, and found again.

torch is imported by what needs it, when it is called.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sd import hints
from sd.pictures.parameters import UserError
from sd.pictures.plan import Job
from sd.pictures.provenance import file_again, fingerprint

if TYPE_CHECKING:
    from sd.controlnet import Control
    from sd.pipeline import StableDiffusion

OPTION = "--control"
_NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"
_NUMBERS = re.compile(rf"(?P<files>.+?:.+?)(?::(?P<weight>{_NUMBER})(?::(?P<start>{_NUMBER})-(?P<end>{_NUMBER}))?)?")


@dataclass(frozen=True)
class Named:
    """A ControlNet's file and the picture that it sees, how much that counts, and in which fractions of the steps."""

    net: Path
    picture: Path
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def text(self) -> str:
        return f"{self.net}:{self.picture}:{self.weight:g}:{self.start:g}-{self.end:g}"


def read_control(text: str) -> Named:
    """What one --control says. Where names have colons, the files that are there decide. Raises ValueError."""
    match = _NUMBERS.fullmatch(text)
    if match is None:
        raise ValueError(f"control must be FILE:PICTURE, FILE:PICTURE:WEIGHT or FILE:PICTURE:WEIGHT:START-END: {text}")
    numbers = {name: float(match[name]) for name in ("weight", "start", "end") if match[name]}
    weight, start, end = (numbers.get(name, 1.0 if name != "start" else 0.0) for name in ("weight", "start", "end"))
    if not -1000 <= weight <= 1000:
        raise ValueError(f"a control's weight must be from -1000 to 1000, not {weight:g}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"a control acts between two fractions of the steps, as 0-0.5, not {start:g}-{end:g}")
    parts = match["files"].split(":")
    splits = [(Path(":".join(parts[:i])), Path(":".join(parts[i:]))) for i in range(1, len(parts))]
    files = next((pair for pair in splits if pair[0].is_file() and pair[1].is_file()), splits[0])
    return Named(*files, weight, start, end)


def check_controls(jobs: Iterable[Job]) -> None:
    """That their files are there, the pictures can be read, and what makes hints is installed. Raises UserError."""
    from sd.images import check_readable

    for control, preprocess, where in dict.fromkeys((j.control, j.control_preprocess, j.where) for j in jobs):
        try:
            for one in map(read_control, control or ()):
                if not one.net.is_file():
                    raise ValueError(f"there is no file {one.net}")
                check_readable(one.picture)
            hints.check_installed((preprocess or ()) if control else ())
        except ValueError as error:
            raise UserError(f"{where or OPTION}: {error}") from None


def load_controls(pipe: "StableDiffusion", jobs: Iterable[Job]) -> None:
    """Add the ControlNets of all of them, before the first picture is drawn. Raises CheckpointError."""
    for file in dict.fromkeys(read_control(text).net for job in jobs for text in job.control or ()):
        pipe.add_control(file)


def controls_of(pipe: "StableDiffusion", texts: Sequence[str]) -> "list[Control]":
    """As `generate` takes them. Raises CheckpointError, or ValueError for a picture that cannot be read."""
    from sd.controlnet import Control
    from sd.images import read_rgb

    named = map(read_control, texts)
    return [Control(pipe.add_control(n.net), read_rgb(n.picture), n.weight, n.start, n.end) for n in named]


def recorded_controls(texts: Sequence[str]) -> dict[str, object]:
    """What a picture's file says of them beside the parameter: both fingerprints of each."""
    return {"control_hash": [[fingerprint(n.net), fingerprint(n.picture)] for n in map(read_control, texts)]}


def controls_again(texts: Sequence[str], said: Mapping[str, object], folder: Path) -> tuple[str, ...]:
    """Those that a picture was drawn with, found by their bytes as `file_again` finds them. Raises ProvenanceError."""
    digests = said.get("control_hash")
    found = []
    for i, named in enumerate(map(read_control, texts)):
        pair = digests[i] if isinstance(digests, list) and i < len(digests) else None
        net, picture = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        net = file_again(OPTION, str(named.net), net, folder)
        picture = file_again(OPTION, str(named.picture), picture, folder)
        found.append(replace(named, net=Path(net), picture=Path(picture)).text())
    return tuple(found)
