"""What a person may see while a picture forms: in the terminal, in a file, and afterwards as an animation."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sd.pictures import terminal
from sd.pictures.files import free_name
from sd.pictures.parameters import UserError
from sd.writing import written_whole

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from sd.pipeline import StableDiffusion

ANIMATIONS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG"}
SMALL = 256
"""Pixels of a preview's longer side, in files and animations."""

SHOWN = 1000
"""Number of the first whole picture in a terminal, beyond those of previews."""

MILLISECONDS, LAST = 120, 1500
"""How long a frame of an animation stands, and the last one."""


@dataclass(frozen=True)
class Watching:
    """What is asked for. every: steps between two previews, None for none. decoder: TAESD's file in place of a map.

    file: is written anew with each preview. animation: gets all steps of each picture. show: in the terminal when it is
    drawn.
    """

    every: int | None = None
    file: Path | None = None
    animation: Path | None = None
    decoder: Path | None = None
    show: bool = False

    @property
    def anything(self) -> bool:
        return bool(self.every or self.animation)

    def check(self) -> None:
        """Raise UserError for what is wrong without drawing anything."""
        if self.every is not None and self.every < 1:
            raise UserError(f"--preview must be at least 1, not {self.every}")
        if self.file and not self.every:
            raise UserError("--preview-file is written by previews: say how often with --preview")
        if self.decoder and not self.anything:
            raise UserError("--preview-decoder makes previews: ask for them with --preview or --save-steps")
        for option, path in (("--preview-file", self.file), ("--save-steps", self.animation)):
            allowed = (*ANIMATIONS, ".jpg", ".jpeg") if path is self.file else tuple(ANIMATIONS)
            if path and path.suffix.lower() not in allowed:
                raise UserError(f"{option}: {path} must end in one of {', '.join(allowed)}")


class Watcher:
    """Sees every step. note(text): writes to the terminal, clear of bars; show: of which kind, None for no terminal."""

    def __init__(self, pipe: "StableDiffusion", asked: Watching, note: Callable[[str], None], kind: str | None):
        from sd.previews import Previews, linear, tiny_decoder

        self.asked, self.note, self.kind = asked, note, kind
        colours = tiny_decoder(asked.decoder, pipe.device) if asked.decoder else linear(pipe)
        self.previews = Previews(pipe, colours)
        self.rows = 0
        self.frames: list[list[Image.Image]] = []

    def step(self, step: int, steps: int, latents: "Tensor") -> None:
        """The callback for `generate`."""
        if step == 1:
            self.rows = 0
        due = self.asked.every and (step % self.asked.every == 0 or step == steps)
        if not (due or self.asked.animation):
            return
        images = self.previews(latents)
        if self.asked.animation:
            self.frames.append(images)
        if due:
            self._show(images)

    def _show(self, images: "Sequence[Image.Image]") -> None:
        from sd.previews import side_by_side

        image = side_by_side(list(images))
        if self.kind:
            columns = terminal.COLUMNS * min(2, len(images))
            text, rows = terminal.shown(image, self.kind, columns, _colours())
            self.note((terminal.again(self.rows) if self.rows else "") + text)
            self.rows = rows
        if self.asked.file:
            _save(_enlarged(image), self.asked.file)

    def finished(self, images: "Sequence[Image.Image]") -> list[str]:
        """The pictures of the batch are drawn: write their animations. Returns the names of the files."""
        frames, self.frames, self.rows = self.frames, [], 0
        if not self.asked.animation:
            return []
        return [_animated([step[i] for step in frames], image, self.asked.animation) for i, image in enumerate(images)]


def show(images: "Sequence[Image.Image]", first: int, stream: TextIO, write: Callable[[str], None]) -> None:
    """Pictures that are drawn, in the terminal that the stream is, if it is one. first: their number among all."""
    if kind := terminal_of(stream):
        for number, image in enumerate(images, start=first):
            # Numbers of previews are small.
            text, _ = terminal.shown(image, kind, colours=_colours(), number=SHOWN + number)
            write(text)


def _colours() -> int:
    return 2**24 if os.environ.get("COLORTERM") in ("truecolor", "24bit") else 256


def _enlarged(image: "Image.Image") -> "Image.Image":
    scale = max(1, SMALL // max(image.size))
    return image.resize((image.width * scale, image.height * scale))


def _save(image: "Image.Image", path: Path, **options: object) -> None:
    kind = {**ANIMATIONS, ".jpg": "JPEG", ".jpeg": "JPEG"}[path.suffix.lower()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        image.save(part, format=kind, **options)


def _animated(frames: "Sequence[Image.Image]", last: "Image.Image", path: Path) -> str:
    """All steps, then the picture itself, at one size; in a file that is not there yet."""
    path = free_name(path)
    width, height = last.size
    scale = min(1, SMALL / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    first, *rest = [frame.resize(size) for frame in (*frames, last)]
    durations = [MILLISECONDS] * len(rest) + [LAST]
    _save(first, path, save_all=True, append_images=rest, duration=durations, loop=0)
    return os.fspath(path)


def terminal_of(stream: TextIO) -> str | None:
    """The kind of pictures that a stream shows; None if it is no terminal."""
    return terminal.kind_of(os.environ) if stream.isatty() else None
