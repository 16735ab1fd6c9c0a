"""Drawing what is planned: in batches that fit into memory, each picture written as soon as it is there.

torch is imported by what needs it, when it is called: the command line answers a typing error without it.
"""

import gc
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sd.config import Config
from sd.pictures.controls import controls_of, recorded_controls
from sd.pictures.loras import PromptLoras, named
from sd.pictures.parameters import UserError, recorded
from sd.pictures.plan import Job, Picture, draw_in_batches, groups
from sd.pictures.saving import Save
from sd.pictures.watching import Watcher, Watching, show, terminal_of
from sd.printable import printable

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from sd.pipeline import OnStep, StableDiffusion


def check_sizes(pipe: "StableDiffusion", jobs: Iterable[Job]) -> None:
    side = pipe.config.image_size
    for job in jobs:
        try:
            pipe.config.check_size(job.height or side, job.width or side)
        except ValueError as error:
            raise UserError(f"{job.where}: {error}" if job.where else str(error)) from None


def draw_batch(
    pipe: "StableDiffusion",
    jobs: Sequence[Job],
    files: Mapping[str, object] | None = None,
    origins: Sequence[Mapping[str, object]] = (),
    on_step: "OnStep | None" = None,
) -> "list[Image.Image]":
    """One picture a job, all at once. The jobs share their settings; files are the pictures of `init_image` and `mask`,
    one for all or one a job, origins what is recorded of them, for each job.

    Each has in `info` all that its PNG will say of it, but for the model and the machine.
    """
    if pipe.source is not None:
        pipe.source.check_unwritten()
    own = {one.name: [getattr(job, one.name) for job in jobs] for one in recorded() if one.own}
    shared = {one.name: getattr(jobs[0], one.name) for one in recorded() if not one.own}
    named = {one.name: None for one in recorded() if one.file}
    arguments = {**own, **shared, **named, **(files or {})}
    said: dict[str, object] = {}
    if jobs[0].control:
        arguments["control"] = controls_of(pipe, jobs[0].control)
        said = recorded_controls(jobs[0].control)
    images = pipe.generate(arguments.pop("prompt"), **arguments, on_step=on_step)
    origins = origins or [{}] * len(jobs)
    for place, (image, job, origin) in enumerate(zip(images, jobs, origins, strict=True)):
        image.info |= {**job.parameters(), **origin, **said, "batch": [place, len(images)]}
    return images


@dataclass(frozen=True)
class Draw:
    """How a run draws: what each file says of the model, how pictures are saved, and how many at once.

    batch_size: None is what memory allows. place: a single picture's, as `Drawing` takes it. out: where their names go.
    watching: what is to be seen on the way. lora_dir: where prompts' LoRAs are.
    """

    facts: Mapping[str, object]
    save: Save
    out: TextIO
    watching: Watching
    batch_size: int | None = None
    place: tuple[int, int] | None = None
    lora_dir: Path | None = None


def draw_all(
    pipe: "StableDiffusion", windows: Iterable[Sequence[Picture]], count: int, how: Draw, watch: "Stopwatch"
) -> list[str]:
    """Draw in batches and save each picture as soon as its batch is done. count: of all that is left.

    Returns a line for each picture that cannot be drawn because of a file that it names; the others are.
    """
    failed: list[str] = []
    loras = PromptLoras(pipe, how.lora_dir)
    with Progress(count, how.out) as progress:
        progress.shows = how.watching.show
        if how.watching.anything:
            progress.watch(pipe, how.watching)
        for window in windows:
            for group in groups(window, lambda job: (job.settings(), named(job), _chunks(pipe, job), *_sizes(job))):
                kept, lines = readable(group)
                failed += lines
                progress.fewer(len(lines))
                if kept:
                    loras.use(kept[0][0])
                    said = loras.recorded(kept[0][0])
                    _draw_group(pipe, kept, replace(how, facts={**how.facts, **said}), progress, watch)
    return failed


def _draw_group(
    pipe: "StableDiffusion", group: Sequence[Picture], how: Draw, progress: "Progress", watch: "Stopwatch"
) -> None:
    def make_room(size: int) -> None:
        release(pipe.device)
        progress.note(f"out of memory; going on with {size} at once")

    files = dict(group)
    drawing = Drawing(pipe, group[0][0], progress, watch, how.place)
    size = drawing.batch_size(how.place[1] if how.place else how.batch_size)
    for batch, drawn in draw_in_batches(list(files), drawing.draw, size, is_out_of_memory, make_room):
        for job, image in zip(batch, drawn, strict=True):
            name = how.save(image, files[job], {**image.info, **how.facts})
            progress.picture(printable(f"{name}  seed {job.seed}"))
        progress.batch(drawn)


def _named(job: Job) -> dict[str, str]:
    """The files that it names, by parameter."""
    found = {one.name: getattr(job, one.name) for one in recorded() if one.file}
    return {name: file for name, file in found.items() if file}


def _chunks(pipe: "StableDiffusion", job: Job) -> tuple[int, ...]:
    """How long what the network reads is: beside longer prompts a picture would be another than alone."""
    return pipe.chunks(job.prompt, job.negative_prompt, job.cfg_scale, job.steps, job.prompt_syntax)


def _sizes(job: Job) -> tuple:
    """The shapes of these pictures, which decide that of what is drawn."""
    from sd.images import size_of_file

    return tuple(size_of_file(file) for file in _named(job).values())


def readable(group: Sequence[Picture]) -> tuple[list[Picture], list[str]]:
    """The pictures whose files can be read, all of them decoded, and a line for each of the others."""
    from sd.images import check_whole

    faults: dict[str, str] = {}
    for file in dict.fromkeys(file for job, _ in group for file in _named(job).values()):
        try:
            check_whole(file)
        except ValueError as error:
            faults[file] = str(error)
    kept, lines = [], []
    for job, out in group:
        wrong = [faults[file] for file in _named(job).values() if file in faults]
        if wrong:
            lines.append(f"{job.where}: {wrong[0]}" if job.where else wrong[0])
        else:
            kept.append((job, out))
    return kept, lines


class Drawing:
    """Draws the jobs of one group, which share the settings of `like`.

    place: in a batch, (2, 8) for the third of eight. The one job is drawn there, because a kernel may round
    differently in batches of another size.
    """

    def __init__(
        self,
        pipe: "StableDiffusion",
        like: Job,
        progress: "Progress",
        watch: "Stopwatch",
        place: tuple[int, int] | None,
    ):
        self.pipe = pipe
        self.like = like
        self.progress = progress
        self.watch = watch
        self.place = place
        self.files = NamedFiles()

    def batch_size(self, asked: int | None) -> int:
        """Pictures at once. Raises UserError where so many, or a single one, cannot fit into the memory there is."""
        pipe, side = self.pipe, self.pipe.config.image_size
        height, width = self.like.height or side, self.like.width or side
        if "vae-tiling" in {name.partition("=")[0] for name in pipe.optimizations}:
            height, width = min(height, side), min(width, side)
        return pictures_at_once(pipe.config, height, width, pipe.dtype, pipe.device, asked)

    def draw(self, batch: Sequence[Job]) -> "list[Image.Image]":
        """The pictures, with all that their files will say of them in `info`."""
        if self.place:
            place, size = self.place
            return [self._draw(list(batch) * size)[place]]
        return self._draw(batch)

    def _draw(self, batch: Sequence[Job]) -> "list[Image.Image]":
        origins = [self.files.origin(job) for job in batch]
        images = draw_batch(self.pipe, batch, self.files.pictures(batch), origins, self.progress.step)
        self.watch.add(self.pipe.times)
        return images


class NamedFiles:
    """The pictures that jobs name, each read once."""

    def __init__(self):
        self.read: dict[str, Image.Image] = {}
        self.prints: dict[str, str] = {}

    def pictures(self, batch: Sequence[Job]) -> dict[str, "Image.Image | list[Image.Image]"]:
        """For `draw_batch`: one where it is the same for all, which is encoded once. Raises ValueError."""
        from sd.images import read

        named = [_named(job) for job in batch]
        self.read = {file: self.read.get(file) or read(file) for one in named for file in one.values()}
        found = {}
        for name in named[0]:
            files = [one[name] for one in named]
            found[name] = self.read[files[0]] if len(set(files)) == 1 else [self.read[file] for file in files]
        return found

    def origin(self, job: Job) -> dict[str, str]:
        """What is recorded of a job's: their names, and fingerprints by which they are found again."""
        from sd.pictures.provenance import fingerprint

        named = _named(job)
        for file in named.values():
            self.prints[file] = self.prints.get(file) or fingerprint(file)
        return named | {f"{name}_hash": self.prints[file] for name, file in named.items()}


# ---- what is seen of it


class Stopwatch:
    """Seconds by stage, in the order of their first appearance."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.add({stage: time.perf_counter() - start})

    def add(self, seconds: dict[str, float]) -> None:
        for stage, more in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + more

    def __str__(self) -> str:
        return "  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items())


class Progress:
    """Bars on stderr: the steps of a batch and, over several pictures, those that are done. File names on `out`."""

    def __init__(self, pictures: int, out: TextIO):
        self.pictures = pictures
        self.out = out
        self.watcher: Watcher | None = None
        self.bars: dict[str, object] = {}
        self.shows, self.shown = False, 0

    def __enter__(self) -> "Progress":
        if self.pictures > 1:
            self._bar("pictures", self.pictures, unit="picture")
        return self

    def __exit__(self, *error: object) -> None:
        for bar in reversed(self.bars.values()):
            bar.close()

    def watch(self, pipe: "StableDiffusion", asked: Watching) -> None:
        """Show the pictures as they form, too."""
        if any(name.startswith("loop-graph") for name in pipe.optimizations):
            self.note("previews come when all steps are done: loop-graph makes them at once")
        self.watcher = Watcher(pipe, asked, partial(self.note, end=""), terminal_of(sys.stderr))

    def batch(self, images: "Sequence[Image.Image]") -> None:
        """A batch is drawn and saved."""
        for name in self.watcher.finished(images) if self.watcher else ():
            self.line(name)
        if self.shows:
            show(images, self.shown, self.out, partial(self.line, end=""))
            self.shown += len(images)

    def step(self, step: int, steps: int, latents: object) -> None:
        """The callback for `generate`: the bar appears with the first step of each batch."""
        if self.watcher:
            self.watcher.step(step, steps, latents)
        if step == 1 and "denoise" in self.bars:
            self.bars["denoise"].reset(steps)
        self._bar("denoise", steps, unit="it", leave=self.pictures == 1).update()

    def picture(self, line: str) -> None:
        """One is done: the line on `out`, whatever bars are shown."""
        self.line(line)
        if "pictures" in self.bars:
            self.bars["pictures"].update()

    def fewer(self, pictures: int) -> None:
        """So many of them are not drawn."""
        if "pictures" in self.bars:
            self.bars["pictures"].total -= pictures
            self.bars["pictures"].refresh()

    def line(self, line: str, end: str = "\n") -> None:
        from tqdm import tqdm

        tqdm.write(line, file=self.out, end=end)

    def note(self, line: str, end: str = "\n") -> None:
        """A line on stderr, beside the bars."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr, end=end)

    def _bar(self, name: str, total: int, **options: object):
        from tqdm import tqdm

        if name not in self.bars:
            self.bars[name] = tqdm(total=total, desc=name, **options)
        return self.bars[name]


# ---- how much fits into memory

MOST_AT_ONCE = {"cpu": 1, "cuda": 8, "mps": 4}
"""Pictures at once, beyond which too little is gained for what waiting costs: the first is there with the last.

Four alone over four in a batch, two cores of a CPU at 128x128: about 1.3x (bench/asides.py batches); eight over eight
on an H100 at 512x512: 1.38x (README, the ladder). So a CPU draws one by one, and --batch-size 4 says otherwise.
"""

CGROUPS = "/sys/fs/cgroup"
LIVE_MAPS = 8
SHARE = 0.8


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator and some backends raise a plain RuntimeError; oneDNN's names no reason at all."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    texts = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "could not create a primitive")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def release(device: "torch.device") -> None:
    """Give back what a failed batch left behind."""
    import torch

    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def free_memory(device: "torch.device") -> int | None:
    """Bytes that new tensors on the device can take, or None where it cannot be told."""
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _available_ram()


def _available_ram() -> int | None:
    """The kernel's estimate, or what a container's limit leaves, whichever is less."""
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *_left_by_cgroup()])


def _left_by_cgroup() -> list[int]:
    groups = [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ]
    left = []
    for names in groups:
        try:
            limit, used, stat = (Path(CGROUPS, name).read_text() for name in names)
            counts = dict(line.split() for line in stat.splitlines())
            cached = counts.get("total_inactive_file") or counts["inactive_file"]  # files that would give way
            left.append(max(0, int(limit) - int(used) + int(cached)))
        except (OSError, KeyError, ValueError):  # not there, or "max"
            continue
    return left


def picture_bytes(config: Config, height: int, width: int, dtype: "torch.dtype") -> int:
    """About what drawing one picture takes beside the weights, height and width in pixels.

    The peak is in the VAE's decoder, where maps of 2 * ch channels at full resolution meet: LIVE_MAPS of them count
    the convolution's work space too.
    """
    return LIVE_MAPS * 2 * config.vae.ch * height * width * dtype.itemsize


def pictures_at_once(
    config: Config, height: int, width: int, dtype: "torch.dtype", device: "torch.device", asked: int | None = None
) -> int:
    """The batch to try first: what was asked for, else as many as gain anything and fit into SHARE of the memory.

    Raises UserError where what is asked for, or a single picture, takes more than there is.
    """
    most = MOST_AT_ONCE.get(device.type, 1)
    if (free := free_memory(device)) is None:
        return asked or most
    each = picture_bytes(config, height, width, dtype)
    if each * (asked or 1) > free:
        raise UserError(_too_large(height, width, asked or 1, each, free))
    return asked or max(1, min(most, int(free * SHARE) // each))


def _too_large(height: int, width: int, count: int, each: int, free: int) -> str:
    what = f"{height}x{width}" if count == 1 else f"{count} pictures of {height}x{width} at once"
    if count > 1 and free >= each:
        instead = f"--batch-size {free // each}"
    else:
        instead = "a smaller --height and --width, --dtype float16 on a GPU, or --opt vae-tiling"
    return f"{what} takes about {each * count / 2**30:.1f} GB, and {free / 2**30:.1f} GB are free: {instead}"
