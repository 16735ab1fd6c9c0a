"""What a client of the service may ask for: the parameters of a prompts file as JSON, checked and limited.

The checks are the command line's own (sd/pictures/parameters.py); this adds the limits that a server needs, because
others pay for what it draws. Neither torch nor a web framework is imported.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from sd.config import Config
from sd.pictures.parameters import PARAMETERS, Number, UserError, Whole, checked, shown
from sd.pictures.plan import Job, plan
from sd.pictures.prompts_file import Entry
from sd.service.offers import Offers
from sd.service.uploads import Upload, read_upload
from sd.service.worker import FailedError


def _limit(default: int, what: str) -> Any:
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Limits:
    """The most that one request, or all that wait, may take. $SD_MAX_STEPS and --max-steps set max_steps, and so on."""

    max_steps: int = _limit(150, "denoising steps of a picture")
    max_side: int = _limit(1024, "height and width in pixels")
    max_num_images: int = _limit(4, "pictures of a request")
    max_prompt: int = _limit(2000, "characters of a prompt")
    max_body: int = _limit(8 * 2**20, "bytes of a request")
    max_queue: int = _limit(8, "requests that wait while one is drawn")
    max_connections: int = _limit(256, "connections at once")
    max_client_connections: int = _limit(32, "connections of one client")

    def __post_init__(self):
        for one in fields(self):
            low = 0 if one.name == "max_queue" else 1
            if getattr(self, one.name) < low:
                raise ValueError(f"{one.name} must be at least {low}, not {getattr(self, one.name)}")

    def of(self, name: str) -> int | None:
        """The most that a picture's parameter may be, in characters of a text; None: what its check allows."""
        limit = PARAMETERS[name].limit
        return None if limit is None else getattr(self, limit)


def limits_from_env(environ: Mapping[str, str]) -> Limits:
    """Limits with what SD_MAX_STEPS, SD_MAX_SIDE, ... say. Raises UserError."""
    given = {one.name: environ.get(f"SD_{one.name.upper()}") for one in fields(Limits)}
    for name, text in given.items():
        if text and not text.isdecimal():
            raise UserError(f"SD_{name.upper()} must be a whole number, not {text!r}")
    return Limits(**{name: int(text) for name, text in given.items() if text})


@dataclass(frozen=True)
class Order:
    """The pictures of one request. uploads: those that it brings along; origin: what PNGs say of them.

    opt: optimizations beside those that always run. preview: every so many steps, the client sees it as it forms.
    size: how much work it is: steps times pixels.
    """

    jobs: Sequence[Job]
    uploads: Sequence[Upload] = ()
    origin: Mapping[str, object] = field(default_factory=dict)
    opt: Sequence[str] = ()
    preview: int | None = None
    size: float = 1.0


def read_order(body: bytes, limits: Limits, config: Config, offers: Offers = Offers()) -> Order:  # noqa: B008 (frozen)
    """A JSON object of parameters, in bytes -> what to draw. Raises FailedError, 400 or 422, with one line."""
    values = json_object(body)
    uploads = {one.name: values.pop(one.name, None) for one in PARAMETERS.values() if one.file}
    uploads = {name: upload for name, upload in uploads.items() if upload is not None}
    preview, opt = values.pop("preview", None), values.pop("opt", None)
    try:
        opt = () if opt is None else offers.chosen(opt)
        preview = None if preview is None else Whole(1, 1000)("preview", preview)
        given = _checked(values, limits)
        jobs = _plan(given | dict.fromkeys(uploads, "upload"), limits)
        offers.check_loras(jobs)
        read = [read_upload(name, upload) for name, upload in uploads.items()]
        _check_size(given, {one.name: one for one in read}, limits, config)
        origin = {key: value for one in read for key, value in one.said().items()}
        return Order(jobs, read, origin, opt, preview, _size(jobs, config))
    except (ValueError, UserError) as error:
        raise FailedError(422, str(error)) from None


def json_object(body: bytes) -> dict[str, object]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FailedError(400, f"the body is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise FailedError(400, 'the body is not an object such as {"prompt": "a fox", "steps": 30}')
    return values


def _checked(values: Mapping[str, object], limits: Limits) -> dict[str, object]:
    if named := [name for name in values if name in PARAMETERS and PARAMETERS[name].local]:
        raise ValueError(f"{named[0]} names files of this machine, and cannot be given here")
    for name, value in values.items():
        check_limit(name, value, limits)
    given = checked("", values)
    if "prompt" not in given:
        raise ValueError("prompt is missing")
    return given


def check_limit(name: str, value: object, limits: Limits) -> None:
    """Before the parameter's own check, whose limits are those of the command line: that of this server is told."""
    most = limits.of(name) if name in PARAMETERS else None
    if most is None or isinstance(value, bool):
        return
    if isinstance(value, str) and len(value) > most:
        raise ValueError(f"{name} must be at most {most} characters, not {len(value)}")
    check = PARAMETERS[name].check
    if not isinstance(value, int | float) or not isinstance(check, Whole | Number):
        return
    if value < check.low:
        raise ValueError(f"{name} must be from {check.low} to {min(most, check.high)}, not {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most} here, not {shown(value)}")


def _check_size(given: Mapping[str, object], uploads: Mapping[str, Upload], limits: Limits, config: Config) -> None:
    """What is drawn, whoever chooses its size, and what is made on the way. Raises ValueError."""
    from sd.edits import canvas_size, larger_size, sides  # which import torch

    most, image = limits.max_side, uploads.get("init_image")
    if image and "outpaint" in given:  # the canvas is made whatever is drawn of it
        width, height = image.size
        if (largest := max(canvas_size(height, width, sides(given["outpaint"])))) > most:
            raise ValueError(f"outpaint: at most {most} pixels of a side are drawn here, not {largest}")
    height, width = _drawn_size(given, image, "mask" in uploads, config)
    config.check_size(height, width)
    if max(height, width) > most:
        found = f"{height}x{width} (height x width)"
        raise ValueError(f"at most {most} pixels of a side are drawn here, not {found}: give height and width")
    if (largest := max(larger_size(height, width, given.get("hires", 1), config.size_multiple))) > most:
        raise ValueError(f"hires makes {largest} pixels of a side, and at most {most} are drawn here")


def _drawn_size(given: Mapping[str, object], image: Upload | None, masked: bool, config: Config) -> tuple[int, int]:
    """Height and width: where they are not given, those that the pipeline chooses for this picture, or for none."""
    from sd.edits import canvas_size, near_area, other_side, rounded_up, sides

    shape = natural = (config.image_size, config.image_size)
    if image and "outpaint" in given:
        width, height = image.size
        shape = natural = rounded_up(canvas_size(height, width, sides(given["outpaint"])), config.size_multiple)
    elif image and not (masked and "mask_padding" in given):
        shape = height, width = image.size[1], image.size[0]
        natural = near_area(height, width, config.image_size, config.size_multiple)
    height, width = given.get("height"), given.get("width")
    if image and (height is None) != (width is None):
        return other_side(height, width, shape, config.size_multiple)
    return tuple(b if a is None else a for a, b in zip((height, width), natural, strict=True))


def _plan(given: Mapping[str, object], limits: Limits) -> Sequence[Job]:
    return plan([Entry("", given)], defaults_within(limits), first_seed=secrets.randbelow(2**32))


def _size(jobs: Sequence[Job], config: Config) -> float:
    job, side = jobs[0], config.image_size
    pixels = (job.height or side) * (job.width or side)
    return len(jobs) * job.steps * pixels * (1 + (job.hires or 0) ** 2)


def defaults_within(limits: Limits) -> dict[str, object]:
    """The parameters' defaults that are numbers, as far as the limits allow."""
    numbers = {one.name: one.default for one in PARAMETERS.values() if isinstance(one.default, int | float)}
    return {name: value if (most := limits.of(name)) is None else min(value, most) for name, value in numbers.items()}
