"""Drawing what is planned: in batches that fit into memory, each picture written as soon as it is there.

torch is imported by what needs it, when it is called: the command line answers a typing error without it.
"""

import gc
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sd.config import Config
from sd.pictures.controls import controls_of, recorded_controls
from sd.pictures.parameters import UserError, recorded
from sd.pictures.plan import Job, Picture, draw_in_batches, groups

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from sd.pipeline import OnStep, StableDiffusion


def check_sizes(pipe: "StableDiffusion", pictures: Sequence[Picture]) -> None:
    side = pipe.config.image_size
    for job, _ in pictures:
        try:
            pipe.config.check_size(job.height or side, job.width or side)
        except ValueError as error:
            raise UserError(f"{job.where}: {error}" if job.where else str(error)) from None


def draw_batch(
    pipe: "StableDiffusion",
    jobs: Sequence[Job],
    init_image: "Image.Image | None" = None,
    origin: Mapping[str, object] | None = None,
    on_step: "OnStep | None" = None,
    mask: "Image.Image | None" = None,
) -> "list[Image.Image]":
    """One picture a job, all at once. The jobs share their settings; init_image and mask are the pictures of those
    parameters, origin what is recorded of them.

    Each has in `info` all that its PNG will say of it, but for the model and the machine.
    """
    own = {one.name: [getattr(job, one.name) for job in jobs] for one in recorded() if one.own}
    shared = {one.name: getattr(jobs[0], one.name) for one in recorded() if not one.own}
    arguments = {**own, **shared, "init_image": init_image, "mask": mask}
    if jobs[0].control:
        arguments["control"] = controls_of(pipe, jobs[0].control)
        origin = {**(origin or {}), **recorded_controls(jobs[0].control)}
    images = pipe.generate(arguments.pop("prompt"), **arguments, on_step=on_step)
    for place, (image, job) in enumerate(zip(images, jobs, strict=True)):
        image.info |= {**job.parameters(), **(origin or {}), "batch": [place, len(images)]}
    return images


def draw_all(
    pipe: "StableDiffusion",
    pictures: Sequence[Picture],
    facts: Mapping[str, object],
    watch: "Stopwatch",
    batch_size: int | None = None,
    place: tuple[int, int] | None = None,
) -> None:
    """Draw in batches and write each picture as soon as its batch is done.

    facts: what each PNG says of the model. batch_size: None is what memory allows. place: a single picture's, as
    `Drawing` takes it.
    """
    from sd.pictures.png import save_png

    with Progress(len(pictures)) as progress:

        def make_room(size: int) -> None:
            release(pipe.device)
            progress.note(f"out of memory; going on with {size} at once")

        for group in groups(pictures):
            files = dict(group)
            drawing = Drawing(pipe, group[0][0], progress, watch, place if len(pictures) == 1 else None)
            size = batch_size or drawing.auto_batch_size()
            for batch, drawn in draw_in_batches(list(files), drawing.draw, size, is_out_of_memory, make_room):
                for job, image in zip(batch, drawn, strict=True):
                    save_png(image, files[job], {**image.info, **facts})
                    progress.picture(f"{files[job]}  seed {job.seed}")


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

    def auto_batch_size(self) -> int:
        side = self.pipe.config.image_size
        height, width = self.like.height or side, self.like.width or side
        return pictures_at_once(self.pipe.config, height, width, self.pipe.dtype, self.pipe.device)

    def draw(self, batch: Sequence[Job]) -> "list[Image.Image]":
        """The pictures, with all that their PNGs will say of them in `info`."""
        if self.place:
            place, size = self.place
            return [self._draw(list(batch) * size)[place]]
        return self._draw(batch)

    def _draw(self, batch: Sequence[Job]) -> "list[Image.Image]":
        images = draw_batch(self.pipe, batch, self.init_image, self.origin, self.progress.step, self.mask)
        self.watch.add(self.pipe.times)
        return images

    @cached_property
    def init_image(self) -> "Image.Image | None":
        from sd.images import read_rgb

        return read_rgb(self.like.init_image) if self.like.init_image else None

    @cached_property
    def mask(self) -> "Image.Image | None":
        from sd.images import read

        return read(self.like.mask) if self.like.mask else None

    @cached_property
    def origin(self) -> dict[str, str]:
        from sd.pictures.provenance import fingerprint

        named = {name: getattr(self.like, name) for name in ("init_image", "mask")}
        given = {name: file for name, file in named.items() if file}
        return given | {f"{name}_hash": fingerprint(file) for name, file in given.items()}


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
    """Bars on stderr: the steps of a batch and, over several pictures, those that are done. File names on stdout."""

    def __init__(self, pictures: int):
        self.pictures = pictures
        self.bars: dict[str, object] = {}

    def __enter__(self) -> "Progress":
        if self.pictures > 1:
            self._bar("pictures", self.pictures, unit="picture")
        return self

    def __exit__(self, *error: object) -> None:
        for bar in reversed(self.bars.values()):
            bar.close()

    def step(self, step: int, steps: int, latents: object) -> None:
        """The callback for `generate`: the bar appears with the first step of each batch."""
        if step == 1 and "denoise" in self.bars:
            self.bars["denoise"].reset(steps)
        self._bar("denoise", steps, unit="it", leave=self.pictures == 1).update()

    def picture(self, line: str) -> None:
        """One is done: the line on stdout, whatever bars are shown."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
        if "pictures" in self.bars:
            self.bars["pictures"].update()

    def note(self, line: str) -> None:
        """A line on stderr, beside the bars."""
        from tqdm import tqdm

        tqdm.write(line, file=sys.stderr)

    def _bar(self, name: str, total: int, **options: object):
        from tqdm import tqdm

        if name not in self.bars:
            self.bars[name] = tqdm(total=total, desc=name, **options)
        return self.bars[name]


# ---- how much fits into memory

MOST_AT_ONCE = {"cpu": 4}
"""Pictures in a batch beyond which nothing is gained but latency: a CPU is busy with one already."""

MOST_ON_ACCELERATOR = 16
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
    pairs = [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")]
    left = []
    for limit, usage in pairs:
        try:
            limit_bytes, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, usage))
        except (OSError, ValueError):  # not there, or "max"
            continue
        left.append(max(0, limit_bytes - used))
    return left


def picture_bytes(config: Config, height: int, width: int, dtype: "torch.dtype") -> int:
    """About what drawing one picture takes beside the weights, height and width in pixels.

    The peak is in the VAE's decoder, where maps of 2 * ch channels at full resolution meet: LIVE_MAPS of them count
    the convolution's work space too.
    """
    return LIVE_MAPS * 2 * config.vae.ch * height * width * dtype.itemsize


def pictures_at_once(config: Config, height: int, width: int, dtype: "torch.dtype", device: "torch.device") -> int:
    """The batch to try first: as many as should fit into SHARE of the memory, at least 1."""
    most = MOST_AT_ONCE.get(device.type, MOST_ON_ACCELERATOR)
    if (free := free_memory(device)) is None:
        return most
    fit = int(free * SHARE) // picture_bytes(config, height, width, dtype)
    return max(1, min(most, fit))
