"""What a client of the service may ask for: the parameters of a prompts file as JSON, checked and limited.

The checks are the command line's own (sd/pictures/parameters.py); this adds the limits that a server needs, because
others pay for what it draws. Neither torch nor a web framework is imported.
"""

import base64
import io
import json
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from sd.config import Config
from sd.pictures.loras import refuse
from sd.pictures.parameters import PARAMETERS, UserError, Whole, checked
from sd.pictures.plan import Job, plan
from sd.pictures.prompts_file import Entry
from sd.service.worker import FailedError

if TYPE_CHECKING:
    from PIL import Image

MOST_PIXELS = 4096 * 4096
"""Of an uploaded picture: a small file can unpack to gigabytes."""

MOST_OBLONG = 4
"""The longer side of an uploaded picture over its shorter one: it decides the shape of what is drawn from it."""


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
    """The pictures of one request. files: those that it brings along, by parameter; origin: what PNGs say of them.

    preview: every so many steps, the client sees it as it forms.
    """

    jobs: Sequence[Job]
    files: "Mapping[str, Image.Image]" = field(default_factory=dict)
    origin: Mapping[str, object] = field(default_factory=dict)
    preview: int | None = None


def read_order(body: bytes, limits: Limits, config: Config) -> Order:
    """A JSON object of parameters, in bytes -> what to draw. Raises FailedError, 400 or 422, with one line."""
    values = _json_object(body)
    uploads = {one.name: values.pop(one.name, None) for one in PARAMETERS.values() if one.file}
    uploads = {name: upload for name, upload in uploads.items() if upload is not None}
    preview = values.pop("preview", None)
    try:
        preview = None if preview is None else Whole(1, 1000)("preview", preview)
        given = _checked(values, limits)
        _check_size(given, limits, config)
        jobs = _plan(given | dict.fromkeys(uploads, "upload"), limits)
        refuse(jobs)
        read = {name: _read_upload(name, upload) for name, upload in uploads.items()}
        files = {name: image for name, (image, _) in read.items()}
        if "outpaint" in given and not {"height", "width"} & set(given):
            _check_growth(files["init_image"], given["outpaint"], limits)
        origin = {key: value for _, said in read.values() for key, value in said.items()}
        return Order(jobs, files, origin, preview)
    except (ValueError, UserError) as error:
        raise FailedError(422, str(error)) from None


def _json_object(body: bytes) -> dict[str, object]:
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
        _check_below(name, value, limits)
    given = checked("", values)
    if "prompt" not in given:
        raise ValueError("prompt is missing")
    for name, value in given.items():
        if (most := limits.of(name)) is None:
            continue
        if isinstance(value, str):
            if len(value) > most:
                raise ValueError(f"{name} must be at most {most} characters, not {len(value)}")
        elif value > most:
            raise ValueError(f"{name} must be at most {most} here, not {value}")
    return given


def _check_below(name: str, value: object, limits: Limits) -> None:
    """A whole number under its range is told this server's limits, not those of the command line."""
    check = PARAMETERS[name].check if name in PARAMETERS else None
    most = limits.of(name) if isinstance(check, Whole) else None
    if most is not None and isinstance(value, int | float) and value < check.low:
        replace(check, high=most, high_text="")(name, value)


def _check_size(given: Mapping[str, object], limits: Limits, config: Config) -> None:
    side = config.image_size
    height, width = given.get("height", side), given.get("width", side)
    config.check_size(height, width)
    if (largest := max(height, width) * given.get("hires", 1)) > limits.max_side:
        raise ValueError(f"hires makes {largest:g} pixels of a side, and at most {limits.max_side} are drawn here")


def _check_growth(image: "Image.Image", sides: str, limits: Limits) -> None:
    left, top, right, bottom = (int(n) for n in sides.split(","))
    if max(image.width + left + right, image.height + top + bottom) > limits.max_side:
        raise ValueError(f"outpaint: at most {limits.max_side} pixels of a side are drawn here")


def _plan(given: Mapping[str, object], limits: Limits) -> Sequence[Job]:
    return plan([Entry("", given)], defaults_within(limits), first_seed=secrets.randbelow(2**32))


def defaults_within(limits: Limits) -> dict[str, object]:
    """The parameters' defaults that are numbers, as far as the limits allow."""
    numbers = {one.name: one.default for one in PARAMETERS.values() if isinstance(one.default, int | float)}
    return {name: value if (most := limits.of(name)) is None else min(value, most) for name, value in numbers.items()}


def _read_upload(name: str, upload: object) -> "tuple[Image.Image, dict[str, object]]":
    """A picture file in base64, a data: URL too -> the picture, and what is recorded of it. Raises ValueError."""
    from sd.pictures.provenance import fingerprint

    if not isinstance(upload, str):
        raise ValueError(f"{name} must be a picture file in base64")
    try:
        data = base64.b64decode(upload.rpartition("base64,")[2], validate=True)
    except ValueError:
        raise ValueError(f"{name} is not base64") from None
    image = _decode(name, data)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return image, {name: "upload", f"{name}_hash": fingerprint(file.name)}


def _decode(name: str, data: bytes) -> "Image.Image":
    from PIL import Image

    from sd.images import FORMATS, upright

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:  # decoders raise whatever they stumble over
        raise ValueError(f"{name} cannot be read as a picture") from None
    width, height = image.size
    if width * height > MOST_PIXELS or max(image.size) > MOST_OBLONG * min(image.size):
        raise ValueError(f"{name} is {width}x{height}: over 4096x4096 pixels, or too oblong")
    try:
        return upright(image)
    except Exception:
        raise ValueError(f"{name} is a damaged picture") from None
