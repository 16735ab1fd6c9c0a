"""The parameters of a picture: each stands here once, with its default, its check and its help.

Command line, prompts files, PNGs and --from-png, service, page and Modal read PARAMETERS when they need it. A new
parameter is one line of it, and an argument of that name of `StableDiffusion.generate`, which uses it.
"""

import argparse
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from sd import hints, prompts, samplers, schedules
from sd.nearest import is_it, there_are
from sd.prompt_steps import over_steps

log = logging.getLogger(__name__)


class UserError(Exception):
    """Something that the person at the keyboard can put right: printed in one line, exit code 2."""


class OneLineParser(argparse.ArgumentParser):
    """Raises UserError for a wrong option, in place of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._meant(message)} (--help lists all options)")

    def _meant(self, message: str) -> str:
        """What is spelled like an option that there is not, or like a value that it does not take."""
        if re.fullmatch(r"unrecognized arguments: [^-].*", message) and "--prompt" in self._option_string_actions:
            return "; a prompt is --prompt TEXT, in quotes"
        if match := re.fullmatch(r"unrecognized arguments: (?:.* )?(--?[a-z][\w-]*)\b.*", message):
            return is_it(match[1], self._option_string_actions)
        match = re.fullmatch(r"argument (?:\S+/)?(--[\w-]+): invalid choice: '(.*)' \(choose from .*\)", message)
        return is_it(match[2], self._option_string_actions[match[1]].choices) if match else ""


class Last(argparse.Action):
    """The last of an option's values holds; that others are not used is said."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            log.warning("%s is given more than once: the last one holds", self.option_strings[-1])
        setattr(namespace, self.dest, values)


# ---- what a value must be: check(name, value) -> the value, or ValueError that says what the parameter takes


LONGEST = 1_000_000
"""Characters of a text. What is beyond is a mistake, or somebody's who means harm."""


@dataclass(frozen=True)
class Text:
    kind: ClassVar[type] = str
    metavar: ClassVar[str] = "TEXT"

    def __call__(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, not {shown(value)}")
        if len(value) > LONGEST:
            raise ValueError(f"{name} must be at most {LONGEST} characters, not {len(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds characters that are not Unicode text") from None
        return value


@dataclass(frozen=True)
class Whole:
    """A whole number from low to high, both included; high_text says high where its digits would not."""

    low: int
    high: int
    high_text: str = ""
    kind: ClassVar[type] = int
    metavar: ClassVar[str] = "N"

    def __call__(self, name: str, value: object) -> int:
        whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
        if not whole or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, not {shown(value)}")
        if not self.low <= value <= self.high:
            raise ValueError(f"{name} must be from {self.low} to {self.high_text or self.high}, not {shown(value)}")
        return int(value)  # spreadsheets write 20.0


@dataclass(frozen=True)
class Number:
    """A finite number from low to high, both included, or over low."""

    low: float
    high: float
    over: bool = False
    kind: ClassVar[type] = float
    metavar: ClassVar[str] = "X"

    def __call__(self, name: str, value: object) -> float:
        # Whole numbers of JSON have any length: those that are no float at all are finite, and compared as they are.
        if not isinstance(value, int | float) or isinstance(value, bool) or value != value or value in (INF, -INF):
            raise ValueError(f"{name} must be a finite number, not {shown(value)}")
        if not self.low <= value <= self.high or (self.over and value == self.low):
            span = f"over {self.low} and at most {self.high}" if self.over else f"from {self.low} to {self.high}"
            raise ValueError(f"{name} must be {span}, not {shown(value)}")
        return float(value)


@dataclass(frozen=True)
class Choice:
    options: tuple[str, ...]
    kind: ClassVar[type] = str
    metavar: ClassVar[None] = None

    def __call__(self, name: str, value: object) -> str:
        if value not in self.options:
            raise ValueError(f"no {name} {shown(value)}{there_are(str(value), self.options)}")
        return value


@dataclass(frozen=True)
class Name(Choice):
    """One of the options, as people write it: read(text) is the option, or raises ValueError."""

    read: Callable[[str], str]
    metavar: ClassVar[str] = "NAME"

    def __call__(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, not {shown(value)}")
        return self.read(value) if len(value) <= 60 else super().__call__(name, value)  # whose message is short


@dataclass(frozen=True)
class Switch:
    """On or off: an option without a value."""

    kind: ClassVar[type] = bool
    metavar: ClassVar[None] = None

    def __call__(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {shown(value)}")
        return value


@dataclass(frozen=True)
class Sides:
    """Pixels to the left, top, right and bottom, not all of them 0, as `64,0,64,0`."""

    kind: ClassVar[type] = str
    metavar: ClassVar[str] = "SIDES"

    def __call__(self, name: str, value: object) -> str:
        numbers = value.split(",") if isinstance(value, str) else ()
        if (
            len(numbers) != 4
            or not all(n.strip().isdecimal() and len(n) < 6 for n in numbers)
            or not any(map(int, numbers))
        ):
            raise ValueError(
                f"{name} must be pixels to the left, top, right and bottom, as 64,0,64,0, not {shown(value)}"
            )
        return ",".join(str(int(n)) for n in numbers)


@dataclass(frozen=True)
class Several:
    """One or more values, each as `each` has it: an option that may be repeated, a list in JSON."""

    each: Text | Choice
    kind: ClassVar[type] = str

    @property
    def metavar(self) -> str | None:
        return self.each.metavar

    def __call__(self, name: str, value: object) -> tuple[str, ...]:
        values = value if isinstance(value, list | tuple) and value else [value]
        return tuple(self.each(name, one) for one in values)


INF = math.inf
Check = Text | Whole | Number | Choice | Switch | Sides | Several


def shown(value: object) -> str:
    """The value for an error's one line, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# ---- the table


@dataclass(frozen=True)
class Parameter:
    """One parameter of a picture.

    default: None is for `generate` to choose.
    help: may name {default}, and {low} and {high} of the check.
    limit: the field of the service's Limits that holds the most it takes: a number, or the length of a text.
    label: what the service's page calls it, if not by its name.
    metavar: in --help, if not the one of its kind.
    flag: it is an option of the command line; the prompt is one of another kind.
    own: pictures of one batch may differ in it.
    recorded: a picture's PNG says it. What does not say how one picture looks, is not.
    file: it names a file of this machine; the service takes the file's bytes.
    local: it names files of this machine, and nobody elsewhere can give it.
    beside: other parameters; without any of them this one says nothing.
    short: its one-letter option.
    """

    name: str
    check: Check
    help: str
    default: object = None
    limit: str | None = None
    label: str | None = None
    metavar: str | None = None
    flag: bool = True
    own: bool = False
    recorded: bool = True
    file: bool = False
    local: bool = False
    beside: tuple[str, ...] = ()
    short: str | None = None

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def portable(self) -> bool:
        """Whether it says the same on another machine, where this one's files are not."""
        beside = [PARAMETERS[name].portable for name in self.beside]
        return not (self.file or self.local) and (not beside or any(beside))

    def says_something(self, values: Mapping[str, object]) -> bool:
        """Whether one of those that it stands beside is given."""
        return not self.beside or any(values[name] is not None for name in self.beside)

    def words(self, value: object) -> list[str]:
        """As the command line takes it: nothing for None, the option alone for a switch, one a value of several."""
        if value is None or value is False:
            return []
        if value is True:
            return [self.option]
        return [f"{self.option}={one}" for one in (value if isinstance(value, tuple) else (value,))]

    def described(self) -> str:
        """`help` with the numbers put in."""
        low, high = (getattr(self.check, bound, None) for bound in ("low", "high"))
        return self.help.format(default=self.default, low=low, high=high)


_ROWS = (
    Parameter("prompt", Text(), "what to draw", limit="max_prompt", flag=False, own=True),
    Parameter(
        "negative_prompt", Text(), "what the picture should not show", "", limit="max_prompt", own=True, short="-n"
    ),
    Parameter("steps", Whole(1, 1000), "denoising steps, {low} to {high} ({default})", 50, limit="max_steps"),
    Parameter(
        "cfg_scale", Number(-1000, 1000), "guidance ({default}); 1 turns it off, twice as fast", 7.5, label="Guidance"
    ),
    Parameter(
        "seed",
        Whole(0, 2**63 - 1, "2**63 - 1"),
        "the first picture's, counting up; -1 is random (drawn at random; prompts file: 0)",
        own=True,
        short="-s",
    ),
    Parameter("height", Whole(1, 2**16), "(the model's own: 512 for SD 1.5)", limit="max_side", metavar="PIXELS"),
    Parameter("width", Whole(1, 2**16), "(the model's own)", limit="max_side", metavar="PIXELS"),
    Parameter(
        "sampler",
        Name(tuple(samplers.SAMPLERS), lambda text: samplers.read(text)[0]),
        "how to denoise ({default}; --list-samplers)",
        "ddpm",
    ),
    Parameter(
        "schedule",
        Name(tuple(schedules.SCHEDULES), samplers.read_schedule),
        "at which noise levels (the sampler's own)",
    ),
    Parameter(
        "eta",
        Number(*samplers.RANGES["eta"]),
        "of samplers that draw noise: how much, {low} to {high} (the sampler's own)",
    ),
    Parameter("s_noise", Number(*samplers.RANGES["s_noise"]), "of samplers that draw noise: its scale (1)"),
    Parameter("solver_order", Whole(1, 4), "of samplers with history: how much of it (the sampler's own)"),
    Parameter(
        "prompt_syntax",
        Choice(prompts.SYNTAXES),
        "weights: (text:1.3) counts 1.3 times; a1111 also (text) and [text]; plain none of it (weights)",
    ),
    Parameter("clip_skip", Whole(1, 12), "read the text from this layer from the end (1, the last)"),
    Parameter("init_image", Text(), "start from this picture instead of noise", metavar="FILE", file=True),
    Parameter(
        "strength",
        Number(0, 1, over=True),
        "share of --init-image redrawn, {low} to {high} ({default})",
        0.8,
        beside=("init_image",),
    ),
    Parameter("mask", Text(), "of --init-image, white where it is drawn anew", metavar="FILE", file=True),
    Parameter(
        "mask_blur",
        Number(0, 1000),
        "pixels over which it goes over to what stays ({default})",
        0.0,
        beside=("mask", "outpaint"),
    ),
    Parameter("mask_invert", Switch(), "black in --mask is drawn anew", False, beside=("mask",)),
    Parameter(
        "mask_padding",
        Whole(0, 2**12),
        "draw only what --mask shows, at full size, with so many pixels around it (all of the picture)",
        beside=("mask",),
        metavar="PIXELS",
    ),
    Parameter(
        "outpaint",
        Sides(),
        "pixels by which --init-image grows to each side",
        metavar="LEFT,TOP,RIGHT,BOTTOM",
        beside=("init_image",),
    ),
    Parameter(
        "hires", Number(1, 4, over=True), "then enlarge the picture so many times, and draw over it", metavar="TIMES"
    ),
    Parameter(
        "hires_strength",
        Number(0, 1, over=True),
        "share of the enlarged picture redrawn ({default})",
        0.5,
        beside=("hires",),
    ),
    Parameter(
        "control",
        Several(Text()),
        "draw after a picture of edges, depth or a pose, by a ControlNet: how much that counts (1), and in which part "
        "of the steps (0-1); repeat it for several",
        metavar="FILE:PICTURE[:WEIGHT[:START-END]]",
        local=True,
    ),
    Parameter(
        "control_preprocess",
        Several(Choice(hints.PREPROCESSORS)),
        "make what it sees of the picture of --control: none, canny (edges; needs OpenCV), invert (black on white); "
        "once for all, or for each (none)",
        metavar="NAME",
        beside=("control",),
    ),
    Parameter(
        "num_images",
        Whole(1, 10**6),
        "pictures of each prompt ({default})",
        1,
        limit="max_num_images",
        label="Pictures",
        recorded=False,
    ),
)
PARAMETERS: dict[str, Parameter] = {row.name: row for row in _ROWS}
"""By name, in the order in which they are listed."""


def defaults() -> dict[str, object]:
    return {name: parameter.default for name, parameter in PARAMETERS.items()}


def recorded() -> list[Parameter]:
    """Those that say how one picture looks."""
    return [parameter for parameter in PARAMETERS.values() if parameter.recorded]


def flags() -> list[Parameter]:
    """Those that are options of the command line."""
    return [parameter for parameter in PARAMETERS.values() if parameter.flag]


def add_options(add: Callable[..., object]) -> None:
    """An option for each; add: the `add_argument` of a parser or a group. What is not given is None."""
    for parameter in flags():
        check = parameter.check
        options = {"metavar": parameter.metavar or check.metavar, "type": check.kind}
        if type(check) is Choice:
            options = {"metavar": options["metavar"], "choices": check.options}
        if type(check) is Text and parameter.flag and parameter.own:
            options |= {"action": Last}
        if type(check) is Several:
            options["action"] = "append"
        if type(check) is Switch:
            options = {"action": "store_const", "const": True}
        names = [name for name in (parameter.short, parameter.option) if name]
        add(*names, help=parameter.described().replace("%", "%%"), **options)


def check_parameter(name: str, value: object) -> object:
    """The value, as the type that this parameter has. Raises ValueError, naming the parameter and what it takes."""
    if name not in PARAMETERS:
        raise ValueError(f"there is no parameter {shown(name)}{there_are(name, PARAMETERS)}")
    return PARAMETERS[name].check(name, value)


def checked(where: str, values: Mapping[str, object]) -> dict[str, object]:
    """The parameters, checked; None means not given. Raises UserError that starts with where."""
    try:
        found = {name: check_parameter(name, value) for name, value in values.items() if value is not None}
        return _named_schedule(values) | found
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None


def _named_schedule(values: Mapping[str, object]) -> dict[str, object]:
    """The schedule that a sampler's name holds, as in `DPM++ 2M Karras`."""
    schedule = samplers.read(values["sampler"])[1] if isinstance(values.get("sampler"), str) else None
    return {"schedule": schedule} if schedule else {}


FAST = {"sampler": "dpmpp_2m", "schedule": "karras", "steps": 20}
"""What `--fast` stands for: docs/samplers.md shows what it costs."""


def fast(given: Mapping[str, object]) -> dict[str, object]:
    """The parameters with those of FAST where none is given; a sampler or a schedule that is given keeps to itself."""
    chosen = given.get("sampler") is not None or given.get("schedule") is not None
    filled = {"steps": FAST["steps"]} if chosen else FAST
    return {**given, **{name: value for name, value in filled.items() if given.get(name) is None}}


def check_together(where: str, values: Mapping[str, object]) -> None:
    """Whether the sampler takes its options and so many steps, and brackets in prompts make sense. Raises UserError."""
    try:
        if values.get("mask") and not values.get("init_image"):
            raise ValueError("mask says which part of a picture is drawn anew: it needs init_image, that picture")
        if values.get("control_preprocess"):
            hints.one_each(values["control_preprocess"], len(values.get("control") or [""]))
        if values.get("outpaint") and not values.get("init_image"):
            raise ValueError("outpaint says how a picture grows: it needs init_image, that picture")
        if values.get("hires") and (values.get("mask") or values.get("outpaint")):
            raise ValueError("hires draws all of a picture again: it cannot be given with mask or outpaint")
        if values.get("mask_padding") is not None and values.get("outpaint"):
            raise ValueError(
                "mask_padding draws a part of the picture, and outpaint what is around it: give one of them"
            )
        samplers.choose(values["sampler"], {name: values.get(name) for name in samplers.OPTIONS})
        schedules.check(samplers.schedule_of(values["sampler"], values.get("schedule")), values["steps"])
        syntax = values.get("prompt_syntax") or "weights"
        for name in ("prompt", "negative_prompt"):
            for form in dict.fromkeys(over_steps(values[name], values["steps"], syntax)):
                prompts.parse(form, syntax)
    except ValueError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from None
